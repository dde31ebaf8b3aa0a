// Samples the next token from one row of logits like sampler.py's `distribution`: temperature, top-k (ties are kept),
// top-p (the smallest set that reaches it), min-p, then the token at which the cumulative mass, from the most likely
// on, exceeds `chance`. One block; the result does not depend on the order of its threads.
//
// A token's key is z = (largest - logit) / temperature in units of 2^-26: the smaller, the more likely. Its mass is
// exp(-z) in units of 2^-40, an integer, so that sums are exact in any order. Tokens of mass 0 (z > 27.7), usually
// nearly all, are dropped first. The position at which a sum is reached is found with histograms of the keys' upper 11,
// middle 11 and lower 10 bits, without sorting.

constexpr int THREADS = 1024, BINS = 2048;

struct Shared {
  u64 bins[BINS], sums[32];
  float tops[32];
  int at[32];
  u32 kept;
};

DEVICE u64 mass_of(u32 key) {
  return u64(expf(-float(key) * 1.4901161e-8f) * 1.0995116e12f);
}

// Finds the key at which the running sum (of masses, or of ones) first reaches `target` > 0, in ascending order of keys
// up to `limit`. `before` is the sum of all smaller keys. The total must be at least target.
DEVICE u32 reach(Shared& s, const u32* keys, u32 limit, u64 target, bool by_mass, u64& before) {
  u32 prefix = 0;
  before = 0;
  for (int pass = 0; pass < 3; pass++) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, bits = pass == 2 ? 10 : 11;
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += THREADS) s.bins[i] = 0;
    __syncthreads();
    for (u32 i = threadIdx.x; i < s.kept; i += THREADS) {
      const u32 key = keys[i];
      if (key <= limit && (pass == 0 || key >> (shift + bits) == prefix))
        atomicAdd(&s.bins[key >> shift & ((1u << bits) - 1)], by_mass ? mass_of(key) : u64(1));
    }
    __syncthreads();
    u64 sum = s.bins[2 * threadIdx.x] + s.bins[2 * threadIdx.x + 1];
#pragma unroll
    for (int o = 16; o; o /= 2) sum += SHUFFLE_XOR(sum, o);
    if (threadIdx.x % 32 == 0) s.sums[threadIdx.x / 32] = sum;
    __syncthreads();
    int part = 0;  // 64 bins each; every thread finds the same
    while (part < 31 && before + s.sums[part] < target) before += s.sums[part++];
    int bin = part * 64;
    while (bin < part * 64 + 63 && before + s.bins[bin] < target) before += s.bins[bin++];
    prefix = prefix << bits | u32(bin);
  }
  return prefix;
}

DEVICE u64 block_sum(Shared& s, u64 v) {
#pragma unroll
  for (int o = 16; o; o /= 2) v += SHUFFLE_XOR(v, o);
  __syncthreads();
  if (threadIdx.x % 32 == 0) s.sums[threadIdx.x / 32] = v;
  __syncthreads();
  u64 sum = 0;
  for (int w = 0; w < 32; w++) sum += s.sums[w];
  return sum;
}

// logits (V) float; keys, ids (V) scratch; token (1), -1 if a logit is not finite. temperature 0: the largest, the
// first of equals. top_k 0, top_p 1, min_p 0: off. chance in [0, 1). Grid: 1, 1024 threads.
KERNEL(1024, 1)
sample(const float* logits, u32* keys, int* ids, int* token, int V, float temperature, int top_k, float top_p,
       float min_p, double chance) {
  __shared__ Shared s;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float top = -INFINITE;
  int at = V;
  bool finite = true;
  for (int i = threadIdx.x; i < V; i += THREADS) {
    const float v = logits[i];
    finite = finite && fabsf(v) < INFINITE;
    if (v > top) top = v, at = i;
  }
  if (!finite) at = -1, top = INFINITE;
#pragma unroll
  for (int o = 16; o; o /= 2) {
    const float v = SHUFFLE_XOR(top, o);
    const int i = SHUFFLE_XOR(at, o);
    if (v > top || (v == top && i < at)) top = v, at = i;
  }
  if (lane == 0) s.tops[warp] = top, s.at[warp] = at;
  if (threadIdx.x == 0) s.kept = 0;
  __syncthreads();
  for (int w = 0; w < 32; w++)
    if (s.tops[w] > top || (s.tops[w] == top && s.at[w] < at)) top = s.tops[w], at = s.at[w];
  if (at < 0 || temperature == 0.f) {
    if (threadIdx.x == 0) *token = at;
    return;
  }

  for (int i = threadIdx.x; i < V; i += THREADS) {
    const float z = (top - logits[i]) / temperature;
    const u32 key = z < 60.f ? u32(z * 67108864.f) : 0xffffffffu;
    if (mass_of(key) == 0) continue;
    const u32 place = atomicAdd(&s.kept, 1u);
    keys[place] = key, ids[place] = i;
  }
  __syncthreads();

  u64 before, total = 0, likely = 0;
  u32 limit = 0xffffffffu;
  if (top_k > 0 && u32(top_k) < s.kept) limit = reach(s, keys, limit, u64(top_k), false, before);
  for (u32 i = threadIdx.x; i < s.kept; i += THREADS) {
    const u64 mass = keys[i] <= limit ? mass_of(keys[i]) : 0;
    total += mass;
    if (double(mass) >= double(min_p) * 1099511627776.0) likely += mass;
  }
  total = block_sum(s, total);
  u64 kept = block_sum(s, likely);
  if (top_p < 1.f) {
    u64 target = u64(double(top_p) * double(total));
    if (double(target) < double(top_p) * double(total)) target++;  // the mass before the last token is below top_p
    if (target < 1) target = 1;
    const u64 each = mass_of(reach(s, keys, limit, target, true, before));
    const u64 reached = before + (target - before + each - 1) / each * each;
    kept = reached < kept ? reached : kept;
  }
  u64 target = u64(chance * double(kept)) + 1;
  if (target > kept) target = kept;
  const u32 key = reach(s, keys, limit, target, true, before);
  u32 skip = u32((target - 1 - before) / mass_of(key));  // of the tokens with this key, in the order of their ids

  // Each thread counts its stretch of the vocabulary. The one whose stretch contains the token writes it.
  const int stretch = (V + THREADS - 1) / THREADS, begin = threadIdx.x * stretch, end = min(begin + stretch, V);
  u32 mine = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < BINS; i += THREADS) s.bins[i] = 0;
  __syncthreads();
  for (u32 i = threadIdx.x; i < s.kept; i += THREADS)
    if (keys[i] == key) atomicAdd(&s.bins[ids[i] / stretch], u64(1));
  __syncthreads();
  u32 earlier = 0;
  mine = u32(s.bins[threadIdx.x]);
  if (mine == 0) return;
  for (int w = 0; w < int(threadIdx.x); w++) earlier += u32(s.bins[w]);
  if (skip < earlier || skip >= earlier + mine) return;
  for (int i = begin; i < end; i++) {
    const float z = (top - logits[i]) / temperature;
    if (z < 60.f && u32(z * 67108864.f) == key && earlier++ == skip) *token = i;
  }
}
