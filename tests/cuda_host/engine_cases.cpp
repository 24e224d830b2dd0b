// Tests of the engine: small kernels, most of them twice: sound, and with one planted bug.
//
//   engine_cases CASE...      runs them until one fails; prints what went wrong, and exits with
//     0  every launch succeeded and the results are right
//     1  results are wrong
//     2  the launch returned an error (printed: its name and text)
//   (a sanitizer that finds something ends the program itself)
//   engine_cases              prints the names

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cuda/ptx.cuh"

using namespace dsconv;

namespace {

constexpr int kThreads = 96;
constexpr unsigned kAll = 0xffffffffu;

// Exactly as large as asked, so that ASan sees the first element beyond.
template <typename T>
struct Buffer {
  explicit Buffer(int count_) : count(count_), data(new T[static_cast<std::size_t>(count_)]) {
    for (int i = 0; i < count; ++i) data[i] = T(i);
  }
  int count;
  std::unique_ptr<T[]> data;
};

DSCONV_DEVICE int thread_id() { return static_cast<int>(threadIdx.x); }

enum class Bug { none, planted };

// --- memory ordering -------------------------------------------------------------------------------------------------

template <Bug bug>
DSCONV_KERNEL void reverse_through_shared(const float* x, float* y) {
  DSCONV_SHARED(float, a, kThreads);
  a[thread_id()] = x[thread_id()];
  if (bug == Bug::none) __syncthreads();
  y[thread_id()] = a[kThreads - 1 - thread_id()];
}

// Two rounds through one array: the barrier that keeps the second round's writes behind the first round's reads.
template <Bug bug>
DSCONV_KERNEL void reverse_twice(const float* x, float* y) {
  DSCONV_SHARED(float, a, kThreads);
  a[thread_id()] = x[thread_id()];
  __syncthreads();
  const float reversed = a[kThreads - 1 - thread_id()];
  if (bug == Bug::none) __syncthreads();
  a[thread_id()] = reversed + 1;
  __syncthreads();
  y[thread_id()] = a[thread_id()] - 1;
}

template <Bug bug>
DSCONV_KERNEL void reverse_within_warps(const float* x, float* y) {
  DSCONV_SHARED(float, a, kThreads);
  a[thread_id()] = x[thread_id()];
  if (bug == Bug::none) {
    __syncwarp();
  } else {
    __shfl_sync(kAll, 0, 0);  // all arrive, but it orders no memory
  }
  y[thread_id()] = a[thread_id() / 32 * 32 + 31 - thread_id() % 32];
}

// Each block owns one element; with the bug two blocks write one.
template <Bug bug>
DSCONV_KERNEL void write_by_block(float* y) {
  const unsigned block = bug == Bug::none ? blockIdx.x : blockIdx.x / 2;
  if (thread_id() == static_cast<int>(blockIdx.x)) y[block] = static_cast<float>(block);
}

// --- asynchronous copies ---------------------------------------------------------------------------------------------

enum class Wait { sound, too_late, none, wrong_count, misaligned, beyond };

template <Wait wait>
DSCONV_KERNEL void copy_async(const float* x, float* y) {
  DSCONV_DYNAMIC_SHARED(float, a);
  float* mine = a + 8 * thread_id();
  cp_async<16>(mine, x + 8 * thread_id() + (wait == Wait::misaligned ? 1 : 0), wait == Wait::beyond ? 18 : 16);
  cp_async_commit();
  cp_async<16>(mine + 4, x + 8 * thread_id() + 4, thread_id() != 0 ? 16 : 0);
  cp_async_commit();
  cp_async_wait<wait == Wait::wrong_count ? 2 : 1>();
  y[8 * thread_id()] = mine[0];
  if (wait != Wait::too_late && wait != Wait::none) cp_async_wait<0>();
  for (int i = 1; i < 8; ++i) y[8 * thread_id() + i] = mine[i];
  if (wait == Wait::too_late) cp_async_wait<0>();
}

// Every size with every count of valid bytes; x[i] == i, and what is not valid is zero, its source never read.
template <int kBytes>
DSCONV_DEVICE bool copies_valid_bytes(const float* x, unsigned char* a) {
  bool right = true;
  for (int valid = 0; valid <= kBytes; valid += 2) {
    cp_async<kBytes>(a, valid == 0 ? nullptr : x + 4 * thread_id(), valid);
    cp_async_commit();
    cp_async_wait<0>();
    for (int i = 0; i < kBytes; ++i) {
      const int expected = i < valid ? reinterpret_cast<const unsigned char*>(x + 4 * thread_id())[i] : 0;
      right &= a[i] == expected;
    }
  }
  return right;
}

DSCONV_KERNEL void copy_async_sizes(const float* x, float* y) {
  DSCONV_DYNAMIC_SHARED(float, a);
  unsigned char* mine = reinterpret_cast<unsigned char*>(a + 4 * thread_id());
  const bool right =
      copies_valid_bytes<16>(x, mine) && copies_valid_bytes<8>(x, mine + 8) && copies_valid_bytes<4>(x, mine + 4);
  y[thread_id()] = right ? static_cast<float>(thread_id()) : -1.0f;
}

// --- vectors ---------------------------------------------------------------------------------------------------------

template <Bug bug>
DSCONV_KERNEL void read_vectors(const float* x, float* y) {
  const int first = thread_id() / 2 * 2 + (bug == Bug::planted && thread_id() == 0 ? 1 : 0);
  y[thread_id()] = reinterpret_cast<const Vec<float, 2>*>(x + first)->v[thread_id() % 2];
}

// --- bounds and uninitialised memory ---------------------------------------------------------------------------------

template <Bug bug>
DSCONV_KERNEL void write_global(float* y, int count) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + thread_id();
  if (bug == Bug::none ? i < count : i <= count) y[i] = static_cast<float>(i);
}

