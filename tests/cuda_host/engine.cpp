// The emulated device: runs a grid block by block, the threads of a block as fibers in turns, and reports what a GPU
// would answer with a hang, a wrong result or luck:
//   * a thread that returns, or waits elsewhere, while others wait at a barrier;
//   * a warp primitive whose named lanes do not all arrive, with the same mask, at the same place;
//   * a shuffle from a lane that its mask does not name; an asynchronous copy that is misaligned or never waited for;
//   * writes just outside shared memory, static arrays beyond 48 KiB.
// The text is printed and kept for last_report().
//
// No sanitizer instruments this file. Under TSan it declares what orders memory on a GPU and nothing else: start and
// end of a kernel, __syncthreads, __syncwarp. A shuffle orders nothing.

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda_host.h"
#include "engine.h"
#include "fiber.h"
#include "shared_memory.h"

#if defined(CUDA_HOST_TSAN)
#include <sanitizer/tsan_interface.h>
#define DECLARE_RELEASE(object) __tsan_release(object)
#define DECLARE_ACQUIRE(object) __tsan_acquire(object)
#else
#define DECLARE_RELEASE(object) static_cast<void>(object)
#define DECLARE_ACQUIRE(object) static_cast<void>(object)
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_host {
namespace {

constexpr int kMaxThreads = 1024;  // of a block
constexpr int kWarpSyncObjects = 8;
constexpr uint64_t kMaxCopiesInFlight = 256;
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

bool same_site(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

struct Engine {
  Thread thread_sets[kThreadSets][kMaxThreads];
  int allocated = 0;               // of each set
  Thread* threads = *thread_sets;  // of the block that runs
  Warp warp_sets[kThreadSets][kMaxThreads / warpSize];
  Warp* warps = *warp_sets;
  SharedMemory shared;
  std::vector<int> turns;

  KernelBody body = nullptr;
  void* arguments = nullptr;
  int thread_count = 0;
  int waiting_at_barrier = 0, done = 0;
  Thread* current = nullptr;
  bool failed = false;
  char report[1024] = "";

  // Sync objects, and so are those of the warps. Barriers have two, by parity: one that served both would let a
  // barrier's waiters see what comes after it. Each thread set has its own.
  char block_start = 0, kernel_end = 0;
  char barriers[kThreadSets][2] = {};
  int thread_set = 0, barrier_parity = 0;

  ThreadOrder order = ThreadOrder::forward;
  uint64_t random_state = 1;

  Engine() {
    const char* const text = std::getenv("CUDA_HOST_ORDER");
    if (text == nullptr || std::strcmp(text, "forward") == 0) return;
    if (std::strcmp(text, "reverse") == 0) {
      order = ThreadOrder::reverse;
    } else if (std::strncmp(text, "random", 6) == 0) {
      order = ThreadOrder::random;
      if (text[6] == ':') seed(std::strtoull(text + 7, nullptr, 10));
    } else {
      std::fprintf(stderr, "CUDA_HOST_ORDER must be forward, reverse or random[:seed], got %s\n", text);
      std::abort();
    }
  }

  void seed(uint64_t value) { random_state = value * 0x9e3779b97f4a7c15u + 1; }

  uint64_t random_below(uint64_t bound) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % bound;
  }

  void order_turns(int count) {
    if (order == ThreadOrder::random) {
      for (int i = count - 1; i > 0; --i) {
        std::swap(turns[static_cast<std::size_t>(i)], turns[random_below(static_cast<uint64_t>(i) + 1)]);
      }
    }
  }
};

Engine engine;

void describe(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Ends the launch. From a fiber it does not return.
void describe(const char* format, ...) {
  const int used =
      std::snprintf(engine.report, sizeof engine.report, "block (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(engine.report + used, sizeof engine.report - static_cast<std::size_t>(used), format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "cuda_host: %s\n", engine.report);
  engine.failed = true;
}

[[noreturn]] void stop_thread() { engine.current->fiber.leave(); }

const char* name_of(WarpOp op) {
  switch (op) {
    case WarpOp::sync:
      return "__syncwarp";
    case WarpOp::ballot:
      return "__ballot_sync";
    default:
      return "__shfl_sync";
  }
}

void wait_as(State state, Site site) {
  Thread& t = *engine.current;
  t.state = state;
  t.site = site;
  t.fiber.yield();
}

void run_thread() {
  DECLARE_ACQUIRE(&engine.block_start);
  engine.body(engine.arguments);
  DECLARE_RELEASE(&engine.kernel_end);
  Thread& t = *engine.current;
  if (t.landed != t.issued) {
    describe("thread %d returns with asynchronous copies that it has not waited for", t.number);
  }
  t.state = State::done;
  ++engine.done;
  engine.warps[t.number / warpSize].done |= 1u << (t.number % warpSize);
  t.fiber.leave();
}

void start_block() {
  engine.thread_set = (engine.thread_set + 1) % kThreadSets;
  engine.threads = engine.thread_sets[engine.thread_set];
  engine.warps = engine.warp_sets[engine.thread_set];
  engine.shared.begin_block();
  DECLARE_RELEASE(&engine.block_start);
  engine.waiting_at_barrier = engine.done = 0;
  for (int i = 0; i < engine.thread_count; ++i) {
    Thread& t = engine.threads[i];
    const unsigned n = static_cast<unsigned>(i);
    t.index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y};
    t.number = i;
    t.state = State::ready;
    t.issued = t.landed = t.copy_group = 0;
    t.fiber.start(run_thread);
  }
  for (int first = 0; first < engine.thread_count; first += warpSize) {
    const int lanes = std::min(engine.thread_count - first, warpSize);
    Warp& w = engine.warps[first / warpSize];
    w.exists = lanes == warpSize ? 0xffffffffu : (1u << lanes) - 1;
    w.done = w.arrived = 0;
  }
}

bool release_barrier() {
  const Thread& first = engine.threads[0];
  for (int i = 1; i < engine.thread_count; ++i) {
    const Thread& t = engine.threads[i];
    if (!same_site(t.site, first.site)) {
      describe("threads 0 and %d wait at different barriers: %s:%d and %s:%d", i, first.site.file, first.site.line,
               t.site.file, t.site.line);
      return false;
    }
  }
  for (int i = 0; i < engine.thread_count; ++i) engine.threads[i].state = State::ready;
  engine.waiting_at_barrier = 0;
  engine.barrier_parity ^= 1;
  return true;
}

// Every thread waits or has returned, and no wait can end.
void report_stuck() {
  for (int i = 0; i < engine.thread_count; ++i) {
    const Thread& t = engine.threads[i];
    if (t.state != State::at_warp_op) continue;
    const Warp& w = engine.warps[i / warpSize];
    describe("thread %d waits in %s(mask %#x) at %s:%d for lanes %#x, of which %#x have returned", i, name_of(t.op),
             t.mask, t.site.file, t.site.line, t.mask & ~w.arrived, t.mask & w.done);
    return;
  }
  for (int i = 0; i < engine.thread_count; ++i) {
    const Thread& t = engine.threads[i];
    if (t.state != State::at_barrier) continue;
    describe("thread %d waits at the barrier %s:%d with %d others; %d of the block's %d threads have returned", i,
             t.site.file, t.site.line, engine.waiting_at_barrier - 1, engine.done, engine.thread_count);
    return;
  }
}

void run_block() {
  start_block();
  while (engine.done < engine.thread_count && !engine.failed) {
    engine.order_turns(engine.thread_count);
    bool moved = false;
    for (int i = 0; i < engine.thread_count && !engine.failed; ++i) {
      Thread& t = engine.threads[engine.turns[static_cast<std::size_t>(i)]];
      if (t.state != State::ready) continue;
      moved = true;
      engine.current = &t;
      threadIdx = t.index;
      t.fiber.resume();
    }
    if (engine.failed) break;
    if (engine.waiting_at_barrier == engine.thread_count) {
      release_barrier();
    } else if (!moved) {
      report_stuck();
    }
  }
  for (int i = 0; i < engine.thread_count; ++i) {
    if (engine.threads[i].state != State::done) engine.threads[i].fiber.abandon();
  }
  if (!engine.failed && !engine.shared.end_block()) describe("shared memory was written just outside an array");
}

void run_blocks() {
  std::vector<uint64_t> blocks;
  const uint64_t count = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  if (engine.order == ThreadOrder::random) {
    blocks.resize(count);
    for (uint64_t i = 0; i < count; ++i) blocks[i] = i;
    for (uint64_t i = count - 1; i > 0; --i) std::swap(blocks[i], blocks[engine.random_below(i + 1)]);
  }
  for (uint64_t i = 0; i < count && !engine.failed; ++i) {
    const uint64_t b = engine.order == ThreadOrder::random    ? blocks[i]
                       : engine.order == ThreadOrder::reverse ? count - 1 - i
                                                              : i;
    blockIdx = {static_cast<unsigned>(b % gridDim.x), static_cast<unsigned>(b / gridDim.x % gridDim.y),
                static_cast<unsigned>(b / gridDim.x / gridDim.y)};
    run_block();
  }
}

}  // namespace

void* static_shared(const void* key, uint64_t bytes, uint64_t alignment) {
  void* const array = engine.shared.static_array(key, bytes, alignment);
  if (array == nullptr) {
    describe("static shared memory: more than %llu bytes, or too many arrays",
             static_cast<unsigned long long>(SharedMemory::kMaxStaticBytes));
    stop_thread();
  }
  return array;
}

void* dynamic_shared() { return engine.shared.dynamic(); }

void block_barrier(Site site) {
  const char* const object = &engine.barriers[engine.thread_set][engine.barrier_parity];
  DECLARE_RELEASE(const_cast<char*>(object));
  ++engine.waiting_at_barrier;
  wait_as(State::at_barrier, site);
  DECLARE_ACQUIRE(const_cast<char*>(object));
}

uint64_t warp_exchange(WarpOp op, unsigned mask, uint64_t bits, int lane_argument, int width, Site site) {
  Thread& t = *engine.current;
  const int first = t.number / warpSize * warpSize, lane = t.number % warpSize;
  Warp& w = engine.warps[t.number / warpSize];
  const unsigned self = 1u << lane;
  const auto refuse = [&](const char* why, unsigned lanes) {
    describe("thread %d, %s(mask %#x) at %s:%d: %s (lanes %#x)", t.number, name_of(op), mask, site.file, site.line, why,
             lanes);
    stop_thread();
  };
  if ((mask & self) == 0) refuse("the mask does not name the calling lane", self);
  if ((mask & ~w.exists) != 0) refuse("the mask names lanes that the block does not have", mask & ~w.exists);
  if ((mask & w.done) != 0) refuse("the mask names lanes that have returned", mask & w.done);
  if (width < 1 || width > warpSize || (width & (width - 1)) != 0) refuse("the width is not a power of two to 32", 0);

  const int segment = lane & ~(width - 1), last = segment + width - 1;
  t.source_lane = lane;
  switch (op) {
    case WarpOp::shuffle:
      t.source_lane = segment + (lane_argument & (width - 1));
      break;
    case WarpOp::shuffle_up:
      if (lane - lane_argument >= segment) t.source_lane = lane - lane_argument;
      break;
    case WarpOp::shuffle_down:
      if (lane + lane_argument <= last) t.source_lane = lane + lane_argument;
      break;
    case WarpOp::shuffle_xor:
      if ((lane ^ lane_argument) <= last) t.source_lane = lane ^ lane_argument;
      break;
    case WarpOp::sync:
    case WarpOp::ballot:
      break;
  }
  if ((mask >> t.source_lane & 1) == 0) refuse("reads a lane that the mask does not name", 1u << t.source_lane);

  t.op = op;
  t.mask = mask;
  t.bits = bits;
  t.site = site;
  w.arrived |= self;
  // Lanes that wait for each other in __syncwarp share one object: that of the first of them to arrive.
  if (op == WarpOp::sync) {
    t.sync_object = nullptr;
    for (int other = 0; other < warpSize; ++other) {
      if ((mask & w.arrived & ~self) >> other & 1) t.sync_object = engine.threads[first + other].sync_object;
    }
    if (t.sync_object == nullptr) t.sync_object = &w.sync_objects[w.sync_count++ % kWarpSyncObjects];
    DECLARE_RELEASE(const_cast<char*>(t.sync_object));
  } else {
    t.sync_object = nullptr;
  }

  if ((w.arrived & mask) != mask) {
    wait_as(State::at_warp_op, site);
  } else {
    uint64_t results[warpSize];
    uint64_t ballot = 0;
    for (int other = 0; other < warpSize; ++other) {
      if ((mask >> other & 1) == 0) continue;
      const Thread& o = engine.threads[first + other];
      if (o.op != op || o.mask != mask || !same_site(o.site, site)) {
        describe("thread %d, %s(mask %#x) at %s:%d: lane %d is in %s(mask %#x) at %s:%d", t.number, name_of(op), mask,
                 site.file, site.line, other, name_of(o.op), o.mask, o.site.file, o.site.line);
        stop_thread();
      }
      results[other] = engine.threads[first + o.source_lane].bits;
      ballot |= (o.bits & 1) << other;
    }
    for (int other = 0; other < warpSize; ++other) {
      if ((mask >> other & 1) == 0) continue;
      Thread& o = engine.threads[first + other];
      o.bits = op == WarpOp::ballot ? ballot : results[other];
      o.state = State::ready;
    }
    w.arrived &= ~mask;
  }
  if (op == WarpOp::sync) DECLARE_ACQUIRE(const_cast<char*>(t.sync_object));
  return t.bits;
}

void queue_copy(AsyncCopy copy) {
  Thread& t = *engine.current;
  const auto misaligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 != 0; };
  if (misaligned(copy.dst) || misaligned(copy.src)) {
    describe("thread %d: cp_async_16 with an address that is no multiple of 16", t.number);
    stop_thread();
  }
  if (t.issued - t.landed == kMaxCopiesInFlight) {
    describe("thread %d has %llu asynchronous copies in flight; the emulation holds no more", t.number,
             static_cast<unsigned long long>(kMaxCopiesInFlight));
    stop_thread();
  }
  copy.group = t.copy_group;
  t.copies[t.issued++ % kMaxCopiesInFlight] = copy;
}

void cp_async_commit() { ++engine.current->copy_group; }

bool next_landing(int groups_left_in_flight, AsyncCopy* copy) {
  Thread& t = *engine.current;
  if (t.landed == t.issued) return false;
  const AsyncCopy& oldest = t.copies[t.landed % kMaxCopiesInFlight];
  if (oldest.group + static_cast<uint64_t>(groups_left_in_flight) >= t.copy_group) return false;
  *copy = oldest;
  ++t.landed;
  return true;
}

void set_thread_order(ThreadOrder order, uint64_t seed) {
  engine.order = order;
  engine.seed(seed);
}

const char* last_report() { return engine.report; }

bool run_grid(KernelBody body, void* arguments, const cudaLaunchConfig_t& config) {
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  engine.body = body;
  engine.arguments = arguments;
  engine.thread_count = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  engine.failed = false;
  engine.turns.resize(static_cast<std::size_t>(engine.thread_count));
  for (int i = 0; i < engine.thread_count; ++i) {
    engine.turns[static_cast<std::size_t>(i)] = engine.order == ThreadOrder::reverse ? engine.thread_count - 1 - i : i;
  }
  for (; engine.allocated < engine.thread_count; ++engine.allocated) {
    for (auto& set : engine.thread_sets) set[engine.allocated].fiber.allocate(engine.allocated);
  }
  engine.shared.begin_launch(config.dynamicSmemBytes);
  run_blocks();
  DECLARE_ACQUIRE(&engine.kernel_end);

  const uint64_t static_bytes = engine.shared.static_bytes();
  if (!engine.failed && config.dynamicSmemBytes <= SharedMemory::kMaxStaticBytes &&
      static_bytes + config.dynamicSmemBytes > SharedMemory::kMaxStaticBytes) {
    describe("%llu bytes of static and %llu of dynamic shared memory exceed 48 KiB, which launch() does not raise",
             static_cast<unsigned long long>(static_bytes), static_cast<unsigned long long>(config.dynamicSmemBytes));
  }
  return !engine.failed;
}

}  // namespace cuda_host
