// Helpers built from the primitives of simd_*.h: tails, exp, activations, and loops unrolled at compile time.
#pragma once
#include "op.h"

// Lambdas of unrolled loops must be inlined before gcc decides which arrays are kept in registers.
#if defined(__GNUC__)
#define ALWAYS __attribute__((always_inline))
#else
#define ALWAYS
#endif

namespace {

constexpr int V = 16 / W;  // vectors per line of 16 rows

template <int N>
struct Int {
  static constexpr int value = N;
};
// fn(Int<0>), fn(Int<1>), ... fn(Int<N - 1>)
template <int N, class Fn>
ALWAYS inline void repeat(Fn&& fn) {
  if constexpr (N > 0) {
    repeat<N - 1>(fn);
    fn(Int<N - 1>{});
  }
}

// step(0), ... step(n - 1), n > 0, and flush() after every ROOM of them and at the end. Sums that need no flush get a
// single loop that runs at least once. Otherwise gcc keeps two copies of each, which need more registers than there
// are.
template <int ROOM, class Step, class Flush>
ALWAYS inline void in_runs(int n, Step step, Flush flush) {
  if constexpr (ROOM >= 1 << 16) {
    int i = 0;
    do step(i);
    while (++i < n);
  } else {
    for (int i = 0; i < n;) {
      const int end = ROOM < n - i ? i + ROOM : n;
      for (; i < end; i++) step(i);
      flush();
    }
  }
}

inline int min(int a, int b) {
  return a < b ? a : b;
}
inline int max(int a, int b) {
  return a > b ? a : b;
}
inline int64_t up_to(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// The last n < W floats of a row.
inline F ld_part(const float* p, int n) {
  float a[W] = {};
  for (int i = 0; i < n; i++) a[i] = p[i];
  return ld(a);
}
inline void st_part(float* p, F x, int n) {
  float a[W];
  st(a, x);
  for (int i = 0; i < n; i++) p[i] = a[i];
}

// y[i] = fn(a[i]) for a row of n.
template <class Fn>
inline void map(int n, const float* a, float* y, Fn fn) {
  int i = 0;
  for (; i + W <= n; i += W) st(y + i, fn(ld(a + i)));
  if (i < n) st_part(y + i, fn(ld_part(a + i, n - i)), n - i);
}
// y[i] = fn(a[i], b[i]) for a row of n.
template <class Fn>
inline void map(int n, const float* a, const float* b, float* y, Fn fn) {
  int i = 0;
  for (; i + W <= n; i += W) st(y + i, fn(ld(a + i), ld(b + i)));
  if (i < n) st_part(y + i, fn(ld_part(a + i, n - i), ld_part(b + i, n - i)), n - i);
}

// e^x within 2 units in the last place. x is clamped at -87, where e^x is 1e-38, negligible compared with 1. x = n ln 2
// + r, |r| <= ln 2 / 2; ln 2 has two parts so that n * (first part) is exact. The Taylor polynomial of degree 7 leaves
// r^8 / 8! = 5e-9.
inline F exponential(F x) {
  x = min(max(x, set1(-87.3f)), set1(88.3f));
  const F n = nearest(mul(x, set1(1.44269504f)));
  F r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  F p = set1(1.f / 5040);
  p = fma(p, r, set1(1.f / 720));
  p = fma(p, r, set1(1.f / 120));
  p = fma(p, r, set1(1.f / 24));
  p = fma(p, r, set1(1.f / 6));
  p = fma(p, r, set1(.5f));
  p = fma(p, r, set1(1.f));
  p = fma(p, r, set1(1.f));
  return mul(p, power_of_two(n));
}

inline F sigmoid(F x) {
  return div(set1(1), add(set1(1), exponential(sub(set1(0), x))));
}
inline F hyperbolic_tangent(F x) {
  return sub(mul(set1(2), sigmoid(add(x, x))), set1(1));
}

// erf within 1.5e-7 (Abramowitz and Stegun 7.1.26).
inline F error_function(F x) {
  const F a = magnitude(x), t = div(set1(1), fma(a, set1(.3275911f), set1(1)));
  F p = fma(t, set1(1.061405429f), set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-.284496736f));
  p = fma(p, t, set1(.254829592f));
  const F e = sub(set1(1), mul(mul(p, t), exponential(sub(set1(0), mul(a, a)))));
  return mul(e, div(x, max(a, set1(1e-30f))));  // with the sign of x
}

inline F act(F x, int kind) {
  switch (kind) {
    case SILU: return mul(x, sigmoid(x));
    case GELU: return mul(mul(set1(.5f), x), add(set1(1), error_function(mul(x, set1(.70710678f)))));
    case GELU_TANH: {  // 0.5 x (1 + tanh u) = x sigmoid(2 u)
      const F u = mul(x, fma(mul(x, x), set1(2 * .7978845608f * .044715f), set1(2 * .7978845608f)));
      return mul(x, sigmoid(u));
    }
    case RELU: return max(x, set1(0));
    case RELU2: {
      const F r = max(x, set1(0));
      return mul(r, r);
    }
    default: return x;
  }
}

inline F softcap(F x, float cap) {
  return mul(set1(cap), hyperbolic_tangent(mul(x, set1(1 / cap))));
}

}  // namespace
