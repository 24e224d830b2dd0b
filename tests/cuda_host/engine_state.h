// The state of the block that runs, shared by the engine's files, and what they do with it: report and wait.
//
// No sanitizer instruments the engine. Under TSan it declares what orders memory on a GPU and nothing else: start and
// end of a kernel, __syncthreads, __syncwarp.
#pragma once

#include <cstdint>

#include "fiber.h"
#include "host_device.h"
#include "host_runtime.h"
#include "shared_memory.h"
#include "turns.h"

#if defined(CUDA_HOST_TSAN)
#include <sanitizer/tsan_interface.h>
#define DECLARE_RELEASE(object) __tsan_release(object)
#define DECLARE_ACQUIRE(object) __tsan_acquire(object)
#else
#define DECLARE_RELEASE(object) static_cast<void>(object)
#define DECLARE_ACQUIRE(object) static_cast<void>(object)
#endif

namespace cuda_host {

constexpr int kMaxThreads = 1024;  // of a block
constexpr int kWarpSyncObjects = 8;
constexpr uint64_t kMaxCopiesInFlight = 1024;
// A TSan fiber costs too much to be made anew for each block, and blocks that shared theirs would look ordered. Two
// sets take turns, so that every block is unordered to its neighbours.
#if defined(CUDA_HOST_TSAN)
constexpr int kThreadSets = 2;
#else
constexpr int kThreadSets = 1;
#endif

enum class State { ready, at_barrier, at_warp_op, done };

struct Thread {
  Fiber fiber;
  uint3 index;
  int number;  // in the block
  State state;
  Site site;  // where it waits
  // A warp primitive under way: what this lane brought, and what it takes away.
  WarpOp op;
  unsigned mask;
  uint64_t bits;
  int source_lane;
  const char* sync_object;
  // Asynchronous copies that have not landed, a ring buffer; issued and landed only grow.
  AsyncCopy copies[kMaxCopiesInFlight];
  uint64_t issued, landed;
  uint64_t copy_group;
};

struct Warp {
  unsigned exists, done, arrived;
  unsigned sync_count;
  char sync_objects[kWarpSyncObjects];
};

struct Engine {
  Thread thread_sets[kThreadSets][kMaxThreads];
  int allocated = 0;               // of each set
  Thread* threads = *thread_sets;  // of the block that runs
  Warp warp_sets[kThreadSets][kMaxThreads / warpSize];
  Warp* warps = *warp_sets;
  SharedMemory shared;

  KernelBody body = nullptr;
  void* arguments = nullptr;
  int thread_count = 0;
  int waiting_at_barrier = 0, done = 0;
  Thread* current = nullptr;
  bool failed = false;
  char text[1024] = "";

  // Sync objects, and so are those of the warps. Barriers have two, by parity: one that served both would let a
  // barrier's waiters see what comes after it. Each thread set has its own.
  char block_start = 0, kernel_end = 0;
  char barriers[kThreadSets][2] = {};
  int thread_set = 0, barrier_parity = 0;

  Turns turns;
};

extern Engine engine;

bool same_site(const Site& a, const Site& b);
const char* name_of(WarpOp op);

// A collective instruction of a whole warp: when its 32 lanes have come to the one at `site`, `compute` runs once on
// what they brought.
using WarpCompute = void (*)(void* const (&lanes)[warpSize]);
void warp_collective(WarpOp op, void* operands, WarpCompute compute, Site site);

// Ends the launch with a text. A thread that calls it calls stop_thread() next.
void report(const char* format, ...) __attribute__((format(printf, 1, 2)));
[[noreturn]] void stop_thread();

// Puts the running thread to sleep until someone makes it ready.
void wait_as(State state, Site site);

}  // namespace cuda_host
