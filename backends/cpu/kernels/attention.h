// Causal attention with grouped heads over a KV cache, with an online softmax: keys are processed in blocks of 64 with
// a running maximum and sum per query, and outputs are rescaled when the maximum changes. All arithmetic is float32. An
// int8 cache has one scale per token and head for keys and for values, which multiplies scores and weights.
//
// A work item is a KV head of a segment with some of its rows. The queries of all heads of the group share the keys.
// For few queries the keys are also split into chunks of 256. The thread that finishes a head's last chunk adds the
// chunks in order, so results do not depend on the number of threads.
#pragma once
#include "pool.h"
#include "simd_util.h"

namespace {

constexpr int KEYS = 64;    // per block: scores and converted keys stay in L1
constexpr int CHUNK = 256;  // keys per chunk, if they are split
// maximum queries of an item for which keys are split
constexpr int SPLIT = 32;
constexpr int QUERIES = 64;                                        // queries of an item otherwise
constexpr int KV_TILES = W == 16 ? 2 : 1, NK = KV_TILES * 16 / W;  // tiles of 16 keys, and vectors, per step
constexpr float NEVER = -1e30f;

struct Half {
  using T = uint16_t;
  static constexpr bool SCALED = false;
  static F get(const T* p) { return ldh(p); }
  static void put(T* p, F x) { sth(p, x); }
};
struct Single {
  using T = float;
  static constexpr bool SCALED = false;
  static F get(const T* p) { return ld(p); }
  static void put(T* p, F x) { st(p, x); }
};

struct Byte {
  using T = int8_t;
  static constexpr bool SCALED = true;
  static F get(const T* p) { return ldc(p); }
  static void put(T* p, F x) { st8(p, nearest(x)); }
};

struct Item {
  const SegmentArg* segment;
  int first_row;  // the segment's first row in the step
  int head, row, rows, chunk, chunks;
  int64_t length;
};

inline int group_of(const AttentionOp& op) {
  return op.heads / op.kv_heads;
}
inline bool splits(const AttentionOp& op, const SegmentArg& s) {
  return s.rows * group_of(op) <= SPLIT;
}
inline int rows_an_item(const AttentionOp& op, const SegmentArg& s) {
  return splits(op, s) ? s.rows : max(1, QUERIES / group_of(op));
}
inline int chunks_of(const AttentionOp& op, const SegmentArg& s) {
  return splits(op, s) ? (int)((*s.length + s.rows + CHUNK - 1) / CHUNK) : 1;
}
inline int items_of(const AttentionOp& op, const SegmentArg& s) {
  const int n = rows_an_item(op, s);
  return op.kv_heads * ((s.rows + n - 1) / n) * chunks_of(op, s);
}

inline Item item_at(const AttentionOp& op, int i) {
  Item item{op.segment, 0, 0, 0, 0, 0, 1, 0};
  for (int n; i >= (n = items_of(op, *item.segment)); i -= n) item.first_row += item.segment++->rows;
  const SegmentArg& s = *item.segment;
  const int n = rows_an_item(op, s), blocks = (s.rows + n - 1) / n;
  item.chunks = chunks_of(op, s);
  item.chunk = i % item.chunks;
  item.row = i / item.chunks % blocks * n;
  item.head = i / item.chunks / blocks;
  item.rows = min(n, s.rows - item.row);
  item.length = *s.length;
  return item;
}

// Returns the factor that scales n numbers to within 127. Stores its inverse in *scale.
inline F to_bytes(const float* x, int n, float* scale) {
  float top = 0;
  for (int i = 0; i < n; i++) top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
  *scale = top / 127;
  return set1(top > 1e-30f ? 127 / top : 0);
}

// Writes one row's key and value of one head to the cache at its position.
template <class KV>
void append(const AttentionOp& op, const SegmentArg& s, int row, int head, int64_t at) {
  using T = typename KV::T;
  T* keys = (T*)s.keys + (size_t)head * s.capacity * op.dim + (size_t)(at / 16) * 16 * op.dim + at % 16;
  T* values = (T*)s.values + ((size_t)head * s.capacity + at) * op.dim_pad;
  const float* k = op.k + row * op.k_stride + head * op.k_head;
  const float* v = op.v + row * op.v_stride + head * op.v_head;
  F k_factor = set1(1), v_factor = k_factor;
  if constexpr (KV::SCALED) {
    const size_t slot = (size_t)head * s.capacity + at;
    k_factor = to_bytes(k, op.dim, s.key_scales + slot), v_factor = to_bytes(v, op.dim, s.value_scales + slot);
  }
  for (int d = 0; d < op.dim; d += W) {
    const int n = min(W, op.dim - d);
    T line[W];
    KV::put(line, mul(k_factor, n == W ? ld(k + d) : ld_part(k + d, n)));
    for (int i = 0; i < n; i++) keys[(size_t)(d + i) * 16] = line[i];
    KV::put(line, mul(v_factor, n == W ? ld(v + d) : ld_part(v + d, n)));
    for (int i = 0; i < n; i++) values[d + i] = line[i];
  }
}

// R queries (R, dim) times 64 keys -> scores (R, KEYS).
template <class KV, int R>
inline void score(const float* q, const typename KV::T* keys, int dim, int count, float* out) {
  for (int t = 0; t < count; t += 16 * KV_TILES, keys += (size_t)16 * KV_TILES * dim) {
    F s[R][NK];
    repeat<R>([&](auto r) ALWAYS { repeat<NK>([&](auto v) ALWAYS { s[r.value][v.value] = set1(0); }); });
    for (int d = 0; d < dim; d++)
      repeat<NK>([&](auto v) ALWAYS {
        const F k = KV::get(keys + (v.value * W / 16) * 16 * dim + d * 16 + v.value * W % 16);
        repeat<R>([&](auto r)
                      ALWAYS { s[r.value][v.value] = fma(k, set1(q[r.value * dim + d]), s[r.value][v.value]); });
      });
    repeat<R>([&](auto r) ALWAYS {
      repeat<NK>([&](auto v) ALWAYS { st(out + r.value * KEYS + t + v.value * W, s[r.value][v.value]); });
    });
  }
}

// acc (R, dim_pad) += p (R, KEYS) * values (count, dim_pad)
template <class KV, int R>
inline void weigh(const float* p, const typename KV::T* values, int dim_pad, int count, float* acc) {
  constexpr int N = 16 / W;
  for (int d = 0; d < dim_pad; d += 16) {
    F a[R][N];
    repeat<R>([&](auto r) ALWAYS {
      repeat<N>([&](auto v) ALWAYS { a[r.value][v.value] = ld(acc + r.value * dim_pad + d + v.value * W); });
    });
    for (int j = 0; j < count; j++)
      repeat<N>([&](auto v) ALWAYS {
        const F x = KV::get(values + (size_t)j * dim_pad + d + v.value * W);
        repeat<R>([&](auto r)
                      ALWAYS { a[r.value][v.value] = fma(x, set1(p[r.value * KEYS + j]), a[r.value][v.value]); });
      });
    repeat<R>([&](auto r) ALWAYS {
      repeat<N>([&](auto v) ALWAYS { st(acc + r.value * dim_pad + d + v.value * W, a[r.value][v.value]); });
    });
  }
}

// Calls fn(Int<R>, first query) for all queries in the widest steps that the registers allow. n is 1, 2 or a multiple
// of 4.
template <class Fn>
inline void by_queries(int n, Fn fn) {
  int i = 0;
  if constexpr (FLOAT_ROWS == 8)
    for (; i + 8 <= n; i += 8) fn(Int<8>{}, i);
  for (; i + 4 <= n; i += 4) fn(Int<4>{}, i);
  for (; i + 2 <= n; i += 2) fn(Int<2>{}, i);
  if (i < n) fn(Int<1>{}, i);
}
inline int padded(int queries) {
  return queries <= 2 ? queries : (int)up_to(queries, 4);
}

// The state of an item. Queries beyond nq are zero and only fill the registers.
struct State {
  float *q, *acc, *scores, *top, *sum;  // (nq, dim), (nq, dim_pad), (nq, KEYS), (nq), (nq)
};
inline int most_queries(const AttentionOp& op) {
  return max(QUERIES, group_of(op)) + 4;
}
inline size_t attention_bytes(const AttentionOp& op) {
  return (size_t)most_queries(op) * (size_t)(op.dim + op.dim_pad + KEYS + 2) * 4 + 64;
}
inline State state_at(const AttentionOp& op, uint8_t* room) {
  const size_t n = (size_t)most_queries(op);
  State s;
  s.scores = (float*)room;
  s.acc = s.scores + n * KEYS;
  s.q = s.acc + n * op.dim_pad;
  s.top = s.q + n * op.dim;
  s.sum = s.top + n;
  return s;
}

// Converts scores of one query against keys first.. to weights. Keys outside lo..hi are masked.
inline void soften(const AttentionOp& op, const State& s, int i, float slope, int64_t position, int64_t first,
                   int64_t lo, int64_t hi) {
  float* x = s.scores + i * KEYS;
  if (op.softcap > 0)
    for (int j = 0; j < KEYS; j += W) st(x + j, softcap(ld(x + j), op.softcap));
  if (op.alibi)
    for (int j = 0; j < KEYS; j++) x[j] += slope * (float)(first + j - position);
  for (int j = 0; j < min(KEYS, (int)(lo - first)); j++) x[j] = NEVER;
  for (int j = (int)(hi - first < 0 ? 0 : hi - first); j < KEYS; j++) x[j] = NEVER;
  F peak = ld(x);
  for (int j = W; j < KEYS; j += W) peak = max(peak, ld(x + j));
  const float top = max_of(max(peak, set1(s.top[i])));
  F total = set1(0);
  for (int j = 0; j < KEYS; j += W) {
    const F p = exponential(sub(ld(x + j), set1(top)));
    st(x + j, p);
    total = add(total, p);
  }
  if (top > s.top[i]) {
    float line[W];
    st(line, exponential(set1(s.top[i] - top)));
    const F shrink = set1(line[0]);
    s.sum[i] *= line[0];
    for (int d = 0; d < op.dim_pad; d += W) st(s.acc + i * op.dim_pad + d, mul(shrink, ld(s.acc + i * op.dim_pad + d)));
    s.top[i] = top;
  }
  s.sum[i] += sum_of(total);
}

inline void start_item(const AttentionOp& op, const Item& it, const State& s, int nq, int n) {
  const int group = group_of(op);
  for (int i = 0; i < n; i++) {
    float* q = s.q + (size_t)i * op.dim;
    s.top[i] = NEVER, s.sum[i] = 0;
    memset(s.acc + (size_t)i * op.dim_pad, 0, sizeof(float) * (size_t)op.dim_pad);
    if (i >= nq) {
      memset(q, 0, sizeof(float) * (size_t)op.dim);
      continue;
    }
    const int row = it.first_row + it.row + i / group, head = it.head * group + i % group;
    map(op.dim, op.q + row * op.q_stride + head * op.q_head, q, [&](F x) { return mul(x, set1(op.scale)); });
  }
}

// y = acc / sum for each query of the item.
inline void end_item(const AttentionOp& op, const Item& it, int nq, const float* acc, const float* sum) {
  const int group = group_of(op);
  for (int i = 0; i < nq; i++) {
    const int row = it.first_row + it.row + i / group, head = it.head * group + i % group;
    const F inverse = set1(1 / sum[i]);
    map(op.dim, acc + (size_t)i * op.dim_pad, op.y + ((int64_t)row * op.heads + head) * op.dim,
        [&](F x) { return mul(x, inverse); });
  }
}

// Adds the chunks of a head, with weights relative to the largest maximum.
inline void merge(const AttentionOp& op, const Item& it, const State& s, int nq) {
  const size_t one = (size_t)nq * (size_t)(op.dim_pad + 2);
  const float* parts = it.segment->partial + one * (size_t)it.chunks * (size_t)it.head;
  for (int i = 0; i < nq; i++) {
    float* acc = s.acc + (size_t)i * op.dim_pad;
    float top = NEVER;
    for (int c = 0; c < it.chunks; c++) {
      const float t = parts[one * (size_t)c + (size_t)nq * op.dim_pad + i];
      top = t > top ? t : top;
    }
    memset(acc, 0, sizeof(float) * (size_t)op.dim_pad);
    s.sum[i] = 0;
    for (int c = 0; c < it.chunks; c++) {
      const float* part = parts + one * (size_t)c;
      float line[W];
      st(line, exponential(set1(part[(size_t)nq * op.dim_pad + i] - top)));
      s.sum[i] += line[0] * part[(size_t)nq * (op.dim_pad + 1) + i];
      map(op.dim_pad, acc, part + (size_t)i * op.dim_pad, acc, [&](F a, F b) { return fma(set1(line[0]), b, a); });
    }
  }
  end_item(op, it, nq, s.acc, s.sum);
}

// The range of keys that the item's queries can see: lo in whole blocks, up to hi.
struct Span {
  int64_t lo, hi;
};
inline Span span_of(const AttentionOp& op, const Item& it) {
  const int64_t first = it.length + it.row;
  Span s{0, first + it.rows};
  if (op.window > 0 && first - op.window + 1 > 0) s.lo = (first - op.window + 1) / KEYS * KEYS;
  if (it.chunks > 1) {
    const int64_t a = (int64_t)it.chunk * CHUNK, b = a + CHUNK;
    s.lo = a > s.lo ? a : s.lo, s.hi = b < s.hi ? b : s.hi;
  }
  return s;
}

// Multiplies scores or weights of a block by the scales of its tokens.
inline void rescale(float* x, int nq, const float* scales) {
  for (int i = 0; i < nq; i++, x += KEYS) map(KEYS, x, scales, x, [](F a, F b) { return mul(a, b); });
}

template <class KV>
void attend(const AttentionOp& op, const Item& it, const State& s) {
  using T = typename KV::T;
  const int group = group_of(op), nq = it.rows * group, n = padded(nq);
  const T* keys = (const T*)it.segment->keys + (size_t)it.head * it.segment->capacity * op.dim;
  const T* values = (const T*)it.segment->values + (size_t)it.head * it.segment->capacity * op.dim_pad;
  const Span span = span_of(op, it);
  start_item(op, it, s, nq, n);
  for (int64_t first = span.lo; first < span.hi; first += KEYS) {
    const int count = (int)(span.hi - first < KEYS ? span.hi - first : KEYS);
    by_queries(n, [&](auto r, int i) {
      score<KV, decltype(r)::value>(s.q + (size_t)i * op.dim, keys + (size_t)first * op.dim, op.dim, count,
                                    s.scores + i * KEYS);
    });
    const size_t slot = (size_t)it.head * it.segment->capacity + (size_t)first;
    if constexpr (KV::SCALED) rescale(s.scores, nq, it.segment->key_scales + slot);
    for (int i = 0; i < nq; i++) {
      const int64_t position = it.length + it.row + i / group;
      const int64_t lo = op.window > 0 ? position - op.window + 1 : 0;
      soften(op, s, i, op.alibi ? op.alibi[it.head * group + i % group] : 0, position, first, lo, position + 1);
    }
    if constexpr (KV::SCALED) rescale(s.scores, nq, it.segment->value_scales + slot);
    by_queries(n, [&](auto r, int i) {
      weigh<KV, decltype(r)::value>(s.scores + i * KEYS, values + (size_t)first * op.dim_pad, op.dim_pad, count,
                                    s.acc + (size_t)i * op.dim_pad);
    });
  }
  if (it.chunks == 1) return end_item(op, it, nq, s.acc, s.sum);
  float* part = it.segment->partial + (size_t)nq * (size_t)(op.dim_pad + 2) * ((size_t)it.chunks * it.head + it.chunk);
  memcpy(part, s.acc, sizeof(float) * (size_t)nq * op.dim_pad);
  memcpy(part + (size_t)nq * op.dim_pad, s.top, sizeof(float) * (size_t)nq);
  memcpy(part + (size_t)nq * (op.dim_pad + 1), s.sum, sizeof(float) * (size_t)nq);
  int32_t* done = it.segment->done + it.head;
  if (pool_arrive(done) + 1 < it.chunks) return;
  *done = 0;
  merge(op, it, s, nq);
}

template <class KV>
void attention_of(const AttentionOp& op, const Worker& me) {
  // With one row per segment, the item that reads the new key also writes it, so no barrier is needed.
  const bool alone = op.rows == op.segments;
  if (!alone) {
    for (int i; (i = pool_take(me, 1)) < op.rows;) {
      const SegmentArg* s = op.segment;
      int row = i;
      while (row >= s->rows) row -= s++->rows;
      for (int h = 0; h < op.kv_heads; h++) append<KV>(op, *s, i, h, *s->length + row);
    }
    pool_barrier(me);
  }
  int items = 0;
  for (int i = 0; i < op.segments; i++) items += items_of(op, op.segment[i]);
  const State state = state_at(op, me.scratch);
  for (int i; (i = pool_take(me, 1)) < items;) {
    const Item it = item_at(op, i);
    if (alone && it.chunk == it.chunks - 1) append<KV>(op, *it.segment, it.first_row, it.head, it.length);
    attend<KV>(op, it, state);
  }
}

void attention_op(const AttentionOp& op, const Worker& me) {
  switch (op.kv_kind) {
    case F16: return attention_of<Half>(op, me);
    case F32: return attention_of<Single>(op, me);
    default: return attention_of<Byte>(op, me);
  }
}

}  // namespace
