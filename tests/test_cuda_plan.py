"""The planner of the CUDA kernels, which is plain host C++: csrc/cuda/cuda_plan.h compiles without CUDA."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"

PLANNER = r"""
#include <cstdio>
#include <initializer_list>

#include "cuda/cuda_dispatch.h"
using namespace dsconv;

static int failures = 0;
#define CHECK(condition) \
  do { \
    if (!(condition)) ++failures, std::printf("line %d: %s\n", __LINE__, #condition); \
  } while (false)

static Geometry geometry(int64_t n, int64_t c_mid, int64_t c_out, int64_t size, int64_t kernel) {
  Geometry g{};
  g.n = n;
  g.c_in = g.c_mid = c_mid;
  g.multiplier = 1;
  g.c_out = c_out;
  g.d_in = g.d_out = g.kernel_d = g.stride_d = g.dilation_d = 1;
  g.h_in = g.h_out = g.w_in = g.w_out = size;
  g.kernel_h = g.kernel_w = kernel;
  g.stride_h = g.stride_w = g.dilation_h = g.dilation_w = 1;
  g.pad_top = g.pad_left = kernel / 2;
  return g;
}

// `depth` slices in, and a kernel as deep as it is wide.
static Geometry volume(int64_t n, int64_t c_mid, int64_t c_out, int64_t depth, int64_t size, int64_t kernel,
                       int64_t stride_d) {
  Geometry g = geometry(n, c_mid, c_out, size, kernel);
  g.d_in = depth;
  g.kernel_d = kernel;
  g.stride_d = stride_d;
  g.pad_front = kernel / 2;
  g.d_out = (depth - 1) / stride_d + 1;
  return g;
}

// Every pixel in exactly one piece, and none empty.
static void check_split(const PixelSplit& split, int64_t pixels) {
  CHECK(split.count * split.pixels >= pixels && (split.count - 1) * split.pixels < pixels);
  CHECK(split.pixels % 32 == 0);
}

// The boxes cover every pixel and the groups every channel; what is staged of x is what a box reaches.
static void check_mma(const ForwardPlan& plan, const ForwardParams& p, const DeviceLimits& device) {
  const Geometry& g = p.geom;
  const MmaForwardPlan& mma = plan.mma;
  const MmaTile tile = mma_tile(mma.kind);
  const PixelBox& box = mma.box;
  CHECK(box.n * box.h * box.w <= tile.pixels && box.tiles_h * box.h >= g.h_out && box.tiles_w * box.w >= g.w_out);
  CHECK(box.tiles == ceil_div(g.n * g.d_out, box.n) * box.tiles_h * box.tiles_w);
  CHECK((box.strips_down ? box.h : box.w) % (box.flat ? kPatchPixels : kStripPixels) == 0);
  CHECK(p.x_layout == Layout::nchw || box.flat || box.h % 2 == 0);
  CHECK(int64_t{mma.groups} * mma.tiles_of_group * tile.channels >= g.c_out);
  CHECK(int64_t{mma.groups - 1} * mma.tiles_of_group * tile.channels < g.c_out);
  CHECK(plan.blocks == box.tiles * mma.groups && mma.shared.bytes <= device.shared_per_block);
  const bool all_of_z = mma.tiles_of_group > 1 || makes_z_first(mma.kind);
  CHECK(!all_of_z || mma.z_tiles * (kChunkBytes / mma_element_bytes(p.dtype)) >= g.c_mid);
  if (!box.staged) return;
  CHECK(box.in_h == (box.h - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1);
  CHECK(box.in_w >= (box.w - 1) * g.stride_w + (g.kernel_w - 1) * g.dilation_w + 1);
  CHECK(box.row_pitch % box.copy_bytes == 0 && box.channel_pitch % (p.x_layout == Layout::nchw ? 16 : 1) == 0);
  CHECK(box.n * g.kernel_d * box.in_h * box.row_pitch <= box.stage_bytes);
  CHECK(box.plane_pitch == box.in_h * box.row_pitch);
}

static ForwardPlan forward_of(const Geometry& g, DType dtype, int64_t multiprocessors) {
  ForwardParams p{};
  p.geom = g;
  p.dtype = dtype;
  p.x_strides = dense_strides(p.x_layout, g.c_in, g.d_in, g.h_in, g.w_in);
  const DeviceLimits device{multiprocessors};
  const ForwardPlan plan = plan_forward(p, device);
  CHECK(can_run(p, plan, device) && plan.tensor_cores == (dtype == DType::f16 || dtype == DType::bf16));
  if (plan.tensor_cores) {
    check_mma(plan, p, device);
    return plan;
  }
  const ForwardTile tile = forward_tile(accumulator_bytes(dtype), plan.wide);
  CHECK(plan.pixel_tiles * tile.pixels >= g.n * g.d_out * g.h_out * g.w_out);
  CHECK(plan.channel_tiles * tile.channels >= g.c_out);
  CHECK(plan.blocks == plan.pixel_tiles * plan.channel_tiles);
  return plan;
}

// Boxes cover every cell, lines every pixel of x that belongs to them, and two blocks fit.
static void check_planes(const DepthwisePlanesPlan& plan, const BackwardParams& p, const DeviceLimits& device) {
  const Geometry& g = p.geom;
  const PixelBox& box = plan.box;
  CHECK(plan.chunks * kPlaneChannels >= g.c_mid && (plan.chunks - 1) * kPlaneChannels < g.c_mid);
  CHECK(plan.splits * plan.boxes_of_split >= box.tiles && (plan.splits - 1) * plan.boxes_of_split < box.tiles);
  CHECK(box.tiles == ceil_div(g.n * plan.cells.d_out, box.n) * box.tiles_h * box.tiles_w);
  CHECK(box.tiles_h * box.h * g.stride_h >= g.h_in && box.tiles_w * box.w * g.stride_w >= g.w_in);
  CHECK(box.n * box.h * box.w <= kMostPlaneSlots && plan.strips * kStripPixels == box.n * box.h * box.w);
  const int64_t rows = smaller(plan.region_h, g.h_in), columns = smaller(plan.region_w, g.w_in);
  const int64_t images = kPlaneChannels * g.h_in * g.w_in;
  CHECK(plan.line_elements >= (plan.together ? images : plan.whole ? rows * g.w_in : columns));
  CHECK(plan.line_elements * (p.dtype == DType::f32 ? 4 : 2) % 16 == 0);
  CHECK(2 * (plan.bytes + device.shared_reserved) <= device.shared_per_multiprocessor);
}

// Tiles cover every channel, boxes and splits every pixel; what the kernels put over each other has been read before.
static void check_mma_backward(const BackwardPlan& plan, const BackwardParams& p, const DeviceLimits& device) {
  const Geometry& g = p.geom;
  const int64_t element = mma_element_bytes(p.dtype);
  const MmaDuPlan& du = plan.mma.du;
  const MmaSumPlan& sum = plan.mma.sum;
  const MmaDuTile du_of = du_tile(du.kind);
  const MmaSumTile sum_of = sum_tile(sum.kind, element);
  CHECK(has_du_tile(du.kind, element) && has_sum_tile(sum.kind, element));
  CHECK(int64_t{du.mid_tiles} * du_of.mid >= g.c_mid && int64_t{du.mid_tiles - 1} * du_of.mid < g.c_mid);
  CHECK(int64_t{sum.mid_tiles} * kSumMid >= g.c_mid && int64_t{sum.out_tiles} * sum_of.out >= g.c_out);
  CHECK(du.box.n * du.box.h * du.box.w <= du_of.pixels && sum.box.n * sum.box.h * sum.box.w <= sum_of.pixels);
  CHECK(sum.splits * sum.boxes_of_split >= sum.box.tiles);
  CHECK((sum.splits - 1) * sum.boxes_of_split < sum.box.tiles);
  CHECK(plan.pw_split.count * plan.pw_split.pixels >= sum.box.tiles * sum_of.pixels);
  CHECK(sum.splits == 1 || plan.pw_blocks <= 4 * device.multiprocessors);
  CHECK(du.shared.bytes <= device.shared_per_block && sum.shared.bytes <= device.shared_per_block);
  const bool bent = p.act != Activation::identity;
  CHECK(du.shared.grad >= (bent ? du_of.pixels * du_of.mid * element : 0));
  CHECK(du.shared.weights >= du.shared.grad + 2 * du_of.pixels * kChunkBytes);
  CHECK(du.shared.dy_offsets >= du.shared.weights + 2 * du_of.mid * kChunkBytes);
  CHECK(!bent || du.shared.taps >= du.shared.staged + du.x_stages * du.box.stage_bytes);
  CHECK(!bent || du.shared.dy_offsets >= du.shared.taps + du.x_stages * du.box.tap_bytes);
  CHECK(du.shared.dy_offsets >= du.shared.slices + kWarpsOfBlock * slice_bytes(element));
  CHECK(sum.shared.z >= sum_of.pixels * sum_of.out * element);
  CHECK(sum.shared.staged >= sum.shared.z + sum_of.pixels * kSumMid * element);
  CHECK(sum.shared.taps >= sum.shared.staged + sum.x_stages * sum.box.stage_bytes);
}

// `grads` are bits of GradBit.
static BackwardPlan backward_of(const Geometry& g, DType dtype, Layout layout, int64_t multiprocessors, int64_t grads) {
  alignas(16) static char somewhere;
  const auto asked = [&](GradBit bit) { return (grads & bit) != 0 ? &somewhere : nullptr; };
  BackwardParams p{};
  p.geom = g;
  p.dtype = dtype;
  p.x_layout = layout;
  p.x_strides = p.grad_x_strides = dense_strides(layout, g.c_in, g.d_in, g.h_in, g.w_in);
  p.grad_x_layout = layout;
  p.grad_x = asked(kGradX);
  p.grad_dw_weight = asked(kGradDwWeight);
  p.grad_pw_weight = asked(kGradPwWeight);
  p.grad_dw_bias = asked(kGradDwBias);
  p.grad_pw_bias = asked(kGradPwBias);
  p.act = (g.c_mid + g.n) % 2 == 0 ? Activation::relu6 : Activation::identity;
  const BackwardPlan plan = plan_backward(p, DeviceLimits{multiprocessors});
  const int64_t pixels = g.n * g.d_out * g.h_out * g.w_out, accumulator = accumulator_bytes(dtype);
  CHECK(plan.tensor_cores == (dtype == DType::f16 || dtype == DType::bf16));
  if (plan.tensor_cores) {
    check_mma_backward(plan, p, DeviceLimits{multiprocessors});
  } else {
    check_split(plan.pw_split, pixels);
  }
  const DepthwiseTilesPlan& tiles = plan.tiles;
  CHECK(!tiles.grad_x || tiles.both || plan.grad_x_blocks == tiles.cell_box.tiles * tiles.chunks);
  CHECK(!tiles.both || (tiles.grad_x && tiles.sums && plan.grad_x_blocks == plan.dw_blocks));
  if (tiles.sums) {
    const int64_t boxes = tiles.both ? tiles.cell_box.tiles : tiles.sum_box.tiles;
    CHECK(plan.dw_split.count == tiles.splits && plan.dw_blocks == tiles.splits * tiles.chunks);
    CHECK(tiles.splits * tiles.boxes_of_split >= boxes && (tiles.splits - 1) * tiles.boxes_of_split < boxes);
  } else if (plan.planes.sums) {
    CHECK(plan.dw_split.count == plan.planes.splits && plan.dw_blocks == plan.planes.splits * plan.planes.chunks);
  } else {
    check_split(plan.dw_split, pixels);
  }
  if (plan.planes.grad_x || plan.planes.sums) check_planes(plan.planes, p, DeviceLimits{multiprocessors});
  if (layout == Layout::nhwc || dtype == DType::f64) CHECK(!plan.planes.grad_x && !plan.planes.sums);
  if (layout == Layout::nchw) CHECK(!tiles.grad_x && !tiles.sums);

  // The parts of the workspace follow each other, and each has room for what is asked for.
  const int64_t begins[] = {(int64_t)plan.du_at, (int64_t)plan.pw_weight_at, (int64_t)plan.pw_bias_at,
                            (int64_t)plan.dw_weight_at, (int64_t)plan.dw_bias_at, (int64_t)plan.workspace_bytes};
  const int64_t taps = g.kernel_d * g.kernel_h * g.kernel_w;
  const int64_t needs[] = {plan.du ? pixels * g.c_mid * (int64_t)element_bytes(dtype) : 0,
                           p.grad_pw_weight ? plan.pw_split.count * g.c_out * g.c_mid * accumulator : 0,
                           p.grad_pw_bias ? plan.pw_split.count * g.c_out * accumulator : 0,
                           p.grad_dw_weight ? plan.dw_split.count * g.c_mid * taps * accumulator : 0,
                           p.grad_dw_bias ? plan.dw_split.count * g.c_mid * accumulator : 0};
  for (int i = 0; i < 5; ++i) CHECK(begins[i] % 256 == 0 && begins[i + 1] - begins[i] >= needs[i]);
  for (int i = 0; i < 5; ++i) CHECK(needs[i] != 0 || begins[i + 1] == begins[i]);
  CHECK(plan.du == ((grads & (kGradX | kGradDwWeight | kGradDwBias)) != 0));
  CHECK(plan.pw_sums == ((grads & (kGradPwWeight | kGradPwBias)) != 0));
  return plan;
}

static KernelCost cost_of(int64_t blocks, int64_t threads, int64_t shared_bytes, int64_t bounded_blocks) {
  KernelCost cost;
  cost.blocks = blocks;
  cost.threads = threads;
  cost.shared_bytes = shared_bytes;
  cost.bounded_blocks = bounded_blocks;
  return cost;
}

static void check_costs() {
  // Blocks that share a multiprocessor, as each limit has it.
  const DeviceLimits h100, t4 = limits_of(75, 40);
  CHECK(blocks_per_multiprocessor(cost_of(1, 256, 0, 2), h100) == 2);              // registers
  CHECK(blocks_per_multiprocessor(cost_of(1, 256, 0, 99), h100) == 8);             // threads
  CHECK(blocks_per_multiprocessor(cost_of(1, 256, 0, 99), t4) == 4);
  CHECK(blocks_per_multiprocessor(cost_of(1, 32, 0, 99), h100) == 32);             // blocks
  CHECK(blocks_per_multiprocessor(cost_of(1, 256, 75 << 10, 99), h100) == 3);      // shared memory, 1 KiB each beside
  CHECK(blocks_per_multiprocessor(cost_of(1, 256, 76 << 10, 99), h100) == 2);
  CHECK(blocks_per_multiprocessor(cost_of(1, 256, 32 << 10, 99), t4) == 2);        // none beside
  CHECK(blocks_per_multiprocessor(cost_of(1, 256, 228 << 10, 99), h100) == 0);     // more than a block may have
  CHECK(predict(cost_of(1, 256, 228 << 10, 99), h100).seconds == 0);

  // The multiprocessor with the most blocks takes the longest; the largest of the three times counts.
  KernelCost cost = cost_of(133, 256, 0, 2);
  cost.rate = h100.fma_f32;
  cost.multiply_adds = 133 * 1e6;
  const double block = 1e6 / (h100.fma_f32 / 132);
  const auto near = [](double a, double b) { return a < b * 1.0001 && b < a * 1.0001; };
  CHECK(near(predict(cost, h100).arithmetic_seconds, 2 * block));
  CHECK(near(predict(cost, h100).waves, 133.0 / 264));
  CHECK(near(predict(cost, h100).seconds, kLaunchSeconds + 2 * block));
  cost.dram_bytes = 3350000000;
  CHECK(near(predict(cost, h100).seconds, kLaunchSeconds + 1e-3));
  cost.l2_bytes = 11000000000;
  CHECK(near(predict(cost, h100).seconds, kLaunchSeconds + 2e-3));

  // x of a tile: its rows and their halo, cut to the image; whole images where a tile is larger.
  Geometry g = geometry(2, 8, 8, 28, 3);
  CHECK(window_elements(g, 28) == 3 * 28 && window_elements(g, 29) == 4 * 28 && window_elements(g, 14) == 3 * 16);
  CHECK(window_elements(g, 784) == 784 && window_elements(g, 785) == 2 * 784 && window_elements(g, 783) == 784);
  g.stride_h = g.stride_w = 2;
  g.h_out = g.w_out = 14;
  CHECK(window_elements(g, 28) == 5 * 28);
  g.dilation_h = 3;
  CHECK(window_elements(g, 28) == 9 * 28);

  // Every entry is what a GPU of its capability and size is taken for; an unknown one is scaled from its elder.
  for (const Gpu& gpu : kGpus) {
    const DeviceLimits found = limits_of(gpu.limits.capability, gpu.limits.multiprocessors);
    CHECK(found.bandwidth == gpu.limits.bandwidth && found.shared_per_block == gpu.limits.shared_per_block);
    CHECK(gpu.limits.shared_per_block + gpu.limits.shared_reserved <= gpu.limits.shared_per_multiprocessor);
  }
  CHECK(near(limits_of(103, 296).bandwidth, 16e12) && limits_of(70, 80).shared_per_block == 64 << 10);

  // Where memory bounds both tiles the one with less arithmetic is taken.
  ForwardParams p{};
  p.geom = geometry(128, 32, 16, 112, 3);
  DeviceLimits slow = h100;
  slow.bandwidth = 1e9;
  const Prediction wide = predict(forward_cost(p, forward_candidate(p, 0, slow), slow), slow);
  const Prediction narrow = predict(forward_cost(p, forward_candidate(p, 1, slow), slow), slow);
  CHECK(wide.seconds == narrow.seconds && narrow.arithmetic_seconds < wide.arithmetic_seconds);
  CHECK(!plan_forward(p, slow).wide);
}

static ForwardParams images_call(const Geometry& g, DType dtype, Layout layout) {
  ForwardParams p{};
  p.geom = g;
  p.dtype = dtype;
  p.x_layout = p.y_layout = layout;
  p.x_strides = dense_strides(layout, g.c_in, g.d_in, g.h_in, g.w_in);
  p.y_strides = dense_strides(layout, g.c_out, g.d_out, g.h_out, g.w_out);
  return p;
}

// The chunks cover every channel, boxes or tiles every pixel, and two blocks fit.
static void check_depthwise(const ForwardParams& p, const DeviceLimits& device) {
  const Geometry& g = p.geom;
  const DepthwiseForwardPlan plan = plan_depthwise_forward(p, device);
  const int64_t channels = plan.chunks_of_group * depthwise_chunk_channels(p.dtype);
  CHECK(plan.groups * channels >= g.c_mid && (plan.groups - 1) * channels < g.c_mid);
  CHECK(plan.blocks == plan.pixel_tiles * plan.groups);
  const int64_t blocks = blocks_per_multiprocessor(depthwise_forward_cost(p, plan, device), device);
  CHECK(blocks == 2 || (blocks == 1 && device.capability < 80));
  if (p.dtype == DType::f64) {
    CHECK(plan.pixel_tiles == ceil_div(output_pixels(g), kDepthwiseTilePixels));
    return;
  }
  const PixelBox& box = plan.box;
  CHECK(box.n * box.h * box.w <= kDepthwiseSlots && box.tiles_h * box.h >= g.h_out && box.tiles_w * box.w >= g.w_out);
  CHECK(plan.pixel_tiles == ceil_div(g.n * g.d_out, box.n) * box.tiles_h * box.tiles_w);
  CHECK(plan.staged >= kDepthwiseSlots * kChunkBytes && plan.taps >= plan.staged + plan.x_stages * box.stage_bytes);
  CHECK(plan.x_stages == 1 || plan.chunks_of_group > 1);
}

static void check_split() {
  for (const Gpu& gpu : kGpus) {
    const DeviceLimits& device = gpu.limits;
    for (const Layout layout : {Layout::nchw, Layout::nhwc}) {
      for (const int64_t c : {1, 17, 64, 728, 4096}) {
        for (const int64_t size : {1, 7, 14, 19, 56, 300}) {
          for (const DType dtype : {DType::f16, DType::f64}) {
            const ForwardParams p = images_call(geometry(9, c, 40, size, 3), dtype, layout);
            check_depthwise(p, device);
            const SplitForwardPlan split = plan_split_forward(p, device);
            CHECK(split.images >= 1 && split.images <= 9);
            CHECK(split.workspace_bytes == act_z_bytes(images_of(p, 0, split.images)));
            CHECK(split.workspace_bytes >= split.images * size * size * c * static_cast<int64_t>(element_bytes(dtype)));
            CHECK(act_z_strides(p).n * static_cast<int64_t>(element_bytes(dtype)) % 16 == 0 || layout == Layout::nhwc);
            // Groups are made only where half of L2 does not hold the call, and then each fits, or is one image.
            if (split.images < 9) {
              CHECK(9 * split.workspace_bytes > split.images * device.l2_bytes / 2);
              CHECK(split.workspace_bytes <= device.l2_bytes / 2 || split.images == 1);
            }
          }
        }
      }
    }
  }

  const DeviceLimits a100 = kGpus[1].limits, h100 = kGpus[4].limits;
  const auto splits = [&](const ForwardParams& p, const DeviceLimits& device) {
    return split_is_faster(p, plan_split_forward(p, device), plan_forward(p, device), device);
  };
  for (const Layout layout : {Layout::nchw, Layout::nhwc}) {
    for (const DeviceLimits& device : {a100, h100}) {
      CHECK(splits(images_call(geometry(32, 1024, 1024, 7, 3), DType::f16, layout), device));
      CHECK(splits(images_call(geometry(32, 1536, 2048, 10, 3), DType::f16, layout), device));
      CHECK(splits(images_call(geometry(32, 1024, 1024, 7, 3), DType::bf16, layout), device));
      // Narrow layers of many pixels stay fused: there z is what takes the time.
      CHECK(!splits(images_call(geometry(32, 64, 128, 112, 3), DType::f16, layout), device));
      CHECK(!splits(images_call(geometry(32, 32, 64, 112, 3), DType::f16, layout), device));
    }
  }
  // Not float, nor where the moments of y are made in its epilogue, nor bf16 without tensor cores for it.
  ForwardParams p = images_call(geometry(32, 1024, 1024, 7, 3), DType::f32, Layout::nhwc);
  CHECK(!can_split(p, h100) && plan_split_forward(p, h100).images == 0);
  p.tf32 = true;
  CHECK(!can_split(p, h100));
  p.dtype = DType::bf16;
  CHECK(can_split(p, h100) && !can_split(p, kGpus[0].limits));
  static char parts;
  p.y_parts = &parts;
  CHECK(!can_split(p, h100));
  p.y_parts = nullptr;
  p.geom.n = 0;
  CHECK(plan_split_forward(p, h100).images == 0);
  p.geom = geometry(32, 1024, 1024, 7, 11);
  CHECK(can_split(p, h100));
  p.geom = geometry(32, 1024, 1024, 7, 13);
  CHECK(!can_split(p, h100));

  // A pass over y where something is left to be done: an activation, `pre`, and a bias behind a product an image.
  p = images_call(geometry(4, 64, 64, 14, 3), DType::f16, Layout::nhwc);
  CHECK(!has_outputs_pass(p) && split_forward_schedule(p, split_by(p, 4), h100).count == 2);
  p.pw_bias = &parts;
  CHECK(!has_outputs_pass(p));
  p.y_layout = Layout::nchw;
  CHECK(has_outputs_pass(p) && adds_bias(p));
  p.y_layout = Layout::nhwc;
  p.out_act = Activation::relu;
  CHECK(has_outputs_pass(p) && !adds_bias(p) && split_forward_schedule(p, split_by(p, 4), h100).count == 3);

  // Groups take a launch each; act(z) crosses to memory and back only where half of L2 does not hold it.
  const Schedule one = split_forward_schedule(p, split_by(p, 4), h100);
  const Schedule four = split_forward_schedule(p, split_by(p, 1), h100);
  CHECK(four.kernels[0].launches == 4 && four.kernels[0].blocks >= one.kernels[0].blocks);
  CHECK(predict(four.kernels[0], h100).seconds > 4 * kLaunchSeconds);
  DeviceLimits small = h100;
  small.l2_bytes = 1 << 10;
  CHECK(split_forward_schedule(p, split_by(p, 4), small).kernels[1].dram_bytes - one.kernels[1].dram_bytes ==
        act_z_bytes(p));
  CHECK(one.workspace_bytes == 4 * four.workspace_bytes && one.workspace_bytes == act_z_bytes(p));
}

int main() {
  check_split();
  const int64_t channels[] = {1, 3, 17, 32, 113, 512, 2048, 100000};
  for (const DType dtype : {DType::f32, DType::f64, DType::f16, DType::bf16})
    for (const int64_t c_mid : channels)
      for (const int64_t c_out : channels)
        for (const int64_t n : {1, 2, 128})
          for (const int64_t size : {1, 7, 14, 56, 300})
            for (const int64_t kernel : {1, 3, 31})
              for (const int64_t multiprocessors : {1, 40, 132}) {
                const Geometry g = geometry(n, c_mid, c_out, size, kernel);
                forward_of(g, dtype, multiprocessors);
                backward_of(g, dtype, Layout::nchw, multiprocessors, 31);
                backward_of(g, dtype, Layout::nhwc, multiprocessors, 31);
              }
  for (const DType dtype : {DType::f32, DType::f64, DType::f16, DType::bf16})
    for (const int64_t c : {3, 54, 432})
      for (const int64_t n : {1, 8})
        for (const int64_t size : {7, 56})
          for (const int64_t kernel : {1, 3, 9})
            for (const int64_t stride : {1, 2}) {
              const Geometry g = volume(n, c, 24, 16, size, kernel, stride);
              forward_of(g, dtype, 132);
              backward_of(g, dtype, Layout::nchw, 132, 31);
              backward_of(g, dtype, Layout::nhwc, 132, 31);
            }
  for (int64_t grads = 0; grads < 32; ++grads) {
    backward_of(geometry(2, 32, 64, 28, 3), DType::f32, Layout::nchw, 132, grads);
  }

  // The wide tile computes z fewer times; the narrow one pads few output channels less and makes more blocks.
  CHECK(forward_of(geometry(128, 64, 128, 56, 3), DType::f32, 132).wide);
  CHECK(!forward_of(geometry(128, 144, 24, 56, 3), DType::f32, 132).wide);
  CHECK(!forward_of(geometry(1, 1024, 1024, 7, 3), DType::f32, 132).wide);

  check_costs();

  // Stage D with columns adjacent: one kernel for both gradients wherever the pixels of x can be taken together to
  // cells; x in lines of whole images, of whole rows, of parts of rows; x as it is where it has gaps.
  {
    alignas(16) static char grad;
    BackwardParams b{};
    b.geom = geometry(32, 512, 512, 14, 3);
    b.dtype = DType::f16;
    b.x_strides = b.grad_x_strides = dense_strides(Layout::nchw, 512, 1, 14, 14);
    b.grad_x = b.grad_dw_weight = b.grad_dw_bias = &grad;
    const DeviceLimits& h100 = kGpus[4].limits;
    DepthwisePlanesPlan planes = plan_backward(b, h100).planes;
    CHECK(planes.grad_x && planes.sums && planes.x_staged && planes.together && planes.box.strips_down);
    CHECK(planes.splits * planes.chunks >= 2 * h100.multiprocessors);
    b.x_strides.n += 8;
    CHECK(!plan_backward(b, h100).planes.x_staged && plan_backward(b, h100).planes.grad_x);
    b.grad_x = &grad + 1;
    CHECK(!plan_backward(b, h100).planes.grad_x && plan_backward(b, h100).planes.sums);
    b.grad_x = &grad;
    b.geom = geometry(4, 64, 64, 112, 3);
    b.x_strides = b.grad_x_strides = dense_strides(Layout::nchw, 64, 1, 112, 112);
    planes = plan_backward(b, h100).planes;
    CHECK(planes.whole && !planes.together && planes.box.tiles_w == 1 && planes.box.tiles_h > 1);
    b.geom = geometry(1, 64, 64, 9000, 3);
    b.x_strides = b.grad_x_strides = dense_strides(Layout::nchw, 64, 1, 9000, 9000);
    planes = plan_backward(b, h100).planes;
    CHECK(planes.grad_x && !planes.whole && planes.lines == planes.box.n * planes.region_h);
    b.geom = geometry(4, 64, 64, 28, 3);
    b.x_strides = b.grad_x_strides = dense_strides(Layout::nchw, 64, 1, 28, 28);
    b.geom.stride_h = b.geom.stride_w = 2;
    b.geom.h_out = b.geom.w_out = 14;
    planes = plan_backward(b, h100).planes;
    CHECK(planes.cells.kernel_h == 2 && planes.cells.h_out == 15 && planes.region_h == 2 * planes.box.h);
    b.geom.dilation_h = 2;  // and stride 2
    planes = plan_backward(b, h100).planes;
    CHECK(!planes.grad_x && !planes.sums);
    b.geom = geometry(4, 64, 64, 28, 3);
    b.geom.pad_top = 4;  // rows of du that belong to no pixel of x: the sum of the bias misses them
    b.geom.h_out = 34;
    planes = plan_backward(b, h100).planes;
    CHECK(planes.grad_x && !planes.sums);
    b.grad_dw_bias = nullptr;
    CHECK(plan_backward(b, h100).planes.sums);
    b.geom = geometry(4, 64, 64, 28, 3);
    b.geom.multiplier = 2;
    b.geom.c_in = 32;
    planes = plan_backward(b, h100).planes;
    CHECK(!planes.grad_x && planes.sums && !planes.together);
    b.x_strides = b.grad_x_strides = dense_strides(Layout::nchw, 128, 1, 64, 64);
    b.geom = geometry(1, 128, 128, 64, 31);  // its taps need no more room than those of others
    CHECK(plan_backward(b, h100).planes.grad_x && plan_backward(b, h100).planes.sums);
  }

  // The same with channels adjacent, where a 3x3 kernel's taps and their sums fit the registers and each pixel of du is
  // a cell's. Two stages of du for two blocks, on every architecture.
  for (const Gpu& gpu : kGpus) {
    alignas(16) static char grad;
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      BackwardParams b{};
      b.dtype = dtype;
      b.x_layout = b.grad_x_layout = Layout::nhwc;
      const auto set = [&](int64_t channels, int64_t size, int64_t kernel, int64_t stride) {
        b.geom = geometry(8, channels, 64, size, kernel);
        b.geom.stride_h = b.geom.stride_w = stride;
        b.geom.h_out = b.geom.w_out = (size - 1) / stride + 1;
        b.x_strides = b.grad_x_strides = dense_strides(Layout::nhwc, channels, 1, size, size);
        b.grad_x = b.grad_dw_weight = b.grad_dw_bias = &grad;
      };
      const auto tiles = [&] { return plan_backward(b, gpu.limits).tiles; };
      const auto is_one = [](const DepthwiseTilesPlan& plan) { return plan.both && plan.grad_x && plan.sums; };
      const auto are_two = [](const DepthwiseTilesPlan& plan) { return !plan.both && plan.grad_x && plan.sums; };
      for (const int64_t stride : {1, 2}) {
        for (const int64_t size : {7, 14, 29, 56, 300}) {
          set(64, size, 3, stride);
          const DepthwiseTilesPlan plan = tiles();
          const int64_t shared = plan.cell_shared.bytes + gpu.limits.shared_reserved;
          CHECK(is_one(plan) && 2 * shared <= gpu.limits.shared_per_multiprocessor);
          CHECK(plan.cell_shared.bytes >= 2 * plan.cell_box.stage_bytes && plan.x_aligned && plan.grad_x_aligned);
        }
        set(64, 28, 5, stride);
        CHECK(are_two(tiles()));
        set(33, 28, 3, stride);
        CHECK(is_one(tiles()) && tiles().x_aligned == (dtype == DType::f32));
        b.grad_dw_weight = nullptr;  // a bias alone needs no x
        CHECK(are_two(tiles()));
        b.grad_dw_bias = nullptr;
        CHECK(!tiles().both && tiles().grad_x && !tiles().sums);
        set(64, 28, 3, stride);
        b.grad_x = nullptr;
        CHECK(!tiles().both && !tiles().grad_x && tiles().sums);
        b.grad_x = &grad;
        b.geom.stride_w = 3 - stride;
        CHECK(are_two(tiles()));
      }
      set(64, 28, 3, 1);
      b.geom.dilation_h = 2;
      CHECK(are_two(tiles()));
      set(64, 28, 3, 1);
      b.geom.h_in = b.geom.h_out = 1;  // patches of one row
      CHECK(are_two(tiles()));
      set(64, 28, 3, 1);
      b.geom.pad_top = 4;  // rows of du that belong to no pixel of x: the sum of the bias misses them
      b.geom.h_out = 34;
      CHECK(are_two(tiles()));
      b.grad_dw_bias = nullptr;
      CHECK(is_one(tiles()));
      // The slices of a volume are images where the kernel has no depth.
      set(64, 28, 3, 1);
      b.geom.d_in = b.geom.d_out = 5;
      b.x_strides = b.grad_x_strides = dense_strides(Layout::nhwc, 64, 5, 28, 28);
      CHECK(is_one(tiles()));
      b.geom.pad_front = 1;
      b.geom.d_out = 7;
      CHECK(!tiles().both);
      set(64, 28, 3, 1);
      b.geom.multiplier = 2;
      b.geom.c_in = 32;
      CHECK(!tiles().both && !tiles().grad_x && tiles().sums);
    }
  }

  // Tensor cores by dtype and architecture, and in float32 where TF32 is allowed.
  ForwardParams p{};
  p.geom = geometry(8, 64, 64, 28, 3);
  p.x_strides = dense_strides(p.x_layout, 64, 1, 28, 28);
  for (const Gpu& gpu : kGpus) {
    const bool ampere = gpu.limits.capability >= 80;
    for (const bool tf32 : {false, true}) {
      p.tf32 = tf32;
      p.dtype = DType::f32;
      CHECK(plan_forward(p, gpu.limits).tensor_cores == (tf32 && ampere));
      p.dtype = DType::f64;
      CHECK(!plan_forward(p, gpu.limits).tensor_cores);
      p.dtype = DType::f16;
      CHECK(plan_forward(p, gpu.limits).tensor_cores);
      p.dtype = DType::bf16;
      CHECK(plan_forward(p, gpu.limits).tensor_cores == ampere);
    }
  }
  // Two blocks of either kernel of backward share a multiprocessor of any architecture, by tiles that are as wide as it
  // has shared memory for.
  for (const Gpu& gpu : kGpus) {
    if (gpu.limits.capability < 80) continue;
    const bool large = gpu.limits.shared_per_multiprocessor > 128 << 10;
    for (const Layout layout : {Layout::nchw, Layout::nhwc}) {
      for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
        for (const Activation act : {Activation::identity, Activation::relu6}) {
          static char weight;
          BackwardParams b{};
          b.geom = geometry(64, 512, 512, 14, 3);
          b.dtype = dtype;
          b.tf32 = true;
          b.act = act;
          b.x_layout = layout;
          b.x_strides = dense_strides(layout, 512, 1, 14, 14);
          b.grad_pw_weight = b.grad_dw_bias = &weight;
          const auto two_fit = [&](int64_t bytes) {
            return 2 * (bytes + gpu.limits.shared_reserved) <= gpu.limits.shared_per_multiprocessor;
          };
          const BackwardPlan plan = plan_backward(b, gpu.limits);
          const MmaDuPlan& du = plan.mma.du;
          const MmaSumPlan& sum = plan.mma.sum;
          const bool bent = act != Activation::identity, floats = dtype == DType::f32;
          CHECK(plan.tensor_cores && two_fit(du.shared.bytes) && two_fit(sum.shared.bytes));
          CHECK(sum.kind == (large ? MmaSumTileKind::wide : floats ? MmaSumTileKind::narrow : MmaSumTileKind::small));
          const bool room = large || !bent;
          CHECK(du.kind == (floats ? room ? MmaDuTileKind::narrow : MmaDuTileKind::small
                                   : room ? MmaDuTileKind::wide : MmaDuTileKind::narrow));
          CHECK(plan.pw_blocks <= 2 * 2 * gpu.limits.multiprocessors && plan.pw_blocks > gpu.limits.multiprocessors);

          // Few channels leave wide tiles empty.
          b.geom = geometry(64, 64, 64, 14, 3);
          b.x_strides = dense_strides(layout, 64, 1, 14, 14);
          const BackwardPlan few = plan_backward(b, gpu.limits);
          CHECK(few.mma.du.kind != MmaDuTileKind::wide && few.mma.sum.kind == MmaSumTileKind::narrow);
          CHECK(few.mma.sum.out_tiles == 1 && few.mma.du.mid_tiles == 1);

          // Few pixels: narrow tiles of mid channels are twice as many.
          b.geom = geometry(1, 512, 512, 7, 3);
          b.x_strides = dense_strides(layout, 512, 1, 7, 7);
          CHECK(plan_backward(b, gpu.limits).mma.du.kind != MmaDuTileKind::wide);
        }
      }
    }
  }
  // A second chunk of x while the first is made z of, where two blocks have room for it.
  {
    static char weight;
    BackwardParams b{};
    b.geom = geometry(64, 64, 64, 28, 3);
    b.dtype = DType::f16;
    b.act = Activation::relu6;
    b.x_layout = Layout::nhwc;
    b.x_strides = dense_strides(Layout::nhwc, 64, 1, 28, 28);
    b.grad_pw_weight = &weight;
    CHECK(plan_backward(b, kGpus[4].limits).mma.sum.x_stages == 2);
    CHECK(plan_backward(b, kGpus[3].limits).mma.sum.x_stages == 1);
    b.geom = geometry(64, 64, 64, 28, 31);
    CHECK(plan_backward(b, kGpus[4].limits).mma.sum.x_stages == 1);
  }
  // A smaller box where two blocks have no room for the largest, but not one that is clearly slower.
  {
    static char weight;
    BackwardParams b{};
    b.geom = geometry(16, 64, 128, 112, 3);
    b.geom.stride_h = b.geom.stride_w = 2;
    b.geom.h_out = b.geom.w_out = 56;
    b.dtype = DType::f16;
    b.act = Activation::relu6;
    b.x_layout = Layout::nhwc;
    b.x_strides = dense_strides(Layout::nhwc, 64, 1, 112, 112);
    b.grad_pw_weight = b.grad_dw_bias = &weight;
    const auto du = [&](const DeviceLimits& device) { return plan_backward(b, device).mma.du; };
    const auto pixels = [](const MmaDuPlan& plan) { return plan.box.n * plan.box.h * plan.box.w; };
    const auto blocks = [](const KernelCost& cost, const DeviceLimits& device) {
      return predict(cost, device).blocks_per_multiprocessor;
    };
    const DeviceLimits& small = kGpus[2].limits;
    const MmaDuPlan half = du(small), whole = du(kGpus[4].limits);
    CHECK(blocks(du_mma_cost(b, half, small), small) == 2 && half.box.staged);
    CHECK(pixels(half) == 56 && pixels(whole) == 112);
    b.geom = geometry(16, 32, 64, 112, 3);
    b.x_layout = Layout::nchw;
    b.x_strides = dense_strides(Layout::nchw, 32, 1, 112, 112);
    CHECK(blocks(sum_mma_cost(b, plan_backward(b, small).mma.sum, small), small) == 1);
  }
  // A window that does not fit is read from global memory tap by tap; unequal strides loop over their taps.
  p.dtype = DType::f16;
  CHECK(plan_forward(p, kGpus[4].limits).mma.box.kernel == BoxKernel::k3s1);
  p.geom.stride_h = 2;
  CHECK(plan_forward(p, kGpus[4].limits).mma.box.kernel == BoxKernel::looped);
  p.geom = geometry(1, 64, 64, 9, 3);
  p.geom.dilation_h = p.geom.dilation_w = 4000;
  CHECK(plan_forward(p, kGpus[4].limits).mma.box.kernel == BoxKernel::unstaged);

  // Rows that pieces of 16 bytes do not fit come as runs; not where images are apart by less than these, or have gaps.
  p.geom = geometry(8, 64, 64, 7, 3);
  p.x_strides = dense_strides(p.x_layout, 64, 1, 7, 7);
  const PixelBox narrow = plan_forward(p, kGpus[4].limits).mma.box;
  CHECK(narrow.copy_bytes == 2 && narrow.run_bytes >= 2 * 49 + 14 && narrow.run_bytes % 16 == 0);
  CHECK(narrow.stage_bytes >= narrow.runs_at + narrow.n * 32 * narrow.run_bytes && narrow.runs_at % 16 == 0);
  CHECK(narrow.runs_at >= 32 * narrow.channel_pitch);
  p.x_strides.h = 8;
  CHECK(plan_forward(p, kGpus[4].limits).mma.box.run_bytes == 0);
  p.x_strides = dense_strides(p.x_layout, 63, 1, 7, 7);
  CHECK(plan_forward(p, kGpus[4].limits).mma.box.run_bytes == 0);
  p.geom = geometry(8, 64, 64, 28, 3);
  p.x_strides = dense_strides(p.x_layout, 64, 1, 28, 28);
  CHECK(plan_forward(p, kGpus[4].limits).mma.box.run_bytes == 0);

  // Each slice of outputs has its planes of x staged; the taps of a plane stay unrolled.
  p.geom = volume(8, 54, 24, 16, 56, 3, 1);
  p.x_strides = dense_strides(p.x_layout, 54, 16, 56, 56);
  const PixelBox deep = plan_forward(p, kGpus[4].limits).mma.box;
  CHECK(deep.kernel == BoxKernel::k3s1 && deep.tiles == 8 * 16 / deep.n * deep.tiles_h * deep.tiles_w);
  CHECK(window_elements(p.geom, 56) == 3 * 3 * 56);

  CHECK(unrolled_kernel(geometry(1, 1, 1, 9, 3)) == 3 && unrolled_kernel(geometry(1, 1, 1, 9, 5)) == 5);
  CHECK(unrolled_kernel(geometry(1, 1, 1, 9, 7)) == 0);
  Geometry g = geometry(1, 1, 1, 9, 3);
  g.kernel_w = 5;
  CHECK(unrolled_kernel(g) == 0);

  CHECK(unsupported_extent(geometry(1, 1, 1, 9, 3)) == nullptr);
  g = geometry(1, 1, 1, 9, 3);
  g.w_in = int64_t{1} << 29;
  CHECK(unsupported_extent(g) != nullptr);
  g = geometry(1, 1, 1, 9, 3);
  g.d_in = int64_t{1} << 29;
  CHECK(unsupported_extent(g) != nullptr);
  g = geometry(1, 1, 1, 9, 3);
  g.dilation_h = int64_t{1} << 28;  // reaches (3 - 1) * 2^28
  CHECK(unsupported_extent(g) != nullptr);
  return failures != 0;
}
"""


def test_the_planner_covers_every_pixel_and_its_workspace_holds_every_part(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, program = tmp_path / "planner.cpp", tmp_path / "planner"
    source.write_text(PLANNER)
    subprocess.run([compiler, "-std=c++20", "-O1", "-Wall", f"-I{CSRC}", source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[:4000]
