// Backward, stage D, where channels are adjacent in memory: the formulas of backward_depthwise.cuh from tiles in shared
// memory, for Half, BFloat16 and float. Sums in fp32. Two kernels, which backward_depthwise_both_tiles.cuh takes the
// place of where it can make both results.
//
//   du or x --cp.async--> a box and its halo, one chunk of channels --> patches of 8 pixels in registers
//
// A half warp is the 64 bytes of channels of one patch (box_input.cuh); each value is read from shared memory once for
// all pixels of the patch and all taps that it meets.
//
// grad_x_tile kernel: a block is a box of cells (depthwise_tiles_plan.h) and a chunk. For each of the s x s pixels of a
//   cell the patch sums its taps, reversed, over du, and writes 64 bytes of grad_x a pixel.
//
// depthwise_sum_tile kernel: a block is a chunk and the boxes of one split. du of a patch is in registers, straight
// from
//   global memory: every value has one reader. Square kernels of 3 and 5 keep their taps' sums in registers to the end,
//   others add them up over the warp, one tap at a time, in shared memory. At the end the warps are added: always the
//   same tree. One partial sum a split, see reduce.cuh.
//
// Global traffic: grad_x reads du once with the halo of the boxes and writes grad_x once; the sums read du once, x once
// with its halo. Shared memory as planned.
#pragma once

#include "cuda_plan.h"
#include "depthwise_patches.cuh"
#include "launch_blocks.cuh"

namespace dsconv {

// kKernel: 3 or 5 at stride and dilation 1; 0: any.
template <typename T, int kKernel>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2)
    grad_x_tile_kernel(BackwardParams p, DepthwiseTilesPlan plan, const T* du, Strides du_strides) {
  constexpr int kUnit = kPatchUnit<T>;
  DSCONV_DYNAMIC_SHARED(unsigned char, shared);
  const Geometry& cells = plan.cells;
  const PixelBox& box = plan.cell_box;
  Span* spans = reinterpret_cast<Span*>(shared + plan.cell_shared.tables.spans);
  StripPlace* strips = reinterpret_cast<StripPlace*>(shared + plan.cell_shared.tables.strips);
  T* taps = reinterpret_cast<T*>(shared + plan.cell_shared.taps);
  const BoxPlace place = box_place(box, cells, blockIdx.x / static_cast<unsigned>(plan.chunks));
  const int32_t c0 = static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(plan.chunks)) * kChunkChannels<T>;
  const DepthwiseInput<T> in{du, nullptr, nullptr, cells, du_strides, Layout::nhwc, Activation::identity};
  fill_spans<true>(box, place, cells, du_strides, static_cast<int>(sizeof(T)), spans);
  fill_strips<true, kTilePixels>(box, place, cells, static_cast<int>(sizeof(T)), strips);
  stage_weights(static_cast<const T*>(p.dw_weight), p.geom, c0, taps);
  __syncthreads();
  stage_x<T, true>(box, in, du + place.n * du_strides.n, c0, spans, shared);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  const int thread = static_cast<int>(threadIdx.x), k = thread % 16 * kUnit;
  const StripPlace strip = strips[thread / 16];
  if (strip.corner < 0) return;
  const Geometry& g = p.geom;
  const int32_t kernel_d = static_cast<int32_t>(g.kernel_d);
  const int32_t kernel_h = static_cast<int32_t>(g.kernel_h), kernel_w = static_cast<int32_t>(g.kernel_w);
  const int32_t stride_d = static_cast<int32_t>(g.stride_d);
  const int32_t stride_h = static_cast<int32_t>(g.stride_h), stride_w = static_cast<int32_t>(g.stride_w);
  const int32_t phase_d = static_cast<int32_t>(g.pad_front) % stride_d;
  const int32_t phase_h = static_cast<int32_t>(g.pad_top) % stride_h;
  const int32_t phase_w = static_cast<int32_t>(g.pad_left) % stride_w;
  const int32_t far_h = static_cast<int32_t>(cells.kernel_h) - 1, far_w = static_cast<int32_t>(cells.kernel_w) - 1;
  const int32_t dilation_h = static_cast<int32_t>(g.dilation_h), dilation_w = static_cast<int32_t>(g.dilation_w);
  const T* weight = taps + k * kernel_h * kernel_w;
  const unsigned char* x = shared + strip.corner + k * static_cast<int>(sizeof(T));
  const int32_t run_pitch = box.flat ? 4 * kChunkBytes : box.row_pitch;
  const int32_t channels = static_cast<int32_t>(g.c_mid) - c0 - k;
  // The pixels of a cell: (pd, ph, pw), numbered.
