// The CUDA host entry: torch.ops.dsconv_cuda.{fwd, fwd_with_pre, bwd} for the CUDA dispatch key. Compiling this file is
// what turns CUDA on. It is the only file of the CUDA part that knows torch.
//
// Work goes to the current stream of the input's device; nothing here waits for it, so a CUDA graph can capture a call.

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../op_args.h"

#include <torch/csrc/stable/accelerator.h>

#include "cuda_dispatch.h"
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

std::string device_name(int) { return "the emulated device"; }
std::string architectures() { return "the host"; }

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

extern "C" const char* dsconv_cuda_architectures();  // cuda_build_info.cu

std::string architectures() { return dsconv_cuda_architectures(); }

std::string device_name(int device) {
  cudaDeviceProp properties{};
  return cudaGetDeviceProperties(&properties, device) == cudaSuccess ? properties.name : "an unknown device";
}

#endif

namespace {

int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

DeviceLimits device_limits() {
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
  read(cudaDevAttrMaxSharedMemoryPerBlockOptin, limits.shared_per_block);
  read(cudaDevAttrMaxSharedMemoryPerMultiprocessor, limits.shared_per_multiprocessor);
  return limits;
}

void check_launch(const char* op, const LaunchStatus& status) {
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

void check_extents(const char* op, const Geometry& g) {
  const char* axis = unsupported_extent(g);
  STD_TORCH_CHECK(axis == nullptr, op, ": on CUDA, ", axis != nullptr ? axis : "",
                  " must stay below 2^29 (padding, stride, dilation and the reach of the kernel too)");
}

ForwardCall run_forward(const char* op, const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                        const std::optional<Tensor>& dw_bias, const std::optional<Tensor>& pw_bias,
                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                        const std::vector<int64_t>& dilation, int64_t act, int64_t out_act, bool want_pre) {
  ForwardCall call = prepare_forward(op, x, dw_weight, pw_weight, dw_bias, pw_bias,
                                     arguments_of(op, stride, padding, dilation, act, out_act), want_pre);
  check_extents(op, call.params.geom);
  const CurrentDevice device(x);
  check_launch(op, forward(call.params, plan_forward(call.params, device_limits()), device.stream()));
  return call;
}

Tensor fwd(const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight, const std::optional<Tensor>& dw_bias,
           const std::optional<Tensor>& pw_bias, const std::vector<int64_t>& stride,
           const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t act, int64_t out_act) {
  return *run_forward("dsconv_cuda::fwd", x, dw_weight, pw_weight, dw_bias, pw_bias, stride, padding, dilation, act,
                      out_act, false)
              .y;
}

std::tuple<Tensor, Tensor> fwd_with_pre(const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                                        const std::optional<Tensor>& dw_bias, const std::optional<Tensor>& pw_bias,
                                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                        const std::vector<int64_t>& dilation, int64_t act, int64_t out_act) {
  const ForwardCall call = run_forward("dsconv_cuda::fwd_with_pre", x, dw_weight, pw_weight, dw_bias, pw_bias, stride,
                                       padding, dilation, act, out_act, true);
  return {*call.y, *call.pre};
}

BackwardResult bwd(const Tensor& dy, const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                   const std::optional<Tensor>& dw_bias, const std::optional<Tensor>& saved,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, int64_t act, int64_t out_act, int64_t grad_mask) {
  const char* op = "dsconv_cuda::bwd";
  BackwardCall call = prepare_backward(op, dy, x, dw_weight, pw_weight, dw_bias, saved,
                                       arguments_of(op, stride, padding, dilation, act, out_act), grad_mask);
  check_extents(op, call.params.geom);
  if (call.params.geom.n == 0) return take_grads(call);  // prepare_backward has zeroed what there is

  const CurrentDevice device(x);
  const BackwardPlan plan = plan_backward(call.params, device_limits());
  const int64_t bytes[1] = {static_cast<int64_t>(plan.workspace_bytes)};
  const Tensor workspace =
      torch::stable::empty({bytes, 1}, ScalarType::Byte, torch::headeronly::Layout::Strided, x.device());
  check_launch(op, backward(call.params, plan, workspace.mutable_data_ptr(), device.stream()));
  return take_grads(call);
}

}  // namespace

}  // namespace dsconv

STABLE_TORCH_LIBRARY_IMPL(dsconv_cuda, DSCONV_DISPATCH_KEY, m) {
  m.impl("fwd", TORCH_BOX(&dsconv::fwd));
  m.impl("fwd_with_pre", TORCH_BOX(&dsconv::fwd_with_pre));
  m.impl("bwd", TORCH_BOX(&dsconv::bwd));
}
