// Backward, stage D, where channels are adjacent in memory: the formulas of backward_depthwise.cuh, all of them in one
// kernel, for 3x3 kernels at stride 1 or 2 and Half, BFloat16 and float. Sums in fp32.
//
//   du --cp.async--> a box of cells (depthwise_tiles_plan.h) and its halo, one chunk of channels, in shared memory
//   x  ------------> registers, of the thread that makes grad_x of the same pixels
//
//   grad_x[pixel]       = sum over taps of dw_weight[tap] * du[pixel's window at tap]
//   grad_dw_weight[tap] = sum over pixels of x[pixel] * du[pixel's window at tap]
//
// The weight gradient is summed over the pixels of x, not over those of du: a pixel of x meets the same values of du in
// either sum, so what a thread has read of du serves both, and x has no halo. grad_dw_bias is the sum of du over the
// cells, each pixel of du being one's.
//
// A block is a chunk and the boxes of one split; a half warp is the 64 bytes of channels of a patch of 2 x 4 cells. At
// stride 2 the four rows of x of a patch come one after the other, so that a thread has eight pixels of x and of grad_x
// at a time. While a box is computed, du of the next one goes to the other half of the stage, and x of the next eight
// pixels to registers. The sums of the taps are in registers from the first box to the last. At the end the warps are
// added: always the same tree. One partial sum a split, see reduce.cuh.
//
// Global traffic: du once with the halo of the boxes, x once, grad_x once. Shared memory as planned.
#pragma once

#include "cuda_plan.h"
#include "depthwise_patches.cuh"
#include "launch_blocks.cuh"

namespace dsconv {

// 2 x 4 cells of a box, and the pixels of x that belong to them.
struct CellPatch {
  int32_t corner = -1;  // byte in the staged box of the first of du that a cell takes; -1: no cell exists
  unsigned there = 0;   // a bit for each value of du that the cells take, row by row: whether it is one of du
  Pixel first = {};     // of x; its row or column may be before the first one
};

// What a 3x3 kernel takes of du around the cells of a patch, and which of it a pass of eight pixels of x meets.
template <int kStride>
struct PatchWindow {
  static constexpr int kKernel = 3;
  static constexpr int kReach = (kKernel - 1 + kStride - 1) / kStride + 1;  // a cell's, in either direction
  static constexpr int kRows = 1 + kReach, kColumns = 3 + kReach;
  static constexpr int kPasses = kStride * kStride;
  static constexpr int kPassColumns = 4 * kStride, kPassRows = kPatchPixels / kPassColumns;  // of x

  DSCONV_DEVICE static int row_of(int pass, int i) { return pass * kPassRows + i / kPassColumns; }
  DSCONV_DEVICE static int column_of(int i) { return i % kPassColumns; }

  // The tap by which a pixel of x and a value of du meet, in one direction; -1: none.
  DSCONV_DEVICE static int tap(int pixel, int value) {
    const int at = value - pixel / kStride, tap = pixel % kStride + kStride * (kReach - 1 - at);
    return at < 0 || at >= kReach || tap >= kKernel ? -1 : tap;
  }
  DSCONV_DEVICE static bool meets(int pass, int row) {
    return tap(row_of(pass, 0), row) >= 0 || tap(row_of(pass, kPatchPixels - 1), row) >= 0;
  }
};

// Where a patch is in every box: `corner` as of CellPatch, or -1.
struct alignas(8) PatchInBox {
  int32_t corner;
  uint32_t place;  // its first cell, slice << 16 | row << 8 | column

