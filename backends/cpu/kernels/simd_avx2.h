// AVX2 + FMA + F16C, and AVX-VNNI if the compiler's flags enable it. Primitives: see simd_scalar.h.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

constexpr int W = 8;
using F = __m256;
using I = __m256i;

inline F set1(float x) {
  return _mm256_set1_ps(x);
}
inline F ld(const float* p) {
  return _mm256_loadu_ps(p);
}
inline F ldh(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
inline void ldz(const uint16_t* p, F& half, F& whole) {
  const __m128i u = _mm_loadu_si128((const __m128i*)p), low = _mm_set1_epi16(15);
  half = _mm256_cvtph_ps(_mm_andnot_si128(low, u));
  whole = _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_and_si128(low, u)));
}
inline F ldb(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline F ldc(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline void st(float* p, F x) {
  _mm256_storeu_ps(p, x);
}
inline void sth(uint16_t* p, F x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, 0));
}
inline void st8(int8_t* p, F x) {
  const I i = _mm256_cvtps_epi32(x);
  const __m128i s = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(s, s));
}
inline F add(F a, F b) {
  return _mm256_add_ps(a, b);
}
inline F sub(F a, F b) {
  return _mm256_sub_ps(a, b);
}
inline F mul(F a, F b) {
  return _mm256_mul_ps(a, b);
}
inline F div(F a, F b) {
  return _mm256_div_ps(a, b);
}
inline F fma(F a, F b, F c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline F max(F a, F b) {
  return _mm256_max_ps(a, b);
}
inline F min(F a, F b) {
  return _mm256_min_ps(a, b);
}
inline F magnitude(F a) {
  return _mm256_andnot_ps(set1(-0.f), a);
}
inline F nearest(F a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F power_of_two(F n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline float sum_of(F a) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
}
inline float max_of(F a) {
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_shuffle_ps(h, h, 1)));
}
inline F to_float(I a) {
  return _mm256_cvtepi32_ps(a);
}
inline F field(const uint8_t* p, int shift, uint32_t mask) {
  const I u = _mm256_srl_epi32(_mm256_loadu_si256((const I*)p), _mm_cvtsi32_si128(shift));
  return to_float(_mm256_and_si256(u, _mm256_set1_epi32((int)mask)));
}

using Codes = __m256i;
inline Codes codes(const uint8_t* p) {
  return _mm256_loadu_si256((const I*)p);
}
inline Codes low(Codes c) {
  return _mm256_and_si256(c, _mm256_set1_epi8(15));
}
inline Codes high(Codes c) {
  return _mm256_and_si256(_mm256_srli_epi16(c, 4), _mm256_set1_epi8(15));
}
inline Codes wide_low(Codes upper, Codes lower) {
  return _mm256_or_si256(_mm256_slli_epi16(low(upper), 4), low(lower));
}
inline Codes wide_high(Codes upper, Codes lower) {
  return _mm256_or_si256(_mm256_andnot_si256(_mm256_set1_epi8(15), upper), high(lower));
}
inline void put_codes(uint8_t* p, Codes c) {
  _mm256_storeu_si256((I*)p, c);
}

#if defined(_MSC_VER)
inline void hide(Codes&) {}
#else
inline void hide(Codes& c) {
  __asm__ volatile("" : "+x"(c));
}  // hides the value of c from the compiler
#endif
// Inlined by force: gcc treats a function that only prefetches as one without effect and drops its calls.
[[gnu::always_inline]] inline void fetch(const uint8_t* p) {
  _mm_prefetch((const char*)p, _MM_HINT_T0);
}
// Not prefetchw, as in simd_avx512.h: a Haswell does not have it.
[[gnu::always_inline]] inline void fetch_to_write(float* p) {
  fetch((const uint8_t*)p);
}

struct Quads {
  const int8_t* p;
};
inline Quads ld_quads(const int8_t* p) {
  return {p};
}
template <int L>
inline I quad(Quads x) {
  int32_t four;
  memcpy(&four, x.p + 4 * L, 4);
  return _mm256_set1_epi32(four);
}

// gcc keeps a sum in one register only if its type is the one that the instruction is defined on. __m256i counts as
// four 64-bit numbers, and every step would copy it.
#if defined(__GNUC__)
typedef int32_t Sum __attribute__((vector_size(32)));
typedef int16_t Short __attribute__((vector_size(32)));
#else
using Sum = __m256i;
using Short = __m256i;
#endif

#if defined(__AVXVNNI__)
template <bool WIDE>
struct Acc {
  static constexpr int ROOM = 1 << 20;
  Sum s;
  void clear() { s = (Sum)_mm256_setzero_si256(); }
  template <int L>
  void add(Codes w, Quads x) {
    s = (Sum)_mm256_dpbusd_avx_epi32((I)s, w, quad<L>(x));
  }
  void flush() {}
  I sum() const { return (I)s; }
};
constexpr int CHAINS = 2, PANEL = 6;
#else
// Codes up to 15: a pair of products is at most 2 * 15 * 127 = 3810, and eight of those fit int16.
template <bool WIDE>
struct Acc {
  static constexpr int ROOM = 8;
  Sum s;
  Short t;
  void clear() { s = (Sum)_mm256_setzero_si256(), t = (Short)_mm256_setzero_si256(); }
  template <int L>
  void add(Codes w, Quads x) {
    t = (Short)_mm256_add_epi16((I)t, _mm256_maddubs_epi16(w, quad<L>(x)));
  }
  void flush() {
    s = (Sum)_mm256_add_epi32((I)s, _mm256_madd_epi16((I)t, _mm256_set1_epi16(1)));
    t = (Short)_mm256_setzero_si256();
  }
  I sum() const { return (I)s; }
};
// Codes up to 255 overflow maddubs' int16, so even and odd bytes are widened to int16 separately.
template <>
struct Acc<true> {
  static constexpr int ROOM = 1 << 20;
  Sum s;
  void clear() { s = (Sum)_mm256_setzero_si256(); }
  template <int L>
  void add(Codes w, Quads x) {
    const I q = quad<L>(x), even = _mm256_and_si256(w, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w, 8);
    s = (Sum)_mm256_add_epi32((I)s, _mm256_madd_epi16(even, _mm256_srai_epi16(_mm256_slli_epi16(q, 8), 8)));
    s = (Sum)_mm256_add_epi32((I)s, _mm256_madd_epi16(odd, _mm256_srai_epi16(q, 8)));
  }
  void flush() {}
  I sum() const { return (I)s; }
};
constexpr int CHAINS = 1, PANEL = 4;
#endif
constexpr float WIDE_OFFSET = 0;
constexpr int FLOAT_ROWS = 4, FLOAT_PANEL = 6;

}  // namespace
