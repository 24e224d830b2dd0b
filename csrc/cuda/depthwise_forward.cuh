// The depthwise stage alone, before or behind a library's product of matrices (split_forward_plan.h, and for backward
// split_backward_plan.h):
//
//   a[c][q] = act(z[c][q])          Middle::value
//   a[c][q] *= act'(z[c][q])        Middle::derivative
//                                   z: see depthwise.cuh          a: p.y, [n, c_mid, d_out, h_out, w_out], p.y_strides,
//                                                                 dense, unit-strided as x is
//
// 2-byte types: a block owns a box of kDepthwiseSlots pixels and some chunks of channels (kChunkBytes of them each).
//
//   x --cp.async--> staged --> act(z) chunk [kDepthwiseSlots x 64 bytes] --> a, 16 bytes a lane where they lie together
//
//   a chunk:  wait for its copies, barrier | start the next chunk's (two stages) | act(z), barrier | stores
//
// double: a block owns kDepthwiseTilePixels pixels in a row x kDepthwiseTileChannels channels, and reads taps from L1.
//
// Global traffic: x once a box with the box's halo, the taps once a box, a once. Preconditions: those of forward.cuh.
#pragma once

#include "box_input.cuh"
#include "depthwise_forward_plan.h"
#include "launch_blocks.cuh"
#include "mma_tile_io.cuh"

namespace dsconv {

template <typename T>
DSCONV_DEVICE void put_middle(Middle middle, T value, T* a) {
  *a = middle == Middle::value ? value : from_acc<T>(to_acc(*a) * to_acc(value));
}

// A chunk from shared memory to a: channels from c0 on. `runs`: slots_are_runs().
template <class Input, typename T, bool kAlongC>
DSCONV_DEVICE void store_chunk(const ForwardParams& p, Middle middle, SlotOffsets offsets, int32_t c0, bool runs,
                               const unsigned char* z) {
  constexpr int kVec = kVecWidth<T>, kRowBytes = Input::kRowBytes, kRow = kRowBytes / static_cast<int>(sizeof(T));
  constexpr int kElements = kDepthwiseSlots * kChunkChannels<T>;
  const int32_t c_mid = static_cast<int32_t>(p.geom.c_mid);
  const int64_t channel_stride = p.y_strides.c;
  T* a = static_cast<T*>(p.y);
  if (!kAlongC && !runs) {
#pragma unroll 1
    for (int i = thread_here(); i < kElements; i += kBlockThreads) {
      const int slot = i % kRow, k = i / kRow;
      if (offsets[slot] < 0 || c0 + k >= c_mid) continue;
      put_middle(middle, *reinterpret_cast<const T*>(z + at_row<T, kRowBytes, true>(k, slot)),
                 a + offsets[slot] + (c0 + k) * channel_stride);
    }
    return;
  }
  const TensorRun<kAlongC, T> in_a{a, channel_stride, c_mid};
#pragma unroll 1
  for (int i = thread_here(); i < kElements / kVec; i += kBlockThreads) {
    const int row = i / (kRow / kVec), first = i % (kRow / kVec) * kVec;
    const SlotOffsets at = offsets + (kAlongC ? row : first);
    const int32_t c = c0 + (kAlongC ? first : row);
    auto value = *reinterpret_cast<const Vec<T, kVec>*>(z + at_row<T, kRowBytes, !kAlongC>(row, first));
    if (in_a.is_vector(at, c)) {
      auto* to = reinterpret_cast<Vec<T, kVec>*>(a + at[0] + c * channel_stride);
      if (middle == Middle::derivative) {
        const Vec<T, kVec> before = *to;
#pragma unroll
        for (int e = 0; e < kVec; ++e) value.v[e] = from_acc<T>(to_acc(before.v[e]) * to_acc(value.v[e]));
      }
      *to = value;
      continue;
    }
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      const int64_t slot = kAlongC ? at[0] : at[e];
      const int32_t channel = c + (kAlongC ? e : 0);
      if (slot >= 0 && channel < c_mid) put_middle(middle, value.v[e], a + slot + channel * channel_stride);
    }
  }
}

