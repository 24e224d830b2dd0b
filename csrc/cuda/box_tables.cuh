// The tables of a box of output pixels (pixel_box.h), which a block fills once and keeps in shared memory: the pieces
// of x to stage, the corner of each strip or patch in what is staged, and where each slot's pixel lies in a tensor.
#pragma once

#include "cuda_plan.h"
#include "fragments.cuh"
#include "pixel.cuh"
#include "pixel_box.h"

namespace dsconv {

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
  if (box.pairs && i % 2 == 1) return;  // a pair's first strip says where both are
  StripPlace& strip = strips[box.pairs ? i / 2 : i];
  if (i >= count) {
    strip = {-1, static_cast<int16_t>(i * kItem), kAlongC ? 4 : 1};
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
  strip = {exists ? corner : -1, static_cast<int16_t>((slice * box.h + row) * box.w + column),
           static_cast<int16_t>(step)};
}

// Elements from a tensor's first to each slot's pixel, first channel; -1 for a slot without a pixel.
template <int kSlots>
DSCONV_DEVICE void fill_offsets(const PixelBox& box, const BoxPlace& place, const Geometry& g, const Strides& strides,
                                SlotOffsets offsets) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kSlots; i += kBlockThreads) {
    const Pixel pixel = pixel_of_slot(box, place, g, i);
    offsets[i] = pixel.n < 0 ? -1 : pixel_offset(pixel, strides);
  }
}

}  // namespace dsconv
