// Forward, fused, with the pointwise stage on tensor cores: the formula of forward.cuh for Half, BFloat16, and for
// float in TF32.
//
// A block of 8 warps owns a box of kPixels pixels and a group of tiles of kChannels output channels. It walks the steps
// (tile, chunk of c_mid), chunks fastest:
//
//   pw_weight chunk --cp.async--> [2 stages][kChannels] rows of k -+
//                                                                  +--ldmatrix--> mma.sync --> accumulators
//   x --cp.async--> staged --> act(z) chunk [kPixels x 64 bytes] --+
//
//   a step:  wait for its copies, barrier | start the next step's copies | first tile only: act(z), barrier | product
//   the last chunk of a tile:  + bias, out_act in registers, slices of the warp's tile through shared memory, 16-byte
//                              stores along the unit-strided dimension of y
//
// Later tiles of the group find act(z) where the first one left it (z_tiles holds every chunk then). Before square
// tiles act(z) of every chunk is made, by steps of its own. Warp w owns kWarpPixels x kWarpChannels of the tile.
// Accumulation in fp32 in the tensor cores, chunk after chunk.
//
//   Registers: 128 at most, two blocks share a multiprocessor. Shared memory as planned (mma_plan.h, MmaShared):
//     z 64 kPixels a chunk, weights 128 kChannels, x as staged and in its place the slices of the epilogue, tables
//
// Global traffic: x once a group and box, with the halo of the box; pw_weight once a box; y once, and its parts.
// Preconditions: those of forward.cuh.
#pragma once

#include "box_input.cuh"
#include "launch_blocks.cuh"
#include "mma_plan.h"
#include "mma_tile_io.cuh"
#include "output_parts.cuh"

namespace dsconv {

template <typename T_, MmaTileKind kKind_, bool kAlongC_>
struct MmaForwardTraits {
  using T = T_;
  static constexpr bool kAlongC = kAlongC_;
  static constexpr MmaTile kTile = mma_tile(kKind_);
  static constexpr int kPixels = kTile.pixels, kChannels = kTile.channels;
  static constexpr int kWarpPixels = kTile.warp_pixels, kWarpChannels = kTile.warp_channels;
  static constexpr int kWarpColumns = kChannels / kWarpChannels;  // warps side by side
  static constexpr bool kZFirst = makes_z_first(kKind_);
  static_assert(kPixels / kWarpPixels * kWarpColumns == kWarpsOfBlock, "the warps tile the block");
  using Input = BoxInput<T, kAlongC, kPixels>;
  using Warp = WarpTile<kWarpPixels, kWarpChannels>;
  using ZFragments = std::conditional_t<kAlongC, RowFragments<T, kChunkBytes>, ColumnFragments<T, Input::kRowBytes>>;

