// Mixture of experts: routes rows to experts, and multiplies each expert's weights with its rows (RouteOp, ExpertsOp in
// op.h).
//
// A row's results are added in ascending order of experts. A pair of output tiles belongs to one thread for all
// experts. Sums are therefore the same for one row and many, and for any number of threads.
#pragma once
#include "linear_float.h"
#include "linear_int.h"

namespace {

// Routing -------------------------------------------------------------------------------------------------

// One row's experts in ascending order, the shared one last. p (experts) is scratch.
inline void choose(const RouteOp& op, int row, float* p, int32_t* choice, float* share) {
  const float* logits = op.logits + row * op.stride;
  float top = logits[0], total = 0, chosen = 0;
  for (int e = 1; e < op.experts; e++) top = logits[e] > top ? logits[e] : top;
  map(op.experts, logits, p, [&](F x) { return exponential(sub(x, set1(top))); });
  for (int e = 0; e < op.experts; e++) total += p[e];
  for (int i = 0; i < op.k; i++) {
    int best = -1;  // chosen experts have p < 0; written so that NaN also leads to some expert
    for (int e = 0; e < op.experts; e++)
      if (!(p[e] < 0) && (best < 0 || logits[e] > logits[best])) best = e;
    const float part = p[best] / total;
    p[best] = -1, chosen += part;
    int at = i;
    for (; at > 0 && choice[at - 1] > best; at--) choice[at] = choice[at - 1], share[at] = share[at - 1];
    choice[at] = best, share[at] = part;
  }
  if (op.normalise)
    for (int i = 0; i < op.k; i++) share[i] /= chosen;
  if (!op.shared) return;
  float gate[W];
  st(gate, sigmoid(set1(logits[op.experts])));
  choice[op.k] = op.experts, share[op.k] = gate[0];
}

// A counting sort of all rows' choices.
inline void sort_places(const RouteOp& op, const int32_t* choice, const float* share) {
  const int experts = op.experts + op.shared, each = op.k + op.shared, places = op.rows * each;
  int32_t* first = op.first;
  memset(first, 0, sizeof(int32_t) * (size_t)(experts + 1));
  for (int i = 0; i < places; i++) first[choice[i] + 1]++;
  for (int e = 0; e < experts; e++) first[e + 1] += first[e];
  for (int i = 0; i < places; i++) {
    const int place = first[choice[i]]++;
    op.row[place] = i / each, op.share[place] = share[i];
  }
  // each entry is now its expert's end, the start of the next one
  for (int e = experts; e > 0; e--) first[e] = first[e - 1];
  first[0] = 0;
}

void route_op(const RouteOp& op, const Worker& me) {
  const int each = op.k + op.shared;
  int32_t* choice = (int32_t*)me.shared;
  float* share = (float*)choice + (int64_t)op.rows * each;
  for (int row; (row = pool_take(me, 1)) < op.rows;)
    choose(op, row, (float*)me.scratch, choice + (int64_t)row * each, share + (int64_t)row * each);
  if (op.rows > 1) pool_barrier(me);  // a single row is processed by one thread
  if (me.id == 0) sort_places(op, choice, share);
}

inline void route_need(const RouteOp& op, size_t* scratch, size_t* shared) {
  *scratch = sizeof(float) * (size_t)op.experts + 64;
  *shared = sizeof(float) * 2 * (size_t)op.rows * (size_t)(op.k + op.shared) + 64;
}

// Products ------------------------------------------------------------------------------------------------

// An expert that has rows: places first .. first + rows, the start of its h, and the inputs of its products.
struct Part {
  const Weight* w;
  int first, rows;
  int64_t inner;
  size_t room;
};

inline bool in_floats(const ExpertsOp& op, const Weight& w) {
  return op.exact || w.kind > INT8;
}

// Bytes of an input row in the form that the products read.
inline size_t input_row_bytes(const ExpertsOp& op, const Weight& w) {
  return in_floats(op, w) ? sizeof(float) * (size_t)w.k : (size_t)w.k + 8 * (size_t)(w.k / w.group);
}

// Few rows of h need no float32 copy, because they are already in order.
inline size_t input_bytes(const ExpertsOp& op, const Weight& w, int rows) {
  size_t size = quantised_bytes(rows, w);
  if (in_floats(op, w))
    size = rows > FEW ? float_panel_bytes(rows, w) : op.up ? input_row_bytes(op, w) * (size_t)rows : 0;
  return (size_t)up_to((int64_t)size, 64);
}

template <class Fn>
inline void each_part(const ExpertsOp& op, Fn fn) {
  Part p = {};
  for (int e = 0; e < op.experts; e++) {
    p.w = op.w + e, p.first = op.first[e], p.rows = op.first[e + 1] - p.first;
    if (!p.rows) continue;
    fn(p);
    p.inner += (int64_t)p.rows * (op.up ? p.w->n / 2 : p.w->k);
    p.room += input_bytes(op, *p.w, p.rows);
  }
}

// Calls fn(part, item) for the items of all parts, count(part) each. Every item runs on one thread, in ascending order.
template <class Count, class Fn>
inline void share_out(const ExpertsOp& op, const Worker& me, int step, Count count, Fn fn) {
  int at = pool_take(me, step), end = at + step, base = 0;
  each_part(op, [&](const Part& p) {
    const int items = count(p);
    while (at < base + items) {
      fn(p, at - base);
      if (++at == end) at = pool_take(me, step), end = at + step;
    }
    base += items;
  });
}

// The part as a separate product.
inline LinearOp product_of(const ExpertsOp& op, const Part& p) {
  LinearOp l = {};
  l.rows = p.rows, l.w = p.w, l.exact = op.exact;
  if (op.up) {
    l.x = op.x, l.x_stride = op.x_stride, l.from = op.row + p.first, l.norm = op.norm;
    l.y = op.y + p.inner, l.y_stride = p.w->n / 2, l.gated = 1, l.act = op.act;
  } else {
    l.x = op.x + p.inner, l.x_stride = p.w->k;
    l.y = op.y, l.y_stride = op.y_stride, l.to = op.row + p.first, l.share = op.share + p.first;
  }
  return l;
}

// The number of rows, or panels for the many-row kernel, to prepare for a part's products.
inline int inputs_of(const ExpertsOp& op, const Part& p) {
  const bool floats = in_floats(op, *p.w);
  if (p.rows > FEW) return floats ? float_panels_of(p.rows) : panels_of(p.rows);
  return floats && !op.up ? 0 : p.rows;
}

inline Quantised quantised_part(const Part& p, uint8_t* in) {
  return quantised_at(in, p.rows <= FEW ? p.rows : panels_of(p.rows) * PANEL, *p.w);
}

// Prepares one of them in `in`. scratch: row_bytes.
inline void make_input(const ExpertsOp& op, const Part& p, int i, uint8_t* in, uint8_t* scratch) {
  const LinearOp l = product_of(op, p);
  if (in_floats(op, *p.w) && p.rows > FEW) {
    pack_floats(l, i, (float*)in, (float*)scratch);
  } else if (in_floats(op, *p.w)) {
    float* to = (float*)in + (size_t)i * p.w->k;
    const float* x = input_row(l, i, to);
    if (x != to) memcpy(to, x, sizeof(float) * (size_t)p.w->k);
  } else if (p.rows <= FEW) {
    quantise_at(l, i, quantised_part(p, in), scratch);
  } else {
    pack_panel(l, i, quantised_part(p, in), scratch);
  }
}

// A pair of tiles times all rows of a part.
inline void multiply(const ExpertsOp& op, const Part& p, int item, uint8_t* in, uint8_t* scratch) {
  const LinearOp l = product_of(op, p);
  const Pair pair = pair_at(l, item);
  if (in_floats(op, *p.w)) {
    float *acc = (float*)scratch, *block = acc + FLOAT_SPAN * 2 * 16;
    if (p.rows > FEW) return many_floats(l, pair, (float*)in, acc, block);
    return float_pair(l, pair, op.up ? (float*)in : l.x, p.w->k, acc, block);
  }
  const Quantised a = quantised_part(p, in);
  const bool wide = p.w->kind == INT8;
  if (p.rows <= FEW) return wide ? few_pair<WIDE>(l, pair, a) : few_pair<NARROW>(l, pair, a);
  wide ? many_pair<WIDE>(l, pair, a, scratch) : many_pair<NARROW>(l, pair, a, scratch);
}

inline size_t work_bytes(const ExpertsOp& op) {
  size_t most = 0;
  for (int e = 0; e < op.experts; e++) {
    const Weight& w = op.w[e];
    size_t size = in_floats(op, w) ? float_bytes(w) : row_bytes(w);
    if (!in_floats(op, w) && op.rows > FEW && many_bytes(w) > size) size = many_bytes(w);
    if (size > most) most = size;
  }
  return (size_t)up_to((int64_t)most, 64);
}

inline void experts_up(const ExpertsOp& op, const Worker& me, uint8_t* inputs) {
  const auto pairs = [](const Part& p) { return tiles_of(*p.w) / 2; };
  int items = 0;
  each_part(op, [&](const Part& p) { items += pairs(p); });
  const Weight* made = nullptr;
  share_out(op, me, op.rows == 1 ? claim(items, me.threads) : 1, pairs, [&](const Part& p, int i) {
    uint8_t* in = op.rows == 1 ? inputs : inputs + p.room;
    const bool same = made && made->group == p.w->group && in_floats(op, *made) == in_floats(op, *p.w);
    if (op.rows == 1 && !same) make_input(op, p, 0, in, me.scratch), made = p.w;  // once for all experts of a form
    multiply(op, p, i, in, me.scratch);
  });
}

// Initialises the columns of a pair of tiles, before any expert adds to them.
inline void start_columns(const ExpertsOp& op, int item) {
  const int column = item * 32;
  const size_t size = sizeof(float) * (size_t)min(32, op.w->n - column);
  for (int row = 0; row < op.rows; row++) {
    float* y = op.y + row * op.y_stride + column;
    if (op.residual)
      memcpy(y, op.residual + row * op.residual_stride + column, size);
    else
      memset(y, 0, size);
  }
}

inline void experts_down(const ExpertsOp& op, const Worker& me, uint8_t* inputs) {
  const int items = (tiles_of(*op.w) + 1) / 2, step = op.rows == 1 ? claim(items, me.threads) : 1;
  for (int at; (at = pool_take(me, step)) < items;)
    for (int i = at; i < min(items, at + step); i++) {
      start_columns(op, i);
      each_part(op, [&](const Part& p) { multiply(op, p, i, inputs + p.room, me.scratch); });
    }
}

// Every thread prepares a single row itself. Several rows are distributed, as in linear_int.
void experts_op(const ExpertsOp& op, const Worker& me) {
  uint8_t* inputs = op.rows == 1 ? me.scratch + work_bytes(op) : me.shared;
  const auto count = [&](const Part& p) { return inputs_of(op, p); };
  const auto make = [&](const Part& p, int i) { make_input(op, p, i, inputs + p.room, me.scratch); };
  if (op.rows > 1) {
    share_out(op, me, 1, count, make);
    pool_barrier(me);
  } else if (!op.up) {
    each_part(op, [&](const Part& p) {
      for (int i = 0; i < inputs_of(op, p); i++) make(p, i);
    });
  }
  op.up ? experts_up(op, me, inputs) : experts_down(op, me, inputs);
}

// The number of rows per expert is not known yet. Each expert has at most all rows, and each row has `each` places. The
// bound is the row size of the largest expert, the second largest for the other places, and padding for every expert.
inline void experts_need(const ExpertsOp& op, size_t* scratch, size_t* shared) {
  size_t largest = 0, second = 0;
  for (int e = 0; e < op.experts; e++) {
    const size_t size = input_row_bytes(op, op.w[e]);
    if (size > largest) {
      second = largest, largest = size;
    } else if (size > second) {
      second = size;
    }
  }
  const size_t rows = (size_t)op.rows, parts = (size_t)min(op.experts, op.rows * op.each);
  const size_t inputs =
      rows * (largest + (size_t)(op.each - 1) * second) + parts * (max(PANEL, FLOAT_PANEL) * largest + 320);
  *scratch = work_bytes(op) + (op.rows == 1 ? inputs : 0) + 64;
  if (op.rows > 1) *shared = inputs;
}

}  // namespace
