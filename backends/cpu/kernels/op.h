// The C ABI: the memory layout of the ops. ctypes declares the same structs in ../native_abi.py, and tc_sizeof lets it
// check that both agree.
//
// Every pointer is borrowed for the duration of the call. Strides count elements. All tensors are float32 with a stride
// between rows and a contiguous last axis.
#pragma once
#include <stddef.h>
#include <stdint.h>

enum Code : int32_t { EMBED = 1, LINEAR, NORM, ROPE, ATTENTION, MAP, PACK, PROBE, ROUTE, EXPERTS };
enum Kind : int32_t { INT4, INT8, F16, BF16, F32 };  // of a weight's numbers
enum Ends : int32_t { HALVES, FLOATS, ZEROS };       // of a block; ZEROS only for INT4
enum NormKind : int32_t { NO_NORM, RMS, LAYER };
enum Act : int32_t { NO_ACT, SILU, GELU, GELU_TANH, RELU, RELU2 };
enum MapKind : int32_t { MAP_ACT, MAP_GLU, MAP_ADD, MAP_SCALE, MAP_SOFTCAP };

// A weight matrix (n, k) in tiles of 16 rows; rows beyond n are zero. A tile is a sequence of blocks, one per `group`
// of inputs (dense kinds: one block for all k inputs):
//
//   INT4   group/8 lines of 64 bytes, then ends.   line s, byte 4*r + j:
//          low nibble = row r, input 8*s + j;  high nibble = row r, input 8*s + 4 + j      (j = 0..3)
//   INT8   two planes of lines in INT4's layout: the upper halves of all tiles, with ends, then the lower halves of all
//          tiles, without ends. A head can then be read at half its width to find the rows that matter (shortlist.h).
//   dense  k lines of 16 numbers: line i = input i of the 16 rows
//
// One vector load therefore feeds a dot product with the rows in its 32-bit lanes, on every instruction set. Ends: 16
// scales and 16 biases, w = q * scale + bias. ZEROS stores both in 16 bits: an fp16 scale whose lowest four bits are
// zero, and in their place the zero point z, with bias = -z * scale: 4.125 bits per weight in groups of 128. `data` is
// aligned to 64 bytes and followed by the layer's bias (tiles * 16 floats) if has_bias is set.
struct Weight {
  int32_t kind, n, k, group, ends, has_bias;
  const uint8_t* data;
};

static inline int tiles_of(const Weight& w) {
  return (w.n + 15) / 16;
}

static inline size_t block_bytes(const Weight& w) {
  const size_t tail = w.ends == FLOATS ? 128 : w.ends == HALVES ? 64 : 32;
  switch (w.kind) {
    case INT4:
    case INT8: return (size_t)w.group * 8 + tail;
    case F32: return (size_t)w.k * 64;
    default: return (size_t)w.k * 32;
  }
}

static inline size_t tile_bytes(const Weight& w) {
  return w.kind <= INT8 ? block_bytes(w) * (size_t)(w.k / w.group) : block_bytes(w);
}

static inline const uint8_t* tile_at(const Weight& w, int tile) {
  return w.data + tile_bytes(w) * (size_t)tile;
}

// The lower halves of a tile's codes, only for INT8.
static inline const uint8_t* lower_of(const Weight& w, int tile) {
  return w.data + tile_bytes(w) * (size_t)tiles_of(w) + (size_t)w.k * 8 * (size_t)tile;
}

static inline size_t codes_bytes(const Weight& w) {
  return (tile_bytes(w) + (w.kind == INT8 ? (size_t)w.k * 8 : 0)) * (size_t)tiles_of(w);
}

static inline const float* bias_of(const Weight& w) {
  return w.has_bias ? (const float*)(w.data + codes_bytes(w)) : nullptr;
}

struct NormArg {
  int32_t kind;
  float eps;
  const float *weight, *bias;
};

struct Op {
  int32_t code, rows;
};

struct EmbedOp {
  int32_t code, rows;
  const int32_t* ids;
  const Weight* table;
  float* y;
};

// How one token will be chosen from a row of logits (shortlist.h): the largest if temperature is 0, else sampled.
// Tokens with a total probability of at most `tail` may have approximate logits. `tiles` counts the tiles read at full
// width.
struct Choice {
  int32_t on;
  float temperature, tail;
  int32_t tiles;
};

