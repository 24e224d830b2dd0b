// The depthwise stage of the tensor-core kernels: for a box of output pixels (pixel_box.h) and one chunk of channels at
// a time, x and the taps go to shared memory, and act(z) or act'(z) from there into a tile that mma.sync reads.
//
//   x --cp.async--> staged x, dw_weight --> strips in registers --> tile, rows of z as operands of type T
//
// Ownership, a strip being kStripPixels pixels of one column or row:
//   x unit-strided along c: lanes along channels, 4 bytes of them each; a half warp is a strip, its neighbour another
//   row x unit-strided along w: lanes along strips, so along columns; a warp is one channel or two
// A strip's pixels share their taps in registers: a 3x3 strip reads 18 values for 36 multiply-adds. Sums in fp32, each
// row of taps (column, where strips go down) apart.
//
//   The tile:  x along c: [kSlots] rows of kChunkBytes of channels     along w: [channels] rows of kSlots pixels
//
// Bytes in shared memory: staged x as planned; taps 64 (taps + 1); spans 8 each; strips 2 kSlots; offsets 8 kSlots.
// Where x is not staged (boxes whose halo does not fit, offsets beyond 32 bits) the taps come from global memory.
#pragma once

#include "cuda_plan.h"
#include "depthwise.cuh"
#include "fragments.cuh"
#include "pixel_box.h"

namespace dsconv {

static_assert(kStripPixels == kStrip, "a strip of accumulate_taps");

template <typename T>
constexpr int kChunkChannels = kChunkBytes / static_cast<int>(sizeof(T));

// One piece of x to stage.
struct alignas(8) Span {
  int32_t source;  // elements from the first channel of the box's first image; -1: zeros
  int32_t target;  // 32 * (byte in the staged chunk) + bytes that are inside the image
};

struct alignas(8) StripPlace {
  int32_t corner;      // byte in the staged chunk of the strip's first tap; -1: no pixel of this strip exists
  int16_t slot, step;  // its slots are slot + i * step
};

DSCONV_DEVICE int clamped(int64_t value, int most) {
  return value < 0 ? 0 : value < most ? static_cast<int>(value) : most;
}

// The first pixel of a box.
struct BoxPlace {
  int64_t n;
  int32_t row, column;
};

DSCONV_DEVICE BoxPlace box_place(const PixelBox& box, int64_t tile) {
  const int64_t line = quotient(tile, box.tiles_w), n = quotient(line, box.tiles_h);
  return {n * box.n, static_cast<int32_t>(line - n * box.tiles_h) * box.h,
          static_cast<int32_t>(tile - line * box.tiles_w) * box.w};
}

// The pixel of a slot; .n is -1 where there is none.
DSCONV_DEVICE Pixel pixel_of_slot(const PixelBox& box, const BoxPlace& place, const Geometry& g, int slot) {
  const unsigned line = static_cast<unsigned>(slot) / static_cast<unsigned>(box.w);
  const unsigned image = line / static_cast<unsigned>(box.h);
  const int32_t column = place.column + slot - static_cast<int32_t>(line) * box.w;
  const int32_t row = place.row + static_cast<int32_t>(line - image * static_cast<unsigned>(box.h));
  const int64_t n = place.n + image;
  const bool exists = static_cast<int32_t>(image) < box.n && n < g.n && row < g.h_out && column < g.w_out;
  return {exists ? n : -1, row, column};
}

// The first staged column: at or before the first tap's, and a multiple of the copied piece (nchw).
DSCONV_DEVICE int32_t first_column(const PixelBox& box, const BoxPlace& place, const Geometry& g, int element) {
  const int32_t column = place.column * static_cast<int32_t>(g.stride_w) - static_cast<int32_t>(g.pad_left);
  return column & ~(box.copy_bytes / element - 1);
}

template <bool kAlongC>
DSCONV_DEVICE void fill_spans(const PixelBox& box, const BoxPlace& place, const Geometry& g, const Strides& strides,
                              int element, Span* spans) {
  const int32_t piece = kAlongC ? 1 : box.copy_bytes / element;  // columns
  const unsigned pieces = static_cast<unsigned>(box.in_w / piece);
  const int32_t row0 = place.row * static_cast<int32_t>(g.stride_h) - static_cast<int32_t>(g.pad_top);
  const int32_t column0 = kAlongC ? place.column * static_cast<int32_t>(g.stride_w) - static_cast<int32_t>(g.pad_left)
                                  : first_column(box, place, g, element);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < box.spans; i += kBlockThreads) {
    const unsigned line = static_cast<unsigned>(i) / pieces, image = line / static_cast<unsigned>(box.in_h);
    const int32_t r = static_cast<int32_t>(line - image * static_cast<unsigned>(box.in_h));
    const int32_t column_in_box = static_cast<int32_t>(static_cast<unsigned>(i) - line * pieces) * piece;
    const int32_t row = row0 + r, column = column0 + column_in_box;
    const bool exists = place.n + image < g.n && inside(row, static_cast<int32_t>(g.h_in)) &&
                        inside(column, static_cast<int32_t>(g.w_in));
    const int bytes = exists ? clamped(int64_t{g.w_in - column} * element, box.copy_bytes) : 0;
    const int32_t target =
        static_cast<int32_t>(image) * box.image_pitch + r * box.row_pitch + column_in_box * box.column_pitch;
    const int64_t source = image * strides.n + row * strides.h + column * strides.w;
    spans[i] = {exists ? static_cast<int32_t>(source) : -1, target * 32 + bytes};
  }
}

