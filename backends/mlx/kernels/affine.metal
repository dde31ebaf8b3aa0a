// Reads MLX's affine layout, and defines activations: the header of every kernel here. ASCII only, for Apple's
// compiler.
//
// w (N, K * BITS / 32) uint32, codes of a word from the lowest bits up:
//     BITS 4   word c:  | 8c+7 | 8c+6 | ... | 8c+1 | 8c |      four bits each
//     BITS 8   word c:  | 4c+3 | 4c+2 | 4c+1 | 4c |            eight bits each
// scales, biases (N, K / G): the weight is code * scale + bias.
//
// Words are loaded several at once as packed vectors, which only need a word's alignment: a weight in a mapped file can
// start at any word.
//
// The launcher defines BITS, ROWS, NORM, GLU, ACT, BIAS and RESIDUAL above this text; for half of a head's codes BITS,
// NORM and UPPER or LOWER. G and T are templates.

// Loops over registers must be unrolled, or the compiler may put an indexed array into memory.
#define UNROLLED _Pragma("clang loop unroll(full)")

#if BITS == 4
// A 16-bit word has four codes. Masked in place they are 1, 16, 256 and 4096 times too large, so the inputs are divided
// by that beforehand (exact in float), and nothing is shifted.
inline float prescale(int i) {
  return i % 4 == 0 ? 1.0f : i % 4 == 1 ? 1.0f / 16 : i % 4 == 2 ? 1.0f / 256 : 1.0f / 4096;
}
// codes of 16 inputs (one load of 8 bytes) times prescaled inputs
inline float dot16(const device uint32_t* w, const thread float* x) {
  const uint2 words = uint2(*(const device packed_uint2*)w);
  float a = 0;
  UNROLLED for (int i = 0; i < 4; i++) {
    const uint half_word = ((i < 2 ? words.x : words.y) >> (16 * (i % 2))) & 0xffff;
    a += float(half_word & 0x000f) * x[4 * i] + float(half_word & 0x00f0) * x[4 * i + 1] +
         float(half_word & 0x0f00) * x[4 * i + 2] + float(half_word & 0xf000) * x[4 * i + 3];
  }
  return a;
}
#else
inline float prescale(int) {
  return 1.0f;
}
// codes of 16 inputs (one load of 16 bytes) times inputs
inline float dot16(const device uint32_t* w, const thread float* x) {
  const uint4 words = uint4(*(const device packed_uint4*)w);
  float a = 0;
  UNROLLED for (int i = 0; i < 4; i++) {
    const uint word = i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
    UNROLLED for (int j = 0; j < 4; j++) a += float((word >> (8 * j)) & 0xff) * x[4 * i + j];
  }
  return a;
}
#endif

// Code i of eight consecutive ones.
inline float code8(const device uint32_t* w, int i) {
  return float((w[i * BITS / 32] >> (i * BITS % 32)) & ((1u << BITS) - 1));
}

inline float act(float x) {
#if ACT == 0  // silu
  return x / (1.0f + metal::exp(-x));
#elif ACT == 1  // gelu_tanh; fast tanh is NaN for large inputs
  return 0.5f * x * (1.0f + metal::precise::tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
#elif ACT == 2  // relu
  return metal::max(x, 0.0f);
#else           // relu2
  const float y = metal::max(x, 0.0f);
  return y * y;
#endif
}
