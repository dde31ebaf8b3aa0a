// One decode step of a model of a given shape, as the list of ops that a recording of the graph contains.
#pragma once
#include <stdio.h>

#include "native.h"

struct Shape {
  const char* name;
  int layers, hidden, intermediate, heads, kv_heads, dim, vocab;
  bool qkv_bias;
};
#include "shapes_table.h"  // SHAPES, which CMake makes of tinychat_mlx/base/shapes.json

// All layers share the memory of one layer for everything but weights. The head is the embedding.
struct Token {
  Shape s;
  std::vector<std::unique_ptr<RandomWeight>> weights;
  std::vector<std::unique_ptr<uint8_t[]>> ops;
  std::vector<const Op*> list;
  std::vector<float> x, x2, qkv, y, h, ones, logits, table, partial;
  std::vector<uint16_t> cache;
  std::vector<int32_t> done;
  NormArg norm;
  SegmentArg segment;
  int64_t length;
  int32_t id = 3, position;
  size_t bytes = 0;

  Token(const Shape& shape, int group, int64_t held, int head_kind) : s(shape), length(held), position((int32_t)held) {
    Random random{1};
    const int q = s.heads * s.dim, kv = s.kv_heads * s.dim, capacity = (int)((held + 64) / 64 * 64);
    x.resize((size_t)s.hidden), x2 = x, qkv.resize((size_t)(q + 2 * kv)), y.resize((size_t)q);
    h.resize((size_t)s.intermediate), ones.assign((size_t)s.hidden, 1.f), logits.resize((size_t)s.vocab);
    table.assign((size_t)capacity * (size_t)s.dim, 0.5f), done.assign((size_t)s.kv_heads, 0);
    const size_t one = (size_t)s.kv_heads * (size_t)capacity * (size_t)s.dim;
    cache.assign(2 * one + 2048, half_of(0.1f));
    partial.resize((size_t)(s.kv_heads * (capacity / 256 + 1) * 32 * (s.dim + 18)));
    norm = {RMS, 1e-6f, ones.data(), nullptr};
    segment = {1,       capacity,       &length,    (uint8_t*)cache.data(), (uint8_t*)(cache.data() + one), nullptr,
               nullptr, partial.data(), done.data()};

    const Weight* head = weight(head_kind, s.vocab, s.hidden, group, false, random);
    EmbedOp& e = op<EmbedOp>(EMBED);
    e.ids = &id, e.table = head, e.y = x.data();
    for (int layer = 0; layer < s.layers; layer++) add_layer(group, q, kv, random);
    linear(head, x.data(), &norm, logits.data());
  }

 private:
  template <class T>
  T& op(int32_t code) {
    ops.emplace_back(new uint8_t[sizeof(T)]());
    list.push_back((const Op*)ops.back().get());
    T& t = *(T*)ops.back().get();
    t.code = code, t.rows = 1;
    return t;
  }
  const Weight* weight(int kind, int n, int k, int group, bool bias, Random& random) {
    weights.emplace_back(new RandomWeight(kind, n, k, group, bias, random, kind == INT4 ? ZEROS : HALVES));
    bytes += (size_t)tc_weight_bytes(&weights.back()->w);
    return &weights.back()->w;
  }
  LinearOp& linear(const Weight* w, const float* from, const NormArg* n, float* to) {
    LinearOp& o = op<LinearOp>(LINEAR);
    o.x = from, o.x_stride = w->k, o.w = w, o.norm = n, o.y = to, o.y_stride = w->n;
    return o;
  }
  void rope(float* at, int heads) {
    RopeOp& o = op<RopeOp>(ROPE);
    o.heads = heads, o.half = s.dim / 2, o.x = at, o.head_stride = s.dim, o.positions = &position,
    o.table = table.data();
  }
  void add_layer(int group, int q, int kv, Random& random) {
    linear(weight(INT4, q + 2 * kv, s.hidden, group, s.qkv_bias, random), x.data(), &norm, qkv.data());
    rope(qkv.data(), s.heads);
    rope(qkv.data() + q, s.kv_heads);
    AttentionOp& a = op<AttentionOp>(ATTENTION);
    a.heads = s.heads, a.kv_heads = s.kv_heads, a.dim = a.dim_pad = s.dim, a.segments = 1, a.kv_kind = F16;
    a.q = qkv.data(), a.k = a.q + q, a.v = a.k + kv, a.q_head = a.k_head = a.v_head = s.dim;
    a.y = y.data(), a.segment = &segment, a.scale = 0.125f;
    LinearOp& o = linear(weight(INT4, s.hidden, q, group, false, random), y.data(), nullptr, x2.data());
    o.residual = x.data();
    const Weight* gate_up = weight(INT4, 2 * s.intermediate, s.hidden, group, false, random);
    LinearOp& up = linear(gate_up, x2.data(), &norm, h.data());
    up.gated = 1, up.act = SILU;
    LinearOp& down = linear(weight(INT4, s.hidden, s.intermediate, group, false, random), h.data(), nullptr, x.data());
    down.residual = x2.data();
  }
};

inline const Shape* shape_named(const char* name) {
  for (const Shape& s : SHAPES)
    if (!strcmp(s.name, name)) return &s;
  return nullptr;
}
