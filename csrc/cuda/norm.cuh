// Passes over a tensor before a norm and an activation, out = act(gamma * vhat + beta), vhat = (v - mean) * invstd, and
// the sums over its pixels. v is a tensor, or z, which is made from x where it is read and never written.
//
//   sums: a block sums one channel over one split of the pixels, each thread every kBlockThreads-th of them; threads
//   are added in shared memory in double, splits in their order by a second kernel.
//
//     block = split * channels + channel       partial [splits][2][channels]
//
//   Moments are relative to the split's first value, then about its mean; splits merge by Chan's formula.
//
//   maps: a thread a value, in the order of memory.
//
// Shared memory: kBlockThreads doubles. Global traffic: v once for the maps and the sums, twice for the moments, and
// the taps of x for each z, through L1.
#pragma once

#include "activation.cuh"
#include "cuda_norm.h"
#include "dtype.cuh"
#include "launch_blocks.cuh"
#include "pixel.cuh"

namespace dsconv {

template <typename T>
DSCONV_DEVICE acc_t<T> source_at(const NormSource& source, int64_t c, const Pixel& p) {
  if (!source.from_x) {
    return to_acc(static_cast<const T*>(source.v)[pixel_offset(p, source.v_strides) + c * source.v_strides.c]);
  }
  const Geometry& g = source.geom;
  const int64_t row = p.row * g.stride_h - g.pad_top, col = p.col * g.stride_w - g.pad_left;
  const int64_t depth = p.depth * g.stride_d - g.pad_front;
  const T* x = static_cast<const T*>(source.x) + p.n * source.x_strides.n + c / g.multiplier * source.x_strides.c;
  const T* weight = static_cast<const T*>(source.dw_weight) + c * tap_count(g);
  const T* bias = static_cast<const T*>(source.dw_bias);
  acc_t<T> z = bias != nullptr ? to_acc(bias[c]) : acc_t<T>(0);
  for (int64_t kd = 0; kd < g.kernel_d; ++kd) {
    const int64_t s = depth + kd * g.dilation_d;
    if (s < 0 || s >= g.d_in) continue;
    for (int64_t kh = 0; kh < g.kernel_h; ++kh) {
      const int64_t r = row + kh * g.dilation_h;
      if (r < 0 || r >= g.h_in) continue;
      const T* x_row = x + s * source.x_strides.d + r * source.x_strides.h;
      const T* weight_row = weight + (kd * g.kernel_h + kh) * g.kernel_w;
      acc_t<T> row_sum = 0;
      for (int64_t kw = 0; kw < g.kernel_w; ++kw) {
        const int64_t q = col + kw * g.dilation_w;
        if (q < 0 || q >= g.w_in) continue;
        row_sum = fused_multiply_add(to_acc(x_row[q * source.x_strides.w]), to_acc(weight_row[kw]), row_sum);
      }
      z += row_sum;
    }
  }
  return z;
}

DSCONV_DEVICE Pixel source_pixel_at(int64_t q, const NormSource& source) {
  return pixel_at(q, source.d, source.h, source.w);
}

// The norm of one channel.
template <typename Acc>
struct ChannelNorm {
  Acc mean, invstd, gamma, beta;