template <bool kAlongC, int kSlots>
DSCONV_DEVICE void fill_strips(const PixelBox& box, const BoxPlace& place, const Geometry& g, int element,
                               StripPlace* strips) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= kSlots / kStripPixels) return;
  const int32_t height = box.strips_down ? box.h / kStripPixels : box.h;
  const int32_t width = box.strips_down ? box.w : box.w / kStripPixels;
  const int32_t lines = box.n * height, count = lines * width;
  if (i >= count) {
    strips[i] = {-1, static_cast<int16_t>(i * kStripPixels), 1};
    return;
  }
  int32_t line = i / width, column = i % width;
  if (kAlongC && lines % 2 == 0) {
    line = i / (2 * width) * 2 + i % 2;
    column = i / 2 % width;
  }
  const int32_t image = line / height, row = (line - image * height) * (box.strips_down ? kStripPixels : 1);
  column *= box.strips_down ? 1 : kStripPixels;
  const bool exists = place.n + image < g.n && place.row + row < g.h_out && place.column + column < g.w_out;
  int32_t phase = 0;
  if (!kAlongC && box.staged) {
    phase = place.column * static_cast<int32_t>(g.stride_w) - static_cast<int32_t>(g.pad_left) -
            first_column(box, place, g, element);
  }
  const int32_t corner = image * box.image_pitch + row * static_cast<int32_t>(g.stride_h) * box.row_pitch +
                         (column * static_cast<int32_t>(g.stride_w) + phase) * box.column_pitch;
  strips[i] = {exists ? corner : -1, static_cast<int16_t>((image * box.h + row) * box.w + column),
               static_cast<int16_t>(box.strips_down ? box.w : 1)};
}

// Elements from a tensor's first to each slot's pixel, first channel; -1 for a slot without a pixel.
template <int kSlots>
DSCONV_DEVICE void fill_offsets(const PixelBox& box, const BoxPlace& place, const Geometry& g, const Strides& strides,
                                int64_t* offsets) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kSlots; i += kBlockThreads) {
    const Pixel pixel = pixel_of_slot(box, place, g, i);
    offsets[i] = pixel.n < 0 ? -1 : pixel_offset(pixel, strides);
  }
}

// ------------------------------------------------------------------------------------------------------------ staging

