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
  int32_t corner;      // byte in the staged chunk of the item's first tap; -1: no pixel of it exists
  int16_t slot, step;  // its slots: slot + i * step of a strip, slot + i / 4 * step + i % 4 of a patch

  template <bool kAlongC>
  DSCONV_DEVICE int slot_of(int i) const {
    return kAlongC ? slot + i / 4 * step + i % 4 : slot + i * step;
  }
  // The first of the two slots of a pair in row i. Strips that are not of the box have their slots in a row.
  DSCONV_DEVICE int slot_of_pair(int i) const { return slot + i * (step == 1 ? 2 : step); }
};

DSCONV_DEVICE int clamped(int64_t value, int most) {
  return value < 0 ? 0 : value < most ? static_cast<int>(value) : most;
}

// The first pixel of a box.
struct BoxPlace {
  int64_t n;
  int32_t depth, row, column;

  // The slice behind that pixel's by `slices`.
  DSCONV_DEVICE Slice slice_at(int slices, const Geometry& g) const {
    if (g.d_out == 1) return {n + slices, 0};
    const unsigned at = static_cast<unsigned>(depth + slices), images = at / static_cast<unsigned>(g.d_out);
    return {n + images, static_cast<int32_t>(at - images * static_cast<unsigned>(g.d_out))};
  }
};

DSCONV_DEVICE BoxPlace box_place(const PixelBox& box, const Geometry& g, int64_t tile) {
  const int64_t line = quotient(tile, box.tiles_w), n = quotient(line, box.tiles_h);
  const Slice slice = slice_at(n * box.n, g.d_out);
  return {slice.n, slice.depth, static_cast<int32_t>(line - n * box.tiles_h) * box.h,
          static_cast<int32_t>(tile - line * box.tiles_w) * box.w};
}

// The pixel of a slot; .n is -1 where there is none.
DSCONV_DEVICE Pixel pixel_of_slot(const PixelBox& box, const BoxPlace& place, const Geometry& g, int slot) {
  const unsigned line = static_cast<unsigned>(slot) / static_cast<unsigned>(box.w);
  const unsigned in_box = line / static_cast<unsigned>(box.h);
  const int32_t column = place.column + slot - static_cast<int32_t>(line) * box.w;
  const int32_t row = place.row + static_cast<int32_t>(line - in_box * static_cast<unsigned>(box.h));
  const Slice slice = place.slice_at(static_cast<int>(in_box), g);
  const bool exists = static_cast<int32_t>(in_box) < box.n && slice.n < g.n && row < g.h_out && column < g.w_out;
  return {exists ? slice.n : -1, slice.depth, row, column};
}

// The first staged column: at or before the first tap's, and a multiple of the copied piece (nchw).
DSCONV_DEVICE int32_t first_column(const PixelBox& box, const BoxPlace& place, const Geometry& g, int element) {
  const int32_t column = place.column * static_cast<int32_t>(g.stride_w) - static_cast<int32_t>(g.pad_left);
  return column & ~(box.copy_bytes / element - 1);
}

