// Row-wise kernels: norms, rotary positions. Statistics and angles are float32.

DEVICE float block_sum(float v, float* shared) {  // every thread gets the sum; at most 32 warps
#pragma unroll
  for (int o = 16; o; o /= 2) v += SHUFFLE_XOR(v, o);
  __syncthreads();  // all threads have read the last call's values
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0.f;
  for (int w = 0; w < int(blockDim.x / 32); w++) sum += shared[w];
  return sum;
}

// RMSNorm (layer 0) or LayerNorm (layer 1) of x (T, H, C) with row stride `stride` and head stride C. Exactly one of
// y_half, y_float (T, H, C) is not null. bias may be null. Grid: (H, T); threads % 32 == 0.
KERNEL(1024, 1)
norm_rows(const float* x, const float* weight, const float* bias, u16* y_half, float* y_float, int C, int stride,
          float eps, int layer) {
  __shared__ float shared[32];
  const float* in = x + size_t(blockIdx.y) * stride + size_t(blockIdx.x) * C;
  float sum = 0.f, mean = 0.f;
  if (layer) {
    for (int i = threadIdx.x; i < C; i += blockDim.x) sum += in[i];
    mean = block_sum(sum, shared) / C;
  }
  sum = 0.f;
  for (int i = threadIdx.x; i < C; i += blockDim.x) sum += (in[i] - mean) * (in[i] - mean);
  const float scale = rsqrtf(block_sum(sum, shared) / C + eps);
  const size_t out = (size_t(blockIdx.y) * gridDim.x + blockIdx.x) * C;
  for (int i = threadIdx.x; i < C; i += blockDim.x) {
    const float v = (in[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0.f);
    if (y_half)
      y_half[out + i] = to_half(v);
    else
      y_float[out + i] = v;
  }
}

// y (T, H, D) = x (T, H, D) with row stride `stride`, its first 2 · half inputs rotated by positions (T). Grid: (H, T),
// threads D rounded up to 32. y must not be x.
KERNEL(1024, 1)
rope_rows(const float* x, const float* inv_freq, const int* positions, float* y, int D, int half, int stride,
          float factor, int interleaved) {
  const float* in = x + size_t(blockIdx.y) * stride + size_t(blockIdx.x) * D;
  const int d = threadIdx.x;
  if (d >= D) return;
  y[(size_t(blockIdx.y) * gridDim.x + blockIdx.x) * D + d] =
      turned(in, d, inv_freq, half, factor, interleaved, positions[blockIdx.y]);
}

// y (T, F) half = act(gate) * up; x (T, 2F) half, gate first. Grid: (ceil(F / 256), T), 256 threads.
KERNEL(256, 2) glu_rows(const u16* x, u16* y, int F, int act) {
  const int f = blockIdx.x * 256 + threadIdx.x;
  if (f >= F) return;
  const u16* in = x + size_t(blockIdx.y) * 2 * F;
  y[size_t(blockIdx.y) * F + f] = to_half(activation(from_half(in[f]), act) * from_half(in[F + f]));
}

// Each row's k best experts, best first, the lower index of equal ones: choice (T, k), share (T, shares) the softmax
// over the E logits; normalise: over those of the k. shares > k: the last is the sigmoid of logit E. Row stride of the
// logits: `stride`. E <= 1024. Grid: T, 32 threads.
KERNEL(32, 1)
route_rows(const float* logits, int* choice, float* share, int E, int k, int shares, int stride, int normalise) {
  const float* in = logits + size_t(blockIdx.x) * stride;
  const int lane = threadIdx.x;
  float top = -INFINITE, all = 0.f, sum = 0.f;
  for (int e = lane; e < E; e += 32) top = fmaxf(top, in[e]);
#pragma unroll
  for (int o = 16; o; o /= 2) top = fmaxf(top, SHUFFLE_XOR(top, o));
  for (int e = lane; e < E; e += 32) all += expf(in[e] - top);
#pragma unroll
  for (int o = 16; o; o /= 2) all += SHUFFLE_XOR(all, o);
  float* out = share + size_t(blockIdx.x) * shares;
  u32 taken = 0;
  for (int i = 0; i < k; i++) {
    float value = -INFINITE;
    int best = E;  // of no expert; all lanes together always find one, also among NaN
    for (int e = lane, bit = 0; e < E; e += 32, bit++) {
      const float v = in[e] == in[e] ? in[e] : -INFINITE;
      if (!(taken >> bit & 1) && (v > value || (v == value && e < best))) value = v, best = e;
    }
#pragma unroll
    for (int o = 16; o; o /= 2) {
      const float v = SHUFFLE_XOR(value, o);
      const int e = SHUFFLE_XOR(best, o);
      if (v > value || (v == value && e < best)) value = v, best = e;
    }
    if (best % 32 == lane) taken |= 1u << (best / 32);
    const float p = expf(in[best] - top) / all;
    sum += p;
    if (lane == 0) choice[size_t(blockIdx.x) * k + i] = best, out[i] = p;
  }
  if (lane != 0) return;
  if (normalise)
    for (int i = 0; i < k; i++) out[i] /= sum;
  if (shares > k) out[k] = 1.f / (1.f + expf(-in[E]));
}

// y (T, N) = [residual +] the sum over slots of share * z[place] [+ the last share * other (T, N)]. z (P, N) half,
// place (T, slots): indices of a row's results. Grid: (ceil(N / 256), T), 256 threads.
KERNEL(256, 2)
combine_rows(const u16* z, const int* place, const float* share, const float* other, const float* residual, float* y,
             int N, int slots, int shares) {
  const int n = blockIdx.x * 256 + threadIdx.x, row = blockIdx.y;
  if (n >= N) return;
  const float* weight = share + size_t(row) * shares;
  float sum = 0.f;
  for (int s = 0; s < slots; s++)
    sum = fmaf(weight[s], from_half(z[size_t(place[size_t(row) * slots + s]) * N + n]), sum);
  const size_t at = size_t(row) * N + n;
  if (other) sum = fmaf(weight[slots], other[at], sum);
  if (residual) sum += residual[at];
  y[at] = sum;
}
