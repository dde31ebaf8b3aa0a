#define ISA scalar_kernels
#define NAME "scalar"
#include "simd_scalar.h"
// after the words
#include "body.h"
