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
#include <time.h>
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

// Long enough for the gap between two ops and the Python between two calls. Short enough that a thread frees its core
// if its peer lost one to another process.
static constexpr std::chrono::microseconds SPIN{60};

// If other programs use the processors, a preempted thread delays all others at the next barrier. Lists then run on
// fewer threads, and from time to time on all of them to test whether the processors are free.
static constexpr int64_t WINDOW = 30'000'000;  // ns of lists that are evaluated together: several time slices
// ns before all threads are tried again
static constexpr int64_t FIRST_REST = 200'000'000, LONGEST_REST = 3'200'000'000;
static constexpr double LOST = 0.25;  // threads' worth of time that other programs may take

static int64_t greater(int64_t a, int64_t b) {
  return a > b ? a : b;
}

static int64_t now_ns() {
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// CPU time of this thread in ns; -1 if the system counts it in whole time slices or not at all.
static int64_t processor_ns() {
#if defined(CLOCK_THREAD_CPUTIME_ID) && !defined(_WIN32)
  timespec t;
  if (!clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t)) return (int64_t)t.tv_sec * 1'000'000'000 + t.tv_nsec;
#endif
  return -1;
}

// Waits until `a` differs from `old`: spins briefly, then sleeps. Returns the time at which it fell asleep, or 0.
static int64_t await(std::atomic<uint32_t>& a, uint32_t old) {
  auto end = std::chrono::steady_clock::time_point();
  for (int i = 1; a.load(std::memory_order_acquire) == old; i++) {
    relax();
    if (i % 64) continue;
    const auto now = std::chrono::steady_clock::now();
    if (end == std::chrono::steady_clock::time_point()) end = now + SPIN;
    if (now > end) {
      const int64_t asleep = now_ns();
      a.wait(old, std::memory_order_acquire);
      return asleep;
    }
  }
  return 0;
}