template <typename T, bool kAlongC>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2)
    depthwise_forward_kernel(ForwardParams p, Middle middle, DepthwiseForwardPlan plan) {
  using Input = BoxInput<T, kAlongC, kDepthwiseSlots>;
  DSCONV_DYNAMIC_SHARED(unsigned char, shared);
  const Geometry& g = p.geom;
  const PixelBox& box = plan.box;
  const unsigned tile = blockIdx.x / static_cast<unsigned>(plan.groups);
  const int32_t group = static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(plan.groups));
  const DepthwiseInput<T> in = depthwise_input<T>(p);
  const Input input{box, in, box_place(box, g, tile), shared, plan.tables};
  input.fill_tables(p.y_strides);
  __syncthreads();

  const int32_t chunks = (static_cast<int32_t>(g.c_mid) + kChunkChannels<T> - 1) / kChunkChannels<T>;
  const int32_t first = group * plan.chunks_of_group;
  const int32_t end = first + plan.chunks_of_group < chunks ? first + plan.chunks_of_group : chunks;
  const auto staged = [&](int32_t chunk) {
    return shared + plan.staged + (plan.x_stages == 2 ? (chunk & 1) * box.stage_bytes : 0);
  };
  const auto taps = [&](int32_t chunk) {
    return shared + plan.taps + (plan.x_stages == 2 ? (chunk & 1) * box.tap_bytes : 0);
  };
  const auto start = [&](int32_t chunk) {
    input.stage(chunk * kChunkChannels<T>, staged(chunk), taps(chunk));
    cp_async_commit();
  };
  start(first);
#pragma unroll 1
  for (int32_t chunk = first; chunk < end; ++chunk) {
    cp_async_wait<0>();
    __syncthreads();
    if (chunk + 1 < end && plan.x_stages == 2) start(chunk + 1);
    input.template compute<false>(middle, chunk * kChunkChannels<T>, staged(chunk), taps(chunk), shared);
    __syncthreads();
    if (chunk + 1 < end && plan.x_stages == 1) start(chunk + 1);
    store_chunk<Input, T, kAlongC>(p, middle, input.offsets(), chunk * kChunkChannels<T>,
                                   slots_are_runs<T>(box, g, p.y_strides, p.y), shared);
  }
}

template <typename T, int kKernel>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2)
    depthwise_forward_tile_kernel(ForwardParams p, Middle middle, DepthwiseForwardPlan plan) {
  constexpr int kPixels = kDepthwiseTilePixels, kChannels = kDepthwiseTileChannels;
  DSCONV_SHARED(acc_t<T>, z, kChannels * kPixels);
  DSCONV_SHARED(Window, windows, kPixels);
  DSCONV_SHARED(int64_t, offsets, kPixels);
  const Geometry& g = p.geom;
  const int64_t q0 = static_cast<int64_t>(blockIdx.x / static_cast<unsigned>(plan.groups)) * kPixels;
  const int32_t c0 = static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(plan.groups)) * kChannels;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t pixel_count = output_pixels(g);
  if (thread < kPixels) {
    windows[thread] = window_at(q0 + thread, pixel_count, g, p.x_strides);
    offsets[thread] = q0 + thread < pixel_count ? pixel_offset(output_pixel_at(q0 + thread, g), p.y_strides) : -1;
  }
  __syncthreads();
  depthwise_tile<kKernel, kChannels, kPixels, kPixels, 1, kBlockThreads>(depthwise_input<T>(p), middle, c0, windows, z);
  __syncthreads();
  T* a = static_cast<T*>(p.y);
  const bool along_c = p.x_layout == Layout::nhwc;
#pragma unroll 1
  for (int i = thread; i < kChannels * kPixels; i += kBlockThreads) {
    const int channel = along_c ? i % kChannels : i / kPixels, pixel = along_c ? i / kChannels : i % kPixels;
    if (offsets[pixel] < 0 || c0 + channel >= g.c_mid) continue;
    put_middle(middle, from_acc<T>(z[channel * kPixels + pixel]), a + offsets[pixel] + (c0 + channel) * p.y_strides.c);
  }
}

template <DType kType>
LaunchStatus launch_depthwise_forward(const ForwardParams& p, bool derivative, const DepthwiseForwardPlan& plan,
                                      void* stream) {
  using T = storage_t<kType>;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const Middle middle = derivative ? Middle::derivative : Middle::value;
  if constexpr (kType == DType::f64) {
    const auto launch_kernel = [&](auto kernel) {
      return launch_blocks("depthwise_forward_tile", depthwise_forward_tile_kernel<T, decltype(kernel)::value>,
                           plan.blocks, 0, cuda_stream, p, middle, plan);
    };
    switch (plan.kernel) {
      case 3:
        return launch_kernel(std::integral_constant<int, 3>{});
      case 5:
        return launch_kernel(std::integral_constant<int, 5>{});
      default:
        return launch_kernel(std::integral_constant<int, 0>{});
    }
  } else {
    const auto launch_kernel = [&](auto along_c) {
      return launch_blocks("depthwise_forward", depthwise_forward_kernel<T, decltype(along_c)::value>, plan.blocks,
                           static_cast<size_t>(plan.bytes), cuda_stream, p, middle, plan);
    };
    return p.x_layout == Layout::nhwc ? launch_kernel(std::true_type{}) : launch_kernel(std::false_type{});
  }
}

}  // namespace dsconv
