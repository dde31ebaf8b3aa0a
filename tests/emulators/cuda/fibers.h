// Runs a grid of GPU threads on one CPU thread. Every thread of a block is a fiber, and fibers meet at warp operations
// and barriers. emulator.h defines CUDA's names.
//
// It detects a barrier that not every thread reaches and a warp operation in divergent flow (both reported with a
// source line). It also detects a missing barrier, because the caller chooses the order in which lanes run between two
// meetings: the results of two orders must agree.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#if !defined(__x86_64__) && !defined(SHIM_UCONTEXT)
#define SHIM_UCONTEXT  // any other processor: slower, but portable
#endif
#ifdef SHIM_UCONTEXT
#include <ucontext.h>
#endif

namespace shim {

constexpr unsigned kLanes = 32;              // threads per warp
constexpr size_t kStack = size_t(64) << 10;  // bytes of stack per GPU thread

enum State { RUN, AT_WARP, AT_BARRIER, DONE };

struct U3 {
  unsigned x, y, z;
};

struct Lane {
#ifdef SHIM_UCONTEXT
  ucontext_t context;
#else
  void* sp;
#endif
  char* stack;
  State state;
  int line;           // source line of the meeting where it waits
  unsigned meetings;  // its parity selects the slot: a fast lane must not overwrite what a slow one reads
  unsigned mask;      // lanes that took part in the last warp meeting
  unsigned index, lane, warp;
  U3 in_group, in_grid;
  alignas(16) unsigned char slot[2][64];
};

struct Context {
#ifdef SHIM_UCONTEXT
  ucontext_t main;
#else
  void* main;
#endif
  Lane* current;
  Lane* lanes;
  unsigned n;  // threads in the current block (fewer at the edge of the grid)
  U3 group, groups, group_size, grid;
  void (*body)(void**);
  void** buffers;
  char error[256];
};
inline thread_local Context C;
inline void (*before_block)() = nullptr;

// ---- fibers -----------------------------------------------------------------------------------

#ifdef SHIM_UCONTEXT
inline void entry() {
  C.body(C.buffers);
  C.current->state = DONE;
  swapcontext(&C.current->context, &C.main);
}
inline void start(Lane& l) {
  getcontext(&l.context);
  l.context.uc_stack.ss_sp = l.stack;
  l.context.uc_stack.ss_size = kStack;
  l.context.uc_link = nullptr;
  makecontext(&l.context, entry, 0);
}
inline void resume(Lane& l) {
  C.current = &l;
  swapcontext(&C.main, &l.context);
}
inline void suspend(Lane& l) {
  swapcontext(&l.context, &C.main);
}
#else
extern "C" void shim_switch(void** save_sp, void* new_sp);
asm(R"(
.text
.globl shim_switch
.type shim_switch,@function
shim_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
inline void entry() {
  C.body(C.buffers);
  C.current->state = DONE;
  shim_switch(&C.current->sp, C.main);
  abort();
}
inline void start(Lane& l) {
  void** top = reinterpret_cast<void**>(l.stack + kStack);
  *--top = nullptr;  // keeps the stack 16-byte aligned inside entry()
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;  // the six registers shim_switch pops
  l.sp = top;
}
inline void resume(Lane& l) {
  C.current = &l;
  shim_switch(&C.main, l.sp);
}
inline void suspend(Lane& l) {
  shim_switch(&l.sp, C.main);
}
#endif

// ---- meetings ---------------------------------------------------------------------------------

__attribute__((noinline)) inline void wait(State at, int line) {
  Lane& l = *C.current;
  l.state = at;
  l.line = line;
  suspend(l);
}

// The values that the lanes of one warp brought to a meeting.
struct Group {
  Lane* base;
  unsigned n, parity, mask;
  bool live(unsigned i) const { return i < n && (mask >> i & 1); }
  template <class T>
  T get(unsigned i) const {
    T t;
    memcpy(&t, base[i].slot[parity], sizeof t);
    return t;
  }
  template <class T>
  const T& at(unsigned i) const {  // valid until the next meeting
    return *reinterpret_cast<const T*>(base[i].slot[parity]);
  }
};

// Stores `v` for the others, waits until all live lanes of the warp have done so, and returns their values.
template <class T>
inline Group meet(const T& v, int line) {
  static_assert(sizeof(T) <= sizeof(Lane::slot[0]));
  Lane& l = *C.current;
  unsigned parity = l.meetings++ & 1;
  memcpy(l.slot[parity], &v, sizeof v);
  wait(AT_WARP, line);
  // The mask was taken when all had arrived. A lane may have ended since, but its value counts.
  unsigned first = l.warp * kLanes, rest = C.n - first;
  return {C.lanes + first, rest < kLanes ? rest : kLanes, parity, l.mask};
}

// ---- schedule ---------------------------------------------------------------------------------

// Runs lanes [b, e) until all wait at a barrier or have ended. Returns false for divergence and sets C.error.
inline bool run_warp(unsigned b, unsigned e, bool reversed, unsigned& left) {
  Context& c = C;
  for (;;) {
    bool any = false;
    for (unsigned k = b; k < e; k++) {
      Lane& l = c.lanes[reversed ? e - 1 - (k - b) : k];
      if (l.state != RUN) continue;
      any = true;
      resume(l);
      if (l.state == DONE) left--;
    }
    if (!any) return true;
    const Lane* first = nullptr;
    unsigned mask = 0;
    for (unsigned k = b; k < e; k++) {
      Lane& l = c.lanes[k];
      if (l.state == DONE) continue;
      if (!first) first = &l;
      if (l.state != first->state || l.line != first->line) {
        snprintf(c.error, sizeof c.error,
                 "divergent warp %u in block (%u,%u,%u): lanes wait at line %d and at "
                 "line %d",
                 b / kLanes, c.group.x, c.group.y, c.group.z, first->line, l.line);
        return false;
      }
      mask |= 1u << (k - b);
    }
    if (!first || first->state != AT_WARP) return true;
    for (unsigned k = b; k < e; k++)
      if (c.lanes[k].state == AT_WARP) c.lanes[k].state = RUN, c.lanes[k].mask = mask;
  }
}

inline bool run_block(bool reversed) {
  Context& c = C;
  if (before_block) before_block();
  unsigned warps = (c.n + kLanes - 1) / kLanes, left = c.n;
  for (unsigned i = 0; i < c.n; i++) {
    c.lanes[i].state = RUN;
    c.lanes[i].meetings = 0;
    start(c.lanes[i]);
  }
  while (left) {
    for (unsigned k = 0; k < warps; k++) {
      unsigned b = (reversed ? warps - 1 - k : k) * kLanes, e = b + kLanes < c.n ? b + kLanes : c.n;
      if (!run_warp(b, e, reversed, left)) return false;
    }
    // All remaining threads wait at a barrier. It must be the same barrier, and no thread may have ended.
    int line = -1;
    bool mixed = false;
    for (unsigned i = 0; i < c.n; i++) {
      if (c.lanes[i].state == DONE) continue;
      if (line < 0) line = c.lanes[i].line;
      mixed |= line != c.lanes[i].line;
    }
    if (mixed || (line >= 0 && left != c.n)) {
      snprintf(c.error, sizeof c.error, "barrier at line %d is not reached by every thread", line);
      return false;
    }
    for (unsigned i = 0; i < c.n; i++)
      if (c.lanes[i].state == AT_BARRIER) c.lanes[i].state = RUN;
  }
  return true;
}

// grid counts threads and is a multiple of the block. order: bit 0 reverses lanes and warps, bit 1 reverses blocks.
// Returns 0 on success.
inline int run(void (*body)(void**), void** buffers, const unsigned* grid, const unsigned* threads, int order,
               char* error) {
  Context& c = C;
  c.body = body;
  c.buffers = buffers;
  c.error[0] = 0;
  c.grid = {grid[0], grid[1], grid[2]};
  unsigned T[3], N[3];
  for (int i = 0; i < 3; i++) {
    T[i] = threads[i] < grid[i] ? threads[i] : grid[i];
    N[i] = (grid[i] + T[i] - 1) / T[i];
  }
  c.groups = {N[0], N[1], N[2]};
  unsigned most = T[0] * T[1] * T[2], total = N[0] * N[1] * N[2];
  std::vector<Lane> lanes(most);
  c.lanes = lanes.data();
  char* stacks =
      static_cast<char*>(mmap(nullptr, most * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  bool ok = stacks != MAP_FAILED;
  auto clipped = [](unsigned g, unsigned t, unsigned G) { return g * t + t <= G ? t : G - g * t; };
  for (unsigned k = 0; k < total && ok; k++) {
    unsigned t = order & 2 ? total - 1 - k : k;
    c.group = {t % N[0], t / N[0] % N[1], t / N[0] / N[1]};
    unsigned sx = clipped(c.group.x, T[0], grid[0]), sy = clipped(c.group.y, T[1], grid[1]),
             sz = clipped(c.group.z, T[2], grid[2]);
    c.group_size = {sx, sy, sz};
    c.n = sx * sy * sz;
    for (unsigned i = 0; i < c.n; i++) {
      Lane& l = lanes[i];
      l.stack = stacks + i * kStack;
      l.index = i;
      l.lane = i % kLanes;
      l.warp = i / kLanes;
      l.in_group = {i % sx, i / sx % sy, i / sx / sy};
      l.in_grid = {c.group.x * T[0] + l.in_group.x, c.group.y * T[1] + l.in_group.y, c.group.z * T[2] + l.in_group.z};
    }
    ok = run_block(order & 1);
  }
  if (stacks != MAP_FAILED) munmap(stacks, most * kStack);
  memcpy(error, c.error, sizeof c.error);
  return ok ? 0 : 1;
}

}  // namespace shim
