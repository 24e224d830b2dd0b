// What the kernels of stage D share where channels are adjacent in memory (backward_depthwise_tiles.cuh,
// backward_depthwise_both_tiles.cuh): a thread has kUnit channels of a patch of 8 pixels, four bytes of them, a half
// warp the chunk's channels of one patch. Sums in fp32.
#pragma once

#include "box_input.cuh"

namespace dsconv {

template <typename T>
constexpr int kPatchUnit = 4 / static_cast<int>(sizeof(T));

// kUnit channels from global memory: as one access where all are there and the access is aligned (`whole`), else as
// many as there are, and zeros.
template <typename T, int kUnit>
DSCONV_DEVICE Vec<T, kUnit> load_channels(const T* from, int32_t channels, bool whole) {
  if (whole) return *reinterpret_cast<const Vec<T, kUnit>*>(from);
  Vec<T, kUnit> values = {};
#pragma unroll
  for (int u = 0; u < kUnit; ++u) {
    if (u < channels) values.v[u] = from[u];
  }
  return values;
}

template <typename T, int kUnit>
DSCONV_DEVICE void store_channels(T* to, const float* values, int32_t channels, bool whole) {
  Vec<T, kUnit> packed;
#pragma unroll
  for (int u = 0; u < kUnit; ++u) packed.v[u] = from_acc<T>(values[u]);
  if (whole) {
    *reinterpret_cast<Vec<T, kUnit>*>(to) = packed;
  } else {
#pragma unroll
    for (int u = 0; u < kUnit; ++u) {
      if (u < channels) to[u] = packed.v[u];
    }
  }
}

template <typename T, int kUnit>
DSCONV_DEVICE bool is_whole(const T* at, int32_t channels) {
  return channels >= kUnit && is_aligned(at, sizeof(Vec<T, kUnit>));
}

// Adds up over a block what each thread has of kCount sums of its kUnit channels, [sum][channel]: the two patches of a
// warp, then the warps, always the same tree. partial: [channel][kCount] from the chunk's first channel on, `channels`
// of them. scratch: kAtOnce floats for each warp and channel of a chunk; a barrier is put before it is written.
template <typename T, int kCount, int kAtOnce>
DSCONV_DEVICE void write_block_sums(const float (&sums)[kCount * kPatchUnit<T>], float* scratch, int32_t channels,
                                    float* partial) {
  constexpr int kUnit = kPatchUnit<T>, kOfWarp = kChunkChannels<T> * kAtOnce, kWarpCount = kBlockThreads / 32;
  static_assert(kCount % kAtOnce == 0);
  const int thread = thread_here(), lane = thread % 32, warp = thread / 32, k = lane % 16 * kUnit;
#pragma unroll
  for (int first = 0; first < kCount; first += kAtOnce) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kAtOnce * kUnit; ++i) {
      const float value = sums[first * kUnit + i];
      const float sum = value + __shfl_xor_sync(0xffffffffu, value, 16);
      if (lane < 16) scratch[warp * kOfWarp + (k + i % kUnit) * kAtOnce + i / kUnit] = sum;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < kOfWarp; i += kBlockThreads) {
      const int channel = i / kAtOnce, s = i % kAtOnce;
      if (channel >= channels) break;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarpCount; ++w) sum += scratch[w * kOfWarp + i];
      partial[channel * kCount + first + s] = sum;
    }
  }
}

}  // namespace dsconv