  DSCONV_DEVICE Acc standardised(Acc v) const { return (v - mean) * invstd; }
  DSCONV_DEVICE Acc affine(Acc hat) const { return gamma * hat + beta; }
};
template <typename Acc>
DSCONV_DEVICE ChannelNorm<Acc> channel_norm(const NormPass& pass, int64_t c) {
  const int64_t channels = pass.source.channels;
  const double* at = pass.vectors + c;
  return {static_cast<Acc>(at[0]), static_cast<Acc>(at[channels]), static_cast<Acc>(at[2 * channels]),
          static_cast<Acc>(at[3 * channels])};
}

template <typename T>
DSCONV_DEVICE acc_t<T> gradient_at(const NormPass& pass, int64_t c, const Pixel& p, const ChannelNorm<acc_t<T>>& norm,
                                   acc_t<T> hat) {
  const T* grad = static_cast<const T*>(pass.grad) + pixel_offset(p, pass.grad_strides) + c * pass.grad_strides.c;
  return to_acc(*grad) * activation_derivative(pass.act, norm.affine(hat));
}

// Every thread of the block gets the sum of all threads' values.
DSCONV_DEVICE double sum_of_block(double value, double* scratch) {
  const unsigned thread = threadIdx.x;
  scratch[thread] = value;
  __syncthreads();
  for (unsigned half = kBlockThreads / 2; half > 0; half /= 2) {
    if (thread < half) scratch[thread] += scratch[thread + half];
    __syncthreads();
  }
  const double sum = scratch[0];
  __syncthreads();
  return sum;
}

struct SplitRange {
  int64_t channel, split, begin, end;
};
DSCONV_DEVICE SplitRange split_of_block(const NormPass& pass) {
  const int64_t block = blockIdx.x, channels = pass.source.channels, split = block / channels;
  const int64_t pixels = source_pixels(pass.source);
  return {block % channels, split, pixels * split / pass.splits, pixels * (split + 1) / pass.splits};
}

template <typename T>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2) norm_moments_kernel(NormPass pass) {
  using Acc = acc_t<T>;
  DSCONV_SHARED(double, scratch, kBlockThreads);
  const NormSource& source = pass.source;
  const SplitRange range = split_of_block(pass);
  const int64_t c = range.channel, first = range.begin + threadIdx.x;
  const double count = static_cast<double>(range.end - range.begin);
  const Acc shift = source_at<T>(source, c, source_pixel_at(range.begin, source));
  Acc sum = 0;
  for (int64_t q = first; q < range.end; q += kBlockThreads) {
    sum += source_at<T>(source, c, source_pixel_at(q, source)) - shift;
  }
  const double mean = sum_of_block(static_cast<double>(sum), scratch) / count;
  Acc squares = 0;
  for (int64_t q = first; q < range.end; q += kBlockThreads) {
    const Acc d = (source_at<T>(source, c, source_pixel_at(q, source)) - shift) - static_cast<Acc>(mean);
    squares += d * d;
  }
  const double m2 = sum_of_block(static_cast<double>(squares), scratch);
  if (threadIdx.x != 0) return;
  double* to = pass.partial + range.split * 2 * source.channels + c;
  to[0] = static_cast<double>(shift) + mean;
  to[source.channels] = m2;
}

template <typename T>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2) norm_sums_kernel(NormPass pass) {
  using Acc = acc_t<T>;
  DSCONV_SHARED(double, scratch, kBlockThreads);
  const NormSource& source = pass.source;
  const SplitRange range = split_of_block(pass);
  const int64_t c = range.channel;
  const ChannelNorm<Acc> norm = channel_norm<Acc>(pass, c);
  Acc sum = 0, paired = 0;
  for (int64_t q = range.begin + threadIdx.x; q < range.end; q += kBlockThreads) {
    const Pixel p = source_pixel_at(q, source);
    const Acc hat = norm.standardised(source_at<T>(source, c, p));
    const Acc g = gradient_at<T>(pass, c, p, norm, hat);
    sum += g;
    paired += g * hat;
  }
  const double total = sum_of_block(static_cast<double>(sum), scratch);
  const double total_paired = sum_of_block(static_cast<double>(paired), scratch);
  if (threadIdx.x != 0) return;
  double* to = pass.partial + range.split * 2 * source.channels + c;
  to[0] = total;
  to[source.channels] = total_paired;
}

// One thread a channel.
template <bool kMoments>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2) norm_merge_kernel(NormPass pass) {
  const int64_t channels = pass.source.channels;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (c >= channels) return;
  const int64_t pixels = source_pixels(pass.source);
  double first = 0, second = 0, count = 0;
  for (int64_t split = 0; split < pass.splits; ++split) {
    const double* of = pass.partial + split * 2 * channels + c;
    if constexpr (kMoments) {
      const double more = static_cast<double>(pixels * (split + 1) / pass.splits - pixels * split / pass.splits);
      const double total = count + more, delta = of[0] - first;
      first += delta * (more / total);
      second += of[channels] + delta * delta * (count * more / total);
      count = total;
    } else {
      first += of[0];
      second += of[channels];
    }
  }
  pass.result[c] = first;
  pass.result[channels + c] = kMoments ? second / count : second;
}

struct Place {
  int64_t channel;
  Pixel pixel;
};
// Value number i, lanes along the dimension in which out has unit stride.
DSCONV_DEVICE Place place_of(const NormPass& pass, int64_t i) {
  const NormSource& source = pass.source;
  if (pass.out_strides.c == 1) {
    const int64_t q = quotient(i, source.channels);
    return {i - q * source.channels, source_pixel_at(q, source)};
  }
  const int64_t image = source.d * source.h * source.w, plane = quotient(i, image),
                n = quotient(plane, source.channels);
  Pixel p = source_pixel_at(i - plane * image, source);
  p.n = n;
  return {plane - n * source.channels, p};
}

