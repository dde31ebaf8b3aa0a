#define ISA scalar_kernels
#define NAME "scalar"
#include "simd_scalar.h"
// after the vector primitives
#include "isa_unit.h"
