// ROWS (2 to 8) rows of x at once: a weight is read and decoded once for all of them. M1 and M2 have no such kernel in
// MLX: checking drafted tokens, or several conversations, reads the weights once per token there. Eight inputs of R
// rows are 32 registers, and acc is at most as many: all fits in 128.
for (uint k = lane * 8; k < K; k += 32 * 8) {
  float weight[R][8];
  UNROLLED for (int r = 0; r < R; r++) {
    const uint g = row[r] * (K / G) + k / G;
    const float scale = float(scales[g]), offset = float(biases[g]);
    const device uint32_t* words = w + row[r] * (K * BITS / 32) + k * BITS / 32;
    UNROLLED for (int i = 0; i < 8; i++) weight[r][i] = code8(words, i) * scale + offset;
  }
#if NORM
  const auto weights = norm_weight + k;
#endif
  UNROLLED for (int m = 0; m < ROWS; m++) {
    const auto inputs = x + (first_m + m) * K + k;
    UNROLLED for (int i = 0; i < 8; i++) {
      float v = float(inputs[i]);
#if NORM
      squares[m] += v * v;
      v *= weights[i];
#endif
      UNROLLED for (int r = 0; r < R; r++) acc[m][r] += v * weight[r][i];
    }
  }
}
