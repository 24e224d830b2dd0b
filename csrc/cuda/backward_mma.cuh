// Backward, stage P, on tensor cores: the formulas of backward_pointwise.cuh for Half, BFloat16, and for float in TF32.
//
// du_mma kernel: a block of 8 warps owns a box of kPixels pixels x kMid mid channels and walks c_out in chunks:
//
//   dy chunk ----------- g [kPixels x 64 bytes] --------+
//                                                       +--ldmatrix--> mma.sync --> da in registers
//   pw_weight --cp.async--> [chunk of c_out][kMid] -----+
//
//   Both have two stages, filled a step ahead. At the end act'(z) of the box, a chunk of channels at a time
//   (box_input), goes over g, and da * act'(z) leaves as forward's outputs do. Where act is the identity x is not read.
//
// pointwise_sum_mma kernel (grad_pw_weight, grad_pw_bias): a block owns kOut output channels x kMid mid channels of one
// split of the boxes; the pixels of a box are what the product runs over:
//
//   g [kPixels x kOut]  .  act(z) [kPixels x kMid]  -->  accumulators over all boxes of the split --> one partial sum
//
//   Slots without a pixel are zero in both. Blocks of the first kMid tile also sum g, compensated. sum_partials adds
//   the partial sums in the order of the splits.
//
// Shared memory as planned (mma_plan.h). Registers: 128 at most, two blocks share a multiprocessor.
// Global traffic: du_mma reads dy (and saved) once a kMid tile, pw_weight once a box, x once, and writes du once;
// pointwise_sum_mma reads dy once a kMid tile and x once a kOut tile. Preconditions: those of forward.cuh.
#pragma once

#include "cuda_launch.h"
#include "launch_blocks.cuh"
#include "mma_tile_io.cuh"
#include "reduce.cuh"

namespace dsconv {

// ---------------------------------------------------------------------------------------------------------------- du

template <typename T_, bool kAlongC_>
struct DuMmaTraits {
  using T = T_;
  static constexpr bool kAlongC = kAlongC_;  // of x, and so of du
  static constexpr int kPixels = kBackwardPixels, kMid = kBackwardMid, kElement = static_cast<int>(sizeof(T));
  static constexpr int kWarpColumns = kMid / 32;
  static_assert(kPixels / 32 * kWarpColumns == kWarpsOfBlock, "the warps tile the block");
  using Input = BoxInput<T, kAlongC, kPixels>;
  using Warp = WarpTile<32, 32>;
  static constexpr int kWeightRowBytes = kMid * kElement, kWeightBytes = kWeightRowBytes * kChunkChannels<T>;
  static constexpr int kGradBytes = kPixels * kChunkBytes;
  static_assert(kWeightBytes == kBackwardMid * kChunkBytes, "as planned");
};

template <class Traits>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2)
    du_mma_kernel(BackwardParams p, MmaBackwardPlan plan, void* du, Strides du_strides) {
  using T = typename Traits::T;
  using Input = typename Traits::Input;
  constexpr int kChunk = kChunkChannels<T>;
  DSCONV_DYNAMIC_SHARED(unsigned char, shared);
  const MmaDuShared& at = plan.du_shared;
  const Geometry& g = p.geom;
  const PixelBox& box = plan.box;
  const BoxPlace place = box_place(box, g, blockIdx.x / static_cast<unsigned>(plan.mid_tiles));
  const int32_t c0 = static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(plan.mid_tiles)) * Traits::kMid;
  const int32_t c_out = static_cast<int32_t>(g.c_out), c_mid = static_cast<int32_t>(g.c_mid);
  const DepthwiseInput<T> in = depthwise_input<T>(p);
  const Input input{box, in, place, shared, at.tables};
  int64_t* dy_at = reinterpret_cast<int64_t*>(shared + at.dy_offsets);
  int64_t* saved_at = reinterpret_cast<int64_t*>(shared + at.saved_offsets);
  input.fill_tables(du_strides);
  fill_offsets<Traits::kPixels>(box, place, g, p.dy_strides, dy_at);
  if (p.saved != nullptr) fill_offsets<Traits::kPixels>(box, place, g, p.saved_strides, saved_at);
  __syncthreads();

  const bool dy_along_c = p.dy_layout == Layout::nhwc;
  const bool dy_runs = !dy_along_c && slots_are_runs<T>(box, g, p.dy_strides, p.dy);
  const T* pw_weight = static_cast<const T*>(p.pw_weight);
  const int weight_bytes = matrix_copy_bytes(pw_weight, g.c_mid);
  const auto start = [&](int32_t o0, int stage) {
    stage_matrix<T, kChunk, Traits::kWeightRowBytes, true>(pw_weight, c_out, c_mid, o0, c0, weight_bytes,
                                                           shared + at.weights + stage * Traits::kWeightBytes);
    unsigned char* grad = shared + stage * Traits::kGradBytes;
    if (dy_along_c) {
      stage_gradient<T, true, false, Traits::kPixels, kChunk>(p, dy_runs, o0, dy_at, saved_at, grad);
    } else {
      stage_gradient<T, false, true, Traits::kPixels, kChunk>(p, dy_runs, o0, dy_at, saved_at, grad);
    }
    cp_async_commit();
  };

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int m0 = warp / Traits::kWarpColumns * 32, n0 = warp % Traits::kWarpColumns * 32;
  const auto weight_at = ColumnFragments<T, Traits::kWeightRowBytes>::of_b(n0);
  typename Traits::Warp own;
  own.clear();
  start(0, 0);
  int stage = 0;
