// What stage D of backward will do where columns are adjacent in memory: one kernel for both gradients, from boxes of
// du in shared memory. Plain host C++; backward_depthwise_planes.cuh does it.
//
// Channels lie far apart there and pixels together, so a chunk is few channels, one a warp, and a box many pixels.
// Boxes are of cells (depthwise_tiles_plan.h): the pixels of x of a cell meet the same du for either gradient, and no
// other box has them. x of a box lies in shared memory as in global memory, in lines that are contiguous in both, and
// grad_x takes its place there.
//
//   a line:   all channels of an image     where a box holds whole images ("together")
//             rows of a slice and channel  where it holds whole rows      ("whole")
//             a row of them                else
#pragma once

#include "../params.h"
#include "cuda_device.h"
#include "depthwise_tiles_plan.h"
#include "pixel_box.h"

namespace dsconv {

constexpr int kPlaneChannels = kBlockThreads / 32;
constexpr int64_t kMostPlaneSlots = 4096, kFewPlaneSlots = 512;  // cells of a box

struct DepthwisePlanesPlan {
  bool grad_x, sums;  // what the kernel makes; nothing: it does not run
  bool x_staged;      // else x comes from global memory, element by element
  int32_t chunks;     // of channels

  Geometry cells;  // du as the input, cells as the output
  PixelBox box;
  int32_t strips;  // items of kStripPixels cells
  int64_t splits, boxes_of_split;

  bool together, whole;
  Strides strides;               // of grad_x, or of x where that is not made; those of both where x is staged
  int32_t region_h, region_w;    // pixels of x of a box, a slice
  int32_t lines, line_elements;  // of a channel, or of all of them; each has that much room
  int32_t tile, taps, sums_at, spans, strips_at, lines_at, bytes;  // in shared memory; du is at 0
};

// Whether channels, slices and rows of a tensor follow each other without a gap, and 16 bytes at a time are aligned.
inline bool is_one_run(const Geometry& g, const void* tensor, const Strides& s) {
  const auto is = [](int64_t extent, int64_t stride, int64_t wanted) { return extent == 1 || stride == wanted; };
  const int64_t slice = g.h_in * g.w_in, image = g.d_in * slice;
  return reinterpret_cast<uintptr_t>(tensor) % 16 == 0 && is(g.h_in, s.h, g.w_in) && is(g.d_in, s.d, slice) &&
         is(g.c_in, s.c, image) && is(g.n, s.n, g.c_in * image);
}

// Lines and shared memory of a box.
inline void finish_planes(DepthwisePlanesPlan& plan, const Geometry& g, int64_t element) {
  const PixelBox& box = plan.box;
  plan.strips = box.n * box.h * box.w / kStripPixels;
  plan.whole = box.tiles_w == 1;
  plan.together = plan.whole && box.tiles_h == 1 && g.d_in == 1 && g.multiplier == 1;
  const int64_t region_h = box.h * g.stride_h, region_w = box.w * g.stride_w;
  plan.region_h = static_cast<int32_t>(region_h);
  plan.region_w = static_cast<int32_t>(region_w);
  const int64_t slices = box.n * g.stride_d;
  const int64_t rows = region_h < g.h_in ? region_h : g.h_in, columns = region_w < g.w_in ? region_w : g.w_in;
  const int64_t pixels = plan.together ? kPlaneChannels * g.h_in * g.w_in : plan.whole ? rows * g.w_in : columns;
  const int64_t vec = 16 / element, room = box_round_up(pixels, vec) + vec;
  plan.lines = static_cast<int32_t>(plan.whole ? slices : slices * region_h);
  plan.line_elements = static_cast<int32_t>(room);
  int64_t at = box.stage_bytes;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = at;
    at += box_round_up(bytes, 16);
    return static_cast<int32_t>(begin);
  };
  const int64_t tap_bytes = kPlaneChannels * tap_count(g);
  plan.tile =
      take((plan.grad_x || plan.x_staged) ? plan.lines * (plan.together ? 1 : kPlaneChannels) * room * element : 0);
  plan.taps = take(tap_bytes * element + 16);
  plan.sums_at = take(4 * tap_bytes);
  plan.spans = take(8 * int64_t{box.spans});
  plan.strips_at = take(12 * int64_t{plan.strips});
  plan.lines_at = take(16 * int64_t{plan.lines});
  plan.bytes = static_cast<int32_t>(at < INT32_MAX ? at : INT32_MAX);
}

inline DepthwisePlanesPlan plan_depthwise_planes(const BackwardParams& p, const Strides& du_strides, bool sums,
                                                 const DeviceLimits& device) {
  const Geometry& g = p.geom;
  const int64_t element = p.dtype == DType::f32 ? 4 : 2;
  DepthwisePlanesPlan plan{};
  if (p.dtype == DType::f64 || p.x_layout != Layout::nchw || !have_cells(g)) return plan;
  DepthwisePlanesPlan next{};
  next.cells = cells_of(g);
  next.sums = sums && (p.grad_dw_bias == nullptr || cells_hold_all(g, next.cells));
  next.grad_x = p.grad_x != nullptr && p.grad_x_layout == Layout::nchw && g.multiplier == 1 &&
                is_one_run(g, p.grad_x, p.grad_x_strides);
  next.x_staged = next.sums && p.grad_dw_weight != nullptr && is_one_run(g, p.x, p.x_strides);
  if (!next.sums && !next.grad_x) return plan;
  next.strides = next.grad_x ? p.grad_x_strides : p.x_strides;
  next.chunks = static_cast<int32_t>(box_ceil_div(g.c_mid, kPlaneChannels));
  // Two blocks share a multiprocessor. The largest box that fits, smaller ones as long as they do not fill the device.
  const int64_t most = device.shared_per_multiprocessor / 2 - device.shared_reserved;
  const BoxSource source{nullptr, du_strides, Layout::nchw, element, kPlaneChannels};
  for (int64_t slots = kMostPlaneSlots; slots >= 64; slots /= 2) {
    if (plan.chunks > 0 && (slots < kFewPlaneSlots || plan.box.tiles * plan.chunks >= 2 * device.multiprocessors))
      break;
    next.box = plan_box(next.cells, source, slots, most);
    if (!next.box.staged) continue;
    finish_planes(next, g, element);
    if (next.bytes <= most) plan = next;
  }
  if (plan.chunks == 0) return plan;
  split_boxes(plan, plan.box.tiles, device);
  return plan;
}

}  // namespace dsconv
