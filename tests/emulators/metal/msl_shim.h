// The part of the Metal Shading Language that the project's kernels use, on top of fibers.h (shared with CUDA), where a
// "warp" is a SIMD-group and a "block" a threadgroup.
//
// Address spaces are dropped here (msl_check.h checks them). The compilers ignore [[attributes]], and emulator.py
// passes their values as arguments: attr_<name>().
#pragma once
#include <setjmp.h>
#include <signal.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../cuda/fibers.h"

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long ulong;
typedef _Float16 half;
typedef half float16_t;

struct bfloat {  // round to nearest even
  uint16_t b;
  bfloat() = default;
  bfloat(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    bool nan = (u & 0x7fffffff) > 0x7f800000;
    b = nan ? (u >> 16) | 64 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  }
  operator float() const {
    uint32_t u = uint32_t(b) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
  }
};
typedef bfloat bfloat16_t;

// ---- vectors: 3 is stored as 4, as in Metal; no swizzles ---------------------------------------

template <class T, int N>
struct alignas(sizeof(T) * (N == 3 ? 4 : N)) mslvec;
#define SHIM_VEC(N)                                                                                    \
  mslvec() = default;                                                                                  \
  template <class S, class = std::enable_if_t<std::is_convertible_v<S, T> && std::is_arithmetic_v<S>>> \
  mslvec(S s) {                                                                                        \
    for (int i = 0; i < N; i++) (*this)[i] = T(s);                                                     \
  }                                                                                                    \
  mslvec(half s) {                                                                                     \
    for (int i = 0; i < N; i++) (*this)[i] = T(s);                                                     \
  }                                                                                                    \
  template <class U>                                                                                   \
  explicit mslvec(const mslvec<U, N>& o) {                                                             \
    for (int i = 0; i < N; i++) (*this)[i] = T(o[i]);                                                  \
  }                                                                                                    \
  T& operator[](int i) {                                                                               \
    return (&x)[i];                                                                                    \
  }                                                                                                    \
  const T& operator[](int i) const {                                                                   \
    return (&x)[i];                                                                                    \
  }
template <class T>
struct alignas(sizeof(T) * 2) mslvec<T, 2> {
  T x, y;
  SHIM_VEC(2)
  mslvec(T a, T b) : x(a), y(b) {}
};
template <class T>
struct alignas(sizeof(T) * 4) mslvec<T, 3> {
  T x, y, z;
  SHIM_VEC(3)
  mslvec(T a, T b, T c) : x(a), y(b), z(c) {}
};
template <class T>
struct alignas(sizeof(T) * 4) mslvec<T, 4> {
  T x, y, z, w;
  SHIM_VEC(4)
  mslvec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
};
// A packed vector only needs its element's alignment. It converts to a vector and has no other operations.
template <class T, int N>
struct packed {
  T v[N];
  operator mslvec<T, N>() const {
    mslvec<T, N> r;
    for (int i = 0; i < N; i++) r[i] = v[i];
    return r;
  }
};
typedef packed<uint, 2> packed_uint2;
typedef packed<uint, 4> packed_uint4;
// clang-format off
#define SHIM_OP(op)                                                                             \
  template <class T, int N>                                                                     \
  inline mslvec<T, N> operator op(const mslvec<T, N>& a, const mslvec<T, N>& b) {               \
    mslvec<T, N> r;                                                                             \
    for (int i = 0; i < N; i++) r[i] = T(a[i] op b[i]);                                         \
    return r;                                                                                   \
  }                                                                                             \
  template <class T, int N>                                                                     \
  inline mslvec<T, N> operator op(const mslvec<T, N>& a, T b) { return a op mslvec<T, N>(b); }  \
  template <class T, int N>                                                                     \
  inline mslvec<T, N> operator op(T a, const mslvec<T, N>& b) { return mslvec<T, N>(a) op b; }  \
  template <class T, int N>                                                                     \
  inline mslvec<T, N>& operator op##=(mslvec<T, N>& a, const mslvec<T, N>& b) { return a = a op b; }