namespace {
struct Buffer {  // grows, aligned to a cache line, does not keep its contents
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

struct alignas(64) Nanoseconds {
  int64_t asleep = 0;  // of one thread, since its list started
};
}  // namespace

struct Pool {
  int threads, team;  // `team` threads run the next list
  int process = 0;    // the workers' process; a forked child has none of them
  std::mutex one_caller;
  std::unique_ptr<std::vector<std::thread>> workers;
  std::vector<Buffer> scratch;
  std::vector<Nanoseconds> waits;
  Buffer shared;
  WalkFn walk = nullptr;
  const void* list = nullptr;
  int n = 0;
  bool stop = false;
  // ns since the last evaluation: of lists, taken by other programs, of our threads
  int64_t judged = 0, lost = 0, used = 0;
  int64_t until = 0, rest = FIRST_REST;
  std::atomic<int64_t> met{0};               // time of the threads' last barrier, or of the announcement of a list
  std::atomic<int64_t> taken{0};             // ns taken from the threads of this list by other programs
  std::atomic<int64_t> had{0};               // CPU time of the threads of this list, ns
  alignas(64) std::atomic<uint32_t> job{0};  // job number * TEAMS + its team
  alignas(64) std::atomic<uint32_t> generation{0};
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> next{0};
};

static constexpr uint32_t TEAMS = 1 << 12;

void pool_barrier(const Worker& me) {
  Pool& p = *me.pool;
  if (me.threads == 1) return p.next.store(0, std::memory_order_relaxed);
  const uint32_t now = p.generation.load(std::memory_order_relaxed);
  if (p.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < me.threads) {
    // Time after the barrier, until the thread has a processor again, is not sleep: other programs hold the processor.
    if (const int64_t since = await(p.generation, now))
      p.waits[(size_t)me.id].asleep += greater(p.met.load(std::memory_order_relaxed) - since, 0);
    return;
  }
  p.arrived.store(0, std::memory_order_relaxed);
  p.next.store(0, std::memory_order_relaxed);
  p.met.store(now_ns(), std::memory_order_relaxed);
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

static void walk_as(Pool* p, int id, int team) {
  const Worker me{p, id, team, p->scratch[(size_t)id].get(), p->shared.get()};
  if (team == 1) return p->walk(me, p->list, p->n), pool_barrier(me);
  int64_t& asleep = p->waits[(size_t)id].asleep;
  asleep = 0;
  const int64_t start = p->met.load(std::memory_order_relaxed), used = processor_ns();
  p->walk(me, p->list, p->n);
  const int64_t busy = processor_ns() - used, taken = now_ns() - start - busy - asleep;
  p->had.fetch_add(busy, std::memory_order_relaxed);
  if (used >= 0 && taken > 0) p->taken.fetch_add(taken, std::memory_order_relaxed);
  pool_barrier(me);
}

static void work(Pool* p, int id, uint32_t seen) {
  for (;;) {
    await(p->job, seen);
    seen = p->job.load(std::memory_order_acquire);
    if (p->stop) return;
    // A finished list may be missed. An unfinished one cannot: its team waits for all its threads.
    if (const int team = (int)(seen % TEAMS); id < team) walk_as(p, id, team);
  }
}

// Announces a list to its team.
static void announce(Pool* p, int team) {
  const uint32_t number = p->job.load(std::memory_order_relaxed) / TEAMS + 1;
  p->met.store(now_ns(), std::memory_order_relaxed);
  p->job.store(number * TEAMS + (uint32_t)team, std::memory_order_release);
  p->job.notify_all();
}

int pool_fewer(int team, double lost, double used) {
  if (lost < LOST) return team;
  const int shared = lost > 0.75 ? (int)(2 * lost + 0.5) : 1;  // a thread that shares a processor loses half its time
  const int fewer = team - shared > 1 ? team - shared : 1;
  return used < fewer ? fewer : team;
}

// After a list of `wall` ns, decides how many threads run the next ones.
static void judge(Pool* p, int64_t wall) {
  p->judged += wall;
  p->lost += p->taken.exchange(0, std::memory_order_relaxed);
  p->used += p->had.exchange(0, std::memory_order_relaxed);
  if (p->judged < WINDOW) return;
  const int64_t trial = p->judged;
  const int team = pool_fewer(p->team, (double)p->lost / (double)trial, (double)p->used / (double)trial);
  p->judged = p->lost = p->used = 0;
  if (team < p->team) {
    p->team = team;
    p->until = now_ns() + greater(p->rest, 32 * trial);  // trials take a few hundredths of the time
    p->rest = p->rest * 2 < LONGEST_REST ? p->rest * 2 : LONGEST_REST;
  } else if (team == p->threads) {
    p->rest = FIRST_REST;
  }
}

static void start(Pool* p) {
  // After a fork the old threads exist only in the parent. Their objects must not be joined or destroyed here.
  (void)p->workers.release();
  p->workers = std::make_unique<std::vector<std::thread>>();
  p->process = process_id();
  p->arrived = 0;
  for (int id = 1; id < p->threads; id++) p->workers->emplace_back(work, p, id, p->job.load());
}

Pool* pool_new(int threads) {
  Pool* p = new (std::nothrow) Pool();
  if (!p) return nullptr;
  p->threads = p->team = threads < (int)TEAMS ? threads : (int)TEAMS - 1;
  p->scratch.resize((size_t)p->threads);
  p->waits.resize((size_t)p->threads);
  return p;
}

void pool_free(Pool* p) {
  if (p->process == process_id()) {
    p->stop = true;
    announce(p, 0);
    for (auto& t : *p->workers) t.join();
  } else {
    (void)p->workers.release();
  }
  delete p;
}

int pool_threads(const Pool* p) {
  return p->threads;
}

int pool_team(const Pool* p) {
  return p->team;
}

bool pool_run(Pool* p, WalkFn walk, const void* list, int n, size_t scratch, size_t shared) {
  std::lock_guard<std::mutex> guard(p->one_caller);
  for (auto& s : p->scratch)
    if (!s.grow(scratch)) return false;
  if (!p->shared.grow(shared)) return false;
  if (p->process != process_id()) start(p);
  p->walk = walk, p->list = list, p->n = n;
  if (p->threads == 1) return walk_as(p, 0, 1), true;
  const int64_t start = now_ns();
  if (p->team < p->threads && start >= p->until) p->team = p->threads, p->judged = p->lost = p->used = 0;
  const int team = p->team;
  if (team > 1) announce(p, team);
  walk_as(p, 0, team);
  if (team > 1) judge(p, now_ns() - start);
  return true;
}
