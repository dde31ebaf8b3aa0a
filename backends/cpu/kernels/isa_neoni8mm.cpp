#define ISA neoni8mm_kernels
#define NAME "neoni8mm"
#include "simd_neon.h"
// after the vector primitives
#include "isa_unit.h"
