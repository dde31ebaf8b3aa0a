#define ISA avx2_kernels
#define NAME "avx2"
#include "simd_avx2.h"
// after the words
#include "body.h"
