// float32 weights times float32 activations: dense matrices, and in exact mode int4 and int8, whose blocks are first
// converted to w = q * scale + bias. Sums are float32, over k in blocks.
#pragma once
#include "epilogue.h"
#include "linear_int.h"
#include "pool.h"

namespace {

constexpr int DENSE_BLOCK = 128;  // inputs converted at a time: 128 x 16 floats, 8 kB, half of a small L1
constexpr int FLOAT_SPAN = 504;   // rows whose sums of a tile stay in L2; a multiple of every panel size

inline F ld_dense(int kind, const uint8_t* p, size_t i) {
  switch (kind) {
    case F16: return ldh((const uint16_t*)p + i);
    case BF16: return ldb((const uint16_t*)p + i);
    default: return ld((const float*)p + i);
  }
}

// Inputs k0..k0 + n of a tile -> out (n, 16) float32 with a line stride of `stride`.
inline void widen(const Weight& w, int index, int k0, int n, float* out, int stride = 16) {
  const uint8_t* tile = tile_at(w, index);
  if (w.kind > INT8) {
    for (int k = 0; k < n; k++)
      for (int v = 0; v < V; v++) st(out + k * stride + v * W, ld_dense(w.kind, tile, (size_t)(k0 + k) * 16 + v * W));
    return;
  }
  const uint8_t *block = tile + block_bytes(w) * (size_t)(k0 / w.group), *lower = lower_of(w, index) + (size_t)k0 * 8;
  const Tail t = tail_of<false>(w, block + (size_t)w.group * 8);
  for (int k = 0; k < n; k++) {
    const int shift = 8 * (k % 4) + (k & 4);
    for (int v = 0; v < V; v++) {
      const int at = k / 8 * 64 + 4 * W * v;
      F q = field(block + at, shift, 15);
      if (w.kind == INT8) q = fma(q, set1(16), field(lower + at, shift, 15));
      st(out + k * stride + v * W, fma(q, t.scale[v], t.bias[v]));
    }
  }
}

// acc (R, 16) += x (R, n) * w (n, 16)
template <int R, class Load>
inline void float_micro(Load weight, int n, const float* x, int64_t stride, float* acc) {
  constexpr int C = R == 1 ? 4 / (V < 4 ? V : 4) : 1;  // one row needs several sums to hide the latency
  F a[R][V][C];
  repeat<R>([&](auto r) ALWAYS {
    repeat<V>([&](auto v) ALWAYS {
      a[r.value][v.value][0] = ld(acc + r.value * 16 + v.value * W);
      repeat<C - 1>([&](auto c) ALWAYS { a[r.value][v.value][c.value + 1] = set1(0); });
    });
  });
  int k = 0;
  for (; k + C <= n; k += C)
    repeat<C>([&](auto c) ALWAYS {
      repeat<V>([&](auto v) ALWAYS {
        const F line = weight(k + c.value, v.value);
        repeat<R>([&](auto r) ALWAYS {
          F& y = a[r.value][v.value][c.value];
          y = fma(line, set1(x[r.value * stride + k + c.value]), y);
        });
      });
    });
  for (; k < n; k++)
    repeat<V>([&](auto v) ALWAYS {
      const F line = weight(k, v.value);
      repeat<R>([&](auto r) ALWAYS {
        a[r.value][v.value][0] = fma(line, set1(x[r.value * stride + k]), a[r.value][v.value][0]);
      });
    });
  repeat<R>([&](auto r) ALWAYS {
    repeat<V>([&](auto v) ALWAYS {
      F y = a[r.value][v.value][0];
      repeat<C - 1>([&](auto c) ALWAYS { y = add(y, a[r.value][v.value][c.value + 1]); });
      st(acc + r.value * 16 + v.value * W, y);
    });
  });
}

// Rows x (rows, k) times one tile -> acc (rows, 16).
inline void float_tile(const Weight& w, int index, const float* x, int64_t stride, int rows, float* block, float* acc) {
  const uint8_t* tile = tile_at(w, index);
  memset(acc, 0, sizeof(float) * 16 * (size_t)rows);
  if (rows == 1 && w.kind > INT8) {
    const int kind = w.kind;
    auto run = [&](auto load) ALWAYS { float_micro<1>(load, w.k, x, 0, acc); };
    if (kind == F16) return run([=](int k, int v) { return ldh((const uint16_t*)tile + (size_t)k * 16 + v * W); });
    if (kind == BF16) return run([=](int k, int v) { return ldb((const uint16_t*)tile + (size_t)k * 16 + v * W); });
    return run([=](int k, int v) { return ld((const float*)tile + (size_t)k * 16 + v * W); });
  }
  const int step = w.kind > INT8 ? DENSE_BLOCK : w.group;
  const auto load = [=](int k, int v) { return ld(block + k * 16 + v * W); };
  for (int k = 0; k < w.k; k += step) {
    const int n = min(step, w.k - k);
    widen(w, index, k, n, block);
    int row = 0;
    for (; row + FLOAT_ROWS <= rows; row += FLOAT_ROWS)
      float_micro<FLOAT_ROWS>(load, n, x + row * stride + k, stride, acc + row * 16);
    for (; row < rows; row++) float_micro<1>(load, n, x + row * stride + k, stride, acc + row * 16);
  }
}

// Inputs converted at a time.
inline int float_block(const Weight& w) {
  return w.kind > INT8 ? DENSE_BLOCK : w.group;
}

inline size_t float_bytes(const Weight& w) {
  return (FLOAT_SPAN * 2 * 16 + (size_t)float_block(w) * 32 + (size_t)w.k) * 4 + 192;
}

// All rows, normalised if the op has a norm: x itself, this thread's scratch (one row) or the shared memory.
inline const float* float_input(const LinearOp& op, const Worker& me, float* room, int64_t* stride) {
  *stride = op.x_stride;
  if (!op.norm) return op.x;
  *stride = op.w->k;
  if (op.rows == 1) return input_row(op, 0, room);
  float* x = (float*)me.shared;
  for (int i; (i = pool_take(me, 1)) < op.rows;) input_row(op, i, x + (size_t)i * op.w->k);
  pool_barrier(me);
  return x;
}

// One pair of tiles, all rows. acc (2, FLOAT_SPAN, 16) and block are a thread's scratch.
inline void float_pair(const LinearOp& op, Pair pair, const float* x, int64_t stride, float* acc, float* block) {
  for (int row = 0; row < op.rows; row += FLOAT_SPAN) {
    const int rows = min(FLOAT_SPAN, op.rows - row);
    float *a = acc, *b = pair.second < 0 ? nullptr : acc + FLOAT_SPAN * 16;
    float_tile(*op.w, pair.first, x + row * stride, stride, rows, block, a);
    if (b) float_tile(*op.w, pair.second, x + row * stride, stride, rows, block, b);
    for (int r = 0; r < rows; r++) {
      F p[V], q[V];
      for (int v = 0; v < V; v++) {
        p[v] = ld(a + r * 16 + v * W);
        if (b) q[v] = ld(b + r * 16 + v * W);
      }
      finish(op, row + r, pair, p, b ? q : nullptr);
    }
  }
}

// Many rows -----------------------------------------------------------------------------------------------

// Inputs are stored in reading order, x[block of k][panel][k][FLOAT_PANEL]. Rows of a matrix have a stride of a power
// of two and would compete for the same cache lines. Strips are those of linear_int.h.
inline size_t float_panel_bytes(int rows, const Weight& w) {
  return sizeof(float) * (size_t)up_to(rows, FLOAT_PANEL) * (size_t)w.k;
}

inline int float_panels_of(int rows) {
  return (rows + FLOAT_PANEL - 1) / FLOAT_PANEL;
}

// Prepares one panel. room: scratch for a row.
inline void pack_floats(const LinearOp& op, int panel, float* out, float* room) {
  const int k = op.w->k, step = float_block(*op.w), panels = float_panels_of(op.rows);
  for (int i = 0; i < FLOAT_PANEL; i++) {
    // repeats the last row; its result is not stored
    const float* x = input_row(op, min(panel * FLOAT_PANEL + i, op.rows - 1), room);
    for (int k0 = 0; k0 < k; k0 += step) {
      const int n = min(step, k - k0);
      float* to = out + ((int64_t)k0 * panels + (int64_t)panel * n) * FLOAT_PANEL + i;
      for (int j = 0; j < n; j++) to[j * FLOAT_PANEL] = x[k0 + j];
    }
  }
}

// acc (FLOAT_PANEL, STRIP) += x (n, FLOAT_PANEL)ᵀ * w (n, STRIP)
inline void float_step(const float* w, int n, const float* x, float* acc) {
  F a[FLOAT_PANEL][NV];
  repeat<FLOAT_PANEL>([&](auto i) ALWAYS {
    repeat<NV>([&](auto v) ALWAYS { a[i.value][v.value] = ld(acc + i.value * STRIP + v.value * W); });
  });
  for (int k = 0; k < n; k++, w += STRIP, x += FLOAT_PANEL) {
    F line[NV];
    repeat<NV>([&](auto v) ALWAYS { line[v.value] = ld(w + v.value * W); });
    fetch((const uint8_t*)(x + n * FLOAT_PANEL));  // the next panel
    repeat<FLOAT_PANEL>([&](auto i) ALWAYS {
      const F b = set1(x[i.value]);
      repeat<NV>([&](auto v) ALWAYS { a[i.value][v.value] = fma(line[v.value], b, a[i.value][v.value]); });
    });
  }
  repeat<FLOAT_PANEL>([&](auto i) ALWAYS {
    repeat<NV>([&](auto v) ALWAYS { st(acc + i.value * STRIP + v.value * W, a[i.value][v.value]); });
  });
}

// Panels p0..p1 of a pair of tiles -> acc [strip][panel][FLOAT_PANEL][STRIP].
inline void float_panels(const Weight& w, Pair pair, const float* x, int panels, int p0, int p1, float* acc,
                         float* block) {
  const int tiles[2] = {pair.first, pair.second < 0 ? pair.first : pair.second};
  const int step = float_block(w);
  memset(acc, 0, sizeof(float) * FLOAT_SPAN * 32);
  for (int strip = 0; strip < (pair.second < 0 ? 1 : STRIPS); strip++)
    for (int k = 0; k < w.k; k += step) {
      const int n = min(step, w.k - k);
      for (int t = 0; t < NV / V; t++) widen(w, tiles[strip + t], k, n, block + 16 * t, STRIP);
      for (int p = p0; p < p1; p++)
        float_step(block, n, x + ((int64_t)k * panels + (int64_t)p * n) * FLOAT_PANEL,
                   acc + (strip * (FLOAT_SPAN / FLOAT_PANEL) + p - p0) * FLOAT_PANEL * STRIP);
    }
}

inline void many_floats(const LinearOp& op, Pair pair, const float* x, float* acc, float* block) {
  constexpr int MOST = FLOAT_SPAN / FLOAT_PANEL;
  const int panels = float_panels_of(op.rows);
  for (int p0 = 0; p0 < panels; p0 += MOST) {
    const int p1 = min(panels, p0 + MOST);
    float_panels(*op.w, pair, x, panels, p0, p1, acc, block);
    finish_panels<FLOAT_PANEL, MOST>(op, pair, p0, p1, acc);
  }
}

void linear_float(const LinearOp& op, const Worker& me) {
  const Weight& w = *op.w;
  float *acc = (float*)me.scratch, *block = acc + FLOAT_SPAN * 2 * 16;
  float* room = block + 32 * float_block(w);
  if (op.rows > FEW) {
    float* x = (float*)me.shared;
    for (int p; (p = pool_take(me, 1)) < float_panels_of(op.rows);) pack_floats(op, p, x, room);
    pool_barrier(me);
    for (int i; (i = pool_take(me, 1)) < pairs_of(op);) many_floats(op, pair_at(op, i), x, acc, block);
    return;
  }
  int64_t stride;
  const float* x = float_input(op, me, room, &stride);
  const int items = pairs_of(op), step = op.rows == 1 ? claim(items, me.threads) : 1;
  for (int at; (at = pool_take(me, step)) < items;)
    for (int i = at; i < min(items, at + step); i++) float_pair(op, pair_at(op, i), x, stride, acc, block);
}

}  // namespace
