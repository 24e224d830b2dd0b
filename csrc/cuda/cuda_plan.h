// What the CUDA launchers will do for a call: tiles, grids, splits and workspace, chosen from shape, dtype, layout and
// device alone. Plain host C++ without CUDA, so that a unit test can ask it anything.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../params.h"
#include "cuda_cost.h"
#include "depthwise_planes_plan.h"
#include "depthwise_tiles_plan.h"
#include "mma_backward_plan.h"
#include "mma_plan.h"

namespace dsconv {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr size_t element_bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
constexpr size_t accumulator_bytes(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

// Square kernels of these extents have their taps unrolled; every other kernel loops (0).
constexpr int unrolled_kernel(const Geometry& g) {
  return g.kernel_h != g.kernel_w ? 0 : g.kernel_h == 3 ? 3 : g.kernel_h == 5 ? 5 : 0;
}

// Coordinates and channels inside the kernels are 32-bit. The text of what is too large, or null.
constexpr const char* unsupported_extent(const Geometry& g) {
  constexpr int64_t kLimit = int64_t{1} << 29;
  const auto fits = [](int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t dilation, int64_t pad) {
    return in < kLimit && out < kLimit && kernel < kLimit && dilation < kLimit && stride < kLimit && pad < kLimit &&
           (kernel - 1) * dilation < kLimit && (out - 1) * stride < kLimit;
  };
  if (g.c_mid >= kLimit || g.c_out >= kLimit) return "the channels";
  if (!fits(g.d_in, g.d_out, g.kernel_d, g.stride_d, g.dilation_d, g.pad_front)) return "the depth";
  if (!fits(g.h_in, g.h_out, g.kernel_h, g.stride_h, g.dilation_h, g.pad_top)) return "the height";
  if (!fits(g.w_in, g.w_out, g.kernel_w, g.stride_w, g.dilation_w, g.pad_left)) return "the width";
  if (g.kernel_h * g.kernel_w >= kLimit || tap_count(g) >= kLimit) return "the taps";
  return nullptr;
}

constexpr int64_t x_elements(const Geometry& g) { return input_pixels(g) * g.c_in; }

// Elements of one channel of x that `pixels` output pixels in a row reach: their rows and the halo around them, in as
// many slices as a kernel has.
constexpr int64_t window_elements(const Geometry& g, int64_t pixels) {
  const auto reach = [](int64_t outputs, int64_t kernel, int64_t stride, int64_t dilation, int64_t in) {
    return smaller((outputs - 1) * stride + (kernel - 1) * dilation + 1, in);
  };
  const int64_t image = g.h_out * g.w_out, slices = smaller(g.kernel_d, g.d_in);
  if (pixels >= image) return ceil_div(pixels, image) * slices * g.h_in * g.w_in;
  const int64_t rows = slices * reach(ceil_div(pixels, g.w_out), g.kernel_h, g.stride_h, g.dilation_h, g.h_in);
  return rows * reach(smaller(pixels, g.w_out), g.kernel_w, g.stride_w, g.dilation_w, g.w_in);
}

constexpr Strides dense_strides(Layout layout, int64_t c, int64_t d, int64_t h, int64_t w) {
  return layout == Layout::nhwc ? Strides{c * d * h * w, 1, c * w, c, c * h * w}
                                : Strides{c * d * h * w, d * h * w, w, 1, h * w};
}

// ---------------------------------------------------------------------------------------------------------- forward

struct ForwardTile {
  int pixels, channels;
};

// 64 accumulator registers a thread hold a double tile of half the channels.
constexpr ForwardTile forward_tile(size_t accumulator, bool wide) {
  if (!wide) return {128, 32};
  return accumulator == 8 ? ForwardTile{64, 64} : ForwardTile{64, 128};
}

constexpr int64_t kForwardBlocks = 2;     // that share a multiprocessor, by their registers
constexpr size_t kPixelWindowBytes = 24;  // of a pixel, pixel.cuh
constexpr int forward_depth(size_t accumulator) { return 128 / static_cast<int>(accumulator); }

// act(z), pw_weight with 16 bytes behind each row, windows: forward.cuh.
constexpr size_t forward_shared_bytes(size_t element, size_t accumulator, bool wide) {
  const ForwardTile tile = forward_tile(accumulator, wide);
  const size_t depth = static_cast<size_t>(forward_depth(accumulator));
  return accumulator * depth * static_cast<size_t>(tile.pixels + 4) +
         static_cast<size_t>(tile.channels) * (element * depth + 16) +
         kPixelWindowBytes * static_cast<size_t>(tile.pixels);
}

struct ForwardPlan {
  int kernel;  // unrolled_kernel
  bool wide;
  int64_t pixel_tiles, channel_tiles;
  int64_t blocks;     // pixel_tiles * channel_tiles, channel tiles fastest
  bool tensor_cores;  // forward_mma.cuh, by `mma`; what is above but `blocks` is unused then
  MmaForwardPlan mma;
};

// Tiles or boxes of pixels, each of which a block (or several, for its output channels) takes.
constexpr int64_t pixel_tiles_of(const ForwardPlan& plan) {
  return plan.tensor_cores ? plan.mma.box.tiles : plan.pixel_tiles;
}

constexpr ForwardPlan forward_plan_of(const ForwardParams& p, bool wide) {
  const Geometry& g = p.geom;
  const ForwardTile tile = forward_tile(accumulator_bytes(p.dtype), wide);
  const int64_t pixel_tiles = ceil_div(output_pixels(g), tile.pixels);
  const int64_t channel_tiles = ceil_div(g.c_out, tile.channels);
  return {unrolled_kernel(g), wide, pixel_tiles, channel_tiles, pixel_tiles * channel_tiles, false, {}};
}

constexpr bool same_plan(const ForwardPlan& a, const ForwardPlan& b) {
  return a.tensor_cores == b.tensor_cores && a.wide == b.wide && a.mma.kind == b.mma.kind;
}

// Tensor cores are used wherever they can be: fp16 has them everywhere, bf16 and TF32 from sm_80 on.
constexpr bool can_run(const ForwardParams& p, const ForwardPlan& plan, const DeviceLimits& device) {
  const bool wanted = has_tensor_cores(p.dtype, p.tf32, device.capability);
  if (plan.tensor_cores && !has_registers(p, plan.mma.kind, device.capability)) return false;
  return plan.tensor_cores == wanted && plan.mma.shared.bytes <= device.shared_per_block;
}

inline KernelCost forward_cost(const ForwardParams& p, const ForwardPlan& plan, const DeviceLimits& device) {
  const Geometry& g = p.geom;
  const size_t element = element_bytes(p.dtype), accumulator = accumulator_bytes(p.dtype);
  const int64_t bytes = static_cast<int64_t>(element), depth = forward_depth(accumulator);
  const ForwardTile tile = forward_tile(accumulator, plan.wide);
  const int64_t mid = ceil_div(g.c_mid, depth) * depth, taps = tap_count(g);
  const int64_t weights = g.c_mid * (g.c_out + taps), y = output_pixels(g) * g.c_out;
  KernelCost cost;
  cost.blocks = plan.blocks;
  cost.threads = kBlockThreads;
  cost.bounded_blocks = kForwardBlocks;
  cost.dram_bytes = (x_elements(g) + weights + y) * bytes;
  if (plan.tensor_cores) {
    const MmaTile mma = mma_tile(plan.mma.kind);
    const double mma_rate = p.dtype == DType::f32 ? device.mma_tf32 : device.mma_f16;
    constexpr const char* kNames[kMmaTileKinds] = {"forward_mma, wide tile", "forward_mma, narrow tile",
                                                   "forward_mma, small tile", "forward_mma, square tile",
                                                   "forward_mma, flat tile"};
    cost.name = kNames[static_cast<int>(plan.mma.kind)];
    cost.tile_rows = mma.pixels;
    cost.tile_columns = mma.channels;
    cost.tile_depth = kChunkBytes / bytes;
    cost.stages = plan.mma.x_stages;
    cost.shared_bytes = plan.mma.shared.bytes;
    // In multiply-adds outside of the tensor cores; a tap and a value of z cost about two and eight (loads,
    // conversion).
    const int64_t columns = int64_t{plan.mma.tiles_of_group} * mma.channels;
    const int64_t padded = ceil_div(g.c_mid, cost.tile_depth) * cost.tile_depth;
    cost.rate = device.fma_f32;
    cost.multiply_adds = static_cast<double>(plan.blocks) * static_cast<double>(mma.pixels * padded) *
                         (static_cast<double>(2 * taps + 8) +
                          static_cast<double>(columns) * (mma_rate > 0 ? device.fma_f32 / mma_rate : 0));
    cost.l2_bytes = (plan.blocks * (g.c_in * box_elements(plan.mma.box, g) + g.c_mid * (columns + taps)) + y) * bytes;
    cost.wavefronts = static_cast<double>(plan.blocks) * mma_forward_wavefronts(p, plan.mma);
    return cost;
  }
  cost.name = plan.wide ? "forward, wide tile" : "forward, narrow tile";
  cost.tile_rows = tile.pixels;
  cost.tile_columns = tile.channels;
  cost.tile_depth = depth;
  cost.stages = 1;
  cost.shared_bytes = static_cast<int64_t>(forward_shared_bytes(element, accumulator, plan.wide));
  // Every channel tile computes z anew; a tap costs about twice a multiply-add of the product (two loads each).
  cost.multiply_adds = static_cast<double>(plan.blocks) * static_cast<double>(tile.pixels * mid) *
                       static_cast<double>(tile.channels + 2 * taps);
  cost.rate = p.dtype == DType::f64 ? device.fma_f64 : device.fma_f32;
  cost.l2_bytes = (plan.blocks * g.c_in * window_elements(g, tile.pixels) + plan.pixel_tiles * weights + y) * bytes;
  return cost;
}

// The shorter one. Of two that are as good as equal, by the few per cent that such a prediction is worth at most, that
// which keeps all resources together busy for less: where one of them bounds both, the others still matter.
constexpr bool is_better(const Prediction& a, const Prediction& b) {
  constexpr double kEqual = 0.05;
  const auto all = [](const Prediction& p) {
    return p.dram_seconds + p.l2_seconds + p.shared_seconds + p.arithmetic_seconds;
  };
  const double apart = a.seconds - b.seconds, equal = kEqual * b.seconds;
  return apart < -equal || (apart <= equal && all(a) < all(b));
}

inline ForwardPlan mma_plan_of(const ForwardParams& p, MmaTileKind kind, const PixelBox& box, int64_t tiles_of_group,
                               const DeviceLimits& device) {
  ForwardPlan plan{};
  plan.tensor_cores = true;
  plan.mma = mma_forward_candidate(p, kind, box, tiles_of_group, device);
  plan.kernel = unrolled_kernel(p.geom);
  plan.pixel_tiles = plan.mma.box.tiles;
  plan.channel_tiles = plan.mma.groups;
  plan.blocks = plan.mma.blocks;
  return plan;
}

// Every plan that a call can have. A further kernel adds its plans here and what they cost to forward_cost(). On tensor
// cores one for each kind of tile, with all output channels in a block, or spread over 2, 4, .. blocks: z is computed
// again in each of them, but where there are few boxes they fill the device.
constexpr int kForwardPlans = 2 + kMmaTileKinds;
inline ForwardPlan forward_candidate(const ForwardParams& p, int i, const DeviceLimits& device) {
  if (i < 2) return forward_plan_of(p, i == 0);
  const auto kind = static_cast<MmaTileKind>(i - 2);
  int64_t tiles = ceil_div(p.geom.c_out, mma_tile(kind).channels);
  const PixelBox box = mma_forward_box(p, kind, device);
  ForwardPlan best = mma_plan_of(p, kind, box, tiles, device);
  Prediction least = predict(forward_cost(p, best, device), device);
  while (tiles > 1) {
    tiles = ceil_div(tiles, 2);
    const ForwardPlan plan = mma_plan_of(p, kind, box, tiles, device);
    const Prediction found = predict(forward_cost(p, plan, device), device);
    if (is_better(found, least)) {
      best = plan;
      least = found;
    }
  }
  return best;
}

// The best of the candidates, as is_better() has it. All sum in the same order: the choice changes no bit.
inline ForwardPlan plan_forward(const ForwardParams& p, const DeviceLimits& device) {
  ForwardPlan best{};
  Prediction least{};
  for (int i = 0; i < kForwardPlans; ++i) {
    const ForwardPlan plan = forward_candidate(p, i, device);
    if (!can_run(p, plan, device)) continue;
    const Prediction found = predict(forward_cost(p, plan, device), device);
    if (best.blocks == 0 || is_better(found, least)) {
      best = plan;
      least = found;
    }
  }
  return best;
}

// --------------------------------------------------------------------------------------------------------- backward

struct PointwiseTiles {
  int du_channels, du_pixels;  // of the du kernel
  int weight_out, weight_mid;  // of the grad_pw_weight kernel
  int depth;                   // chunk of either contraction
};

constexpr PointwiseTiles pointwise_tiles(size_t accumulator) {
  return accumulator == 8 ? PointwiseTiles{64, 64, 64, 64, 16} : PointwiseTiles{128, 64, 64, 64, 32};
}

// backward_pointwise.cuh: the chunks of pw_weight and g, or act'(z) in their place, windows and offsets.
constexpr size_t du_shared_bytes(size_t element, size_t accumulator) {
  const PointwiseTiles t = pointwise_tiles(accumulator);
  const size_t depth = static_cast<size_t>(t.depth), channels = static_cast<size_t>(t.du_channels);
  const size_t pixels = static_cast<size_t>(t.du_pixels);
  const size_t chunks = element * depth * channels + accumulator * pixels * (depth + 4);
  const size_t middle = accumulator * pixels * (channels + 4);
  return (chunks > middle ? chunks : middle) + (kPixelWindowBytes + 16) * pixels;
}
constexpr size_t pointwise_sum_shared_bytes(size_t accumulator) {
  const PointwiseTiles t = pointwise_tiles(accumulator);
  const size_t depth = static_cast<size_t>(t.depth);
  return accumulator *
             (depth * static_cast<size_t>(t.weight_out + 4) + static_cast<size_t>(t.weight_mid) * (depth + 4)) +
         (kPixelWindowBytes + 16) * depth;
}

constexpr int kTapGroup = 8;            // taps a block of grad_dw_weight sums where those of a kd are not unrolled
constexpr int kDepthwiseChannels = 32;  // channels of such a block where x is unit-strided along c, else 1
constexpr int64_t kMinSplitPixels = 128;

// A contraction over pixels cut into `count` pieces of `pixels` each; every piece leaves a partial sum.
struct PixelSplit {
  int64_t count, pixels;
};

// As many pieces as fill the device about `waves` times, none smaller than kMinSplitPixels.
constexpr PixelSplit split_pixels(int64_t pixel_count, int64_t tiles, int64_t waves, const DeviceLimits& device) {
  const int64_t wanted = ceil_div(waves * device.multiprocessors, tiles > 0 ? tiles : 1);
  const int64_t most = ceil_div(pixel_count, kMinSplitPixels);
  const int64_t pieces = wanted < most ? wanted : most;
  const int64_t pixels = ceil_div(ceil_div(pixel_count, pieces > 0 ? pieces : 1), 32) * 32;
  return {ceil_div(pixel_count, pixels > 0 ? pixels : 1), pixels};
}

struct BackwardPlan {
  int kernel;                 // unrolled_kernel
  bool du, pw_sums, dw_sums;  // which kernels run beside grad_x: du; grad_pw_*; grad_dw_*

  Layout du_layout;
  Strides du_strides;
  int64_t du_pixel_tiles, du_channel_tiles, du_blocks;

  PixelSplit pw_split;
  int64_t pw_out_tiles, pw_mid_tiles, pw_blocks;

  int64_t grad_x_blocks;

  PixelSplit dw_split;
  int64_t dw_channel_tiles, dw_tap_groups, dw_blocks;

  // In place of the kernels that grad_x_blocks and dw_blocks are for, where they say so.
  DepthwiseTilesPlan tiles;
  DepthwisePlanesPlan planes;

  bool tensor_cores;  // stage P is backward_mma.cuh, by `mma`; du_pixel_tiles and pw_split count boxes and their slots
  MmaBackwardPlan mma;

  // Bytes from the start of the workspace, each a multiple of 256.
  size_t du_at, pw_weight_at, pw_bias_at, dw_weight_at, dw_bias_at, workspace_bytes;
};

inline BackwardPlan plan_backward(const BackwardParams& p, const DeviceLimits& device) {
  const Geometry& g = p.geom;
  const size_t element = element_bytes(p.dtype), accumulator = accumulator_bytes(p.dtype);
  const PointwiseTiles tiles = pointwise_tiles(accumulator);
  const int64_t pixel_count = output_pixels(g), taps = tap_count(g);

  BackwardPlan plan{};
  plan.kernel = unrolled_kernel(g);
  plan.dw_sums = p.grad_dw_weight != nullptr || p.grad_dw_bias != nullptr;
  plan.pw_sums = p.grad_pw_weight != nullptr || p.grad_pw_bias != nullptr;
  plan.du = plan.dw_sums || p.grad_x != nullptr;

  plan.du_layout = p.x_layout;
  plan.du_strides = dense_strides(plan.du_layout, g.c_mid, g.d_out, g.h_out, g.w_out);
  plan.du_pixel_tiles = ceil_div(pixel_count, tiles.du_pixels);
  plan.du_channel_tiles = ceil_div(g.c_mid, tiles.du_channels);
  plan.du_blocks = plan.du_pixel_tiles * plan.du_channel_tiles;

  plan.pw_out_tiles = ceil_div(g.c_out, tiles.weight_out);
  plan.pw_mid_tiles = p.grad_pw_weight != nullptr ? ceil_div(g.c_mid, tiles.weight_mid) : 1;
  plan.pw_split = split_pixels(pixel_count, plan.pw_out_tiles * plan.pw_mid_tiles, 2, device);
  plan.pw_blocks = plan.pw_split.count * plan.pw_out_tiles * plan.pw_mid_tiles;

  if (has_tensor_cores(p.dtype, p.tf32, device.capability)) {
    plan.mma = plan_mma_backward(p, device);
    const int64_t most = device.shared_per_block;
    plan.tensor_cores = plan.mma.du.shared.bytes <= most && plan.mma.sum.shared.bytes <= most;
  }
  if (plan.tensor_cores) {
    const MmaSumPlan& sum = plan.mma.sum;
    plan.du_pixel_tiles = plan.mma.du.box.tiles;
    plan.du_channel_tiles = plan.mma.du.mid_tiles;
    plan.du_blocks = plan.du_pixel_tiles * plan.du_channel_tiles;
    plan.pw_out_tiles = sum.out_tiles;
    plan.pw_mid_tiles = p.grad_pw_weight != nullptr ? sum.mid_tiles : 1;
    plan.pw_split = {sum.splits, sum.boxes_of_split * sum_tile(sum.kind, mma_element_bytes(p.dtype)).pixels};
    plan.pw_blocks = plan.pw_split.count * plan.pw_out_tiles * plan.pw_mid_tiles;
  }

  plan.grad_x_blocks = ceil_div(x_elements(g), kBlockThreads);

  plan.dw_channel_tiles = ceil_div(g.c_mid, p.x_layout == Layout::nhwc ? kDepthwiseChannels : 1);
  const int64_t taps_of_group = plan.kernel != 0 ? g.kernel_h * g.kernel_w : kTapGroup;
  plan.dw_tap_groups = p.grad_dw_weight == nullptr ? 1 : ceil_div(taps, taps_of_group);
  plan.dw_split = split_pixels(pixel_count, plan.dw_channel_tiles * plan.dw_tap_groups, 8, device);
  plan.dw_blocks = plan.dw_split.count * plan.dw_channel_tiles * plan.dw_tap_groups;
  plan.tiles = plan_depthwise_tiles(p, plan.du_strides, plan.dw_sums, device);
  if (plan.tiles.grad_x) {
    plan.grad_x_blocks = (plan.tiles.both ? plan.tiles.splits : plan.tiles.cell_box.tiles) * plan.tiles.chunks;
  }
  if (plan.tiles.sums) {
    plan.dw_split = {plan.tiles.splits, plan.tiles.boxes_of_split * kTilePixels};  // for both: of cells
    plan.dw_channel_tiles = plan.tiles.chunks;
    plan.dw_tap_groups = 1;
    plan.dw_blocks = plan.tiles.splits * plan.tiles.chunks;
  }
  plan.planes = plan_depthwise_planes(p, plan.du_strides, plan.dw_sums, device);
  if (plan.planes.grad_x) plan.grad_x_blocks = plan.planes.splits * plan.planes.chunks;
  if (plan.planes.sums) {
    plan.dw_split = {plan.planes.splits,
                     plan.planes.boxes_of_split * plan.planes.box.n * plan.planes.box.h * plan.planes.box.w};
    plan.dw_channel_tiles = plan.planes.chunks;
    plan.dw_tap_groups = 1;
    plan.dw_blocks = plan.planes.splits * plan.planes.chunks;
  }

  size_t at = 0;
  const auto reserve = [&](bool wanted, int64_t elements, size_t bytes) {
    const size_t begin = at;
    if (wanted) at += static_cast<size_t>(ceil_div(elements * static_cast<int64_t>(bytes), 256)) * 256;
    return begin;
  };
  plan.du_at = reserve(plan.du, pixel_count * g.c_mid, element);
  plan.pw_weight_at = reserve(p.grad_pw_weight != nullptr, plan.pw_split.count * g.c_out * g.c_mid, accumulator);
  plan.pw_bias_at = reserve(p.grad_pw_bias != nullptr, plan.pw_split.count * g.c_out, accumulator);
  plan.dw_weight_at = reserve(p.grad_dw_weight != nullptr, plan.dw_split.count * g.c_mid * taps, accumulator);
  plan.dw_bias_at = reserve(p.grad_dw_bias != nullptr, plan.dw_split.count * g.c_mid, accumulator);
  plan.workspace_bytes = at;
  return plan;
}

}  // namespace dsconv
