// The depthwise stage of the tensor-core kernels: for a box of output pixels (pixel_box.h) and one chunk of channels at
// a time, x and the taps go to shared memory, and act(z) or act'(z) from there into a tile that mma.sync reads.
//
//   x --cp.async--> staged x, dw_weight --> items in registers --> tile, rows of z as operands of type T
//
// Ownership, an item being a strip of kStripPixels pixels of one column or row, or a patch of kPatchPixels in two rows:
//   x unit-strided along c: lanes along channels, 4 bytes of them each; a half warp is a patch, its neighbour another
//   row of patches
//   x unit-strided along w: lanes along strips, so along columns; a warp is one channel or two. Of 2-byte types an item
//   is two strips side by side where the planner says so (PixelBox::pairs)
// An item's pixels share values and taps in registers: a 3x3 patch reads 24 values for 72 multiply-adds, a strip 18 for
// 36, a pair of strips 18 words for 72. Sums in fp32: the operands that they become are rounded to 11 bits or fewer.
//
//   The tile:  x along c: [kSlots] rows of kChunkBytes of channels     along w: [channels] rows of kSlots pixels
//
// Bytes in shared memory: staged x as planned; taps 64 (taps + 1); spans 8 each; strips 2 kSlots; offsets 8 kSlots.
// Where x is not staged (boxes whose halo does not fit, offsets beyond 32 bits) the taps come from global memory.
#pragma once

#include "box_staging.cuh"
#include "box_sums.cuh"

namespace dsconv {

// Everything that the depthwise stage of a block keeps for all chunks.
template <typename T, bool kAlongC, int kSlots>
struct BoxInput {
  static constexpr int kUnit = kAlongC ? 4 / static_cast<int>(sizeof(T)) : 1;                     // channels of an item
  static constexpr int kRowBytes = kAlongC ? kChunkBytes : kSlots * static_cast<int>(sizeof(T));  // of the tile
  static constexpr int kTileBytes = kSlots * kChunkBytes;
  static constexpr int kItem = kAlongC ? kPatchPixels : kStripPixels;  // pixels
  static constexpr int kStrips = kSlots / kItem;
  static_assert(kBlockThreads % kStrips == 0 && kStrips <= kBlockThreads, "threads share strips evenly");
  static constexpr bool kHasPairs = !kAlongC && sizeof(T) == 2;

  const PixelBox& box;
  const DepthwiseInput<T>& in;
  BoxPlace place;
  unsigned char* shared;
  const BoxTables& tables;

  DSCONV_DEVICE Span* spans() const { return reinterpret_cast<Span*>(shared + tables.spans); }
  DSCONV_DEVICE StripPlace* strips() const { return reinterpret_cast<StripPlace*>(shared + tables.strips); }
  // of the slots, see fill_offsets
  DSCONV_DEVICE SlotOffsets offsets() const { return {reinterpret_cast<int64_t*>(shared + tables.offsets)}; }

  // The caller puts a barrier behind it.
  DSCONV_DEVICE void fill_tables(const Strides& offset_strides) const {
    constexpr int kElement = static_cast<int>(sizeof(T));
    if (box.staged) fill_spans<kAlongC>(box, place, in.geom, in.strides, kElement, spans(), kChunkChannels<T>);
    fill_strips<kAlongC, kSlots>(box, place, in.geom, kElement, strips());
    fill_offsets<kSlots>(box, place, in.geom, offset_strides, offsets());
  }

  // x alone, which spread() makes ready once it is there.
  DSCONV_DEVICE void stage_input(int32_t c0, unsigned char* staged) const {
    if (!box.staged) return;
    if (!kAlongC && box.run_bytes > 0) {
      stage_runs<T>(box, in, place, c0, staged);
    } else {
      stage_x<T, kAlongC>(box, in, in.x + place.n * in.strides.n, c0, spans(), staged);
    }
  }

  DSCONV_DEVICE void stage(int32_t c0, unsigned char* staged, unsigned char* taps) const {
    stage_input(c0, staged);
    if (box.tap_bytes > 0) stage_taps(in, c0, reinterpret_cast<T*>(taps));
  }

  // Behind a barrier; ends with one where it does anything.
  DSCONV_DEVICE void spread(int32_t c0, unsigned char* staged) const {
    if constexpr (!kAlongC) {
      if (box.run_bytes > 0) {
        spread_runs<T>(box, in, place, c0, spans(), staged);
        __syncthreads();
      }
    }
  }