enum class Access { read, write };

template <Bug bug, Access access>
DSCONV_KERNEL void touch_static(float* y) {
  DSCONV_SHARED(float, before, kThreads);
  DSCONV_SHARED(float, after, kThreads);
  const int reach = thread_id() + (bug == Bug::none ? 0 : 1);
  before[thread_id()] = after[thread_id()] = static_cast<float>(thread_id());
  __syncthreads();
  // Through a pointer, as a kernel hands a tile to a function.
  float* tile = before;
  if (access == Access::write) tile[reach] = static_cast<float>(reach);
  __syncthreads();
  const float value = access == Access::read ? tile[reach] : tile[thread_id()];
  y[thread_id()] = value + (after[thread_id()] - static_cast<float>(thread_id()));
}

template <Bug bug, Access access>
DSCONV_KERNEL void touch_dynamic(float* y, int count) {
  DSCONV_DYNAMIC_SHARED(float, tile);
  for (int i = thread_id(); i < count; i += kThreads) tile[i] = static_cast<float>(i);
  __syncthreads();
  const int reach = thread_id() == kThreads - 1 && bug == Bug::planted ? count : thread_id();
  if (access == Access::write) tile[reach] = static_cast<float>(thread_id());
  __syncthreads();
  y[thread_id()] = access == Access::read ? tile[reach] : tile[thread_id()];
}

// In every block, shared memory starts undefined, whatever the block before has left there.
template <Bug bug>
DSCONV_KERNEL void read_shared(float* y) {
  DSCONV_SHARED(float, fixed, kThreads);
  DSCONV_DYNAMIC_SHARED(float, dynamic);
  if (bug == Bug::none || blockIdx.x == 0) {
    fixed[thread_id()] = 1;
    dynamic[thread_id()] = static_cast<float>(static_cast<int>(blockIdx.x) * kThreads + thread_id()) - 1;
  }
  y[static_cast<int>(blockIdx.x) * kThreads + thread_id()] = fixed[thread_id()] + dynamic[thread_id()];
}

// --- barriers --------------------------------------------------------------------------------------------------------