  static constexpr int kElement = static_cast<int>(sizeof(T));
  static constexpr int kSliceBytes = static_cast<int>(slice_bytes(kElement));
  static_assert(sizeof(WarpParts<kWarpChannels>) <= kSliceBytes, "parts of y in place of a slice");
};

// ForwardParams::y_parts of the channels from o0 on: `slices` are the warps' slices, not in use.
template <class Traits>
DSCONV_DEVICE void put_parts(const ForwardParams& p, int64_t tile, int64_t tiles, const typename Traits::Warp& own,
                             SlotOffsets offsets, int32_t o0, unsigned char* slices) {
  using Parts = WarpParts<Traits::kWarpChannels>;
  const auto of_warp = [&](int warp) -> Parts& {
    return *reinterpret_cast<Parts*>(slices + warp * Traits::kSliceBytes);
  };
  const int thread = thread_here(), m0 = thread / 32 / Traits::kWarpColumns * Traits::kWarpPixels;
  put_warp_parts(own, offsets + m0, of_warp(thread / 32));
  __syncthreads();
  const int64_t channels = p.geom.c_out;
  const int32_t o = o0 + thread;
  if (thread < Traits::kChannels && o < channels) {
    const int column = thread / Traits::kWarpChannels;
    const auto row = [&](int i) -> const Parts& { return of_warp(i * Traits::kWarpColumns + column); };
    const auto load = [&](int i) { return row(i).of[thread % Traits::kWarpChannels]; };
    const auto count = [&](int i) { return row(i).pixels; };
    constexpr int kRows = Traits::kPixels / Traits::kWarpPixels;
    write_part(p.y_parts, tile, channels, o, merged_parts<float>(kRows, load, count));
    if (o == 0) {
      float pixels = 0;
      for (int i = 0; i < kRows; ++i) pixels += count(i);
      write_part_pixels(p.y_parts, tile, tiles, channels, pixels);
    }
  }
  __syncthreads();
}

template <class Traits>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2) forward_mma_kernel(ForwardParams p, MmaForwardPlan plan) {
  using T = typename Traits::T;
  using Input = typename Traits::Input;
  never_on_sm_75<!std::is_same_v<T, Half> || Traits::kZFirst>();
  DSCONV_DYNAMIC_SHARED(unsigned char, shared);
  unsigned char* weights = shared + plan.shared.weights;
  unsigned char* staged = shared + plan.shared.scratch;
  unsigned char* taps = shared + plan.shared.taps;
  const Geometry& g = p.geom;
  const PixelBox& box = plan.box;
  const BoxPlace place = box_place(box, g, blockIdx.x / static_cast<unsigned>(plan.groups));
  const int32_t group = static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(plan.groups));
  const DepthwiseInput<T> in = depthwise_input<T>(p);
  const Input input{box, in, place, shared, plan.shared.tables};
  input.fill_tables(p.y_strides);
  __syncthreads();
  const T* pw_weight = static_cast<const T*>(p.pw_weight);
  const int32_t c_mid = static_cast<int32_t>(g.c_mid), c_out = static_cast<int32_t>(g.c_out);
  const int32_t first_o = group * plan.tiles_of_group * Traits::kChannels;
  const int32_t group_end = first_o + plan.tiles_of_group * Traits::kChannels;
  const int32_t end_o = group_end < c_out ? group_end : c_out;

  const auto start_weights = [&](int32_t o0, int32_t chunk, int stage) {
    stage_matrix<T, Traits::kChannels, kChunkBytes, false>(pw_weight, c_out, c_mid, o0, chunk * kChunkChannels<T>,
                                                           matrix_copy_bytes(pw_weight, g.c_mid),
                                                           weights + stage * Traits::kChannels * kChunkBytes);
  };
  const auto x_stage = [&](int32_t chunk) { return plan.x_stages == 2 ? chunk & 1 : 0; };
  const auto start_x = [&](int32_t chunk) {
    input.stage(chunk * kChunkChannels<T>, staged + x_stage(chunk) * box.stage_bytes,
                taps + x_stage(chunk) * box.tap_bytes);
  };
  const auto z_of = [&](int32_t chunk) { return shared + (plan.z_tiles > 1 ? chunk : 0) * Input::kTileBytes; };
  const auto make_z = [&](int32_t chunk) {
    input.template compute<false>(Middle::value, chunk * kChunkChannels<T>, staged + x_stage(chunk) * box.stage_bytes,
                                  taps + x_stage(chunk) * box.tap_bytes, z_of(chunk));
  };

  typename Traits::Warp own;
  start_weights(first_o, 0, 0);
  if constexpr (Traits::kZFirst) {
    walk_chunks((c_mid + kChunkChannels<T> - 1) / kChunkChannels<T>, plan.x_stages, start_x, make_z);
  } else {
    start_x(0);
    cp_async_commit();
  }
  int32_t chunk = 0, o0 = first_o;
  int weight_stage = 0;  // of the weights' two places that which this step reads
