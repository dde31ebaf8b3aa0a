#define ISA avxvnni_kernels
#define NAME "avxvnni"
#include "simd_avx2.h"
// after the vector primitives
#include "isa_unit.h"