SHIM_OP(+)
SHIM_OP(-)
SHIM_OP(*)
SHIM_OP(/)
#define SHIM_VEC_NAMES(T) typedef mslvec<T, 2> T##2; typedef mslvec<T, 3> T##3; typedef mslvec<T, 4> T##4;
SHIM_VEC_NAMES(float) SHIM_VEC_NAMES(half) SHIM_VEC_NAMES(uint) SHIM_VEC_NAMES(int)
SHIM_VEC_NAMES(ushort) SHIM_VEC_NAMES(short) SHIM_VEC_NAMES(ulong) SHIM_VEC_NAMES(uchar) SHIM_VEC_NAMES(char)
    // clang-format on

    namespace metal {
  template <class T>
  using numeric_limits = std::numeric_limits<T>;
  template <class T, int N>
  using vec = mslvec<T, N>;

  template <class D, class S>
  inline D as_type(const S& s) {
    static_assert(sizeof(D) == sizeof(S));
    D d;
    memcpy(&d, &s, sizeof d);
    return d;
  }
  template <class T>
  inline T fma(T a, T b, T c) {
    return T(std::fma(float(a), float(b), float(c)));
  }
  inline float exp(float x) {
    return std::exp(x);
  }
  inline float rsqrt(float x) {
    return 1 / std::sqrt(x);
  }
  inline float sqrt(float x) {
    return std::sqrt(x);
  }
  inline float abs(float x) {
    return std::fabs(x);
  }
  namespace fast {
  inline float exp(float x) {
    return std::exp(x);
  }
  }  // namespace fast
  namespace precise {
  inline float tanh(float x) {
    return std::tanh(x);
  }
  }  // namespace precise
  template <class T>
  inline T min(T a, T b) {
    return b < a ? b : a;
  }
  template <class T>
  inline T max(T a, T b) {
    return a < b ? b : a;
  }
  template <class T>
  inline T select(T if_false, T if_true, bool c) {
    return c ? if_true : if_false;
  }
  template <class T, int N>
  inline T dot(const mslvec<T, N>& a, const mslvec<T, N>& b) {
    T r = 0;
    for (int i = 0; i < N; i++) r = T(r + a[i] * b[i]);
    return r;
  }

  // ---- barriers and SIMD-group operations: the source line identifies a meeting, so write one per line --

  enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
#define SHIM_LINE int line = __builtin_LINE()

  inline void threadgroup_barrier(mem_flags, SHIM_LINE) {
    shim::wait(shim::AT_BARRIER, line);
  }
  inline void simdgroup_barrier(mem_flags, SHIM_LINE) {
    shim::meet(0, line);
  }

  // The hardware's order of a float sum is not specified; this is the order of a xor butterfly.
  template <class T>
  inline T simd_sum(T v, SHIM_LINE) {
    auto g = shim::meet(v, line);
    T t[32];
    for (unsigned i = 0; i < 32; i++) t[i] = g.live(i) ? g.template get<T>(i) : T(0);
    for (int w = 16; w; w >>= 1)
      for (int i = 0; i < w; i++) t[i] = T(t[i] + t[i + w]);
    return t[0];
  }
  template <class T>
  inline T simd_max(T v, SHIM_LINE) {
    auto g = shim::meet(v, line);
    T r = v;
    for (unsigned i = 0; i < g.n; i++)
      if (g.live(i) && r < g.template get<T>(i)) r = g.template get<T>(i);
    return r;
  }
  template <class T>
  inline T simd_min(T v, SHIM_LINE) {
    auto g = shim::meet(v, line);
    T r = v;
    for (unsigned i = 0; i < g.n; i++)
      if (g.live(i) && g.template get<T>(i) < r) r = g.template get<T>(i);
    return r;
  }
  // Reading an absent lane is undefined in Metal; here it returns the caller's own value.
  template <class T>
  inline T read_lane(const shim::Group& g, unsigned i, T own) {
    return g.live(i) ? g.template get<T>(i) : own;
  }
  template <class T>
  inline T simd_shuffle(T v, ushort i, SHIM_LINE) {
    return read_lane(shim::meet(v, line), i, v);
  }
  template <class T>
  inline T simd_shuffle_xor(T v, ushort m, SHIM_LINE) {
    return read_lane(shim::meet(v, line), shim::C.current->lane ^ m, v);
  }
  template <class T>
  inline T simd_shuffle_down(T v, ushort d, SHIM_LINE) {
    return read_lane(shim::meet(v, line), shim::C.current->lane + d, v);
  }
  template <class T>
  inline T simd_shuffle_up(T v, ushort d, SHIM_LINE) {
    unsigned me = shim::C.current->lane;
    return read_lane(shim::meet(v, line), me >= d ? me - d : me, v);
  }
  template <class T>
  inline T simd_broadcast(T v, ushort i, SHIM_LINE) {
    return simd_shuffle(v, i, line);
  }
  template <class T>
  inline T simd_broadcast_first(T v, SHIM_LINE) {
    auto g = shim::meet(v, line);
    for (unsigned i = 0; i < g.n; i++)
      if (g.live(i)) return g.template get<T>(i);
    return v;
  }
  inline bool simd_any(bool v, SHIM_LINE) {
    auto g = shim::meet(v, line);
    for (unsigned i = 0; i < g.n; i++)
      if (g.live(i) && g.template get<bool>(i)) return true;
    return false;
  }

  // ---- 8x8 SIMD-group matrices: lane l holds row r, columns c and c+1 ------------------------------

  inline void matrix_place(unsigned l, int& r, int& c) {
    int q = l / 4;
    r = (q & 4) + (l / 2) % 4;
    c = (q & 2) * 2 + (l % 2) * 2;
  }
  template <class T>
  struct pair_of {
    T v[2];
    T& operator[](int i) { return v[i]; }
    const T& operator[](int i) const { return v[i]; }
  };
  template <class T, int R, int K>
  struct simdgroup_matrix {
    pair_of<T> e;
    simdgroup_matrix() = default;
    explicit simdgroup_matrix(T d) {
      int r, c;
      matrix_place(shim::C.current->lane, r, c);
      e[0] = r == c ? d : T(0);
      e[1] = r == c + 1 ? d : T(0);
    }
    pair_of<T>& thread_elements() { return e; }
    const pair_of<T>& thread_elements() const { return e; }
  };
  typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
  typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;

  template <class T, int R, int K>
  simdgroup_matrix<T, R, K> make_filled_simdgroup_matrix(T v) {
    simdgroup_matrix<T, R, K> m;
    m.e[0] = m.e[1] = v;
    return m;
  }
  template <class T, class P>
  void simdgroup_load(simdgroup_matrix<T, 8, 8> & m, const P* p, ulong ld = 8, ulong2 o = ulong2(0ul, 0ul),
                      bool transpose = false, SHIM_LINE) {
    shim::meet(0, line);
    int r, c;
    matrix_place(shim::C.current->lane, r, c);
    for (int k = 0; k < 2; k++) {
      ulong rr = r, cc = c + k;
      m.e[k] = T(transpose ? p[(o.x + cc) * ld + o.y + rr] : p[(o.y + rr) * ld + o.x + cc]);
    }
  }
  template <class T, class P>
  void simdgroup_store(const simdgroup_matrix<T, 8, 8>& m, P* p, ulong ld = 8, ulong2 o = ulong2(0ul, 0ul),
                       bool transpose = false, SHIM_LINE) {
    int r, c;
    matrix_place(shim::C.current->lane, r, c);
    for (int k = 0; k < 2; k++) {
      ulong rr = r, cc = c + k;
      p[transpose ? (o.x + cc) * ld + o.y + rr : (o.y + rr) * ld + o.x + cc] = P(m.e[k]);
    }
    shim::meet(0, line);
  }
  // d = a b + acc, products and sums in float
  template <class D, class A, class B, class T>
  void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8> & d, const simdgroup_matrix<A, 8, 8>& a,
                                     const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<T, 8, 8>& acc,
                                     SHIM_LINE) {
    struct Pair {
      A a[2];
      B b[2];
    } mine{{a.e[0], a.e[1]}, {b.e[0], b.e[1]}};
    auto g = shim::meet(mine, line);
    float MA[8][8], MB[8][8];
    int r, c;
    for (unsigned l = 0; l < 32; l++) {
      Pair p = g.template get<Pair>(l);
      matrix_place(l, r, c);
      for (int k = 0; k < 2; k++) MA[r][c + k] = float(p.a[k]), MB[r][c + k] = float(p.b[k]);
    }
    matrix_place(shim::C.current->lane, r, c);
    for (int k = 0; k < 2; k++) {
      float s = float(acc.e[k]);
      for (int i = 0; i < 8; i++) s += MA[r][i] * MB[i][c + k];
      d.e[k] = D(s);
    }
  }

}  // namespace metal

