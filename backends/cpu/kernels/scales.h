// The tail of a block of an int4 or int8 tile: scales and biases of 16 rows (layout in op.h).
#pragma once
#include "simd_util.h"

namespace {

struct Tail {
  F scale[V], bias[V];
};

template <bool WIDE>
ALWAYS inline Tail tail_of(const Weight& w, const uint8_t* p) {
  Tail t;
  if (!WIDE && w.ends == ZEROS) {
    for (int v = 0; v < V; v++) {
      ldz((const uint16_t*)p + v * W, t.scale[v], t.bias[v]);
      t.bias[v] = sub(set1(0), mul(t.scale[v], t.bias[v]));
    }
    return t;
  }
  for (int v = 0; v < V; v++) {
    t.scale[v] = w.ends == FLOATS ? ld((const float*)p + v * W) : ldh((const uint16_t*)p + v * W);
    t.bias[v] = w.ends == FLOATS ? ld((const float*)p + 16 + v * W) : ldh((const uint16_t*)p + 16 + v * W);
    if (WIDE && WIDE_OFFSET != 0) t.bias[v] = fma(t.scale[v], set1(WIDE_OFFSET), t.bias[v]);
  }
  return t;
}

}  // namespace
