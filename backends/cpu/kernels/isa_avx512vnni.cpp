#define ISA avx512vnni_kernels
#define NAME "avx512vnni"
#include "simd_avx512.h"
// after the vector primitives
#include "isa_unit.h"