#pragma unroll 1
  for (int32_t o0 = 0; o0 < c_out; o0 += kChunk) {
    cp_async_wait<0>();
    __syncthreads();
    if (o0 + kChunk < c_out) start(o0 + kChunk, stage ^ 1);
    const unsigned char* grad = shared + stage * Traits::kGradBytes;
    const unsigned char* weight = shared + at.weights + stage * Traits::kWeightBytes;
#pragma unroll
    for (int step = 0; step < kChunkBytes / 32; ++step) {
      if (dy_along_c) {
        own.template multiply<T, true, true>(RowFragments<T, kChunkBytes>::of_a(m0), grad, weight_at, weight, step);
      } else {
        own.template multiply<T, true, true>(ColumnFragments<T, Traits::kPixels * Traits::kElement>::of_a(m0), grad,
                                             weight_at, weight, step);
      }
    }
    stage ^= 1;
  }

  if (p.act != Activation::identity) {
    unsigned char* slope = shared;
#pragma unroll 1
    for (int k0 = 0; k0 < Traits::kMid && c0 + k0 < c_mid; k0 += kChunk) {
      input.stage(c0 + k0, shared + at.scratch, shared + at.taps);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();  // x is there, and the last products and slopes have been read
      input.template compute<false>(Middle::derivative, c0 + k0, shared + at.scratch, shared + at.taps, slope);
      __syncthreads();
      const int lane = thread_here() % 32, row0 = m0 + lane / 4, column0 = lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = n0 + 8 * j - k0;
        if (column < 0 || column >= kChunk) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int pixel = row0 + 16 * i + r / 2 * 8, channel = column + column0 + r % 2;
            const int byte = Traits::kAlongC ? at_row<T, Input::kRowBytes>(pixel, channel)
                                             : at_row<T, Input::kRowBytes, true>(channel, pixel);
            own.acc[i][j][r] *= to_acc(*reinterpret_cast<const T*>(slope + byte));
          }
        }
      }
    }
  }
  __syncthreads();  // what follows takes the place of x
  const Outputs<T> outputs{nullptr,
                           nullptr,
                           Activation::identity,
                           static_cast<T*>(du),
                           c_mid,
                           du_strides.c,
                           slots_are_runs<T>(box, g, du_strides, du)};
  store_warp_tile<Traits::kAlongC>(outputs, own, input.offsets() + m0, c0 + n0,
                                   shared + at.scratch + warp * 4 * 32 * kSliceChannels);
}

// ------------------------------------------------------------------------------------------------- grad_pw_weight,
// _bias

