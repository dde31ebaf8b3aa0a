// Workloads for counting instructions (tests/emulators/arm/icount.c): a linear layer, or a whole token.
//
//   count ISA linear KIND ROWS N K GROUP REPEAT    KIND: 4, 8 (bits), head (8, for the largest); ROWS of activations
//   count ISA token SHAPE LAYERS REPEAT            the first LAYERS layers, all int4, 32 tokens of context
//
// Subtract the count of a run with REPEAT 0; the difference is the work of the kernels.
#include "shapes.h"

static int linear(Engine* e, char** a) {
  Random random{7};
  const bool small = atoi(a[0]) == 4;
  RandomWeight w(small ? INT4 : INT8, atoi(a[2]), atoi(a[3]), atoi(a[4]), false, random, small ? ZEROS : HALVES);
  const int rows = atoi(a[1]);
  std::vector<float> x((size_t)(rows * w.w.k)), y((size_t)(rows * w.w.n));
  for (float& v : x) v = random.unit();
  Choice largest = {1, 0, 0, 0};
  LinearOp op = {};
  if (!strcmp(a[0], "head")) op.choice = &largest;
  op.code = LINEAR, op.rows = rows, op.x = x.data(), op.w = &w.w, op.y = y.data();
  op.x_stride = w.w.k, op.y_stride = w.w.n;
  for (int i = 0; i < atoi(a[5]); i++) run_one(e, &op);
  return 0;
}

static int token(Engine* e, char** a) {
  const Shape* found = shape_named(a[0]);
  if (!found) return 2;
  Shape s = *found;
  if (atoi(a[1])) s.layers = atoi(a[1]);
  Token t(s, s.hidden % 128 ? 64 : 128, 32, INT4);
  for (int i = 0; i < atoi(a[2]); i++)
    if (tc_run(e, t.list.data(), (int)t.list.size())) return 1;
  return 0;
}

int main(int argc, char** argv) {
  Engine* e = argc > 1 ? tc_new(argv[1], 1) : nullptr;
  if (!e) return fprintf(stderr, "no such instruction set here; the best is %s\n", tc_isa(0)), 2;
  if (argc == 9 && !strcmp(argv[2], "linear")) return linear(e, argv + 3);
  if (argc == 6 && !strcmp(argv[2], "token")) return token(e, argv + 3);
  return fprintf(stderr, "usage: see the head of count.cpp\n"), 2;
}
