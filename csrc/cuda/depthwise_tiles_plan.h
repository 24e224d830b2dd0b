// What stage D of backward will do where channels are adjacent in memory: boxes of pixels staged in shared memory
// (pixel_box.h), as the forward has them. Plain host C++; backward_depthwise_tiles.cuh does it, or for both results at
// once backward_depthwise_both_tiles.cuh.
//
// grad_x is a depthwise convolution of du. At stride s the s x s pixels of x from (s i - phase, s j - phase) on, phase
// being the padding modulo s, form a cell (i, j): all that they take of du is what a kernel of ceil((k - 1) / s) + 1
// taps at stride 1 reaches around (i, j). In 3-D a cell has a depth likewise. A box is one of cells.
#pragma once

#include "../params.h"
#include "cuda_device.h"
#include "pixel_box.h"

namespace dsconv {

constexpr int kTilePixels = 128;  // of a box: pixels of du, or cells of grad_x

// Of a chunk of channels: what is staged, its taps, tables, and what is added up there.
struct DepthwiseTilesShared {
  int32_t taps, sums, bytes;  // x or du is at 0, twice where the next box's is copied while one is computed
  BoxTables tables;
};

struct DepthwiseTilesPlan {
  bool grad_x, sums;  // what is made so; else by the kernels of backward_depthwise.cuh
  bool both;          // by one kernel, from boxes of cells
  int32_t chunks;     // of channels

  Geometry cells;  // du as the input, cells as the output
  PixelBox cell_box;
  DepthwiseTilesShared cell_shared;
  bool x_aligned, grad_x_aligned;  // to four bytes, in every pixel

  PixelBox sum_box;
  DepthwiseTilesShared sum_shared;

