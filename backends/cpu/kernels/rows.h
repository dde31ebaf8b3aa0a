// Ops that work row by row: embed, norm, rope, and elementwise ops.
#pragma once
#include "pool.h"
#include "scales.h"
#include "simd_util.h"

namespace {

// One row of n: x -> y (may be the same). Statistics are float32: first the mean, then the squares of the differences.
inline void norm_row(const float* x, float* y, int n, const NormArg& norm) {
  float mean = 0;
  if (norm.kind == LAYER) {
    F sum = set1(0);
    int i = 0;
    for (; i + W <= n; i += W) sum = add(sum, ld(x + i));
    mean = sum_of(sum);
    for (; i < n; i++) mean += x[i];
    mean /= (float)n;
  }
  F sum = set1(0);
  int i = 0;
  for (; i + W <= n; i += W) {
    const F d = sub(ld(x + i), set1(mean));
    sum = fma(d, d, sum);
  }
  float square = sum_of(sum);
  for (; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
  const F factor = set1(1 / sqrtf(square / (float)n + norm.eps)), middle = set1(mean);
  map(n, x, norm.weight, y, [&](F a, F w) { return mul(mul(sub(a, middle), factor), w); });
  if (norm.bias) map(n, y, norm.bias, y, [](F a, F b) { return add(a, b); });
}

void norm_op(const NormOp& op, const Worker& me) {
  const int n = op.rows * op.heads, step = max(1, 4096 / op.dim);
  for (int at; (at = pool_take(me, step)) < n;)
    for (int i = at; i < min(n, at + step); i++) {
      const float* x = op.x + (i / op.heads) * op.row_stride + (i % op.heads) * op.head_stride;
      norm_row(x, op.y + (int64_t)i * op.dim, op.dim, *op.norm);
    }
}

inline void rope_head(float* x, const float* cosine, const float* sine, const RopeOp& op) {
  const int half = op.half;
  if (op.interleaved) {
    for (int i = 0; i < half; i++) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cosine[i] - b * sine[i];
      x[2 * i + 1] = b * cosine[i] + a * sine[i];
    }
    return;
  }
  int i = 0;
  for (; i + W <= half; i += W) {
    const F a = ld(x + i), b = ld(x + half + i), c = ld(cosine + i), s = ld(sine + i);
    st(x + i, sub(mul(a, c), mul(b, s)));
    st(x + half + i, fma(a, s, mul(b, c)));
  }
  for (; i < half; i++) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cosine[i] - b * sine[i];
    x[half + i] = b * cosine[i] + a * sine[i];
  }
}

void rope_op(const RopeOp& op, const Worker& me) {
  for (int row; (row = pool_take(me, 1)) < op.rows;) {
    const float* table = op.table + (int64_t)op.positions[row] * 2 * op.half;
    for (int h = 0; h < op.heads; h++)
      rope_head(op.x + row * op.row_stride + h * op.head_stride, table, table + op.half, op);
  }
}

void map_op(const MapOp& op, const Worker& me) {
  const int step = max(1, 8192 / max(1, op.cols)), kind = op.act, n = op.cols;
  const F factor = set1(op.factor);
  for (int at; (at = pool_take(me, step)) < op.rows;)
    for (int row = at; row < min(op.rows, at + step); row++) {
      const float *a = op.a + row * op.a_stride, *b = op.b + row * op.b_stride;
      float* y = op.y + row * op.y_stride;
      switch (op.kind) {
        case MAP_ACT: map(n, a, y, [&](F x) { return act(x, kind); }); break;
        case MAP_GLU: map(n, a, b, y, [&](F g, F u) { return mul(act(g, kind), u); }); break;
        case MAP_ADD: map(n, a, b, y, [&](F x, F r) { return fma(factor, r, x); }); break;
        case MAP_SCALE: map(n, a, y, [&](F x) { return mul(factor, x); }); break;
        case MAP_SOFTCAP: map(n, a, y, [&](F x) { return softcap(x, op.factor); }); break;
      }
    }
}

// Single numbers of a tile: row `id` of the table.
inline float half_number(const uint8_t* p) {
  uint16_t line[W];
  memcpy(line, p, 2);
  for (int i = 1; i < W; i++) line[i] = 0;
  float f[W];
  st(f, ldh(line));
  return f[0];
}

inline void embed_int(const Weight& w, int id, float* y) {
  const int r = id % 16;
  const uint8_t *block = tile_at(w, id / 16), *lower = lower_of(w, id / 16);
  for (int g = 0; g < w.k / w.group; g++, block += block_bytes(w), lower += w.group * 8, y += w.group) {
    const Tail t = tail_of<false>(w, block + w.group * 8);
    float scale[W], bias[W];
    st(scale, t.scale[r / W]), st(bias, t.bias[r / W]);
    for (int i = 0; i < w.group; i++) {
      const int at = i / 8 * 64 + 4 * r + i % 4, shift = i & 4;
      const int q = block[at] >> shift & 15;
      y[i] = (float)(w.kind == INT4 ? q : q * 16 + (lower[at] >> shift & 15)) * scale[r % W] + bias[r % W];
    }
  }
}

inline void embed_dense(const Weight& w, int id, float* y) {
  const uint8_t* tile = tile_at(w, id / 16);
  const int r = id % 16;
  for (int i = 0; i < w.k; i++) {
    if (w.kind == F16) {
      y[i] = half_number(tile + ((size_t)i * 16 + (size_t)r) * 2);
    } else if (w.kind == BF16) {
      uint16_t h;
      memcpy(&h, tile + ((size_t)i * 16 + (size_t)r) * 2, 2);
      const uint32_t bits = (uint32_t)h << 16;
      memcpy(y + i, &bits, 4);
    } else {
      memcpy(y + i, tile + ((size_t)i * 16 + (size_t)r) * 4, 4);
    }
  }
}

void embed_op(const EmbedOp& op, const Worker& me) {
  const Weight& w = *op.table;
  for (int row; (row = pool_take(me, 1)) < op.rows;) {
    (w.kind <= INT8 ? embed_int : embed_dense)(w, op.ids[row], op.y + (int64_t)row * w.k);
  }
}

}  // namespace