// ---- values of the [[attributes]] -----------------------------------------------------------------

inline uint3 attr3(shim::U3 u) {
  return uint3(u.x, u.y, u.z);
}
inline uint3 attr_thread_position_in_grid() {
  return attr3(shim::C.current->in_grid);
}
inline uint3 attr_thread_position_in_threadgroup() {
  return attr3(shim::C.current->in_group);
}
inline uint3 attr_threadgroup_position_in_grid() {
  return attr3(shim::C.group);
}
inline uint3 attr_threadgroups_per_grid() {
  return attr3(shim::C.groups);
}
inline uint3 attr_threads_per_grid() {
  return attr3(shim::C.grid);
}
inline uint3 attr_grid_size() {
  return attr3(shim::C.grid);
}
inline uint3 attr_threads_per_threadgroup() {
  return attr3(shim::C.group_size);
}
inline uint attr_thread_index_in_simdgroup() {
  return shim::C.current->lane;
}
inline uint attr_simdgroup_index_in_threadgroup() {
  return shim::C.current->warp;
}
inline uint attr_thread_index_in_threadgroup() {
  return shim::C.current->index;
}
inline uint attr_simdgroups_per_threadgroup() {
  return (shim::C.n + 31) / 32;
}
inline uint attr_threads_per_simdgroup() {
  return 32;
}
inline uint attr_thread_execution_width() {
  return 32;
}

