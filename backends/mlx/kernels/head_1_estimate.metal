// Logits of a head in halves (split_int8.py), estimated from the upper halves, and the reach of each tile of R rows
// (head.py).
//
// x (1, K): half, bfloat or float; w (N, K / 8) uint32: the upper halves; scales, biases (N, K / G); norm_weight (K,)
// float, eps float (NORM); choice (2,) float: temperature, tail -> estimate (1, N) float; top (tiles,) float: the
// largest estimate of a tile; reach (tiles,) float: the bound to compare. K a multiple of 32, any N. Threadgroup (64,
// 1, 1): two SIMD-groups of a tile each. Accumulates in float.
constexpr int R = 4;
const uint K = x_shape[1], N = w_shape[0], lane = thread_index_in_simdgroup, first_m = 0;
const uint tile = threadgroup_position_in_grid.x * 2 + simdgroup_index_in_threadgroup, first_n = tile * R;
if (first_n >= N) return;  // a whole SIMD-group returns, and no barrier follows
uint row[R];               // beyond a ragged N the last row is read again, which does not change the tile's reach
UNROLLED for (int r = 0; r < R; r++) row[r] = metal::min(first_n + r, N - 1);
float acc[1][R] = {{0}}, spread[R] = {0};
#if NORM
float squares[1] = {0};
#endif
#include "qmv_one_row.metal"
float factor = 1;
#if NORM
factor = metal::rsqrt(simd_sum(squares[0]) / float(K) + eps);
#endif
float largest = LEAST, furthest = LEAST;
UNROLLED for (int r = 0; r < R; r++) {
  const float y = simd_sum(acc[0][r]) * factor;
  const float variance = VARIANCE * simd_sum(spread[r]) * factor * factor;
  float more = MARGIN * metal::sqrt(variance);
  if (choice[0] > 0) more = metal::min(more, variance / (2 * choice[0]));
  const float reaches = y + HALF_UNIT * metal::abs(y) + more;
  largest = y > largest ? y : largest;  // NaN is ignored, and its estimate is kept
  furthest = reaches > furthest ? reaches : furthest;
  if (lane == 0 && first_n + r < N) estimate[first_n + r] = y;
}
if (lane == 0) {
  top[tile] = largest;
  reach[tile] = furthest;
}
