// From a call's runtime dtype to its launchers. Apart from cuda_launch.h, so that only the host entry instantiates them
// for every dtype.
#pragma once

#include <type_traits>

#include "cuda_launch.h"
#include "split_backward_plan.h"

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

// Calls f with the dtype as a constant; the split form has no float.
template <typename F>
LaunchStatus by_split_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f64:
      return f(std::integral_constant<DType, DType::f64>{});
    case DType::f16:
      return f(std::integral_constant<DType, DType::f16>{});
    default:
      return f(std::integral_constant<DType, DType::bf16>{});
  }
}

// `product(part)` enqueues part.y = part.pw_weight . workspace for a group of images, + part.pw_bias where
// is_one_product(part). The workspace is the caller's: plan.workspace_bytes.
template <typename Product>
LaunchStatus split_forward(const ForwardParams& p, const SplitForwardPlan& plan, void* workspace,
                           const DeviceLimits& device, void* stream, const Product& product) {
  return by_split_dtype(p.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    LaunchStatus status;
    for (int64_t n = 0; n < p.geom.n && status.error == 0; n += plan.images) {
      const ForwardParams part = images_of(p, n, smaller(plan.images, p.geom.n - n));
      const ForwardParams depthwise = depthwise_part(part, workspace);
      status = launch_depthwise_forward<kType>(depthwise, false, plan_depthwise_forward(depthwise, device), stream);
      if (status.error != 0) break;
      product(part);
      if (has_outputs_pass(part)) status = launch_outputs<kType>(part, adds_bias(part), stream);
    }
    return status;
  });
}

// `du_product(g, du)` enqueues du = g . pw_weight, `weight_product(g, act_z)` grad_pw_weight = g^T . act_z.
template <typename DuProduct, typename WeightProduct>
LaunchStatus split_backward(const BackwardParams& p, const SplitBackwardPlan& plan, void* workspace,
                            const DeviceLimits& device, void* stream, const DuProduct& du_product,
                            const WeightProduct& weight_product) {
  return by_split_dtype(p.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    const auto at = [&](size_t offset) { return static_cast<unsigned char*>(workspace) + offset; };
    LaunchStatus status;
    const auto depthwise = [&](void* a, bool derivative) {
      const ForwardParams z = depthwise_of(p, a);
      if (status.error == 0) {
        status = launch_depthwise_forward<kType>(z, derivative, plan_depthwise_forward(z, device), stream);
      }
    };
    const void* g = p.dy;
    if (p.saved != nullptr) {
      g = at(plan.g_at);
      status = launch_gradient<kType>(p, at(plan.g_at), stream);
    }
    if (plan.du && status.error == 0) {
      du_product(g, at(plan.rest_plan.du_at));
      if (p.act != Activation::identity) depthwise(at(plan.rest_plan.du_at), true);
    }
    if (plan.weight) {
      depthwise(at(plan.act_z_at), false);
      if (status.error == 0) weight_product(g, at(plan.act_z_at));
    }
    return status.error != 0 ? status : launch_backward<kType>(plan.rest, plan.rest_plan, workspace, stream);
  });
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
