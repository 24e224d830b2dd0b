// The depthwise stage as a part of a block: z of a tile of channels x pixels, computed from x, put into shared memory.
//
//   z[c][q] = dw_bias[c] + sum over taps (kd, kh, kw) of dw_weight[c][kd][kh][kw] * x[n, c / multiplier, d, row, col]
//       row = oh * stride_h - pad_top + kh * dilation_h,   d and col likewise; a tap outside x adds nothing
//
// In 2-D there is one slice, and one kd. In 3-D the taps of each kd are a kernel of their own, on another slice of x.
//
// Thread ownership: an item is one channel x 4 pixels, so that a tap's weight is loaded once for 4 multiply-adds.
//
//   x unit-strided along w: lanes along the pixels         x unit-strided along c: lanes along the channels
//        pixel  0  1  2 .. | 16 17 18 ..  (kPixels / 4)         channel  0  1  2  3 ..
//   channel 0   t0 t1 t2   | t0 t1 t2                      pixels 0-3   t0 t1 t2 t3
//           1   t16 ...                                           4-7   t32 ...
//
// Every global load of x is then coalesced. x comes through L1: neighbouring pixels share their taps there.
#pragma once

#include "activation.cuh"
#include "dtype.cuh"
#include "pixel.cuh"

namespace dsconv {

template <typename T>
struct DepthwiseInput {
  const T* x;          // [n, c_in, d_in, h_in, w_in], x_strides
  const T* dw_weight;  // [c_mid, kernel_d, kernel_h, kernel_w]
  const T* dw_bias;    // [c_mid] or null
  const Geometry& geom;
  const Strides& strides;
  Layout layout;
  Activation act;
};

// Of ForwardParams or BackwardParams.
template <typename T, typename Params>
DSCONV_DEVICE DepthwiseInput<T> depthwise_input(const Params& p) {
  return {static_cast<const T*>(p.x),
          static_cast<const T*>(p.dw_weight),
          static_cast<const T*>(p.dw_bias),
          p.geom,
          p.x_strides,
          p.x_layout,
          p.act};
}

constexpr int kStrip = 4;  // pixels of one item

// Adds one channel's taps of one kd at kStrip windows to z, each row of taps summed apart: rounding errors grow with
// the length of a chain of additions, and a kernel may have hundreds of taps. kKernel is the extent of a square kernel,
// 0 for any other.
template <int kKernel, typename T>
DSCONV_DEVICE void accumulate_taps(const T* x, const T* weight, const Window (&windows)[kStrip], const Geometry& g,
                                   const Strides& strides, acc_t<T> (&z)[kStrip]) {
  const int32_t kernel_h = kKernel > 0 ? kKernel : static_cast<int32_t>(g.kernel_h);
  const int32_t kernel_w = kKernel > 0 ? kKernel : static_cast<int32_t>(g.kernel_w);
  const int32_t dilation_h = static_cast<int32_t>(g.dilation_h), dilation_w = static_cast<int32_t>(g.dilation_w);
  const int32_t h_in = static_cast<int32_t>(g.h_in), w_in = static_cast<int32_t>(g.w_in);
  // Three taps of a row are in flight at a time; all rows, or a row of five, would spill.
  [[maybe_unused]] constexpr int kUnroll = kKernel == 3 ? 3 : 1;
#pragma unroll 1
  for (int32_t kh = 0; kh < kernel_h; ++kh) {
    acc_t<T> row_sum[kStrip] = {};
    const int64_t row_offset = kh * g.dilation_h * strides.h;
#pragma unroll kUnroll
    for (int32_t kw = 0; kw < kernel_w; ++kw) {
      const acc_t<T> tap = to_acc(weight[kh * kernel_w + kw]);
      const int64_t tap_offset = row_offset + kw * g.dilation_w * strides.w;
#pragma unroll
      for (int i = 0; i < kStrip; ++i) {
        const Window& window = windows[i];
        if (inside(window.row + kh * dilation_h, h_in) && inside(window.col + kw * dilation_w, w_in)) {
          row_sum[i] = fused_multiply_add(to_acc(x[window.offset + tap_offset]), tap, row_sum[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kStrip; ++i) z[i] += row_sum[i];
  }
}

// What is put into shared memory: act(z), or act'(z) for the backward of the activation.
enum class Middle { value, derivative };

// Fills tile[channel * kChannelStride + pixel * kPixelStride] for kChannels channels from c0 on and the pixels of
// `windows` (shared memory, kPixels of them). Channels from c_mid on are zero. The caller puts the barriers.
template <int kKernel, int kChannels, int kPixels, int kChannelStride, int kPixelStride, int kThreads, typename T>
DSCONV_DEVICE void depthwise_tile(const DepthwiseInput<T>& in, Middle middle, int32_t c0, const Window* windows,
                                  acc_t<T>* tile) {
  constexpr int kStrips = kPixels / kStrip, kItems = kChannels * kStrips;
  static_assert(kPixels % kStrip == 0 && kItems % kThreads == 0, "every thread has the same number of items");
  const bool along_w = in.layout == Layout::nchw;
  const int32_t c_mid = static_cast<int32_t>(in.geom.c_mid), multiplier = static_cast<int32_t>(in.geom.multiplier);
  const int64_t plane_taps = in.geom.kernel_h * in.geom.kernel_w;
  const int32_t kernel_d = static_cast<int32_t>(in.geom.kernel_d), d_in = static_cast<int32_t>(in.geom.d_in);
#pragma unroll 1
  for (int item = static_cast<int>(threadIdx.x); item < kItems; item += kThreads) {
    const int channel = along_w ? item / kStrips : item % kChannels;
    const int first = along_w ? item % kStrips : item / kChannels * kStrip;
    const int step = along_w ? kStrips : 1;
    const int32_t c = c0 + channel;
    acc_t<T> z[kStrip] = {};
    if (c < c_mid) {
      const acc_t<T> bias = in.dw_bias != nullptr ? to_acc(in.dw_bias[c]) : acc_t<T>(0);
#pragma unroll
      for (int i = 0; i < kStrip; ++i) z[i] = bias;
#pragma unroll 1
      for (int32_t kd = 0; kd < kernel_d; ++kd) {
        // Made anew for each kd: what is kept over accumulate_taps takes registers from it.
        const T* x = in.x + (multiplier == 1 ? c : c / multiplier) * in.strides.c;
        const T* weight = in.dw_weight + (int64_t{c} * kernel_d + kd) * plane_taps;
        const int32_t step_d = kd * static_cast<int32_t>(in.geom.dilation_d);
        Window strip[kStrip];
#pragma unroll
        for (int i = 0; i < kStrip; ++i) {
          strip[i] = windows[first + i * step];
          if (!inside(strip[i].depth + step_d, d_in)) strip[i].row = static_cast<int32_t>(in.geom.h_in);
        }
        accumulate_taps<kKernel>(x + step_d * in.strides.d, weight, strip, in.geom, in.strides, z);
      }
#pragma unroll
      for (int i = 0; i < kStrip; ++i) {
        z[i] = middle == Middle::value ? activate(in.act, z[i]) : activation_derivative(in.act, z[i]);
      }
    }
    acc_t<T>* out = tile + channel * kChannelStride + first * kPixelStride;
    if (kPixelStride == 1 && step == 1) {
      *reinterpret_cast<Vec<acc_t<T>, kStrip>*>(out) = {z[0], z[1], z[2], z[3]};
    } else {
#pragma unroll
      for (int i = 0; i < kStrip; ++i) out[i * step * kPixelStride] = z[i];
    }
  }
}

}  // namespace dsconv
