// The chosen experts of up to eight rows. Weights are found on the device by expert number.
//
// weights has three addresses per expert: codes, scales, bias (or 0). All experts have one shape and form. choice
// (rows, slots) are experts; share (rows, shares) their factors, with that of the shared expert last if shares > slots.
// A table of addresses costs a dependent read of about 0.5 us per block, which a stack of weights avoids. But building
// a stack needs memory for all of a layer's experts a second time.
//
// Arithmetic and layout: matvec.cu.

constexpr int MOST_SLOTS = 32;

struct Chosen {
  const uint4* codes;
  const uint2* scales;
  const float* bias;
  float share;
};

DEVICE Chosen chosen(const u64* weights, int expert, float share) {
  const u64* w = weights + 3 * size_t(expert);
  return {reinterpret_cast<const uint4*>(w[0]), reinterpret_cast<const uint2*>(w[1]),
          reinterpret_cast<const float*>(w[2]), share};
}

// The weights of all slots concatenated along K: as many units in flight as for one weight of that size.
struct Several {
  const Chosen* slot;
  const u16* x;  // (slots, K)
  int K, slots;
  DEVICE Piece piece(int at, int units) const {
    const int s = at / units;
    return {slot[s].codes, slot[s].scales, x + size_t(s) * K, at - s * units, slot[s].share};
  }
  DEVICE int pieces(int units) const { return slots * units; }
};

// h (rows, slots, F) half = act(gate) * up of x (rows, K). gate: the weight's first F rows, up: the rest.
// Grid: (F / 16, rows * slots), F % 16 == 0.
KERNEL(256, 2)
experts_up(const u64* weights, const int* choice, const u16* x, u16* h, int F, int K, int slots, int act) {
  __shared__ float shared[WARPS][2][128];
  const Chosen w = chosen(weights, choice[blockIdx.y], 1.f);
  float sums[2][4] = {};
  const int tile[2] = {int(blockIdx.x), int(blockIdx.x) + F / 16};
  multiply<2>(Whole{w.codes, w.scales, x + size_t(blockIdx.y / slots) * K}, tile, K, 1, sums);
  gather<2>(shared, sums);
  const int at = threadIdx.x, n = blockIdx.x * 16 + row_of(at);
  if (at >= 128 || column_of(at) != 0) return;
  float gate = total<2>(shared, 0, at), up = total<2>(shared, 1, at);
  if (w.bias) gate += w.bias[n], up += w.bias[F + n];
  h[size_t(blockIdx.y) * F + n] = to_half(activation(gate, act) * up);
}

// y (rows, N) = [residual +] the sum over slots of share * (w h + bias) [+ the last share * other (rows, N)].
// Grid: (tiles, rows). h (rows, slots, K) half.
KERNEL(256, 2)
experts_down(const u64* weights, const int* choice, const float* share, const u16* h, const float* other,
             const float* residual, float* y, int N, int K, int slots, int shares) {
  __shared__ float shared[WARPS][1][128];
  __shared__ Chosen slot[MOST_SLOTS];
  const int row = blockIdx.y;
  if (int(threadIdx.x) < slots)
    slot[threadIdx.x] = chosen(weights, choice[row * slots + threadIdx.x], share[row * shares + threadIdx.x]);
  __syncthreads();
  float sums[1][4] = {};
  const int tile[1] = {int(blockIdx.x)};
  multiply<1>(Several{slot, h + size_t(row) * slots * K, K, slots}, tile, K, 1, sums);
  gather<1>(shared, sums);
  const int at = threadIdx.x, n = blockIdx.x * 16 + row_of(at);
  if (at >= 128 || n >= N || column_of(at) != 0) return;
  float sum = total<1>(shared, 0, at);
  for (int s = 0; s < slots; s++)
    if (slot[s].bias) sum = fmaf(slot[s].share, slot[s].bias[n], sum);
  if (other) sum = fmaf(share[row * shares + slots], other[size_t(row) * N + n], sum);
  if (residual) sum += residual[size_t(row) * N + n];
  y[size_t(row) * N + n] = sum;
}
