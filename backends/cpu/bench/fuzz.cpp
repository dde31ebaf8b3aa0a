// Compares random linear layers, heads, attentions and mixtures of experts with plain loops in double. It runs under
// emulators and sanitizers.
//
//   fuzz ISA SEED COUNT [THREADS]       exit code 0: all results are within their bounds
//
// `make sanitize` builds it with the address, undefined-behaviour and thread sanitizers and runs it on every
// instruction set of the machine.
//
// Inputs and outputs are surrounded by NaN, so reads and writes beyond a row are detected.
#include <math.h>
#include <stdio.h>

#include <algorithm>
#include <limits>

#include "native.h"

static const float NONE = std::numeric_limits<float>::quiet_NaN();
static const double EPS = 1.0 / (1 << 24);
static int failures = 0;

static void check(bool ok, const char* what, int a, int b, int c, int d) {
  if (ok) return;
  failures++;
  fprintf(stderr, "wrong: %s %d %d %d %d\n", what, a, b, c, d);
}

// The kernels' quantisation of a row: integers up to ±127, one scale per group.
static void quantise(const float* x, int k, int group, double* whole, double* scale) {
  for (int g = 0; g < k / group; g++) {
    float top = 0;
    for (int i = 0; i < group; i++) top = fmaxf(top, fabsf(x[g * group + i]));
    const float inverse = top > 1e-30f ? 127 / top : 0;
    for (int i = 0; i < group; i++) whole[g * group + i] = nearbyintf(x[g * group + i] * inverse);
    scale[g] = top / 127;
  }
}

static void try_linear(Engine* e, Random& r) {
  const int kind = r.below(5), group = kind <= INT8 ? 32 * (1 + r.below(5)) : 0;
  const int k = kind <= INT8 ? group * (1 + r.below(5)) : 1 + r.below(300), n = 1 + r.below(100);
  const int rows = r.below(4) ? 1 + r.below(20) : 1 + r.below(600), exact = r.below(2);
  const int32_t ends = kind == INT4 && r.below(2) ? ZEROS : HALVES;
  RandomWeight w(kind, n, k, group, r.below(2), r, ends);
  const int xs = k + 16, ys = n + 9, check_every = rows > 40 ? 37 : 1;
  std::vector<float> x((size_t)(rows + 1) * (size_t)xs, NONE), y((size_t)(rows + 1) * (size_t)ys, 7.5f);
  std::vector<float> residual((size_t)rows * (size_t)n);
  for (int t = 0; t < rows; t++)
    for (int i = 0; i < k; i++) x[(size_t)t * xs + i] = r.unit() * 3;
  for (float& v : residual) v = r.unit();
  LinearOp op = {};
  op.code = LINEAR, op.rows = rows, op.x = x.data(), op.x_stride = xs, op.w = &w.w, op.y = y.data(), op.y_stride = ys;
  op.exact = exact;
  if (r.below(2)) op.residual = residual.data(), op.residual_stride = n;
  run_one(e, &op);
  std::vector<double> whole((size_t)k), scale((size_t)k / 32 + 1);
  for (int t = 0; t < rows; t += check_every) {
    const float* row = &x[(size_t)t * xs];
    const bool rounds = kind <= INT8 && !exact;
    if (rounds) quantise(row, k, group, whole.data(), scale.data());
    for (int j = 0; j < n; j++) {
      double sum = bias_of(w.w) ? bias_of(w.w)[j] : 0, size = fabs(sum);
      for (int i = 0; i < k; i++) {
        const double a = rounds ? whole[(size_t)i] * scale[(size_t)(i / group)] : row[i];
        sum += a * number(w.w, j, i);
        size += fabs(a) * 4;  // parts of a weight, code * scale and bias, reach 4 in RandomWeight
      }
      if (op.residual) sum += residual[(size_t)t * n + j], size += 1;
      check(fabs(y[(size_t)t * ys + j] - sum) <= EPS * (k + 8) * size, "linear kind, n, k, rows", kind + 10 * ends, n,
            k, rows);
    }
    for (int j = n; j < ys; j++) check(y[(size_t)t * ys + j] == 7.5f, "a write beyond a row", kind, n, k, rows);
  }
}

