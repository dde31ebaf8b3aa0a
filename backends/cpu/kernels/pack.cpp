// Canonical weights -> tiles (layouts in op.h).
#include <string.h>

#include "kernels.h"

// Nibbles 0..7 of a word of 8 inputs -> 0,4,1,5,2,6,3,7: inputs 8s + j and 8s + 4 + j share a byte.
static uint32_t pair_up(uint32_t w) {
  const uint32_t low = w & 0xffff, high = w >> 16;
  const auto spread = [](uint32_t x) {  // 16 bits -> the low nibbles of 4 bytes
    x = (x | x << 8) & 0x00ff00ff;
    return (x | x << 4) & 0x0f0f0f0f;
  };
  return spread(low) | spread(high) << 4;
}

static void pack_tail(const PackOp& op, int row, int g, int r, uint8_t* tail) {
  const int64_t at = (int64_t)row * (op.w->k / op.w->group) + g;
  if (op.w->ends == FLOATS) {
    ((float*)tail)[r] = ((const float*)op.scales)[at], ((float*)tail)[16 + r] = ((const float*)op.biases)[at];
    return;
  }
  ((uint16_t*)tail)[r] = ((const uint16_t*)op.scales)[at];
  if (op.w->ends == HALVES) ((uint16_t*)tail)[16 + r] = ((const uint16_t*)op.biases)[at];
}

// Two words of 4 bytes, inputs 8s.. and 8s + 4.. -> their upper halves in line order, and their lower halves.
static void part(const uint32_t* q, uint32_t* upper, uint32_t* lower) {
  *upper = (q[0] >> 4 & 0x0f0f0f0f) | (q[1] & 0xf0f0f0f0);
  *lower = (q[0] & 0x0f0f0f0f) | (q[1] & 0x0f0f0f0f) << 4;
}

static void pack_int(const PackOp& op, int tile, uint8_t* out, uint8_t* lower) {
  const Weight& w = *op.w;
  const int lines = w.group / 8, groups = w.k / w.group, words = w.kind == INT4 ? 1 : 2;
  const size_t block = block_bytes(w);
  for (int g = 0; g < groups; g++, out += block, lower += lines * 64)
    for (int r = 0; r < 16; r++) {
      const int row = tile * 16 + r;
      if (row >= op.rows) break;
      const uint32_t* q = (const uint32_t*)op.source + ((int64_t)row * groups + g) * lines * words;
      for (int s = 0; s < lines; s++) {
        uint32_t word, rest;
        if (w.kind == INT4) {
          word = pair_up(q[s]);
        } else {
          part(q + 2 * s, &word, &rest);
          memcpy(lower + s * 64 + 4 * r, &rest, 4);
        }
        memcpy(out + s * 64 + 4 * r, &word, 4);
      }
      pack_tail(op, row, g, r, out + lines * 64);
    }
}

template <class T>
static void pack_dense(const PackOp& op, int tile, uint8_t* out) {
  const int rows = op.rows - tile * 16 < 16 ? op.rows - tile * 16 : 16;
  for (int r = 0; r < rows; r++) {
    const T* x = (const T*)op.source + ((int64_t)tile * 16 + r) * op.w->k;
    for (int k = 0; k < op.w->k; k++) ((T*)out)[(int64_t)k * 16 + r] = x[k];
  }
}

void pack_op(const PackOp& op, const Worker& me) {
  const int tiles = (op.rows + 15) / 16;
  for (int t; (t = pool_take(me, 1)) < tiles;) {
    const int tile = op.row / 16 + t;
    uint8_t *out = (uint8_t*)tile_at(*op.w, tile), *lower = (uint8_t*)lower_of(*op.w, tile);
    if (op.rows - t * 16 < 16) {
      memset(out, 0, tile_bytes(*op.w));
      if (op.w->kind == INT8) memset(lower, 0, (size_t)op.w->k * 8);
    }
    if (op.w->kind <= INT8) {
      pack_int(op, t, out, lower);
    } else if (op.w->kind == F32) {
      pack_dense<uint32_t>(op, t, out);
    } else {
      pack_dense<uint16_t>(op, t, out);
    }
  }
}