// kBytes at a time, asynchronously; two bytes by hand.
template <int kBytes>
DSCONV_DEVICE void copy_piece(void* target, const void* source, int valid) {
  if constexpr (kBytes == 2) {
    *static_cast<uint16_t*>(target) = valid > 0 ? *static_cast<const uint16_t*>(source) : uint16_t{0};
  } else {
    cp_async<kBytes>(target, source, valid);
  }
}

// Calls f with a compile-time number of bytes.
template <typename T, typename F>
DSCONV_DEVICE void with_copy_bytes(int bytes, const F& f) {
  switch (bytes) {
    case 16:
      return f(std::integral_constant<int, 16>{});
    case 8:
      return f(std::integral_constant<int, 8>{});
    default:
      break;
  }
  if (sizeof(T) == 4 || bytes == 4) return f(std::integral_constant<int, 4>{});
  if constexpr (sizeof(T) == 2) f(std::integral_constant<int, 2>{});
}

// One chunk of x, channels c0 ..; x points to the first channel of the box's first image. The caller commits, waits and
// puts the barriers.
template <typename T, bool kAlongC>
DSCONV_DEVICE void stage_x(const PixelBox& box, const DepthwiseInput<T>& in, const T* x, int32_t c0, const Span* spans,
                           unsigned char* staged) {
  constexpr int kElement = static_cast<int>(sizeof(T));
  const int32_t multiplier = static_cast<int32_t>(in.geom.multiplier), c_mid = static_cast<int32_t>(in.geom.c_mid);
  const int thread = static_cast<int>(threadIdx.x);
  with_copy_bytes<T>(box.copy_bytes, [&](auto bytes) {
    constexpr int kBytes = decltype(bytes)::value;
    if constexpr (kAlongC) {
      constexpr int kPieces = kChunkBytes / kBytes;
#pragma unroll 1
      for (int i = thread; i < box.spans * kPieces; i += kBlockThreads) {
        const Span span = spans[i / kPieces];
        const int32_t c = c0 + i % kPieces * (kBytes / kElement);
        const int valid = span.source < 0 ? 0 : clamped(int64_t{c_mid - c} * kElement, kBytes);
        const int32_t source_c = multiplier == 1 ? c : c / multiplier;
        const T* source = valid > 0 ? x + span.source + source_c : x;
        copy_piece<kBytes>(staged + span.target / 32 + i % kPieces * kBytes, source, valid);
      }
    } else {
#pragma unroll 1
      for (int k = thread / 32; k < kChunkChannels<T>; k += kBlockThreads / 32) {
        const int32_t c = c0 + k;
        const T* plane = x + (multiplier == 1 ? c : c / multiplier) * in.strides.c;
        unsigned char* target = staged + k * box.channel_pitch;
        constexpr int kUnroll = kBytes == 2 ? 4 : 1;  // by hand: loads together, to wait once
#pragma unroll kUnroll
        for (int i = thread % 32; i < box.spans; i += 32) {
          const Span span = spans[i];
          const int valid = span.source < 0 || c >= c_mid ? 0 : span.target % 32;
          copy_piece<kBytes>(target + span.target / 32, valid > 0 ? plane + span.source : x, valid);
        }
      }
    }
  });
}

// A run of `count` elements, and zeros behind them to `room`, a multiple of 16 bytes.
template <typename T>
DSCONV_DEVICE void stage_run(const T* source, int64_t count, int room, T* target) {
  constexpr int kPer16 = kVecWidth<T>;
  const int thread = static_cast<int>(threadIdx.x);
  if (is_aligned(source, 16)) {
#pragma unroll 1
    for (int i = thread * kPer16; i < room; i += kBlockThreads * kPer16) {
      const int valid = clamped((count - i) * static_cast<int>(sizeof(T)), 16);
      cp_async<16>(target + i, valid > 0 ? source + i : source, valid);
    }
  } else {
#pragma unroll 1
    for (int i = thread; i < room; i += kBlockThreads) target[i] = i < count ? source[i] : T{};
  }
}

