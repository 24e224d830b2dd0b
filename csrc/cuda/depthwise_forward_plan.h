// What the kernels of the depthwise stage alone (depthwise_forward.cuh) will do for a call, and what they are predicted
// to cost: plain host C++, like cuda_plan.h.
#pragma once

#include "cuda_plan.h"

namespace dsconv {

// Slots of a box: whole images of 14 x 14, so that their x is read once. Tiles of double, which has no boxes.
constexpr int kDepthwiseSlots = 256;
constexpr int kDepthwiseTilePixels = 128, kDepthwiseTileChannels = 16;

struct DepthwiseForwardPlan {
  int kernel;    // unrolled_kernel, of double
  PixelBox box;  // of the other types
  int32_t x_stages;
  int64_t pixel_tiles;              // boxes, or tiles of pixels
  int32_t groups, chunks_of_group;  // of chunks (or tiles) of channels: those of one block
  int64_t blocks;                   // pixel_tiles * groups, groups fastest
  int32_t staged, taps, bytes;      // of the dynamic shared memory: act(z) is at 0
  BoxTables tables;
};

inline void place_depthwise_forward(DepthwiseForwardPlan& plan) {
  int64_t at = int64_t{kDepthwiseSlots} * kChunkBytes;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = at;
    at += box_round_up(bytes, 16);
    return static_cast<int32_t>(begin);
  };
  plan.staged = take(int64_t{plan.x_stages} * plan.box.stage_bytes);
  plan.taps = take(int64_t{plan.x_stages} * plan.box.tap_bytes);
  plan.tables.spans = take(8 * int64_t{plan.box.spans});
  plan.tables.strips = take(8 * kDepthwiseSlots / kStripPixels);
  plan.tables.offsets = take(8 * kDepthwiseSlots);
  plan.bytes = static_cast<int32_t>(at);
}

constexpr int64_t depthwise_chunk_channels(DType dtype) {
  return dtype == DType::f64 ? kDepthwiseTileChannels : kChunkBytes / mma_element_bytes(dtype);
}

// Of a chunk of x: what half a multiprocessor has beside act(z), the taps and the tables, a span taking 8 bytes for at
// least 64 of x; on sm_75, where that is too little for a box, a third of what there is.
inline int64_t depthwise_stage_bytes(const Geometry& g, const DeviceLimits& device) {
  const int64_t taps = tap_count(g) <= kMostStagedTaps ? kChunkBytes * (tap_count(g) + 1) : 0;
  const int64_t tables = 8 * kDepthwiseSlots / kStripPixels + 8 * kDepthwiseSlots + 64;
  const int64_t half = device.shared_per_multiprocessor / 2 - device.shared_reserved;
  const int64_t most = (half - kDepthwiseSlots * kChunkBytes - taps - tables) * 8 / 9;
  return most >= 20 << 10 ? most : device.shared_per_block / 3;
}

inline DepthwiseForwardPlan plan_depthwise_forward(const ForwardParams& p, const DeviceLimits& device) {
  const Geometry& g = p.geom;
  DepthwiseForwardPlan plan{};
  plan.kernel = unrolled_kernel(g);
  const int64_t chunks = ceil_div(g.c_mid, depthwise_chunk_channels(p.dtype));
  if (p.dtype == DType::f64) {
    plan.pixel_tiles = ceil_div(output_pixels(g), kDepthwiseTilePixels);
    plan.chunks_of_group = 1;
  } else {
    plan.box = plan_box(g, box_source(p), kDepthwiseSlots, depthwise_stage_bytes(g, device));
    plan.pixel_tiles = plan.box.tiles;
    // About four blocks a multiprocessor; what a block has more than one chunk of, it loads ahead.
    const int64_t most = plan.pixel_tiles * chunks / (4 * device.multiprocessors);
    plan.chunks_of_group = static_cast<int32_t>(most < 1 ? 1 : smaller(most, chunks));
    plan.x_stages = plan.box.staged && plan.chunks_of_group > 1 ? 2 : 1;
    place_depthwise_forward(plan);
    if (plan.bytes > device.shared_per_multiprocessor / 2 - device.shared_reserved) {
      plan.x_stages = 1;
      place_depthwise_forward(plan);
    }
  }
  plan.groups = static_cast<int32_t>(ceil_div(chunks, plan.chunks_of_group));
  plan.blocks = plan.pixel_tiles * plan.groups;
  return plan;
}

// outputs.cuh, of either kernel: 16 bytes of the outputs a thread.
constexpr int64_t outputs_blocks(const Geometry& g, DType dtype) {
  return ceil_div(output_pixels(g) * g.c_out, kBlockThreads * 16 / static_cast<int64_t>(element_bytes(dtype)));
}

// Of one launch, act(z) to memory not counted: the caller knows whether L2 keeps it.
inline KernelCost depthwise_forward_cost(const ForwardParams& p, const DepthwiseForwardPlan& plan,
                                         const DeviceLimits& device) {
  const Geometry& g = p.geom;
  const int64_t bytes = static_cast<int64_t>(element_bytes(p.dtype)), taps = tap_count(g);
  const int64_t chunk = depthwise_chunk_channels(p.dtype), z = output_pixels(g) * g.c_mid;
  KernelCost cost;
  cost.name = "depthwise";
  cost.blocks = plan.blocks;
  cost.threads = kBlockThreads;
  cost.bounded_blocks = 2;
  cost.stages = plan.x_stages;
  cost.shared_bytes = plan.bytes;
  cost.dram_bytes = (x_elements(g) + g.c_mid * taps) * bytes;
  const double channels = static_cast<double>(ceil_div(g.c_mid, chunk) * chunk);
  const double tiles = static_cast<double>(plan.pixel_tiles);
  if (p.dtype == DType::f64) {
    cost.rate = device.fma_f64;
    cost.multiply_adds = tiles * channels * kDepthwiseTilePixels * static_cast<double>(2 * taps);
    cost.l2_bytes = (plan.pixel_tiles * g.c_in * window_elements(g, kDepthwiseTilePixels) + z) * bytes;
    return cost;
  }
  // A tap and a value of z as in forward_cost().
  cost.rate = device.fma_f32;
  cost.multiply_adds = tiles * channels * kDepthwiseSlots * static_cast<double>(2 * taps + 8);
  cost.l2_bytes = (plan.pixel_tiles * (g.c_in * box_elements(plan.box, g) + g.c_mid * taps) + z) * bytes;
  // z is written by rows and read by 16 bytes a lane.
  const double chunk_wavefronts =
      box_wavefronts(plan.box, g, p.x_layout, kDepthwiseSlots, bytes) + kDepthwiseSlots * kChunkBytes / 128.0;
  cost.wavefronts = tiles * channels / static_cast<double>(chunk) * chunk_wavefronts;
  return cost;
}

}  // namespace dsconv
