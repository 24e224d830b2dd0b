// Backward, stage P, on tensor cores: the formulas of backward_pointwise.cuh for Half, BFloat16, and for float in TF32.
//
// du_mma kernel: a block of 8 warps owns a box of kPixels pixels x kMid mid channels. First act'(z) of the box, a chunk
// of channels at a time (box_input); where act is the identity there is none, and x is not read. Then it walks c_out in
// chunks:
//
//   dy chunk ----------- g [kPixels x 64 bytes] --------+
//                                                       +--ldmatrix--> mma.sync --> da in registers
//   pw_weight --cp.async--> [chunk of c_out][kMid] -----+
//
//   and da * act'(z) leaves as forward's outputs do.
//   Both have two stages, filled a step ahead. In this order the depthwise stage has the registers that the product's
//   accumulators need afterwards, and shared memory holds one after the other but for act'(z), of type T.
//
// pointwise_sum_mma kernel (grad_pw_weight, grad_pw_bias): a block owns kOut output channels x kSumMid mid channels of
// one split of the boxes; the pixels of a box are what the product runs over:
//
//   g [kPixels x kOut]  .  act(z) [kPixels x kSumMid]  -->  accumulators over all boxes of the split --> a partial sum
//
//   Slots without a pixel are zero in both. Blocks of the first mid channels also sum g, compensated. sum_partials adds
//   the partial sums in the order of the splits.
//
// Shared memory and tiles as planned (mma_backward_plan.h). Registers: 128 at most, two blocks share a multiprocessor.
// Global traffic: du_mma reads dy (and saved) once a kMid tile, pw_weight once a box, x once, and writes du once;
// pointwise_sum_mma reads dy once a kSumMid tile and x once a kOut tile. Preconditions: those of forward.cuh.
#pragma once

#include "cuda_launch.h"
#include "launch_blocks.cuh"
#include "mma_backward_plan.h"
#include "mma_tile_io.cuh"
#include "reduce.cuh"

namespace dsconv {

// ---------------------------------------------------------------------------------------------------------------- du

template <typename T_, MmaDuTileKind kKind_, bool kAlongC_>
struct DuMmaTraits {
  using T = T_;
  static constexpr bool kAlongC = kAlongC_;  // of x, and so of du
  static constexpr MmaDuTile kTile = du_tile(kKind_);
  static constexpr int kPixels = kTile.pixels, kMid = kTile.mid, kWarpMid = kTile.warp_mid;
  static constexpr int kElement = static_cast<int>(sizeof(T)), kWarpColumns = kMid / kWarpMid;
  static_assert(kPixels / 32 * kWarpColumns == kWarpsOfBlock, "the warps tile the block");
  using Input = BoxInput<T, kAlongC, kPixels>;
  using Warp = WarpTile<32, kWarpMid>;
  static constexpr int kWeightRowBytes = kMid * kElement, kWeightBytes = kWeightRowBytes * kChunkChannels<T>;
  static constexpr int kGradBytes = kPixels * kChunkBytes;
  static constexpr int kSliceBytes = static_cast<int>(slice_bytes(kElement));
  static_assert(kWeightBytes == kMid * kChunkBytes, "as planned");
};

// act'(z) of the box and the block's mid channels, [chunk] tiles of box_input, those behind the last channel left out.
template <class Traits>
DSCONV_DEVICE void make_slope(const typename Traits::Input& input, const MmaDuPlan& plan, int32_t c0, int32_t c_mid,
                              unsigned char* shared) {
  constexpr int kChunk = kChunkChannels<typename Traits::T>;
  const auto place = [&](int chunk) { return chunk & (plan.x_stages - 1); };
  const auto staged = [&](int chunk) { return shared + plan.shared.staged + place(chunk) * input.box.stage_bytes; };
  const auto taps = [&](int chunk) { return shared + plan.shared.taps + place(chunk) * input.box.tap_bytes; };
  const int32_t left = (c_mid - c0 + kChunk - 1) / kChunk;
  walk_chunks(
      left < Traits::kMid / kChunk ? left : Traits::kMid / kChunk, plan.x_stages,
      [&](int chunk) { input.stage(c0 + chunk * kChunk, staged(chunk), taps(chunk)); },
      [&](int chunk) {
        input.template compute<false>(Middle::derivative, c0 + chunk * kChunk, staged(chunk), taps(chunk),
                                      shared + plan.shared.slope + chunk * Traits::Input::kTileBytes);
      });
  __syncthreads();  // what follows takes the place of x
}

// acc *= act'(z), of the warp's pixels from m0 on and mid channels from n0 on.
template <class Traits>
DSCONV_DEVICE void multiply_by_slope(typename Traits::Warp& own, int m0, int n0, int32_t channels,
                                     const unsigned char* slope) {
  using T = typename Traits::T;
  using Input = typename Traits::Input;
  constexpr int kChunk = kChunkChannels<T>;
  const int lane = thread_here() % 32, row0 = m0 + lane / 4, column0 = lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < Traits::kWarpMid / 8; ++j) {
    const int column = n0 + 8 * j;
    if (column / kChunk * kChunk >= channels) continue;
    const unsigned char* tile = slope + column / kChunk * Input::kTileBytes;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int pixel = row0 + 16 * i + r / 2 * 8, channel = column % kChunk + column0 + r % 2;
        const int byte = Traits::kAlongC ? at_row<T, Input::kRowBytes>(pixel, channel)
                                         : at_row<T, Input::kRowBytes, true>(channel, pixel);
        own.acc[i][j][r] *= to_acc(*reinterpret_cast<const T*>(tile + byte));
      }
    }
  }
}

