// What the launchers share: a one-dimensional grid of kBlockThreads threads a block. grid.y and grid.z end at 65535,
// grid.x at 2^31 - 1, so kernels take their tile numbers from blockIdx.x alone.
#pragma once

#include <cstdint>

#include "cuda_launch.h"
#include "portability.cuh"

namespace dsconv {

// No launch, and no error, for zero blocks.
template <typename... Params, typename... Args>
LaunchStatus launch_blocks(const char* name, void (*kernel)(Params...), int64_t blocks, size_t shared_bytes,
                           cudaStream_t stream, Args... args) {
  if (blocks == 0) return {};
  if (blocks > INT32_MAX) return {static_cast<int>(cudaErrorInvalidConfiguration), name};
  const cudaError_t error =
      launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kBlockThreads), shared_bytes, stream, args...);
  return {static_cast<int>(error), name};
}

template <typename T>
T* at_byte(void* base, size_t offset) {
  return reinterpret_cast<T*>(static_cast<unsigned char*>(base) + offset);
}

}  // namespace dsconv
