// A head's logits when one token is chosen from them (op.h, Choice). Every tile is read at half its width, and at full
// width if it may matter.
//
// The upper pass omits a sum of scale * (lower - 7.5) * x from a logit. Lower halves are close to uniform on 0..15, so
// the sum is close to normal, with a deviation d = sqrt(85/4 * sum over groups of scale^2 |x|^2). The difference of two
// logits has a deviation of sqrt(2) d. A token 6 of those below the largest is the true maximum once in 10^9 times. If
// a token is sampled, one with estimate y has a mean weight of e^(y / T + (d / T)^2 / 2). Tiles read at full width are
// bit-identical to those without a shortlist.
#pragma once
#include "linear_int.h"

namespace {

constexpr float VARIANCE = 85 / 4.f, MARGIN = 6 * 1.41421356f;

inline bool shortens(const LinearOp& op) {
  return op.choice && op.choice->on && op.rows == 1 && op.w->kind == INT8 && !op.w->has_bias;
}

struct Estimates {
  float *top, *reach;  // (tiles): a tile's largest logit by its upper halves, and the bound to compare
};
inline Estimates estimates_at(const Worker& me, int tiles) {
  float* top = (float*)me.shared;
  return {top, top + up_to(tiles, 16)};
}
inline size_t estimates_bytes(const Weight& w) {
  return sizeof(float) * 2 * (size_t)up_to(tiles_of(w), 16);
}

// |x|^2 of each group.
inline void squares_of(const Quantised& a, const Weight& w, float* squares) {
  for (int g = 0; g < w.k / w.group; g++) {
    int32_t sum = 0;
    for (int i = 0; i < w.group; i++) sum += a.x[g * w.group + i] * a.x[g * w.group + i];
    squares[g] = (float)sum * a.scale[g] * a.scale[g];
  }
}

// d^2 of the row of a tile where it is largest.
inline float variance_of(const Weight& w, int tile, const float* squares) {
  const uint8_t* ends = tile_at(w, tile) + (size_t)w.group * 8;
  F sum[V];
  for (int v = 0; v < V; v++) sum[v] = set1(0);
  for (int g = 0; g < w.k / w.group; g++, ends += block_bytes(w)) {
    const Tail t = tail_of<false>(w, ends);
    for (int v = 0; v < V; v++) sum[v] = fma(mul(t.scale[v], t.scale[v]), set1(squares[g]), sum[v]);
  }
  float largest = 0;
  for (int v = 0; v < V; v++) {
    const float x = max_of(sum[v]);
    largest = x > largest ? x : largest;
  }
  return VARIANCE * largest;
}

// The largest of a tile's sums. Lanes beyond the last row are not tokens.
inline float top_of(const Weight& w, int tile, const F* sum) {
  float line[16], largest = -3e38f;
  for (int v = 0; v < V; v++) st(line + v * W, sum[v]);
  for (int i = 0; i < min(16, w.n - tile * 16); i++) largest = line[i] > largest ? line[i] : largest;
  return largest;
}

// Tiles whose reach is at least this value matter. If a token is sampled, tiles of least reach are dropped in steps of
// half a temperature, as long as the total probability of their tokens is at most `tail`, assuming that all of them are
// as large as the step.
inline float least_reach(const Choice& c, const Estimates& e, int tiles) {
  float best = -3e38f;
  for (int t = 0; t < tiles; t++) best = e.top[t] > best ? e.top[t] : best;
  if (c.temperature <= 0) return best;
  constexpr int STEPS = 128;
  int count[STEPS] = {}, step = STEPS;
  for (int t = 0; t < tiles; t++) {
    const float below = (best - e.reach[t]) * 2 / c.temperature;
    if (below > 0) count[below < STEPS ? (int)below : STEPS - 1]++;
  }
  float mass = 0;
  while (step > 0) {
    mass += 16 * (float)count[step - 1] * expf(-.5f * (float)(step - 1));
    if (mass > c.tail) break;
    step--;
  }
  return best - .5f * c.temperature * (float)step;
}

inline void coarse_tile(const LinearOp& op, int tile, const Quantised& a, const float* squares, const Estimates& e) {
  const Weight& w = *op.w;
  F sum[1][V];
  tile_rows<UPPER, 1>(w, tile, a, 0, sum);
  e.top[tile] = top_of(w, tile, sum[0]);
  const float variance = variance_of(w, tile, squares), temperature = op.choice->temperature;
  e.reach[tile] = e.top[tile] + (temperature > 0 ? variance / (2 * temperature) : MARGIN * sqrtf(variance));
  finish_tile(op, 0, tile, sum[0]);
}

inline void whole_tile(const LinearOp& op, int tile, const Quantised& a) {
  F sum[1][V];
  tile_rows<WIDE, 1>(*op.w, tile, a, 0, sum);
  finish_tile(op, 0, tile, sum[0]);
}

void shortlist(const LinearOp& op, const Worker& me) {
  const Weight& w = *op.w;
  const Quantised a = quantise_input(op, me);
  const int tiles = tiles_of(w), step = claim(tiles, me.threads);
  const Estimates e = estimates_at(me, tiles);
  float* squares = (float*)(me.scratch + up_to((int64_t)quantised_bytes(1, w), 64));
  squares_of(a, w, squares);
  for (int at; (at = pool_take(me, step)) < tiles;)
    for (int t = at; t < min(tiles, at + step); t++) coarse_tile(op, t, a, squares, e);
  pool_barrier(me);
  const float least = least_reach(*op.choice, e, tiles);
  for (int at; (at = pool_take(me, 16)) < tiles;)
    for (int t = at; t < min(tiles, at + 16); t++) {
      if (e.reach[t] < least) continue;  // written so that a NaN is read at full width
      whole_tile(op, t, a);
      pool_arrive(&op.choice->tiles);
    }
}

}  // namespace
