#include "cuda_norm.h"
#include "launch_blocks.cuh"

namespace dsconv {

DSCONV_DEVICE double parameter(const void* values, bool is_double, int64_t c, double otherwise) {
  if (values == nullptr) return otherwise;
  return is_double ? static_cast<const double*>(values)[c] : static_cast<double>(static_cast<const float*>(values)[c]);
}

// One thread a channel: mean, invstd, gamma, beta.
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2) norm_vectors_kernel(const double* moments, NormParameters parameters,
                                                                       double eps, int64_t channels, double* vectors) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (c >= channels) return;
  vectors[c] = moments[c];
  vectors[channels + c] = 1 / sqrt(moments[channels + c] + eps);
  vectors[2 * channels + c] = parameter(parameters.gamma, parameters.gamma_double, c, 1);
  vectors[3 * channels + c] = parameter(parameters.beta, parameters.beta_double, c, 0);
}

LaunchStatus launch_norm_vectors(const double* moments, const NormParameters& parameters, double eps, int64_t channels,
                                 double* vectors, void* stream) {
  return launch_blocks("norm_vectors", norm_vectors_kernel, ceil_div(channels, kBlockThreads), 0,
                       static_cast<cudaStream_t>(stream), moments, parameters, eps, channels, vectors);
}

}  // namespace dsconv
