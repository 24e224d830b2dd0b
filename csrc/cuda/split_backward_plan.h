// Stage P of backward, split as the forward is (split_forward_plan.h): both products are the library's, where pixels
// are rows of channels, all of them in a product each.
//
//   g = dy * out_act'(saved)               outputs.cuh; dy itself without an out_act
//   du = (g . pw_weight) * act'(z)         a product, then depthwise_forward.cuh in place
//   grad_pw_weight = g^T . act(z)          depthwise_forward.cuh to a workspace, then a product
//
// grad_pw_bias and stage D are those of the other backward. A product over all pixels sums in float and rounds once, so
// nothing is summed over groups of images; act(z) and g are in the workspace whole.
#pragma once

#include "split_forward_plan.h"

namespace dsconv {

struct SplitBackwardPlan {
  bool possible;
  BackwardParams rest;     // what is left to the other kernels: grad_pw_bias and stage D
  BackwardPlan rest_plan;  // du has its place in the workspace, and is made before
  bool du, weight;         // which products there are
  size_t g_at, act_z_at, workspace_bytes;
};

inline bool can_split_backward(const BackwardParams& p, const DeviceLimits& device) {
  const Geometry& g = p.geom;
  const auto is_dense = [&](Layout layout, const Strides& s) {
    const Strides dense = dense_strides(Layout::nhwc, g.c_out, g.d_out, g.h_out, g.w_out);
    const auto lies = [](int64_t extent, int64_t stride, int64_t wanted) { return extent == 1 || stride == wanted; };
    return layout == Layout::nhwc && lies(g.n, s.n, dense.n) && lies(g.d_out, s.d, dense.d) &&
           lies(g.h_out, s.h, dense.h) && lies(g.w_out, s.w, dense.w) && lies(g.c_out, s.c, dense.c);
  };
  return has_library_product(g, p.dtype, device) && p.x_layout == Layout::nhwc && is_dense(p.dy_layout, p.dy_strides) &&
         (p.saved == nullptr || is_dense(p.saved_layout, p.saved_strides));
}

inline SplitBackwardPlan plan_split_backward(const BackwardParams& p, const DeviceLimits& device) {
  SplitBackwardPlan plan{};
  if (!can_split_backward(p, device)) return plan;
  plan.rest = p;
  plan.rest.grad_pw_weight = nullptr;
  plan.rest_plan = plan_backward(plan.rest, device);
  plan.du = plan.rest_plan.du;
  plan.rest_plan.du = false;
  plan.weight = p.grad_pw_weight != nullptr;
  plan.possible = plan.du || plan.weight;
  size_t at = plan.rest_plan.workspace_bytes;
  const auto reserve = [&](bool wanted, int64_t channels) {
    const size_t begin = at, bytes = static_cast<size_t>(output_pixels(p.geom) * channels) * element_bytes(p.dtype);
    if (wanted) at += (bytes + 255) / 256 * 256;
    return begin;
  };
  plan.g_at = reserve(p.saved != nullptr, p.geom.c_out);
  plan.act_z_at = reserve(plan.weight, p.geom.c_mid);
  plan.workspace_bytes = at;
  return plan;
}

// The depthwise stage of the call with `a` as its output.
inline ForwardParams depthwise_of(const BackwardParams& p, void* a) {
  const Geometry& g = p.geom;
  ForwardParams f{};
  f.geom = g;
  f.dtype = p.dtype;
  f.act = p.act;
  f.x = p.x;
  f.x_strides = p.x_strides;
  f.x_layout = f.y_layout = p.x_layout;
  f.dw_weight = p.dw_weight;
  f.dw_bias = p.dw_bias;
  f.y = a;
  f.y_strides = dense_strides(p.x_layout, g.c_mid, g.d_out, g.h_out, g.w_out);
  return f;
}

inline Schedule split_backward_schedule(const BackwardParams& p, const SplitBackwardPlan& plan,
                                        const DeviceLimits& device) {
  const Geometry& g = p.geom;
  const schedule_detail::Bytes bytes = schedule_detail::bytes_of(g, p.dtype);
  const int64_t pixels = output_pixels(g);
  const ForwardParams z = depthwise_of(p, nullptr);
  const auto depthwise = [&](const char* name, int64_t moved) {
    KernelCost cost = depthwise_forward_cost(z, plan_depthwise_forward(z, device), device);
    cost.name = name;
    cost.dram_bytes += moved;
    cost.l2_bytes += moved - bytes.z;
    return cost;
  };
  Schedule schedule;
  schedule.workspace_bytes = static_cast<int64_t>(plan.workspace_bytes);
  if (p.saved != nullptr) {
    KernelCost cost = schedule_detail::plain_kernel("dy * out_act'", outputs_blocks(g, p.dtype));
    cost.dram_bytes = cost.l2_bytes = 3 * bytes.y;
    schedule.add(cost);
  }
  if (plan.du) {
    KernelCost cost = library_product_cost({"du, the library's", 1, pixels, g.c_mid, g.c_out}, p.dtype, device);
    cost.dram_bytes = bytes.y + bytes.pw_weight + bytes.z;
    schedule.add(cost);
    if (p.act != Activation::identity) schedule.add(depthwise("du * act'", 2 * bytes.z));
  }
  if (plan.weight) {
    schedule.add(depthwise("depthwise", bytes.z));
    KernelCost cost =
        library_product_cost({"grad_pw_weight, the library's", 1, g.c_out, g.c_mid, pixels, true}, p.dtype, device);
    cost.dram_bytes = bytes.y + bytes.z + bytes.pw_weight;
    schedule.add(cost);
  }
  const Schedule rest = backward_schedule(plan.rest, plan.rest_plan, device);
  for (int i = 0; i < rest.count; ++i) schedule.add(rest.kernels[i]);
  return schedule;
}

inline bool split_is_faster(const BackwardParams& p, const SplitBackwardPlan& split, const BackwardPlan& other,
                            const DeviceLimits& device) {
  return split.possible && seconds_of(split_backward_schedule(p, split, device), device) <
                               seconds_of(backward_schedule(p, other, device), device);
}

}  // namespace dsconv
