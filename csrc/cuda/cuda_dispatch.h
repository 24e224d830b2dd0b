// From a call's runtime dtype to its launchers. Apart from cuda_launch.h, so that only the host entry instantiates them
// for every dtype.
#pragma once

#include "cuda_launch.h"

namespace dsconv {

template <DType kType>
LaunchStatus launch_backward(const BackwardParams& p, const BackwardPlan& plan, void* workspace, void* stream) {
  const LaunchStatus status = launch_backward_pointwise<kType>(p, plan, workspace, stream);
  return status.error != 0 ? status : launch_backward_depthwise<kType>(p, plan, workspace, stream);
}

inline LaunchStatus forward(const ForwardParams& p, const ForwardPlan& plan, void* stream) {
  switch (p.dtype) {
    case DType::f64:
      return launch_forward<DType::f64>(p, plan, stream);
    case DType::f16:
      return launch_forward<DType::f16>(p, plan, stream);
    case DType::bf16:
      return launch_forward<DType::bf16>(p, plan, stream);
    default:
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
