// Backward, stage P: everything that contracts with the pointwise weight. With g = dy * out_act'(.):
//
//   du[c][q]             = act'(z[c][q]) * sum over o of pw_weight[o][c] * g[o][q]
//   grad_pw_weight[o][c] = sum over q of g[o][q] * act(z[c][q])
//   grad_pw_bias[o]      = sum over q of g[o][q]
//
// z is recomputed from x (depthwise.cuh). du is the one temporary: a workspace in the dtype of x, laid out as x is.
//
// du kernel: a block owns kChannels mid channels x kPixels pixels and walks c_out in chunks of kDepth. GemmTile with
// m = mid channel, n = pixel; lanes along what du is unit-strided along.
//
//                             g chunk
//                        [kPixels][kDepth]
//                                |                   After the last chunk the shared memory of the chunks is used
//   pw_weight chunk     +------------------+         again for act'(z), [kPixels][kChannels]. Where act is the
//   [kDepth]         -->|   accumulators   |--> du   identity it is not computed, and x not read.
//   [kChannels]         | kChannels        |
//                       | x kPixels        |
//                       +------------------+
//
// pointwise_sum kernel (grad_pw_weight, grad_pw_bias): a block owns kOut output channels x kMid mid channels of one
// split of the pixels and walks it in chunks of kDepth pixels; GemmTile with m = output channel, n = mid channel. It
// leaves one partial sum a split, which sum_partials adds in the order of the splits. Blocks of the first kMid tile
// also sum g.
//
//   Shared memory, bytes                                           float    16-bit   double
//   du             pw_weight [kDepth][kChannels]                   16384    8192     8192
//                  g [kPixels][kDepth + 4]                         9216     9216     10240
//                  or act'(z) [kPixels][kChannels + 4]             33792    33792    34816
//                  windows, offsets [kPixels]                      2560     2560     2560
//   pointwise_sum  g [kDepth][kOut + 4]                            8704     8704     8704
//                  act(z) [kMid][kDepth + 4]                       9216     9216     10240
//                  windows, offsets [kDepth]                       1280     1280     640
//
// Global traffic: du reads dy (and saved) once a channel tile, x once, and writes du once; pointwise_sum reads dy once
// a kMid tile and x once a kOut tile. Preconditions: those of forward.cuh, for x, dy and saved.
#pragma once

#include "cuda_launch.h"
#include "depthwise.cuh"
#include "gemm.cuh"
#include "reduce.cuh"
#include "tile_io.cuh"

namespace dsconv {

// ---------------------------------------------------------------------------------------------------------------- du

template <typename T_>
struct DuTraits {
  using T = T_;
  using Acc = acc_t<T>;
  static constexpr PointwiseTiles kTiles = pointwise_tiles(sizeof(Acc));
  static constexpr int kThreads = kBlockThreads, kChannels = kTiles.du_channels, kPixels = kTiles.du_pixels;
  static constexpr int kDepth = kTiles.depth;
  using Gemm = GemmTile<Acc, kChannels, kPixels, kDepth, kThreads>;