template <class Traits>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2)
    du_mma_kernel(BackwardParams p, MmaDuPlan plan, void* du, Strides du_strides) {
  using T = typename Traits::T;
  using Input = typename Traits::Input;
  constexpr int kChunk = kChunkChannels<T>;
  never_on_sm_75<!std::is_same_v<T, Half>>();
  DSCONV_DYNAMIC_SHARED(unsigned char, shared);
  const MmaDuShared& at = plan.shared;
  const Geometry& g = p.geom;
  const PixelBox& box = plan.box;
  const BoxPlace place = box_place(box, g, blockIdx.x / static_cast<unsigned>(plan.mid_tiles));
  const int32_t c0 = static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(plan.mid_tiles)) * Traits::kMid;
  const int32_t c_out = static_cast<int32_t>(g.c_out), c_mid = static_cast<int32_t>(g.c_mid);
  const DepthwiseInput<T> in = depthwise_input<T>(p);
  const Input input{box, in, place, shared, at.tables};
  const SlotOffsets dy_at{reinterpret_cast<int64_t*>(shared + at.dy_offsets)};
  const SlotOffsets saved_at{reinterpret_cast<int64_t*>(shared + at.saved_offsets)};
  input.fill_tables(du_strides);
  fill_offsets<Traits::kPixels>(box, place, g, p.dy_strides, dy_at);
  if (p.saved != nullptr) fill_offsets<Traits::kPixels>(box, place, g, p.saved_strides, saved_at);
  __syncthreads();
  const bool bent = p.act != Activation::identity;
  if (bent) make_slope<Traits>(input, plan, c0, c_mid, shared);

  const bool dy_along_c = p.dy_layout == Layout::nhwc;
  const bool dy_runs = !dy_along_c && slots_are_runs<T>(box, g, p.dy_strides, p.dy);
  const T* pw_weight = static_cast<const T*>(p.pw_weight);
  const int weight_bytes = matrix_copy_bytes(pw_weight, g.c_mid);
  const auto start = [&](int32_t o0, int stage) {
    stage_matrix<T, kChunk, Traits::kWeightRowBytes, true>(pw_weight, c_out, c_mid, o0, c0, weight_bytes,
                                                           shared + at.weights + stage * Traits::kWeightBytes);
    unsigned char* grad = shared + at.grad + stage * Traits::kGradBytes;
    if (dy_along_c) {
      stage_gradient<T, true, false, Traits::kPixels, kChunk>(p, dy_runs, o0, dy_at, saved_at, grad);
    } else {
      stage_gradient<T, false, true, Traits::kPixels, kChunk>(p, dy_runs, o0, dy_at, saved_at, grad);
    }
    cp_async_commit();
  };

  // The warp's part of the tile, made anew where it is asked for: registers are short.
  const auto first_row = [] { return thread_here() / 32 / Traits::kWarpColumns * 32; };
  const auto first_column = [] { return thread_here() / 32 % Traits::kWarpColumns * Traits::kWarpMid; };
  const bool works = c0 + first_column() < c_mid;
  const auto weight_at = ColumnFragments<T, Traits::kWeightRowBytes>::of_b(first_column());
  typename Traits::Warp own;
  own.clear();
  const int32_t chunks = (c_out + kChunk - 1) / kChunk;
