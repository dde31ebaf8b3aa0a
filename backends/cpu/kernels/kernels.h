// The kernels of each instruction set, and the selection of those that this processor supports.
#pragma once
#include "op.h"
#include "pool.h"

struct Kernels {
  const char* name;
  WalkFn walk;
  void (*need)(const Op* op, size_t* scratch, size_t* shared);  // bytes; does not write values that it does not need
};

extern const Kernels scalar_kernels, neon_kernels, neondot_kernels, neoni8mm_kernels, avx2_kernels, avxvnni_kernels,
    avx512vnni_kernels;

// The i-th instruction set of this processor, best first, or null.
const Kernels* kernels_at(int i);

void pack_op(const PackOp& op, const Worker& me);