template <typename T_, bool kAlongC_>
struct PointwiseSumMmaTraits {
  using T = T_;
  static constexpr bool kAlongC = kAlongC_;  // of x
  static constexpr int kElement = static_cast<int>(sizeof(T));
  static constexpr int kPixels = sum_pixels(kElement), kOut = kBackwardOut, kMid = kBackwardMid;
  static constexpr int kWarpColumns = kMid / 16;
  static_assert(kOut / 32 * kWarpColumns == kWarpsOfBlock, "the warps tile the block");
  using Input = BoxInput<T, kAlongC, kPixels>;
  using Warp = WarpTile<32, 16>;
  static constexpr int kChunks = kMid / kChunkChannels<T>;
  static constexpr int kGradBytes = kPixels * kOut * kElement;
  using ZFragments =
      std::conditional_t<kAlongC, ColumnFragments<T, Input::kRowBytes, false>, RowFragments<T, Input::kRowBytes, true>>;
};

// Partial sums of one split: weight_partial [splits][c_out][c_mid], bias_partial [splits][c_out]; either may be null.
template <class Traits>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2)
    pointwise_sum_mma_kernel(BackwardParams p, MmaBackwardPlan plan, float* weight_partial, float* bias_partial) {
  using T = typename Traits::T;
  using Input = typename Traits::Input;
  constexpr int kChunk = kChunkChannels<T>;
  DSCONV_DYNAMIC_SHARED(unsigned char, shared);
  const MmaSumShared& at = plan.sum_shared;
  const Geometry& g = p.geom;
  const PixelBox& box = plan.sum_box;
  const unsigned mid_tiles = weight_partial != nullptr ? static_cast<unsigned>(plan.mid_tiles) : 1;
  const unsigned tile = blockIdx.x % (static_cast<unsigned>(plan.out_tiles) * mid_tiles);
  const int64_t split = blockIdx.x / (static_cast<unsigned>(plan.out_tiles) * mid_tiles);
  const int32_t o0 = static_cast<int32_t>(tile / mid_tiles) * Traits::kOut;
  const int32_t c0 = static_cast<int32_t>(tile % mid_tiles) * Traits::kMid;
  const int64_t first_box = split * plan.boxes_of_split, boxes_left = box.tiles - first_box;
  const int32_t boxes = static_cast<int32_t>(boxes_left < plan.boxes_of_split ? boxes_left : plan.boxes_of_split);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const bool sums_bias = bias_partial != nullptr && c0 == 0 && thread < Traits::kOut;
  const bool dy_along_c = p.dy_layout == Layout::nhwc;
  const bool dy_runs = !dy_along_c && slots_are_runs<T>(box, g, p.dy_strides, p.dy);
  const DepthwiseInput<T> in = depthwise_input<T>(p);
  int64_t* saved_at = reinterpret_cast<int64_t*>(shared + at.saved_offsets);
  unsigned char* z = shared + at.z;

  const int m0 = warp / Traits::kWarpColumns * 32, n0 = warp % Traits::kWarpColumns * 16;
  const auto z_at = Traits::ZFragments::of_b(n0 % kChunk);
  typename Traits::Warp own;
  own.clear();
  CompensatedSum<float> bias_sum;
#pragma unroll 1
  for (int32_t b = 0; b < boxes; ++b) {
    const Input input{box, in, box_place(box, g, first_box + b), shared, at.tables};
    const int64_t* dy_at = input.offsets();
    input.fill_tables(p.dy_strides);
    if (p.saved != nullptr) fill_offsets<Traits::kPixels>(box, input.place, g, p.saved_strides, saved_at);
    __syncthreads();  // and the products of the box before are done
    if (dy_along_c) {
      stage_gradient<T, true, true, Traits::kPixels, Traits::kOut>(p, dy_runs, o0, dy_at, saved_at, shared);
    } else {
      stage_gradient<T, false, true, Traits::kPixels, Traits::kOut>(p, dy_runs, o0, dy_at, saved_at, shared);
    }
    cp_async_commit();
    if (weight_partial != nullptr) {
#pragma unroll 1
      for (int chunk = 0; chunk < Traits::kChunks; ++chunk) {
        const int32_t c = c0 + chunk * kChunk;
        input.stage(c, shared + at.scratch, shared + at.taps);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        input.template compute<true>(Middle::value, c, shared + at.scratch, shared + at.taps,
                                     z + chunk * Input::kTileBytes);
        __syncthreads();
      }
      const unsigned char* z_chunk = z + n0 / kChunk * Input::kTileBytes;
#pragma unroll 2
      for (int step = 0; step < Traits::kPixels * Traits::kElement / 32; ++step) {
        if (dy_along_c) {
          own.template multiply<T, true, false>(ColumnFragments<T, Traits::kOut * Traits::kElement>::of_a(m0), shared,
                                                z_at, z_chunk, step);
        } else {
          own.template multiply<T, true, false>(RowFragments<T, Traits::kPixels * Traits::kElement, true>::of_a(m0),
                                                shared, z_at, z_chunk, step);
        }
      }
    } else {
      cp_async_wait<0>();
      __syncthreads();
    }
    if (sums_bias) {
#pragma unroll 1
      for (int pixel = 0; pixel < Traits::kPixels; ++pixel) {
        const int byte = dy_along_c ? at_row<T, Traits::kOut * Traits::kElement, true>(pixel, thread)
                                    : at_row<T, Traits::kPixels * Traits::kElement, true>(thread, pixel);
        bias_sum.add(to_acc(*reinterpret_cast<const T*>(shared + byte)));
      }
    }
  }

  if (sums_bias && o0 + thread < g.c_out) bias_partial[split * g.c_out + o0 + thread] = bias_sum.sum;
  if (weight_partial == nullptr) return;
  const int lane = thread % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t o = o0 + m0 + 16 * i + lane / 4 + 8 * half;
      if (o >= g.c_out) continue;
      float* row = weight_partial + (split * g.c_out + o) * g.c_mid;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int32_t c = c0 + n0 + 8 * j + lane % 4 * 2 + e;
          if (c < g.c_mid) row[c] = own.acc[i][j][2 * half + e];
        }
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- launcher