#pragma unroll 1
  while (o0 < end_o) {
    cp_async_wait<0>();
    __syncthreads();
    const bool last = (chunk + 1) * kChunkChannels<T> >= c_mid, makes_z = !Traits::kZFirst && o0 == first_o;
    const int32_t next_chunk = last ? 0 : chunk + 1, next_o = last ? o0 + Traits::kChannels : o0;
    if (next_o < end_o) start_weights(next_o, next_chunk, weight_stage ^ 1);
    if (makes_z && !last && plan.x_stages == 2) start_x(next_chunk);
    cp_async_commit();
    if (makes_z) {
      make_z(chunk);
      __syncthreads();
      if (!last && plan.x_stages == 1) {
        start_x(next_chunk);
        cp_async_commit();
      }
    }

    // Made anew each step: the depthwise stage needs the registers.
    const int warp = thread_here() / 32;
    const int m0 = warp / Traits::kWarpColumns * Traits::kWarpPixels;
    const int n0 = warp % Traits::kWarpColumns * Traits::kWarpChannels;
    const auto z_at = Traits::ZFragments::of_a(m0);
    const auto weight_at = RowFragments<T, kChunkBytes>::of_b(n0);
    if (chunk == 0) own.clear();
    const unsigned char* weight = weights + weight_stage * Traits::kChannels * kChunkBytes;
#pragma unroll
    for (int step = 0; step < kChunkBytes / 32; ++step) {
      own.template multiply<T, false, true>(z_at, z_of(chunk), weight_at, weight, step);
    }
    if (last) {
      unsigned char* slice = staged + warp * Traits::kSliceBytes;
      add_bias(own, static_cast<const T*>(p.pw_bias), o0 + n0, c_out);
      if (p.y_parts != nullptr) {
        put_parts<Traits>(p, block_here() / static_cast<unsigned>(plan.groups), box.tiles, own, input.offsets(), o0,
                          staged);
      }
      const bool runs = slots_are_runs<T>(box, g, p.y_strides, p.y);
      // Before the activation, where that is asked for, and after it. Square tiles have no registers for the one that
      // takes values in turn, and are activated as they go.
#pragma unroll 1
      for (int pass = p.pre != nullptr ? 0 : 1; pass < 2; ++pass) {
        if (pass == 1 && !Traits::kZFirst) activate_tile(p.out_act, own);
        const Activation act = pass == 1 ? p.out_act : Activation::identity;
        const auto finish = [&](float (&values)[4]) {
          if (Traits::kZFirst) activate_piecewise(static_cast<Activation>(fresh(static_cast<int>(act))), values);
        };
        const OutputTensor<T> out{static_cast<T*>(pass == 1 ? p.y : p.pre), c_out, p.y_strides.c, runs};
        if (p.y_layout == Layout::nhwc) {
          store_warp_tile<true>(out, own, input.offsets() + m0, o0 + n0, slice, finish);
        } else {
          store_warp_tile<false>(out, own, input.offsets() + m0, o0 + n0, slice, finish);
        }
      }
    }
    chunk = next_chunk;
    o0 = next_o;
    weight_stage ^= 1;
  }
  cp_async_wait<0>();
}

template <DType kType>
LaunchStatus launch_forward_mma(const ForwardParams& p, const MmaForwardPlan& plan, void* stream) {
  using T = storage_t<kType>;
  const auto launch_kernel = [&](auto kind, auto along_c) {
    using Traits = MmaForwardTraits<T, decltype(kind)::value, decltype(along_c)::value>;
    return launch_blocks("forward_mma", forward_mma_kernel<Traits>, plan.blocks, static_cast<size_t>(plan.shared.bytes),
                         static_cast<cudaStream_t>(stream), p, plan);
  };
  const auto launch_kind = [&](auto kind) {
    return p.x_layout == Layout::nhwc ? launch_kernel(kind, std::true_type{}) : launch_kernel(kind, std::false_type{});
  };
  switch (plan.kind) {
    case MmaTileKind::wide:
      return launch_kind(std::integral_constant<MmaTileKind, MmaTileKind::wide>{});
    case MmaTileKind::narrow:
      return launch_kind(std::integral_constant<MmaTileKind, MmaTileKind::narrow>{});
    case MmaTileKind::square:
      return launch_kind(std::integral_constant<MmaTileKind, MmaTileKind::square>{});
    case MmaTileKind::flat:
      return launch_kind(std::integral_constant<MmaTileKind, MmaTileKind::flat>{});
    default:
      return launch_kind(std::integral_constant<MmaTileKind, MmaTileKind::small>{});
  }
}

}  // namespace dsconv
