// Runs the kernels of counter_kernels.cpp and compares what was counted with what was counted by hand. Prints what is
// wrong, or how many cases there were.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cuda/portability.cuh"
#include "counters.h"
#include "cuda_host.h"

namespace counted {
void copy(const float* x, float* y, int stride, int offset);
void copy_vectors(const float* x, float* y);
void skip_taps(const float* x, float* y, int taps);
void loop_unequally(const float* x, float* y);
void through_shared(float* y, int stride);
void shared_vectors(float* y, int stride);
void copy_async(const float* x, float* y);
void read_matrices(float* y, int stride);
}  // namespace counted

namespace {

using namespace counted;
using cuda_host::KernelTraffic;

int wrong = 0, cases = 0;
float* x = nullptr;
float* y = nullptr;

void expect(const char* name, const char* what, uint64_t found, uint64_t expected) {
  if (found == expected) return;
  std::printf("%s: %s is %llu, not %llu\n", name, what, static_cast<unsigned long long>(found),
              static_cast<unsigned long long>(expected));
  ++wrong;
}

template <typename... Params, typename... Args>
KernelTraffic run(unsigned blocks, void (*kernel)(Params...), Args... args) {
  ++cases;
  dsconv::launch(kernel, dim3(blocks), dim3(32), 40 * 1024, nullptr, args...);
  return cuda_host::take_traffic().at(0);
}

struct Sectors {
  uint64_t requests, read, of_block;
};

void check_reads(const char* name, const KernelTraffic& k, const Sectors& expected) {
  expect(name, "requests of x", k.tensors.at(0).requests, expected.requests);
  expect(name, "sectors read of x", k.tensors.at(0).read_sectors, expected.read);
  expect(name, "distinct sectors of x", k.tensors.at(0).block_sectors, expected.of_block);
}

void check_shared(const char* name, const KernelTraffic& k, uint64_t stores, uint64_t free_stores, uint64_t loads,
                  uint64_t free_loads) {
  expect(name, "store wavefronts", k.store_wavefronts, stores);
  expect(name, "store wavefronts without conflicts", k.free_store_wavefronts, free_stores);
  expect(name, "load wavefronts", k.load_wavefronts, loads);
  expect(name, "load wavefronts without conflicts", k.free_load_wavefronts, free_loads);
}

}  // namespace

int main() {
  constexpr uint64_t kBytes = 64 * 1024;
  x = static_cast<float*>(std::aligned_alloc(512, kBytes));
  y = static_cast<float*>(std::aligned_alloc(512, kBytes));
  for (uint64_t i = 0; i < kBytes / 4; ++i) x[i] = y[i] = 0;
  cuda_host::count_tensor("x", x, kBytes);
  cuda_host::count_tensor("y", y, kBytes);
  cuda_host::count_blocks(4);

  KernelTraffic k = run(1, copy, x, y, 1, 0);
  check_reads("coalesced", k, {1, 4, 4});
  expect("coalesced", "sectors written", k.tensors.at(1).written_sectors, 4);
  check_reads("misaligned", run(1, copy, x, y, 1, 3), {1, 5, 5});
  check_reads("every second", run(1, copy, x, y, 2, 0), {1, 8, 8});
  check_reads("a sector each", run(1, copy, x, y, 8, 0), {1, 32, 32});
  check_reads("one for all", run(1, copy, x, y, 0, 0), {1, 1, 1});

  k = run(3, copy, x, y, 1, 0);
  check_reads("three blocks", k, {3, 12, 12});
  expect("three blocks", "blocks counted", k.counted_blocks, 3);
  k = run(100, copy, x, y, 1, 0);
  check_reads("some of many blocks", k, {4, 16, 16});
  expect("some of many blocks", "blocks counted", k.counted_blocks, 4);
  expect("some of many blocks", "blocks", k.blocks, 100);

  k = run(1, copy_vectors, x, y);
  check_reads("vectors", k, {1, 16, 16});
  expect("vectors", "requests of y", k.tensors.at(1).requests, 1);
  expect("vectors", "sectors written", k.tensors.at(1).written_sectors, 16);

  // 2 rows of 5 taps: every tap is one instruction, of all lanes or of those that do not skip it, 4 sectors each.
  check_reads("skipped taps", run(1, skip_taps, x, y, 5), {10, 40, 40});
  check_reads("a loop of unequal lengths", run(1, loop_unequally, x, y), {4, 4 + 3 + 2 + 1, 10});

  check_shared("shared", run(1, through_shared, y, 1), 1, 1, 1, 1);
  check_shared("shared, two banks a lane", run(1, through_shared, y, 2), 2, 1, 1, 1);
  check_shared("shared, one bank", run(1, through_shared, y, 32), 32, 1, 1, 1);
  check_shared("shared, padded", run(1, through_shared, y, 33), 1, 1, 1, 1);
  check_shared("shared vectors", run(1, shared_vectors, y, 4), 4, 4, 4, 4);
  check_shared("shared vectors, rows of 128 bytes", run(1, shared_vectors, y, 32), 32, 4, 32, 4);
  check_shared("shared vectors, padded rows", run(1, shared_vectors, y, 36), 4, 4, 4, 4);

  k = run(1, copy_async, x, y);
  check_reads("asynchronous copies", k, {1, 8, 8});
  check_shared("asynchronous copies", k, 4, 4, 4, 1);
  check_shared("matrices", run(1, read_matrices, y, 8), 0, 0, 4, 4);
  check_shared("matrices, rows of 128 bytes", run(1, read_matrices, y, 64), 0, 0, 32, 4);
  check_shared("matrices, padded rows", run(1, read_matrices, y, 72), 0, 0, 4, 4);

  std::printf("cases %d\n", cases);
  return wrong == 0 ? 0 : 1;
}