#pragma unroll 1
  for (int32_t chunk = -1; chunk < chunks; ++chunk) {  // the first step only starts a copy
    cp_async_wait<0>();
    __syncthreads();
    if (chunk + 1 < chunks) start((chunk + 1) * kChunk, (chunk + 1) & 1);
    if (chunk < 0 || !works) continue;
    const int m0 = first_row();
    const unsigned char* grad = shared + at.grad + (chunk & 1) * Traits::kGradBytes;
    const unsigned char* weight = shared + at.weights + (chunk & 1) * Traits::kWeightBytes;
#pragma unroll
    for (int step = 0; step < kChunkBytes / 32; ++step) {
      if (dy_along_c) {
        own.template multiply<T, true, true>(RowFragments<T, kChunkBytes>::of_a(m0), grad, weight_at, weight, step);
      } else {
        own.template multiply<T, true, true>(ColumnFragments<T, Traits::kPixels * Traits::kElement>::of_a(m0), grad,
                                             weight_at, weight, step);
      }
    }
  }
  __syncthreads();  // what follows takes the place of the product's tiles
  if (!works) return;
  const int m0 = first_row(), n0 = first_column();
  if (bent) multiply_by_slope<Traits>(own, m0, n0, c_mid - c0, shared + at.slope);
  const OutputTensor<T> out{static_cast<T*>(du), c_mid, du_strides.c, slots_are_runs<T>(box, g, du_strides, du)};
  store_warp_tile<Traits::kAlongC>(out, own, input.offsets() + m0, c0 + n0,
                                   shared + at.slices + thread_here() / 32 * Traits::kSliceBytes, [](float (&)[4]) {});
}

// ------------------------------------------------------------------------------------------------- grad_pw_weight,
// _bias

template <typename T_, MmaSumTileKind kKind_, bool kAlongC_>
struct PointwiseSumMmaTraits {
  using T = T_;
  static constexpr bool kAlongC = kAlongC_;  // of x
  static constexpr int kElement = static_cast<int>(sizeof(T));
  static constexpr MmaSumTile kTile = sum_tile(kKind_, kElement);
  static constexpr int kPixels = kTile.pixels, kOut = kTile.out, kWarpOut = kTile.warp_out, kWarpMid = kTile.warp_mid;
  static constexpr int kWarpColumns = kSumMid / kWarpMid;
  static_assert(kOut / kWarpOut * kWarpColumns == kWarpsOfBlock, "the warps tile the block");
  static_assert(kChunkChannels<T> % kWarpMid == 0, "a warp's mid channels are in one chunk");
  using Input = BoxInput<T, kAlongC, kPixels>;
  using Warp = WarpTile<kWarpOut, kWarpMid>;
  static constexpr int kChunks = kSumMid / kChunkChannels<T>;
  using ZFragments =
      std::conditional_t<kAlongC, ColumnFragments<T, Input::kRowBytes, false>, RowFragments<T, Input::kRowBytes, true>>;
};