// One chunk of dw_weight and, behind it, of dw_bias.
template <typename T>
DSCONV_DEVICE void stage_taps(const DepthwiseInput<T>& in, int32_t c0, T* staged) {
  const int32_t taps = static_cast<int32_t>(in.geom.kernel_h * in.geom.kernel_w);
  const int64_t left = in.geom.c_mid - c0, channels = left < kChunkChannels<T> ? left : kChunkChannels<T>;
  stage_run(in.dw_weight + int64_t{c0} * taps, channels * taps, kChunkChannels<T> * taps, staged);
  T* bias = staged + kChunkChannels<T> * taps;
  if (in.dw_bias != nullptr) {
    stage_run(in.dw_bias + c0, channels, kChunkChannels<T>, bias);
  } else {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kChunkChannels<T>) bias[thread] = T{};
  }
}

// ----------------------------------------------------------------------------------------------------- the depthwise
// sums

// What a strip walks along: a is its own direction, b the other one. Bytes from tap to tap.
struct StripSteps {
  int32_t taps_a, taps_b, stride_a, dilation_a;
  int32_t pitch_a, pitch_b;    // bytes from tap to tap: along a with dilation 1, along b with its dilation
  int32_t weight_a, weight_b;  // elements of dw_weight from tap to tap
  int32_t taps;
};

DSCONV_DEVICE StripSteps strip_steps(const PixelBox& box, const Geometry& g) {
  const int32_t kh = static_cast<int32_t>(g.kernel_h), kw = static_cast<int32_t>(g.kernel_w);
  const int32_t dh = static_cast<int32_t>(g.dilation_h), dw = static_cast<int32_t>(g.dilation_w);
  if (box.strips_down) {
    return {kh, kw, static_cast<int32_t>(g.stride_h), dh, box.row_pitch, dw * box.column_pitch, kw, 1, kh * kw};
  }
  return {kw, kh, static_cast<int32_t>(g.stride_w), dw, box.column_pitch, dh * box.row_pitch, 1, kw, kh * kw};
}

template <typename T, int kUnit>
DSCONV_DEVICE void load_unit(const unsigned char* at, float (&values)[kUnit]) {
  const Vec<T, kUnit> loaded = *reinterpret_cast<const Vec<T, kUnit>*>(at);
#pragma unroll
  for (int u = 0; u < kUnit; ++u) values[u] = to_acc(loaded.v[u]);
}

// A square kernel and its stride, known to the compiler; dilation 1. Strips along a row, channels together: each value
// of x is read once and goes to every output of the strip that it reaches.
template <typename T, int kUnit, int kKernel, int kStride>
DSCONV_DEVICE void row_strip(const unsigned char* x, int32_t row_pitch, const T* weight,
                             float (&z)[kStripPixels * kUnit]) {
  constexpr int kUnroll = kKernel <= 3 ? kKernel : 1;  // a row of five in flight at a time: more would spill
#pragma unroll kUnroll
  for (int kh = 0; kh < kKernel; ++kh) {
    float taps[kKernel][kUnit];
#pragma unroll
    for (int kw = 0; kw < kKernel; ++kw) {
#pragma unroll
      for (int u = 0; u < kUnit; ++u) taps[kw][u] = to_acc(weight[(u * kKernel + kh) * kKernel + kw]);
    }
    float sum[kStripPixels][kUnit] = {};
#pragma unroll
    for (int r = 0; r < (kStripPixels - 1) * kStride + kKernel; ++r) {
      float value[kUnit];
      load_unit<T, kUnit>(x + r * kChunkBytes, value);
#pragma unroll
      for (int i = 0; i < kStripPixels; ++i) {
        const int kw = r - i * kStride;
        if (kw < 0 || kw >= kKernel) continue;
#pragma unroll
        for (int u = 0; u < kUnit; ++u) sum[i][u] = fused_multiply_add(value[u], taps[kw][u], sum[i][u]);
      }
    }
    x += row_pitch;
#pragma unroll
    for (int i = 0; i < kStripPixels; ++i) {
#pragma unroll
      for (int u = 0; u < kUnit; ++u) z[i * kUnit + u] += sum[i][u];
    }
  }
}

