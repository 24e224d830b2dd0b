// Forward, split in two: act(z) by our kernel (depthwise_forward.cuh) to a workspace, and the pointwise stage by the
// library's product of matrices. Wide layers of few pixels take it: there each block of a fused kernel reads all of
// pw_weight for the few pixels that it has.
//
//   a group of images at a time:   x --depthwise--> workspace --product--> y, then bias and out_act in place
//   (outputs.cuh)
//
// The groups are so small that L2 keeps the workspace from one launch to the next, where that is predicted to be
// faster. The workspace lasts as long as the call; nothing of it is saved for backward.
#pragma once

#include "cuda_schedule.h"
#include "depthwise_forward_plan.h"
#include "library_product_plan.h"

namespace dsconv {

struct SplitForwardPlan {
  int64_t images;  // of a group; 0: this call cannot be split
  int64_t workspace_bytes;
};

constexpr bool can_split(const ForwardParams& p, const DeviceLimits& device) {
  return has_library_product(p.geom, p.dtype, device) && p.y_parts == nullptr;
}

// Pixels of all images in one product, the bias with it: [pixels, c_mid] . [c_mid, c_out]. Else a product an image.
constexpr bool is_one_product(const ForwardParams& p) {
  return p.x_layout == Layout::nhwc && p.y_layout == Layout::nhwc;
}
constexpr bool adds_bias(const ForwardParams& p) { return p.pw_bias != nullptr && !is_one_product(p); }
constexpr bool has_outputs_pass(const ForwardParams& p) {
  return p.out_act != Activation::identity || p.pre != nullptr || adds_bias(p);
}

// Of act(z) in the workspace, laid out as x is: where pixels are together, a channel starts at a multiple of 16 bytes,
// for stores and the library's loads of as many.
constexpr Strides act_z_strides(const ForwardParams& p) {
  const Geometry& g = p.geom;
  Strides s = dense_strides(p.x_layout, g.c_mid, g.d_out, g.h_out, g.w_out);
  if (p.x_layout == Layout::nchw) {
    const int64_t vector = 16 / static_cast<int64_t>(element_bytes(p.dtype));
    s.c = ceil_div(s.c, vector) * vector;
    s.n = s.c * g.c_mid;
  }
  return s;
}
constexpr int64_t act_z_bytes(const ForwardParams& p) {
  return p.geom.n * act_z_strides(p).n * static_cast<int64_t>(element_bytes(p.dtype));
}

// The images from `first` on of a call.
inline ForwardParams images_of(const ForwardParams& p, int64_t first, int64_t images) {
  const int64_t bytes = static_cast<int64_t>(element_bytes(p.dtype));
  ForwardParams part = p;
  part.geom.n = images;
  part.x = static_cast<const char*>(p.x) + first * p.x_strides.n * bytes;
  part.y = static_cast<char*>(p.y) + first * p.y_strides.n * bytes;
  if (p.pre != nullptr) part.pre = static_cast<char*>(p.pre) + first * p.y_strides.n * bytes;
  return part;
}

// The depthwise stage of such a part as a call of its own, act(z) being its output.
inline ForwardParams depthwise_part(const ForwardParams& part, void* workspace) {
  ForwardParams p = part;
  p.y = workspace;
  p.y_layout = p.x_layout;
  p.y_strides = act_z_strides(part);
  return p;
}

constexpr LibraryProduct pointwise_product_of(const ForwardParams& p) {
  const Geometry& g = p.geom;
  const int64_t products = is_one_product(p) || g.n == 0 ? 1 : g.n;
  return {"pointwise, the library's", products, output_pixels(g) / products, g.c_out, g.c_mid};
}

inline KernelCost pointwise_product_cost(const ForwardParams& p, const DeviceLimits& device) {
  const Geometry& g = p.geom;
  const int64_t pixels = output_pixels(g);
  KernelCost cost = library_product_cost(pointwise_product_of(p), p.dtype, device);
  cost.dram_bytes = (pixels * g.c_out + g.c_mid * g.c_out) * static_cast<int64_t>(element_bytes(p.dtype));
  return cost;
}

constexpr int64_t outputs_bytes(const ForwardParams& p) {
  const int64_t y = output_pixels(p.geom) * p.geom.c_out * static_cast<int64_t>(element_bytes(p.dtype));
  return has_outputs_pass(p) ? y : 0;
}

// Every launch of the call; those of the groups are taken together, all groups as large as the first.
inline Schedule split_forward_schedule(const ForwardParams& p, const SplitForwardPlan& plan,
                                       const DeviceLimits& device) {
  const int64_t groups = ceil_div(p.geom.n, plan.images);
  const ForwardParams part = images_of(p, 0, plan.images);
  const int64_t act_z = act_z_bytes(part), y = outputs_bytes(part), pre = p.pre != nullptr ? y : 0;
  const bool kept = act_z + y <= device.l2_bytes / 2;
  KernelCost depthwise = depthwise_forward_cost(part, plan_depthwise_forward(part, device), device);
  KernelCost product = pointwise_product_cost(part, device);
  KernelCost outputs =
      schedule_detail::plain_kernel("bias and out_act", y > 0 ? outputs_blocks(part.geom, part.dtype) : 0);
  if (!kept) {
    depthwise.dram_bytes += act_z;
    product.dram_bytes += act_z;
    outputs.dram_bytes = 2 * y;
  }
  outputs.dram_bytes += pre;
  outputs.l2_bytes = 2 * y + pre;
  Schedule schedule;
  schedule.workspace_bytes = plan.workspace_bytes;
  for (KernelCost* cost : {&depthwise, &product, &outputs}) {
    cost->launches = groups;
    cost->blocks *= groups;
    cost->multiply_adds *= static_cast<double>(groups);
    cost->wavefronts *= static_cast<double>(groups);
    cost->dram_bytes *= groups;
    cost->l2_bytes *= groups;
    schedule.add(*cost);
  }
  return schedule;
}

inline double seconds_of(const Schedule& schedule, const DeviceLimits& device) {
  double seconds = 0;
  for (int i = 0; i < schedule.count; ++i) seconds += predict(schedule.kernels[i], device).seconds;
  return seconds;
}

inline SplitForwardPlan split_by(const ForwardParams& p, int64_t images) {
  return {images, act_z_bytes(images_of(p, 0, images))};
}

// All images at once, or as many as half of L2 holds with what is read again.
inline SplitForwardPlan plan_split_forward(const ForwardParams& p, const DeviceLimits& device) {
  const int64_t n = p.geom.n;
  if (!can_split(p, device) || n == 0) return {};
  const int64_t image = (act_z_bytes(p) + outputs_bytes(p)) / n;
  const int64_t held = image > 0 ? device.l2_bytes / 2 / image : n;
  const SplitForwardPlan all = split_by(p, n);
  if (held >= n) return all;
  // As few groups as hold them, evenly large.
  const SplitForwardPlan some = split_by(p, ceil_div(n, ceil_div(n, held > 1 ? held : 1)));
  return seconds_of(split_forward_schedule(p, some, device), device) <
                 seconds_of(split_forward_schedule(p, all, device), device)
             ? some
             : all;
}

inline bool split_is_faster(const ForwardParams& p, const SplitForwardPlan& split, const ForwardPlan& fused,
                            const DeviceLimits& device) {
  return split.images > 0 && seconds_of(split_forward_schedule(p, split, device), device) <
                                 predict(forward_cost(p, fused, device), device).seconds;
}

}  // namespace dsconv
