// The geometry of a call out of its sizes, for the host entries (op_args.h) and for the planners' queries
// (plan_query.h). Torch-free: what does not fit together throws std::invalid_argument.
//
//   span   = dilation * (kernel - 1) + 1                       input pixels that one output pixel reaches over
//   out    = (in + pad_before + pad_after - span) / stride + 1
#pragma once

#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "params.h"

namespace dsconv {

template <typename... Parts>
[[noreturn]] void throw_invalid(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

inline int64_t checked_product(int64_t a, int64_t b) {
  int64_t result = 0;
  if (__builtin_mul_overflow(a, b, &result)) throw_invalid("the sizes overflow 64 bits (", a, " * ", b, ")");
  return result;
}

inline int64_t output_extent(const char* axis, int64_t in, int64_t kernel, int64_t pad_before, int64_t pad_after,
                             int64_t stride, int64_t dilation) {
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max() / 4;
  if (kernel <= 0) throw_invalid("dw_weight has an empty kernel");
  if (stride <= 0 || dilation <= 0) throw_invalid("stride and dilation must be positive along ", axis);
  if (pad_before < 0 || pad_after < 0) throw_invalid("padding must not be negative along ", axis);
  if (in >= kMax || pad_before >= kMax || pad_after >= kMax) throw_invalid("the padded input overflows along ", axis);
  const int64_t span = checked_product(dilation, kernel - 1) + 1;
  const int64_t padded = in + pad_before + pad_after;
  if (padded < span) throw_invalid("kernel larger than the padded input along ", axis, ": ", span, " > ", padded);
  return (padded - span) / stride + 1;
}

// `count` numbers that go with the last axes of (depth, height, width), and `otherwise` for a depth that is not there.
inline void with_depth(const int64_t* of, int64_t count, int64_t otherwise, int64_t (&to)[3]) {
  to[0] = otherwise;
  for (int64_t i = 0; i < count; ++i) to[3 - count + i] = of[i];
}

// stride, padding and dilation of `dims` axes as the ops take them; act and out_act are left to the caller.
inline CallArguments call_arguments(int64_t dims, const int64_t* stride, const int64_t* padding,
                                    const int64_t* dilation) {
  CallArguments a{};
  a.dims = dims;
  int64_t before[3], after[3];
  with_depth(stride, dims, 1, a.stride);
  with_depth(dilation, dims, 1, a.dilation);
  with_depth(padding, dims, 0, before);
  with_depth(padding + dims, dims, 0, after);
  for (int i = 0; i < 3; ++i) a.padding[i] = before[i], a.padding[3 + i] = after[i];
  return a;
}

// x is n, c_in, [d_in,] h_in, w_in; dw_weight c_mid, 1, [kernel_d,] kernel_h, kernel_w.
inline Geometry geometry_of_sizes(const int64_t* x, const int64_t* dw_weight, int64_t c_out,
                                  const CallArguments& arguments) {
  const int64_t *stride = arguments.stride, *padding = arguments.padding, *dilation = arguments.dilation;
  int64_t in[3], kernel[3];
  with_depth(x + 2, arguments.dims, 1, in);
  with_depth(dw_weight + 2, arguments.dims, 1, kernel);
  Geometry g{};
  g.n = x[0];
  g.c_in = x[1];
  g.d_in = in[0];
  g.h_in = in[1];
  g.w_in = in[2];
  g.c_mid = dw_weight[0];
  if (g.c_in <= 0 || g.c_mid <= 0 || g.c_mid % g.c_in != 0) {
    throw_invalid("dw_weight's channels must be a positive multiple of input's ", g.c_in, ", got ", g.c_mid);
  }
  g.multiplier = g.c_mid / g.c_in;
  g.c_out = c_out;
  g.kernel_d = kernel[0];
  g.kernel_h = kernel[1];
  g.kernel_w = kernel[2];
  g.stride_d = stride[0];
  g.stride_h = stride[1];
  g.stride_w = stride[2];
  g.pad_front = padding[0];
  g.pad_top = padding[1];
  g.pad_left = padding[2];
  g.dilation_d = dilation[0];
  g.dilation_h = dilation[1];
  g.dilation_w = dilation[2];
  g.d_out = output_extent("depth", g.d_in, g.kernel_d, padding[0], padding[3], g.stride_d, g.dilation_d);
  g.h_out = output_extent("height", g.h_in, g.kernel_h, padding[1], padding[4], g.stride_h, g.dilation_h);
  g.w_out = output_extent("width", g.w_in, g.kernel_w, padding[2], padding[5], g.stride_w, g.dilation_w);
  // 16 bytes an element leaves room for every workspace that is computed from these sizes.
  const int64_t slices = checked_product(g.n, g.d_out);
  const int64_t pixels = checked_product(checked_product(slices, g.h_out), checked_product(g.w_out, 16));
  checked_product(pixels, g.c_mid);
  checked_product(pixels, g.c_out);
  return g;
}

}  // namespace dsconv
