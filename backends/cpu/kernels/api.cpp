// The plain C interface that ctypes opens: a handle, and lists of ops.
#include <string.h>

#include <new>

#include "kernels.h"

#if defined(_WIN32)
#define API extern "C" __declspec(dllexport)
#else
#define API extern "C" __attribute__((visibility("default")))
#endif

struct Engine {
  Pool* pool;
  const Kernels* kernels;
};

enum Status : int32_t { OK, NO_MEMORY, BAD_ID };

// Names of the instruction sets of this processor, best first; null after the last.
API const char* tc_isa(int i) {
  const Kernels* k = kernels_at(i);
  return k ? k->name : nullptr;
}

// Returns null if this processor lacks the instruction set, or if memory is short.
API Engine* tc_new(const char* isa, int threads) {
  for (int i = 0; const Kernels* k = kernels_at(i); i++) {
    if (strcmp(k->name, isa)) continue;
    Pool* pool = pool_new(threads);
    Engine* e = pool ? new (std::nothrow) Engine{pool, k} : nullptr;
    if (pool && !e) pool_free(pool);
    return e;
  }
  return nullptr;
}

API void tc_free(Engine* e) {
  pool_free(e->pool);
  delete e;
}

static bool ids_fit(const Op* op) {
  if (op->code != EMBED) return true;
  const EmbedOp& e = *(const EmbedOp*)op;
  for (int i = 0; i < e.rows; i++)
    if (e.ids[i] < 0 || e.ids[i] >= e.table->n) return false;
  return true;
}

// Runs the ops in order. Token ids are checked before anything runs.
API int32_t tc_run(Engine* e, const Op* const* ops, int n) {
  size_t scratch = 64, shared = 64;
  for (int i = 0; i < n; i++) {
    size_t own = 0, all = 0;
    e->kernels->need(ops[i], &own, &all);
    if (own > scratch) scratch = own;
    if (all > shared) shared = all;
    if (!ids_fit(ops[i])) return BAD_ID;
  }
  return pool_run(e->pool, e->kernels->walk, ops, n, scratch, shared) ? OK : NO_MEMORY;
}

// Threads that run the next ops: fewer than the pool has while other programs use the processors.
API int32_t tc_team(const Engine* e) {
  return pool_team(e->pool);
}

// The rule that reduces the team, for tests (pool.h).
API int32_t tc_fewer(int32_t team, double lost, double used) {
  return pool_fewer(team, lost, used);
}

// Bytes of a weight's buffer: its tiles and its bias.
API int64_t tc_weight_bytes(const Weight* w) {
  return (int64_t)codes_bytes(*w) + (w->has_bias ? (int64_t)tiles_of(*w) * 64 : 0);
}

// Size of an op's struct, for ctypes to compare with its own. Code 0: a weight, -1: a norm, -2: a segment, -3: a
// choice.
API int32_t tc_sizeof(int32_t code) {
  switch (code) {
    case EMBED: return sizeof(EmbedOp);
    case LINEAR: return sizeof(LinearOp);
    case NORM: return sizeof(NormOp);
    case ROPE: return sizeof(RopeOp);
    case ATTENTION: return sizeof(AttentionOp);
    case MAP: return sizeof(MapOp);
    case PACK: return sizeof(PackOp);
    case PROBE: return sizeof(ProbeOp);
    case ROUTE: return sizeof(RouteOp);
    case EXPERTS: return sizeof(ExpertsOp);
    case 0: return sizeof(Weight);
    case -1: return sizeof(NormArg);
    case -2: return sizeof(SegmentArg);
    case -3: return sizeof(Choice);
    default: return -1;
  }
}
