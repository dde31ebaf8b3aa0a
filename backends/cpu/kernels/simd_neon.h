// NEON of any 64-bit Arm, with the dot product and int8 matrix instructions if the compiler's flags enable them.
// Primitives: see simd_scalar.h.
#pragma once
#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

namespace {

constexpr int W = 4;
using F = float32x4_t;
using I = int32x4_t;

inline F set1(float x) {
  return vdupq_n_f32(x);
}
inline F ld(const float* p) {
  return vld1q_f32(p);
}
inline F ldh(const uint16_t* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
inline void ldz(const uint16_t* p, F& half, F& whole) {
  const uint16x4_t u = vld1_u16(p), low = vdup_n_u16(15);
  half = vcvt_f32_f16(vreinterpret_f16_u16(vbic_u16(u, low)));
  whole = vcvtq_f32_u32(vmovl_u16(vand_u16(u, low)));
}
inline F ldb(const uint16_t* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
inline F ldc(const int8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}
inline void st(float* p, F x) {
  vst1q_f32(p, x);
}
inline void sth(uint16_t* p, F x) {
  vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x)));
}
inline void st8(int8_t* p, F x) {
  const int16x4_t s = vmovn_s32(vcvtnq_s32_f32(x));
  const int8x8_t b = vmovn_s16(vcombine_s16(s, s));
  const uint32_t four = vget_lane_u32(vreinterpret_u32_s8(b), 0);
  memcpy(p, &four, 4);
}
inline F add(F a, F b) {
  return vaddq_f32(a, b);
}
inline F sub(F a, F b) {
  return vsubq_f32(a, b);
}
inline F mul(F a, F b) {
  return vmulq_f32(a, b);
}
inline F div(F a, F b) {
  return vdivq_f32(a, b);
}
inline F fma(F a, F b, F c) {
  return vfmaq_f32(c, a, b);
}
inline F max(F a, F b) {
  return vmaxq_f32(a, b);
}
inline F min(F a, F b) {
  return vminq_f32(a, b);
}
inline F magnitude(F a) {
  return vabsq_f32(a);
}
inline F nearest(F a) {
  return vrndnq_f32(a);
}
inline F power_of_two(F n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}
inline float sum_of(F a) {
  return vaddvq_f32(a);
}
inline float max_of(F a) {
  return vmaxvq_f32(a);
}
inline F to_float(I a) {
  return vcvtq_f32_s32(a);
}
inline F field(const uint8_t* p, int shift, uint32_t mask) {
  const uint32x4_t u = vshlq_u32(vreinterpretq_u32_u8(vld1q_u8(p)), vdupq_n_s32(-shift));
  return vcvtq_f32_u32(vandq_u32(u, vdupq_n_u32(mask)));
}

using Codes = int8x16_t;
inline Codes codes(const uint8_t* p) {
  return vreinterpretq_s8_u8(vld1q_u8(p));
}
inline Codes low(Codes c) {
  return vandq_s8(c, vdupq_n_s8(15));
}
inline Codes high(Codes c) {
  return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(c), 4));
}
// Wide codes become signed by subtracting 128, which WIDE_OFFSET adds again.
inline Codes wide_low(Codes upper, Codes lower) {
  return veorq_s8(vsliq_n_s8(lower, upper, 4), vdupq_n_s8(-128));
}
inline Codes wide_high(Codes upper, Codes lower) {
  const uint8x16_t both = vsriq_n_u8(vreinterpretq_u8_s8(upper), vreinterpretq_u8_s8(lower), 4);
  return veorq_s8(vreinterpretq_s8_u8(both), vdupq_n_s8(-128));
}
inline void put_codes(uint8_t* p, Codes c) {
  vst1q_u8(p, vreinterpretq_u8_s8(c));
}

#if defined(_MSC_VER)
inline void hide(Codes&) {}
#else
inline void hide(Codes& c) {
  __asm__ volatile("" : "+w"(c));
}  // hides the value of c from the compiler
#endif
inline void fetch(const uint8_t*) {}  // the hardware prefetcher is as fast
inline void fetch_to_write(float*) {}

using Quads = int8x16_t;
inline Quads ld_quads(const int8_t* p) {
  return vld1q_s8(p);
}

#if defined(__ARM_FEATURE_DOTPROD)
template <bool WIDE>
struct Acc {
  static constexpr int ROOM = 1 << 20;
  I s;
  void clear() { s = vdupq_n_s32(0); }
  template <int L>
  void add(Codes w, Quads x) {
    s = vdotq_laneq_s32(s, w, x, L);
  }
  void flush() {}
  I sum() const { return s; }
};
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define MATRIX "matrix_neon.h"  // the many-row step has a separate file
constexpr int CHAINS = 1, PANEL = 6;
#else
constexpr int CHAINS = 1, PANEL = 4;
#endif
#else
// A lane of t0, t1 is one input of one row: products of at most 15 * 127 = 1905, so 17 fit int16. Wide ones are at most
// 128 * 127, so 2 fit.
template <bool WIDE>
struct Acc {
  static constexpr int ROOM = WIDE ? 2 : 16;
  I s0, s1;
  int16x8_t t0, t1;
  void clear() {
    s0 = s1 = vdupq_n_s32(0);
    t0 = t1 = vdupq_n_s16(0);
  }
  template <int L>
  void add(Codes w, Quads x) {
    const int8x16_t four = vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(x), L));
    t0 = vmlal_s8(t0, vget_low_s8(w), vget_low_s8(four));
    t1 = vmlal_high_s8(t1, w, four);
  }
  void flush() {
    s0 = vpadalq_s16(s0, t0), s1 = vpadalq_s16(s1, t1);
    t0 = t1 = vdupq_n_s16(0);
  }
  I sum() const { return vpaddq_s32(s0, s1); }
};
constexpr int CHAINS = 1, PANEL = 2;
#endif
constexpr float WIDE_OFFSET = 128;
constexpr int FLOAT_ROWS = 4, FLOAT_PANEL = 6;

}  // namespace
