#include "channel_values.cuh"
#include "launch_blocks.cuh"

namespace dsconv {

// One thread a channel: mean, invstd, gamma, beta.
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2)
    norm_vectors_kernel(const double* moments, ChannelValues gamma, ChannelValues beta, double eps, int64_t channels,
                        double* vectors) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (c >= channels) return;
  vectors[c] = moments[c];
  vectors[channels + c] = 1 / sqrt(moments[channels + c] + eps);
  vectors[2 * channels + c] = value_of(gamma, c, 1);
  vectors[3 * channels + c] = value_of(beta, c, 0);
}

LaunchStatus launch_norm_vectors(const double* moments, const ChannelValues& gamma, const ChannelValues& beta,
                                 double eps, int64_t channels, double* vectors, void* stream) {
  return launch_blocks("norm_vectors", norm_vectors_kernel, ceil_div(channels, kBlockThreads), 0,
                       static_cast<cudaStream_t>(stream), moments, gamma, beta, eps, channels, vectors);
}

}  // namespace dsconv
