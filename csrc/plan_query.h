// What the planners decide for a call that nobody makes: the numbers of a plan by name, for Python's cpu_plan() and
// cuda_plan(). Torch-free, and the CUDA planner needs neither CUDA nor a GPU.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/cuda_cost.h"
#include "geometry.h"
#include "params.h"

namespace dsconv {

using PlanNumbers = std::map<std::string, int64_t>;

struct PlanQuery {
  std::vector<int64_t> input;      // n, c_in, [d_in,] h_in, w_in
  std::vector<int64_t> dw_weight;  // c_mid, 1, [kernel_d,] kernel_h, kernel_w
  int64_t c_out;
  std::vector<int64_t> stride, padding, dilation;  // as the ops take them
  std::string dtype;                               // float32, float64, float16 or bfloat16
  bool channels_last, backward;
  bool bent = false;  // whether there is an activation between the convolutions: backward computes z for it
};

// The CPU forward follows the number of threads, its backward must not; CUDA follows the number of multiprocessors.
PlanNumbers cpu_plan(const PlanQuery& query, int64_t threads);
PlanNumbers cuda_plan(const PlanQuery& query, int64_t multiprocessors);

// What the CUDA planner had to choose from: each alternative with its launches and what they are predicted to cost.
struct PlannedKernel {
  KernelCost cost;
  Prediction prediction;
};
struct PlannedCall {
  std::string name;
  bool chosen, ours;  // an alternative that is not ours is there to compare with
  int64_t workspace_bytes;
  std::vector<PlannedKernel> kernels;
};
std::vector<PlannedCall> cuda_alternatives(const PlanQuery& query, const DeviceLimits& device);

inline DType dtype_of(const PlanQuery& query) {
  const char* names[] = {"float32", "float64", "float16", "bfloat16"};  // in the order of DType
  for (int i = 0; i < 4; ++i) {
    if (query.dtype == names[i]) return static_cast<DType>(i);
  }
  throw std::invalid_argument("dtype must be float32, float64, float16 or bfloat16, got " + query.dtype);
}

inline Layout layout_of(const PlanQuery& query) { return query.channels_last ? Layout::nhwc : Layout::nchw; }

inline Geometry geometry_of(const PlanQuery& q) {
  const size_t dims = q.stride.size();
  if ((dims != 2 && dims != 3) || q.input.size() != dims + 2 || q.dw_weight.size() != dims + 2 ||
      q.padding.size() != 2 * dims || q.dilation.size() != dims) {
    throw_invalid("input and dw_weight take 4 sizes, stride and dilation 2 numbers, padding 4; in 3-D 5, 3 and 6");
  }
  if (q.input[0] < 1 || q.c_out < 1) throw_invalid("the number of images and c_out must be positive");
  return geometry_of_sizes(
      q.input.data(), q.dw_weight.data(), q.c_out,
      call_arguments(static_cast<int64_t>(dims), q.stride.data(), q.padding.data(), q.dilation.data()));
}

}  // namespace dsconv
