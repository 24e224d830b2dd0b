// The part of the CUDA runtime API that launchers use: errors, device attributes, launch. A launch runs the whole grid
// before it returns; the numbers of the error codes are CUDA's.
#pragma once

#include <cstddef>
#include <tuple>

#include "host_types.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
};

enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

const char* cudaGetErrorName(cudaError_t error);
// For cudaErrorLaunchFailure: what the engine found.
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
struct cudaFuncAttributes {
  int maxDynamicSharedSizeBytes;
};
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaMemsetAsync(void* pointer, int value, std::size_t bytes, cudaStream_t stream);

namespace cuda_host {

enum class ThreadOrder { forward, reverse, random };

// The order in which blocks, and threads within a block, take their turns. At load it is what the environment variable
// CUDA_HOST_ORDER says: forward (the default), reverse, or random with a seed, as in "random:7".
void set_thread_order(ThreadOrder order, uint64_t seed = 0);

// What the emulated device says of itself; at load it is one of compute capability 8.6.
struct Device {
  int major, minor;
  int multiprocessors;
  int shared_per_block_optin;
};
void set_device(Device device);

// What the engine found in the last failed kernel.
const char* last_report();

using KernelBody = void (*)(void* arguments);
cudaError_t launch_grid(const void* kernel, KernelBody body, void* arguments, const cudaLaunchConfig_t& config);

}  // namespace cuda_host

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> params;
  } call{kernel, {args...}};
  const auto body = [](void* arguments) {
    const Call& call = *static_cast<Call*>(arguments);
    std::apply(call.kernel, call.params);
  };
  return cuda_host::launch_grid(reinterpret_cast<const void*>(kernel), body, &call, *config);
}
