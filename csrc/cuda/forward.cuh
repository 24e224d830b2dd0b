// Forward, fused: depthwise, activation and pointwise in one kernel; z exists in shared memory only.
//
//   y[q][o] = out_act(pw_bias[o] + sum over c of pw_weight[o][c] * act(z[c][q]))          z: see depthwise.cuh
//
// A block owns kPixels output pixels (of all images in a row) x kChannels output channels, and walks the c_mid channels
// in chunks of kDepth:
//
//                       pw_weight chunk
//                     [kChannels][kDepth]
//                              |                      For each chunk:
//                     +------------------+              1. start to load the pw_weight chunk (cp.async)
//   x --taps-->       |   accumulators   |              2. act(z) chunk from x
//   act(z) chunk  --> |   in registers   |--> y, pre    3. barrier, multiply, barrier
//   [kDepth][kPixels] | kPixels          |            At the end: bias, out_act and stores, forward_epilogue.
//                     | x kChannels      |
//                     +------------------+
//
// Thread ownership: GemmTile with m = pixel, n = output channel; lanes along the pixels where y is unit-strided along
// w, along the output channels else. Blocks that share pixels are neighbours in the grid: all but one find x in L2.
//
//   Shared memory, bytes                  float              16-bit             double
//                                         wide     narrow    wide     narrow    wide     narrow
//   act(z) [kDepth][kPixels + 4]          8704     16896     8704     16896     8704     16896
//   pw_weight [kChannels][kDepth + 16 B]  18432    4608      10240    2560      9216     4608
//   windows [kPixels]                     1536     3072      1536     3072      1536     3072
//
// Global traffic: x once a channel tile (taps hit L1), pw_weight once a pixel tile, y once.
// Preconditions: x has unit stride along w or c, y too; extents and kernel reach below 2^29 (cuda_plan.h checks);
// offsets of tensors in 64 bits.
#pragma once

#include <type_traits>

#include "depthwise.cuh"
#include "gemm.cuh"
#include "launch_blocks.cuh"
#include "output_parts.cuh"
#include "tile_io.cuh"

namespace dsconv {

template <typename T_, bool kWide>
struct ForwardTraits {
  using T = T_;
  using Acc = acc_t<T>;
  static constexpr ForwardTile kTile = forward_tile(sizeof(Acc), kWide);
  static constexpr int kPixels = kTile.pixels, kChannels = kTile.channels, kThreads = kBlockThreads;
  static constexpr int kDepth = forward_depth(sizeof(Acc));
  using Gemm = GemmTile<Acc, kPixels, kChannels, kDepth, kThreads>;

  static constexpr int kZStride = kPixels + 4;
  static constexpr int kWeightStride = kDepth + kVecWidth<T>;
  static constexpr size_t kZBytes = sizeof(Acc) * kDepth * kZStride;
  static constexpr size_t kWeightBytes = sizeof(T) * kChannels * kWeightStride;
  static constexpr size_t kWindowBytes = sizeof(Window) * kPixels;
  static constexpr size_t kSharedBytes = kZBytes + kWeightBytes + kWindowBytes;
  static_assert(kZBytes % 16 == 0 && kWeightBytes % 16 == 0, "every part starts on 16 bytes");
  static_assert(kSharedBytes <= kDefaultSharedBytes, "fits every architecture without asking");
  static_assert(kSharedBytes == forward_shared_bytes(sizeof(T), sizeof(Acc), kWide), "what the planner counts with");
  static_assert(sizeof(OutputPart<Acc>) * kThreads <= kSharedBytes, "parts of y fit where the products were");
};

// The one place where an accumulator becomes an output.
template <class Traits>
DSCONV_DEVICE void forward_epilogue(const ForwardParams& p, const typename Traits::Gemm& own, int64_t q0, int32_t o0,
                                    const typename Traits::Gemm::Registers& acc) {
  using T = typename Traits::T;
  using Acc = typename Traits::Acc;
  const Geometry& g = p.geom;
  const int64_t pixel_count = output_pixels(g);
  const int64_t q = q0 + own.m;
  if (q >= pixel_count) return;
  const int count = pixel_count - q < 4 ? static_cast<int>(pixel_count - q) : 4;
  const int32_t c_out = static_cast<int32_t>(g.c_out);
  T* y = static_cast<T*>(p.y);
  T* pre = static_cast<T*>(p.pre);

  // y is dense: the pixels of one image follow each other at stride w, and four that start on a multiple of four stay
  // in one image where its size is one.
  const int64_t image = g.d_out * g.h_out * g.w_out;
  const bool together = image % 4 == 0;
  const bool vector = together && p.y_layout == Layout::nchw && is_aligned(y, sizeof(Vec<T, 4>)) &&
                      (pre == nullptr || is_aligned(pre, sizeof(Vec<T, 4>)));
  int64_t offset[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i == 0 || !together) {
      offset[i] = i < count ? pixel_offset(output_pixel_at(q + i, g), p.y_strides) : 0;
    } else {
      offset[i] = offset[0] + i * p.y_strides.w;
    }
  }
#pragma unroll
  for (int j = 0; j < Traits::Gemm::kThreadN; ++j) {
    const int32_t o = o0 + own.n + j * Traits::Gemm::kNLanes;
    if (o >= c_out) continue;
    const Acc bias = p.pw_bias != nullptr ? to_acc(static_cast<const T*>(p.pw_bias)[o]) : Acc(0);
    const int64_t channel = o * p.y_strides.c;
    Acc before[4], after[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      before[i] = acc[i][j] + bias;
      after[i] = before[i];
    }
    if (p.out_act != Activation::identity) {
#pragma unroll
      for (int i = 0; i < 4; ++i) after[i] = activate(p.out_act, before[i]);
    }
    if (vector && count == 4) {
      store_four(y + channel + offset[0], after);
      if (pre != nullptr) store_four(pre + channel + offset[0], before);
      continue;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= count) continue;
      y[channel + offset[i]] = from_acc<T>(after[i]);
      if (pre != nullptr) pre[channel + offset[i]] = from_acc<T>(before[i]);
    }
  }
}