  int64_t splits, boxes_of_split;  // of sum_box, or of cell_box for both
};

inline Geometry cells_of(const Geometry& g) {
  Geometry cells = g;
  const auto axis = [](int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
                       int64_t& cells_in, int64_t& cells_out, int64_t& cells_kernel, int64_t& cells_stride,
                       int64_t& cells_pad) {
    cells_kernel = box_ceil_div(kernel - 1, stride) + 1;
    cells_in = out;
    cells_out = box_ceil_div(in + pad % stride, stride);
    cells_stride = 1;
    cells_pad = (cells_kernel - 1) * dilation - pad / stride;
  };
  axis(g.d_in, g.d_out, g.kernel_d, g.stride_d, g.pad_front, g.dilation_d, cells.d_in, cells.d_out, cells.kernel_d,
       cells.stride_d, cells.pad_front);
  axis(g.h_in, g.h_out, g.kernel_h, g.stride_h, g.pad_top, g.dilation_h, cells.h_in, cells.h_out, cells.kernel_h,
       cells.stride_h, cells.pad_top);
  axis(g.w_in, g.w_out, g.kernel_w, g.stride_w, g.pad_left, g.dilation_w, cells.w_in, cells.w_out, cells.kernel_w,
       cells.stride_w, cells.pad_left);
  cells.c_in = g.c_mid;
  cells.multiplier = 1;
  return cells;
}

// Whether the pixels of x can be taken together to cells.
inline bool have_cells(const Geometry& g) {
  return (g.stride_d == 1 || g.dilation_d == 1) && (g.stride_h == 1 || g.dilation_h == 1) &&
         (g.stride_w == 1 || g.dilation_w == 1);
}

// Whether each pixel of du is that of one cell, which the cell's box has staged.
inline bool cells_hold_all(const Geometry& g, const Geometry& cells) {
  const auto axis = [](int64_t out, int64_t count, int64_t pad) { return out <= count && pad >= 0; };
  return axis(g.d_out, cells.d_out, cells.pad_front) && axis(g.h_out, cells.h_out, cells.pad_top) &&
         axis(g.w_out, cells.w_out, cells.pad_left) && cells.pad_front % g.dilation_d == 0;
}

// 3 or 5 for square kernels of that extent at stride 1 or 2, with or without a depth: their taps of a kd are unrolled.
constexpr int unrolled_plane(const Geometry& g) {
  const bool unrolled = g.kernel_h == g.kernel_w && g.stride_h == g.stride_w && g.stride_h <= 2 && g.dilation_h == 1 &&
                        g.dilation_w == 1 && (g.kernel_h == 3 || g.kernel_h == 5);
  return unrolled ? static_cast<int>(g.kernel_h) : 0;
}

// Those without a depth keep a partial sum a tap in registers; others one a warp in shared memory.
constexpr int unrolled_sums(const Geometry& g) { return g.kernel_d == 1 ? unrolled_plane(g) : 0; }

// Whether one kernel makes both: its registers hold the taps of a 3x3 kernel and their sums. The slices of x are those
// of du.
inline bool makes_both(const BackwardParams& p) {
  const Geometry& g = p.geom;
  return unrolled_sums(g) == 3 && g.stride_d == 1 && g.pad_front == 0 && p.grad_dw_weight != nullptr &&
         (p.grad_dw_bias == nullptr || cells_hold_all(g, cells_of(g)));
}

// Boxes to sum over, cut into as many splits as make four blocks a multiprocessor.
template <typename Plan>
void split_boxes(Plan& plan, int64_t boxes, const DeviceLimits& device) {
  const int64_t wanted = box_ceil_div(4 * device.multiprocessors, plan.chunks);
  const int64_t splits = wanted < boxes ? wanted : boxes;
  plan.boxes_of_split = box_ceil_div(boxes, splits > 0 ? splits : 1);
  plan.splits = box_ceil_div(boxes, plan.boxes_of_split > 0 ? plan.boxes_of_split : 1);
}

inline DepthwiseTilesPlan plan_depthwise_tiles(const BackwardParams& p, const Strides& du_strides, bool sums,
                                               const DeviceLimits& device) {
  const Geometry& g = p.geom;
  DepthwiseTilesPlan plan{};
  if (p.dtype == DType::f64 || p.x_layout != Layout::nhwc) return plan;
  const int64_t element = p.dtype == DType::f32 ? 4 : 2, channels = kChunkBytes / element;
  const int64_t taps = tap_count(g);
  if (taps > kMostStagedTaps) return plan;
  plan.chunks = static_cast<int32_t>(box_ceil_div(g.c_mid, channels));
  // Two blocks share a multiprocessor.
  const int64_t most = device.shared_per_multiprocessor / 2 - device.shared_reserved;
  const int64_t warps = kBlockThreads / 32, warp_sum = 4 * warps * channels;  // a sum of each warp, in bytes
  const auto shared_of = [&](const PixelBox& box, int64_t sum_bytes, int64_t stages = 1) {
    DepthwiseTilesShared s{};
    int64_t at = stages * box.stage_bytes;
    const auto take = [&](int64_t bytes) {
      const int64_t begin = at;
      at += box_round_up(bytes, 16);
      return static_cast<int32_t>(begin);
    };
    s.taps = take(kChunkBytes * (taps + 1));
    s.tables.spans = take(8 * int64_t{box.spans});
    s.tables.strips = take(8 * kTilePixels / kPatchPixels);
    s.tables.offsets = take(8 * kTilePixels);
    s.sums = take(sum_bytes);
    s.bytes = static_cast<int32_t>(at);
    return s;
  };
  if (p.grad_x != nullptr && p.grad_x_layout == Layout::nhwc && g.multiplier == 1 && have_cells(g)) {
    plan.cells = cells_of(g);
    const BoxSource source{nullptr, du_strides, Layout::nhwc, element};
    if (sums && makes_both(p)) {
      // Two stages and the tables.
      plan.cell_box = plan_box(plan.cells, source, kTilePixels, most * 2 / 5);
      plan.cell_shared = shared_of(plan.cell_box, 0, 2);
      // The sums of the taps are added up where du lay.
      const int64_t bytes = plan.cell_shared.bytes > taps * warp_sum ? plan.cell_shared.bytes : taps * warp_sum;
      plan.cell_shared.sums = 0;
      plan.cell_shared.bytes = static_cast<int32_t>(bytes);
      plan.both = plan.cell_box.staged && !plan.cell_box.flat && plan.cell_shared.bytes <= most;
    }
    if (plan.both) {
      const auto aligned = [&](const void* tensor, const Strides& strides) {
        return box_copy_bytes(g, {tensor, strides, Layout::nhwc, element}) >= 4;
      };
      plan.x_aligned = aligned(p.x, p.x_strides);
      plan.grad_x_aligned = aligned(p.grad_x, p.grad_x_strides);
      plan.grad_x = plan.sums = true;
      split_boxes(plan, plan.cell_box.tiles, device);
      return plan;
    }
    plan.cell_box = plan_box(plan.cells, source, kTilePixels, most / 2);
    plan.cell_shared = shared_of(plan.cell_box, 0);
    plan.grad_x = plan.cell_box.staged && plan.cell_shared.bytes <= most;
  }
  if (sums) {
    plan.sum_box = plan_box(g, {p.x, p.x_strides, Layout::nhwc, element}, kTilePixels, most / 2);
    plan.sum_shared = shared_of(plan.sum_box, warp_sum * (unrolled_sums(g) != 0 && !plan.sum_box.flat ? 1 : taps + 1));
    plan.sums = plan.sum_box.staged && plan.sum_shared.bytes <= most;
    split_boxes(plan, plan.sum_box.tiles, device);
  }
  return plan;
}

}  // namespace dsconv
