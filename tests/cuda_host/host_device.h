// What a kernel sees of the emulated device: its place in the grid, shared memory, barriers, warp primitives and
// asynchronous copies. The functions are in engine.cpp, which no sanitizer instruments; what is inline here is compiled
// with the kernel, so that its memory accesses are the kernel's own to ASan and TSan.
#pragma once

#include <cstdint>
#include <type_traits>

#include "host_types.h"

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_host {

// A call's place in the kernel source tells two barriers apart.
struct Site {
  const char* file;
  int line;
};

enum class WarpOp : int { sync, shuffle, shuffle_up, shuffle_down, shuffle_xor, ballot };

void* static_shared(const void* key, uint64_t bytes, uint64_t alignment);
void* dynamic_shared();
void block_barrier(Site site);
uint64_t warp_exchange(WarpOp op, unsigned mask, uint64_t bits, int lane_argument, int width, Site site);

struct AsyncCopy {
  uint4* dst;
  const uint4* src;  // null: zeros
  uint64_t group;
};
void queue_copy(AsyncCopy copy);
bool next_landing(int groups_left_in_flight, AsyncCopy* copy);
void cp_async_commit();

// Until it lands the destination holds NaNs, so that a read before the wait shows.
inline void cp_async_16(void* dst, const void* src, bool pred) {
  queue_copy({static_cast<uint4*>(dst), pred ? static_cast<const uint4*>(src) : nullptr, 0});
  *static_cast<uint4*>(dst) = make_uint4(~0u, ~0u, ~0u, ~0u);
}

inline void cp_async_wait(int groups_left_in_flight) {
  AsyncCopy copy;
  while (next_landing(groups_left_in_flight, &copy))
    *copy.dst = copy.src != nullptr ? *copy.src : make_uint4(0, 0, 0, 0);
}

template <typename T>
inline T exchange(WarpOp op, unsigned mask, T value, int lane_argument, int width, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_exchange(op, mask, bits, lane_argument, width, site);
  T result;
  std::memcpy(&result, &bits, sizeof(T));
  return result;
}

}  // namespace cuda_host

#define CUDA_HOST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_HOST_SITE) { cuda_host::block_barrier({file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_HOST_SITE) {
  cuda_host::warp_exchange(cuda_host::WarpOp::sync, mask, 0, 0, warpSize, {file, line});
}

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize, CUDA_HOST_SITE) {
  return cuda_host::exchange(cuda_host::WarpOp::shuffle, mask, value, lane, width, {file, line});
}

template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CUDA_HOST_SITE) {
  return cuda_host::exchange(cuda_host::WarpOp::shuffle_up, mask, value, static_cast<int>(delta), width, {file, line});
}

template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CUDA_HOST_SITE) {
  return cuda_host::exchange(cuda_host::WarpOp::shuffle_down, mask, value, static_cast<int>(delta), width,
                             {file, line});
}

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, CUDA_HOST_SITE) {
  return cuda_host::exchange(cuda_host::WarpOp::shuffle_xor, mask, value, lane_mask, width, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
  return static_cast<unsigned>(
      cuda_host::warp_exchange(cuda_host::WarpOp::ballot, mask, predicate != 0, 0, warpSize, {file, line}));
}

inline int __any_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}

inline int __all_sync(unsigned mask, int predicate, CUDA_HOST_SITE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

#undef CUDA_HOST_SITE