template <class Traits, int kKernel>
DSCONV_KERNEL void DSCONV_BOUNDS(Traits::kThreads, kForwardBlocks)
    forward_kernel(ForwardParams p, unsigned channel_tiles) {
  using T = typename Traits::T;
  using Acc = typename Traits::Acc;
  using Gemm = typename Traits::Gemm;
  DSCONV_DYNAMIC_SHARED(unsigned char, shared);
  Acc* z = reinterpret_cast<Acc*>(shared);
  T* weight = reinterpret_cast<T*>(shared + Traits::kZBytes);
  Window* windows = reinterpret_cast<Window*>(shared + Traits::kZBytes + Traits::kWeightBytes);

  const Geometry& g = p.geom;
  const int64_t q0 = static_cast<int64_t>(blockIdx.x / channel_tiles) * Traits::kPixels;
  const int32_t o0 = static_cast<int32_t>(blockIdx.x % channel_tiles) * Traits::kChannels;
  const int32_t c_mid = static_cast<int32_t>(g.c_mid);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < Traits::kPixels) windows[thread] = window_at(q0 + thread, output_pixels(g), g, p.x_strides);
  __syncthreads();

  const DepthwiseInput<T> in = depthwise_input<T>(p);
  const Gemm own = Gemm::of_thread(p.y_layout == Layout::nhwc);
  typename Gemm::Registers acc = {};
#pragma unroll 1
  for (int32_t c0 = 0; c0 < c_mid; c0 += Traits::kDepth) {
    load_matrix_tile<Traits::kChannels, Traits::kDepth, Traits::kWeightStride, Traits::kThreads>(
        static_cast<const T*>(p.pw_weight), g.c_out, g.c_mid, o0, c0, weight);
    cp_async_commit();
    depthwise_tile<kKernel, Traits::kDepth, Traits::kPixels, Traits::kZStride, 1, Traits::kThreads>(in, Middle::value,
                                                                                                    c0, windows, z);
    cp_async_wait<0>();
    __syncthreads();
    own.template multiply<Traits::kZStride, Traits::kWeightStride>(z, weight, acc);
    __syncthreads();
  }
  forward_epilogue<Traits>(p, own, q0, o0, acc);
  if (p.y_parts != nullptr) {
    const unsigned tile = blockIdx.x / channel_tiles;
    put_block_parts(own, acc, static_cast<const T*>(p.pw_bias), output_pixels(g), g.c_out, tile,
                    gridDim.x / channel_tiles, o0, p.y_parts, reinterpret_cast<OutputPart<Acc>*>(shared));
  }
}

template <typename T, bool kWide, int kKernel>
LaunchStatus launch_forward_kernel(const ForwardParams& p, const ForwardPlan& plan, cudaStream_t stream) {
  using Traits = ForwardTraits<T, kWide>;
  return launch_blocks("forward", forward_kernel<Traits, kKernel>, plan.blocks, Traits::kSharedBytes, stream, p,
                       static_cast<unsigned>(plan.channel_tiles));
}

template <DType kType>
LaunchStatus launch_forward(const ForwardParams& p, const ForwardPlan& plan, void* stream) {
  using T = storage_t<kType>;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto launch_tile = [&](auto wide) {
    constexpr bool kWide = decltype(wide)::value;
    switch (plan.kernel) {
      case 3:
        return launch_forward_kernel<T, kWide, 3>(p, plan, cuda_stream);
      case 5:
        return launch_forward_kernel<T, kWide, 5>(p, plan, cuda_stream);
      default:
        return launch_forward_kernel<T, kWide, 0>(p, plan, cuda_stream);
    }
  };
  return plan.wide ? launch_tile(std::true_type{}) : launch_tile(std::false_type{});
}

}  // namespace dsconv