using namespace metal;
#define device
#define constant
#define thread
#define METAL_FUNC inline
// emulator.py writes this before a threadgroup variable: one object, shared by all fibers
#define MTL_TG_STATIC static thread_local

// ---- running -------------------------------------------------------------------------------------

namespace shim {

inline sigjmp_buf outside;
inline void on_fault(int signal) {
  siglongjmp(outside, signal);
}

// Like run(), but reports an access to a guard page or a misaligned load (for which the compiler emits a trap), with
// the thread that made it.
inline int emulate(void (*body)(void**), void** buffers, const unsigned* grid, const unsigned* threads, int order,
                   char* error) {
  const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  struct sigaction fault = {}, before[4];
  fault.sa_handler = on_fault;
  fault.sa_flags = SA_NODEFER;
  for (int i = 0; i < 4; i++) sigaction(signals[i], &fault, &before[i]);
  int status = 1;
  if (int signal = sigsetjmp(outside, 1))
    snprintf(error, 256, "%s in threadgroup (%u,%u,%u), thread %u",
             signal == SIGSEGV || signal == SIGBUS ? "access outside a buffer" : "misaligned access", C.group.x,
             C.group.y, C.group.z, C.current->index);
  else
    status = run(body, buffers, grid, threads, order, error);
  for (int i = 0; i < 4; i++) sigaction(signals[i], &before[i], nullptr);
  return status;
}

}  // namespace shim