#pragma unroll 1
  for (int32_t phase = 0; phase < stride_d * stride_h * stride_w; ++phase) {
    const int32_t line = phase / stride_w, pw = phase - line * stride_w;
    const int32_t pd = line / stride_h, ph = line - pd * stride_h;
    float z[kPatchPixels * kUnit] = {};
    // Tap a of the cell's kernel is ph + stride_h * (far_h - a) of dw_weight, where that is one; the same in the other
    // directions. Outermost the taps of the depth, each on a plane of du.
    const int32_t taps_d = pd < kernel_d ? (kernel_d - 1 - pd) / stride_d + 1 : 0;
    const int32_t first_d = static_cast<int32_t>(cells.kernel_d) - taps_d;
#pragma unroll 1
    for (int32_t a = 0; a < taps_d; ++a) {
      const unsigned char* plane = x + (first_d + a) * box.plane_pitch;
      const int32_t kd = pd + stride_d * (taps_d - 1 - a);
      const T* plane_weight = weight + kd * kChunkChannels<T> * kernel_h * kernel_w;
      if constexpr (kKernel > 0) {
        unrolled_patch<T, kUnit, kKernel, 1, true>(plane, box.row_pitch, plane_weight, z);
      } else if (ph < kernel_h && pw < kernel_w) {
        const int32_t taps_h = (kernel_h - 1 - ph) / stride_h + 1, taps_w = (kernel_w - 1 - pw) / stride_w + 1;
        const int32_t first_h = far_h + 1 - taps_h, first_w = far_w + 1 - taps_w;
        const StripSteps steps = {
            taps_w, taps_h, 1, dilation_w, kChunkBytes, dilation_h * box.row_pitch, -stride_w, -stride_h * kernel_w, 0};
        looped_item<T, kUnit, 2>(
            plane + first_h * dilation_h * box.row_pitch + first_w * dilation_w * kChunkBytes, run_pitch,
            plane_weight + (ph + stride_h * (taps_h - 1)) * kernel_w + pw + stride_w * (taps_w - 1),
            kernel_h * kernel_w, steps, z);
      }
    }
#pragma unroll
    for (int i = 0; i < kPatchPixels; ++i) {
      const Pixel cell = pixel_of_slot(box, place, cells, strip.template slot_of<true>(i));
      const Pixel to = {cell.n, cell.depth * stride_d - phase_d + pd, cell.row * stride_h - phase_h + ph,
                        cell.col * stride_w - phase_w + pw};
      if (cell.n >= 0 && inside(to.depth, static_cast<int32_t>(g.d_in)) &&
          inside(to.row, static_cast<int32_t>(g.h_in)) && inside(to.col, static_cast<int32_t>(g.w_in))) {
        T* at = static_cast<T*>(p.grad_x) + pixel_offset(to, p.grad_x_strides) + c0 + k;
        store_channels<T, kUnit>(at, z + i * kUnit, channels, is_whole<T, kUnit>(at, channels));
      }
    }
  }
}