// Strips down a column, columns together: each row of x is read once and goes to every output that it reaches.
template <typename T, int kKernel, int kStride>
DSCONV_DEVICE void column_strip(const unsigned char* x, int32_t row_pitch, const T* weight, float (&z)[kStripPixels]) {
  float taps[kKernel][kKernel];
#pragma unroll
  for (int kh = 0; kh < kKernel; ++kh) {
#pragma unroll
    for (int kw = 0; kw < kKernel; ++kw) taps[kh][kw] = to_acc(weight[kh * kKernel + kw]);
  }
#pragma unroll
  for (int r = 0; r < (kStripPixels - 1) * kStride + kKernel; ++r) {
    float row[kKernel];
#pragma unroll
    for (int kw = 0; kw < kKernel; ++kw) {
      row[kw] = to_acc(*reinterpret_cast<const T*>(x + kw * static_cast<int>(sizeof(T))));
    }
    x += row_pitch;
#pragma unroll
    for (int i = 0; i < kStripPixels; ++i) {
      const int kh = r - i * kStride;
      if (kh < 0 || kh >= kKernel) continue;
      float sum = 0;
#pragma unroll
      for (int kw = 0; kw < kKernel; ++kw) sum = fused_multiply_add(row[kw], taps[kh][kw], sum);
      z[i] += sum;
    }
  }
}

template <typename T, bool kAlongC, int kUnit, int kKernel, int kStride>
DSCONV_DEVICE void unrolled_strip(const unsigned char* x, int32_t row_pitch, const T* weight,
                                  float (&z)[kStripPixels * kUnit]) {
  if constexpr (kAlongC) {
    row_strip<T, kUnit, kKernel, kStride>(x, row_pitch, weight, z);
  } else {
    column_strip<T, kKernel, kStride>(x, row_pitch, weight, z);
  }
}