template <DType kType>
LaunchStatus launch_backward_mma(const BackwardParams& p, const BackwardPlan& plan, void* workspace, void* stream) {
  using T = storage_t<kType>;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const MmaBackwardPlan& mma = plan.mma;
  const auto launch_kernels = [&](auto along_c) {
    constexpr bool kAlongC = decltype(along_c)::value;
    LaunchStatus status;
    if (plan.du) {
      status = launch_blocks("du_mma", du_mma_kernel<DuMmaTraits<T, kAlongC>>, plan.du_blocks,
                             static_cast<size_t>(mma.du_shared.bytes), cuda_stream, p, mma,
                             at_byte<void>(workspace, plan.du_at), plan.du_strides);
    }
    if (plan.pw_sums && status.error == 0) {
      float* weight = p.grad_pw_weight != nullptr ? at_byte<float>(workspace, plan.pw_weight_at) : nullptr;
      float* bias = p.grad_pw_bias != nullptr ? at_byte<float>(workspace, plan.pw_bias_at) : nullptr;
      status =
          launch_blocks("pointwise_sum_mma", pointwise_sum_mma_kernel<PointwiseSumMmaTraits<T, kAlongC>>,
                        plan.pw_blocks, static_cast<size_t>(mma.sum_shared.bytes), cuda_stream, p, mma, weight, bias);
      if (status.error == 0) {
        status =
            sum_partials<T>(weight, plan.pw_split.count, p.geom.c_out * p.geom.c_mid, p.grad_pw_weight, cuda_stream);
      }
      if (status.error == 0) {
        status = sum_partials<T>(bias, plan.pw_split.count, p.geom.c_out, p.grad_pw_bias, cuda_stream);
      }
    }
    return status;
  };
  return p.x_layout == Layout::nhwc ? launch_kernels(std::true_type{}) : launch_kernels(std::false_type{});
}

}  // namespace dsconv
