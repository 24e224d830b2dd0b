// What the host entry calls: launchers without CUDA or torch types, one instantiation a dtype (cuda_*_<dtype>.cu).
// A `stream` is a cudaStream_t. Launchers only enqueue: they allocate nothing, wait for nothing, and can be captured.
#pragma once

#include <cstdint>

#include "cuda_plan.h"
#include "depthwise_forward_plan.h"

namespace dsconv {

struct LaunchStatus {
  int error = 0;                 // a cudaError_t
  const char* kernel = nullptr;  // which launch failed
};

// All but f16.
template <DType kType>
LaunchStatus launch_forward(const ForwardParams& p, const ForwardPlan& plan, void* stream);

// f16, bf16 and f32 (in TF32).
template <DType kType>
LaunchStatus launch_forward_mma(const ForwardParams& p, const MmaForwardPlan& plan, void* stream);

// For the forms split around a library's product (split_forward_plan.h, split_backward_plan.h): act(z) as the output of
// the call p, or act'(z) multiplied to it; bias and out_act over outputs that are there; dy * out_act'. All but f32.
template <DType kType>
LaunchStatus launch_depthwise_forward(const ForwardParams& p, bool derivative, const DepthwiseForwardPlan& plan,
                                      void* stream);
template <DType kType>
LaunchStatus launch_gradient(const BackwardParams& p, void* g, void* stream);
template <DType kType>
LaunchStatus launch_outputs(const ForwardParams& p, bool add_bias, void* stream);

// Stage P: du, and the partial and final sums of grad_pw_weight and grad_pw_bias. All but f16.
template <DType kType>
LaunchStatus launch_backward_pointwise(const BackwardParams& p, const BackwardPlan& plan, void* workspace,
                                       void* stream);

// The same on tensor cores; f16, bf16 and f32 (in TF32).
template <DType kType>
LaunchStatus launch_backward_mma(const BackwardParams& p, const BackwardPlan& plan, void* workspace, void* stream);

// Stage D, from du: grad_x, and the sums of grad_dw_weight and grad_dw_bias.
template <DType kType>
LaunchStatus launch_backward_depthwise(const BackwardParams& p, const BackwardPlan& plan, void* workspace,
                                       void* stream);

}  // namespace dsconv
