// Attention of one new position over a cache, split along the cache: flash decoding in one launch.
//
// HEAD is the head size (a multiple of 8, at most 256). QUERIES is the number of query heads per block (at most 4,
// limited by registers); all belong to one key/value head, so keys and values are read once for them. INT8 is set for
// an int8 cache. Grid (Hkv · ceil(n_rep / QUERIES), splits), 128 threads. The number of positions is read from device
// memory, so a captured launch serves every length. Blocks beyond it return at once. The last block of a head to finish
// merges the splits. The block whose split contains the new position stores its key and value.
//
// Keys and values are read 16 bytes per lane, a position by HEAD / 8 neighbouring lanes: whole cache lines, each once.
// Scores and sums are float32. Four loads per lane are in flight: 8 KiB per block.

constexpr int LANES = HEAD <= 64 ? 8 : HEAD <= 128 ? 16 : 32;  // of a position
constexpr int AT_ONCE = 128 / LANES;                           // positions that a block processes at once
constexpr int SPAN = 64;                                       // positions between two updates of the maximum
constexpr int STEPS = SPAN / AT_ONCE;

#if INT8
typedef i8 Stored;
DEVICE void read8(float (&x)[8], const i8* p, float scale) {
  const uint2 v = *reinterpret_cast<const uint2*>(p);
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = float(i8((i < 4 ? v.x : v.y) >> (8 * (i % 4)))) * scale;
}
#else
typedef u16 Stored;
DEVICE void read8(float (&x)[8], const u16* p, float) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  x[0] = low(v.x), x[1] = high(v.x), x[2] = low(v.y), x[3] = high(v.y);
  x[4] = low(v.z), x[5] = high(v.z), x[6] = low(v.w), x[7] = high(v.w);
}
#endif

// Stores one head's new key or value (HEAD) in the cache; one warp. int8: the largest magnitude is 127.
DEVICE void store(Stored* to, u16* scale, const float* from, int lane) {
#if INT8
  float most = 0.f;
  for (int d = lane; d < HEAD; d += 32) most = fmaxf(most, fabsf(from[d]));
#pragma unroll
  for (int o = 16; o; o /= 2) most = fmaxf(most, SHUFFLE_XOR(most, o));
  const u16 rounded = to_half(fminf(fmaxf(most / 127.f, 5.9604645e-8f), 65504.f));
  for (int d = lane; d < HEAD; d += 32) {
    const float code = rintf(from[d] / from_half(rounded));
    to[d] = i8(fminf(fmaxf(code, -127.f), 127.f));
  }
  if (lane == 0) *scale = rounded;
#else
  for (int d = lane; d < HEAD; d += 32) to[d] = to_half(from[d]);
#endif
}

