// Thread pool: all threads execute the same list of ops and share the work of each.
//
// Files compiled for different instruction sets include this header, so it has no inline function: the linker would
// keep one copy for all files, and it may be the AVX-512 one.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct Pool;

// A thread's context while a list runs.
struct Worker {
  Pool* pool;
  int id, threads;
  uint8_t* scratch;  // this thread's scratch, the largest size that the list's ops need
  uint8_t* shared;   // shared by all threads
};

// Waits for all threads. Afterwards the counter of `pool_take` starts at zero.
void pool_barrier(const Worker& me);

// Claims the next `count` work items of an op. Returns the index of the first.
int pool_take(const Worker& me, int count);

// Resets the counter to zero without a barrier, for a thread that runs without the others until the next barrier.
void pool_restart(const Worker& me);

// Increments *n and returns its old value. The last thread to arrive sees all earlier writes of the others.
int pool_arrive(int32_t* n);

using WalkFn = void (*)(const Worker& me, const void* list, int n);

Pool* pool_new(int threads);
void pool_free(Pool* pool);
int pool_threads(const Pool* pool);
int pool_team(const Pool* pool);  // threads that run the next list

// How many threads run the next lists after `team` threads lost the time of `lost` threads to other programs and had
// the processor time of `used` threads. Fewer only if these, undisturbed, would have had more.
int pool_fewer(int team, double lost, double used);

// Runs `walk` on every thread with this much scratch. Returns false if memory is short. One caller at a time.
bool pool_run(Pool* pool, WalkFn walk, const void* list, int n, size_t scratch, size_t shared);
