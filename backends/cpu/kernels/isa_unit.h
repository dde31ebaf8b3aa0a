// Every kernel, compiled once per instruction set. A file defines ISA and its vector primitives (simd_*.h), and
// includes this one.
//
// Nothing here may include a header with inline functions of external linkage (<algorithm>, <vector>, <atomic>, ...):
// the linker keeps one copy of such a function for all files, and it may be the AVX-512 one.
#include <math.h>
#include <string.h>

#include "kernels.h"
#include "pool.h"
#include "simd_util.h"
// clang-format off
#include "rows.h"
#include "linear_int.h"
#include "shortlist.h"
#include "linear_float.h"
#include "attention.h"
#include "experts.h"
#include "probe.h"
// clang-format on

namespace {

// A small op that one thread runs without the others. Several of them in a row need no barrier between them.
inline bool serial(const Op* op) {
  switch (op->code) {
    case EMBED:
    case ROUTE: return op->rows == 1;
    case NORM: return op->rows * ((const NormOp*)op)->heads * ((const NormOp*)op)->dim <= 8192;
    case ROPE: return op->rows * ((const RopeOp*)op)->heads * ((const RopeOp*)op)->half <= 4096;
    case MAP: return op->rows * ((const MapOp*)op)->cols <= 8192;
    default: return false;
  }
}

void run(const Op* op, const Worker& me) {
  switch (op->code) {
    case EMBED: return embed_op(*(const EmbedOp*)op, me);
    case LINEAR: {
      const LinearOp& linear = *(const LinearOp*)op;
      if (in_floats(linear)) return linear_float(linear, me);
      return shortens(linear) ? shortlist(linear, me) : linear_int(linear, me);
    }
    case NORM: return norm_op(*(const NormOp*)op, me);
    case ROPE: return rope_op(*(const RopeOp*)op, me);
    case ATTENTION: return attention_op(*(const AttentionOp*)op, me);
    case MAP: return map_op(*(const MapOp*)op, me);
    case ROUTE: return route_op(*(const RouteOp*)op, me);
    case EXPERTS: return experts_op(*(const ExpertsOp*)op, me);
    case PROBE: return probe_op(*(const ProbeOp*)op, me);
    case PACK: return pack_op(*(const PackOp*)op, me);
  }
}

void walk(const Worker& me, const void* list, int n) {
  const Op* const* ops = (const Op* const*)list;
  for (int i = 0; i < n; i++) {
    const bool alone = serial(ops[i]);
    if (!alone || me.id == 0) run(ops[i], me);
    if (i + 1 == n) break;  // the pool has a barrier after the list
    if (!alone || !serial(ops[i + 1])) {
      pool_barrier(me);
    } else if (me.id == 0) {
      pool_restart(me);
    }
  }
}

void need(const Op* op, size_t* scratch, size_t* shared) {
  if (op->code == ATTENTION) *scratch = attention_bytes(*(const AttentionOp*)op);
  if (op->code == ROUTE) route_need(*(const RouteOp*)op, scratch, shared);
  if (op->code == EXPERTS) experts_need(*(const ExpertsOp*)op, scratch, shared);
  if (op->code != LINEAR) return;
  const LinearOp& linear = *(const LinearOp*)op;
  const Weight& w = *linear.w;
  if (in_floats(linear)) {
    *scratch = float_bytes(w);
    if (op->rows > FEW)
      *shared = float_panel_bytes(op->rows, w);
    else if (linear.norm && op->rows > 1)
      *shared = (size_t)op->rows * (size_t)w.k * 4;
    return;
  }
  *scratch = quantised_bytes(1, w) + row_bytes(w) + 64;
  if (shortens(linear)) *shared = estimates_bytes(w);
  if (op->rows == 1) return;
  *shared = quantised_bytes(op->rows, w);
  if (op->rows > FEW && many_bytes(w) > *scratch) *scratch = many_bytes(w);
}

}  // namespace

extern const Kernels ISA;
const Kernels ISA = {NAME, walk, need};
