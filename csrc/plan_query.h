// What the planners decide for a call that nobody makes: the numbers of a plan by name, for Python's cpu_plan() and
// cuda_plan(). Torch-free, and the CUDA planner needs neither CUDA nor a GPU.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "params.h"

namespace dsconv {

using PlanNumbers = std::map<std::string, int64_t>;

struct PlanQuery {
  std::vector<int64_t> input;      // n, c_in, h_in, w_in
  std::vector<int64_t> dw_weight;  // c_mid, 1, kernel_h, kernel_w
  int64_t c_out;
  std::vector<int64_t> stride, padding, dilation;  // as the ops take them
  std::string dtype;                               // float32, float64, float16 or bfloat16
  bool channels_last, backward;
};

// The CPU forward follows the number of threads, its backward must not; CUDA follows the number of multiprocessors.
PlanNumbers cpu_plan(const PlanQuery& query, int64_t threads);
PlanNumbers cuda_plan(const PlanQuery& query, int64_t multiprocessors);

inline DType dtype_of(const PlanQuery& query) {
  const char* names[] = {"float32", "float64", "float16", "bfloat16"};  // in the order of DType
  for (int i = 0; i < 4; ++i) {
    if (query.dtype == names[i]) return static_cast<DType>(i);
  }
  throw std::invalid_argument("dtype must be float32, float64, float16 or bfloat16, got " + query.dtype);
}

inline Layout layout_of(const PlanQuery& query) { return query.channels_last ? Layout::nhwc : Layout::nchw; }

inline Geometry geometry_of(const PlanQuery& q) {
  if (q.input.size() != 4 || q.dw_weight.size() != 4 || q.stride.size() != 2 || q.padding.size() != 4 ||
      q.dilation.size() != 2) {
    throw std::invalid_argument("input and dw_weight take 4 sizes, stride and dilation 2 numbers, padding 4");
  }
  const auto extent = [&](int axis) {
    const int64_t in = q.input[2 + axis] + q.padding[axis] + q.padding[2 + axis];
    const int64_t span = q.dilation[axis] * (q.dw_weight[2 + axis] - 1) + 1;
    if (q.stride[axis] < 1 || q.dilation[axis] < 1 || q.dw_weight[2 + axis] < 1 || in < span) {
      throw std::invalid_argument("stride, dilation and kernel must be positive, the kernel within the padded input");
    }
    return (in - span) / q.stride[axis] + 1;
  };
  if (q.input[0] < 1 || q.input[1] < 1 || q.c_out < 1 || q.dw_weight[0] < 1 || q.dw_weight[0] % q.input[1] != 0) {
    throw std::invalid_argument("sizes must be positive, and dw_weight's channels a multiple of input's");
  }
  Geometry g{};
  g.n = q.input[0];
  g.c_in = q.input[1];
  g.h_in = q.input[2];
  g.w_in = q.input[3];
  g.c_mid = q.dw_weight[0];
  g.multiplier = g.c_mid / g.c_in;
  g.c_out = q.c_out;
  g.h_out = extent(0);
  g.w_out = extent(1);
  g.kernel_h = q.dw_weight[2];
  g.kernel_w = q.dw_weight[3];
  g.stride_h = q.stride[0];
  g.stride_w = q.stride[1];
  g.pad_top = q.padding[0];
  g.pad_left = q.padding[1];
  g.dilation_h = q.dilation[0];
  g.dilation_w = q.dilation[1];
  return g;
}

}  // namespace dsconv
