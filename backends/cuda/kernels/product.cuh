// One to eight rows of activations times tiles of a weight, distributed among a block's warps: the loop that matvec.cu
// describes, and the sums of its warps.
#pragma once

constexpr int WARPS = 8, THREADS = 32 * WARPS;

// A unit's codes, scales and activations (row stride K), and the factor of its products.
struct Piece {
  const uint4* codes;
  const uint2* scales;
  const u16* x;
  int unit;
  float share;
};

// One weight: `units` pieces.
struct Whole {
  const uint4* codes;
  const uint2* scales;
  const u16* x;
  DEVICE Piece piece(int at, int) const { return {codes, scales, x, at, 1.f}; }
  DEVICE int pieces(int units) const { return units; }
};

// This warp's share of TILES tiles, added to y[TILES][4] (an mma's c).
template <int TILES, class Source>
DEVICE void multiply(const Source& source, const int (&tile)[TILES], int K, int rows, float (&y)[TILES][4]) {
  constexpr int REGISTERS = TILES * (4 * LOADS + 2 * GROUPS);                      // a unit's codes and scales
  constexpr int AHEAD = REGISTERS > 56 ? 1 : REGISTERS < 14 ? 4 : 56 / REGISTERS;  // units in flight
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, units = (K + 127) / 128;
  const int pieces = source.pieces(units);
  const u32 one[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
  uint4 coming[AHEAD][TILES][LOADS];
  uint2 scaling[AHEAD][TILES][GROUPS];

  auto fetch = [&](int slot, int at) {
    if (at >= pieces) return;
    const Piece p = source.piece(at, units);
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      const uint4* from = p.codes + unit_at(tile[n], p.unit, units) + lane;
#pragma unroll
      for (int i = 0; i < LOADS; i++) coming[slot][n][i] = load_stream(from + 32 * i);
#pragma unroll
      for (int i = 0; i < GROUPS; i++)
        scaling[slot][n][i] = p.scales[group_at(tile[n], p.unit * GROUPS + i, units) + g];
    }
  };
#pragma unroll
  for (int slot = 0; slot < AHEAD; slot++) fetch(slot, threadIdx.x / 32 + slot * WARPS);

  for (int first = threadIdx.x / 32; first < pieces; first += WARPS * AHEAD) {
#pragma unroll
    for (int slot = 0; slot < AHEAD; slot++) {
      const int at = first + slot * WARPS;
      if (at >= pieces) break;  // the same for all lanes
      const Piece p = source.piece(at, units);
      uint4 in[4];
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const int k = p.unit * 128 + c * 32 + t * 8;
        in[c] = g < rows && k < K ? *reinterpret_cast<const uint4*>(p.x + size_t(g) * K + k) : make_uint4(0, 0, 0, 0);
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
          const float top = p.share * low(s.x), bottom = p.share * low(s.y);
          const float top_bias = fmaf(-float(OFFSET), top, p.share * high(s.x));
          const float bottom_bias = fmaf(-float(OFFSET_HIGH), bottom, p.share * high(s.y));
          y[n][0] = fmaf(top, part[n][0], fmaf(top_bias, sum[0], y[n][0]));
          y[n][1] = fmaf(top, part[n][1], fmaf(top_bias, sum[1], y[n][1]));
          y[n][2] = fmaf(bottom, part[n][2], fmaf(bottom_bias, sum[0], y[n][2]));
          y[n][3] = fmaf(bottom, part[n][3], fmaf(bottom_bias, sum[1], y[n][3]));
        }
      }
      fetch(slot, at + WARPS * AHEAD);
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
