#define ISA neondot_kernels
#define NAME "neondot"
#include "simd_neon.h"
// after the vector primitives
#include "isa_unit.h"
