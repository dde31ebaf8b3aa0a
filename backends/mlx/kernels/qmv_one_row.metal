// One row of x: 16 inputs per lane and iteration, prescaled, so that a code costs a mask, a conversion and an fma. If
// K % 512 is not 0, some lanes are idle in the last iteration, where MLX's kernel switches to 8 inputs per lane.
for (uint k = lane * 16; k < K; k += 32 * 16) {
  const auto inputs = x + first_m * K + k;
#if NORM
  const auto weights = norm_weight + k;
#endif
  float h[16], total = 0;
#if UPPER
  float size = 0;
#endif
  UNROLLED for (int i = 0; i < 16; i++) {
    float v = float(inputs[i]);
#if NORM
    squares[0] += v * v;
    v *= weights[i];
#endif
    total += v;
#if UPPER
    size += v * v;
#endif
    h[i] = v * prescale(i);
  }
  UNROLLED for (int r = 0; r < R; r++) {
    const uint g = row[r] * (K / G) + k / G;
    const float codes = dot16(w + row[r] * (K * BITS / 32) + k * BITS / 32, h);
#if UPPER  // of 16 scale upper + scale lower + bias, with 7.5 for a lower half
    const float scale = float(scales[g]);
    acc[0][r] += 16 * scale * codes + (float(biases[g]) + 7.5f * scale) * total;
    spread[r] += scale * scale * size;
#elif LOWER  // the part omitted above
    acc[0][r] += float(scales[g]) * (codes - 7.5f * total);
#else
    acc[0][r] += float(scales[g]) * codes + float(biases[g]) * total;
#endif
  }
}
