// Multiplies one to eight rows of activations with a tiled weight, on tensor cores: y (rows, N) = x (rows, K) wᵀ.
//
// Reason for tensor cores with one row: on an H200 (4.8 TB/s, 132 SMs at 1.75 GHz) an SM must process 41 four-bit
// weights per clock and issues 128 lane-instructions per clock: 3.1 per weight. Converting codes to halves and
// multiplying with fma costs 2.1. A warp-wide mma processes 8 weights per lane. Per 64 weights of a lane (a unit) there
// are 2 loads of codes, 4 of activations, 40 logical operations, 16 mma, 18 per group and about 10 for addresses: 90 /
// 64 = 1.4 per weight at G = 128, 45 % of what the SM can issue. Orin: 28 weights per clock, 4.6 instructions per
// weight, which leaves more room. Eight rows cost the same as one, because an mma has eight columns.
//
// Bandwidth: every load of codes is 512 contiguous bytes per warp. A block has 8 warps x 32 lanes x 128 bytes of codes
// in flight = 32 KiB, with two blocks per SM 64 KiB; 4.8 TB/s x 0.8 us / 132 = 29 KiB are needed. N / 16 blocks: 256 at
// N = 4096 on 2 x 132 places (97 % used). The eight warps of a block process every eighth unit of K and add their sums
// in a fixed order, so results do not depend on timing.
//
// Arithmetic: codes stay offset (1024 + q, exact in a half). Sums of products are float32 within a group. A second mma
// with a matrix of ones gives the sum of x in the same place, so that
//     y += scale * sum((1024 + q) x) + (bias - 1024 scale) * sum(x).
// The offset costs log2(1024 / 7.5) = 7 of float32's 24 bits: 2^-17, less than a half's 2^-11.
//
// x is half, K % 32 == 0, rows of x have a stride of K and are 16-byte aligned; y is float32.

// y = x wᵀ [+ bias] [+ residual]. Grid: tiles. bias (N), residual (rows, N) may be null.
KERNEL(256, 2)
matvec(const uint4* codes, const uint2* scales, const u16* x, const float* bias, const float* residual, float* y, int N,
       int K, int rows) {
  __shared__ float shared[WARPS][1][128];
  float sums[1][4] = {};
  const int tile[1] = {int(blockIdx.x)};
  multiply<1>(Whole{codes, scales, x}, tile, K, rows, sums);
  gather<1>(shared, sums);
  const int at = threadIdx.x, n = blockIdx.x * 16 + row_of(at), row = column_of(at);
  if (at >= 128 || n >= N || row >= rows) return;
  float sum = total<1>(shared, 0, at);
  if (bias) sum += bias[n];
  if (residual) sum += residual[size_t(row) * N + n];
  y[size_t(row) * N + n] = sum;
}

// y (rows, F) half = act(gate) * up. gate: the weight's first F rows, up: the rest. Grid: F / 16; F % 16 == 0.
KERNEL(256, 2)
matvec_glu(const uint4* codes, const uint2* scales, const u16* x, const float* bias, u16* y, int F, int K, int rows,
           int act) {
  __shared__ float shared[WARPS][2][128];
  float sums[2][4] = {};
  const int tile[2] = {int(blockIdx.x), int(blockIdx.x) + F / 16};
  multiply<2>(Whole{codes, scales, x}, tile, K, rows, sums);
  gather<2>(shared, sums);
  const int at = threadIdx.x, n = blockIdx.x * 16 + row_of(at), row = column_of(at);
  if (at >= 128 || row >= rows) return;
  float gate = total<2>(shared, 0, at), up = total<2>(shared, 1, at);
  if (bias) gate += bias[n], up += bias[F + n];
  y[size_t(row) * F + n] = to_half(activation(gate, act) * up);
}
