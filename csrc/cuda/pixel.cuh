// Where an output pixel lies: the kernels number the pixels of all images in one row,
// q = ((n * d_out + od) * h_out + oh) * w_out + ow, and cut that row into tiles, so that small maps fill a tile as well
// as large ones. A tile decodes its pixels once into shared memory. In 2-D an image is one slice, od = 0.
#pragma once

#include <cstdint>

#include "../params.h"
#include "cuda_plan.h"
#include "dtype.cuh"
#include "portability.cuh"

namespace dsconv {

struct Pixel {
  int64_t n;
  int32_t depth, row, col;
};

// Quotient of two values >= 0: 32-bit division where both fit, several times cheaper on a GPU.
DSCONV_HOST_DEVICE int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// A slice of all images: which image, and which of its slices.
struct Slice {
  int64_t n;
  int32_t depth;
};

DSCONV_HOST_DEVICE Slice slice_at(int64_t slice, int64_t depth) {
  if (depth == 1) return {slice, 0};
  const int64_t n = quotient(slice, depth);
  return {n, static_cast<int32_t>(slice - n * depth)};
}

DSCONV_HOST_DEVICE Pixel pixel_at(int64_t q, int64_t depth, int64_t height, int64_t width) {
  const int64_t line = quotient(q, width);
  const int64_t slice = quotient(line, height);
  const Slice at = slice_at(slice, depth);
  return {at.n, at.depth, static_cast<int32_t>(line - slice * height), static_cast<int32_t>(q - line * width)};
}

DSCONV_HOST_DEVICE Pixel output_pixel_at(int64_t q, const Geometry& g) {
  return pixel_at(q, g.d_out, g.h_out, g.w_out);
}

// Elements from a tensor's first to the pixel of each slot of a tile, a table in shared memory. Neighbours are
// exchanged in groups of eight, so that a warp that reads every eighth entry (each lane a run of slots) finds 16 of
// them in different banks, as it does 16 neighbours.
struct SlotOffsets {
  int64_t* table;
  int first = 0;

  DSCONV_DEVICE int64_t& operator[](int slot) const {
    const int at = first + slot;
    return table[at ^ (at >> 4 & 7)];
  }
  DSCONV_DEVICE SlotOffsets operator+(int slots) const { return {table, first + slots}; }
  // Of an even slot and the next one, in one access.
  DSCONV_DEVICE Vec<int64_t, 2> two(int slot) const {
    const int at = first + slot, exchanged = at >> 4 & 7;
    const Vec<int64_t, 2> both = *reinterpret_cast<const Vec<int64_t, 2>*>(table + ((at ^ exchanged) & ~1));
    if ((exchanged & 1) == 0) return both;
    return {both.v[1], both.v[0]};
  }
};

// The receptive field of one output pixel: its front top left corner in x, which may lie in the padding.
struct Window {
  int64_t offset;           // elements from x's first channel to the corner; outside x where the corner is
  int32_t row, col, depth;  // of the corner; row = h_in for a pixel that is not there, so that no tap is inside
};
static_assert(sizeof(Window) == kPixelWindowBytes, "what the planner counts with");

DSCONV_DEVICE Window window_at(const Pixel& p, const Geometry& g, const Strides& x_strides) {
  const int64_t row = p.row * g.stride_h - g.pad_top, col = p.col * g.stride_w - g.pad_left;
  const int64_t depth = p.depth * g.stride_d - g.pad_front;
  return {p.n * x_strides.n + depth * x_strides.d + row * x_strides.h + col * x_strides.w, static_cast<int32_t>(row),
          static_cast<int32_t>(col), static_cast<int32_t>(depth)};
}

DSCONV_DEVICE Window window_at(int64_t q, int64_t pixel_count, const Geometry& g, const Strides& x_strides) {
  if (q >= pixel_count) return {0, static_cast<int32_t>(g.h_in), 0, 0};
  return window_at(output_pixel_at(q, g), g, x_strides);
}

DSCONV_HOST_DEVICE int64_t pixel_offset(const Pixel& p, const Strides& s) {
  return p.n * s.n + p.depth * s.d + p.row * s.h + p.col * s.w;
}

DSCONV_HOST_DEVICE bool inside(int32_t at, int32_t extent) {
  return static_cast<uint32_t>(at) < static_cast<uint32_t>(extent);
}

}  // namespace dsconv
