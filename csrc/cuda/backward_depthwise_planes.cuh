// Backward, stage D, where columns are adjacent in memory: the formulas of backward_depthwise.cuh in one kernel, from
// boxes in shared memory (depthwise_planes_plan.h), for Half, BFloat16 and float. Sums in fp32.
//
//   du --cp.async--> a box of cells and its halo, kPlaneChannels channels
//   x  --cp.async--> the pixels of these cells, as they lie in memory
//
//   a lane has a strip of four cells at a time, of the channel of its warp: each value of du that it reads is a factor
//   of grad_x and, with x, of grad_dw_weight
//
//   grad_x takes the place of x in shared memory, and goes to global memory 16 bytes at a time
//
// A block is a chunk of channels and the boxes of one split. Square kernels of 3 and 5 at stride 1 and 2 have their
// taps and the taps' sums in registers from the first box to the last; others go by four taps of a row or column at a
// time, whose sums are added up in shared memory. Lanes are added by shuffles: always the same tree. One partial sum a
// split, see reduce.cuh.
//
// Global traffic: du once with the halo of the boxes, x once, grad_x once. Shared memory as planned.
#pragma once

#include "box_staging.cuh"
#include "cell_sums.cuh"
#include "cuda_plan.h"
#include "launch_blocks.cuh"
#include "reduce.cuh"

namespace dsconv {

// kKernel, kStride: 3 or 5, 1 or 2, dilation 1, without a depth; kKernel 0: any. weight_partial [splits][c_mid][taps],
// bias_partial [splits][c_mid]; either may be null.
template <typename T, int kKernel, int kStride>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2)
    depthwise_planes_kernel(BackwardParams p, DepthwisePlanesPlan plan, const T* du, Strides du_strides,
                            float* weight_partial, float* bias_partial) {
  constexpr int kElement = static_cast<int>(sizeof(T)), kTaps = kKernel > 0 ? kKernel * kKernel : 1;
  DSCONV_DYNAMIC_SHARED(unsigned char, shared);
  const Geometry& g = p.geom;
  const Geometry& cells = plan.cells;
  const PixelBox& box = plan.box;
  Span* spans = reinterpret_cast<Span*>(shared + plan.spans);
  CellStrip* strips = reinterpret_cast<CellStrip*>(shared + plan.strips_at);
  PlaneLine* lines = reinterpret_cast<PlaneLine*>(shared + plan.lines_at);
  T* taps = reinterpret_cast<T*>(shared + plan.taps);
  const int lane = thread_here() % 32, warp = thread_here() / 32;
  const int64_t split = blockIdx.x / static_cast<unsigned>(plan.chunks);
  const int32_t c0 = static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(plan.chunks)) * kPlaneChannels;
  const bool there = c0 + warp < g.c_mid, sums = weight_partial != nullptr;
  const int32_t tap_total = static_cast<int32_t>(tap_count(g));
  const int32_t left = static_cast<int32_t>(g.c_mid) - c0, channels = left < kPlaneChannels ? left : kPlaneChannels;
  stage_run(static_cast<const T*>(p.dw_weight) + int64_t{c0} * tap_total, channels * tap_total,
            kPlaneChannels * tap_total, taps);
  cp_async_commit();
  cp_async_wait<0>();
  float* looped_sums = reinterpret_cast<float*>(shared + plan.sums_at) + warp * tap_total;
  if constexpr (kKernel == 0) {
#pragma unroll 1
    for (int i = lane; i < tap_total; i += 32) looped_sums[i] = 0;
  }
  __syncthreads();
  [[maybe_unused]] float own_taps[kTaps] = {}, own_sums[kTaps] = {};
  if constexpr (kKernel > 0) {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) own_taps[tap] = to_acc(taps[warp * kTaps + tap]);
  }

  const DepthwiseInput<T> in{du, nullptr, nullptr, cells, du_strides, Layout::nchw, Activation::identity};
  const int64_t first_box = split * plan.boxes_of_split, boxes_left = box.tiles - first_box;
  const int32_t boxes = static_cast<int32_t>(boxes_left < plan.boxes_of_split ? boxes_left : plan.boxes_of_split);
  // From a strip's corner to du of its first cell.
  const int32_t middle = static_cast<int32_t>(cells.pad_front) / static_cast<int32_t>(g.dilation_d) * box.plane_pitch +
                         static_cast<int32_t>(cells.pad_top) * box.row_pitch +
                         static_cast<int32_t>(cells.pad_left) * box.column_pitch;
  float bias = 0;
