// The emulated device: runs a grid block by block, the threads of a block as fibers in turns, and reports what a GPU
// would answer with a hang, a wrong result or luck:
//   * a thread that returns, or waits elsewhere, while others wait at a barrier;
//   * a warp primitive whose named lanes do not all arrive, with the same mask, at the same place;
//   * a shuffle from a lane that its mask does not name; an asynchronous copy that is misaligned or never waited for;
//   * writes just outside shared memory, static arrays beyond 48 KiB.
// The text is printed and kept for last_report().

#include "engine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "engine_state.h"

#if defined(CUDA_HOST_COUNT)
#include "counters.h"
#define COUNT(call) call
#else
#define COUNT(call) static_cast<void>(0)
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_host {

Engine engine;

bool same_site(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

void report(const char* format, ...) {
  const int used =
      std::snprintf(engine.text, sizeof engine.text, "block (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(engine.text + used, sizeof engine.text - static_cast<std::size_t>(used), format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "cuda_host: %s\n", engine.text);
  engine.failed = true;
}

void stop_thread() { engine.current->fiber.leave(); }

void wait_as(State state, Site site) {
  Thread& t = *engine.current;
  t.state = state;
  t.site = site;
  t.fiber.yield();
}

namespace {

void run_thread() {
  DECLARE_ACQUIRE(&engine.block_start);
  engine.body(engine.arguments);
  DECLARE_RELEASE(&engine.kernel_end);
  Thread& t = *engine.current;
  if (t.landed != t.issued) {
    report("thread %d returns with asynchronous copies that it has not waited for", t.number);
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

void release_barrier() {
  COUNT(count_barrier());
  const Thread& first = engine.threads[0];
  for (int i = 1; i < engine.thread_count; ++i) {
    const Thread& t = engine.threads[i];
    if (!same_site(t.site, first.site)) {
      report("threads 0 and %d wait at different barriers: %s:%d and %s:%d", i, first.site.file, first.site.line,
             t.site.file, t.site.line);
      return;
    }
  }
  for (int i = 0; i < engine.thread_count; ++i) engine.threads[i].state = State::ready;
  engine.waiting_at_barrier = 0;
  engine.barrier_parity ^= 1;
}

// Every thread waits or has returned, and no wait can end.
void report_stuck() {
  for (int i = 0; i < engine.thread_count; ++i) {
    const Thread& t = engine.threads[i];
    if (t.state != State::at_warp_op) continue;
    const Warp& w = engine.warps[i / warpSize];
    report("thread %d waits in %s(mask %#x) at %s:%d for lanes %#x, of which %#x have returned", i, name_of(t.op),
           t.mask, t.site.file, t.site.line, t.mask & ~w.arrived, t.mask & w.done);
    return;
  }
  for (int i = 0; i < engine.thread_count; ++i) {
    const Thread& t = engine.threads[i];
    if (t.state != State::at_barrier) continue;
    report("thread %d waits at the barrier %s:%d with %d others; %d of the block's %d threads have returned", i,
           t.site.file, t.site.line, engine.waiting_at_barrier - 1, engine.done, engine.thread_count);
    return;
  }
}

void run_block() {
  start_block();
  while (engine.done < engine.thread_count && !engine.failed) {
    bool moved = false;
    for (const int number : engine.turns.threads()) {
      Thread& t = engine.threads[number];
      if (t.state != State::ready) continue;
      moved = true;
      engine.current = &t;
      threadIdx = t.index;
      COUNT(count_lane(number));
      t.fiber.resume();
      COUNT(count_lane(-1));
      if (engine.failed) break;
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
  COUNT(count_barrier());
  if (!engine.failed && !engine.shared.end_block()) report("shared memory was written just outside an array");
}

void run_blocks() {
  const uint64_t count = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  const auto run = [](uint64_t b) {
    blockIdx = {static_cast<unsigned>(b % gridDim.x), static_cast<unsigned>(b / gridDim.x % gridDim.y),
                static_cast<unsigned>(b / gridDim.x / gridDim.y)};
    run_block();
  };
  engine.turns.begin_launch(count, engine.thread_count);
#if defined(CUDA_HOST_COUNT)
  bool counted = false;
  for (const uint64_t b : blocks_to_run(count)) {
    count_block_start(counted);
    if (!engine.failed) run(b);
    counted = true;
  }
#else
  for (uint64_t i = 0; i < count && !engine.failed; ++i) run(engine.turns.block(i));
#endif
}

}  // namespace

void* static_shared(const void* key, uint64_t bytes, uint64_t alignment) {
  void* const array = engine.shared.static_array(key, bytes, alignment);
  if (array == nullptr) {
    report("static shared memory: more than %llu bytes, or too many arrays",
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

void set_thread_order(ThreadOrder order, uint64_t seed) { engine.turns.choose(order, seed); }

const char* last_report() { return engine.text; }

bool run_grid(KernelBody body, void* arguments, const cudaLaunchConfig_t& config) {
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  engine.body = body;
  engine.arguments = arguments;
  engine.thread_count = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  engine.failed = false;
  for (; engine.allocated < engine.thread_count; ++engine.allocated) {
    for (auto& set : engine.thread_sets) set[engine.allocated].fiber.allocate(engine.allocated);
  }
  engine.shared.begin_launch(config.dynamicSmemBytes);
  COUNT(count_shared(engine.shared.mapping(), SharedMemory::kMappingBytes));
  run_blocks();
  DECLARE_ACQUIRE(&engine.kernel_end);

  const uint64_t static_bytes = engine.shared.static_bytes();
  if (!engine.failed && config.dynamicSmemBytes <= SharedMemory::kMaxStaticBytes &&
      static_bytes + config.dynamicSmemBytes > SharedMemory::kMaxStaticBytes) {
    report("%llu bytes of static and %llu of dynamic shared memory exceed 48 KiB, which launch() does not raise",
           static_cast<unsigned long long>(static_bytes), static_cast<unsigned long long>(config.dynamicSmemBytes));
  }
  return !engine.failed;
}

}  // namespace cuda_host
