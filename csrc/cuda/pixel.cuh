// Where an output pixel lies: the kernels number the pixels of all images in one row, q = (n * h_out + oh) * w_out +
// ow, and cut that row into tiles, so that small maps fill a tile as well as large ones. A tile decodes its pixels once
// into shared memory.
#pragma once

#include <cstdint>

#include "../params.h"
#include "portability.cuh"

namespace dsconv {

struct Pixel {
  int64_t n;
  int32_t row, col;
};

// Quotient of two values >= 0: 32-bit division where both fit, several times cheaper on a GPU.
DSCONV_HOST_DEVICE int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

DSCONV_HOST_DEVICE Pixel pixel_at(int64_t q, int64_t height, int64_t width) {
  const int64_t line = quotient(q, width);
  const int64_t n = quotient(line, height);
  return {n, static_cast<int32_t>(line - n * height), static_cast<int32_t>(q - line * width)};
}

// The receptive field of one output pixel: its top left corner in x, which may lie in the padding.
struct alignas(16) Window {
  int64_t offset;    // elements from x's first channel to the corner; outside x where the corner is
  int32_t row, col;  // of the corner; row = h_in for a pixel that is not there, so that no tap is inside
};

DSCONV_DEVICE Window window_at(const Pixel& p, const Geometry& g, const Strides& x_strides) {
  const int64_t row = p.row * g.stride_h - g.pad_top, col = p.col * g.stride_w - g.pad_left;
  return {p.n * x_strides.n + row * x_strides.h + col * x_strides.w, static_cast<int32_t>(row),
          static_cast<int32_t>(col)};
}

DSCONV_DEVICE Window window_at(int64_t q, int64_t pixel_count, const Geometry& g, const Strides& x_strides) {
  if (q >= pixel_count) return {0, static_cast<int32_t>(g.h_in), 0};
  return window_at(pixel_at(q, g.h_out, g.w_out), g, x_strides);
}

DSCONV_HOST_DEVICE int64_t pixel_offset(const Pixel& p, const Strides& s) {
  return p.n * s.n + p.row * s.h + p.col * s.w;
}

DSCONV_HOST_DEVICE bool inside(int32_t at, int32_t extent) {
  return static_cast<uint32_t>(at) < static_cast<uint32_t>(extent);
}

}  // namespace dsconv
