// The threads: every one of them walks the same list of ops, sharing the work of each.
//
// This header is included by files compiled for one instruction set each, so it holds no inline function:
// the linker would keep one copy for everybody, and it may be the AVX-512 one.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct Pool;

// What a thread knows while a list runs.
struct Worker {
  Pool* pool;
  int id, threads;
  uint8_t* scratch;  // this thread's own, as many bytes as the list's ops need at most
  uint8_t* shared;   // everybody's
};

// All threads meet; afterwards the counter of `pool_take` starts from zero.
void pool_barrier(const Worker& me);

// Claims the next `count` of an op's work items -> the index of the first.
int pool_take(const Worker& me, int count);

// The counter starts from zero again, without a meeting: for a thread that works alone until the next.
void pool_restart(const Worker& me);

// Counts up *n -> what it was, with all that was written before seen by the last to come.
int pool_arrive(int32_t* n);

using WalkFn = void (*)(const Worker& me, const void* list, int n);

Pool* pool_new(int threads);
void pool_free(Pool* pool);
int pool_threads(const Pool* pool);
int pool_team(const Pool* pool);  // of which so many run the next list

// How many threads run the next lists, after `team` threads that lost the time of `lost` threads to other programs and
// had processors for the time of `used` threads. Fewer only where those, undisturbed, would have had more.
int pool_fewer(int team, double lost, double used);

// Runs `walk` on every thread, with that much scratch; false if memory is short. One caller at a time.
bool pool_run(Pool* pool, WalkFn walk, const void* list, int n, size_t scratch, size_t shared);
