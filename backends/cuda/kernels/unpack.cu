// Converts weights in tiles back to numbers: rows of an embedding, and slabs of fp16 for a large prefill.

// y (tiles, 16, K) half: dequantises tiles first, first + 1, …, rounded once. Grid: (ceil(units / 8), tiles), 256
// threads: one warp per unit. Four lanes write 64 contiguous bytes of a row.
KERNEL(256, 2) dequantise(const uint4* codes, const uint2* scales, u16* y, int first, int K, int rows) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, units = (K + 127) / 128;
  const int unit = blockIdx.x * 8 + threadIdx.x / 32;
  if (unit >= units) return;
  const int tile = first + blockIdx.y;
  uint4 v[LOADS];
#pragma unroll
  for (int i = 0; i < LOADS; i++) v[i] = load_stream(codes + unit_at(tile, unit, units) + lane + 32 * i);
#pragma unroll
  for (int c = 0; c < 4; c++) {
    const int k = unit * 128 + c * 32 + t * 8;
    const uint2 s = scales[group_at(tile, unit * GROUPS + c * 32 / GROUP, units) + g];
    u32 out[2][4];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      u32 a[4];
      operand(a, v, c, j);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const u32 pairs = i % 2 ? s.y : s.x;
        const float scale = low(pairs), bias = high(pairs), offset = i % 2 ? OFFSET_HIGH : OFFSET;
        out[i % 2][2 * j + i / 2] = pair(fmaf(low(a[i]) - offset, scale, bias), fmaf(high(a[i]) - offset, scale, bias));
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = blockIdx.y * 16 + 8 * r + g;
      if (row < rows && k < K)
        *reinterpret_cast<uint4*>(y + size_t(row) * K + k) = make_uint4(out[r][0], out[r][1], out[r][2], out[r][3]);
    }
  }
}

// y (T, K) float = rows ids (T) of the table. Grid: (ceil(K / 256), T), 256 threads: one weight each.
KERNEL(256, 2) embed(const u32* codes, const u32* scales, const int* ids, float* y, int K) {
  const int k = blockIdx.x * 256 + threadIdx.x, units = (K + 127) / 128;
  if (k >= K) return;
  const int id = ids[blockIdx.y], tile = id / 16, r = id / 8 % 2, lane = id % 8 * 4 + k / 8 % 4;
  const int c = k / 32 % 4, j = k / 4 % 2, p = k / 2 % 2, e = k % 2;
  const u32* unit = codes + unit_at(tile, k / 128, units) * 4;
  u32 q;
  if (BITS == 4)
    q = unit[(c / 2 * 32 + lane) * 4 + 2 * (c % 2) + j] >> (4 * (4 * e + 2 * p + r)) & 15;
  else
    q = unit[(c * 32 + lane) * 4 + 2 * j + r] >> (8 * (2 * p + e)) & 255;
  const u32 s = scales[(group_at(tile, k / GROUP, units) + id % 8) * 2 + r];
  y[size_t(blockIdx.y) * K + k] = fmaf(float(q), low(s), high(s));
}
