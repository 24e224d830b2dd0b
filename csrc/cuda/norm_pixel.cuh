// The passes of norm_plan.h over z in float64, made tap by tap where it is read: a block has one channel of one split
// of the pixels, each thread every kBlockThreads-th of them. Correct in every geometry, and not made to be quick.
//
// Shared memory: kTotalsDoubles. Global traffic: the taps of x for each z, through L1.
#pragma once

#include "launch_blocks.cuh"
#include "norm_channel.cuh"
#include "pixel.cuh"

namespace dsconv {

DSCONV_DEVICE double z_at(const NormSource& source, int64_t c, const Pixel& p) {
  const Geometry& g = source.geom;
  const int64_t row = p.row * g.stride_h - g.pad_top, col = p.col * g.stride_w - g.pad_left;
  const int64_t depth = p.depth * g.stride_d - g.pad_front;
  const double* x = static_cast<const double*>(source.x) + p.n * source.x_strides.n;
  x += c / g.multiplier * source.x_strides.c;
  const double* weight = static_cast<const double*>(source.dw_weight) + c * tap_count(g);
  const double* bias = static_cast<const double*>(source.dw_bias);
  double z = bias != nullptr ? bias[c] : 0;
  for (int64_t kd = 0; kd < g.kernel_d; ++kd) {
    const int64_t s = depth + kd * g.dilation_d;
    if (s < 0 || s >= g.d_in) continue;
    for (int64_t kh = 0; kh < g.kernel_h; ++kh) {
      const int64_t r = row + kh * g.dilation_h;
      if (r < 0 || r >= g.h_in) continue;
      const double* x_row = x + s * source.x_strides.d + r * source.x_strides.h;
      const double* weight_row = weight + (kd * g.kernel_h + kh) * g.kernel_w;
      double row_sum = 0;
      for (int64_t kw = 0; kw < g.kernel_w; ++kw) {
        const int64_t q = col + kw * g.dilation_w;
        if (q < 0 || q >= g.w_in) continue;
        row_sum = fused_multiply_add(x_row[q * source.x_strides.w], weight_row[kw], row_sum);
      }
      z += row_sum;
    }
  }
  return z;
}

template <NormUse kUse>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2) norm_pixel_kernel(NormPass pass, NormPlan plan) {
  const NormSource& source = pass.source;
  const int64_t split = blockIdx.x / plan.groups, c = blockIdx.x - split * plan.groups, plane = plan.image;
  const int thread = static_cast<int>(threadIdx.x);
  ChannelWork<double, kUse> work;
  work.begin(pass, c);
  const int64_t end = split_begin(plan.units, split + 1, plan.splits);
#pragma unroll 1
  for (int64_t q = split_begin(plan.units, split, plan.splits) + thread; q < end; q += kBlockThreads) {
    const Pixel pixel = pixel_at(q, source.d, source.h, source.w);
    const int64_t at = source.layout == Layout::nhwc ? q * source.channels + c
                                                     : (pixel.n * source.channels + c) * plane + (q - pixel.n * plane);
    const double values[1] = {z_at(source, c, pixel)};
    double grads[1] = {};
    if constexpr (kUse != NormUse::moments) grads[0] = static_cast<const double*>(pass.grad)[at];
    work.take(pass, 1, values, grads);
    if constexpr (kUse == NormUse::backward) static_cast<double*>(pass.out)[at] = grads[0];
  }
  if constexpr (kIsSum<kUse>) {
    DSCONV_SHARED(double, scratch, kTotalsDoubles);
    const Totals total[1] = {
        totals_of_threads<kUse == NormUse::moments>(work.totals(), thread, 1, kBlockThreads, scratch)};
    if (thread == 0) write_totals(pass, split, c, total);
  }
}

}  // namespace dsconv