#pragma unroll 1
  for (int32_t b = 0; b < boxes; ++b) {
    const BoxPlace place = box_place(box, cells, first_box + b);
    const PlaneTile<T> tile{g, plan, place, c0, reinterpret_cast<T*>(shared + plan.tile), lines};
    __syncthreads();  // the box before has been read
    fill_spans<false>(box, place, cells, du_strides, kElement, spans, kPlaneChannels);
    fill_cell_strips(plan, place, kElement, strips);
    tile.fill_lines();
    __syncthreads();
    if (box.run_bytes > 0) {
      stage_runs<T, kPlaneChannels>(box, in, place, c0, shared);
    } else {
      stage_x<T, false, kPlaneChannels>(box, in, du + place.n * du_strides.n, c0, spans, shared);
    }
    if (plan.x_staged && sums) tile.load(static_cast<const T*>(p.x));
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    if (box.run_bytes > 0) {
      spread_runs<T, kPlaneChannels>(box, in, place, c0, spans, shared);
      __syncthreads();
    }
    if (there) {
      const unsigned char* own = shared + warp * box.channel_pitch;
      const auto pixels = StripPixels<T>::of(tile, static_cast<const T*>(p.x), p.x_strides, warp);
      if constexpr (kKernel > 0) {
        unrolled_cells<T, kKernel, kStride>(plan, pixels, sums, strips, own, own_taps, own_sums);
      } else {
        looped_cells<T>(plan, pixels, sums, strips, own, taps + warp * tap_total, looped_sums);
      }
      if (bias_partial != nullptr) {
        const int32_t step = box.strips_down ? box.row_pitch : box.column_pitch;
#pragma unroll 1
        for (int i = lane; i < plan.strips; i += 32) {
          if (strips[i].corner < 0) continue;
          const unsigned char* at = own + strips[i].corner + middle;
#pragma unroll
          for (int cell = 0; cell < kStripPixels; ++cell) bias += to_acc(*reinterpret_cast<const T*>(at + cell * step));
        }
      }
    }
    if (plan.grad_x) {
      __syncthreads();
      tile.store(static_cast<T*>(p.grad_x));
    }
  }

  if (sums) {
    float* to = weight_partial + (split * g.c_mid + c0 + warp) * tap_total;
    if constexpr (kKernel > 0) {
      float mine = 0;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const float sum = sum_over_warp(own_sums[tap]);
        if (lane == tap) mine = sum;
      }
      if (there && lane < kTaps) to[lane] = mine;
    } else {
      __syncwarp();
      if (there) {
#pragma unroll 1
        for (int i = lane; i < tap_total; i += 32) to[i] = looped_sums[i];
      }
    }
  }
  if (bias_partial != nullptr) {
    const float sum = sum_over_warp(bias);
    if (there && lane == 0) bias_partial[split * g.c_mid + c0 + warp] = sum;
  }
}

// ------------------------------------------------------------------------------------------------------------ launcher

// Whether the kernel's taps are unrolled; 0 where they are not.
constexpr int unrolled_planes(const DepthwisePlanesPlan& plan, const Geometry& g) {
  return plan.box.strips_down && g.stride_d == 1 ? unrolled_sums(g) : 0;
}

template <typename T>
LaunchStatus launch_depthwise_planes(const BackwardParams& p, const DepthwisePlanesPlan& plan, const T* du,
                                     const Strides& du_strides, float* weight, float* bias, cudaStream_t stream) {
  const auto run = [&](auto kernel, auto stride) {
    return launch_blocks(
        "depthwise_planes", depthwise_planes_kernel<T, decltype(kernel)::value, decltype(stride)::value>,
        plan.splits * plan.chunks, static_cast<size_t>(plan.bytes), stream, p, plan, du, du_strides, weight, bias);
  };
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  using Three = std::integral_constant<int, 3>;
  using Five = std::integral_constant<int, 5>;
  const int known = unrolled_planes(plan, p.geom);
  const bool one = p.geom.stride_h == 1;
  if (known == 3) return one ? run(Three{}, One{}) : run(Three{}, Two{});
  if (known == 5) return one ? run(Five{}, One{}) : run(Five{}, Two{});
  return run(std::integral_constant<int, 0>{}, One{});
}

}  // namespace dsconv