  static constexpr int kWeightStride = kChannels;
  static constexpr int kGradStride = kDepth + 4;
  static constexpr int kMiddleStride = kChannels + 4;
  static constexpr size_t kWeightBytes = sizeof(T) * kDepth * kWeightStride;
  static constexpr size_t kGradBytes = sizeof(Acc) * kPixels * kGradStride;
  static constexpr size_t kMiddleBytes = sizeof(Acc) * kPixels * kMiddleStride;
  static constexpr size_t kTileBytes =
      kWeightBytes + kGradBytes > kMiddleBytes ? kWeightBytes + kGradBytes : kMiddleBytes;
  static constexpr size_t kSharedBytes = kTileBytes + kPixels * (sizeof(Window) + sizeof(OutputOffsets));
  static_assert(kWeightBytes % 16 == 0 && kTileBytes % 16 == 0, "every part starts on 16 bytes");
  static_assert(kSharedBytes <= kDefaultSharedBytes, "fits every architecture without asking");
  static_assert(kSharedBytes == du_shared_bytes(sizeof(T), sizeof(Acc)), "what the planner counts with");
};

template <class Traits, int kKernel>
DSCONV_KERNEL void DSCONV_BOUNDS(Traits::kThreads, 2)
    du_kernel(BackwardParams p, void* du_workspace, Layout du_layout, Strides du_strides, unsigned channel_tiles) {
  using T = typename Traits::T;
  using Acc = typename Traits::Acc;
  using Gemm = typename Traits::Gemm;
  DSCONV_DYNAMIC_SHARED(unsigned char, shared);
  T* weight = reinterpret_cast<T*>(shared);
  Acc* grad = reinterpret_cast<Acc*>(shared + Traits::kWeightBytes);
  Acc* middle = reinterpret_cast<Acc*>(shared);
  Window* windows = reinterpret_cast<Window*>(shared + Traits::kTileBytes);
  OutputOffsets* offsets =
      reinterpret_cast<OutputOffsets*>(shared + Traits::kTileBytes + Traits::kPixels * sizeof(Window));

  const Geometry& g = p.geom;
  const int64_t pixel_count = output_pixels(g);
  const int64_t q0 = static_cast<int64_t>(blockIdx.x / channel_tiles) * Traits::kPixels;
  const int32_t c0 = static_cast<int32_t>(blockIdx.x % channel_tiles) * Traits::kChannels;
  const int32_t c_out = static_cast<int32_t>(g.c_out), c_mid = static_cast<int32_t>(g.c_mid);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < Traits::kPixels) {
    windows[thread] = window_at(q0 + thread, pixel_count, g, p.x_strides);
    offsets[thread] = output_offsets_at(q0 + thread, pixel_count, p);
  }
  __syncthreads();

  const Gemm own = Gemm::of_thread(du_layout == Layout::nchw);
  typename Gemm::Registers acc = {};
#pragma unroll 1
  for (int32_t o0 = 0; o0 < c_out; o0 += Traits::kDepth) {
    load_matrix_tile<Traits::kDepth, Traits::kChannels, Traits::kWeightStride, Traits::kThreads>(
        static_cast<const T*>(p.pw_weight), g.c_out, g.c_mid, o0, c0, weight);
    cp_async_commit();
    load_output_gradient<T, Traits::kPixels, Traits::kDepth, Traits::kGradStride, Traits::kThreads>(p, o0, offsets,
                                                                                                    grad);
    cp_async_wait<0>();
    __syncthreads();
    own.template multiply<Traits::kWeightStride, Traits::kGradStride>(weight, grad, acc);
    __syncthreads();
  }

  const bool bent = p.act != Activation::identity;
  if (bent) {
    depthwise_tile<kKernel, Traits::kChannels, Traits::kPixels, 1, Traits::kMiddleStride, Traits::kThreads>(
        depthwise_input<T>(p), Middle::derivative, c0, windows, middle);
  }
  __syncthreads();

  T* du = static_cast<T*>(du_workspace);
  const int32_t c = c0 + own.m;
  const bool vector = du_layout == Layout::nhwc && g.c_mid % 4 == 0;
#pragma unroll
  for (int j = 0; j < Gemm::kThreadN; ++j) {
    const int pixel = own.n + j * Gemm::kNLanes;
    if (q0 + pixel >= pixel_count) continue;
    Acc value[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = acc[i][j];
    if (bent) {
      const auto bend = *reinterpret_cast<const Vec<Acc, 4>*>(middle + pixel * Traits::kMiddleStride + own.m);
#pragma unroll
      for (int i = 0; i < 4; ++i) value[i] *= bend.v[i];
    }
    T* to = du + pixel_offset(output_pixel_at(q0 + pixel, g), du_strides) + c * du_strides.c;
    if (vector && c < c_mid) {
      store_four(to, value);
      continue;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (c + i < c_mid) to[i * du_strides.c] = from_acc<T>(value[i]);
    }
  }
}

// ------------------------------------------------------------------------------------------------- grad_pw_weight,
// _bias

template <typename T_>
struct PointwiseSumTraits {
  using T = T_;
  using Acc = acc_t<T>;
  static constexpr PointwiseTiles kTiles = pointwise_tiles(sizeof(Acc));
  static constexpr int kThreads = kBlockThreads, kOut = kTiles.weight_out, kMid = kTiles.weight_mid;
  static constexpr int kDepth = kTiles.depth;
  using Gemm = GemmTile<Acc, kOut, kMid, kDepth, kThreads>;