template <typename T, bool kBackward>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2) norm_map_kernel(NormPass pass) {
  using Acc = acc_t<T>;
  const NormSource& source = pass.source;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (i >= source.channels * source_pixels(source)) return;
  const Place at = place_of(pass, i);
  const ChannelNorm<Acc> norm = channel_norm<Acc>(pass, at.channel);
  const Acc hat = norm.standardised(source_at<T>(source, at.channel, at.pixel));
  T* out = static_cast<T*>(pass.out) + pixel_offset(at.pixel, pass.out_strides) + at.channel * pass.out_strides.c;
  if constexpr (!kBackward) {
    *out = from_acc<T>(activate(pass.act, norm.affine(hat)));
  } else {
    Acc g = gradient_at<T>(pass, at.channel, at.pixel, norm, hat);
    if (pass.sums != nullptr) {
      const Acc across = static_cast<Acc>(pass.sums[at.channel] / pass.count);
      const Acc along = static_cast<Acc>(pass.sums[source.channels + at.channel] / pass.count);
      g = g - across - hat * along;
    }
    *out = from_acc<T>(norm.gamma * norm.invstd * g);
  }
}

template <typename T>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2) norm_fold_kernel(NormPass pass, int64_t taps, T* weight, T* bias) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x, channels = pass.source.channels;
  if (i >= channels * taps) return;
  const int64_t c = i / taps;
  const double* at = pass.vectors + c;
  const double scale = at[channels] * at[2 * channels];
  const T* from = static_cast<const T*>(pass.source.dw_weight);
  weight[i] = from_acc<T>(static_cast<acc_t<T>>(static_cast<double>(to_acc(from[i])) * scale));
  if (i % taps != 0) return;
  const T* given = static_cast<const T*>(pass.source.dw_bias);
  const double before = given != nullptr ? static_cast<double>(to_acc(given[c])) : 0;
  bias[c] = from_acc<T>(static_cast<acc_t<T>>((before - at[0]) * scale + at[3 * channels]));
}

// ----------------------------------------------------------------------------------------------------------- launchers

inline int64_t norm_values(const NormPass& pass) { return pass.source.channels * source_pixels(pass.source); }

template <bool kMoments>
LaunchStatus launch_sums(const char* name, void (*kernel)(NormPass), const NormPass& pass, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const LaunchStatus status = launch_blocks(name, kernel, pass.splits * pass.source.channels, 0, cuda_stream, pass);
  if (status.error != 0) return status;
  return launch_blocks("norm_merge", norm_merge_kernel<kMoments>, ceil_div(pass.source.channels, kBlockThreads), 0,
                       cuda_stream, pass);
}

template <DType kType>
LaunchStatus launch_norm_moments(const NormPass& pass, void* stream) {
  return launch_sums<true>("norm_moments", norm_moments_kernel<storage_t<kType>>, pass, stream);
}
template <DType kType>
LaunchStatus launch_norm_sums(const NormPass& pass, void* stream) {
  return launch_sums<false>("norm_sums", norm_sums_kernel<storage_t<kType>>, pass, stream);
}
template <DType kType>
LaunchStatus launch_norm_forward(const NormPass& pass, void* stream) {
  return launch_blocks("norm_forward", norm_map_kernel<storage_t<kType>, false>,
                       ceil_div(norm_values(pass), kBlockThreads), 0, static_cast<cudaStream_t>(stream), pass);
}
template <DType kType>
LaunchStatus launch_norm_backward(const NormPass& pass, void* stream) {
  return launch_blocks("norm_backward", norm_map_kernel<storage_t<kType>, true>,
                       ceil_div(norm_values(pass), kBlockThreads), 0, static_cast<cudaStream_t>(stream), pass);
}
template <DType kType>
LaunchStatus launch_norm_fold(const NormPass& pass, int64_t taps, void* weight, void* bias, void* stream) {
  using T = storage_t<kType>;
  return launch_blocks("norm_fold", norm_fold_kernel<T>, ceil_div(pass.source.channels * taps, kBlockThreads), 0,
                       static_cast<cudaStream_t>(stream), pass, taps, static_cast<T*>(weight), static_cast<T*>(bias));
}

}  // namespace dsconv
