// From a call's runtime dtype to its launchers. Apart from cuda_launch.h, so that only the host entry instantiates them
// for every dtype.
#pragma once

#include "cuda_launch.h"

namespace dsconv {

// Stage P by the kernels that the plan is for. f16 has no others than those of the tensor cores, which every
// architecture from sm_75 on has for it, f64 none of these.
template <DType kType>
LaunchStatus launch_stage_p(const BackwardParams& p, const BackwardPlan& plan, void* workspace, void* stream) {
  if constexpr (kType == DType::f16) {
    return launch_backward_mma<kType>(p, plan, workspace, stream);
  } else {
    if constexpr (kType != DType::f64) {
      if (plan.tensor_cores) return launch_backward_mma<kType>(p, plan, workspace, stream);
    }
    return launch_backward_pointwise<kType>(p, plan, workspace, stream);
  }
}

template <DType kType>
LaunchStatus launch_backward(const BackwardParams& p, const BackwardPlan& plan, void* workspace, void* stream) {
  const LaunchStatus status = launch_stage_p<kType>(p, plan, workspace, stream);
  return status.error != 0 ? status : launch_backward_depthwise<kType>(p, plan, workspace, stream);
}

inline LaunchStatus forward(const ForwardParams& p, const ForwardPlan& plan, void* stream) {
  switch (p.dtype) {
    case DType::f64:
      return launch_forward<DType::f64>(p, plan, stream);
    case DType::f16:
      return launch_forward_mma<DType::f16>(p, plan.mma, stream);
    case DType::bf16:
      if (plan.tensor_cores) return launch_forward_mma<DType::bf16>(p, plan.mma, stream);
      return launch_forward<DType::bf16>(p, plan, stream);
    default:
      if (plan.tensor_cores) return launch_forward_mma<DType::f32>(p, plan.mma, stream);
      return launch_forward<DType::f32>(p, plan, stream);
  }
}

inline LaunchStatus backward(const BackwardParams& p, const BackwardPlan& plan, void* workspace, void* stream) {
  switch (p.dtype) {
    case DType::f64:
      return launch_backward<DType::f64>(p, plan, workspace, stream);
    case DType::f16:
      return launch_backward<DType::f16>(p, plan, workspace, stream);
    case DType::bf16:
      return launch_backward<DType::bf16>(p, plan, workspace, stream);
    default:
      return launch_backward<DType::f32>(p, plan, workspace, stream);
  }
}

}  // namespace dsconv
