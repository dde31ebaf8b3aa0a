// What each instruction set's file offers, and which of them this processor runs.
#pragma once
#include "op.h"
#include "pool.h"

struct Kernels {
  const char* name;
  WalkFn walk;
  void (*need)(const Op* op, size_t* scratch, size_t* shared);  // bytes; leaves what it does not need
};

extern const Kernels scalar_kernels, neon_kernels, neondot_kernels, neoni8mm_kernels, avx2_kernels, avxvnni_kernels,
    avx512vnni_kernels;

// The i-th instruction set that runs here, the best first, or null.
const Kernels* kernels_at(int i);

void pack_op(const PackOp& op, const Worker& me);
