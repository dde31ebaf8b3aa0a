// Many rows with the matrix instruction: two rows of activations times two rows of weights, 8 inputs at once: 32
// products where a dot product has 16. Few rows use the dot product.
//
// A strip's codes, unpacked: codes[k / 8][16 / 2][2][8]; a panel: x[k / 8][PANEL / 2][2][8].
#pragma once
#include "epilogue.h"

namespace {

constexpr int DEPTH = 8;

struct Peak {  // the sums of 2 rows of activations by 2 of weights
  static constexpr int ROOM = 1 << 20;
  I s;
  void clear() { s = vdupq_n_s32(0); }
  template <int>
  void add(Codes w, Quads x) {
    s = vmmlaq_s32(s, x, w);
  }
  void flush() {}
  I sum() const { return s; }
};

// A tile stores 8 inputs as two blocks of 4 rows by 4 inputs. Interleaving their words gives two blocks of 2 rows by 8.
template <Pass P>
inline void unpack(const uint8_t* q, const uint8_t* lower, int group, int, uint8_t* out) {
  for (int s = 0; s < group / 8; s++, q += 64, lower += 64)
    for (int v = 0; v < V; v++, out += 32) {
      const Codes c = codes(q + 16 * v), l = codes(lower + 16 * v);
      const I a = vreinterpretq_s32_s8(P == WIDE ? wide_low(c, l) : low(c));
      const I b = vreinterpretq_s32_s8(P == WIDE ? wide_high(c, l) : high(c));
      put_codes(out, vreinterpretq_s8_s32(vzip1q_s32(a, b)));
      put_codes(out + 16, vreinterpretq_s8_s32(vzip2q_s32(a, b)));
    }
}

// A group of one strip times the first R rows of a panel, an even number: acc (R, 16) += ...
template <Pass P, int R>
inline void micro(const uint8_t* u, int quadruples, const int8_t* x, const float* xs, const float* xsum, const F* scale,
                  const F* bias, float* acc) {
  Peak a[R / 2][2 * V];
  repeat<R / 2>([&](auto i) ALWAYS { repeat<2 * V>([&](auto j) ALWAYS { a[i.value][j.value].clear(); }); });
  int k = quadruples / 2;
  do {
    Quads pair[R / 2];
    repeat<R / 2>([&](auto i) ALWAYS { pair[i.value] = ld_quads(x + 16 * i.value); });
    repeat<2 * V>([&](auto j) ALWAYS {
      Codes w = codes(u + 16 * j.value);
      // otherwise all 8 are loaded first, and four sums are spilled to the stack
      __asm__ volatile("" : "+w"(w) : : "memory");
      repeat<R / 2>([&](auto i) ALWAYS { a[i.value][j.value].template add<0>(w, pair[i.value]); });
    });
    u += 16 * DEPTH, x += PANEL * DEPTH;
  } while (--k);
  repeat<R>([&](auto row) ALWAYS {
    constexpr int r = decltype(row)::value;
    const F s = set1(xs[r]), m = set1(xsum[r]);
    repeat<V>([&](auto vector) ALWAYS {
      constexpr int v = decltype(vector)::value;
      const int64x2_t one = vreinterpretq_s64_s32(a[r / 2][2 * v].sum());
      const int64x2_t two = vreinterpretq_s64_s32(a[r / 2][2 * v + 1].sum());
      const F d = to_float(vreinterpretq_s32_s64(r % 2 ? vzip2q_s64(one, two) : vzip1q_s64(one, two)));
      float* o = acc + r * 16 + v * W;
      st(o, fma(d, mul(scale[v], s), fma(bias[v], m, ld(o))));
    });
  });
}

}  // namespace
