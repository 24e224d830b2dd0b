// What stage D of backward will do where channels are adjacent in memory: boxes of pixels staged in shared memory
// (pixel_box.h), as the forward has them. Plain host C++; backward_depthwise_tiles.cuh does it.
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
  int32_t taps, sums, bytes;  // x or du is at 0
  BoxTables tables;
};

struct DepthwiseTilesPlan {
  bool grad_x, sums;  // whether these kernels run; else those of backward_depthwise.cuh
  int32_t chunks;     // of channels

  Geometry cells;  // du as the input, cells as the output
  PixelBox cell_box;
  DepthwiseTilesShared cell_shared;

  PixelBox sum_box;
  int64_t splits, boxes_of_split;
  DepthwiseTilesShared sum_shared;
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

// 3 or 5 for square kernels of that extent at stride 1 or 2, with or without a depth: their taps of a kd are unrolled.
constexpr int unrolled_plane(const Geometry& g) {
  const bool unrolled = g.kernel_h == g.kernel_w && g.stride_h == g.stride_w && g.stride_h <= 2 && g.dilation_h == 1 &&
                        g.dilation_w == 1 && (g.kernel_h == 3 || g.kernel_h == 5);
  return unrolled ? static_cast<int>(g.kernel_h) : 0;
}

// Those without a depth keep a partial sum a tap in registers; others one a warp in shared memory.
constexpr int unrolled_sums(const Geometry& g) { return g.kernel_d == 1 ? unrolled_plane(g) : 0; }

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
  const auto shared_of = [&](const PixelBox& box, int64_t sum_bytes) {
    DepthwiseTilesShared s{};
    int64_t at = box.stage_bytes;
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
    plan.cell_box = plan_box(plan.cells, {nullptr, du_strides, Layout::nhwc, element}, kTilePixels, most / 2);
    plan.cell_shared = shared_of(plan.cell_box, 0);
    plan.grad_x = plan.cell_box.staged && plan.cell_shared.bytes <= most;
  }
  if (sums) {
    plan.sum_box = plan_box(g, {p.x, p.x_strides, Layout::nhwc, element}, kTilePixels, most / 2);
    const int64_t warps = kBlockThreads / 32;
    plan.sum_shared =
        shared_of(plan.sum_box, 4 * warps * channels * (unrolled_sums(g) != 0 && !plan.sum_box.flat ? 1 : taps + 1));
    plan.sums = plan.sum_box.staged && plan.sum_shared.bytes <= most;
    const int64_t wanted = box_ceil_div(4 * device.multiprocessors, plan.chunks);
    const int64_t splits = wanted < plan.sum_box.tiles ? wanted : plan.sum_box.tiles;
    plan.boxes_of_split = box_ceil_div(plan.sum_box.tiles, splits > 0 ? splits : 1);
    plan.splits = box_ceil_div(plan.sum_box.tiles, plan.boxes_of_split > 0 ? plan.boxes_of_split : 1);
  }
  return plan;
}

}  // namespace dsconv
