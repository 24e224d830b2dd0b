// What the CUDA host entries run a call with: the current device and its stream, its limits, and what a failed launch
// says.
#pragma once

#include <cstdlib>
#include <string>

#include "../op_args.h"

#include <torch/csrc/stable/accelerator.h>

#include "cuda_launch.h"
#include "portability.cuh"

namespace dsconv {

// The seam to the emulation of tests/cuda_host, which runs this file and the kernels on the host: there tensors are on
// the CPU, and there is neither a stream nor a device to make current.
#if defined(DSCONV_EMULATED)

#define DSCONV_DISPATCH_KEY CPU

struct CurrentDevice {
  explicit CurrentDevice(const Tensor&) {}
  void* stream() const { return nullptr; }
};

inline std::string device_name(int) { return "the emulated device"; }
constexpr int64_t compiled_capability(int64_t capability) { return capability; }
inline std::string architectures() { return "the host"; }

// DSCONV_SPLIT_IMAGES: what can be split is, a forward into groups of so many images; 0: nothing is. Else the plan
// decides.
inline int64_t asked_split_images() {
  const char* asked = std::getenv("DSCONV_SPLIT_IMAGES");
  return asked != nullptr ? std::atoll(asked) : -1;
}
// DSCONV_FORWARD_PLAN: this one of forward_candidate()'s, where the call can run it.
inline int asked_forward_plan() {
  const char* asked = std::getenv("DSCONV_FORWARD_PLAN");
  return asked != nullptr ? std::atoi(asked) : -1;
}

#else

#define DSCONV_DISPATCH_KEY CUDA

// Declared here because torch's header shows it only under -DUSE_CUDA, which a hand-written load() would have to pass.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

// Makes the tensor's device current as long as it lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {}

  void* stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

constexpr int64_t asked_split_images() { return -1; }
constexpr int asked_forward_plan() { return -1; }

extern "C" const char* dsconv_cuda_architectures();  // cuda_build_info.cu

inline std::string architectures() { return dsconv_cuda_architectures(); }

// What a device of this capability runs: the newest that was compiled and is not newer, which as PTX may be much older.
inline int64_t compiled_capability(int64_t capability) {
  int64_t newest = 0;
  for (const char* at = dsconv_cuda_architectures(); *at != 0;) {
    char* end = nullptr;
    const int64_t compiled = std::strtol(at, &end, 10) / 10;
    if (compiled <= capability && compiled > newest) newest = compiled;
    at = *end == ',' ? end + 1 : end;
  }
  return newest > 0 ? newest : capability;
}

inline std::string device_name(int device) {
  cudaDeviceProp properties{};
  return cudaGetDeviceProperties(&properties, device) == cudaSuccess ? properties.name : "an unknown device";
}

#endif

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

inline DeviceLimits device_limits() {
  int device = 0;
  static_cast<void>(cudaGetDevice(&device));
  const auto read = [&](cudaDeviceAttr attribute, int64_t& value) {
    if (const int found = device_attribute(attribute, device); found > 0) value = found;
  };
  int64_t major = 9, minor = 0, multiprocessors = 1;
  read(cudaDevAttrComputeCapabilityMajor, major);
  minor = device_attribute(cudaDevAttrComputeCapabilityMinor, device);
  read(cudaDevAttrMultiProcessorCount, multiprocessors);
  DeviceLimits limits = limits_of(10 * major + minor, multiprocessors);
  limits.capability = compiled_capability(limits.capability);
  read(cudaDevAttrMaxSharedMemoryPerBlockOptin, limits.shared_per_block);
  read(cudaDevAttrMaxSharedMemoryPerMultiprocessor, limits.shared_per_multiprocessor);
  return limits;
}

inline ForwardPlan planned_forward(const ForwardParams& p, const DeviceLimits& device) {
  if (asked_forward_plan() >= 0) {
    const ForwardPlan plan = forward_candidate(p, asked_forward_plan(), device);
    if (can_run(p, plan, device)) return plan;
  }
  return plan_forward(p, device);
}

inline void check_launch(const char* op, const LaunchStatus& status) {
  if (status.error == cudaSuccess) return;
  const auto error = static_cast<cudaError_t>(status.error);
  int device = 0;
  static_cast<void>(cudaGetDevice(&device));
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = device_attribute(cudaDevAttrComputeCapabilityMinor, device);
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  std::string text = std::string("launching kernel ") + status.kernel + " failed: " + cudaGetErrorString(error) + " (" +
                     cudaGetErrorName(error) + ") on " + device_name(device) + ", compute capability " + capability;
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    text += "; this build holds kernels for " + architectures() + ": rebuild with TORCH_CUDA_ARCH_LIST=" + capability;
  }
  STD_TORCH_CHECK(false, op, ": ", text);
}

inline void check_extents(const char* op, const Geometry& g) {
  const char* axis = unsupported_extent(g);
  STD_TORCH_CHECK(axis == nullptr, op, ": on CUDA, ", axis != nullptr ? axis : "",
                  " must stay below 2^29 (padding, stride, dilation and the reach of the kernel too)");
}

}  // namespace dsconv
