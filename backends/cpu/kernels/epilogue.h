// Applied to the sums of a tile before they are stored: bias, activation, gate, residual.
#pragma once
#include "simd_util.h"

namespace {

// A work item is a pair of tiles: two neighbours, or a gate tile and its up tile.
struct Pair {
  int first, second;  // second < 0: the last of an odd number
};

inline bool in_floats(const LinearOp& op) {
  return op.exact || op.w->kind > INT8;
}

inline int pairs_of(const LinearOp& op) {
  const int tiles = tiles_of(*op.w);
  return op.gated ? tiles / 2 : (tiles + 1) / 2;
}

inline Pair pair_at(const LinearOp& op, int item) {
  const int tiles = tiles_of(*op.w);
  if (op.gated) return {item, item + tiles / 2};
  return {2 * item, 2 * item + 1 < tiles ? 2 * item + 1 : -1};
}

// Adds 16 outputs to row to[row] of y.
inline void add_tile(const LinearOp& op, int row, int tile, const F* sum) {
  float* y = op.y + op.to[row] * op.y_stride + tile * 16;
  const F share = set1(op.share[row]);
  for (int v = 0; v < V; v++) {
    const int room = op.w->n - tile * 16 - v * W;
    if (room >= W) {
      st(y + v * W, fma(share, sum[v], ld(y + v * W)));
    } else if (room > 0) {
      st_part(y + v * W, fma(share, sum[v], ld_part(y + v * W, room)), room);
    }
  }
}

// Stores the sums of 16 outputs of one row in y, starting at column `tile * 16`.
inline void finish_tile(const LinearOp& op, int row, int tile, F* sum) {
  if (op.to) return add_tile(op, row, tile, sum);
  const int n = op.gated ? op.w->n / 2 : op.w->n, column = tile * 16;
  float* y = op.y + row * op.y_stride + column;
  const float* residual = op.residual ? op.residual + row * op.residual_stride + column : nullptr;
  for (int v = 0; v < V; v++) {
    const int room = n - column - v * W;
    if (room >= W) {
      if (residual) sum[v] = add(sum[v], ld(residual + v * W));
      st(y + v * W, sum[v]);
    } else if (room > 0) {
      if (residual) sum[v] = add(sum[v], ld_part(residual + v * W, room));
      st_part(y + v * W, sum[v], room);
    }
  }
}

inline void add_bias(const LinearOp& op, int tile, F* sum) {
  const float* bias = bias_of(*op.w);
  if (!bias) return;
  for (int v = 0; v < V; v++) sum[v] = add(sum[v], ld(bias + tile * 16 + v * W));
}

// One row's sums of a pair of tiles: a (V vectors) and b (null without a second tile).
inline void finish(const LinearOp& op, int row, Pair pair, F* a, F* b) {
  add_bias(op, pair.first, a);
  if (b) add_bias(op, pair.second, b);
  if (op.gated) {
    for (int v = 0; v < V; v++) a[v] = mul(act(a[v], op.act), b[v]);
    return finish_tile(op, row, pair.first, a);
  }
  if (op.act != NO_ACT)
    for (int v = 0; v < V; v++) {
      a[v] = act(a[v], op.act);
      if (b) b[v] = act(b[v], op.act);
    }
  finish_tile(op, row, pair.first, a);
  if (b) finish_tile(op, row, pair.second, b);
}

// How many items to claim at once: long runs for the prefetcher, but enough of them to balance the threads.
inline int claim(int items, int threads) {
  return max(1, items / (threads * 8));
}

}  // namespace
