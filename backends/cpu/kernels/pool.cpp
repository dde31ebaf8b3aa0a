#include "pool.h"

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(_WIN32)
#include <process.h>
static int process_id() {
  return _getpid();
}
#else
#include <unistd.h>
static int process_id() {
  return (int)getpid();
}
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
static void relax() {
  _mm_pause();
}
#elif defined(__aarch64__) && !defined(_MSC_VER)
static void relax() {
  __asm__ volatile("yield");
}
#else
static void relax() {
  std::this_thread::yield();
}
#endif

// Long enough to bridge the gap between two ops and the Python between two calls; short enough that a thread
// whose peer lost its core to another process gives up its own.
static constexpr std::chrono::microseconds SPIN{60};

// Waits until `a` is no longer `old`: spins briefly, then sleeps.
static void await(std::atomic<uint32_t>& a, uint32_t old) {
  auto end = std::chrono::steady_clock::time_point();
  for (int i = 1; a.load(std::memory_order_acquire) == old; i++) {
    relax();
    if (i % 64) continue;
    const auto now = std::chrono::steady_clock::now();
    if (end == std::chrono::steady_clock::time_point()) end = now + SPIN;
    if (now > end) return a.wait(old, std::memory_order_acquire);
  }
}

namespace {
struct Buffer {  // grows, aligned to a cache line, old contents lost
  std::unique_ptr<uint8_t[]> bytes;
  size_t size = 0;
  bool grow(size_t need) {
    if (need <= size) return true;
    bytes.reset();
    bytes.reset(new (std::nothrow) uint8_t[need + 64]);
    size = bytes ? need : 0;
    return bytes != nullptr;
  }
  uint8_t* get() const { return (uint8_t*)(((uintptr_t)bytes.get() + 63) & ~(uintptr_t)63); }
};
}  // namespace

struct Pool {
  int threads;
  int process = 0;  // the workers' process: a forked child has none of them
  std::mutex one_caller;
  std::unique_ptr<std::vector<std::thread>> workers;
  std::vector<Buffer> scratch;
  Buffer shared;
  WalkFn walk = nullptr;
  const void* list = nullptr;
  int n = 0;
  bool stop = false;
  alignas(64) std::atomic<uint32_t> job{0};
  alignas(64) std::atomic<uint32_t> generation{0};
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> next{0};
};

void pool_barrier(const Worker& me) {
  Pool& p = *me.pool;
  if (p.threads == 1) return p.next.store(0, std::memory_order_relaxed);
  const uint32_t now = p.generation.load(std::memory_order_relaxed);
  if (p.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < p.threads) return await(p.generation, now);
  p.arrived.store(0, std::memory_order_relaxed);
  p.next.store(0, std::memory_order_relaxed);
  p.generation.store(now + 1, std::memory_order_release);
  p.generation.notify_all();
}

int pool_take(const Worker& me, int count) {
  return me.pool->next.fetch_add(count, std::memory_order_relaxed);
}

void pool_restart(const Worker& me) {
  me.pool->next.store(0, std::memory_order_relaxed);
}

int pool_arrive(int32_t* n) {
  static_assert(sizeof(std::atomic<int32_t>) == sizeof(int32_t), "a plain counter can be counted atomically");
  return reinterpret_cast<std::atomic<int32_t>*>(n)->fetch_add(1, std::memory_order_acq_rel);
}

static void walk_as(Pool* p, int id) {
  const Worker me{p, id, p->threads, p->scratch[(size_t)id].get(), p->shared.get()};
  p->walk(me, p->list, p->n);
  pool_barrier(me);
}

static void work(Pool* p, int id, uint32_t seen) {
  for (;; seen++) {
    await(p->job, seen);
    if (p->stop) return;
    walk_as(p, id);
  }
}

static void start(Pool* p) {
  // After a fork the old threads live on in the parent only; their objects must not be joined or destroyed here.
  (void)p->workers.release();
  p->workers = std::make_unique<std::vector<std::thread>>();
  p->process = process_id();
  p->arrived = 0;
  for (int id = 1; id < p->threads; id++) p->workers->emplace_back(work, p, id, p->job.load());
}

Pool* pool_new(int threads) {
  Pool* p = new (std::nothrow) Pool();
  if (!p) return nullptr;
  p->threads = threads;
  p->scratch.resize((size_t)threads);
  return p;
}

void pool_free(Pool* p) {
  if (p->process == process_id()) {
    p->stop = true;
    p->job.fetch_add(1, std::memory_order_release);
    p->job.notify_all();
    for (auto& t : *p->workers) t.join();
  } else {
    (void)p->workers.release();
  }
  delete p;
}

int pool_threads(const Pool* p) {
  return p->threads;
}

bool pool_run(Pool* p, WalkFn walk, const void* list, int n, size_t scratch, size_t shared) {
  std::lock_guard<std::mutex> guard(p->one_caller);
  for (auto& s : p->scratch)
    if (!s.grow(scratch)) return false;
  if (!p->shared.grow(shared)) return false;
  if (p->process != process_id()) start(p);
  p->walk = walk, p->list = list, p->n = n;
  if (p->threads > 1) {
    p->job.fetch_add(1, std::memory_order_release);
    p->job.notify_all();
  }
  walk_as(p, 0);
  return true;
}
