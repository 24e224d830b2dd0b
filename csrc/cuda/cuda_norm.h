// What the host entry of training through BatchNorm calls (op_cuda_norm.cu), beside the launchers of cuda_launch.h.
// Torch-free; a `stream` is a cudaStream_t, and launchers only enqueue.
#pragma once

#include <cstdint>

#include "cuda_launch.h"
#include "norm_plan.h"

namespace dsconv {

// By plan.use:
//   moments    result = mean and variance
//   sums       result = sum g and sum g * vhat, g = grad * act'(gamma * vhat + beta)
//   forward    out = act(gamma * vhat + beta)
//   backward   out = gamma * invstd * (g - (sum g) / count - vhat * (sum g * vhat) / count)
// of z there is no forward.
template <DType kType>
LaunchStatus launch_norm(const NormPass& pass, const NormPlan& plan, void* stream);
// weight [channels][taps] and bias of a depthwise convolution with the norm after it.
template <DType kType>
LaunchStatus launch_norm_fold(const NormPass& pass, int64_t taps, void* weight, void* bias, void* stream);

// Mean and variance of y out of what a forward wrote to ForwardParams::y_parts, [tiles] of it: floats, or doubles.
// partial: [parts_splits(tiles)][kPartialRows][channels].
constexpr int64_t parts_splits(int64_t tiles) {
  constexpr int64_t kTiles = 128;
  const int64_t splits = ceil_div(tiles, kTiles);
  return splits < kMostNormSplits ? splits : kMostNormSplits;
}
LaunchStatus launch_norm_parts(const void* parts, bool doubles, int64_t tiles, int64_t channels, double* partial,
                               double* result, void* stream);

// A value a channel; null: there are none.
struct ChannelValues {
  const void* data;
  DType dtype;
};

// vectors out of moments.
LaunchStatus launch_norm_vectors(const double* moments, const ChannelValues& gamma, const ChannelValues& beta,
                                 double eps, int64_t channels, double* vectors, void* stream);

// weight [channels][row] and bias of a convolution with a norm of given statistics after it.
struct FoldPass {
  const void* weight;
  int64_t channels, row;
  ChannelValues bias, mean, var, gamma, beta;
  double eps;
  void *folded, *shift;
};
LaunchStatus launch_fold_norm(const FoldPass& pass, DType dtype, void* stream);

}  // namespace dsconv