  // `strips` for the box at the origin: a patch that no image has there is in no box.
  DSCONV_DEVICE static PatchInBox of(const PixelBox& box, const StripPlace& strip) {
    const unsigned slot = static_cast<unsigned>(strip.slot), line = slot / static_cast<unsigned>(box.w);
    const unsigned slice = line / static_cast<unsigned>(box.h);
    return {strip.corner, slice << 16 | (line - slice * static_cast<unsigned>(box.h)) << 8 |
                              (slot - line * static_cast<unsigned>(box.w))};
  }
};
static_assert(kTilePixels < 256);

template <int kStride>
DSCONV_DEVICE CellPatch cell_patch(const Geometry& g, const Geometry& cells, const BoxPlace& place,
                                   const PatchInBox& in_box) {
  using Window = PatchWindow<kStride>;
  const Slice slice = place.slice_at(static_cast<int>(in_box.place >> 16), cells);
  const Pixel cell = {slice.n, slice.depth, place.row + static_cast<int32_t>(in_box.place >> 8 & 255),
                      place.column + static_cast<int32_t>(in_box.place & 255)};
  CellPatch patch;
  const bool exists =
      cell.n < g.n && cell.row < static_cast<int32_t>(cells.h_out) && cell.col < static_cast<int32_t>(cells.w_out);
  patch.corner = exists ? in_box.corner : -1;
  patch.first = {cell.n, cell.depth, cell.row * kStride - static_cast<int32_t>(g.pad_top) % kStride,
                 cell.col * kStride - static_cast<int32_t>(g.pad_left) % kStride};
  const int32_t row = cell.row - static_cast<int32_t>(cells.pad_top);
  const int32_t column = cell.col - static_cast<int32_t>(cells.pad_left);
  unsigned columns = 0;
#pragma unroll
  for (int i = 0; i < Window::kColumns; ++i) {
    columns |= inside(column + i, static_cast<int32_t>(cells.w_in)) ? 1u << i : 0u;
  }
#pragma unroll
  for (int i = 0; i < Window::kRows; ++i) {
    patch.there |= inside(row + i, static_cast<int32_t>(cells.h_in)) ? columns << i * Window::kColumns : 0u;
  }
  return patch;
}

// Calls f(i, at) for the pixels of a pass that a tensor of the size of x has, `at` being the first of kUnit channels; f
// has `whole` as a constant.
template <int kStride, typename T, typename F>
DSCONV_DEVICE void for_pass_pixels(const Geometry& g, const CellPatch& patch, int pass, T* tensor,
                                   const Strides& strides, bool whole, const F& f) {
  using Window = PatchWindow<kStride>;
  const auto for_all = [&](auto constant) {
    T* first = tensor + pixel_offset(patch.first, strides) + Window::row_of(pass, 0) * strides.h;
#pragma unroll
    for (int r = 0; r < Window::kPassRows; ++r) {
      const bool row_exists = inside(patch.first.row + Window::row_of(pass, 0) + r, static_cast<int32_t>(g.h_in));
      T* at = first;
#pragma unroll
      for (int column = 0; column < Window::kPassColumns; ++column) {
        const bool exists = row_exists & inside(patch.first.col + column, static_cast<int32_t>(g.w_in));
        if (exists) f(r * Window::kPassColumns + column, at, constant);
        at += strides.w;
      }
      first += strides.h;
    }
  };
  if (whole) {
    for_all(std::true_type{});
  } else {
    for_all(std::false_type{});
  }
}

// bias_partial may be null.
template <typename T, int kStride>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2)
    depthwise_tile_kernel(BackwardParams p, DepthwiseTilesPlan plan, const T* du, Strides du_strides,
                          float* weight_partial, float* bias_partial) {
  using Window = PatchWindow<kStride>;
  constexpr int kUnit = kPatchUnit<T>, kTaps = Window::kKernel * Window::kKernel, kChunk = kChunkChannels<T>;
  DSCONV_DYNAMIC_SHARED(unsigned char, shared);
  const Geometry& g = p.geom;
  const Geometry& cells = plan.cells;
  const PixelBox& box = plan.cell_box;
  Span* spans = reinterpret_cast<Span*>(shared + plan.cell_shared.tables.spans);
  StripPlace* strips = reinterpret_cast<StripPlace*>(shared + plan.cell_shared.tables.strips);
  PatchInBox* patches = reinterpret_cast<PatchInBox*>(shared + plan.cell_shared.tables.offsets);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t split = blockIdx.x / static_cast<unsigned>(plan.chunks);
  const int32_t c0 = static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(plan.chunks)) * kChunk;
  // This thread's channels of the chunk, from the first one on: made anew in each place, for want of registers.
  const auto first_channel = [] { return thread_here() % 16 * kUnit; };
  const DepthwiseInput<T> in{du, nullptr, nullptr, cells, du_strides, Layout::nhwc, Activation::identity};
  const int64_t first_box = split * plan.boxes_of_split, left = box.tiles - first_box;
  const int32_t boxes = static_cast<int32_t>(left < plan.boxes_of_split ? left : plan.boxes_of_split);
  // From a patch's corner to du of its first cell.
  const int32_t middle =
      static_cast<int32_t>(cells.pad_top) * box.row_pitch + static_cast<int32_t>(cells.pad_left) * box.column_pitch;

  fill_strips<true, kTilePixels>(box, BoxPlace{}, cells, static_cast<int>(sizeof(T)), strips);
  __syncthreads();
  if (thread < kTilePixels / kPatchPixels) patches[thread] = PatchInBox::of(box, strips[thread]);

  // Begins to copy du of box b, and tells which patch of it is this thread's. The spans are written again only behind
  // the barrier that the caller puts.
  const auto begin = [&](int32_t b) {
    const BoxPlace place = box_place(box, cells, first_box + b);
    fill_spans<true>(box, place, cells, du_strides, static_cast<int>(sizeof(T)), spans);
    __syncthreads();  // and the box before the last one has been read
    stage_x<T, true>(box, in, du + place.n * du_strides.n, c0, spans, shared + b % 2 * box.stage_bytes);
    cp_async_commit();
    return cell_patch<kStride>(g, cells, place, patches[thread_here() / 16]);
  };
  // The pixels of x of a pass.
  const auto load = [&](const CellPatch& patch, int pass, Vec<T, kUnit>(&x)[kPatchPixels]) {
#pragma unroll
    for (int i = 0; i < kPatchPixels; ++i) x[i] = {};
    if (patch.corner < 0) return;
    const int32_t c = c0 + first_channel(), channels = static_cast<int32_t>(g.c_mid) - c;
    const T* from = static_cast<const T*>(p.x) + c;
    for_pass_pixels<kStride>(
        g, patch, pass, from, p.x_strides, plan.x_aligned && channels >= kUnit,
        [&](int i, const T* at, auto whole) { x[i] = load_channels<T, kUnit>(at, channels, decltype(whole)::value); });
  };

  T* taps = reinterpret_cast<T*>(shared + plan.cell_shared.taps);
  stage_weights(static_cast<const T*>(p.dw_weight), g, c0, taps);  // with du of the first box
  CellPatch patch;
  Vec<T, kUnit> ahead[kPatchPixels] = {};
  float sums[kTaps * kUnit] = {}, bias[kUnit] = {};
  // One turn ahead of the first box, which only begins to load it.
