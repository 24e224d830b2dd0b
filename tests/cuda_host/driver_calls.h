// The matrix of calls that the driver makes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <vector>

#include "../../csrc/params.h"

namespace driver {

using namespace dsconv;

constexpr DType kTypes[] = {DType::f32, DType::f64, DType::f16, DType::bf16};

struct Shape {
  const char* name;
  int64_t n, c_in, multiplier, c_out, h, w;
  int64_t kernel_h, kernel_w, stride_h, stride_w;
  int64_t pad_top, pad_left, pad_bottom, pad_right;
  int64_t dilation_h, dilation_w;
  // Along the depth; of 2-D shapes what is here.
  int64_t d = 1, kernel_d = 1, stride_d = 1, pad_front = 0, pad_back = 0, dilation_d = 1;
};

// clang-format off
constexpr Shape kShapes[] = {
    //                  n  c  m   o   h   w   k k   s s   padding   d d
    {"layer",           1, 32, 1, 64, 28, 28, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1},
    {"one of all",      1, 1,  1, 1,  1,  1,  1, 1, 1, 1, 0, 0, 0, 0, 1, 1},
    {"1x1",             2, 5,  1, 7,  5,  3,  1, 1, 1, 1, 0, 0, 0, 0, 1, 1},
    {"odd channels",    2, 5,  1, 7,  7,  11, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1},
    {"odd pixels",      3, 8,  1, 16, 7,  5,  3, 3, 1, 1, 1, 1, 1, 1, 1, 1},
    {"depth + 1",       1, 33, 1, 31, 6,  9,  3, 3, 1, 1, 1, 1, 1, 1, 1, 1},
    {"wide outputs",    1, 16, 1, 129, 5, 13, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1},
    {"many pixels",     2, 4,  1, 3,  17, 19, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1},
    {"stride 2",        2, 6,  1, 10, 11, 9,  3, 3, 2, 2, 1, 1, 1, 1, 1, 1},
    {"strides 3, 2",    1, 7,  1, 5,  13, 12, 3, 3, 3, 2, 0, 1, 1, 0, 1, 1},
    {"stride > kernel", 1, 3,  1, 4,  9,  10, 2, 2, 3, 4, 0, 0, 0, 0, 1, 1},
    {"dilation",        1, 6,  1, 9,  12, 11, 3, 3, 1, 1, 2, 3, 2, 3, 2, 3},
    {"dilated, strided", 1, 4, 1, 8,  13, 13, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2},
    {"no padding",      1, 9,  1, 6,  8,  7,  3, 3, 1, 1, 0, 0, 0, 0, 1, 1},
    {"lopsided padding", 1, 5, 1, 6,  6,  6,  3, 3, 1, 1, 2, 0, 0, 2, 1, 1},
    {"5x5",             1, 12, 1, 11, 9,  10, 5, 5, 1, 1, 2, 2, 2, 2, 1, 1},
    {"5x5 stride 2",    2, 8,  1, 12, 10, 9,  5, 5, 2, 2, 2, 2, 2, 2, 1, 1},
    {"even kernel",     1, 5,  1, 6,  8,  9,  4, 2, 1, 1, 1, 1, 2, 0, 1, 1},
    {"1x7",             1, 6,  1, 8,  4,  16, 1, 7, 1, 1, 0, 3, 0, 3, 1, 1},
    {"7x7",             1, 4,  1, 6,  9,  8,  7, 7, 1, 1, 3, 3, 3, 3, 1, 1},
    {"all padding",     1, 3,  1, 4,  2,  2,  5, 5, 1, 1, 4, 4, 4, 4, 1, 1},
    {"multiplier 2",    1, 5,  2, 7,  6,  7,  3, 3, 1, 1, 1, 1, 1, 1, 1, 1},
    {"multiplier 3",    2, 4,  3, 10, 5,  6,  5, 5, 1, 1, 2, 2, 2, 2, 1, 1},
    {"1x1 image",       4, 17, 1, 19, 1,  1,  3, 3, 1, 1, 1, 1, 1, 1, 1, 1},
    {"whole tiles",     1, 64, 1, 128, 8, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1},
    //                                                                        d  k  s  padding d
    {"3x3x3",           2, 6,  1, 9,  7,  9,  3, 3, 1, 1, 1, 1, 1, 1, 1, 1,   4, 3, 1, 1, 1, 1},
    {"3x3x3 stride 2",  1, 33, 1, 5,  6,  5,  3, 3, 2, 2, 1, 1, 1, 1, 1, 1,   5, 3, 2, 1, 1, 1},
    {"odd depth",       2, 5,  2, 6,  5,  8,  2, 4, 1, 3, 1, 2, 0, 1, 1, 1,   7, 2, 3, 3, 0, 2},
    {"along the depth", 2, 8,  1, 7,  3,  3,  1, 1, 1, 1, 0, 0, 0, 0, 1, 1,   6, 5, 1, 4, 4, 1},
    {"5x5x6",           1, 4,  1, 3,  6,  9,  5, 6, 1, 1, 2, 2, 2, 3, 1, 1,   3, 5, 1, 2, 2, 1},
    // Around the widest tiles of backward on tensor cores.
    {"wide tiles",      2, 128, 1, 128, 6, 11, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1},
    {"wide tiles + 1",  1, 129, 1, 129, 5, 7, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1},
    {"wide tiles - 1",  1, 127, 1, 127, 9, 8, 5, 5, 2, 2, 2, 2, 2, 2, 1, 1},
    {"wide, boxes",     9, 72,  1, 66, 8, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1},
    {"wide, 2 chunks",  3, 161, 1, 193, 7, 7, 1, 3, 1, 1, 0, 1, 0, 1, 1, 1},
    {"wide, tall",      1, 96,  1, 192, 19, 4, 7, 7, 1, 1, 3, 3, 3, 3, 1, 1},
    {"wide, stride 2",  2, 80,  1, 80, 13, 9, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1},
    // No cells of x, so nothing that is made by planes.
    {"5x5 dilated, strided", 2, 6, 1, 9, 13, 12, 5, 5, 2, 2, 4, 4, 4, 4, 2, 2},
};
// clang-format on

// One call: a shape, and what else there is to choose, all turned over from call to call.
struct Call {
  int number;
  const Shape* shape;
  DType type;
  bool tf32;  // of float32
  Layout x_layout, y_layout, dy_layout, grad_x_layout;
  Activation act, out_act;
  bool dw_bias, pw_bias, pre, padded_x;
  int64_t grad_mask;
};

inline std::vector<Call> all_calls() {
  std::vector<Call> calls;
  int number = 0;
  const auto add = [&](const Shape& shape, DType type, bool tf32) {
    const int i = number++;
    const auto layout = [&](int bit) { return (i * 5 + i / 4 * 3) >> bit & 1 ? Layout::nhwc : Layout::nchw; };
    // All gradients mostly, then each alone and each left out.
    constexpr int64_t kMasks[] = {31, 31, 1, 31, 2, 31, 4, 31, 8, 31, 16, 31, 30, 29, 27, 23, 15};
    calls.push_back({i, &shape, type, tf32, layout(0), layout(1), layout(2), layout(3),
                     static_cast<Activation>(i * 7 % kActivationCount),
                     static_cast<Activation>(i % 3 == 0 ? 0 : i * 4 % kActivationCount), i % 5 != 0, i % 7 != 0,
                     i % 2 == 1, i % 3 == 1, kMasks[i % 17]});
  };
  for (const Shape& shape : kShapes) {
    for (const DType type : kTypes) add(shape, type, false);
  }
  for (std::size_t i = 0; i < std::size(kShapes); i += 2) add(kShapes[i], DType::f32, true);
  return calls;
}

inline Geometry geometry_of(const Shape& s) {
  const auto out = [](int64_t in, int64_t kernel, int64_t pad, int64_t stride, int64_t dilation) {
    return (in + pad - (dilation * (kernel - 1) + 1)) / stride + 1;
  };
  Geometry g{};
  g.n = s.n;
  g.c_in = s.c_in;
  g.multiplier = s.multiplier;
  g.c_mid = s.c_in * s.multiplier;
  g.c_out = s.c_out;
  g.d_in = s.d;
  g.kernel_d = s.kernel_d;
  g.stride_d = s.stride_d;
  g.pad_front = s.pad_front;
  g.dilation_d = s.dilation_d;
  g.d_out = out(s.d, s.kernel_d, s.pad_front + s.pad_back, s.stride_d, s.dilation_d);
  g.h_in = s.h;
  g.w_in = s.w;
  g.kernel_h = s.kernel_h;
  g.kernel_w = s.kernel_w;
  g.stride_h = s.stride_h;
  g.stride_w = s.stride_w;
  g.pad_top = s.pad_top;
  g.pad_left = s.pad_left;
  g.dilation_h = s.dilation_h;
  g.dilation_w = s.dilation_w;
  g.h_out = out(s.h, s.kernel_h, s.pad_top + s.pad_bottom, s.stride_h, s.dilation_h);
  g.w_out = out(s.w, s.kernel_w, s.pad_left + s.pad_right, s.stride_w, s.dilation_w);
  return g;
}

}  // namespace driver
