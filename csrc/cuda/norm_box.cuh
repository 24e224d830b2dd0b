// The passes of norm_plan.h over z of a depthwise convolution, made in shared memory as the tensor-core kernels make it
// (box_input.cuh), in fp32, and never written.
//
// A block has one chunk of channels, and the boxes of one split, one after the other:
//
//   x --cp.async--> staged x --> items in registers --> z in fp32 --> the thread's channels
//
//   The z tile:   x along c: [kNormSlots] rows of the chunk's channels    x along w: [channels] rows, padded
//   A thread has  x along c: one channel and every so many-th slot         x along w: a warp a channel, lanes along
//   slots
//
// so that grad is read, and out written, along the dimension that is together in memory.
//
// Shared memory, bytes: z 4 channels (kNormSlots + 32 / channels), and in its place what is summed at the end; x as
// staged, taps 64 (taps + 1), tables. Global traffic: x once with the halo of the boxes, grad and out once.
#pragma once

#include "box_input.cuh"
#include "launch_blocks.cuh"
#include "norm_channel.cuh"

namespace dsconv {

template <typename T, bool kAlongC>
struct NormTile {
  static constexpr int kChannels = kChunkChannels<T>, kPitch = kNormSlots + 32 / kChannels;
  // Of a thread: channels, and the slots of each.
  static constexpr int kOwned = kAlongC ? 1 : kChannels / (kBlockThreads / 32);
  static constexpr int kSlots = kAlongC ? kNormSlots * kChannels / kBlockThreads : kNormSlots / 32;
  static constexpr int kAtOnce = 8;  // of these slots: more take registers
  static_assert(kSlots % kAtOnce == 0);

