// For `clang++ -fsyntax-only`: Metal's names with real address spaces and clang's vector types (with swizzles). It has
// only declarations and cannot run. Vectors are clang's, not classes, because C++ cannot load a class object from an
// address space.
#pragma once
#include <stdint.h>

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long ulong;
typedef _Float16 half;
typedef half float16_t;
typedef _Float16 bfloat;  // any 16-bit float is sufficient for this check
typedef bfloat bfloat16_t;

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define MTL_TG_STATIC static __attribute__((address_space(3)))
#define thread
#define METAL_FUNC inline

#define VEC(T)                                        \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
// clang-format off
VEC(float) VEC(half) VEC(uint) VEC(int) VEC(ushort) VEC(short) VEC(uchar) VEC(char) VEC(ulong)
typedef uint packed_uint2 __attribute__((ext_vector_type(2), aligned(4)));
typedef uint packed_uint4 __attribute__((ext_vector_type(4), aligned(4)));
// clang-format on

#define MAKE(T)                                \
  T##2 make_##T##2(T, T);                      \
  T##3 make_##T##3(T, T, T);                   \
  T##4 make_##T##4(T, T, T, T);                \
  T##4 make_##T##4(T##2, T##2);                \
  template <class S>                           \
  T##4 make_##T##4(S s) {                      \
    if constexpr (__is_convertible_to(S, T))   \
      return (T##4)(T)s;                       \
    else                                       \
      return __builtin_convertvector(s, T##4); \
  }                                            \
  template <class S>                           \
  T##2 make_##T##2(S s) {                      \
    if constexpr (__is_convertible_to(S, T))   \
      return (T##2)(T)s;                       \
    else                                       \
      return __builtin_convertvector(s, T##2); \
  }
// clang-format off
MAKE(float) MAKE(half) MAKE(uint) MAKE(int) MAKE(ulong)
// clang-format on

// A function-like macro is not expanded if no "(" follows, so only constructor calls are rewritten.
#define float2(...) make_float2(__VA_ARGS__)
#define float3(...) make_float3(__VA_ARGS__)
#define float4(...) make_float4(__VA_ARGS__)
#define half2(...) make_half2(__VA_ARGS__)
#define half4(...) make_half4(__VA_ARGS__)
#define uint2(...) make_uint2(__VA_ARGS__)
#define uint4(...) make_uint4(__VA_ARGS__)
#define ulong2(...) make_ulong2(__VA_ARGS__)

    namespace metal {
  enum class mem_flags { mem_none, mem_device, mem_threadgroup };
  void threadgroup_barrier(mem_flags);
  void simdgroup_barrier(mem_flags);
  template <class T>
  T simd_sum(T);
  template <class T>
  T simd_max(T);
  template <class T>
  T simd_min(T);
  template <class T>
  T simd_shuffle(T, ushort);
  template <class T>
  T simd_shuffle_down(T, ushort);
  template <class T>
  T simd_shuffle_up(T, ushort);
  template <class T>
  T simd_shuffle_xor(T, ushort);
  template <class T>
  T simd_broadcast(T, ushort);
  template <class D, class S>
  D as_type(S);
  template <class T>
  T fma(T, T, T);
  template <class T>
  T select(T, T, bool);
  float dot(float4, float4);
  half dot(half4, half4);
  float exp(float);
  template <class T>
  T min(T, T);
  template <class T>
  T max(T, T);
  namespace precise {
  float tanh(float);
  }
  float rsqrt(float);
  float sqrt(float);
  float abs(float);

  template <class T, int R, int C>
  struct simdgroup_matrix {};
  typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
  typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
  template <class T, int R, int C>
  simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T);
  template <class T>
  void simdgroup_load(simdgroup_matrix<T, 8, 8>&, const device T*, ulong = 8, ulong2 = 0, bool = false);
  template <class T>
  void simdgroup_load(simdgroup_matrix<T, 8, 8>&, const threadgroup T*, ulong = 8, ulong2 = 0, bool = false);
  template <class T>
  void simdgroup_store(simdgroup_matrix<T, 8, 8>, device T*, ulong = 8, ulong2 = 0, bool = false);
  template <class D, class A, class B, class C>
  void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>, simdgroup_matrix<B, 8, 8>,
                                     simdgroup_matrix<C, 8, 8>);
}  // namespace metal
using namespace metal;
