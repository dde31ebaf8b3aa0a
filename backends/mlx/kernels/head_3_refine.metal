// Logits of a head in halves: the estimate, plus the lower halves if a tile's reach matters (head.py).
//
// x, scales, norm_weight, eps as in head_1_estimate.metal; w (N, K / 8) uint32: the lower halves; estimate (1, N),
// reach (tiles,), least (1,) float -> y (1, N) T. K a multiple of 32, any N. Threadgroup (64, 1, 1): two SIMD-groups of
// 32 rows each, one per lane where estimates are copied. Accumulates in float.
constexpr int R = 4;
constexpr uint TILES = 32 / R;
const uint K = x_shape[1], N = w_shape[0], lane = thread_index_in_simdgroup, first_m = 0;
const uint first_tile = (threadgroup_position_in_grid.x * 2 + simdgroup_index_in_threadgroup) * TILES;
const uint mine = first_tile * R + lane;
if (mine < N && reach[mine / R] < least[0]) y[mine] = T(estimate[mine]);
for (uint tile = first_tile; tile < first_tile + TILES && tile * R < N; tile++) {
  if (reach[tile] < least[0]) continue;  // the same for all lanes; a NaN reach is read too
  const uint first_n = tile * R;
  uint row[R];
  UNROLLED for (int r = 0; r < R; r++) row[r] = metal::min(first_n + r, N - 1);
  float acc[1][R] = {{0}};
#if NORM
  float squares[1] = {0};
#endif
#include "qmv_one_row.metal"
  float factor = 1;
#if NORM
  factor = metal::rsqrt(simd_sum(squares[0]) / float(K) + eps);
#endif
  UNROLLED for (int r = 0; r < R; r++) {
    const float more = simd_sum(acc[0][r]) * factor;
    if (lane == 0 && first_n + r < N) y[first_n + r] = T(estimate[first_n + r] + more);
  }
}