enum class Barrier { sound, in_branch, after_return, two_places };

template <Barrier barrier>
DSCONV_KERNEL void wait_for_all(float* y) {
  const bool half = thread_id() < kThreads / 2;
  if (barrier == Barrier::after_return && half) return;
  if (barrier == Barrier::two_places) {
    if (half) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (barrier != Barrier::in_branch || half) {
    __syncthreads();
  }
  y[thread_id()] = static_cast<float>(thread_id());
}

// --- warp primitives -------------------------------------------------------------------------------------------------

enum class Mask { sound, self_missing, lane_returned, lane_elsewhere, lanes_disagree, source_missing, beyond_block };

template <Mask mask>
DSCONV_KERNEL void shuffle_pairs(float* y) {
  const int lane = thread_id() % 32;
  const float value = static_cast<float>(thread_id() ^ 1);
  unsigned named = kAll;
  if (mask == Mask::self_missing) named = 0xfffffffeu;
  if (mask == Mask::source_missing) named = lane < 31 ? 0x7fffffffu : 0x80000000u;
  if (mask == Mask::lanes_disagree && lane >= 16) named = 0xffff0000u;
  if (mask == Mask::lane_returned && lane == 7) return;
  if (mask == Mask::lane_elsewhere && lane == 7) {
    __syncwarp();
    return;
  }
  y[thread_id()] = __shfl_xor_sync(named, value, 1);
}

// Everything a warp can exchange, against what each lane can tell for itself.
DSCONV_KERNEL void exchange_everything(float* y) {
  const int t = thread_id(), lane = t % 32;
  bool right = true;
  for (int width = 1; width <= 32; width *= 2) {
    const int first = lane / width * width;
    for (int d = 0; d < 32; ++d) {
      right &= __shfl_sync(kAll, t, d, width) == t - lane + first + d % width;
      right &= __shfl_up_sync(kAll, t, static_cast<unsigned>(d), width) == (lane - d >= first ? t - d : t);
      right &= __shfl_down_sync(kAll, t, static_cast<unsigned>(d), width) == (lane + d < first + width ? t + d : t);
      right &= __shfl_xor_sync(kAll, t, d, width) == ((lane ^ d) < first + width ? t - lane + (lane ^ d) : t);
    }
  }
  right &= __shfl_sync(kAll, t + 0.5, 3) == t - lane + 3.5;
  right &= __shfl_sync(kAll, static_cast<long long>(t) << 40, 3) == static_cast<long long>(t - lane + 3) << 40;
  right &= __ballot_sync(kAll, lane % 3 == 0) == 0x49249249u;
  right &= __any_sync(kAll, lane == 5) != 0 && __any_sync(kAll, lane == 32) == 0;
  right &= __all_sync(kAll, lane < 32) != 0 && __all_sync(kAll, lane != 5) == 0;
  // The two halves on their own, in different branches.
  if (lane < 16) {
    right &= __shfl_xor_sync(0xffffu, t, 8) == (t ^ 8);
  } else {
    right &= __shfl_xor_sync(0xffff0000u, t, 1) == (t ^ 1);
    __syncwarp(0xffff0000u);
  }
  y[t] = right ? static_cast<float>(t) : -1.0f;
}

// --- matrix instructions ---------------------------------------------------------------------------------------------

// One warp's product d[16][8] = c + a . b^T of small integers, exact in every type: a and b go row-major through shared
// memory and ldmatrix (b by two rows of matrices, of which one is used), or a transposed through ldmatrix.trans, and d
// and c as the lanes hold them. `y` of the lane is its number where its four results are right.
enum class Fragments { sound, transposed, by_hand, misaligned, lane_missing, no_barrier };

template <typename T>
DSCONV_DEVICE T element_of(int value) {
  return from_acc<T>(static_cast<float>(value));
}

DSCONV_DEVICE int a_at(int m, int k) { return (5 * m + 3 * k) % 17 - 8; }
DSCONV_DEVICE int b_at(int n, int k) { return (7 * n + 11 * k + n * k) % 13 - 6; }
DSCONV_DEVICE int c_at(int m, int n) { return 100 * m + n; }

template <typename T>
DSCONV_DEVICE uint32_t pair_of(int low, int high) {
  if constexpr (sizeof(T) == 4) {
    return float_bits(static_cast<float>(low));
  } else {
    return element_of<T>(low).bits | static_cast<uint32_t>(element_of<T>(high).bits) << 16;
  }
}

template <typename T, Fragments how>
DSCONV_KERNEL void multiply_matrices(float* y) {
  constexpr int kDepth = 32 / static_cast<int>(sizeof(T)), kPerWord = 4 / static_cast<int>(sizeof(T));
  DSCONV_DYNAMIC_SHARED(T, a);  // [16][kDepth], or transposed
  T* b = a + 16 * kDepth;       // [16][kDepth], of which 8 rows are used
  const int lane = thread_id() % 32, g = lane / 4, t = lane % 4;
  for (int i = thread_id(); i < 16 * kDepth; i += kThreads) {
    const int row = i / kDepth, column = i % kDepth;
    a[how == Fragments::transposed ? column * 16 + row : i] = element_of<T>(a_at(row, column));
    b[i] = element_of<T>(b_at(row, column));
  }
  if (how != Fragments::no_barrier) __syncthreads();
  uint32_t af[4], bf[4];
  constexpr int kChunk = kDepth / 2;  // elements in 16 bytes
  if constexpr (how == Fragments::by_hand) {
    for (int i = 0; i < 4; ++i) {
      const int m = g + i % 2 * 8, k = t * kPerWord + i / 2 * kChunk;
      af[i] = pair_of<T>(a_at(m, k), a_at(m, k + 1));
      if (i < 2) bf[i] = pair_of<T>(b_at(g, t * kPerWord + i * kChunk), b_at(g, t * kPerWord + i * kChunk + 1));
    }
  } else {
    if constexpr (how == Fragments::transposed) {
      ldmatrix_x4_trans(a + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8, af);
    } else {
      ldmatrix_x4(a + lane % 16 * kDepth + lane / 16 * kChunk + (how == Fragments::misaligned ? 1 : 0), af);
    }
    ldmatrix_x4(b + (lane % 8 + lane / 16 * 8) * kDepth + lane / 8 % 2 * kChunk, bf);
  }
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = static_cast<float>(c_at(g + i / 2 * 8, 2 * t + i % 2));
  if (how == Fragments::lane_missing && lane == 7) return;
  mma<T>(d, af, {bf[0], bf[1]});
  bool right = true;
  for (int i = 0; i < 4; ++i) {
    const int m = g + i / 2 * 8, n = 2 * t + i % 2;
    int expected = c_at(m, n);
    for (int k = 0; k < kDepth; ++k) expected += a_at(m, k) * b_at(n, k);
    right &= d[i] == static_cast<float>(expected);
  }
  y[thread_id()] = right ? static_cast<float>(thread_id()) : -1.0f;
}

// The half step of sm_75.
DSCONV_KERNEL void multiply_half_step(float* y) {
  const int lane = thread_id() % 32, g = lane / 4, t = lane % 4;
  const uint32_t a[2] = {pair_of<Half>(a_at(g, 2 * t), a_at(g, 2 * t + 1)),
                         pair_of<Half>(a_at(g + 8, 2 * t), a_at(g + 8, 2 * t + 1))};
  float d[4] = {};
  mma_m16n8k8_f16(d, a, pair_of<Half>(b_at(g, 2 * t), b_at(g, 2 * t + 1)));
  bool right = true;
  for (int i = 0; i < 4; ++i) {
    int expected = 0;
    for (int k = 0; k < 8; ++k) expected += a_at(g + i / 2 * 8, k) * b_at(2 * t + i % 2, k);
    right &= d[i] == static_cast<float>(expected);
  }
  y[thread_id()] = right ? static_cast<float>(thread_id()) : -1.0f;
}

// TF32 keeps 10 bits of the fraction: to_tf32 rounds to them, ties away from zero; the multiplication cuts what is
// left.
DSCONV_KERNEL void round_to_tf32(float* y) {
  const float inf = bits_float(0x7f800000u), ulp = 0x1p-10f;
  bool right =
      to_tf32(1.0f) == float_bits(1.0f) && to_tf32(inf) == float_bits(inf) && to_tf32(-inf) == float_bits(-inf);
  right &= bits_float(to_tf32(1 + 0.5f * ulp)) == 1 + ulp && bits_float(to_tf32(-1 - 0.5f * ulp)) == -1 - ulp;
  right &= bits_float(to_tf32(1 + 0.499f * ulp)) == 1 && bits_float(to_tf32(2 - 0.25f * ulp)) == 2;
  const float nan = bits_float(to_tf32(bits_float(0x7f800001u)));
  right &= nan != nan;
  float d[4] = {};
  const uint32_t one = float_bits(1.0f), cut = float_bits(1 + 0.999f * ulp);
  mma<float>(d, {cut, cut, 0, 0}, {one, 0});
  for (int i = 0; i < 4; ++i) right &= d[i] == 4;
  y[thread_id()] = right ? static_cast<float>(thread_id()) : -1.0f;
}

// --- the rest of the model -------------------------------------------------------------------------------------------

DSCONV_DEVICE float* shared_of_function() {
  DSCONV_SHARED(float, a, kThreads);
  return a;
}

DSCONV_KERNEL void share_by_function(float* y) {
  shared_of_function()[thread_id()] = static_cast<float>(kThreads - 1 - thread_id());
  __syncthreads();
  y[thread_id()] = shared_of_function()[kThreads - 1 - thread_id()];
}

DSCONV_KERNEL void number_in_three_dimensions(float* y) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  __syncthreads();
  const unsigned i = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
  y[i] = static_cast<float>(i);
}