// Compares a head with and without a choice: same token, its tile is bit-identical, and nothing beyond the row is
// written.
static void try_choice(Engine* e, Random& r) {
  const int group = 32 * (1 + r.below(4)), k = group * (1 + r.below(4)), n = 1 + r.below(700);
  RandomWeight w(INT8, n, k, group, false, r);
  std::vector<float> x((size_t)k + 32, NONE), whole((size_t)n + 16, 7.5f), y(whole);
  for (int i = 0; i < k; i++) x[(size_t)i] = r.unit() * 3;
  Choice choice = {1, r.below(2) ? 0 : 0.1f + r.below(3), 0.001f, 0};
  LinearOp op = {};
  op.code = LINEAR, op.rows = 1, op.x = x.data(), op.x_stride = k, op.w = &w.w, op.y = whole.data(), op.y_stride = n;
  run_one(e, &op);
  op.y = y.data(), op.choice = &choice;
  run_one(e, &op);
  const auto best = std::max_element(whole.begin(), whole.begin() + n) - whole.begin();
  check(best == std::max_element(y.begin(), y.begin() + n) - y.begin(), "a choice", n, k, group, choice.tiles);
  for (auto i = best / 16 * 16; i < n && i < best / 16 * 16 + 16; i++)
    check(y[(size_t)i] == whole[(size_t)i], "a tile read whole", n, k, group, choice.tiles);
  check(choice.tiles >= 1 && choice.tiles <= tiles_of(w.w), "tiles read whole", n, k, group, choice.tiles);
  for (size_t i = (size_t)n; i < y.size(); i++) check(y[i] == 7.5f, "a write beyond a row", n, k, group, 0);
}

static void try_attention(Engine* e, Random& r) {
  const int kv = 1 + r.below(3), heads = kv * (1 + r.below(7)), dim = 4 * (1 + r.below(24)), rows = 1 + r.below(70);
  const int64_t length = r.below(2) ? r.below(700) : 0;
  const int dim_pad = (dim + 15) / 16 * 16, capacity = (int)((length + rows + 63) / 64 * 64), all = (int)length + rows;
  const size_t keys = (size_t)kv * (size_t)capacity * (size_t)dim,
               values = (size_t)kv * (size_t)capacity * (size_t)dim_pad;
  std::vector<float> cache(keys + values + 2048, NONE), q((size_t)rows * heads * dim), y(q.size() + 32, 7.5f);
  std::vector<float> k((size_t)all * kv * dim), v(k.size());
  std::vector<float> partial((size_t)kv * (capacity / 256 + 1) * 32 * (dim_pad + 2));
  std::vector<int32_t> done((size_t)kv, 0);
  for (auto* list : {&q, &k, &v})
    for (float& f : *list) f = r.unit() * 2;
  SegmentArg s = {rows,    capacity,       &length,    (uint8_t*)cache.data(), (uint8_t*)(cache.data() + keys), nullptr,
                  nullptr, partial.data(), done.data()};
  AttentionOp op = {};
  op.code = ATTENTION, op.heads = heads, op.kv_heads = kv, op.dim = dim, op.dim_pad = dim_pad, op.segments = 1;
  op.kv_kind = F32, op.scale = 0.3f, op.segment = &s, op.window = r.below(3) ? 0 : 1 + r.below(200);
  op.q_stride = heads * dim, op.k_stride = op.v_stride = kv * dim, op.q_head = op.k_head = op.v_head = dim;
  op.y = y.data(), op.q = q.data(), op.k = k.data(), op.v = v.data();
  const int64_t zero = 0;
  if (length) {  // first the tokens that the cache holds
    std::vector<float> queries((size_t)length * heads * dim, 0.1f), ignored(queries.size());
    op.q = queries.data(), op.y = ignored.data(), op.rows = s.rows = (int)length, s.length = &zero;
    run_one(e, &op);
    op.q = q.data(), op.y = y.data();
  }
  op.rows = s.rows = rows, s.length = &length;
  op.k = k.data() + (size_t)length * kv * dim, op.v = v.data() + (size_t)length * kv * dim;
  run_one(e, &op);
  std::vector<double> weight((size_t)all), out((size_t)dim);
  for (int t = 0; t < rows; t += 1 + rows / 8)
    for (int h = 0; h < heads; h++) {
      const int at = (int)length + t, lo = op.window && at - op.window + 1 > 0 ? at - op.window + 1 : 0;
      const int g = h / (heads / kv);
      double top = -1e300, total = 0;
      for (int j = lo; j <= at; j++) {
        double dot = 0;
        for (int d = 0; d < dim; d++)
          dot += (double)q[((size_t)t * heads + h) * dim + d] * k[((size_t)j * kv + g) * dim + d];
        weight[(size_t)j] = dot * 0.3f;
        top = fmax(top, weight[(size_t)j]);
      }
      for (int j = lo; j <= at; j++) total += weight[(size_t)j] = exp(weight[(size_t)j] - top);
      for (int d = 0; d < dim; d++) {
        double sum = 0;
        for (int j = lo; j <= at; j++) sum += weight[(size_t)j] / total * v[((size_t)j * kv + g) * dim + d];
        const double got = y[((size_t)t * heads + h) * dim + d];
        // a score of d products up to 4 * 0.3 each has an error of (d + 4) eps times that; it scales values up to 2
        check(fabs(got - sum) <= EPS * (dim + 24) * 1.2 * dim * 2 * 2, "attention heads, dim, rows, length", heads, dim,
              rows, (int)length);
      }
    }
  for (size_t i = q.size(); i < y.size(); i++) check(y[i] == 7.5f, "a write beyond the output", heads, dim, rows, 0);
}

