// One row of x: 16 inputs a lane and turn, prescaled, so that a code costs a mask, a conversion and an fma.
// K % 512 only leaves some lanes idle in the last turn, where MLX's own kernel goes over to 8 inputs a lane.
for (uint k = lane * 16; k < K; k += 32 * 16) {
  float h[16], total = 0;
  for (int i = 0; i < 16; i++) {
    float v = float(x[first_m * K + k + i]);
#if NORM
    squares[0] += v * v;
    v *= norm_weight[k + i];
#endif
    total += v;
    h[i] = v * prescale(i);
  }
  for (int r = 0; r < R; r++) {
    const uint g = row[r] * (K / G) + k / G;
    const float codes = dot16(w + row[r] * (K * BITS / 32) + k * BITS / 32, h);
    acc[0][r] += float(scales[g]) * codes + float(biases[g]) * total;
  }
}
