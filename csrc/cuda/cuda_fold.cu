// A norm with given statistics folded into the weights before it (op_cpu_fold.cpp has the formula): a block takes the
// row of a channel. Bytes: the weight in and out, once.

#include "channel_values.cuh"
#include "launch_blocks.cuh"

namespace dsconv {

template <typename T>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2) fold_norm_kernel(FoldPass pass) {
  using Acc = acc_t<T>;
  DSCONV_SHARED(double, shared_scale, 1);
  const int64_t c = blockIdx.x;
  if (threadIdx.x == 0) {
    const double scale = value_of(pass.gamma, c, 1) / sqrt(value_of(pass.var, c, 1) + pass.eps);
    const double shift = (value_of(pass.bias, c, 0) - value_of(pass.mean, c, 0)) * scale + value_of(pass.beta, c, 0);
    static_cast<T*>(pass.shift)[c] = from_acc<T>(static_cast<Acc>(shift));
    shared_scale[0] = scale;
  }
  __syncthreads();
  const Acc scale = static_cast<Acc>(shared_scale[0]);
  const T* from = static_cast<const T*>(pass.weight) + c * pass.row;
  T* to = static_cast<T*>(pass.folded) + c * pass.row;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < pass.row; i += kBlockThreads) to[i] = from_acc<T>(to_acc(from[i]) * scale);
}

LaunchStatus launch_fold_norm(const FoldPass& pass, DType dtype, void* stream) {
  const auto kernel = dtype == DType::f64    ? fold_norm_kernel<double>
                      : dtype == DType::f16  ? fold_norm_kernel<Half>
                      : dtype == DType::bf16 ? fold_norm_kernel<BFloat16>
                                             : fold_norm_kernel<float>;
  return launch_blocks("fold_norm", kernel, pass.channels, 0, static_cast<cudaStream_t>(stream), pass);
}

}  // namespace dsconv