// Product in double of a row as the kernels read it. *size: the magnitude that rounding errors are relative to.
static double product(const Weight& w, int j, const float* row, bool exact, double* size) {
  std::vector<double> whole((size_t)w.k), scale((size_t)w.k / 32 + 1);
  const bool rounds = w.kind <= INT8 && !exact;
  if (rounds) quantise(row, w.k, w.group, whole.data(), scale.data());
  double sum = bias_of(w) ? bias_of(w)[j] : 0;
  *size = fabs(sum);
  for (int i = 0; i < w.k; i++) {
    const double a = rounds ? whole[(size_t)i] * scale[(size_t)(i / w.group)] : row[i];
    sum += a * number(w, j, i);
    *size += fabs(a) * 4;  // as in try_linear
  }
  return sum;
}

struct Mixture {  // sorted rows, and each expert's weights
  int experts, k, shared, hidden;
  std::vector<std::unique_ptr<RandomWeight>> held;
  std::vector<Weight> up, down;
  std::vector<int32_t> first, row;
  std::vector<float> share;

  Mixture(Random& r, int rows) : experts(1 + r.below(9)), k(1 + r.below(experts)), shared(r.below(2)) {
    const int kind = r.below(5), group = 32 * (1 + r.below(4));
    hidden = kind <= INT8 ? group * (1 + r.below(3)) : 16 + r.below(90);
    for (int e = 0; e < experts + shared; e++) {
      const int inner = kind <= INT8 ? group * (1 + r.below(2)) : 16 * (1 + r.below(4));
      held.emplace_back(new RandomWeight(kind, 2 * inner, hidden, group, r.below(2), r));
      up.push_back(held.back()->w);
      held.emplace_back(new RandomWeight(kind, hidden, inner, group, r.below(2), r));
      down.push_back(held.back()->w);
    }
    first.resize(up.size() + 1), row.resize((size_t)rows * (size_t)(k + shared)), share.resize(row.size());
  }

  ExpertsOp op(int rows, const std::vector<Weight>& w) const {
    ExpertsOp o = {};
    o.code = EXPERTS, o.rows = rows, o.experts = (int)w.size(), o.each = k + shared, o.w = w.data();
    o.first = first.data(), o.row = row.data(), o.share = share.data();
    return o;
  }
};

// Checks that each row goes to its k best experts, sorted, with the shares of the softmax.
static void check_places(const Mixture& m, const std::vector<float>& logits, int rows, bool normalise) {
  const int all = m.experts + m.shared, each = m.k + m.shared;
  std::vector<int> seen((size_t)rows);
  check(m.first[0] == 0 && m.first[(size_t)all] == rows * each, "places", all, rows, each, 0);
  for (int e = 0; e < all; e++)
    for (int p = m.first[(size_t)e]; p < m.first[(size_t)e + 1]; p++) {
      const int t = m.row[(size_t)p];
      const float* l = &logits[(size_t)t * all];
      seen[(size_t)t]++;
      double total = 0, better = 0, expected;
      for (int i = 0; i < m.experts; i++) {
        total += exp((double)l[i] - l[e]);
        better += l[i] > l[e] || (l[i] == l[e] && i < e);
      }
      expected = 1 / total;
      if (e == m.experts) {
        expected = 1 / (1 + exp(-(double)l[e]));
      } else {
        check(better < m.k, "the best experts", e, m.k, m.experts, rows);
        if (normalise) {
          double chosen = 0;
          for (int i = 0; i < m.experts; i++) {
            int above = 0;
            for (int o = 0; o < m.experts; o++) above += l[o] > l[i] || (l[o] == l[i] && o < i);
            if (above < m.k) chosen += exp((double)l[i] - l[e]);
          }
          expected = 1 / chosen;
        }
      }
      check(fabs(m.share[(size_t)p] - expected) <= EPS * 60 * expected, "a share", e, m.k, m.experts, rows);
    }
  for (int n : seen) check(n == each, "places of a row", n, each, rows, 0);
}

