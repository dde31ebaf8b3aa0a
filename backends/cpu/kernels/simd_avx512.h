// AVX-512 F, BW, VL, DQ, VNNI. Primitives: see simd_scalar.h.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

constexpr int W = 16;
using F = __m512;
using I = __m512i;

inline F set1(float x) {
  return _mm512_set1_ps(x);
}
inline F ld(const float* p) {
  return _mm512_loadu_ps(p);
}
inline F ldh(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
// 16-bit numbers of two parts: an fp16 whose lowest four bits are zero, and an integer in their place.
inline void ldz(const uint16_t* p, F& half, F& whole) {
  const __m256i u = _mm256_loadu_si256((const __m256i*)p), low = _mm256_set1_epi16(15);
  half = _mm512_cvtph_ps(_mm256_andnot_si256(low, u));
  whole = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_and_si256(low, u)));
}
inline F ldb(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline F ldc(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline void st(float* p, F x) {
  _mm512_storeu_ps(p, x);
}
inline void sth(uint16_t* p, F x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, 0));
}
inline void st8(int8_t* p, F x) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
inline F add(F a, F b) {
  return _mm512_add_ps(a, b);
}
inline F sub(F a, F b) {
  return _mm512_sub_ps(a, b);
}
inline F mul(F a, F b) {
  return _mm512_mul_ps(a, b);
}
inline F div(F a, F b) {
  return _mm512_div_ps(a, b);
}
inline F fma(F a, F b, F c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline F max(F a, F b) {
  return _mm512_max_ps(a, b);
}
inline F min(F a, F b) {
  return _mm512_min_ps(a, b);
}
inline F magnitude(F a) {
  return _mm512_abs_ps(a);
}
inline F nearest(F a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F power_of_two(F n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
inline float sum_of(F a) {
  return _mm512_reduce_add_ps(a);
}
inline float max_of(F a) {
  return _mm512_reduce_max_ps(a);
}
inline F to_float(I a) {
  return _mm512_cvtepi32_ps(a);
}
inline F field(const uint8_t* p, int shift, uint32_t mask) {
  const I u = _mm512_srl_epi32(_mm512_loadu_si512(p), _mm_cvtsi32_si128(shift));
  return to_float(_mm512_and_si512(u, _mm512_set1_epi32((int)mask)));
}

using Codes = __m512i;
inline Codes codes(const uint8_t* p) {
  return _mm512_loadu_si512(p);
}
inline Codes low(Codes c) {
  return _mm512_and_si512(c, _mm512_set1_epi8(15));
}
inline Codes high(Codes c) {
  return _mm512_and_si512(_mm512_srli_epi16(c, 4), _mm512_set1_epi8(15));
}
inline Codes wide_low(Codes upper, Codes lower) {  // where the mask has ones, the second, else the first
  return _mm512_ternarylogic_epi32(_mm512_slli_epi16(upper, 4), lower, _mm512_set1_epi8(15), 0xd8);
}
inline Codes wide_high(Codes upper, Codes lower) {
  return _mm512_ternarylogic_epi32(upper, _mm512_srli_epi16(lower, 4), _mm512_set1_epi8(15), 0xd8);
}
inline void put_codes(uint8_t* p, Codes c) {
  _mm512_storeu_si512(p, c);
}

#if defined(_MSC_VER)
inline void hide(Codes&) {}
#else
inline void hide(Codes& c) {
  __asm__ volatile("" : "+v"(c));
}  // hides the value of c from the compiler
#endif
// Inlined by force: gcc treats a function that only prefetches as one without effect and drops its calls.
[[gnu::always_inline]] inline void fetch(const uint8_t* p) {
  _mm_prefetch((const char*)p, _MM_HINT_T0);
}
// Also takes the line from other cores, so that a store need not request it again. With two threads whose cores share
// no cache an up product is 9 % faster.
[[gnu::always_inline]] inline void fetch_to_write(float* p) {
#if defined(_MSC_VER)
  _m_prefetchw(p);
#else
  __asm__ volatile("prefetchw %0" : : "m"(*p));
#endif
}

struct Quads {
  const int8_t* p;
};
inline Quads ld_quads(const int8_t* p) {
  return {p};
}

// gcc keeps a sum in one register only if its type is the one that the instruction is defined on. __m512i counts as
// eight 64-bit numbers, and every step would copy it.
#if defined(__GNUC__)
typedef int32_t Sum __attribute__((vector_size(64)));
#else
using Sum = __m512i;
#endif

template <bool WIDE>
struct Acc {
  static constexpr int ROOM = 1 << 20;
  Sum s;
  void clear() { s = (Sum)_mm512_setzero_si512(); }
  template <int L>
  void add(Codes w, Quads x) {
    int32_t four;
    memcpy(&four, x.p + 4 * L, 4);
    s = (Sum)_mm512_dpbusd_epi32((I)s, w, _mm512_set1_epi32(four));
  }
  void flush() {}
  I sum() const { return (I)s; }
};
constexpr float WIDE_OFFSET = 0;
constexpr int CHAINS = 4, PANEL = 12, FLOAT_ROWS = 8, FLOAT_PANEL = 12;

}  // namespace
