// y[m, n] = [residual[m, n] +] sum_k W[n, k] * h[m, k] [+ bias[n]],   h = x, or x's RMSNorm (NORM)
// GLU: W's first N rows are the gate, the other N the up projection: y = act(gate . h) * (up . h).
//
// The loop over K is qmv_one_row.metal for one row of x, qmv_few_rows.metal for 2 to 8. x (M, K), scales, biases,
// bias, residual (M, N): half, bfloat or float, independently; y (M, N) T; norm_weight (K,) float; eps float; K a
// multiple of 32; any N. Threadgroup (64, 1, 1): two SIMD-groups, each reading R rows of W. Accumulates in float. Grid
// (64 * threadgroups, M / ROWS, 1).
//
// RMSNorm costs almost no time here: its factor is one number per row of x, applied to the finished sum, and sum(x * x)
// is computed in the same pass.
//
// Loops index from a pointer computed once per iteration: an index in uint that could wrap would prevent the compiler
// from merging loads.
constexpr int R = 4, OUTPUTS = GLU ? R / 2 : R;
const uint K = x_shape[1], N = w_shape[0] / (GLU ? 2 : 1);
const uint lane = thread_index_in_simdgroup, first_m = threadgroup_position_in_grid.y * ROWS;
const uint first_n = (threadgroup_position_in_grid.x * 2 + simdgroup_index_in_threadgroup) * OUTPUTS;
if (first_n >= N) return;  // a whole SIMD-group returns, and no barrier follows
uint row[R];               // rows of W; beyond a ragged N the last row is read again, and not written
UNROLLED for (int r = 0; r < R; r++) {
  const uint n = metal::min(first_n + (GLU ? r / 2 : r), N - 1);
  row[r] = GLU && r % 2 ? N + n : n;
}
float acc[ROWS][R] = {{0}};
#if NORM
float squares[ROWS] = {0};
#endif
#if ROWS == 1
#include "qmv_one_row.metal"
#else
#include "qmv_few_rows.metal"
#endif
UNROLLED for (int m = 0; m < ROWS; m++) {
  float factor = 1;
#if NORM
  factor = metal::rsqrt(simd_sum(squares[m]) / float(K) + eps);
#endif
  UNROLLED for (int r = 0; r < R; r++) acc[m][r] = simd_sum(acc[m][r]) * factor;
}
if (lane == 0) {
  UNROLLED for (int m = 0; m < ROWS; m++) {
    UNROLLED for (int o = 0; o < OUTPUTS; o++) {
      if (first_n + o >= N) continue;
      const uint n = first_n + o, at = (first_m + m) * N + n;
#if GLU
      float gate = acc[m][2 * o], value = acc[m][2 * o + 1];
#if BIAS
      gate += float(bias[n]);
      value += float(bias[N + n]);
#endif
      value *= act(gate);
#else
      float value = acc[m][o];
#if BIAS
      value += float(bias[n]);
#endif
#endif
#if RESIDUAL
      value += float(residual[at]);
#endif
      y[at] = T(value);
    }
  }
}
