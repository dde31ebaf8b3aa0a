#define ISA neon_kernels
#define NAME "neon"
#include "simd_neon.h"
// after the words
#include "body.h"
