// One to eight rows of activations times a weight in tiles, on tensor cores: y (rows, N) = x (rows, K) wᵀ.
//
// Why tensor cores for one row: on an H200 (4.8 TB/s, 132 SMs at 1.75 GHz) an SM must take 41 four-bit weights
// a clock, and it issues 128 lane-instructions a clock: 3.1 a weight. Turning codes into halves and multiplying
// by fma costs 2.1. Here a warp-wide mma takes 8 weights a lane: per 64 weights of a lane (a unit) there are
// 2 loads of codes, 4 of activations, 40 logical operations, 16 mma, 18 for each group and about 10 for
// addresses: 90 / 64 = 1.4 a weight at G = 128, 45 % of what the SM can issue. Orin: 28 weights a clock, 4.6
// instructions a weight, more room still. Eight rows cost what one costs: an mma has eight columns.
//
// Bandwidth: every load of codes is 512 contiguous bytes a warp. A block holds 8 warps x 32 lanes x 128 bytes of
// codes in flight = 32 KiB, two blocks an SM: 64 KiB, and 4.8 TB/s x 0.8 us / 132 = 29 KiB are needed. N / 16
// blocks: 256 at N = 4096 on 2 x 132 places (97 % even). The eight warps of a block take every eighth unit of K
// and add their sums in a fixed order: results do not depend on timing.
//
// Arithmetic: codes stay offset (1024 + q, exact in a half); sums of products in float32 within a group; a
// second mma with a matrix of ones gives the sum of x in the same place, so that
//     y += scale * sum((1024 + q) x) + (bias - 1024 scale) * sum(x).
// The offset costs log2(1024 / 7.5) = 7 of float32's 24 bits: 2^-17, under a half's 2^-11.
//
// x is half, K % 32 == 0, rows of x are K apart and 16-byte aligned; y is float32.

constexpr int WARPS = 8, THREADS = 32 * WARPS;

// This warp's share of TILES tiles, added to y[TILES][4] (an mma's c).
template <int TILES>
DEVICE void multiply(const uint4* codes, const uint2* scales, const int (&tile)[TILES], const u16* x, int K, int rows,
                     float (&y)[TILES][4]) {
  constexpr int REGISTERS = TILES * (4 * LOADS + 2 * GROUPS);                      // a unit's codes and scales
  constexpr int AHEAD = REGISTERS > 56 ? 1 : REGISTERS < 14 ? 4 : 56 / REGISTERS;  // units on their way
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, units = (K + 127) / 128;
  const u32 one[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
  uint4 coming[AHEAD][TILES][LOADS];
  uint2 scaling[AHEAD][TILES][GROUPS];

  auto fetch = [&](int slot, int unit) {
    if (unit >= units) return;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      const uint4* from = codes + unit_at(tile[n], unit, units) + lane;
#pragma unroll
      for (int i = 0; i < LOADS; i++) coming[slot][n][i] = load_stream(from + 32 * i);
#pragma unroll
      for (int i = 0; i < GROUPS; i++) scaling[slot][n][i] = scales[group_at(tile[n], unit * GROUPS + i, units) + g];
    }
  };
#pragma unroll
  for (int slot = 0; slot < AHEAD; slot++) fetch(slot, threadIdx.x / 32 + slot * WARPS);

  for (int first = threadIdx.x / 32; first < units; first += WARPS * AHEAD) {
#pragma unroll
    for (int slot = 0; slot < AHEAD; slot++) {
      const int unit = first + slot * WARPS;
      if (unit >= units) break;  // the same for all lanes
      uint4 in[4];
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const int k = unit * 128 + c * 32 + t * 8;
        in[c] = g < rows && k < K ? *reinterpret_cast<const uint4*>(x + size_t(g) * K + k) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int group = 0; group < GROUPS; group++) {
        float sum[4] = {0.f, 0.f, 0.f, 0.f}, part[TILES][4];
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) part[n][i] = 0.f;
#pragma unroll
        for (int c = group * (GROUP / 32); c < (group + 1) * (GROUP / 32); c++)
#pragma unroll
          for (int j = 0; j < 2; j++) {
            const u32 b0 = j ? in[c].z : in[c].x, b1 = j ? in[c].w : in[c].y;
            mma(sum, one, b0, b1);
#pragma unroll
            for (int n = 0; n < TILES; n++) {
              u32 a[4];
              operand(a, coming[slot][n], c, j);
              mma(part[n], a, b0, b1);
            }
          }
#pragma unroll
        for (int n = 0; n < TILES; n++) {
          const uint2 s = scaling[slot][n][group];
          const float top = low(s.x), bottom = low(s.y);
          const float top_bias = fmaf(-float(OFFSET), top, high(s.x));
          const float bottom_bias = fmaf(-float(OFFSET_HIGH), bottom, high(s.y));
          y[n][0] = fmaf(top, part[n][0], fmaf(top_bias, sum[0], y[n][0]));
          y[n][1] = fmaf(top, part[n][1], fmaf(top_bias, sum[1], y[n][1]));
          y[n][2] = fmaf(bottom, part[n][2], fmaf(bottom_bias, sum[0], y[n][2]));
          y[n][3] = fmaf(bottom, part[n][3], fmaf(bottom_bias, sum[1], y[n][3]));
        }
      }
      fetch(slot, unit + WARPS * AHEAD);
    }
  }
}

