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

// Functions that kernels call. Counting builds tell instructions apart by their place, one for each call.
#if defined(CUDA_HOST_COUNT)
#include "counters.h"
#define CUDA_HOST_INLINE inline __attribute__((always_inline))
#else
#define CUDA_HOST_INLINE inline
#endif

namespace cuda_host {

// A call's place in the kernel source tells two barriers apart.
struct Site {
  const char* file;
  int line;
};

enum class WarpOp : int { sync, shuffle, shuffle_up, shuffle_down, shuffle_xor, ballot, ldmatrix, mma };

void* static_shared(const void* key, uint64_t bytes, uint64_t alignment);
void* dynamic_shared();
void block_barrier(Site site);
uint64_t warp_exchange(WarpOp op, unsigned mask, uint64_t bits, int lane_argument, int width, Site site);

struct AsyncCopy {
  void* dst;
  const void* src;
  int bytes, valid;  // zeros from `valid` on
  uint64_t group;
};
void queue_copy(AsyncCopy copy);
bool next_landing(int groups_left_in_flight, AsyncCopy* copy);
void cp_async_commit();

#if defined(CUDA_HOST_COUNT)

// Lands at once: what is counted does not depend on values.
template <int kBytes>
CUDA_HOST_INLINE void cp_async(void* dst, const void* src, int valid) {
  count_copy(dst, src, kBytes, valid);
}
inline void cp_async_wait(int) {}

#else

// Until it lands the destination holds NaNs, so that a read before the wait shows.
template <int kBytes>
inline void cp_async(void* dst, const void* src, int valid) {
  queue_copy({dst, src, kBytes, valid, 0});
  for (int i = 0; i < kBytes / 4; ++i) static_cast<uint32_t*>(dst)[i] = ~0u;
}

// By accesses of the size of the copy, where all of it is valid.
inline void land(const AsyncCopy& copy) {
  if (copy.valid == 16) {
    *static_cast<uint4*>(copy.dst) = *static_cast<const uint4*>(copy.src);
  } else if (copy.valid == 8 && copy.bytes == 8) {
    *static_cast<uint2*>(copy.dst) = *static_cast<const uint2*>(copy.src);
  } else if (copy.valid == 4 && copy.bytes == 4) {
    *static_cast<uint32_t*>(copy.dst) = *static_cast<const uint32_t*>(copy.src);
  } else {
    for (int i = 0; i < copy.bytes / 2; ++i) {
      static_cast<uint16_t*>(copy.dst)[i] =
          2 * i < copy.valid ? static_cast<const uint16_t*>(copy.src)[i] : uint16_t{0};
    }
  }
}

inline void cp_async_wait(int groups_left_in_flight) {
  AsyncCopy copy;
  while (next_landing(groups_left_in_flight, &copy)) land(copy);
}

#endif

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

// Matrix instructions, see csrc/cuda/ptx.cuh. Each lane hands in its operands and takes its results back; what is
// computed over all lanes is in tensor_core.cpp.
struct MatrixRow {
  uint32_t words[4];  // in: the row at this lane's address; out: the lane's part of the four matrices
  bool transposed;
};
void exchange_rows(MatrixRow& lane, Site site);
void check_row_address(const void* address);

// The row is read as this lane's own access.
CUDA_HOST_INLINE void ldmatrix_x4(const void* address, uint32_t (&out)[4], bool transposed,
                                  Site site = {__builtin_FILE(), __builtin_LINE()}) {
  check_row_address(address);
  const uint4 row = *static_cast<const uint4*>(address);
  MatrixRow lane{{row.x, row.y, row.z, row.w}, transposed};
  exchange_rows(lane, site);
  for (int i = 0; i < 4; ++i) out[i] = lane.words[i];
}

enum class MmaType : int { f16, f16_k8, bf16, tf32 };

struct MmaOperands {
  MmaType type;
  uint32_t a[4], b[2];
  float d[4];
};
void multiply_fragments(MmaOperands& lane, Site site);

inline void mma(MmaType type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                Site site = {__builtin_FILE(), __builtin_LINE()}) {
  MmaOperands lane{type, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
  multiply_fragments(lane, site);
  for (int i = 0; i < 4; ++i) d[i] = lane.d[i];
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