  // Slots without a pixel become zero where kZeroed; else they hold anything.
  template <bool kZeroed>
  DSCONV_DEVICE void compute(Middle middle, int32_t c0, unsigned char* staged, const unsigned char* taps,
                             unsigned char* tile) const {
    spread(c0, staged);
    const int thread = thread_here();
    if constexpr (kHasPairs) {
      if (box.pairs) {
        constexpr int kPairs = kStrips / 2;
#pragma unroll 1
        for (int k = thread / kPairs; k < kChunkChannels<T>; k += kBlockThreads / kPairs) {
          pair<kZeroed>(middle, strips()[thread % kPairs], k, c0, staged, taps, tile);
        }
        return;
      }
    }
    constexpr int kItemsAtOnce = kAlongC ? kBlockThreads / (kChunkBytes / 4) : kBlockThreads / kStrips;
    constexpr int kItems = kAlongC ? kStrips : kChunkChannels<T>;
#pragma unroll 1
    for (int i = kAlongC ? thread / (kChunkBytes / 4) : thread / kStrips; i < kItems; i += kItemsAtOnce) {
      const StripPlace strip = strips()[kAlongC ? i : thread % kStrips];
      item<kZeroed>(middle, strip, kAlongC ? thread % (kChunkBytes / 4) * kUnit : i, c0, staged, taps, tile);
    }
  }

  // z of kUnit channels from c0 + k on, of one strip or patch that has a pixel, [pixel][channel], or of a pair of
  // strips, [row][column]. `z` comes as zeros.
  template <int kValues>
  DSCONV_DEVICE void depthwise(StripPlace strip, int k, int32_t c0, const unsigned char* staged,
                               const unsigned char* taps, float (&z)[kValues]) const {
    constexpr bool kPair = !kAlongC && kValues == 2 * kStripPixels;
    const int32_t plane_taps = static_cast<int32_t>(in.geom.kernel_h * in.geom.kernel_w);
    const int32_t channel_taps = plane_taps * static_cast<int32_t>(in.geom.kernel_d);
    const unsigned char* x = staged + strip.corner + k * box.channel_pitch;
    const T* weight = reinterpret_cast<const T*>(taps) + k * plane_taps;
    const T* bias = reinterpret_cast<const T*>(taps) + kChunkChannels<T> * channel_taps + k;
    int32_t unit = 1, weight_unit = plane_taps;
    if (box.tap_bytes == 0) {
      // In place of a channel beyond the last one the last: x is zero there, and so is its part of the product.
      const int64_t last = in.geom.c_mid - 1, c = c0 + k < last ? c0 + k : last;
      weight = in.dw_weight + c * channel_taps;
      bias = in.dw_bias != nullptr ? in.dw_bias + c : nullptr;
      unit = c < last ? 1 : 0;
      weight_unit = unit * channel_taps;
    }
    if (bias != nullptr) {
#pragma unroll
      for (int u = 0; u < kUnit; ++u) {
        const float value = to_acc(bias[u * unit]);
#pragma unroll
        for (int i = 0; i < kValues / kUnit; ++i) z[i * kUnit + u] = value;
      }
    }
    const int32_t planes = box.staged ? static_cast<int32_t>(in.geom.kernel_d) : 1;
#pragma unroll 1
    for (int32_t kd = 0; kd < planes; ++kd) {
      switch (box.kernel) {
        case BoxKernel::k3s1:
          unrolled_item<T, kAlongC, kUnit, 3, 1>(box, x, weight, z);
          break;
        case BoxKernel::k3s2:
          unrolled_item<T, kAlongC, kUnit, 3, 2>(box, x, weight, z);
          break;
        case BoxKernel::k5s1:
          unrolled_item<T, kAlongC, kUnit, 5, 1>(box, x, weight, z);
          break;
        case BoxKernel::k5s2:
          unrolled_item<T, kAlongC, kUnit, 5, 2>(box, x, weight, z);
          break;
        default:
          if constexpr (!kPair) {
            if (box.kernel == BoxKernel::looped) {
              looped_item<T, kUnit, kItem / 4>(x, run_pitch(), weight, weight_unit, strip_steps(box, in.geom), z);
            } else {
              unstaged_item(strip, c0 + k, z);
            }
          }
      }
      x += box.plane_pitch;
      weight += box.tap_bytes == 0 ? plane_taps : kChunkChannels<T> * plane_taps;
    }
  }

 private:
  // act(z) or act'(z) in place of depthwise()'s z; nothing where no pixel exists.
  template <int kValues>
  DSCONV_DEVICE void make_middle(Middle middle, StripPlace strip, int k, int32_t c0, const unsigned char* staged,
                                 const unsigned char* taps, float (&z)[kValues]) const {
    if (strip.corner < 0) return;
    depthwise(strip, k, c0, staged, taps, z);
    if (middle == Middle::value) {
      activate_all(in.act, z);
    } else {
      derive_all(in.act, z);
    }
  }

