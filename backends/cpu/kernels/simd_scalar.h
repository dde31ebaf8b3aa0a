// The vector primitives in plain C++: the version to read, and the fallback for other processors.
//
// F    W floats                                  Acc<WIDE>   dot products of W rows, 4 inputs per step
// A file that defines these primitives makes every kernel in isa_unit.h.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace {

constexpr int W = 4;
struct F {
  float v[W];
};
struct I {
  int32_t v[W];
};

template <class Fn>
inline F each(Fn fn) {
  F r;
  for (int i = 0; i < W; i++) r.v[i] = fn(i);
  return r;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  uint32_t bits = sign | ((rest << 13) + (112u << 23));
  if (rest >= 0x7c00) bits = sign | 0x7f800000 | rest << 13;  // infinite, NaN
  float f;
  memcpy(&f, &bits, 4);
  if (rest < 0x0400) {  // subnormal: rest * 2^-24
    f = (float)rest * 5.9604644775390625e-8f;
    return sign ? -f : f;
  }
  return f;
}

inline uint16_t float_to_half(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
  const uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 and above round to infinity
  if (rest < 0x38800000) {                                   // below 2^-14: adding 0.5 rounds at 2^-24
    float magnitude;
    memcpy(&magnitude, &rest, 4);
    magnitude += 0.5f;
    uint32_t r;
    memcpy(&r, &magnitude, 4);
    return (uint16_t)(sign | (r - 0x3f000000));
  }
  return (uint16_t)(sign | ((rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13));
}

inline F set1(float x) {
  return each([&](int) { return x; });
}
inline F ld(const float* p) {
  return each([&](int i) { return p[i]; });
}
inline F ldh(const uint16_t* p) {
  return each([&](int i) { return half_to_float(p[i]); });
}
// 16-bit numbers of two parts: an fp16 whose lowest four bits are zero, and an integer in their place.
inline void ldz(const uint16_t* p, F& half, F& whole) {
  half = each([=](int i) { return half_to_float((uint16_t)(p[i] & 0xfff0)); });
  whole = each([=](int i) { return (float)(p[i] & 15); });
}
inline F ldb(const uint16_t* p) {
  return each([&](int i) {
    const uint32_t bits = (uint32_t)p[i] << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  });
}
inline F ldc(const int8_t* p) {
  return each([&](int i) { return (float)p[i]; });
}
inline void st(float* p, F x) {
  for (int i = 0; i < W; i++) p[i] = x.v[i];
}
inline void sth(uint16_t* p, F x) {
  for (int i = 0; i < W; i++) p[i] = float_to_half(x.v[i]);
}
inline void st8(int8_t* p, F x) {  // integers within int8
  for (int i = 0; i < W; i++) p[i] = (int8_t)x.v[i];
}
inline F add(F a, F b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline F sub(F a, F b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline F mul(F a, F b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline F div(F a, F b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline F fma(F a, F b, F c) {  // a * b + c
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline F max(F a, F b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F min(F a, F b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F magnitude(F a) {
  return each([&](int i) { return fabsf(a.v[i]); });
}
inline F nearest(F a) {
  return each([&](int i) { return nearbyintf(a.v[i]); });
}
inline F power_of_two(F n) {  // 2^n for integer n in -126..127
  return each([&](int i) { return ldexpf(1.f, (int)n.v[i]); });
}
inline float sum_of(F a) {
  return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]);
}
inline float max_of(F a) {
  float m = a.v[0];
  for (int i = 1; i < W; i++) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
inline F to_float(I a) {
  return each([&](int i) { return (float)a.v[i]; });
}
// Lane r: bits shift.. of the r-th 32-bit word, masked.
inline F field(const uint8_t* p, int shift, uint32_t mask) {
  uint32_t u[W];
  memcpy(u, p, sizeof u);
  return each([&](int i) { return (float)(u[i] >> shift & mask); });
}

// Codes of W rows, 4 inputs each. WIDE codes reach 255, others 15.
struct Codes {
  uint8_t v[4 * W];
};
inline Codes codes(const uint8_t* p) {
  Codes c;
  memcpy(c.v, p, sizeof c.v);
  return c;
}
inline Codes low(Codes c) {
  for (auto& b : c.v) b &= 15;
  return c;
}
inline Codes high(Codes c) {
  for (auto& b : c.v) b >>= 4;
  return c;
}
inline Codes wide_low(Codes upper, Codes lower) {  // codes of 8 bits: the low nibbles of their halves
  for (int i = 0; i < 4 * W; i++) lower.v[i] = (uint8_t)(upper.v[i] << 4 | (lower.v[i] & 15));
  return lower;
}
inline Codes wide_high(Codes upper, Codes lower) {
  for (int i = 0; i < 4 * W; i++) lower.v[i] = (uint8_t)((upper.v[i] & 240) | lower.v[i] >> 4);
  return lower;
}
inline void put_codes(uint8_t* p, Codes c) {
  memcpy(p, c.v, sizeof c.v);
}

#if defined(_MSC_VER)
inline void hide(Codes&) {}
#else
inline void hide(Codes& c) {
  __asm__ volatile("" : "+m"(c));
}  // hides the value of c from the compiler
#endif
inline void fetch(const uint8_t*) {}  // prefetches a cache line
inline void fetch_to_write(float*) {}

// Activations, 4 inputs per 32-bit lane. add<L> multiplies with lane L.
struct Quads {
  const int8_t* p;
};
inline Quads ld_quads(const int8_t* p) {
  return {p};
}

template <bool WIDE>
struct Acc {
  static constexpr int ROOM = 1 << 20;  // number of `add` calls before a `flush` is needed
  I s;  // set by `clear`, not here: an array's constructor is a loop, and keeps the sums out of registers
  void clear() { s = {}; }
  template <int L>
  void add(Codes w, Quads x) {
    for (int r = 0; r < W; r++)
      for (int j = 0; j < 4; j++) s.v[r] += w.v[4 * r + j] * x.p[4 * L + j];
  }
  void flush() {}
  I sum() const { return s; }
};
constexpr float WIDE_OFFSET = 0;  // the offset that wide_low and wide_high subtract from each code
constexpr int CHAINS = 1;         // accumulators that hide the latency of one row's dot product
constexpr int PANEL = 4;          // rows of activations per step of the many-row kernel
constexpr int FLOAT_ROWS = 4;     // the same for float weights, few rows
constexpr int FLOAT_PANEL = 4;    // the same for float weights, many rows

}  // namespace
