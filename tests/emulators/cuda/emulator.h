// CUDA for one CPU thread: the built-ins and prelude.cuh's instructions, on top of fibers.h.
//
// Every thread of a block is a fiber. A shuffle, an mma and a barrier are meetings, so a warp operation in divergent
// flow and a barrier that not all threads reach are errors with a line. Asynchronous copies are delayed until the wait,
// so a missing wait reads NaN. Shared memory starts as NaN in every block.
#pragma once
#include <setjmp.h>
#include <signal.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "fibers.h"

#define EMULATED
#define DEVICE inline
#define KERNEL(threads, blocks) static void
#define INFINITE __builtin_inff()
#define __shared__ static __attribute__((section("emushared")))
#define __restrict__
#define threadIdx (shim::C.current->in_group)
#define blockIdx (shim::C.group)
#define gridDim (shim::C.groups)
#define blockDim (shim::C.group_size)
#define __syncthreads() shim::wait(shim::AT_BARRIER, __LINE__)
#define __threadfence()

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) {
  return {x, y};
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
using std::max;
using std::min;

template <class T, class S>
inline T recast(S s) {
  static_assert(sizeof(T) == sizeof(S));
  T t;
  memcpy(&t, &s, sizeof t);
  return t;
}
inline uint32_t __float_as_uint(float f) {
  return recast<uint32_t>(f);
}
inline float __uint_as_float(uint32_t u) {
  return recast<float>(u);
}
inline float rsqrtf(float x) {
  return 1.f / std::sqrt(x);
}
inline float from_half(uint16_t h) {
  return float(recast<_Float16>(h));
}
inline uint16_t to_half(float f) {
  return recast<uint16_t>(_Float16(f));
}
inline uint32_t each2(uint32_t a, uint32_t b, uint32_t c, double (*f)(double, double, double)) {
  auto one = [&](int s) {
    auto h = [&](uint32_t v) { return double(from_half(uint16_t(v >> s))); };
    return uint32_t(recast<uint16_t>(_Float16(f(h(a), h(b), h(c))))) << s;
  };
  return one(0) | one(16);
}
inline uint32_t sub2(uint32_t a, uint32_t b) {
  return each2(a, b, 0, [](double x, double y, double) { return x - y; });
}
inline uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {  // exact in double, rounded once to half
  return each2(a, b, c, [](double x, double y, double z) { return x * y + z; });
}
inline uint32_t bytes(uint32_t a, uint32_t b, uint32_t s) {
  uint64_t both = uint64_t(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) r |= uint32_t(both >> (8 * (s >> (4 * i) & 7)) & 255) << (8 * i);
  return r;
}

template <class T>
inline T shuffle_xor(T v, unsigned mask, int line = __builtin_LINE()) {
  shim::Group group = shim::meet(v, line);
  unsigned from = shim::C.current->lane ^ mask;
  return group.live(from) ? group.get<T>(from) : T(NAN);  // undefined on a GPU
}
#define SHUFFLE_XOR(v, mask) shuffle_xor(v, mask)

// Adds eight products and the sum so far exactly, then truncates to float. Every tensor core keeps at least as much.
inline float truncated(double v) {
  float f = float(v);
  return std::fabs(double(f)) > std::fabs(v) ? std::nextafterf(f, 0.f) : f;
}
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line = __builtin_LINE()) {
  struct Operands {
    float a[4][2], b[2][2];
  };
  Operands mine;
  for (int e = 0; e < 2; e++) {
    for (int i = 0; i < 4; i++) mine.a[i][e] = from_half(uint16_t(a[i] >> (16 * e)));
    mine.b[0][e] = from_half(uint16_t(b0 >> (16 * e)));
    mine.b[1][e] = from_half(uint16_t(b1 >> (16 * e)));
  }
  shim::Group group = shim::meet(mine, line);
  const unsigned lane = shim::C.current->lane, g = lane / 4, t = lane % 4;
  if (group.mask != 0xffffffffu) {
    for (float& v : c) v = NAN;  // a lane is missing: undefined on a GPU
    return;
  }
  for (unsigned p = 0; p < 2; p++) {
    double sum[4] = {c[0], c[1], c[2], c[3]};
    for (unsigned s = 0; s < 4; s++) {
      const Operands &row = group.at<Operands>(4 * g + s), &first = group.at<Operands>(8 * t + s),
                     &second = group.at<Operands>(8 * t + 4 + s);
      for (unsigned i = 0; i < 4; i++) {
        const float *x = row.a[2 * p + i / 2], *y = i % 2 ? second.b[p] : first.b[p];
        sum[i] += double(x[0]) * y[0] + double(x[1]) * y[1];
      }
    }
    for (unsigned i = 0; i < 4; i++) c[i] = truncated(sum[i]);
  }
}

inline uint4 load_stream(const uint4* p) {
  if (uintptr_t(p) % 16) abort();
  return *p;
}

// cp.async: the copies that a thread has started, in groups. They complete when waited for.
struct Copy {
  void* to;
  uint4 value;
};
struct Copies {
  std::vector<std::vector<Copy>> groups{1};
};
inline std::vector<Copies>& copies() {
  static std::vector<Copies> all(1024);
  return all;
}
inline void copy_async(void* shared, const void* global, bool full) {
  if (uintptr_t(shared) % 16 || (full && uintptr_t(global) % 16)) abort();
  uint4 v = full ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
  copies()[shim::C.current->index].groups.back().push_back({shared, v});
}
inline void copy_commit() {
  copies()[shim::C.current->index].groups.emplace_back();
}
template <int PENDING>
inline void copy_wait() {
  auto& groups = copies()[shim::C.current->index].groups;
  while (groups.size() > PENDING + 1) {
    for (Copy& c : groups.front()) memcpy(c.to, &c.value, 16);
    groups.erase(groups.begin());
  }
}

template <class T>
inline T atomicAdd(T* p, T v) {
  T old = *p;
  *p += v;
  return old;
}
template <class T>
inline T atomicMax(T* p, T v) {
  T old = *p;
  *p = std::max(*p, v);
  return old;
}
template <class T>
inline T __ldcg(const T* p) {
  return *p;
}

// ---- running one kernel: emulate.py appends `body`, which takes its parameters like cuLaunchKernel ------

__attribute__((section("emushared"), used)) static uint32_t some_shared = 0;  // the section is never empty
extern uint32_t __start_emushared[], __stop_emushared[];

inline void poison() {
  memset(__start_emushared, 0xff, size_t(__stop_emushared - __start_emushared) * 4);
  for (Copies& c : copies()) c.groups.assign(1, {});
}

inline sigjmp_buf outside;
inline void on_fault(int, siginfo_t* info, void*) {
  siglongjmp(outside, 1);
}

inline int emulate(void (*body)(void**), void** parameters, const unsigned* blocks, const unsigned* threads, int order,
                   char* error) {
  struct sigaction fault = {}, segv, bus;
  fault.sa_sigaction = on_fault;
  fault.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &fault, &segv);
  sigaction(SIGBUS, &fault, &bus);
  unsigned grid[3];
  for (int i = 0; i < 3; i++) grid[i] = blocks[i] * threads[i];
  shim::before_block = poison;
  int status = 1;
  if (sigsetjmp(outside, 1))
    snprintf(error, 256, "access outside a buffer in block (%u,%u,%u), thread %u", shim::C.group.x, shim::C.group.y,
             shim::C.group.z, shim::C.current->index);
  else
    status = shim::run(body, parameters, grid, threads, order, error);
  sigaction(SIGSEGV, &segv, nullptr);
  sigaction(SIGBUS, &bus, nullptr);
  return status;
}