  DSCONV_DEVICE static float* at(unsigned char* tile, int channel, int slot) {
    if constexpr (kAlongC) {
      return reinterpret_cast<float*>(tile + at_row<float, 4 * kChannels>(slot, channel));
    } else {
      return reinterpret_cast<float*>(tile) + channel * kPitch + slot;
    }
  }
  DSCONV_DEVICE static int channel(int thread, int i) {
    return kAlongC ? thread % kChannels : thread / 32 + i * (kBlockThreads / 32);
  }
  DSCONV_DEVICE static int slot(int thread, int i) {
    return kAlongC ? thread / kChannels + i * (kBlockThreads / kChannels) : thread % 32 + i * 32;
  }
};

// z of one box, all slots that have a pixel.
template <typename T, bool kAlongC>
DSCONV_DEVICE void make_z(const BoxInput<T, kAlongC, kNormSlots>& input, int32_t c0, const unsigned char* staged,
                          const unsigned char* taps, unsigned char* tile) {
  using Input = BoxInput<T, kAlongC, kNormSlots>;
  constexpr int kUnit = Input::kUnit, kItem = Input::kItem;
  constexpr int kAcross = kAlongC ? kChunkBytes / 4 : Input::kStrips;
  constexpr int kItems = kAlongC ? Input::kStrips : kChunkChannels<T>;
  const int thread = thread_here();
#pragma unroll 1
  for (int i = thread / kAcross; i < kItems; i += kBlockThreads / kAcross) {
    const StripPlace strip = input.strips()[kAlongC ? i : thread % kAcross];
    const int k = kAlongC ? thread % kAcross * kUnit : i;
    if (strip.corner < 0) continue;
    float z[kItem * kUnit] = {};
    input.depthwise(strip, k, c0, staged, taps, z);
#pragma unroll
    for (int p = 0; p < kItem; ++p) {
      Vec<float, kUnit> values;
#pragma unroll
      for (int u = 0; u < kUnit; ++u) values.v[u] = z[p * kUnit + u];
      *reinterpret_cast<Vec<float, kUnit>*>(NormTile<T, kAlongC>::at(tile, k, strip.template slot_of<kAlongC>(p))) =
          values;
    }
  }
}

template <typename T, bool kAlongC, NormUse kUse>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2) norm_box_kernel(NormPass pass, NormPlan plan) {
  using Tile = NormTile<T, kAlongC>;
  using Input = BoxInput<T, kAlongC, kNormSlots>;
  constexpr bool kMoments = kUse == NormUse::moments;
  constexpr bool kReadsGrad = kUse != NormUse::moments;
  DSCONV_DYNAMIC_SHARED(unsigned char, shared);
  unsigned char* staged = shared + plan.staged;
  unsigned char* taps = shared + plan.taps;
  const NormSource& source = pass.source;
  const Geometry& g = source.geom;
  const PixelBox& box = plan.box;
  const unsigned groups = static_cast<unsigned>(plan.groups), split = blockIdx.x / groups;
  const int32_t c0 = static_cast<int32_t>(blockIdx.x - split * groups) * Tile::kChannels;
  const int32_t channels = static_cast<int32_t>(g.c_mid);
  const DepthwiseInput<T> in = {static_cast<const T*>(source.x),
                                static_cast<const T*>(source.dw_weight),
                                static_cast<const T*>(source.dw_bias),
                                g,
                                source.x_strides,
                                source.layout,
                                Activation::identity};
  if (box.tap_bytes > 0) stage_taps(in, c0, reinterpret_cast<T*>(taps));

  const int thread = thread_here();
  ChannelWork<float, kUse> work[Tile::kOwned];
#pragma unroll
  for (int i = 0; i < Tile::kOwned; ++i) {
    const int32_t c = c0 + Tile::channel(thread, i);
    work[i].begin(pass, c < channels ? c : channels - 1);
  }
  const int64_t first = split * plan.boxes_of_split, after = first + plan.boxes_of_split;
  const int64_t end = after < box.tiles ? after : box.tiles;
#pragma unroll 1
  for (int64_t tile = first; tile < end; ++tile) {
    const BoxPlace place = box_place(box, g, tile);
    const Input input{box, in, place, shared, plan.tables};
    input.fill_tables(plan.strides);
    __syncthreads();
    input.stage_input(c0, staged);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    input.spread(c0, staged);
    make_z<T, kAlongC>(input, c0, staged, taps, shared);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Tile::kOwned; ++i) {
      const int k = Tile::channel(thread, i);
      const int64_t channel = (c0 + k) * plan.strides.c;
      if (c0 + k >= channels) continue;
#pragma unroll 1
      for (int s0 = 0; s0 < Tile::kSlots; s0 += Tile::kAtOnce) {
        float values[Tile::kAtOnce] = {}, grads[Tile::kAtOnce] = {};
        unsigned exists = 0;
#pragma unroll
        for (int s = 0; s < Tile::kAtOnce; ++s) {
          const int slot = Tile::slot(thread, s0 + s);
          const int64_t at = input.offsets()[slot];
          if (at < 0) continue;
          exists |= 1u << s;
          values[s] = *Tile::at(shared, k, slot);
          if constexpr (kReadsGrad) grads[s] = to_acc(static_cast<const T*>(pass.grad)[at + channel]);
        }
        work[i].take(pass, exists, values, grads);
        if constexpr (!kIsSum<kUse>) {
#pragma unroll
          for (int s = 0; s < Tile::kAtOnce; ++s) {
            if ((exists >> s & 1) == 0) continue;
            static_cast<T*>(pass.out)[input.offsets()[Tile::slot(thread, s0 + s)] + channel] = from_acc<T>(grads[s]);
          }
        }
      }
    }
    __syncthreads();
  }
  if constexpr (kIsSum<kUse>) {
#pragma unroll
    for (int i = 0; i < Tile::kOwned; ++i) {
      const int32_t c = c0 + Tile::channel(thread, i);
      Totals total[1] = {work[i].totals()};
      bool writes = thread % 32 == 0;
      if constexpr (kAlongC) {
        constexpr int kParts = kBlockThreads / Tile::kChannels;
        writes = thread < Tile::kChannels;
        total[0] = totals_of_threads<kMoments>(total[0], thread / Tile::kChannels, Tile::kChannels, kParts,
                                               reinterpret_cast<double*>(shared));
      } else {
        total[0] = totals_of_warp<kMoments>(total[0]);
      }
      if (writes && c < channels) write_totals(pass, split, c, total);
    }
  }
}

template <typename T, NormUse kUse>
LaunchStatus launch_norm_box(const NormPass& pass, const NormPlan& plan, cudaStream_t stream) {
  const auto bytes = static_cast<size_t>(plan.shared_bytes);
  if (pass.source.layout == Layout::nhwc) {
    return launch_blocks("norm_box", norm_box_kernel<T, true, kUse>, plan.blocks, bytes, stream, pass, plan);
  }
  return launch_blocks("norm_box", norm_box_kernel<T, false, kUse>, plan.blocks, bytes, stream, pass, plan);
}

}  // namespace dsconv
