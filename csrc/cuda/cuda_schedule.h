// The launches of a call and what each is predicted to cost, for the planner's queries: a forward is one launch, a
// backward several, and the unfused form, which this library does not have, is there to compare with.
#pragma once

#include "cuda_plan.h"

namespace dsconv {

struct Schedule {
  static constexpr int kMost = 12;
  KernelCost kernels[kMost];
  int count = 0;
  int64_t workspace_bytes = 0;

  constexpr void add(const KernelCost& kernel) {
    if (kernel.blocks > 0) kernels[count++] = kernel;
  }
};

namespace schedule_detail {

// What a call's tensors hold, in bytes.
struct Bytes {
  int64_t element, accumulator, x, z, y, dw_weight, pw_weight;
};

constexpr Bytes bytes_of(const Geometry& g, DType dtype) {
  const int64_t element = static_cast<int64_t>(element_bytes(dtype)), pixels = output_pixels(g);
  return {element,
          static_cast<int64_t>(accumulator_bytes(dtype)),
          x_elements(g) * element,
          pixels * g.c_mid * element,
          pixels * g.c_out * element,
          g.c_mid * tap_count(g) * element,
          g.c_mid * g.c_out * element};
}

constexpr KernelCost plain_kernel(const char* name, int64_t blocks) {
  KernelCost cost;
  cost.name = name;
  cost.blocks = blocks;
  cost.threads = kBlockThreads;
  cost.bounded_blocks = 2;
  return cost;
}

constexpr KernelCost sum_of(const char* name, int64_t splits, int64_t count, const Bytes& bytes) {
  KernelCost cost = plain_kernel(name, ceil_div(count, kBlockThreads));
  cost.dram_bytes = cost.l2_bytes = count * (splits * bytes.accumulator + bytes.element);
  return cost;
}

}  // namespace schedule_detail

inline Schedule forward_schedule(const ForwardParams& p, const ForwardPlan& plan, const DeviceLimits& device) {
  Schedule schedule;
  schedule.add(forward_cost(p, plan, device));
  return schedule;
}

inline Schedule backward_schedule(const BackwardParams& p, const BackwardPlan& plan, const DeviceLimits& device) {
  using namespace schedule_detail;
  const Geometry& g = p.geom;
  const Bytes bytes = bytes_of(g, p.dtype);
  const PointwiseTiles tiles = pointwise_tiles(static_cast<size_t>(bytes.accumulator));
  const int64_t taps = tap_count(g), pixels = output_pixels(g);
  const double rate = p.dtype == DType::f64 ? device.fma_f64 : device.fma_f32;
  const bool bent = p.act != Activation::identity;
  const auto depth_padded = [&](int64_t extent) { return ceil_div(extent, tiles.depth) * tiles.depth; };

  Schedule schedule;
  schedule.workspace_bytes = static_cast<int64_t>(plan.workspace_bytes);
  if (plan.du && plan.tensor_cores) {
    schedule.add(du_mma_cost(p, plan.mma.du, device));
  } else if (plan.du) {
    KernelCost du = plain_kernel("du", plan.du_blocks);
    du.tile_rows = tiles.du_channels;
    du.tile_columns = tiles.du_pixels;
    du.tile_depth = tiles.depth;
    du.stages = 1;
    du.shared_bytes =
        static_cast<int64_t>(du_shared_bytes(element_bytes(p.dtype), static_cast<size_t>(bytes.accumulator)));
    du.rate = rate;
    du.multiply_adds = static_cast<double>(plan.du_blocks * tiles.du_channels * tiles.du_pixels) *
                       static_cast<double>(depth_padded(g.c_out) + (bent ? 2 * taps : 0));
    du.dram_bytes = bytes.y + bytes.pw_weight + bytes.z + (bent ? bytes.x + bytes.dw_weight : 0);
    du.l2_bytes = plan.du_channel_tiles * bytes.y + plan.du_pixel_tiles * bytes.pw_weight + bytes.z;
    if (bent) du.l2_bytes += plan.du_pixel_tiles * g.c_in * window_elements(g, tiles.du_pixels) * bytes.element;
    schedule.add(du);
  }
  if (plan.pw_sums && plan.tensor_cores) {
    schedule.add(sum_mma_cost(p, plan.mma.sum, device));
  } else if (plan.pw_sums) {
    KernelCost sum = plain_kernel("pointwise_sum", plan.pw_blocks);
    sum.tile_rows = tiles.weight_out;
    sum.tile_columns = tiles.weight_mid;
    sum.tile_depth = tiles.depth;
    sum.stages = 1;
    sum.shared_bytes = static_cast<int64_t>(pointwise_sum_shared_bytes(static_cast<size_t>(bytes.accumulator)));
    sum.rate = rate;
    sum.multiply_adds = static_cast<double>(plan.pw_blocks * plan.pw_split.pixels) *
                        static_cast<double>(tiles.weight_mid * (tiles.weight_out + 2 * taps));
    const int64_t partial = plan.pw_split.count * g.c_out * g.c_mid * bytes.accumulator;
    sum.dram_bytes = bytes.x + bytes.y + bytes.dw_weight + partial;
    sum.l2_bytes = plan.pw_mid_tiles * bytes.y + plan.pw_out_tiles * bytes.x + partial;
    schedule.add(sum);
  }
  if (plan.pw_sums) {
    if (p.grad_pw_weight != nullptr) {
      schedule.add(sum_of("sum_partials, pw_weight", plan.pw_split.count, g.c_out * g.c_mid, bytes));
    }
    if (p.grad_pw_bias != nullptr) schedule.add(sum_of("sum_partials, pw_bias", plan.pw_split.count, g.c_out, bytes));
  }
  const DepthwisePlanesPlan& planes = plan.planes;
  // Of the plan of a kernel that makes grad_x, the sums or both from boxes of cells.
  const auto from_cells = [&](const char* name, const auto& of, const PixelBox& box, int64_t stages,
                              int64_t shared_bytes) {
    KernelCost cost = plain_kernel(name, of.splits * of.chunks);
    cost.rate = rate;
    cost.stages = stages;
    cost.shared_bytes = shared_bytes;
    const int64_t made = (of.grad_x ? 1 : 0) + (of.sums ? 1 : 0), read = of.sums ? bytes.x : 0;
    const int64_t partial = of.sums ? of.splits * g.c_mid * taps * bytes.accumulator : 0;
    cost.multiply_adds = static_cast<double>(made * pixels * g.c_mid) * static_cast<double>(2 * taps);
    cost.dram_bytes = bytes.z + read + (of.grad_x ? bytes.x : 0) + bytes.dw_weight + partial;
    cost.l2_bytes = cost.dram_bytes - bytes.z + box.tiles * g.c_mid * box_elements(box, of.cells) * bytes.element;
    return cost;
  };
  if (planes.grad_x || planes.sums) {
    schedule.add(from_cells("depthwise_planes", planes, planes.box, 1, planes.bytes));
  }
  if (plan.tiles.both) {
    schedule.add(from_cells("depthwise_tile", plan.tiles, plan.tiles.cell_box, 2, plan.tiles.cell_shared.bytes));
  }
  if (p.grad_x != nullptr && !planes.grad_x && !plan.tiles.both) {
    KernelCost grad_x = plain_kernel("grad_x", plan.grad_x_blocks);
    grad_x.rate = rate;
    grad_x.multiply_adds = static_cast<double>(pixels * g.c_mid) * static_cast<double>(2 * taps);
    grad_x.dram_bytes = grad_x.l2_bytes = bytes.z + bytes.x + bytes.dw_weight;
    if (plan.tiles.grad_x) {
      grad_x.name = "grad_x_tile";
      grad_x.stages = 1;
      grad_x.shared_bytes = plan.tiles.cell_shared.bytes;
      grad_x.l2_bytes = bytes.x + plan.tiles.cell_box.tiles *
                                      (g.c_mid * box_elements(plan.tiles.cell_box, plan.tiles.cells) * bytes.element +
                                       bytes.dw_weight);
    }
    schedule.add(grad_x);
  }
  if (plan.dw_sums && !planes.sums && !plan.tiles.both) {
    KernelCost sum = plain_kernel("depthwise_sum", plan.dw_blocks);
    sum.shared_bytes = kBlockThreads * bytes.accumulator;
    sum.rate = rate;
    sum.multiply_adds = static_cast<double>(pixels * g.c_mid) * static_cast<double>(2 * taps);
    const int64_t partial = plan.dw_split.count * g.c_mid * taps * bytes.accumulator;
    sum.dram_bytes = bytes.z + bytes.x + partial;
    sum.l2_bytes = plan.dw_tap_groups * (bytes.z + bytes.x) + partial;
    if (plan.tiles.sums) {
      sum.name = "depthwise_sum_tile";
      sum.stages = 1;
      sum.shared_bytes = plan.tiles.sum_shared.bytes;
      sum.l2_bytes =
          bytes.z + plan.tiles.sum_box.tiles * g.c_mid * box_elements(plan.tiles.sum_box, g) * bytes.element + partial;
    }
    schedule.add(sum);
  }
  if (plan.dw_sums) {
    if (p.grad_dw_weight != nullptr) {
      schedule.add(sum_of("sum_partials, dw_weight", plan.dw_split.count, g.c_mid * taps, bytes));
    }
    if (p.grad_dw_bias != nullptr) schedule.add(sum_of("sum_partials, dw_bias", plan.dw_split.count, g.c_mid, bytes));
  }
  return schedule;
}

// Two kernels at the ceilings of the machine, z in DRAM between them (in L2 where it fits there, which is not counted):
// no library is faster without fusing.
constexpr Schedule unfused_forward(const ForwardParams& p, const DeviceLimits& device) {
  const Geometry& g = p.geom;
  const schedule_detail::Bytes bytes = schedule_detail::bytes_of(g, p.dtype);
  const double fma = p.dtype == DType::f64 ? device.fma_f64 : device.fma_f32;
  const bool half = p.dtype == DType::f16 || p.dtype == DType::bf16;
  const double pixels = static_cast<double>(output_pixels(g));
  // As many blocks as there are multiprocessors: perfectly spread.
  KernelCost depthwise = schedule_detail::plain_kernel("depthwise", device.multiprocessors);
  depthwise.rate = fma;
  depthwise.multiply_adds = pixels * static_cast<double>(g.c_mid * tap_count(g));
  depthwise.dram_bytes = depthwise.l2_bytes = bytes.x + bytes.dw_weight + bytes.z;
  KernelCost pointwise = schedule_detail::plain_kernel("pointwise", device.multiprocessors);
  pointwise.rate = half && device.mma_f16 > fma ? device.mma_f16 : fma;
  pointwise.multiply_adds = pixels * static_cast<double>(g.c_mid * g.c_out);
  pointwise.dram_bytes = pointwise.l2_bytes = bytes.z + bytes.pw_weight + bytes.y;
  Schedule schedule;
  schedule.add(depthwise);
  schedule.add(pointwise);
  return schedule;
}

}  // namespace dsconv