// The eight warps' sums -> those of output `at` = 32 i + lane of each tile (i indexes an mma's c).
template <int TILES>
DEVICE void gather(float (&shared)[WARPS][TILES][128], const float (&y)[TILES][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < TILES; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) shared[threadIdx.x / 32][n][32 * i + lane] = y[n][i];
  __syncthreads();
}
template <int TILES>
DEVICE float total(const float (&shared)[WARPS][TILES][128], int n, int at) {
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) sum += shared[w][n][at];
  return sum;
}
DEVICE int row_of(int at) {
  return at % 32 / 4 + 8 * (at / 64);
}
DEVICE int column_of(int at) {
  return 2 * (at % 4) + at / 32 % 2;
}

// y = x wᵀ [+ bias] [+ residual]. Grid: tiles. bias (N), residual (rows, N) may be null.
KERNEL(256, 2)
matvec(const uint4* codes, const uint2* scales, const u16* x, const float* bias, const float* residual, float* y, int N,
       int K, int rows) {
  __shared__ float shared[WARPS][1][128];
  float sums[1][4] = {};
  const int tile[1] = {int(blockIdx.x)};
  multiply<1>(codes, scales, tile, x, K, rows, sums);
  gather<1>(shared, sums);
  const int at = threadIdx.x, n = blockIdx.x * 16 + row_of(at), row = column_of(at);
  if (at >= 128 || n >= N || row >= rows) return;
  float sum = total<1>(shared, 0, at);
  if (bias) sum += bias[n];
  if (residual) sum += residual[size_t(row) * N + n];
  y[size_t(row) * N + n] = sum;
}

// y (rows, F) half = act(gate) * up, gate the weight's first F rows, up the rest. Grid: F / 16; F % 16 == 0.
KERNEL(256, 2)
matvec_glu(const uint4* codes, const uint2* scales, const u16* x, const float* bias, u16* y, int F, int K, int rows,
           int act) {
  __shared__ float shared[WARPS][2][128];
  float sums[2][4] = {};
  const int tile[2] = {int(blockIdx.x), int(blockIdx.x) + F / 16};
  multiply<2>(codes, scales, tile, x, K, rows, sums);
  gather<2>(shared, sums);
  const int at = threadIdx.x, n = blockIdx.x * 16 + row_of(at), row = column_of(at);
  if (at >= 128 || row >= rows) return;
  float gate = total<2>(shared, 0, at), up = total<2>(shared, 1, at);
  if (bias) gate += bias[n], up += bias[F + n];
  y[size_t(row) * F + n] = to_half(activation(gate, act) * up);
}
