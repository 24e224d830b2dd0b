// What the host entry of training through BatchNorm calls (op_cuda_norm.cu), beside the launchers of cuda_launch.h.
// Torch-free; a `stream` is a cudaStream_t, and launchers only enqueue.
#pragma once

#include <cstdint>

#include "cuda_launch.h"
#include "portability.cuh"

namespace dsconv {

// A tensor [n, channels, d, h, w] before a norm: v, or z of the depthwise part, which is made value by value from x.
struct NormSource {
  int64_t n, channels, d, h, w;
  const void* v;
  Strides v_strides;
  bool from_x;  // then z of the following, dw_weight [channels, kernel_d, kernel_h, kernel_w], dw_bias or null
  Geometry geom;
  const void* x;
  Strides x_strides;
  const void *dw_weight, *dw_bias;
};
DSCONV_HOST_DEVICE int64_t source_pixels(const NormSource& source) { return source.n * source.d * source.h * source.w; }

// vectors are doubles [4][channels]: mean, invstd, gamma, beta; sums [2][channels], null for a norm of constants.
struct NormPass {
  NormSource source;
  Activation act;
  const void* grad;
  Strides grad_strides;
  void* out;
  Strides out_strides;
  const double *vectors, *sums;
  double count;
  double* partial;  // [splits][2][channels]
  int64_t splits;
  double* result;  // [2][channels]
};

// Pixels of a split: what a block sums.
constexpr int64_t kNormSplit = 4096;

// result: mean and variance.
template <DType kType>
LaunchStatus launch_norm_moments(const NormPass& pass, void* stream);
// result: sum g and sum g * vhat, g = grad * act'(gamma * vhat + beta).
template <DType kType>
LaunchStatus launch_norm_sums(const NormPass& pass, void* stream);
// out = act(gamma * vhat + beta)
template <DType kType>
LaunchStatus launch_norm_forward(const NormPass& pass, void* stream);
// out = gamma * invstd * (g - (sum g) / count - vhat * (sum g * vhat) / count)
template <DType kType>
LaunchStatus launch_norm_backward(const NormPass& pass, void* stream);
// weight [channels][taps] and bias of a depthwise convolution with the norm after it.
template <DType kType>
LaunchStatus launch_norm_fold(const NormPass& pass, int64_t taps, void* weight, void* bias, void* stream);

// vectors out of moments; gamma and beta are null, or floats, or doubles.
struct NormParameters {
  const void *gamma, *beta;
  bool gamma_double, beta_double;
};
LaunchStatus launch_norm_vectors(const double* moments, const NormParameters& parameters, double eps, int64_t channels,
                                 double* vectors, void* stream);

}  // namespace dsconv
