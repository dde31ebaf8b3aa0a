// The few instructions the kernels need beyond CUDA's built-ins, so that no header of a toolkit is needed:
// NVRTC compiles this text with a kernel's appended. tests/emulators/cuda/emulator.h gives the same names on a CPU.
// A half is the 16 bits of it (u16), two halves are a u32 with the first in the low bits.
#pragma once
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef signed char i8;

#ifndef EMULATED
#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define INFINITE __int_as_float(0x7f800000)

DEVICE float from_half(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
DEVICE u16 to_half(float f) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
// a - b and a * b + c of two halves at once, rounded to half
DEVICE u32 sub2(u32 a, u32 b) {
  u32 r;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
DEVICE u32 fma2(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
// Bytes of a (0..3) and b (4..7) selected by the four nibbles of s.
DEVICE u32 bytes(u32 a, u32 b, u32 s) {
  return __byte_perm(a, b, s);
}

// c (16 x 8) += a (16 x 16) b (16 x 8), one warp. With g = lane / 4, t = lane % 4: a[0..3] are the pairs at (row g, k
// 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); b0, b1 those at k 2t, 2t + 8 of column g; c[0..3] are (row g, columns
// 2t, 2t + 1), (row g + 8, the same).
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else  // Turing has an instruction of half the depth
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// 16 bytes that are read once; they need not stay in the L1 cache.
DEVICE uint4 load_stream(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
// Copies 16 bytes from global to shared memory in the background; `full` false fills with zeros. Turing waits for them.
DEVICE void copy_async(void* shared, const void* global, bool full) {
#if __CUDA_ARCH__ >= 800
  u32 to = static_cast<u32>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(full ? 16 : 0));
#else
  *static_cast<uint4*>(shared) = full ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}
DEVICE void copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;");
#endif
}
template <int PENDING>
DEVICE void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING));
#endif
}
#define SHUFFLE_XOR(v, mask) __shfl_xor_sync(0xffffffffu, v, mask)
#endif

DEVICE u32 pair(float low, float high) {
  return u32(to_half(low)) | u32(to_half(high)) << 16;
}
DEVICE float low(u32 h) {
  return from_half(u16(h));
}
DEVICE float high(u32 h) {
  return from_half(u16(h >> 16));
}

DEVICE float activation(float x, int kind) {
  switch (kind) {
    case 0: return x / (1.f + expf(-x));
    case 1: return 0.5f * x * (1.f + erff(x * 0.70710678f));
    case 2: return 0.5f * x * (1.f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case 3: return fmaxf(x, 0.f);
    default: return fmaxf(x, 0.f) * fmaxf(x, 0.f);
  }
}
