// Quantises activations to int8 with a scale per group of inputs: x ~ q * scale, |q| <= 127.
#pragma once
#include "simd_util.h"

namespace {

// x (k) -> q (k), scales (k / group), sums (k / group): the sum of a group's q * scale, multiplied by a weight's bias.
inline void quantise_row(const float* x, int k, int group, int8_t* q, float* scales, float* sums) {
  for (int g = 0; g < k / group; g++, x += group, q += group) {
    F peak = set1(0);
    for (int i = 0; i < group; i += W) peak = max(peak, magnitude(ld(x + i)));
    const float top = max_of(peak), scale = top / 127;
    const F inverse = set1(top > 1e-30f ? 127 / top : 0);
    F sum = set1(0);
    for (int i = 0; i < group; i += W) {
      const F whole = nearest(mul(ld(x + i), inverse));
      sum = add(sum, whole);
      st8(q + i, whole);
    }
    scales[g] = scale, sums[g] = scale * sum_of(sum);
  }
}

}  // namespace
