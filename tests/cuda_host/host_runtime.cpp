// The emulated CUDA runtime: error codes, device attributes, and the limits of a launch.

#include "host_runtime.h"

#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>

#if defined(CUDA_HOST_COUNT)
#include "counters.h"
#endif
#include "engine.h"

namespace cuda_host {
namespace {

constexpr uint64_t kMaxThreads = 1024;  // of a block
constexpr unsigned kMaxBlockZ = 64;
constexpr unsigned kMaxGridX = 0x7fffffffu, kMaxGridYZ = 65535;
constexpr uint64_t kDefaultSharedBytes = 48 * 1024;

std::mutex launching;
Device device_now{8, 6, 4, 99 * 1024};
std::map<const void*, uint64_t> dynamic_limits;  // raised by cudaFuncSetAttribute
cudaError_t last_error = cudaSuccess;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t check_limits(const void* kernel, const cudaLaunchConfig_t& config) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (block.x > kMaxThreads || block.y > kMaxThreads || block.z > kMaxBlockZ) return cudaErrorInvalidConfiguration;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads) return cudaErrorInvalidConfiguration;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaErrorInvalidConfiguration;
  if (grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) return cudaErrorInvalidConfiguration;
  const auto raised = dynamic_limits.find(kernel);
  const uint64_t limit = raised == dynamic_limits.end() ? kDefaultSharedBytes : raised->second;
  return config.dynamicSmemBytes > limit ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

void set_device(Device device) { device_now = device; }

cudaError_t launch_grid(const void* kernel, KernelBody body, void* arguments, const cudaLaunchConfig_t& config) {
  const std::lock_guard<std::mutex> lock(launching);
  const cudaError_t refused = check_limits(kernel, config);
  if (refused != cudaSuccess) return remember(refused);
#if defined(CUDA_HOST_COUNT)
  count_launch(kernel, uint64_t{config.gridDim.x} * config.gridDim.y * config.gridDim.z,
               uint64_t{config.blockDim.x} * config.blockDim.y * config.blockDim.z, config.dynamicSmemBytes);
#endif
  return remember(run_grid(body, arguments, config) ? cudaSuccess : cudaErrorLaunchFailure);
}

}  // namespace cuda_host

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice:
      return "cudaErrorNoKernelImageForDevice";
    case cudaErrorLaunchOutOfResources:
      return "cudaErrorLaunchOutOfResources";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? cuda_host::last_report() : cudaGetErrorName(error);
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_host::last_error;
  cuda_host::last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return cuda_host::last_error; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cuda_host::remember(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(cuda_host::kDefaultSharedBytes);
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = cuda_host::device_now.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = cuda_host::device_now.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = cuda_host::device_now.minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = cuda_host::device_now.shared_per_block_optin + 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = cuda_host::device_now.shared_per_block_optin;
      return cudaSuccess;
  }
  return cuda_host::remember(cudaErrorInvalidValue);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  const std::lock_guard<std::mutex> lock(cuda_host::launching);
  const auto found = cuda_host::dynamic_limits.find(kernel);
  attributes->maxDynamicSharedSizeBytes =
      static_cast<int>(found != cuda_host::dynamic_limits.end() ? found->second : cuda_host::kDefaultSharedBytes);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > cuda_host::device_now.shared_per_block_optin)
    return cuda_host::remember(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> lock(cuda_host::launching);
  cuda_host::dynamic_limits[kernel] = static_cast<uint64_t>(value);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* pointer, int value, std::size_t bytes, cudaStream_t) {
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}
