// Multiplies many rows of activations with a tiled weight: y (T, N) = x (T, K) wᵀ, on tensor cores.
//
// A block computes 128 outputs of 128 rows with eight warps, each 32 outputs of 64 rows. Codes go from global memory
// directly to the registers of the warp that needs them, already in mma order, and are converted to halves there: q -
// offset (exact), then scale * q + bias, rounded once, like a dequantised fp16 weight. Activations go through shared
// memory in three stages of 64 inputs (3 x 16 KiB, the maximum of a block without opting in to more), copied
// asynchronously. They are stored in planes of 32 inputs, 64 bytes per row, so that the eight lanes of one phase of a
// 16-byte read touch all 32 banks once, and one such read is the B operand of two mma.
//
// Per 64 inputs a warp executes 64 mma, 16 reads of shared memory, 2 of codes and about 2 x 52 operations on codes. The
// tensor cores are the limit (on an H200 2 clocks per mma and SM, 8 warps: 1024 clocks; the codes of two warps per
// scheduler take 416 issue slots). Intended for 9 to about 256 rows; above that, unpack.cu and cuBLAS are faster.

constexpr int STAGES = 3, ROWS = 128, OUTPUTS = 128, PLANE = ROWS * 4;  // in 16 bytes

// Rows first_row .. first_row + 127 below T. from: row r reads row from[r] of x; null: row r.
DEVICE void multiply(uint4 (&staged)[STAGES][2][PLANE], const uint4* codes, const uint2* scales, const u16* x,
                     const int* from, const float* bias, const float* residual, u16* y_half, float* y_float, int N,
                     int K, int first_row, int T) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int tiles = (N + 15) / 16, units = (K + 127) / 128, steps = units * 2;
  const int first_tile = blockIdx.x * (OUTPUTS / 16) + warp % 4 * 2;
  const int row_base = warp / 4 * 64;
  constexpr int HALF_LOADS = LOADS / 2;  // of 64 inputs
  constexpr int HALF_GROUPS = GROUP == 32 ? 2 : 1;

  auto stage = [&](int step) {  // 128 rows x 64 inputs: 1024 pieces of 16 bytes
    if (step < steps)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int piece = threadIdx.x + 256 * i, row = piece / 8, part = piece % 8, k = step * 64 + part * 8;
        const bool full = first_row + row < T && k < K;
        const int row_of_x = full && from ? from[first_row + row] : first_row + row;
        copy_async(&staged[step % STAGES][part / 4][row * 4 + part % 4], full ? x + size_t(row_of_x) * K + k : x, full);
      }
    copy_commit();
  };
  uint4 coming[2][HALF_LOADS];
  uint2 scaling[2][HALF_GROUPS];
  auto fetch = [&](int step) {
    if (step >= steps) return;
#pragma unroll
    for (int m = 0; m < 2; m++) {
      const int tile = min(first_tile + m, tiles - 1);  // beyond the edge any valid tile is read
      const uint4* from = codes + unit_at(tile, step / 2, units) + step % 2 * HALF_LOADS * 32 + lane;
#pragma unroll
      for (int i = 0; i < HALF_LOADS; i++) coming[m][i] = from[32 * i];
#pragma unroll
      for (int i = 0; i < HALF_GROUPS; i++)
        scaling[m][i] = scales[group_at(tile, (step * 64 + i * 32) / GROUP, units) + g];
    }
  };

  float sum[2][8][4] = {};
  stage(0);
  stage(1);
  fetch(0);
  for (int step = 0; step < steps; step++) {
    copy_wait<1>();
    __syncthreads();  // all copies of this step have arrived, and all warps have finished the previous step
    stage(step + 2);
    uint4 here[2][LOADS];  // `operand` counts from the unit's start; only this half is filled
    uint2 scale[2][HALF_GROUPS];
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
      for (int i = 0; i < HALF_LOADS; i++) here[m][i] = coming[m][i];
#pragma unroll
      for (int i = 0; i < HALF_GROUPS; i++) scale[m][i] = scaling[m][i];
    }
    fetch(step + 1);
#pragma unroll
    for (int c = 0; c < 2; c++) {
      u32 a[2][2][4];
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          operand(a[m][j], here[m], c, j);
          const uint2 s = scale[m][c % HALF_GROUPS];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const u32 pairs = i % 2 ? s.y : s.x, offset = i % 2 && BITS == 4 ? 0x54005400u : 0x64006400u;
            a[m][j][i] = fma2(sub2(a[m][j][i], offset), bytes(pairs, 0, 0x1010), bytes(pairs, 0, 0x3232));
          }
        }
#pragma unroll
      for (int n = 0; n < 8; n++) {
        const uint4 b = staged[step % STAGES][c][(row_base + n * 8 + g) * 4 + t];
#pragma unroll
        for (int m = 0; m < 2; m++) {
          mma(sum[m][n], a[m][0], b.x, b.y);
          mma(sum[m][n], a[m][1], b.z, b.w);
        }
      }
    }
  }

#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int out = (first_tile + m) * 16 + g + 8 * (i / 2), row = first_row + row_base + n * 8 + 2 * t + i % 2;
        if (out >= N || row >= T) continue;
        const size_t at = size_t(row) * N + out;
        float value = sum[m][n][i];
        if (bias) value += bias[out];
        if (residual) value += residual[at];
        if (y_half)
          y_half[at] = to_half(value);
        else
          y_float[at] = value;
      }
}

// Grid (ceil(N / 128), ceil(T / 128)), 256 threads. bias (N), residual (T, N) float may be null. Exactly one of y_half,
// y_float is not null. K % 32 == 0; x is 16-byte aligned. N % 2 == 0 if y_half is used.
KERNEL(256, 1)
gemm(const uint4* codes, const uint2* scales, const u16* x, const float* bias, const float* residual, u16* y_half,
     float* y_float, int N, int K, int T) {
  __shared__ uint4 staged[STAGES][2][PLANE];
  multiply(staged, codes, scales, x, nullptr, bias, residual, y_half, y_float, N, K, blockIdx.y * ROWS, T);
}

// Rows sorted by expert: y (P, N) half, row p by expert e with first[e] <= p < first[e + 1]. from (P): row p reads row
// from[p] of x; null: row p. weights: three addresses per expert: codes, scales, bias or 0. Block (., b) computes the
// b-th piece of 128 rows; expert e has pieces[e] .. pieces[e + 1]. Their number is known only on the device, so the
// grid is at most (ceil(N / 128), P / 128 + experts), and blocks beyond the last piece return at once.
KERNEL(256, 1)
gemm_experts(const u64* weights, const int* first, const int* pieces, const int* from, const u16* x, u16* y, int N,
             int K, int experts) {
  __shared__ uint4 staged[STAGES][2][PLANE];
  const int at = blockIdx.y;
  if (at >= pieces[experts]) return;
  int e = 0, end = experts;  // the expert with pieces[e] <= at < pieces[e + 1]
  while (end - e > 1) {
    const int middle = (e + end) / 2;
    if (pieces[middle] <= at)
      e = middle;
    else
      end = middle;
  }
  const u64* w = weights + 3 * size_t(e);
  multiply(staged, reinterpret_cast<const uint4*>(w[0]), reinterpret_cast<const uint2*>(w[1]), x, from,
           reinterpret_cast<const float*>(w[2]), nullptr, y, nullptr, N, K, first[e] + (at - pieces[e]) * ROWS,
           first[e + 1]);
}
