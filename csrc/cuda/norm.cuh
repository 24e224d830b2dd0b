// What a call of launch_norm runs: one of the passes of norm_plan.h, and what merges its sums; and the norm folded into
// the weights of the convolution before it.
#pragma once

#include <type_traits>

#include "norm_box.cuh"
#include "norm_merge.cuh"
#include "norm_pixel.cuh"
#include "norm_tensor.cuh"

namespace dsconv {

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

template <DType kType, NormUse kUse>
LaunchStatus launch_norm_use(const NormPass& pass, const NormPlan& plan, cudaStream_t stream) {
  using T = storage_t<kType>;
  constexpr int kWide = sizeof(T) == 8 ? 2 : 4;
  if (plan.vec > 0) {
    return plan.vec == 1 ? launch_norm_tensor<T, 1, kUse>(pass, plan, stream)
                         : launch_norm_tensor<T, kWide, kUse>(pass, plan, stream);
  }
  if constexpr (kUse == NormUse::forward) {
    return {static_cast<int>(cudaErrorInvalidValue), "norm_box"};
  } else if constexpr (kType == DType::f64) {
    return launch_blocks("norm_pixel", norm_pixel_kernel<kUse>, plan.blocks, 0, stream, pass, plan);
  } else {
    return launch_norm_box<T, kUse>(pass, plan, stream);
  }
}

template <DType kType>
LaunchStatus launch_norm(const NormPass& pass, const NormPlan& plan, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto merged = [&](const LaunchStatus& status, auto moments) {
    if (status.error != 0) return status;
    return launch_norm_merge<decltype(moments)::value>(pass.partial, plan.splits, pass.source.channels, pass.result,
                                                       cuda_stream);
  };
  switch (plan.use) {
    case NormUse::moments:
      return merged(launch_norm_use<kType, NormUse::moments>(pass, plan, cuda_stream), std::true_type{});
    case NormUse::sums:
      return merged(launch_norm_use<kType, NormUse::sums>(pass, plan, cuda_stream), std::false_type{});
    case NormUse::forward:
      return launch_norm_use<kType, NormUse::forward>(pass, plan, cuda_stream);
    default:
      return launch_norm_use<kType, NormUse::backward>(pass, plan, cuda_stream);
  }
}

template <DType kType>
LaunchStatus launch_norm_fold(const NormPass& pass, int64_t taps, void* weight, void* bias, void* stream) {
  using T = storage_t<kType>;
  return launch_blocks("norm_fold", norm_fold_kernel<T>, ceil_div(pass.source.channels * taps, kBlockThreads), 0,
                       static_cast<cudaStream_t>(stream), pass, taps, static_cast<T*>(weight), static_cast<T*>(bias));
}

}  // namespace dsconv
