// The machine's limits with these vectors: memory bandwidth and int8 dot products.
#pragma once
#include "linear_int.h"
#include "pool.h"

namespace {

// Reads every byte once, in stretches that threads claim, through the dot product unit: one product per load.
inline void probe_read(const ProbeOp& op, const Worker& me) {
  constexpr int64_t STRETCH = 1 << 20;
  constexpr int N = 4;
  Acc<false> a[N];
  repeat<N>([&](auto n) ALWAYS { a[n.value].clear(); });
  const int8_t ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  const Quads x = ld_quads(ones);
  const int pieces = (int)(op.bytes / STRETCH);
  for (int i; (i = pool_take(me, 1)) < pieces;)
    for (const uint8_t *p = op.data + i * STRETCH, *end = p + STRETCH; p < end; p += 4 * W * N)
      repeat<N>([&](auto n) ALWAYS { a[n.value].template add<0>(codes(p + 4 * W * n.value), x); });
  repeat<N>([&](auto n) ALWAYS {
    a[n.value].flush();
    *op.sink += sum_of(to_float(a[n.value].sum()));
  });
}

// As many sums as in the many-row kernel, with operands in registers.
inline void probe_dots(const ProbeOp& op) {
  using A = Peak;
  A a[PANEL][NV];
  repeat<PANEL>([&](auto p) ALWAYS { repeat<NV>([&](auto v) ALWAYS { a[p.value][v.value].clear(); }); });
  alignas(64) uint8_t w[4 * W] = {1};
  const int8_t x[16 * 4] = {1};
  Codes c = codes(w);
  const Quads q = ld_quads(x);
  in_runs<A::ROOM>(
      (int)op.work * 16,
      [&](int) ALWAYS {
        repeat<PANEL>([&](auto p) ALWAYS {
          repeat<NV>([&](auto v) ALWAYS {
            hide(c);  // otherwise the product is computed once for all
            a[p.value][v.value].template add<0>(c, q);
          });
        });
      },
      [&]() ALWAYS {
        repeat<PANEL>([&](auto p) ALWAYS { repeat<NV>([&](auto v) ALWAYS { a[p.value][v.value].flush(); }); });
      });
  *op.dots = op.work * 16 * PANEL * NV * W * DEPTH * 2;
  repeat<PANEL>([&](auto p) ALWAYS {
    repeat<NV>([&](auto v) ALWAYS { *op.sink += sum_of(to_float(a[p.value][v.value].sum())); });
  });
}

void probe_op(const ProbeOp& op, const Worker& me) {
  op.data ? probe_read(op, me) : probe_dots(op);
}

}  // namespace
