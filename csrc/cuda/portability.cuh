// The names a kernel file may use beside plain C++, so that the same source is compiled by nvcc for the device and by a
// host compiler for the emulation that the tests run (there, "cuda_host.h" is found through an include path).
//
//   DSCONV_KERNEL void DSCONV_BOUNDS(threads, min_blocks) name(...)     a kernel, returns void, arguments by value
//   DSCONV_DEVICE / DSCONV_HOST_DEVICE                                  functions of device / of both
//   DSCONV_SHARED(type, name, count)                                    type name[count] in static shared memory
//   DSCONV_DYNAMIC_SHARED(type, name)                                   type* name: dynamic shared memory, 128-byte
//   aligned launch(kernel, grid, block, dynamic_bytes, stream, args...)         in place of <<<...>>>
//
// Kernels keep to: __syncthreads reached by every thread of the block, no return before one; warp primitives in their
// _sync form with every named lane arriving; no waiting between blocks; fmaf where bits matter; no __CUDA_ARCH__ (PTX
// and architecture differences live in ptx.cuh); no textures, __constant__, cooperative groups or device-side launches.
// A kernel that has dynamic and static shared memory keeps the sum within 48 KiB or the dynamic part above 48 KiB.
#pragma once

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define DSCONV_KERNEL __global__
#define DSCONV_BOUNDS(threads, min_blocks) __launch_bounds__(threads, min_blocks)
#define DSCONV_DEVICE __device__ __forceinline__
#define DSCONV_HOST_DEVICE __host__ __device__ __forceinline__
#define DSCONV_SHARED(type, name, count) __shared__ type name[count]
#define DSCONV_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char dsconv_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(dsconv_dynamic_shared)

#else

#include "cuda_host.h"

#define DSCONV_KERNEL
#define DSCONV_BOUNDS(threads, min_blocks)
#define DSCONV_DEVICE CUDA_HOST_INLINE
#define DSCONV_HOST_DEVICE CUDA_HOST_INLINE
// The address of the key tells the engine which of the kernel's arrays is meant.
#define DSCONV_SHARED(type, name, count) \
  static const char name##_key = 0;      \
  type(&name)[count] =                   \
      *static_cast<type(*)[count]>(cuda_host::static_shared(&name##_key, sizeof(type[count]), alignof(type)))
#define DSCONV_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(cuda_host::dynamic_shared())

#endif

#include <cstddef>
#include <mutex>

namespace dsconv {

constexpr unsigned kGridYZLimit = 65535;                // gridDim.y and gridDim.z; gridDim.x goes to 2^31 - 1
constexpr std::size_t kDefaultSharedBytes = 48 * 1024;  // what a block may have without asking

// Lets the kernel have so much dynamic shared memory. The limit belongs to the kernel on this device, for all threads
// of the process and for graphs that hold launches of it: it is raised and never lowered.
inline cudaError_t allow_shared_bytes(const void* kernel, std::size_t bytes) {
  static std::mutex raising;
  const std::lock_guard<std::mutex> lock(raising);
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess || static_cast<std::size_t>(attributes.maxDynamicSharedSizeBytes) >= bytes) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// Launches, and returns the error of the launch itself (it does not wait for the kernel). The error is taken out of the
// runtime's last-error slot, so that nobody else reports it a second time.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t dynamic_bytes, cudaStream_t stream,
                   Args... args) {
  cudaError_t error = cudaSuccess;
  if (dynamic_bytes > kDefaultSharedBytes) {
    error = allow_shared_bytes(reinterpret_cast<const void*>(kernel), dynamic_bytes);
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = dynamic_bytes;
    config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  }
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

}  // namespace dsconv