// y = [residual +] act(w · norm(x) + bias). gated: w has gate rows, then up rows, and y = act(gate) * up.
struct LinearOp {
  int32_t code, rows;
  const float* x;
  int64_t x_stride;
  const Weight* w;
  const NormArg* norm;  // may be null
  float* y;
  int64_t y_stride;
  const float* residual;  // may be null, may be y
  int64_t residual_stride;
  int32_t act, gated, exact, pad;
  const int32_t *from, *to;  // may be null: row r reads row from[r] of x; share[r] times its result is added
  const float* share;        // to row to[r] of y
  Choice* choice;            // only for a head; may be null
};

// Sorts rows by their experts. A row's experts are the k with the largest logits (of equal ones the lower index), and
// the shared one, if any, with number `experts`. Each row has k + shared places in the sorted order. The places of
// expert e are first[e] .. first[e + 1], by ascending row. Place p is for row[p] with the factor share[p]: the softmax
// over the experts' logits (normalise: over those of the k), and for the shared expert the sigmoid of the last logit.
struct RouteOp {
  int32_t code, rows, experts, k, normalise, shared;
  const float* logits;  // (rows, experts + shared)
  int64_t stride;
  int32_t *first, *row;  // (experts + shared + 1), (rows * (k + shared))
  float* share;
};

// Half of the experts' MLPs. Each expert's weight is read once for all its rows.
//   up    w has gate rows, then up rows: for each place, act(gate) * up of row[p] of norm(x). Rows of h follow one
//         another in the sorted order, each as wide as its expert.
//   down  x is that h: y = [residual +] the sum over a row's places of share * (w · h + bias), in ascending order of
//         experts.
struct ExpertsOp {
  int32_t code, rows, experts, each;  // each: places per row, k + shared
  int32_t up, act, exact, pad;
  const Weight* w;  // (experts); kinds and inner sizes may differ
  const int32_t *first, *row;
  const float* share;
  const float* x;
  int64_t x_stride;     // only for up
  const NormArg* norm;  // only for up; may be null
  float* y;
  int64_t y_stride;       // only for down
  const float* residual;  // only for down; may be null
  int64_t residual_stride;
};

struct NormOp {
  int32_t code, rows, heads, dim;  // x (rows, heads, dim) -> y the same, contiguous
  const float* x;
  int64_t row_stride, head_stride;
  const NormArg* norm;
  float* y;
};

// Rotates x in place. table: for each position `half` cosines, then `half` sines.
struct RopeOp {
  int32_t code, rows, heads, half, interleaved, pad;
  float* x;
  int64_t row_stride, head_stride;
  const int32_t* positions;
  const float* table;
};

// One conversation's share of a step. For a layer and a KV head:
//   keys   [capacity / 16][dim][16]: 16 consecutive keys interleaved, so that scores need no sum across lanes
//   values [capacity][dim_pad]
// Values are fp16, fp32, or int8 with a scale per token: key_scales, value_scales [capacity]. `length` is the number of
// tokens before this step.
struct SegmentArg {
  int32_t rows, capacity;
  const int64_t* length;
  uint8_t *keys, *values;            // of this layer
  float *key_scales, *value_scales;  // only for int8
  float* partial;                    // scratch for split sums, see attention.h
  int32_t* done;                     // a counter per KV head, zero between ops
};

struct AttentionOp {
  int32_t code, rows, heads, kv_heads, dim, dim_pad, segments, window, kv_kind, pad;
  const float *q, *k, *v;
  int64_t q_stride, q_head, k_stride, k_head, v_stride, v_head;
  float* y;  // (rows, heads * dim), contiguous
  const SegmentArg* segment;
  const float* alibi;  // a slope per head, or null
  float scale, softcap;
};

struct MapOp {
  int32_t code, rows, cols, kind, act;
  float factor;
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  float* y;
  int64_t y_stride;
};

// Writes rows `row`.. of a canonical matrix to w's tiles; row is a multiple of 16.
struct PackOp {
  int32_t code, rows, row, pad;
  const Weight* w;
  const void* source;  // INT4, INT8: words of codes, row by row; dense: numbers of the same kind, row by row
  const void *scales, *biases;
};

// Measures the machine's limits for benchmarks: reads `bytes` at data once, or if data is null executes `work` times 16
// rounds of int8 dot products on every thread. `sink` receives a value that depends on the work.
struct ProbeOp {
  int32_t code, rows;
  const uint8_t* data;
  int64_t bytes, work;
  int64_t* dots;  // receives the multiplications and additions of one thread
  float* sink;
};
