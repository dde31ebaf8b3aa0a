#define ISA avx2_kernels
#define NAME "avx2"
#include "simd_avx2.h"
// after the vector primitives
#include "isa_unit.h"
