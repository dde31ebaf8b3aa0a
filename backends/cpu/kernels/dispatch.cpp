// Detects once which of the compiled instruction sets this processor supports.
#include <stdint.h>

#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif

static void cpuid(unsigned leaf, unsigned sub, unsigned r[4]) {
#if defined(_MSC_VER)
  __cpuidex((int*)r, (int)leaf, (int)sub);
#else
  __cpuid_count(leaf, sub, r[0], r[1], r[2], r[3]);
#endif
}

// The register sets that the operating system saves: bit 1 SSE, 2 AVX, 5..7 AVX-512.
static uint64_t saved_state() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
#endif
}

static int probe(const Kernels** found) {
  unsigned zero[4], one[4], seven[4] = {}, more[4] = {};
  cpuid(0, 0, zero);
  cpuid(1, 0, one);
  if (zero[0] >= 7) cpuid(7, 0, seven);
  if (zero[0] >= 7 && seven[0] >= 1) cpuid(7, 1, more);
  const auto bit = [](unsigned word, int i) { return (word >> i & 1) != 0; };
  const uint64_t saved = bit(one[2], 27) ? saved_state() : 0;
  const bool avx2 = (saved & 6) == 6 && bit(seven[1], 5) && bit(one[2], 12) && bit(one[2], 29);  // fma, f16c
  const bool avx512 = (saved & 0xe6) == 0xe6 && bit(seven[1], 16) && bit(seven[1], 17) && bit(seven[1], 30) &&
                      bit(seven[1], 31) && bit(seven[2], 11);  // f, dq, bw, vl, vnni
  int n = 0;
  if (avx2 && avx512) found[n++] = &avx512vnni_kernels;
  if (avx2 && bit(more[0], 4)) found[n++] = &avxvnni_kernels;
  if (avx2) found[n++] = &avx2_kernels;
  return n;
}

#elif defined(__aarch64__) || defined(_M_ARM64)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#if defined(__APPLE__)
static bool has(const char* feature) {
  int yes = 0;
  size_t size = sizeof yes;
  return !sysctlbyname(feature, &yes, &size, nullptr, 0) && yes;
}
#endif

// /proc/cpuinfo is not used: under user-mode emulation it shows the host's.
static bool has_dotprod() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
  return has("hw.optional.arm.FEAT_DotProd");
#else
  return false;
#endif
}

#if !defined(_MSC_VER)
static bool has_i8mm() {
#if defined(__linux__)
  return getauxval(AT_HWCAP2) >> 13 & 1;  // HWCAP2_I8MM
#elif defined(__APPLE__)
  return has("hw.optional.arm.FEAT_I8MM");
#else
  return false;
#endif
}
#endif

static int probe(const Kernels** found) {
  int n = 0;
#if !defined(_MSC_VER)
  if (has_dotprod() && has_i8mm()) found[n++] = &neoni8mm_kernels;
#endif
  if (has_dotprod()) found[n++] = &neondot_kernels;
  found[n++] = &neon_kernels;
  return n;
}
#else
static int probe(const Kernels**) {
  return 0;
}
#endif

const Kernels* kernels_at(int i) {
  struct Found {
    const Kernels* list[8];
    int n;
    Found() : list(), n(probe(list)) { list[n++] = &scalar_kernels; }
  };
  static const Found found;
  return i < found.n ? found.list[i] : nullptr;
}