#pragma unroll 1
  for (int32_t b = -1; b < boxes; ++b) {
    CellPatch next;
    if (b + 1 < boxes) {
      next = begin(b + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    float weight[kTaps][kUnit] = {};
#pragma unroll
    for (int i = 0; i < kTaps; ++i) {
      if (patch.corner < 0) continue;  // ahead of the first box the taps are not there yet
      // By words: an odd number of them a thread, so that the lanes' are in different banks.
      const Vec<T, kUnit> word = reinterpret_cast<const Vec<T, kUnit>*>(taps + first_channel() * kTaps)[i];
#pragma unroll
      for (int u = 0; u < kUnit; ++u) weight[(i * kUnit + u) % kTaps][(i * kUnit + u) / kTaps] = to_acc(word.v[u]);
    }
    const int k = first_channel();
    const unsigned char* window = shared + (b & 1) * box.stage_bytes + patch.corner + k * static_cast<int>(sizeof(T));
#pragma unroll
    for (int pass = 0; pass < Window::kPasses; ++pass) {
      float x[kPatchPixels][kUnit], grad[kPatchPixels * kUnit] = {};
#pragma unroll
      for (int i = 0; i < kPatchPixels * kUnit; ++i) x[i / kUnit][i % kUnit] = to_acc(ahead[i / kUnit].v[i % kUnit]);
      const bool last = pass + 1 == Window::kPasses;
      load(last ? next : patch, last ? 0 : pass + 1, ahead);
      if (patch.corner < 0) continue;
#pragma unroll
      for (int row = 0; row < Window::kRows; ++row) {
        if (!Window::meets(pass, row)) continue;
#pragma unroll
        for (int column = 0; column < Window::kColumns; ++column) {
          float value[kUnit];
          load_unit<T, kUnit>(window + row * box.row_pitch + column * kChunkBytes, value);
          // What is not there is staged as zero, and its product with x is left out: x may be infinite there.
          const bool exists = (patch.there >> (row * Window::kColumns + column) & 1) != 0;
#pragma unroll
          for (int i = 0; i < kPatchPixels; ++i) {
            const int kh = Window::tap(Window::row_of(pass, i), row), kw = Window::tap(Window::column_of(i), column);
            if (kh < 0 || kw < 0) continue;
            const int tap = kh * Window::kKernel + kw;
#pragma unroll
            for (int u = 0; u < kUnit; ++u) {
              grad[i * kUnit + u] = fused_multiply_add(value[u], weight[tap][u], grad[i * kUnit + u]);
              float& sum = sums[tap * kUnit + u];
              if (exists) sum = fused_multiply_add(value[u], x[i][u], sum);
            }
          }
        }
      }
      const int32_t c = c0 + first_channel(), channels = static_cast<int32_t>(g.c_mid) - c;
      for_pass_pixels<kStride>(g, patch, pass, static_cast<T*>(p.grad_x) + c, p.grad_x_strides,
                               plan.grad_x_aligned && channels >= kUnit, [&](int i, T* at, auto whole) {
                                 store_channels<T, kUnit>(at, grad + i * kUnit, channels, decltype(whole)::value);
                               });
    }
    if (bias_partial != nullptr && patch.corner >= 0) {
#pragma unroll
      for (int i = 0; i < kPatchPixels; ++i) {
        float value[kUnit];
        load_unit<T, kUnit>(window + middle + i / 4 * box.row_pitch + i % 4 * kChunkBytes, value);
#pragma unroll
        for (int u = 0; u < kUnit; ++u) bias[u] += value[u];
      }
    }
    patch = next;
  }

  float* scratch = reinterpret_cast<float*>(shared + plan.cell_shared.sums);
  const int32_t chunk_channels = static_cast<int32_t>(g.c_mid) - c0;
  const int64_t first = split * g.c_mid + c0;
  write_block_sums<T, kTaps, kTaps>(sums, scratch, chunk_channels, weight_partial + first * kTaps);
  if (bias_partial != nullptr) write_block_sums<T, 1, 1>(bias, scratch, chunk_channels, bias_partial + first);
}

// ------------------------------------------------------------------------------------------------------------ launcher

template <typename T>
LaunchStatus launch_depthwise_tiles(const BackwardParams& p, const DepthwiseTilesPlan& plan, const T* du,
                                    const Strides& du_strides, float* weight, float* bias, cudaStream_t stream) {
  const auto run = [&](auto kernel) {
    return launch_blocks("depthwise_tile", kernel, plan.splits * plan.chunks,
                         static_cast<size_t>(plan.cell_shared.bytes), stream, p, plan, du, du_strides, weight, bias);
  };
  return p.geom.stride_h == 1 ? run(depthwise_tile_kernel<T, 1>) : run(depthwise_tile_kernel<T, 2>);
}

}  // namespace dsconv