// Any kernel; weight_unit: elements from a channel's taps to the next one's. At stride and dilation 1 along the strip
// the window slides: one load a tap.
template <typename T, int kUnit>
DSCONV_DEVICE void looped_strip(const unsigned char* x, const T* weight, int32_t weight_unit, const StripSteps& s,
                                float (&z)[kStripPixels * kUnit]) {
  const bool slides = s.stride_a == 1 && s.dilation_a == 1;
#pragma unroll 1
  for (int32_t b = 0; b < s.taps_b; ++b) {
    const unsigned char* row = x + b * s.pitch_b;
    float window[kStripPixels][kUnit], sum[kStripPixels][kUnit] = {};
    if (slides) {
#pragma unroll
      for (int i = 1; i < kStripPixels; ++i) load_unit<T, kUnit>(row + (i - 1) * s.pitch_a, window[i]);
    }
#pragma unroll 1
    for (int32_t a = 0; a < s.taps_a; ++a) {
      if (slides) {
#pragma unroll
        for (int i = 0; i < kStripPixels - 1; ++i) {
#pragma unroll
          for (int u = 0; u < kUnit; ++u) window[i][u] = window[i + 1][u];
        }
        load_unit<T, kUnit>(row + (a + kStripPixels - 1) * s.pitch_a, window[kStripPixels - 1]);
      } else {
#pragma unroll
        for (int i = 0; i < kStripPixels; ++i) {
          load_unit<T, kUnit>(row + (i * s.stride_a + a * s.dilation_a) * s.pitch_a, window[i]);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnit; ++u) {
        const float tap = to_acc(weight[u * weight_unit + a * s.weight_a + b * s.weight_b]);
#pragma unroll
        for (int i = 0; i < kStripPixels; ++i) sum[i][u] = fused_multiply_add(window[i][u], tap, sum[i][u]);
      }
    }
#pragma unroll
    for (int i = 0; i < kStripPixels; ++i) {
#pragma unroll
      for (int u = 0; u < kUnit; ++u) z[i * kUnit + u] += sum[i][u];
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- one chunk

// Everything that the depthwise stage of a block keeps for all chunks.
template <typename T, bool kAlongC, int kSlots>
struct BoxInput {
  static constexpr int kUnit = kAlongC ? 4 / static_cast<int>(sizeof(T)) : 1;                     // channels of an item
  static constexpr int kRowBytes = kAlongC ? kChunkBytes : kSlots * static_cast<int>(sizeof(T));  // of the tile
  static constexpr int kTileBytes = kSlots * kChunkBytes;
  static constexpr int kStrips = kSlots / kStripPixels;
  static_assert(kBlockThreads % kStrips == 0 && kStrips <= kBlockThreads, "threads share strips evenly");

  const PixelBox& box;
  const DepthwiseInput<T>& in;
  BoxPlace place;
  unsigned char* shared;
  const BoxTables& tables;

  DSCONV_DEVICE Span* spans() const { return reinterpret_cast<Span*>(shared + tables.spans); }
  DSCONV_DEVICE StripPlace* strips() const { return reinterpret_cast<StripPlace*>(shared + tables.strips); }
  // of the slots, see fill_offsets
  DSCONV_DEVICE int64_t* offsets() const { return reinterpret_cast<int64_t*>(shared + tables.offsets); }

  // The caller puts a barrier behind it.
  DSCONV_DEVICE void fill_tables(const Strides& offset_strides) const {
    constexpr int kElement = static_cast<int>(sizeof(T));
    if (box.staged) fill_spans<kAlongC>(box, place, in.geom, in.strides, kElement, spans());
    fill_strips<kAlongC, kSlots>(box, place, in.geom, kElement, strips());
    fill_offsets<kSlots>(box, place, in.geom, offset_strides, offsets());
  }

  DSCONV_DEVICE void stage(int32_t c0, unsigned char* staged, unsigned char* taps) const {
    if (!box.staged) return;
    stage_x<T, kAlongC>(box, in, in.x + place.n * in.strides.n, c0, spans(), staged);
    if (box.tap_bytes > 0) stage_taps(in, c0, reinterpret_cast<T*>(taps));
  }

  // Slots without a pixel become zero where kZeroed; else they hold anything.
  template <bool kZeroed>
  DSCONV_DEVICE void compute(Middle middle, int32_t c0, const unsigned char* staged, const unsigned char* taps,
                             unsigned char* tile) const {
    const int thread = static_cast<int>(threadIdx.x);
    constexpr int kItemsAtOnce = kAlongC ? kBlockThreads / (kChunkBytes / 4) : kBlockThreads / kStrips;
    constexpr int kItems = kAlongC ? kStrips : kChunkChannels<T>;
#pragma unroll 1
    for (int i = kAlongC ? thread / (kChunkBytes / 4) : thread / kStrips; i < kItems; i += kItemsAtOnce) {
      const StripPlace strip = strips()[kAlongC ? i : thread % kStrips];
      item<kZeroed>(middle, strip, kAlongC ? thread % (kChunkBytes / 4) * kUnit : i, c0, staged, taps, tile);
    }
  }

 private:
  // kUnit channels from c0 + k on, of one strip.
  template <bool kZeroed>
  DSCONV_DEVICE void item(Middle middle, StripPlace strip, int k, int32_t c0, const unsigned char* staged,
                          const unsigned char* taps, unsigned char* tile) const {
    float z[kStripPixels * kUnit] = {};  // [pixel][channel]
    const int32_t tap_count = static_cast<int32_t>(in.geom.kernel_h * in.geom.kernel_w);
    if (strip.corner >= 0) {
      const unsigned char* x = staged + strip.corner + k * box.channel_pitch;
      const T* weight = reinterpret_cast<const T*>(taps) + k * tap_count;
      const T* bias = reinterpret_cast<const T*>(taps) + kChunkChannels<T> * tap_count + k;
      int32_t unit = 1;
      if (box.tap_bytes == 0) {
        // In place of a channel beyond the last one the last: x is zero there, and so is its part of the product.
        const int64_t last = in.geom.c_mid - 1, c = c0 + k < last ? c0 + k : last;
        weight = in.dw_weight + c * tap_count;
        bias = in.dw_bias != nullptr ? in.dw_bias + c : nullptr;
        unit = c < last ? 1 : 0;
      }
      if (bias != nullptr) {
#pragma unroll
        for (int u = 0; u < kUnit; ++u) {
          const float value = to_acc(bias[u * unit]);
#pragma unroll
          for (int i = 0; i < kStripPixels; ++i) z[i * kUnit + u] = value;
        }
      }
      switch (box.kernel) {
        case BoxKernel::k3s1:
          unrolled_strip<T, kAlongC, kUnit, 3, 1>(x, box.row_pitch, weight, z);
          break;
        case BoxKernel::k3s2:
          unrolled_strip<T, kAlongC, kUnit, 3, 2>(x, box.row_pitch, weight, z);
          break;
        case BoxKernel::k5s1:
          unrolled_strip<T, kAlongC, kUnit, 5, 1>(x, box.row_pitch, weight, z);
          break;
        case BoxKernel::k5s2:
          unrolled_strip<T, kAlongC, kUnit, 5, 2>(x, box.row_pitch, weight, z);
          break;
        case BoxKernel::looped:
          looped_strip<T, kUnit>(x, weight, unit * tap_count, strip_steps(box, in.geom), z);
          break;
        default:
          unstaged_strip(strip, c0 + k, z);
      }
      if (middle == Middle::value) {
        activate_all(in.act, z);
      } else {
        derive_all(in.act, z);
      }
    }
#pragma unroll
    for (int i = 0; i < kStripPixels; ++i) {
      const int slot = strip.slot + i * strip.step;
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

  // One value at a time: this is the way of the few calls that nothing else fits, and it takes few registers.
  DSCONV_DEVICE void unstaged_strip(StripPlace strip, int32_t c, float (&z)[kStripPixels * kUnit]) const {
    const Geometry& g = in.geom;
    const int32_t kernel_h = static_cast<int32_t>(g.kernel_h), kernel_w = static_cast<int32_t>(g.kernel_w);
#pragma unroll 1
    for (int value = 0; value < kStripPixels * kUnit; ++value) {
      const int32_t channel = c + value % kUnit;
      const Pixel pixel = pixel_of_slot(box, place, g, strip.slot + value / kUnit * strip.step);
      if (pixel.n < 0 || channel >= g.c_mid) continue;
      const Window window = window_at(pixel, g, in.strides);
      const T* x = in.x + quotient(channel, g.multiplier) * in.strides.c + window.offset;
      const T* weight = in.dw_weight + int64_t{channel} * kernel_h * kernel_w;
      float sum = 0;
#pragma unroll 1
      for (int32_t kh = 0; kh < kernel_h; ++kh) {
        if (!inside(window.row + kh * static_cast<int32_t>(g.dilation_h), static_cast<int32_t>(g.h_in))) continue;
        float row_sum = 0;
#pragma unroll 1
        for (int32_t kw = 0; kw < kernel_w; ++kw) {
          const int32_t column = kw * static_cast<int32_t>(g.dilation_w);
          if (!inside(window.col + column, static_cast<int32_t>(g.w_in))) continue;
          const T tap = weight[kh * kernel_w + kw];
          row_sum = fused_multiply_add(to_acc(x[kh * g.dilation_h * in.strides.h + column * in.strides.w]), to_acc(tap),
                                       row_sum);
        }
        sum += row_sum;
      }
#pragma unroll
      for (int i = 0; i < kStripPixels * kUnit; ++i) z[i] += i == value ? sum : 0.0f;
    }
  }
};

}  // namespace dsconv
