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