  static constexpr int kGradStride = kOut + 4;
  static constexpr int kMiddleStride = kDepth + 4;
  static constexpr size_t kGradBytes = sizeof(Acc) * kDepth * kGradStride;
  static constexpr size_t kMiddleBytes = sizeof(Acc) * kMid * kMiddleStride;
  static constexpr size_t kSharedBytes = kGradBytes + kMiddleBytes + kDepth * (sizeof(Window) + sizeof(OutputOffsets));
  static_assert(kGradBytes % 16 == 0 && kMiddleBytes % 16 == 0, "every part starts on 16 bytes");
  static_assert(kSharedBytes <= kDefaultSharedBytes, "fits every architecture without asking");
  static_assert(kSharedBytes == pointwise_sum_shared_bytes(sizeof(Acc)), "what the planner counts with");
  static_assert(kOut <= kThreads && kDepth <= kThreads, "one thread a row");
};

// Partial sums of one split: weight_partial [splits][c_out][c_mid], bias_partial [splits][c_out]; either may be null.
template <class Traits, int kKernel>
DSCONV_KERNEL void DSCONV_BOUNDS(Traits::kThreads, 2)
    pointwise_sum_kernel(BackwardParams p, typename Traits::Acc* weight_partial, typename Traits::Acc* bias_partial,
                         int64_t split_pixels, unsigned out_tiles, unsigned mid_tiles) {
  using T = typename Traits::T;
  using Acc = typename Traits::Acc;
  using Gemm = typename Traits::Gemm;
  DSCONV_DYNAMIC_SHARED(unsigned char, shared);
  Acc* grad = reinterpret_cast<Acc*>(shared);
  Acc* middle = reinterpret_cast<Acc*>(shared + Traits::kGradBytes);
  Window* windows = reinterpret_cast<Window*>(shared + Traits::kGradBytes + Traits::kMiddleBytes);
  OutputOffsets* offsets = reinterpret_cast<OutputOffsets*>(windows + Traits::kDepth);

  const Geometry& g = p.geom;
  const int64_t pixel_count = output_pixels(g);
  const unsigned tile = blockIdx.x % (out_tiles * mid_tiles);
  const int64_t split = blockIdx.x / (out_tiles * mid_tiles);
  const int32_t o0 = static_cast<int32_t>(tile / mid_tiles) * Traits::kOut;
  const int32_t c0 = static_cast<int32_t>(tile % mid_tiles) * Traits::kMid;
  const int64_t q_begin = split * split_pixels;
  const int64_t q_end = q_begin + split_pixels < pixel_count ? q_begin + split_pixels : pixel_count;
  const int thread = static_cast<int>(threadIdx.x);
  const bool sums_bias = bias_partial != nullptr && c0 == 0 && thread < Traits::kOut;

  const Gemm own = Gemm::of_thread(true);
  typename Gemm::Registers acc = {};
  CompensatedSum<Acc> bias_sum;
#pragma unroll 1
  for (int64_t q0 = q_begin; q0 < q_end; q0 += Traits::kDepth) {
    if (thread < Traits::kDepth) {
      windows[thread] = window_at(q0 + thread, q_end, g, p.x_strides);
      offsets[thread] = output_offsets_at(q0 + thread, q_end, p);
    }
    __syncthreads();
    load_output_gradient<T, Traits::kDepth, Traits::kOut, Traits::kGradStride, Traits::kThreads>(p, o0, offsets, grad);
    if (weight_partial != nullptr) {
      depthwise_tile<kKernel, Traits::kMid, Traits::kDepth, Traits::kMiddleStride, 1, Traits::kThreads>(
          depthwise_input<T>(p), Middle::value, c0, windows, middle);
    }
    __syncthreads();
    if (weight_partial != nullptr) own.template multiply<Traits::kGradStride, Traits::kMiddleStride>(grad, middle, acc);
    if (sums_bias) {
      for (int k = 0; k < Traits::kDepth; ++k) bias_sum.add(grad[k * Traits::kGradStride + thread]);
    }
  }

  if (sums_bias && o0 + thread < g.c_out) bias_partial[split * g.c_out + o0 + thread] = bias_sum.sum;
  if (weight_partial == nullptr) return;
#pragma unroll
  for (int i = 0; i < kThreadM; ++i) {
    const int32_t o = o0 + own.m + i;
    if (o >= g.c_out) continue;
    Acc* row = weight_partial + (split * g.c_out + o) * g.c_mid;
#pragma unroll
    for (int j = 0; j < Gemm::kThreadN; ++j) {
      const int32_t c = c0 + own.n + j * Gemm::kNLanes;
      if (c < g.c_mid) row[c] = acc[i][j];
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- launcher

template <typename T, int kKernel>
LaunchStatus launch_pointwise_kernels(const BackwardParams& p, const BackwardPlan& plan, void* workspace,
                                      cudaStream_t stream) {
  using Acc = acc_t<T>;
  using Du = DuTraits<T>;
  using Sum = PointwiseSumTraits<T>;
  LaunchStatus status;
  if (plan.du) {
    status = launch_blocks("du", du_kernel<Du, kKernel>, plan.du_blocks, Du::kSharedBytes, stream, p,
                           at_byte<void>(workspace, plan.du_at), plan.du_layout, plan.du_strides,
                           static_cast<unsigned>(plan.du_channel_tiles));
  }
  if (plan.pw_sums && status.error == 0) {
    Acc* weight = p.grad_pw_weight != nullptr ? at_byte<Acc>(workspace, plan.pw_weight_at) : nullptr;
    Acc* bias = p.grad_pw_bias != nullptr ? at_byte<Acc>(workspace, plan.pw_bias_at) : nullptr;
    status = launch_blocks("pointwise_sum", pointwise_sum_kernel<Sum, kKernel>, plan.pw_blocks, Sum::kSharedBytes,
                           stream, p, weight, bias, plan.pw_split.pixels, static_cast<unsigned>(plan.pw_out_tiles),
                           static_cast<unsigned>(plan.pw_mid_tiles));
    if (status.error == 0) {
      status = sum_partials<T>(weight, plan.pw_split.count, p.geom.c_out * p.geom.c_mid, p.grad_pw_weight, stream);
    }
    if (status.error == 0) status = sum_partials<T>(bias, plan.pw_split.count, p.geom.c_out, p.grad_pw_bias, stream);
  }
  return status;
}

template <DType kType>
LaunchStatus launch_backward_pointwise(const BackwardParams& p, const BackwardPlan& plan, void* workspace,
                                       void* stream) {
  using T = storage_t<kType>;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  // Doubles take the loops for every kernel: three of their taps in flight beside the sums of a product spill on sm_100
  // and sm_120, and rows of five are loops anyway.
  if constexpr (kType != DType::f64) {
    if (plan.kernel == 3) return launch_pointwise_kernels<T, 3>(p, plan, workspace, cuda_stream);
    if (plan.kernel == 5) return launch_pointwise_kernels<T, 5>(p, plan, workspace, cuda_stream);
  }
  return launch_pointwise_kernels<T, 0>(p, plan, workspace, cuda_stream);
}

}  // namespace dsconv