// When each thread had its first turn; a race on a device, here it shows the order.
DSCONV_KERNEL void record_turns(float* y, int* turn) {
  y[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<float>((*turn)++);
}

DSCONV_KERNEL void large_static(float* y) {
  DSCONV_SHARED(float, a, 12 * 1024);
  DSCONV_SHARED(float, b, 1);
  if (thread_id() == 0) a[0] = b[0] = 0;
  y[thread_id()] = static_cast<float>(thread_id());
}

DSCONV_KERNEL void static_and_dynamic(float* y) {
  DSCONV_SHARED(float, a, 1024);
  DSCONV_DYNAMIC_SHARED(float, b);
  if (thread_id() == 0) a[0] = b[0] = 0;
  y[thread_id()] = static_cast<float>(thread_id());
}

DSCONV_KERNEL void nothing() {}

// --- running them ----------------------------------------------------------------------------------------------------

int failed_launch(cudaError_t error) {
  std::printf("launch: %s: %s\n", cudaGetErrorName(error), cudaGetErrorString(error));
  return 2;
}

// The launch, then y[i] == expected(i).
int check(const Buffer<float>& y, cudaError_t error, const std::function<float(int)>& expected) {
  if (error != cudaSuccess) return failed_launch(error);
  for (int i = 0; i < y.count; ++i) {
    if (y.data[i] == expected(i)) continue;
    std::printf("wrong: y[%d] is %g, not %g\n", i, y.data[i], expected(i));
    return 1;
  }
  return 0;
}

float identity(int i) { return static_cast<float>(i); }
float reversed(int i) { return static_cast<float>(kThreads - 1 - i); }

template <typename... Params>
int run_xy(void (*kernel)(Params...), float (*expected)(int)) {
  Buffer<float> x(kThreads), y(kThreads);
  return check(y, launch(kernel, 1, kThreads, 0, nullptr, x.data.get(), y.data.get()), expected);
}

template <typename... Params, typename... Args>
int run_y(void (*kernel)(Params...), unsigned blocks, int count, std::size_t dynamic_bytes, Args... args) {
  Buffer<float> y(count);
  for (int i = 0; i < count; ++i) y.data[i] = -1;
  return check(y, launch(kernel, blocks, kThreads, dynamic_bytes, nullptr, y.data.get(), args...), identity);
}

template <Wait wait>
int run_copy() {
  const int count = 8 * kThreads;
  // One float more than a misaligned copy reads, 16-byte aligned as new[] is.
  Buffer<float> x(count + 4), y(count);
  const cudaError_t error =
      launch(copy_async<wait>, 1, kThreads, sizeof(float) * count, nullptr, x.data.get(), y.data.get());
  return check(y, error, [](int i) { return 4 <= i && i < 8 ? 0.0f : static_cast<float>(i); });
}

template <typename T, Fragments how>
int run_mma() {
  return run_y(multiply_matrices<T, how>, 1, kThreads, 2 * 16 * 32);
}

int run_three_dimensions() {
  Buffer<float> y(2 * 3 * 4 * 40);
  return check(y, launch(number_in_three_dimensions, dim3(2, 3, 4), dim3(5, 4, 2), 0, nullptr, y.data.get()), identity);
}

int run_orders() {
  using cuda_host::ThreadOrder;
  const auto turns = [](ThreadOrder order, uint64_t seed) {
    Buffer<float> y(3 * kThreads);
    int turn = 0;
    cuda_host::set_thread_order(order, seed);
    static_cast<void>(launch(record_turns, 3, kThreads, 0, nullptr, y.data.get(), &turn));
    return std::vector<float>(y.data.get(), y.data.get() + y.count);
  };
  const auto forward = turns(ThreadOrder::forward, 0), reverse = turns(ThreadOrder::reverse, 0);
  const auto random = turns(ThreadOrder::random, 1), again = turns(ThreadOrder::random, 1);
  bool right = random == again && random != turns(ThreadOrder::random, 2) && random != forward && random != reverse;
  for (int i = 0; i < 3 * kThreads; ++i) {
    right &= forward[static_cast<std::size_t>(i)] == static_cast<float>(i);
    right &= reverse[static_cast<std::size_t>(i)] == static_cast<float>(3 * kThreads - 1 - i);
  }
  return right ? 0 : 1;
}

// Each must return CUDA's error code, or succeed.
int run_limits() {
  int wrong = 0;
  const auto expect = [&](const char* what, cudaError_t expected, cudaError_t got) {
    if (got == expected && cudaGetLastError() == cudaSuccess) return;
    std::printf("%s: %s, not %s\n", what, cudaGetErrorName(got), cudaGetErrorName(expected));
    ++wrong;
  };
  const auto go = [](dim3 grid, dim3 block, std::size_t dynamic_bytes = 0) {
    return launch(nothing, grid, block, dynamic_bytes, nullptr);
  };
  expect("1024 threads", cudaSuccess, go(1, 1024));
  expect("1025 threads", cudaErrorInvalidConfiguration, go(1, 1025));
  expect("32 x 33 threads", cudaErrorInvalidConfiguration, go(1, dim3(32, 33)));
  expect("65 threads in z", cudaErrorInvalidConfiguration, go(1, dim3(1, 1, 65)));
  expect("no thread", cudaErrorInvalidConfiguration, go(1, 0));
  expect("no block", cudaErrorInvalidConfiguration, go(0, 1));
  expect("70000 blocks in x", cudaSuccess, go(70000, 1));
  expect("65535 blocks in y", cudaSuccess, go(dim3(1, kGridYZLimit), 1));
  expect("65536 blocks in y", cudaErrorInvalidConfiguration, go(dim3(1, kGridYZLimit + 1), 1));
  expect("65536 blocks in z", cudaErrorInvalidConfiguration, go(dim3(1, 1, kGridYZLimit + 1), 1));
  expect("2^31 blocks in x", cudaErrorInvalidConfiguration, go(0x80000000u, 1));

  int optin = 0;
  expect("attribute", cudaSuccess, cudaDeviceGetAttribute(&optin, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  const auto bytes = static_cast<std::size_t>(optin);
  cudaLaunchConfig_t unasked{1, 1, kDefaultSharedBytes + 1, nullptr};
  expect("48 KiB", cudaSuccess, go(1, 1, kDefaultSharedBytes));
  const cudaError_t refused = cudaLaunchKernelEx(&unasked, nothing);
  expect("left for cudaGetLastError by a bare launch", cudaErrorInvalidValue, cudaGetLastError());
  expect("above 48 KiB without asking", cudaErrorInvalidValue, refused);
  expect("all that the device has", cudaSuccess, go(1, 1, bytes));
  expect("more than it has", cudaErrorInvalidValue, go(1, 1, bytes + 1));
  return wrong == 0 ? 0 : 1;
}

constexpr std::size_t kOddBytes = sizeof(float) * (kThreads + 1);  // no multiple of 8, nor of the memory's alignment

const std::map<std::string, std::function<int()>> kCases = {
    {"barrier", [] { return run_xy(reverse_through_shared<Bug::none>, reversed); }},
    {"barrier-dropped", [] { return run_xy(reverse_through_shared<Bug::planted>, reversed); }},
    {"barrier-before-reuse", [] { return run_xy(reverse_twice<Bug::none>, reversed); }},
    {"barrier-before-reuse-dropped", [] { return run_xy(reverse_twice<Bug::planted>, reversed); }},
    {"syncwarp", [] { return run_xy(reverse_within_warps<Bug::none>, [](int i) { return identity(i ^ 31); }); }},
    {"syncwarp-dropped",
     [] { return run_xy(reverse_within_warps<Bug::planted>, [](int i) { return identity(i ^ 31); }); }},
    {"blocks-apart", [] { return run_y(write_by_block<Bug::none>, 4, 4, 0); }},
    {"blocks-collide", [] { return run_y(write_by_block<Bug::planted>, 4, 2, 0); }},

    {"copy", run_copy<Wait::sound>},
    {"copy-waited-too-late", run_copy<Wait::too_late>},
    {"copy-never-waited", run_copy<Wait::none>},
    {"copy-wrong-count", run_copy<Wait::wrong_count>},
    {"copy-misaligned", run_copy<Wait::misaligned>},
    {"copy-beyond", run_copy<Wait::beyond>},
    {"copy-sizes",
     [] {
       Buffer<float> x(4 * kThreads), y(kThreads);
       return check(
           y, launch(copy_async_sizes, 1, kThreads, sizeof(float) * 4 * kThreads, nullptr, x.data.get(), y.data.get()),
           identity);
     }},

    {"vectors", [] { return run_xy(read_vectors<Bug::none>, identity); }},
    {"vectors-misaligned", [] { return run_xy(read_vectors<Bug::planted>, identity); }},

    {"mma-f16", run_mma<Half, Fragments::sound>},
    {"mma-bf16", run_mma<BFloat16, Fragments::sound>},
    {"mma-tf32", run_mma<float, Fragments::sound>},
    {"mma-f16-by-hand", run_mma<Half, Fragments::by_hand>},
    {"mma-bf16-by-hand", run_mma<BFloat16, Fragments::by_hand>},
    {"mma-tf32-by-hand", run_mma<float, Fragments::by_hand>},
    {"mma-f16-transposed", run_mma<Half, Fragments::transposed>},
    {"mma-half-step", [] { return run_y(multiply_half_step, 1, kThreads, 0); }},
    {"mma-lane-missing", run_mma<Half, Fragments::lane_missing>},
    {"ldmatrix-misaligned", run_mma<Half, Fragments::misaligned>},
    {"ldmatrix-barrier-dropped", run_mma<Half, Fragments::no_barrier>},
    {"round-to-tf32", [] { return run_y(round_to_tf32, 1, kThreads, 0); }},

    {"global", [] { return run_y(write_global<Bug::none>, 2, 150, 0, 150); }},
    {"global-off-by-one", [] { return run_y(write_global<Bug::planted>, 2, 150, 0, 150); }},
    {"static", [] { return run_y(touch_static<Bug::none, Access::write>, 1, kThreads, 0); }},
    {"static-read-off-by-one", [] { return run_y(touch_static<Bug::planted, Access::read>, 1, kThreads, 0); }},
    {"static-write-off-by-one", [] { return run_y(touch_static<Bug::planted, Access::write>, 1, kThreads, 0); }},
    {"dynamic", [] { return run_y(touch_dynamic<Bug::none, Access::write>, 1, kThreads, kOddBytes, kThreads + 1); }},
    {"dynamic-read-off-by-one",
     [] { return run_y(touch_dynamic<Bug::planted, Access::read>, 1, kThreads, kOddBytes, kThreads + 1); }},
    {"dynamic-write-off-by-one",
     [] { return run_y(touch_dynamic<Bug::planted, Access::write>, 1, kThreads, kOddBytes, kThreads + 1); }},
    {"initialised", [] { return run_y(read_shared<Bug::none>, 2, 2 * kThreads, sizeof(float) * kThreads); }},
    {"uninitialised", [] { return run_y(read_shared<Bug::planted>, 2, 2 * kThreads, sizeof(float) * kThreads); }},

    {"barrier-for-all", [] { return run_y(wait_for_all<Barrier::sound>, 1, kThreads, 0); }},
    {"barrier-in-branch", [] { return run_y(wait_for_all<Barrier::in_branch>, 1, kThreads, 0); }},
    {"barrier-after-return", [] { return run_y(wait_for_all<Barrier::after_return>, 1, kThreads, 0); }},
    {"barrier-in-two-places", [] { return run_y(wait_for_all<Barrier::two_places>, 1, kThreads, 0); }},

    {"shuffle", [] { return run_y(shuffle_pairs<Mask::sound>, 1, kThreads, 0); }},
    {"mask-without-self", [] { return run_y(shuffle_pairs<Mask::self_missing>, 1, kThreads, 0); }},
    {"mask-lane-returned", [] { return run_y(shuffle_pairs<Mask::lane_returned>, 1, kThreads, 0); }},
    {"mask-lane-elsewhere", [] { return run_y(shuffle_pairs<Mask::lane_elsewhere>, 1, kThreads, 0); }},
    {"mask-lanes-disagree", [] { return run_y(shuffle_pairs<Mask::lanes_disagree>, 1, kThreads, 0); }},
    {"mask-without-source", [] { return run_y(shuffle_pairs<Mask::source_missing>, 1, kThreads, 0); }},
    {"mask-beyond-block",
     [] {
       Buffer<float> y(16);
       return check(y, launch(shuffle_pairs<Mask::sound>, 1, 16, 0, nullptr, y.data.get()), identity);
     }},
    {"exchange", [] { return run_y(exchange_everything, 1, kThreads, 0); }},

    {"shared-of-function", [] { return run_y(share_by_function, 1, kThreads, 0); }},
    {"three-dimensions", run_three_dimensions},
    {"orders", run_orders},
    {"limits", run_limits},
    {"static-above-48-KiB", [] { return run_y(large_static, 1, kThreads, 0); }},
    {"static-and-dynamic", [] { return run_y(static_and_dynamic, 1, kThreads, 44 * 1024); }},
    {"static-and-dynamic-above-48-KiB", [] { return run_y(static_and_dynamic, 1, kThreads, 45 * 1024); }},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    for (const auto& [name, run] : kCases) std::puts(name.c_str());
  }
  for (int i = 1; i < argc; ++i) {
    const auto found = kCases.find(argv[i]);
    if (found == kCases.end()) {
      std::printf("no case is called %s\n", argv[i]);
      return 3;
    }
    if (const int status = found->second(); status != 0) {
      std::printf("in %s\n", argv[i]);
      return status;
    }
  }
  return 0;
}
