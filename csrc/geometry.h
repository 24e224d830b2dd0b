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

// x is n, c_in, h_in, w_in; dw_weight c_mid, 1, kernel_h, kernel_w; padding top, left, bottom, right.
inline Geometry geometry_of_sizes(const int64_t x[4], const int64_t dw_weight[4], int64_t c_out,
                                  const int64_t stride[2], const int64_t padding[4], const int64_t dilation[2]) {
  Geometry g{};
  g.n = x[0];
  g.c_in = x[1];
  g.h_in = x[2];
  g.w_in = x[3];
  g.c_mid = dw_weight[0];
  if (g.c_in <= 0 || g.c_mid <= 0 || g.c_mid % g.c_in != 0) {
    throw_invalid("dw_weight's channels must be a positive multiple of input's ", g.c_in, ", got ", g.c_mid);
  }
  g.multiplier = g.c_mid / g.c_in;
  g.c_out = c_out;
  g.kernel_h = dw_weight[2];
  g.kernel_w = dw_weight[3];
  g.stride_h = stride[0];
  g.stride_w = stride[1];
  g.pad_top = padding[0];
  g.pad_left = padding[1];
  g.dilation_h = dilation[0];
  g.dilation_w = dilation[1];
  g.h_out = output_extent("height", g.h_in, g.kernel_h, padding[0], padding[2], g.stride_h, g.dilation_h);
  g.w_out = output_extent("width", g.w_in, g.kernel_w, padding[1], padding[3], g.stride_w, g.dilation_w);
  // 16 bytes an element leaves room for every workspace that is computed from these sizes.
  const int64_t pixels = checked_product(checked_product(g.n, g.h_out), checked_product(g.w_out, 16));
  checked_product(pixels, g.c_mid);
  checked_product(pixels, g.c_out);
  return g;
}

}  // namespace dsconv