// kKernel, kStride: 3 or 5, 1 or 2, dilation 1; kKernel 0: any. weight_partial [splits][c_mid][taps], bias_partial
// [splits][c_mid]; either may be null.
template <typename T, int kKernel, int kStride>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2)
    depthwise_sum_tile_kernel(BackwardParams p, DepthwiseTilesPlan plan, const T* du, Strides du_strides,
                              float* weight_partial, float* bias_partial) {
  constexpr int kUnit = kPatchUnit<T>, kTaps = kKernel * kKernel, kWarpCount = kBlockThreads / 32;
  constexpr int kChunk = kChunkChannels<T>;
  DSCONV_DYNAMIC_SHARED(unsigned char, shared);
  const Geometry& g = p.geom;
  const PixelBox& box = plan.sum_box;
  Span* spans = reinterpret_cast<Span*>(shared + plan.sum_shared.tables.spans);
  StripPlace* strips = reinterpret_cast<StripPlace*>(shared + plan.sum_shared.tables.strips);
  const SlotOffsets offsets{reinterpret_cast<int64_t*>(shared + plan.sum_shared.tables.offsets)};
  float* scratch = reinterpret_cast<float*>(shared + plan.sum_shared.sums);  // [warp][sum][channel]
  const int64_t split = blockIdx.x / static_cast<unsigned>(plan.chunks);
  const int32_t c0 = static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(plan.chunks)) * kChunk;
  const int32_t taps = static_cast<int32_t>(tap_count(g)), kernel_h = static_cast<int32_t>(g.kernel_h);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32, k = lane % 16 * kUnit;
  const int32_t channels = static_cast<int32_t>(g.c_mid) - c0 - k;
  const DepthwiseInput<T> in{static_cast<const T*>(p.x), nullptr, nullptr, g, p.x_strides, Layout::nhwc,
                             Activation::identity};
  const int64_t first_box = split * plan.boxes_of_split, left = box.tiles - first_box;
  const int32_t boxes = static_cast<int32_t>(left < plan.boxes_of_split ? left : plan.boxes_of_split);
  const int32_t run_pitch =
      box.flat ? 4 * static_cast<int32_t>(g.stride_w) * kChunkBytes : static_cast<int32_t>(g.stride_h) * box.row_pitch;
  const StripSteps steps = strip_steps(box, g);

  float sums[kKernel > 0 ? kTaps * kUnit : kUnit] = {}, bias[kUnit] = {};
  if constexpr (kKernel == 0) {
#pragma unroll 1
    for (int i = thread; i < kWarpCount * (taps + 1) * kChunk; i += kBlockThreads) scratch[i] = 0;
  }
#pragma unroll 1
  for (int32_t b = 0; b < boxes; ++b) {
    const BoxPlace place = box_place(box, g, first_box + b);
    __syncthreads();  // the box before has been read
    fill_spans<true>(box, place, g, p.x_strides, static_cast<int>(sizeof(T)), spans);
    fill_strips<true, kTilePixels>(box, place, g, static_cast<int>(sizeof(T)), strips);
    fill_offsets<kTilePixels>(box, place, g, du_strides, offsets);
    __syncthreads();
    stage_x<T, true>(box, in, in.x + place.n * p.x_strides.n, c0, spans, shared);
    cp_async_commit();

    const StripPlace strip = strips[thread / 16];
    float grad[kPatchPixels][kUnit] = {};
    unsigned there = 0;  // a bit a pixel: where there is none, x may be anything
    if (strip.corner >= 0) {
#pragma unroll
      for (int i = 0; i < kPatchPixels; ++i) {
        const int64_t at = offsets[strip.template slot_of<true>(i)];
        there |= at >= 0 ? 1u << i : 0u;
        if (at < 0) continue;
        const T* from = du + at + c0 + k;
        const Vec<T, kUnit> loaded = load_channels<T, kUnit>(from, channels, is_whole<T, kUnit>(from, channels));
#pragma unroll
        for (int u = 0; u < kUnit; ++u) {
          grad[i][u] = to_acc(loaded.v[u]);
          bias[u] += grad[i][u];
        }
      }
    }
    cp_async_wait<0>();
    __syncthreads();
    if (weight_partial == nullptr) continue;
    const unsigned char* x = shared + (strip.corner >= 0 ? strip.corner : 0) + k * static_cast<int>(sizeof(T));
    if constexpr (kKernel > 0) {
      if (strip.corner < 0) continue;
#pragma unroll
      for (int row = 0; row < kStride + kKernel; ++row, x += box.row_pitch) {
#pragma unroll
        for (int column = 0; column < 3 * kStride + kKernel; ++column) {
          float value[kUnit];
          load_unit<T, kUnit>(x + column * kChunkBytes, value);
#pragma unroll
          for (int i = 0; i < kPatchPixels; ++i) {
            const int kh = row - i / 4 * kStride, kw = column - i % 4 * kStride;
            if (kh < 0 || kh >= kKernel || kw < 0 || kw >= kKernel || (there >> i & 1) == 0) continue;
#pragma unroll
            for (int u = 0; u < kUnit; ++u) {
              float& sum = sums[(kh * kKernel + kw) * kUnit + u];
              sum = fused_multiply_add(value[u], grad[i][u], sum);
            }
          }
        }
      }
    } else {
      float* own = scratch + warp * (taps + 1) * kChunk + k;
#pragma unroll 1
      for (int32_t tap = 0; tap < taps; ++tap) {
        const int32_t line = tap / steps.taps_a, kw = tap - line * steps.taps_a;
        const int32_t kd = line / kernel_h, kh = line - kd * kernel_h;
        const unsigned char* at = x + kd * box.plane_pitch + kh * steps.pitch_b + kw * steps.dilation_a * steps.pitch_a;
        float sum[kUnit] = {};
#pragma unroll
        for (int i = 0; i < kPatchPixels; ++i) {
          float value[kUnit];
          load_unit<T, kUnit>(at + i / 4 * run_pitch + i % 4 * steps.stride_a * steps.pitch_a, value);
          if ((there >> i & 1) == 0) continue;
#pragma unroll
          for (int u = 0; u < kUnit; ++u) sum[u] = fused_multiply_add(value[u], grad[i][u], sum[u]);
        }
#pragma unroll
        for (int u = 0; u < kUnit; ++u) {
          sum[u] += __shfl_xor_sync(0xffffffffu, sum[u], 16);
          if (lane < 16) own[tap * kChunk + u] += sum[u];
        }
      }
    }
  }

  const int32_t chunk_channels = static_cast<int32_t>(g.c_mid) - c0;
  const int64_t first = split * g.c_mid + c0;
  if constexpr (kKernel > 0) {
    if (weight_partial != nullptr) {
      write_block_sums<T, kTaps, 1>(sums, scratch, chunk_channels, weight_partial + first * kTaps);
    }
  } else if (weight_partial != nullptr) {
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < taps * kChunk; i += kBlockThreads) {
      const int32_t tap = i / kChunk, channel = i % kChunk;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarpCount; ++w) sum += scratch[(w * (taps + 1) + tap) * kChunk + channel];
      if (channel < chunk_channels) weight_partial[(first + channel) * taps + tap] = sum;
    }
  }
  if (bias_partial != nullptr) write_block_sums<T, 1, 1>(bias, scratch, chunk_channels, bias_partial + first);
}