// Partial sums of one split: weight_partial [splits][c_out][c_mid], bias_partial [splits][c_out]; either may be null.
template <class Traits>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2)
    pointwise_sum_mma_kernel(BackwardParams p, MmaSumPlan plan, float* weight_partial, float* bias_partial) {
  using T = typename Traits::T;
  using Input = typename Traits::Input;
  constexpr int kChunk = kChunkChannels<T>;
  never_on_sm_75<!std::is_same_v<T, Half>>();
  DSCONV_DYNAMIC_SHARED(unsigned char, shared);
  const MmaSumShared& at = plan.shared;
  const Geometry& g = p.geom;
  const PixelBox& box = plan.box;
  const unsigned mid_tiles = weight_partial != nullptr ? static_cast<unsigned>(plan.mid_tiles) : 1;
  const unsigned tile = blockIdx.x % (static_cast<unsigned>(plan.out_tiles) * mid_tiles);
  const int64_t split = blockIdx.x / (static_cast<unsigned>(plan.out_tiles) * mid_tiles);
  const int32_t o0 = static_cast<int32_t>(tile / mid_tiles) * Traits::kOut;
  const int32_t c0 = static_cast<int32_t>(tile % mid_tiles) * kSumMid;
  const int64_t first_box = split * plan.boxes_of_split, boxes_left = box.tiles - first_box;
  const int32_t boxes = static_cast<int32_t>(boxes_left < plan.boxes_of_split ? boxes_left : plan.boxes_of_split);
  const bool sums_bias = bias_partial != nullptr && c0 == 0;
  const bool dy_along_c = p.dy_layout == Layout::nhwc;
  const bool dy_runs = !dy_along_c && slots_are_runs<T>(box, g, p.dy_strides, p.dy);
  const DepthwiseInput<T> in = depthwise_input<T>(p);
  const SlotOffsets saved_at{reinterpret_cast<int64_t*>(shared + at.saved_offsets)};
  // Made anew for each box: the depthwise stage needs the registers.
  const auto first_out = [] { return thread_here() / 32 / Traits::kWarpColumns * Traits::kWarpOut; };
  const auto first_mid = [] { return thread_here() / 32 % Traits::kWarpColumns * Traits::kWarpMid; };
  const auto works = [&] {
    return weight_partial != nullptr && o0 + first_out() < g.c_out && c0 + first_mid() / kChunk * kChunk < g.c_mid;
  };
  typename Traits::Warp own;
  own.clear();
  CompensatedSum<float> bias_sum;
#pragma unroll 1
  for (int32_t b = 0; b < boxes; ++b) {
    const Input input{box, in, box_place(box, g, first_box + b), shared, at.tables};
    const SlotOffsets dy_at = input.offsets();
    input.fill_tables(p.dy_strides);
    if (p.saved != nullptr) fill_offsets<Traits::kPixels>(box, input.place, g, p.saved_strides, saved_at);
    __syncthreads();  // and the products of the box before are done
    if (dy_along_c) {
      stage_gradient<T, true, true, Traits::kPixels, Traits::kOut>(p, dy_runs, o0, dy_at, saved_at, shared);
    } else {
      stage_gradient<T, false, true, Traits::kPixels, Traits::kOut>(p, dy_runs, o0, dy_at, saved_at, shared);
    }
    cp_async_commit();
    const auto place = [&](int chunk) { return chunk & (plan.x_stages - 1); };
    const auto staged = [&](int chunk) { return shared + at.staged + place(chunk) * box.stage_bytes; };
    const auto taps = [&](int chunk) { return shared + at.taps + place(chunk) * box.tap_bytes; };
    const int32_t chunks_left = (static_cast<int32_t>(g.c_mid) - c0 + kChunk - 1) / kChunk;
    const int32_t chunks = weight_partial == nullptr       ? 0
                           : chunks_left < Traits::kChunks ? chunks_left
                                                           : Traits::kChunks;
    walk_chunks(
        chunks, plan.x_stages, [&](int chunk) { input.stage(c0 + chunk * kChunk, staged(chunk), taps(chunk)); },
        [&](int chunk) {
          input.template compute<true>(Middle::value, c0 + chunk * kChunk, staged(chunk), taps(chunk),
                                       shared + at.z + chunk * Input::kTileBytes);
        });
    cp_async_wait<0>();
    __syncthreads();
    if (works()) {
      const int m0 = first_out(), n0 = first_mid();
      const auto z_at = Traits::ZFragments::of_b(n0 % kChunk);
      const unsigned char* z_chunk = shared + at.z + n0 / kChunk * Input::kTileBytes;
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
    }
    const int thread = thread_here();
    if (sums_bias && thread < Traits::kOut && dy_along_c) {
#pragma unroll 1
      for (int pixel = 0; pixel < Traits::kPixels; ++pixel) {
        const int byte = at_row<T, Traits::kOut * Traits::kElement, true>(pixel, thread);
        bias_sum.add(to_acc(*reinterpret_cast<const T*>(shared + byte)));
      }
    } else if (sums_bias && thread < Traits::kOut) {
      constexpr int kVec = kVecWidth<T>;  // of 8 rows the vectors are in different banks
#pragma unroll 1
      for (int pixel = 0; pixel < Traits::kPixels; pixel += kVec) {
        const int byte = at_row<T, Traits::kPixels * Traits::kElement, true>(thread, pixel);
        const auto values = *reinterpret_cast<const Vec<T, kVec>*>(shared + byte);
#pragma unroll
        for (int e = 0; e < kVec; ++e) bias_sum.add(to_acc(values.v[e]));
      }
    }
  }

  const int thread = thread_here();
  if (sums_bias && thread < Traits::kOut && o0 + thread < g.c_out) {
    bias_partial[split * g.c_out + o0 + thread] = bias_sum.sum;
  }
  if (!works()) return;
  const int lane = thread % 32, m0 = first_out(), n0 = first_mid();
  const int32_t channels = static_cast<int32_t>(g.c_mid) - c0;
#pragma unroll
  for (int i = 0; i < Traits::kWarpOut / 16; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t o = o0 + m0 + 16 * i + lane / 4 + 8 * half;
      if (o >= g.c_out) continue;
      float* row = weight_partial + (split * g.c_out + o) * g.c_mid + c0;
#pragma unroll
      for (int j = 0; j < Traits::kWarpMid / 8; ++j) {
        const int32_t c = n0 + 8 * j + lane % 4 * 2;
        const float (&pair)[4] = own.acc[i][j];
        if (channels % 2 == 0 && c < channels) {
          *reinterpret_cast<Vec<float, 2>*>(row + c) = {pair[2 * half], pair[2 * half + 1]};
        } else {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (c + e < channels) row[c + e] = pair[2 * half + e];
          }
        }
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- launcher

// Calls f with the kind known to the compiler, one of those that T has.
template <typename Kind, int kKinds, bool kHas(Kind, int64_t), typename T, typename F, int kAt = 0>
LaunchStatus with_tile_kind(Kind kind, const F& f) {
  constexpr Kind kThis = static_cast<Kind>(kAt);
  if constexpr (kHas(kThis, sizeof(T))) {
    if (kind == kThis) return f(std::integral_constant<Kind, kThis>{});
  }
  if constexpr (kAt + 1 < kKinds) return with_tile_kind<Kind, kKinds, kHas, T, F, kAt + 1>(kind, f);
  return {};
}

template <DType kType>
LaunchStatus launch_backward_mma(const BackwardParams& p, const BackwardPlan& plan, void* workspace, void* stream) {
  using T = storage_t<kType>;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const MmaBackwardPlan& mma = plan.mma;
  const auto launch_du = [&](auto kind, auto along_c) {
    using Traits = DuMmaTraits<T, decltype(kind)::value, decltype(along_c)::value>;
    return launch_blocks("du_mma", du_mma_kernel<Traits>, plan.du_blocks, static_cast<size_t>(mma.du.shared.bytes),
                         cuda_stream, p, mma.du, at_byte<void>(workspace, plan.du_at), plan.du_strides);
  };
  float* weight = p.grad_pw_weight != nullptr ? at_byte<float>(workspace, plan.pw_weight_at) : nullptr;
  float* bias = p.grad_pw_bias != nullptr ? at_byte<float>(workspace, plan.pw_bias_at) : nullptr;
  const auto launch_sum = [&](auto kind, auto along_c) {
    using Traits = PointwiseSumMmaTraits<T, decltype(kind)::value, decltype(along_c)::value>;
    return launch_blocks("pointwise_sum_mma", pointwise_sum_mma_kernel<Traits>, plan.pw_blocks,
                         static_cast<size_t>(mma.sum.shared.bytes), cuda_stream, p, mma.sum, weight, bias);
  };
  const auto launch_kernels = [&](auto along_c) {
    LaunchStatus status;
    if (plan.du) {
      status = with_tile_kind<MmaDuTileKind, kMmaDuTileKinds, has_du_tile, T>(
          mma.du.kind, [&](auto kind) { return launch_du(kind, along_c); });
    }
    if (!plan.pw_sums || status.error != 0) return status;
    status = with_tile_kind<MmaSumTileKind, kMmaSumTileKinds, has_sum_tile, T>(
        mma.sum.kind, [&](auto kind) { return launch_sum(kind, along_c); });
    if (status.error == 0) {
      status = sum_partials<T>(weight, plan.pw_split.count, p.geom.c_out * p.geom.c_mid, p.grad_pw_weight, cuda_stream);
    }
    if (status.error == 0) {
      status = sum_partials<T>(bias, plan.pw_split.count, p.geom.c_out, p.grad_pw_bias, cuda_stream);
    }
    return status;
  };
  return p.x_layout == Layout::nhwc ? launch_kernels(std::true_type{}) : launch_kernels(std::false_type{});
}

}  // namespace dsconv