  // kUnit channels from c0 + k on, of one strip or patch.
  template <bool kZeroed>
  DSCONV_DEVICE void item(Middle middle, StripPlace strip, int k, int32_t c0, const unsigned char* staged,
                          const unsigned char* taps, unsigned char* tile) const {
    float z[kItem * kUnit] = {};  // [pixel][channel]
    make_middle(middle, strip, k, c0, staged, taps, z);
#pragma unroll
    for (int i = 0; i < kItem; ++i) {
      const int slot = strip.template slot_of<kAlongC>(i);
      const bool zero = kZeroed && offsets()[slot] < 0;
      Vec<T, kUnit> operands;
#pragma unroll
      for (int u = 0; u < kUnit; ++u) {
        const float value = z[i * kUnit + u];
        operands.v[u] = zero ? T{} : middle == Middle::value ? to_operand<T>(value) : from_acc<T>(value);
      }
      const int at = kAlongC ? at_row<T, kRowBytes>(slot, k) : at_row<T, kRowBytes, true>(k, slot);
      *reinterpret_cast<Vec<T, kUnit>*>(tile + at) = operands;
    }
  }

  // The channel c0 + k, of a pair of strips.
  template <bool kZeroed>
  DSCONV_DEVICE void pair(Middle middle, StripPlace strip, int k, int32_t c0, const unsigned char* staged,
                          const unsigned char* taps, unsigned char* tile) const {
    float z[2 * kStripPixels] = {};  // [row][column]
    make_middle(middle, strip, k, c0, staged, taps, z);
#pragma unroll
    for (int i = 0; i < kStripPixels; ++i) {
      const int slot = strip.slot_of_pair(i);
      Vec<int64_t, 2> at = {};
      if constexpr (kZeroed) at = offsets().two(slot);
      Vec<T, 2> operands;
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const bool zero = at.v[column] < 0;
        operands.v[column] = zero ? T{} : from_acc<T>(z[2 * i + column]);
      }
      *reinterpret_cast<Vec<T, 2>*>(tile + at_row<T, kRowBytes, true>(k, slot)) = operands;
    }
  }

  // From the first run of a patch to the second.
  DSCONV_DEVICE int32_t run_pitch() const {
    return box.flat ? 4 * static_cast<int32_t>(in.geom.stride_w) * box.column_pitch
                    : static_cast<int32_t>(in.geom.stride_h) * box.row_pitch;
  }

  // One value at a time: this is the way of the few calls that nothing else fits, and it takes few registers.
  DSCONV_DEVICE void unstaged_item(StripPlace strip, int32_t c, float (&z)[kItem * kUnit]) const {
    const Geometry& g = in.geom;
    const int32_t kernel_h = static_cast<int32_t>(g.kernel_h), kernel_w = static_cast<int32_t>(g.kernel_w);
#pragma unroll 1
    for (int value = 0; value < kItem * kUnit; ++value) {
      const int32_t channel = c + value % kUnit;
      const Pixel pixel = pixel_of_slot(box, place, g, strip.template slot_of<kAlongC>(value / kUnit));
      if (pixel.n < 0 || channel >= g.c_mid) continue;
      const Window window = window_at(pixel, g, in.strides);
      const T* x = in.x + quotient(channel, g.multiplier) * in.strides.c + window.offset;
      const T* weight = in.dw_weight + channel * tap_count(g);
      float sum = 0;
      // All rows of taps of all kd, one after the other.
#pragma unroll 1
      for (int32_t line = 0; line < static_cast<int32_t>(g.kernel_d) * kernel_h; ++line, weight += kernel_w) {
        const int32_t kd = line / kernel_h, kh = line - kd * kernel_h;
        const int32_t depth = kd * static_cast<int32_t>(g.dilation_d), row = kh * static_cast<int32_t>(g.dilation_h);
        if (!inside(window.depth + depth, static_cast<int32_t>(g.d_in))) continue;
        if (!inside(window.row + row, static_cast<int32_t>(g.h_in))) continue;
        const T* from = x + depth * in.strides.d + row * in.strides.h;
        float row_sum = 0;
#pragma unroll 1
        for (int32_t kw = 0; kw < kernel_w; ++kw) {
          const int32_t column = kw * static_cast<int32_t>(g.dilation_w);
          if (!inside(window.col + column, static_cast<int32_t>(g.w_in))) continue;
          row_sum = fused_multiply_add(to_acc(from[column * in.strides.w]), to_acc(weight[kw]), row_sum);
        }
        sum += row_sum;
      }
#pragma unroll
      for (int i = 0; i < kItem * kUnit; ++i) z[i] += i == value ? sum : 0.0f;
    }
  }
};

}  // namespace dsconv