// channels: of a chunk, where columns lie together.
template <bool kAlongC>
DSCONV_DEVICE void fill_spans(const PixelBox& box, const BoxPlace& place, const Geometry& g, const Strides& strides,
                              int element, Span* spans, int channels = 0) {
  const int32_t piece = kAlongC ? 1 : box.copy_bytes / element;  // columns
  const unsigned pieces = static_cast<unsigned>(box.in_w / piece), kernel_d = static_cast<unsigned>(g.kernel_d);
  const int32_t row0 = place.row * static_cast<int32_t>(g.stride_h) - static_cast<int32_t>(g.pad_top);
  const int32_t column0 = kAlongC ? place.column * static_cast<int32_t>(g.stride_w) - static_cast<int32_t>(g.pad_left)
                                  : first_column(box, place, g, element);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < box.spans; i += kBlockThreads) {
    const unsigned line = static_cast<unsigned>(i) / pieces, plane = line / static_cast<unsigned>(box.in_h);
    const int32_t r = static_cast<int32_t>(line - plane * static_cast<unsigned>(box.in_h));
    const int32_t column_in_box = static_cast<int32_t>(static_cast<unsigned>(i) - line * pieces) * piece;
    const int32_t row = row0 + r, column = column0 + column_in_box;
    const unsigned in_box = kernel_d == 1 ? plane : plane / kernel_d, kd = plane - in_box * kernel_d;
    const Slice slice = place.slice_at(static_cast<int>(in_box), g);
    const int32_t depth = slice.depth * static_cast<int32_t>(g.stride_d) - static_cast<int32_t>(g.pad_front) +
                          static_cast<int32_t>(kd) * static_cast<int32_t>(g.dilation_d);
    const bool exists = slice.n < g.n && inside(depth, static_cast<int32_t>(g.d_in)) &&
                        inside(row, static_cast<int32_t>(g.h_in)) && inside(column, static_cast<int32_t>(g.w_in));
    const int bytes = exists ? clamped(int64_t{g.w_in - column} * element, box.copy_bytes) : 0;
    const int32_t target =
        static_cast<int32_t>(plane) * box.plane_pitch + r * box.row_pitch + column_in_box * box.column_pitch;
    int64_t source = (slice.n - place.n) * strides.n + depth * strides.d + row * strides.h + column * strides.w;
    if (!kAlongC && box.run_bytes > 0) {  // in a channel's run
      const int32_t first_row = row0 > 0 ? row0 : 0;
      source = (row - first_row) * static_cast<int32_t>(g.w_in) + column;
      if (in_box > 0) source += int64_t{in_box} * box.run_bytes / element * channels;
    }
    spans[i] = {exists ? static_cast<int32_t>(source) : -1, target * 32 + bytes};
  }
}

