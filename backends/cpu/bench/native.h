// Random weights and hand-made ops for the programs in this folder. They use the same C interface as Python.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <memory>
#include <vector>

#include "../kernels/op.h"

struct Engine;
extern "C" {
const char* tc_isa(int i);
Engine* tc_new(const char* isa, int threads);
void tc_free(Engine* e);
int32_t tc_run(Engine* e, const Op* const* ops, int n);
int64_t tc_weight_bytes(const Weight* w);
}

struct Random {
  uint32_t state;
  uint32_t next() { return (state = state * 1664525u + 1013904223u) >> 8; }
  int below(int n) { return (int)(next() % (uint32_t)n); }
  float unit() { return (float)next() * (2.f / (1 << 24)) - 1; }  // -1..1
};

inline uint16_t half_of(float f) {  // of a positive normal number, truncated
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return (uint16_t)((bits - (112u << 23)) >> 13);
}

inline float float_of(uint16_t h) {
  const uint32_t bits = (uint32_t)(h & 0x8000) << 16 | (((uint32_t)(h & 0x7fff) << 13) + (112u << 23));
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// Memory in huge pages where the system has them, like the backend's weights.
struct Area {
  uint8_t* data = nullptr;
  size_t size = 0;
  void take(size_t bytes) {
    size = (bytes + (2 << 20)) & ~(size_t)((2 << 20) - 1);
    data = (uint8_t*)aligned_alloc(2 << 20, size);
    if (!data) abort();
#if defined(__linux__)
    if (bytes >= (2 << 20)) madvise(data, size, MADV_HUGEPAGE);
#endif
  }
  ~Area() { free(data); }
};

// A weight with random codes and plausible scales, created directly in tiles: scale 1/128.., bias = -7.5 (or -127)
// scales, or -8, which int4 stores as a zero point.
struct RandomWeight {
  Weight w;
  Area room;

  RandomWeight(int kind, int n, int k, int group, bool bias, Random& random, int32_t ends = HALVES)
      : w{kind, n, k, group, ends, bias, nullptr} {
    const size_t size = (size_t)tc_weight_bytes(&w);
    room.take(size);
    uint8_t* p = room.data;
    for (size_t i = 0; i + 4 <= size; i += 4) {
      const uint32_t x = random.next() ^ random.next() << 12;
      memcpy(p + i, &x, 4);
    }
    w.data = p;
    for (int t = 0; t < tiles_of(w); t++) number_tile(p + tile_bytes(w) * (size_t)t, random);
    float* b = (float*)bias_of(w);
    for (int i = 0; b && i < tiles_of(w) * 16; i++) b[i] = random.unit();
  }

 private:
  void number_tile(uint8_t* p, Random& random) {
    if (w.kind > INT8) {
      const float size = 0.1f;
      for (int64_t i = 0; i < (int64_t)w.k * 16; i++) {
        const float f = size * random.unit();
        uint32_t bits;
        memcpy(&bits, &f, 4);
        if (w.kind == F32) memcpy(p + 4 * i, &f, 4);
        if (w.kind == BF16) ((uint16_t*)p)[i] = (uint16_t)(bits >> 16);
        if (w.kind == F16) ((uint16_t*)p)[i] = (uint16_t)(half_of(0.01f + (f < 0 ? -f : f)) | (bits >> 16 & 0x8000));
      }
      return;
    }
    const size_t block = block_bytes(w), tail = (size_t)w.group * 8;
    for (int g = 0; g < w.k / w.group; g++)
      for (int r = 0; r < 16; r++) {
        uint16_t* ends = (uint16_t*)(p + block * (size_t)g + tail);
        ends[r] = half_of(0.01f + 0.005f * random.unit());
        if (w.ends == ZEROS) {
          ends[r] = (uint16_t)((ends[r] & 0xfff0) | random.below(16));
          continue;
        }
        ends[16 + r] = (uint16_t)(0x8000 | half_of(float_of(ends[r]) * (w.kind == INT4 ? 7.5f : 127.f)));
      }
  }
};

// w[n, k], by the definition in op.h.
inline double number(const Weight& w, int n, int k) {
  const uint8_t* tile = w.data + tile_bytes(w) * (size_t)(n / 16);
  const int r = n % 16;
  if (w.kind > INT8) {
    const size_t at = (size_t)k * 16 + (size_t)r;
    if (w.kind == F32) return ((const float*)tile)[at];
    const uint16_t h = ((const uint16_t*)tile)[at];
    if (w.kind == F16) return float_of(h);
    const uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
  const uint8_t* block = tile + block_bytes(w) * (size_t)(k / w.group);
  const uint16_t* ends = (const uint16_t*)(block + (size_t)w.group * 8);
  const int i = k % w.group, at = i / 8 * 64 + 4 * r + i % 4, shift = i & 4;
  int q = block[at] >> shift & 15;
  if (w.kind == INT8) q = q * 16 + (lower_of(w, n / 16)[(size_t)(k - i) * 8 + (size_t)at] >> shift & 15);
  if (w.ends == ZEROS) return (q - (ends[r] & 15)) * (double)float_of(ends[r] & 0xfff0);
  return q * (double)float_of(ends[r]) + float_of(ends[16 + r]);
}

inline void run_one(Engine* e, const void* op) {
  const Op* const list[1] = {(const Op*)op};
  if (tc_run(e, list, 1)) abort();
}
