// Compares the kernels with the machine's limits: decode with a plain memory read, prefill with the int8 peak.
//
//   speed SHAPE [THREADS] [ISA]        alternating repetitions, best and median of each
#include <algorithm>
#include <chrono>
#include <ctime>

#include "shapes.h"

static bool by_cpu = false;  // with one thread, measure CPU time, which other programs disturb less

static double now() {
  if (by_cpu) return (double)std::clock() / CLOCKS_PER_SEC;
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double seconds(Engine* e, const Op* const* list, int n) {
  const double start = now();
  if (tc_run(e, list, n)) abort();
  return now() - start;
}

struct Times {
  std::vector<double> all;
  void add(double t) { all.push_back(t); }
  double best() { return *std::min_element(all.begin(), all.end()); }
  double median() {
    std::sort(all.begin(), all.end());
    return all[all.size() / 2];
  }
};

// A matrix times the rows of a prompt.
struct Product {
  static constexpr int ROWS = 512;
  RandomWeight w;
  Area x, y;  // huge pages, like the backend's
  LinearOp op = {};
  Product(int n, int k, Random& random) : w(INT4, n, k, 128, false, random, ZEROS) {
    const size_t inputs = (size_t)ROWS * (size_t)k;
    x.take(4 * inputs), y.take(4 * (size_t)ROWS * (size_t)(n + 16));
    for (size_t i = 0; i < inputs; i++) ((float*)x.data)[i] = random.unit();
    op.code = LINEAR, op.rows = ROWS, op.x = (float*)x.data, op.x_stride = k, op.w = &w.w, op.y = (float*)y.data,
    op.y_stride = n + 16;
  }
  double work() const { return 2.0 * ROWS * w.w.n * w.w.k; }
  double seconds(Engine* e) const {
    const Op* one = (const Op*)&op;
    return ::seconds(e, &one, 1);
  }
};

int main(int argc, char** argv) {
  const Shape* found = shape_named(argc > 1 ? argv[1] : "llama-3.2-1b");
  const int threads = argc > 2 ? atoi(argv[2]) : 1;
  Engine* e = tc_new(argc > 3 ? argv[3] : tc_isa(0), threads);
  if (!found || !e) return fprintf(stderr, "usage: see the head of speed.cpp\n"), 2;
  Token t(*found, 128, 128, INT4);
  by_cpu = threads == 1;
  float sink = 0;
  int64_t dots = 0;
  Area area;
  area.take((size_t)512 << 20);
  memset(area.data, 1, area.size);
  ProbeOp read = {PROBE, 1, area.data, (int64_t)area.size, 0, nullptr, &sink},
          peak = {PROBE, 1, nullptr, 0, 200000, &dots, &sink};
  Random random{5};
  const int inner = found->intermediate;
  Product up(2 * inner, found->hidden, random), down(found->hidden, inner, random);
  const Op *r = (const Op*)&read, *p = (const Op*)&peak;
  Times decode, plain, ups, downs, top;
  for (int i = 0; i < 9; i++) {
    decode.add(seconds(e, t.list.data(), (int)t.list.size()));
    plain.add(seconds(e, &r, 1));
    ups.add(up.seconds(e));
    top.add(seconds(e, &p, 1));
    downs.add(down.seconds(e));
  }
  const auto line = [](const char* what, double a, double b) {
    printf("%s: best %.1f of %.1f (%.0f %%)\n", what, a, b, 100 * a / b);
  };
  printf("%s, %d thread(s), %.0f MB per token\n", found->name, threads, (double)t.bytes / 1e6);
  line("decode GB/s, plain read", (double)t.bytes / decode.best() / 1e9, (double)area.size / plain.best() / 1e9);
  line("decode GB/s, plain read, medians", (double)t.bytes / decode.median() / 1e9,
       (double)area.size / plain.median() / 1e9);
  printf("decode tokens/s: best %.1f, median %.1f\n", 1 / decode.best(), 1 / decode.median());
  const double most = (double)threads * (double)dots / top.best() / 1e9;
  line("gate and up GOP/s, int8 peak", up.work() / ups.best() / 1e9, most);
  line("down GOP/s, int8 peak", down.work() / downs.best() / 1e9, most);
}