template <bool kAlongC, int kSlots>
DSCONV_DEVICE void fill_strips(const PixelBox& box, const BoxPlace& place, const Geometry& g, int element,
                               StripPlace* strips) {
  constexpr int kItem = kAlongC ? kPatchPixels : kStripPixels;
  const int i = static_cast<int>(threadIdx.x);
  if (i >= kSlots / kItem) return;
  const int32_t rows = kAlongC ? (box.flat ? 1 : 2) : box.strips_down ? kItem : 1, columns = kItem / rows;
  const int32_t height = box.h / rows, width = box.w / columns;
  const int32_t lines = box.n * height, count = lines * width;
  if (i >= count) {
    strips[i] = {-1, static_cast<int16_t>(i * kItem), kAlongC ? 4 : 1};
    return;
  }
  int32_t line = i / width, column = i % width;
  if (kAlongC && i < lines / 2 * 2 * width) {
    // Half warps in pairs: two lines of patches, for the banks of x, and slots apart as swizzled_in_line() wants them.
    line = i / (2 * width) * 2 + i % 2;
    column = i / 2 % width ^ (width % 2 == 0 ? i % 2 : 0);
  }
  const int32_t slice = line / height, row = (line - slice * height) * rows;
  column *= columns;
  const bool exists = place.slice_at(slice, g).n < g.n && place.row + row < g.h_out && place.column + column < g.w_out;
  int32_t phase = 0;
  if (!kAlongC && box.staged) {
    phase = place.column * static_cast<int32_t>(g.stride_w) - static_cast<int32_t>(g.pad_left) -
            first_column(box, place, g, element);
  }
  const int32_t plane = slice * static_cast<int32_t>(g.kernel_d);
  const int32_t corner = plane * box.plane_pitch + row * static_cast<int32_t>(g.stride_h) * box.row_pitch +
                         (column * static_cast<int32_t>(g.stride_w) + phase) * box.column_pitch;
  const int32_t step = kAlongC ? (box.flat ? 4 : box.w) : box.strips_down ? box.w : 1;
  strips[i] = {exists ? corner : -1, static_cast<int16_t>((slice * box.h + row) * box.w + column),
               static_cast<int16_t>(step)};
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
// puts the barriers. kChannels: of a chunk where columns lie together.
template <typename T, bool kAlongC, int kChannels = kChunkChannels<T>>
DSCONV_DEVICE void stage_x(const PixelBox& box, const DepthwiseInput<T>& in, const T* x, int32_t c0, const Span* spans,
                           unsigned char* staged) {
  constexpr int kElement = static_cast<int>(sizeof(T));
  const int32_t multiplier = static_cast<int32_t>(in.geom.multiplier), c_mid = static_cast<int32_t>(in.geom.c_mid);
  const int thread = thread_here();
  with_copy_bytes<T>(box.copy_bytes, [&](auto bytes) {
    constexpr int kBytes = decltype(bytes)::value;
    if constexpr (kAlongC) {
      constexpr int kPieces = kChunkBytes / kBytes;
      const int piece = thread % kPieces;
      const int32_t c = c0 + piece * (kBytes / kElement);
      const int there = clamped(int64_t{c_mid - c} * kElement, kBytes);
      const T* from = x + (multiplier == 1 ? c : c / multiplier);
      unsigned char* to = staged + piece * kBytes;
#pragma unroll 1
      for (int i = thread / kPieces; i < box.spans; i += kBlockThreads / kPieces) {
        const Span span = spans[i];
        const int valid = span.source < 0 ? 0 : there;
        copy_piece<kBytes>(to + (span.target >> 5), valid > 0 ? from + span.source : x, valid);
      }
    } else {
#pragma unroll 1
      for (int k = thread / 32; k < kChannels; k += kBlockThreads / 32) {
        const int32_t c = c0 + k;
        const T* plane = x + (multiplier == 1 ? c : c / multiplier) * in.strides.c;
        unsigned char* target = staged + k * box.channel_pitch;
        constexpr int kUnroll = kBytes == 2 ? 4 : 1;  // by hand: loads together, to wait once
#pragma unroll kUnroll
        for (int i = thread % 32; i < box.spans; i += 32) {
          const Span span = spans[i];
          const int valid = span.source < 0 || c >= c_mid ? 0 : span.target % 32;
          copy_piece<kBytes>(target + (span.target >> 5), valid > 0 ? plane + span.source : x, valid);
        }
      }
    }
  });
}

// One chunk of x in runs (pixel_box.h), in place of stage_x: spread_runs() puts their elements where they belong.
template <typename T, int kChannels = kChunkChannels<T>>
DSCONV_DEVICE void stage_runs(const PixelBox& box, const DepthwiseInput<T>& in, const BoxPlace& place, int32_t c0,
                              unsigned char* staged) {
  constexpr int kVec = kVecWidth<T>;
  const Geometry& g = in.geom;
  const int32_t row0 = place.row * static_cast<int32_t>(g.stride_h) - static_cast<int32_t>(g.pad_top);
  const int32_t first_row = row0 > 0 ? row0 : 0, h_in = static_cast<int32_t>(g.h_in);
  const int32_t end_row = row0 + box.in_h < h_in ? row0 + box.in_h : h_in;
  const int32_t length = (end_row - first_row) * static_cast<int32_t>(g.w_in);
  const unsigned pieces = static_cast<unsigned>(box.run_bytes) / 16,
                 count = static_cast<unsigned>(box.n) * kChannels * pieces;
  unsigned char* runs = staged + box.runs_at;
#pragma unroll 1
  for (unsigned i = static_cast<unsigned>(thread_here()); i < count; i += kBlockThreads) {
    const unsigned run = i / pieces, image = run / kChannels;
    const int32_t c = c0 + static_cast<int32_t>(run % kChannels);
    const int64_t n = place.n + image;
    if (n >= g.n || c >= g.c_in) continue;
    const int64_t start = n * in.strides.n + c * in.strides.c + int64_t{first_row} * g.w_in;
    const int32_t skipped = static_cast<int32_t>(start % kVec), first = static_cast<int32_t>(i - run * pieces) * kVec;
    const int32_t left = skipped + length - first;
    if (left <= 0) continue;
    cp_async<16>(runs + i * 16, in.x + (start - skipped + first),
                 (left < kVec ? left : kVec) * static_cast<int>(sizeof(T)));
  }
}

// The caller puts barriers before and behind it.
template <typename T, int kChannels = kChunkChannels<T>>
DSCONV_DEVICE void spread_runs(const PixelBox& box, const DepthwiseInput<T>& in, const BoxPlace& place, int32_t c0,
                               const Span* spans, unsigned char* staged) {
  const Geometry& g = in.geom;
  const int32_t row0 = place.row * static_cast<int32_t>(g.stride_h) - static_cast<int32_t>(g.pad_top);
  const int64_t first = int64_t{row0 > 0 ? row0 : 0} * g.w_in;
  const int thread = thread_here();
  const auto spread = [&](auto piece) {
    using Piece = decltype(piece);
    constexpr int kElements = static_cast<int>(sizeof(Piece) / sizeof(T));
#pragma unroll 1
    for (int k = thread / 32; k < kChannels; k += kBlockThreads / 32) {
      const int32_t c = c0 + k;
      const int32_t skipped = static_cast<int32_t>((c * in.strides.c + first) % kVecWidth<T>);
      const T* run = reinterpret_cast<const T*>(staged + box.runs_at + k * box.run_bytes) + skipped;
      unsigned char* target = staged + k * box.channel_pitch;
#pragma unroll 2
      for (int i = thread % 32; i < box.spans; i += 32) {
        const Span span = spans[i];
        Piece value = {};
        if (span.source >= 0 && c < g.c_mid) {
          if (span.target % 32 == static_cast<int>(sizeof(Piece))) {
            value = *reinterpret_cast<const Piece*>(run + span.source);
          } else if constexpr (kElements > 1) {
            value.v[0] = run[span.source];
          }
        }
        *reinterpret_cast<Piece*>(target + (span.target >> 5)) = value;
      }
    }
  };
  if (box.copy_bytes == static_cast<int32_t>(sizeof(T))) {
    spread(Vec<T, 1>{});
  } else {
    spread(Vec<T, 4 / sizeof(T)>{});
  }
}

// A run of `count` elements, and zeros behind them to `room`, a multiple of 16 bytes.
template <typename T>
DSCONV_DEVICE void stage_run(const T* source, int64_t count, int room, T* target) {
  constexpr int kPer16 = kVecWidth<T>;
  const int thread = thread_here();
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

// One chunk of dw_weight, [kernel_d][channel][kernel_h * kernel_w]: each kd a kernel of its own. Zeros behind c_mid.
template <typename T>
DSCONV_DEVICE void stage_weights(const T* dw_weight, const Geometry& g, int32_t c0, T* staged) {
  const int32_t kernel_d = static_cast<int32_t>(g.kernel_d), plane_taps = static_cast<int32_t>(g.kernel_h * g.kernel_w);
  const int32_t plane = kChunkChannels<T> * plane_taps, channel_taps = kernel_d * plane_taps;
  const int64_t left = g.c_mid - c0, channels = left < kChunkChannels<T> ? left : kChunkChannels<T>;
  const T* source = dw_weight + int64_t{c0} * channel_taps;
  if (kernel_d == 1) return stage_run(source, channels * plane_taps, plane, staged);
#pragma unroll 1
  for (int i = thread_here(); i < kernel_d * plane; i += kBlockThreads) {
    const int32_t kd = i / plane, channel = (i - kd * plane) / plane_taps, tap = i - kd * plane - channel * plane_taps;
    staged[i] = channel < channels ? source[channel * channel_taps + kd * plane_taps + tap] : T{};
  }
}

// One chunk of dw_weight and, behind it, of dw_bias.
template <typename T>
DSCONV_DEVICE void stage_taps(const DepthwiseInput<T>& in, int32_t c0, T* staged) {
  const int64_t left = in.geom.c_mid - c0, channels = left < kChunkChannels<T> ? left : kChunkChannels<T>;
  stage_weights(in.dw_weight, in.geom, c0, staged);
  T* bias = staged + kChunkChannels<T> * static_cast<int32_t>(tap_count(in.geom));
  if (in.dw_bias != nullptr) {
    stage_run(in.dw_bias + c0, channels, kChunkChannels<T>, bias);
  } else {
    const int thread = thread_here();
    if (thread < kChunkChannels<T>) bias[thread] = T{};
  }
}

// Calls compute(chunk) for `chunks` of x, start(chunk) having begun to copy one of them, to place chunk % stages: as
// many ahead as there are places. All that was committed before is there too at the first call.
template <typename Start, typename Compute>
DSCONV_DEVICE void walk_chunks(int chunks, int stages, const Start& start, const Compute& compute) {
  int next = 0;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int ahead = chunk + stages < chunks ? chunk + stages : chunks;
    if (chunk > 0 && next < ahead) __syncthreads();  // the chunk that lay there has been read
#pragma unroll 1
    for (; next < ahead; ++next) {
      start(next);
      cp_async_commit();
    }
    if (next > chunk + 1) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    compute(chunk);
  }
}

// ------------------------------------------------------------------------------------------------- the depthwise sums

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

// One row of x for both rows of outputs of a patch, whose taps there are `upper` and `lower`: each value is read once
// and goes to every output that it reaches.
template <bool kUpper, bool kLower, typename T, int kUnit, int kKernel, int kStride>
DSCONV_DEVICE void patch_row(const unsigned char* x, const float (&upper)[kKernel][kUnit],
                             const float (&lower)[kKernel][kUnit], float (&z)[kPatchPixels * kUnit]) {
#pragma unroll
  for (int column = 0; column < 3 * kStride + kKernel; ++column) {
    float value[kUnit];
    load_unit<T, kUnit>(x + column * kChunkBytes, value);
#pragma unroll
    for (int i = 0; i < kPatchPixels; ++i) {
      const int kw = column - i % 4 * kStride;
      if (kw < 0 || kw >= kKernel || (i < 4 ? !kUpper : !kLower)) continue;
#pragma unroll
      for (int u = 0; u < kUnit; ++u) {
        z[i * kUnit + u] = fused_multiply_add(value[u], i < 4 ? upper[kw][u] : lower[kw][u], z[i * kUnit + u]);
      }
    }
  }
}

// A square kernel and its stride, known to the compiler; dilation 1. Two rows of four pixels, channels together.
// kReversed: the taps from the last to the first.
template <typename T, int kUnit, int kKernel, int kStride, bool kReversed = false>
DSCONV_DEVICE void unrolled_patch(const unsigned char* x, int32_t row_pitch, const T* weight,
                                  float (&z)[kPatchPixels * kUnit]) {
  constexpr int kTaps = kKernel * kKernel;
  const auto place_of = [](int u, int kh, int kw) {
    const int tap = kh * kKernel + kw;
    return u * kTaps + (kReversed ? kTaps - 1 - tap : tap);
  };
  float upper[kKernel][kUnit], lower[kKernel][kUnit];
  if constexpr (kKernel == 3) {
    // The taps of the patch's channels lie together, and are loaded by words: an odd number, so that the lanes' are in
    // different banks.
    static_assert(kUnit * sizeof(T) == sizeof(uint32_t));
    Vec<T, kUnit> words[kTaps];
#pragma unroll
    for (int i = 0; i < kTaps; ++i) words[i] = reinterpret_cast<const Vec<T, kUnit>*>(weight)[i];
    const auto unpack_taps = [&](int kh, float (&taps)[kKernel][kUnit]) {
#pragma unroll
      for (int i = 0; i < kKernel * kUnit; ++i) {
        const int at = place_of(i % kUnit, kh, i / kUnit);
        taps[i / kUnit][i % kUnit] = to_acc(words[at / kUnit].v[at % kUnit]);
      }
    };
#pragma unroll
    for (int row = 0; row < kStride + kKernel; ++row, x += row_pitch) {
      if (row < kKernel) unpack_taps(row, upper);
      if (row >= kStride) unpack_taps(row - kStride, lower);
      if (row < kStride) patch_row<true, false, T, kUnit, kKernel, kStride>(x, upper, lower, z);
      if (row >= kStride && row < kKernel) patch_row<true, true, T, kUnit, kKernel, kStride>(x, upper, lower, z);
      if (row >= kKernel) patch_row<false, true, T, kUnit, kKernel, kStride>(x, upper, lower, z);
    }
    return;
  }
  // A row of x in flight at a time: more would spill.
  const auto load_taps = [&](int kh, float (&taps)[kKernel][kUnit]) {
#pragma unroll
    for (int i = 0; i < kKernel * kUnit; ++i) {
      taps[i / kUnit][i % kUnit] = to_acc(weight[place_of(i % kUnit, kh, i / kUnit)]);
    }
  };
#pragma unroll 1
  for (int row = 0; row < kStride; ++row, x += row_pitch) {
    load_taps(row, upper);
    patch_row<true, false, T, kUnit, kKernel, kStride>(x, upper, lower, z);
  }
#pragma unroll 1
  for (int row = kStride; row < kKernel; ++row, x += row_pitch) {
    load_taps(row - kStride, lower);
    // At stride 2 the row is read once for each row of outputs: the taps of both beside eleven values would spill.
    if constexpr (kStride == 2) patch_row<false, true, T, kUnit, kKernel, kStride>(x, upper, lower, z);
    load_taps(row, upper);
    patch_row<true, kStride == 1, T, kUnit, kKernel, kStride>(x, upper, lower, z);
  }
#pragma unroll 1
  for (int row = kKernel; row < kKernel + kStride; ++row, x += row_pitch) {
    load_taps(row - kStride, lower);
    patch_row<false, true, T, kUnit, kKernel, kStride>(x, upper, lower, z);
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

// Two such strips side by side, z[row][column], of 2-byte types: their columns by words of two. x: the first of them;
// `odd`: it is the second column of its word. The sums are those of column_strip.
template <typename T, int kKernel, int kStride>
DSCONV_DEVICE void column_pair(const unsigned char* x, bool odd, int32_t row_pitch, const T* weight,
                               float (&z)[2 * kStripPixels]) {
  static_assert(sizeof(T) == 2, "two columns a word");
  constexpr int kColumns = kStride + kKernel, kWords = (kColumns + 1) / 2, kLoads = (kColumns + 2) / 2;
  float taps[kKernel][kKernel];
#pragma unroll
  for (int kh = 0; kh < kKernel; ++kh) {
#pragma unroll
    for (int kw = 0; kw < kKernel; ++kw) taps[kh][kw] = to_acc(weight[kh * kKernel + kw]);
  }
  if (odd) x -= sizeof(T);
#pragma unroll
  for (int r = 0; r < (kStripPixels - 1) * kStride + kKernel; ++r) {
    uint32_t words[kLoads + 1] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (i < kWords || odd) words[i] = *reinterpret_cast<const uint32_t*>(x + 4 * i);
    }
    x += row_pitch;
    float row[2 * kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t word = odd ? words[i] >> 16 | words[i + 1] << 16 : words[i];
      row[2 * i] = to_acc(T{static_cast<uint16_t>(word)});
      row[2 * i + 1] = to_acc(T{static_cast<uint16_t>(word >> 16)});
    }
#pragma unroll
    for (int i = 0; i < kStripPixels; ++i) {
      const int kh = r - i * kStride;
      if (kh < 0 || kh >= kKernel) continue;
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        float sum = 0;
#pragma unroll
        for (int kw = 0; kw < kKernel; ++kw) sum = fused_multiply_add(row[column * kStride + kw], taps[kh][kw], sum);
        z[2 * i + column] += sum;
      }
    }
  }
}

template <typename T, bool kAlongC, int kUnit, int kKernel, int kStride, int kValues>
DSCONV_DEVICE void unrolled_item(const unsigned char* x, int32_t row_pitch, const T* weight, float (&z)[kValues]) {
  if constexpr (kAlongC) {
    unrolled_patch<T, kUnit, kKernel, kStride>(x, row_pitch, weight, z);
  } else if constexpr (kValues == 2 * kStripPixels) {
    column_pair<T, kKernel, kStride>(x, (reinterpret_cast<uintptr_t>(x) & 2) != 0, row_pitch, weight, z);
  } else {
    column_strip<T, kKernel, kStride>(x, row_pitch, weight, z);
  }
}

// Any kernel; weight_unit: elements from a channel's taps to the next one's. kRuns runs of four pixels, run_pitch bytes
// apart. At stride and dilation 1 along a run the window slides: one load a tap.
template <typename T, int kUnit, int kRuns>
DSCONV_DEVICE void looped_item(const unsigned char* x, int32_t run_pitch, const T* weight, int32_t weight_unit,
                               const StripSteps& s, float (&z)[kRuns * 4 * kUnit]) {
  const bool slides = s.stride_a == 1 && s.dilation_a == 1;
#pragma unroll 1
  for (int32_t b = 0; b < s.taps_b; ++b) {
    const unsigned char* row = x + b * s.pitch_b;
    float window[kRuns][4][kUnit];
    if (slides) {
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
#pragma unroll
        for (int i = 1; i < 4; ++i) load_unit<T, kUnit>(row + r * run_pitch + (i - 1) * s.pitch_a, window[r][i]);
      }
    }
#pragma unroll 1
    for (int32_t a = 0; a < s.taps_a; ++a) {
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        if (slides) {
#pragma unroll
          for (int i = 0; i < 3; ++i) {
#pragma unroll
            for (int u = 0; u < kUnit; ++u) window[r][i][u] = window[r][i + 1][u];
          }
          load_unit<T, kUnit>(row + r * run_pitch + (a + 3) * s.pitch_a, window[r][3]);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            load_unit<T, kUnit>(row + r * run_pitch + (i * s.stride_a + a * s.dilation_a) * s.pitch_a, window[r][i]);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kUnit; ++u) {
        const float tap = to_acc(weight[u * weight_unit + a * s.weight_a + b * s.weight_b]);
#pragma unroll
        for (int i = 0; i < 4 * kRuns; ++i) {
          z[i * kUnit + u] = fused_multiply_add(window[i / 4][i % 4][u], tap, z[i * kUnit + u]);
        }
      }
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
  DSCONV_DEVICE int64_t* offsets() const { return reinterpret_cast<int64_t*>(shared + tables.offsets); }

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
          pair<kZeroed>(middle, strips()[thread % kPairs * 2], k, c0, staged, taps, tile);
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
          unrolled_item<T, kAlongC, kUnit, 3, 1>(x, box.row_pitch, weight, z);
          break;
        case BoxKernel::k3s2:
          unrolled_item<T, kAlongC, kUnit, 3, 2>(x, box.row_pitch, weight, z);
          break;
        case BoxKernel::k5s1:
          unrolled_item<T, kAlongC, kUnit, 5, 1>(x, box.row_pitch, weight, z);
          break;
        case BoxKernel::k5s2:
          unrolled_item<T, kAlongC, kUnit, 5, 2>(x, box.row_pitch, weight, z);
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
      Vec<T, 2> operands;
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const bool zero = kZeroed && offsets()[slot + column] < 0;
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