// ------------------------------------------------------------------------------------------------------------ launcher

template <typename T>
LaunchStatus launch_grad_x_tiles(const BackwardParams& p, const DepthwiseTilesPlan& plan, const T* du,
                                 const Strides& du_strides, cudaStream_t stream) {
  const Geometry& g = p.geom;
  const auto run = [&](auto kernel) {
    return launch_blocks("grad_x_tile", grad_x_tile_kernel<T, decltype(kernel)::value>,
                         plan.cell_box.tiles * plan.chunks, static_cast<size_t>(plan.cell_shared.bytes), stream, p,
                         plan, du, du_strides);
  };
  const bool single = g.stride_d == 1 && g.stride_h == 1 && !plan.cell_box.flat;
  const int known = single ? unrolled_plane(g) : 0;
  if (known == 3) return run(std::integral_constant<int, 3>{});
  if (known == 5) return run(std::integral_constant<int, 5>{});
  return run(std::integral_constant<int, 0>{});
}

template <typename T>
LaunchStatus launch_depthwise_sum_tiles(const BackwardParams& p, const DepthwiseTilesPlan& plan, const T* du,
                                        const Strides& du_strides, float* weight, float* bias, cudaStream_t stream) {
  const auto run = [&](auto kernel, auto stride) {
    return launch_blocks("depthwise_sum_tile",
                         depthwise_sum_tile_kernel<T, decltype(kernel)::value, decltype(stride)::value>,
                         plan.splits * plan.chunks, static_cast<size_t>(plan.sum_shared.bytes), stream, p, plan, du,
                         du_strides, weight, bias);
  };
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  const int known = plan.sum_box.flat ? 0 : unrolled_sums(p.geom);
  const bool one = p.geom.stride_h == 1;
  if (known == 3)
    return one ? run(std::integral_constant<int, 3>{}, One{}) : run(std::integral_constant<int, 3>{}, Two{});
  if (known == 5)
    return one ? run(std::integral_constant<int, 5>{}, One{}) : run(std::integral_constant<int, 5>{}, Two{});
  return run(std::integral_constant<int, 0>{}, One{});
}

}  // namespace dsconv
