// Rotary positions: input d of a head x, rotated by its position. Angles are float32.
#pragma once

// inv_freq (half), or null: no rotation. Pairs are (i, i + half), or (2i, 2i + 1) if interleaved.
DEVICE float turned(const float* x, int d, const float* inv_freq, int half, float factor, int interleaved,
                    int position) {
  const float v = x[d];
  if (!inv_freq || d >= 2 * half) return v;
  const int i = interleaved ? d / 2 : d % half;
  const bool second = interleaved ? d % 2 : d >= half;
  const float other = x[interleaved ? d ^ 1 : second ? d - half : d + half];
  const float angle = float(position) * inv_freq[i], c = cosf(angle) * factor, s = sinf(angle) * factor;
  return second ? fmaf(other, s, v * c) : fmaf(-other, s, v * c);
}
