#define ISA neon_kernels
#define NAME "neon"
#include "simd_neon.h"
// after the vector primitives
#include "isa_unit.h"
