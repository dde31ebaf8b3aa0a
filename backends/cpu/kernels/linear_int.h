// int4 and int8 weights times int8 activations, summed in int32 within a group and in float32 across groups:
//   y[r] = sum over groups of  scale[r] * xs * dot(q, x8) + bias[r] * xsum
//
// One row and few rows read the packed nibbles. Many rows unpack a pair of tiles once and use it for all.
#pragma once
#include "epilogue.h"
#include "pool.h"
#include "quantise.h"
#include "scales.h"

namespace {

// What a pass over a tile reads: int4 codes, the upper halves of int8 codes, or both (q = 16 * upper + lower). The
// upper halves with 7.5 for each lower half give the product except for the deviation of the lower halves from their
// mean.
enum Pass { NARROW, UPPER, WIDE };

}  // namespace

#if defined(MATRIX)
#include MATRIX
#endif

namespace {

constexpr int FEW = 8;  // maximum rows that are processed four at a time, directly from the nibbles

// int8 activations of some rows. Few rows: x[row][k], scale[row][g]. Many rows: panels of PANEL rows,
// x[g][panel][k / DEPTH][PANEL][DEPTH], scale[g][panel][PANEL], so a group's products read contiguous memory.
struct Quantised {
  int8_t* x;
  float *scale, *sum;
};

inline Quantised quantised_at(uint8_t* room, int rows, const Weight& w) {
  const size_t groups = (size_t)(w.k / w.group), floats = up_to((int64_t)rows * (int64_t)groups * 4, 64);
  float* scale = (float*)room;
  return {(int8_t*)room + 2 * floats, scale, (float*)(room + floats)};
}

inline size_t quantised_bytes(int rows, const Weight& w) {
  const size_t n = (size_t)up_to(rows, PANEL), groups = (size_t)(w.k / w.group);
  return n * (size_t)w.k + 2 * (n * groups * 4 + 64) + 64;  // 64: the last panel's vector load may reach beyond it
}

template <Pass P>
inline Tail tail_of_pass(const Weight& w, const uint8_t* ends) {
  Tail t = tail_of<P == WIDE>(w, ends);
  if constexpr (P == UPPER)
    for (int v = 0; v < V; v++)
      t.bias[v] = fma(t.scale[v], set1(7.5f), t.bias[v]), t.scale[v] = mul(t.scale[v], set1(16));
  return t;
}

// Sixteen inputs of a tile times R rows: 2 lines at q, and for wide codes their lower halves.
template <Pass P, int R, int C, class A>
inline void sixteen(const uint8_t* q, const uint8_t* lower, const Quads* x, A (*acc)[V][C]) {
  constexpr bool TIGHT = A::ROOM < 4 / C;
  repeat<V>([&](auto vector) ALWAYS {
    constexpr int v = decltype(vector)::value;
    repeat<2>([&](auto part) ALWAYS {
      constexpr int h = decltype(part)::value, L = 2 * h;
      const Codes c = codes(q + 64 * h + 4 * W * v);
      Codes a, b;
      if constexpr (P == WIDE) {
        const Codes l = codes(lower + 64 * h + 4 * W * v);
        a = wide_low(c, l), b = wide_high(c, l);
      } else {
        a = low(c), b = high(c);
      }
      repeat<R>([&](auto row) ALWAYS {
        constexpr int r = decltype(row)::value;
        acc[r][v][L % C].template add<L>(a, x[r]);
        acc[r][v][(L + 1) % C].template add<L + 1>(b, x[r]);
        if constexpr (TIGHT) acc[r][v][0].flush();
      });
    });
  });
}

// A whole tile times R rows of activations -> sum[R][V]. There is no software prefetch: the hardware prefetches, and a
// software prefetch made a Zen 4 10 % slower on one thread.
template <Pass P, int R>
inline void tile_rows(const Weight& w, int index, const Quantised& a, int row, F (*sum)[V]) {
  constexpr int C = R == 1 ? CHAINS : CHAINS / R > 1 ? CHAINS / R : 1;
  using A = Acc<P == WIDE>;
  constexpr int STEPS = A::ROOM * C / 4 > 1 ? A::ROOM * C / 4 : 1;
  const int groups = w.k / w.group, steps = w.group / 16;
  const size_t block = block_bytes(w);
  const uint8_t *tile = tile_at(w, index), *lower = P == WIDE ? lower_of(w, index) : nullptr;
  F total[R][V];  // not sum itself, which may not be kept in registers
  repeat<R>([&](auto r) ALWAYS { repeat<V>([&](auto v) ALWAYS { total[r.value][v.value] = set1(0); }); });
  for (int g = 0; g < groups; g++, tile += block) {
    A acc[R][V][C];
    repeat<R>([&](auto r) ALWAYS {
      repeat<V>([&](auto v) ALWAYS { repeat<C>([&](auto c) ALWAYS { acc[r.value][v.value][c.value].clear(); }); });
    });
    const int8_t* x = a.x + (int64_t)row * w.k + g * w.group;
    in_runs<STEPS>(
        steps,
        [&](int s) ALWAYS {
          Quads quad[R];
          repeat<R>([&](auto r) ALWAYS { quad[r.value] = ld_quads(x + (int64_t)r.value * w.k + 16 * s); });
          sixteen<P, R, C>(tile + s * 128, P == WIDE ? lower + (g * steps + s) * 128 : nullptr, quad, acc);
        },
        [&]() ALWAYS {
          repeat<R>([&](auto r) ALWAYS {
            repeat<V>([&](auto v)
                          ALWAYS { repeat<C>([&](auto c) ALWAYS { acc[r.value][v.value][c.value].flush(); }); });
          });
        });
    const Tail t = tail_of_pass<P>(w, tile + steps * 128);
    repeat<R>([&](auto r) ALWAYS {
      const int64_t at = (int64_t)(row + r.value) * groups + g;
      const F xs = set1(a.scale[at]), xsum = set1(a.sum[at]);
      repeat<V>([&](auto v) ALWAYS {
        F d = to_float(acc[r.value][v.value][0].sum());
        if constexpr (C > 1)
          repeat<C - 1>([&](auto c) ALWAYS { d = add(d, to_float(acc[r.value][v.value][c.value + 1].sum())); });
        F& y = total[r.value][v.value];
        y = fma(d, mul(t.scale[v.value], xs), fma(t.bias[v.value], xsum, y));
      });
    });
  }
  repeat<R>([&](auto r) ALWAYS { repeat<V>([&](auto v) ALWAYS { sum[r.value][v.value] = total[r.value][v.value]; }); });
}

template <Pass P, int R>
inline void pair_rows(const LinearOp& op, Pair pair, const Quantised& a, int row) {
  F sum[2][R][V];
  tile_rows<P, R>(*op.w, pair.first, a, row, sum[0]);
  if (pair.second >= 0) tile_rows<P, R>(*op.w, pair.second, a, row, sum[1]);
  for (int r = 0; r < R; r++) finish(op, row + r, pair, sum[0][r], pair.second >= 0 ? sum[1][r] : nullptr);
}

template <Pass P>
inline void few_pair(const LinearOp& op, Pair pair, const Quantised& a) {
  int row = 0;
  for (; row + 4 <= op.rows; row += 4) pair_rows<P, 4>(op, pair, a, row);
  for (; row + 2 <= op.rows; row += 2) pair_rows<P, 2>(op, pair, a, row);
  if (row < op.rows) pair_rows<P, 1>(op, pair, a, row);
}

template <Pass P>
void few_rows(const LinearOp& op, const Worker& me, const Quantised& a) {
  const int items = pairs_of(op), step = claim(items, me.threads);
  for (int at; (at = pool_take(me, step)) < items;)
    for (int i = at; i < min(items, at + step); i++) few_pair<P>(op, pair_at(op, i), a);
}

// Many rows -----------------------------------------------------------------------------------------------

// A strip is what one step multiplies at once: the 16 rows of a tile, or with 16 lanes both tiles of a pair.
constexpr int NV = W == 16 ? 2 : V, STRIPS = W == 16 ? 1 : 2, STRIP = NV * W;
inline int panels_of(int rows) {
  return (rows + PANEL - 1) / PANEL;
}
// A last panel that is not full is computed in thirds of a panel.
constexpr int THIRD = (PANEL + 5) / 6 * 2, THIRDS = 2 * THIRD < PANEL ? 2 * THIRD : PANEL;
constexpr int PANELS = 192 / PANEL;  // panels whose sums of a pair stay in L1: 192 * 32 floats, 25 kB

#if !defined(MATRIX)
constexpr int DEPTH = 4;  // consecutive inputs of a row in a panel
using Peak = Acc<false>;

template <Pass P>
inline void unpack(const uint8_t* q, const uint8_t* lower, int group, int line_bytes, uint8_t* out) {
  for (int s = 0; s < group / 8; s++, q += 64, lower += 64)
    for (int v = 0; v < V; v++) {
      const Codes c = codes(q + 4 * W * v), l = codes(lower + 4 * W * v);
      uint8_t* o = out + (size_t)(2 * s) * line_bytes + 4 * W * v;
      put_codes(o, P == WIDE ? wide_low(c, l) : low(c));
      put_codes(o + line_bytes, P == WIDE ? wide_high(c, l) : high(c));
    }
}

// A group of one strip times the first R rows of a panel: acc (R, STRIP) += ...
template <Pass P, int R>
inline void micro(const uint8_t* u, int quadruples, const int8_t* x, const float* xs, const float* xsum, const F* scale,
                  const F* bias, float* acc) {
  using A = Acc<P == WIDE>;
  A a[R][NV];
  repeat<R>([&](auto i) ALWAYS { repeat<NV>([&](auto v) ALWAYS { a[i.value][v.value].clear(); }); });
  in_runs<A::ROOM>(
      quadruples,
      [&](int k) ALWAYS {
        Codes w[NV];
        repeat<NV>([&](auto v) ALWAYS { w[v.value] = codes(u + (int64_t)k * 4 * STRIP + 4 * W * v.value); });
        const Quads quad = ld_quads(x + (int64_t)k * 4 * PANEL);
        repeat<R>([&](auto i) ALWAYS {
          repeat<NV>([&](auto v) ALWAYS { a[i.value][v.value].template add<i.value>(w[v.value], quad); });
        });
      },
      [&]() ALWAYS {
        repeat<R>([&](auto i) ALWAYS { repeat<NV>([&](auto v) ALWAYS { a[i.value][v.value].flush(); }); });
      });
  repeat<R>([&](auto i) ALWAYS {
    const F s = set1(xs[i.value]), m = set1(xsum[i.value]);
    repeat<NV>([&](auto v) ALWAYS {
      float* o = acc + i.value * STRIP + v.value * W;
      const F d = to_float(a[i.value][v.value].sum());
      st(o, fma(d, mul(scale[v.value], s), fma(bias[v.value], m, ld(o))));
    });
  });
}

#endif

struct ManyRoom {  // a thread's scratch for many rows
  float* acc;      // [strip][panel][PANEL][STRIP]
  uint8_t* codes;  // a group of a strip, unpacked
};
inline size_t many_bytes(const Weight& w) {
  return (size_t)PANELS * PANEL * 32 * 4 + (size_t)w.group * STRIP + 64;
}

// Prefetches a row's lines of y and of the residual for `finish`. They are too far from each other for the hardware to
// detect a pattern. Without this, and without row strides that avoid shared cache lines (_rows in ../backend.py),
// stores took an eighth of the time.
ALWAYS inline void fetch_output(const LinearOp& op, Pair pair, int row) {
  if (row >= op.rows || op.to) return;
  const int64_t column = pair.first * 16;
  fetch_to_write(op.y + row * op.y_stride + column);
  if (!op.gated) fetch_to_write(op.y + row * op.y_stride + column + 16);
  if (op.residual) {
    fetch((const uint8_t*)(op.residual + row * op.residual_stride + column));
    fetch((const uint8_t*)(op.residual + row * op.residual_stride + column + 16));
  }
}

// Panels p0..p1 of a pair of tiles. The sums are left in room.acc.
template <Pass P>
inline void pair_panels(const LinearOp& op, Pair pair, const Quantised& a, int panels, int p0, int p1,
                        const ManyRoom& room) {
  const Weight& w = *op.w;
  const int groups = w.k / w.group, steps = w.group / 4;
  const size_t block = block_bytes(w), codes_size = (size_t)w.group * 8;
  const int tiles[2] = {pair.first, pair.second < 0 ? pair.first : pair.second};
  for (int strip = 0; strip < STRIPS; strip++) {
    float* acc = room.acc + (size_t)strip * PANELS * PANEL * STRIP;
    memset(acc, 0, sizeof(float) * (size_t)(p1 - p0) * PANEL * STRIP);
    for (int g = 0; g < groups; g++) {
      F scale[NV], bias[NV];
      for (int t = 0; t < NV / V; t++) {  // the tiles of a strip: one, or two next to each other
        const uint8_t* b = tile_at(w, tiles[strip + t]) + block * (size_t)g;
        const uint8_t* lower = P == WIDE ? lower_of(w, tiles[strip + t]) + codes_size * (size_t)g : b;
        unpack<P>(b, lower, w.group, 4 * STRIP, room.codes + 64 * t);
        const Tail ends = tail_of<P == WIDE>(w, b + codes_size);
        for (int v = 0; v < V; v++) scale[t * V + v] = ends.scale[v], bias[t * V + v] = ends.bias[v];
      }
      for (int p = p0; p < p1; p++) {
        const size_t at = ((size_t)g * panels + p) * PANEL;
        if (g + 1 == groups)
          for (int i = 0; i < PANEL; i++) fetch_output(op, pair, p * PANEL + i);
        // Direct calls, which are inlined. Through a pointer a Pi 5 executes 8 % more instructions.
        const auto step = [&](auto rows) ALWAYS {
          micro<P, rows.value>(room.codes, steps, a.x + at * w.group, a.scale + at, a.sum + at, scale, bias,
                               acc + (size_t)(p - p0) * PANEL * STRIP);
        };
        const int rest = op.rows - p * PANEL;
        if (rest > THIRDS) {
          step(Int<PANEL>{});
        } else if (rest > THIRD) {
          step(Int<THIRDS>{});
        } else {
          step(Int<THIRD>{});
        }
      }
    }
    if (pair.second < 0) break;
  }
}

// Sums of panels of P rows, acc [strip][MOST][P][STRIP] -> y.
template <int P, int MOST>
inline void finish_panels(const LinearOp& op, Pair pair, int p0, int p1, const float* acc) {
  for (int row = p0 * P; row < min(op.rows, p1 * P); row++) {
    const float* a = acc + (size_t)(row - p0 * P) * STRIP;
    const float* b = STRIPS == 1 ? a + 16 : a + (size_t)MOST * P * STRIP;
    F x[V], y[V];
    for (int v = 0; v < V; v++) {
      x[v] = ld(a + v * W);
      if (pair.second >= 0) y[v] = ld(b + v * W);
    }
    finish(op, row, pair, x, pair.second >= 0 ? y : nullptr);
  }
}

template <Pass P>
inline void many_pair(const LinearOp& op, Pair pair, const Quantised& a, uint8_t* scratch) {
  const int panels = panels_of(op.rows);
  const ManyRoom room{(float*)scratch, scratch + (size_t)PANELS * PANEL * 32 * 4};
  for (int p0 = 0; p0 < panels; p0 += PANELS) {
    const int p1 = min(panels, p0 + PANELS);
    pair_panels<P>(op, pair, a, panels, p0, p1, room);
    finish_panels<PANEL, PANELS>(op, pair, p0, p1, room.acc);
  }
}

template <Pass P>
void many_rows(const LinearOp& op, const Worker& me, const Quantised& a) {
  const int items = pairs_of(op);
  for (int i; (i = pool_take(me, 1)) < items;) many_pair<P>(op, pair_at(op, i), a, me.scratch);
}

// bytes between rows being packed; with a stride of a power of two they would share lines of L1
constexpr int APART = 64;

// Activations ---------------------------------------------------------------------------------------------

// One row of op.x in float32, normalised if the op has a norm; then it is written to `room` (k).
inline const float* input_row(const LinearOp& op, int row, float* room) {
  const float* x = op.x + (op.from ? op.from[row] : row) * op.x_stride;
  if (!op.norm) return x;
  norm_row(x, room, op.w->k, *op.norm);
  return room;
}

// Quantises one panel of rows and interleaves it. Rows beyond the last are zero. All rows are quantised first, with
// padding between them, and then interleaved: row by row, each line of the panel would be loaded PANEL times.
inline void pack_panel(const LinearOp& op, int panel, const Quantised& a, uint8_t* scratch) {
  const Weight& w = *op.w;
  const int groups = w.k / w.group, panels = panels_of(op.rows), apart = w.k + APART;
  float *room = (float*)scratch, *scale = room + w.k, *sum = scale + groups;
  int8_t* q = (int8_t*)(sum + groups);
  for (int i = 0; i < PANEL; i++) {
    const int row = panel * PANEL + i;
    if (row < op.rows) {
      quantise_row(input_row(op, row, room), w.k, w.group, q + i * apart, scale, sum);
    } else {
      memset(scale, 0, sizeof(float) * (size_t)groups * 2);
      memset(q + i * apart, 0, (size_t)w.k);
    }
    for (int g = 0; g < groups; g++) {
      const size_t at = ((size_t)g * panels + panel) * PANEL + i;
      a.scale[at] = scale[g], a.sum[at] = sum[g];
    }
  }
  for (int g = 0; g < groups; g++) {
    int8_t* x = a.x + ((size_t)g * panels + panel) * PANEL * w.group;
    for (int k = g * w.group; k < (g + 1) * w.group; k += DEPTH)
      for (int i = 0; i < PANEL; i++, x += DEPTH) memcpy(x, q + i * apart + k, DEPTH);
  }
}

inline void quantise_at(const LinearOp& op, int row, const Quantised& a, uint8_t* room) {
  const Weight& w = *op.w;
  const size_t i = (size_t)row, groups = (size_t)(w.k / w.group);
  quantise_row(input_row(op, row, (float*)room), w.k, w.group, a.x + i * w.k, a.scale + groups * i, a.sum + groups * i);
}

inline size_t row_bytes(const Weight& w) {
  return (size_t)w.k * 4 + (size_t)(w.k / w.group) * 8 + (size_t)PANEL * (size_t)(w.k + APART) + 192;
}

// Every thread quantises a single row itself, because that is cheaper than a barrier. Several rows are distributed.
inline Quantised quantise_input(const LinearOp& op, const Worker& me) {
  const Weight& w = *op.w;
  if (op.rows == 1) {
    const Quantised a = quantised_at(me.scratch, 1, w);
    quantise_at(op, 0, a, me.scratch + up_to((int64_t)quantised_bytes(1, w), 64));
    return a;
  }
  const bool few = op.rows <= FEW;
  const int items = few ? op.rows : panels_of(op.rows);
  const Quantised a = quantised_at(me.shared, few ? op.rows : items * PANEL, w);
  for (int i; (i = pool_take(me, 1)) < items;) {
    if (few) {
      quantise_at(op, i, a, me.scratch);
    } else {
      pack_panel(op, i, a, me.scratch);
    }
  }
  pool_barrier(me);
  return a;
}

void linear_int(const LinearOp& op, const Worker& me) {
  const Quantised a = quantise_input(op, me);
  const bool wide = op.w->kind == INT8;
  if (op.rows <= FEW) return wide ? few_rows<WIDE>(op, me, a) : few_rows<NARROW>(op, me, a);
  return wide ? many_rows<WIDE>(op, me, a) : many_rows<NARROW>(op, me, a);
}

}  // namespace