// q (H, HEAD), k, v (Hkv, HEAD) float; keys, values (Hkv, capacity, HEAD), their scales (Hkv, capacity) half; position
// (1): the number of positions in the cache. partial (H, splits, HEAD + 2) float and tickets (Hkv · chunks), zero
// before the first launch, are scratch. alibi (H) may be null; window, softcap 0: off. q and k are rotated here with
// rope.cuh's inv_freq, half, factor, interleaved. y (H, HEAD) half.
KERNEL(128, 4)
attend(const float* q, const float* k, const float* v, Stored* keys, Stored* values, u16* k_scales, u16* v_scales,
       const int* position, const float* alibi, float* partial, u32* tickets, u16* y, int n_rep, int capacity,
       int window, float scale, float softcap, const float* inv_freq, int half, float factor, int interleaved) {
  __shared__ float query[QUERIES][HEAD], score[QUERIES][SPAN], most[QUERIES], mass[QUERIES], fade[QUERIES];
  __shared__ float joined[4][QUERIES][HEAD], fresh[2][HEAD];
  __shared__ u32 ticket;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int part = threadIdx.x % LANES, place = threadIdx.x / LANES;  // of the head; among AT_ONCE positions
  const int chunks = (n_rep + QUERIES - 1) / QUERIES, kv_head = blockIdx.x / chunks;
  const int head = kv_head * n_rep + blockIdx.x % chunks * QUERIES;  // the first of this block's
  const int heads = min(QUERIES, (kv_head + 1) * n_rep - head), splits = gridDim.y;
  const int last = *position, first = window ? max(last + 1 - window, 0) : 0;
  const int share = (last + 1 - first + splits - 1) / splits;
  const int begin = first + int(blockIdx.y) * share, end = min(begin + share, last + 1);

  if (begin < end) {
    const size_t base = size_t(kv_head) * capacity;
    if (end == last + 1 && warp < 2) {
      const float* in = (warp ? v : k) + kv_head * HEAD;
      for (int d = lane; d < HEAD; d += 32)  // read again by the same lane in `store`
        fresh[warp][d] = turned(in, d, warp ? nullptr : inv_freq, half, factor, interleaved, last);
      const size_t at = base + last;
      store((warp ? values : keys) + at * HEAD, (warp ? v_scales : k_scales) + at, fresh[warp], lane);
    }
    for (int i = threadIdx.x; i < QUERIES * HEAD; i += 128)
      query[i / HEAD][i % HEAD] =
          i / HEAD < heads
              ? turned(q + size_t(head + i / HEAD) * HEAD, i % HEAD, inv_freq, half, factor, interleaved, last) * scale
              : 0.f;
    if (threadIdx.x < QUERIES) most[threadIdx.x] = -INFINITE, mass[threadIdx.x] = 0.f;
    __syncthreads();

    float sum[QUERIES][8] = {};
    for (int at = begin; at < end; at += SPAN) {
#pragma unroll 4
      for (int step = 0; step < STEPS; step++) {  // scores: the lanes of a position add up their eight products each
        const int s = at + step * AT_ONCE + place;
        float dot[QUERIES] = {}, x[8];
        if (s < end && part * 8 < HEAD) {
          read8(x, keys + (base + s) * HEAD + part * 8, INT8 ? from_half(k_scales[base + s]) : 1.f);
#pragma unroll
          for (int h = 0; h < QUERIES; h++)
#pragma unroll
            for (int i = 0; i < 8; i++) dot[h] = fmaf(query[h][part * 8 + i], x[i], dot[h]);
        }
#pragma unroll
        for (int h = 0; h < QUERIES; h++) {
#pragma unroll
          for (int o = LANES / 2; o; o /= 2) dot[h] += SHUFFLE_XOR(dot[h], o);
          if (part == 0) {
            float value = dot[h];
            if (softcap != 0.f) value = softcap * tanhf(value / softcap);
            if (alibi && h < heads) value += alibi[head + h] * float(s - last);
            score[h][step * AT_ONCE + place] = s < end ? value : -INFINITE;
          }
        }
      }
      __syncthreads();
      for (int h = warp; h < QUERIES; h += 4) {  // running softmax: one warp per head
        const float a = score[h][lane], b = score[h][lane + 32];
        float top = fmaxf(a, b);
#pragma unroll
        for (int o = 16; o; o /= 2) top = fmaxf(top, SHUFFLE_XOR(top, o));
        top = fmaxf(top, most[h]);
        const float ea = expf(a - top), eb = expf(b - top);
        float total = ea + eb;
#pragma unroll
        for (int o = 16; o; o /= 2) total += SHUFFLE_XOR(total, o);
        score[h][lane] = ea, score[h][lane + 32] = eb;
        if (lane == 0) {
          fade[h] = expf(most[h] - top);
          mass[h] = mass[h] * fade[h] + total;
          most[h] = top;
        }
      }
      __syncthreads();
#pragma unroll
      for (int h = 0; h < QUERIES; h++)
#pragma unroll
        for (int i = 0; i < 8; i++) sum[h][i] *= fade[h];
#pragma unroll 4
      for (int step = 0; step < STEPS; step++) {
        const int s = at + step * AT_ONCE + place;
        if (s < end && part * 8 < HEAD) {
          float x[8];
          read8(x, values + (base + s) * HEAD + part * 8, INT8 ? from_half(v_scales[base + s]) : 1.f);
#pragma unroll
          for (int h = 0; h < QUERIES; h++) {
            const float p = score[h][step * AT_ONCE + place];
#pragma unroll
            for (int i = 0; i < 8; i++) sum[h][i] = fmaf(p, x[i], sum[h][i]);
          }
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int h = 0; h < QUERIES; h++)
#pragma unroll
      for (int i = 0; i < 8; i++) {
#pragma unroll
        for (int o = LANES; o < 32; o *= 2) sum[h][i] += SHUFFLE_XOR(sum[h][i], o);
        if (lane < LANES && part * 8 < HEAD) joined[warp][h][part * 8 + i] = sum[h][i];
      }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * HEAD; i += 128) {
      const int h = i / HEAD, d = i % HEAD;
      float* out = partial + (size_t(head + h) * splits + blockIdx.y) * (HEAD + 2);
      out[d] = joined[0][h][d] + joined[1][h][d] + joined[2][h][d] + joined[3][h][d];
      if (d == 0) out[HEAD] = most[h], out[HEAD + 1] = mass[h];
    }
  }

  __threadfence();  // this block's writes are visible before its ticket
  __syncthreads();
  if (threadIdx.x == 0) ticket = atomicAdd(tickets + blockIdx.x, 1u);
  __syncthreads();
  if (ticket != u32(splits - 1)) return;
  __threadfence();
  if (threadIdx.x == 0) tickets[blockIdx.x] = 0;  // for the next launch
  const int used = (last + 1 - first + share - 1) / share;
  for (int i = threadIdx.x; i < heads * HEAD; i += 128) {
    const int h = i / HEAD, d = i % HEAD;
    const float* in = partial + size_t(head + h) * splits * (HEAD + 2);
    float top = -INFINITE, total = 0.f, value = 0.f;
    for (int s = 0; s < used; s++) top = fmaxf(top, __ldcg(in + s * (HEAD + 2) + HEAD));
    for (int s = 0; s < used; s++) {
      const float weight = expf(__ldcg(in + s * (HEAD + 2) + HEAD) - top);
      total = fmaf(weight, __ldcg(in + s * (HEAD + 2) + HEAD + 1), total);
      value = fmaf(weight, __ldcg(in + s * (HEAD + 2) + d), value);
    }
    y[size_t(head + h) * HEAD + d] = to_half(value / total);
  }
}