static void try_experts(Engine* e, Random& r) {
  const int rows = r.below(3) ? 1 + r.below(30) : 1, exact = r.below(2), normalise = r.below(2);
  Mixture m(r, rows);
  const int all = (int)m.up.size(), each = m.k + m.shared, xs = m.hidden + 16, ys = m.hidden + 9;
  std::vector<float> logits((size_t)rows * (size_t)all), x((size_t)(rows + 1) * (size_t)xs, NONE);
  for (float& f : logits) f = r.below(3) ? 4 * r.unit() : (float)r.below(4);
  for (int t = 0; t < rows; t++)
    for (int i = 0; i < m.hidden; i++) x[(size_t)t * xs + i] = r.unit() * 3;
  RouteOp route = {};
  route.code = ROUTE, route.rows = rows, route.experts = m.experts, route.k = m.k, route.normalise = normalise;
  route.shared = m.shared, route.logits = logits.data(), route.stride = all;
  route.first = m.first.data(), route.row = m.row.data(), route.share = m.share.data();
  run_one(e, &route);
  check_places(m, logits, rows, normalise);

  int64_t inner = 0;
  for (int i = 0; i < all; i++) inner += (int64_t)(m.first[(size_t)i + 1] - m.first[(size_t)i]) * m.down[(size_t)i].k;
  std::vector<float> h((size_t)inner, NONE), y((size_t)(rows + 1) * (size_t)ys, 7.5f),
      residual((size_t)rows * m.hidden);
  for (float& f : residual) f = r.unit();
  ExpertsOp op = m.op(rows, m.up);
  op.up = 1, op.act = RELU, op.exact = exact, op.x = x.data(), op.x_stride = xs, op.y = h.data();
  run_one(e, &op);
  op = m.op(rows, m.down);
  op.exact = exact, op.x = h.data(), op.y = y.data(), op.y_stride = ys;
  if (r.below(2)) op.residual = residual.data(), op.residual_stride = m.hidden;
  run_one(e, &op);

  std::vector<double> sum(residual.size()), size(residual.size());
  if (op.residual)
    for (size_t i = 0; i < sum.size(); i++) sum[i] = residual[i], size[i] = fabs(residual[i]);
  const float* at = h.data();
  int terms = each;  // of an output, at most
  for (const Weight& w : m.down) terms = std::max(terms, each + w.k);
  for (int i = 0; i < all; i++)
    for (int p = m.first[(size_t)i]; p < m.first[(size_t)i + 1]; p++) {
      const Weight &up = m.up[(size_t)i], &down = m.down[(size_t)i];
      const int t = m.row[(size_t)p], f = down.k;
      for (int j = 0; j < f; j++) {
        double gate_size, up_size;
        const double gate = product(up, j, &x[(size_t)t * xs], exact, &gate_size);
        const double value = product(up, f + j, &x[(size_t)t * xs], exact, &up_size);
        const double off = EPS * (up.k + 8);  // of a product; relu's slope is 1
        const double bound = off * (gate_size * (fabs(value) + off * up_size) + fabs(gate) * up_size);
        check(fabs(at[j] - fmax(gate, 0) * value) <= bound + EPS * fabs(gate * value), "h kind, f, k, rows", up.kind, f,
              up.k, rows);
      }
      for (int j = 0; j < m.hidden; j++) {  // uses the computed h, because rounding to int8 may go either way
        double one;
        sum[(size_t)t * m.hidden + j] += m.share[(size_t)p] * product(down, j, at, exact, &one);
        size[(size_t)t * m.hidden + j] += m.share[(size_t)p] * one;
      }
      at += f;
    }
  for (int t = 0; t < rows; t++) {
    for (int j = 0; j < m.hidden; j++) {
      const size_t i = (size_t)t * m.hidden + j;
      check(fabs(y[(size_t)t * ys + j] - sum[i]) <= EPS * (terms + 8) * size[i], "experts, rows, hidden", all, rows,
            m.hidden, each);
    }
    for (int j = m.hidden; j < ys; j++) check(y[(size_t)t * ys + j] == 7.5f, "a write beyond a row", all, rows, 0, 0);
  }
}

int main(int argc, char** argv) {
  if (argc < 4) return fprintf(stderr, "usage: fuzz ISA SEED COUNT [THREADS]\n"), 2;
  const int threads = argc > 4 ? atoi(argv[4]) : 2;
  Engine* e = tc_new(argv[1], threads);
  if (!e) return fprintf(stderr, "no such instruction set here; the best is %s\n", tc_isa(0)), 2;
  Random r{(uint32_t)atoi(argv[2]) * 2654435761u};
  for (int i = 0; i < atoi(argv[3]) && failures < 10; i++) {
    const int what = r.below(5);
    what == 0 ? try_attention(e, r) : what == 1 ? try_experts(e, r) : what == 2 ? try_choice(e, r) : try_linear(e, r);
  }
  tc_free(e);
  printf("%s, %d threads: %s\n", argv[1], threads, failures ? "WRONG" : "right");
  return failures != 0;
}
