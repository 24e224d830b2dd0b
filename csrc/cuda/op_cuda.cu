// The CUDA host entry: torch.ops.dsconv_cuda.{fwd, fwd_with_pre, bwd} for the CUDA dispatch key. Compiling this file is
// what turns CUDA on. It and op_cuda_norm.cu are the only files of the CUDA part that know torch.
//
// Work goes to the current stream of the input's device; nothing here waits for it, so a CUDA graph can capture a call.

#include <optional>
#include <tuple>
#include <vector>

#include "../each_args.h"
#include "cuda_call.h"
#include "cuda_dispatch.h"
#include "library_product.h"

namespace dsconv {
namespace {

Tensor empty_bytes(const Tensor& like, int64_t count) {
  const int64_t bytes[1] = {count};
  return torch::stable::empty({bytes, 1}, ScalarType::Byte, torch::headeronly::Layout::Strided, like.device());
}

// The split form where it may be (`fast`) and is predicted to be faster, or a test asks for it; none of images else.
SplitForwardPlan chosen_split(const ForwardParams& p, const ForwardPlan& fused, bool fast, const DeviceLimits& limits) {
  const int64_t asked = asked_split_images();
  if (asked >= 0) return asked > 0 && can_split(p, limits) ? split_by(p, smaller(asked, p.geom.n)) : SplitForwardPlan{};
  if (!fast) return {};
  const SplitForwardPlan split = plan_split_forward(p, limits);
  return split_is_faster(p, split, fused, limits) ? split : SplitForwardPlan{};
}

bool takes_split(const BackwardParams& p, const SplitBackwardPlan& split, const BackwardPlan& other, bool fast,
                 const DeviceLimits& limits) {
  const int64_t asked = asked_split_images();
  return asked >= 0 ? asked > 0 && split.possible : fast && split_is_faster(p, split, other, limits);
}

void compute(ForwardCall& call, const char* op, bool fast) {
  const Tensor& x = *call.x;
  call.params.tf32 = fast;
  check_extents(op, call.params.geom);
  const CurrentDevice device(x);
  const DeviceLimits limits = device_limits();
  const ForwardPlan fused = planned_forward(call.params, limits);
  const SplitForwardPlan split = chosen_split(call.params, fused, fast, limits);
  if (split.images == 0) return check_launch(op, forward(call.params, fused, device.stream()));
  const Tensor workspace = empty_bytes(x, split.workspace_bytes);
  check_launch(
      op, split_forward(call.params, split, workspace.mutable_data_ptr(), limits, device.stream(),
                        [&](const ForwardParams& part) { pointwise_product(part, workspace.const_data_ptr(), x); }));
}

ForwardCall run_forward(const char* op, const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                        const std::optional<Tensor>& dw_bias, const std::optional<Tensor>& pw_bias,
                        const RowArguments& arguments, bool want_pre) {
  ForwardCall call = prepare_forward(op, x, dw_weight, pw_weight, dw_bias, pw_bias, arguments.call, want_pre);
  compute(call, op, arguments.fast);
  return call;
}

Tensor fwd(const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight, const std::optional<Tensor>& dw_bias,
           const std::optional<Tensor>& pw_bias, const std::vector<int64_t>& stride,
           const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t act, int64_t out_act,
           bool fast) {
  constexpr const char* op = "dsconv_cuda::fwd";
  const RowArguments arguments{arguments_of(op, stride, padding, dilation, act, out_act), fast};
  return *run_forward(op, x, dw_weight, pw_weight, dw_bias, pw_bias, arguments, false).y;
}

Tensor fwd_in_graph(const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                    const std::optional<Tensor>& dw_bias, const std::optional<Tensor>& pw_bias,
                    const std::vector<int64_t>& arguments) {
  constexpr const char* op = "dsconv_cuda::fwd_in_graph";
  return *run_forward(op, x, dw_weight, pw_weight, dw_bias, pw_bias, arguments_of(op, arguments), false).y;
}

std::tuple<Tensor, Tensor> fwd_with_pre(const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                                        const std::optional<Tensor>& dw_bias, const std::optional<Tensor>& pw_bias,
                                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                        const std::vector<int64_t>& dilation, int64_t act, int64_t out_act, bool fast) {
  constexpr const char* op = "dsconv_cuda::fwd_with_pre";
  const RowArguments arguments{arguments_of(op, stride, padding, dilation, act, out_act), fast};
  const ForwardCall call = run_forward(op, x, dw_weight, pw_weight, dw_bias, pw_bias, arguments, true);
  return {*call.y, *call.pre};
}

std::tuple<Tensor, Tensor> fwd_with_pre_in_graph(const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                                                 const std::optional<Tensor>& dw_bias,
                                                 const std::optional<Tensor>& pw_bias,
                                                 const std::vector<int64_t>& arguments) {
  constexpr const char* op = "dsconv_cuda::fwd_with_pre_in_graph";
  const ForwardCall call =
      run_forward(op, x, dw_weight, pw_weight, dw_bias, pw_bias, arguments_of(op, arguments), true);
  return {*call.y, *call.pre};
}

Tensor fwd_each(const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight, const std::optional<Tensor>& dw_bias,
                const std::optional<Tensor>& pw_bias, const std::vector<int64_t>& row) {
  constexpr const char* op = "dsconv_cuda::fwd_each";
  const RowArguments arguments = arguments_of(op, row);
  return forward_each(op, x, dw_weight, pw_weight, dw_bias, pw_bias, arguments.call, false,
                      [&](ForwardCall& call) { compute(call, op, arguments.fast); })
      .y;
}

std::tuple<Tensor, Tensor> fwd_with_pre_each(const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                                             const std::optional<Tensor>& dw_bias, const std::optional<Tensor>& pw_bias,
                                             const std::vector<int64_t>& row) {
  constexpr const char* op = "dsconv_cuda::fwd_with_pre_each";
  const RowArguments arguments = arguments_of(op, row);
  const ForwardBatch made = forward_each(op, x, dw_weight, pw_weight, dw_bias, pw_bias, arguments.call, true,
                                         [&](ForwardCall& call) { compute(call, op, arguments.fast); });
  return {made.y, *made.pre};
}

void compute(BackwardCall& call, const char* op, bool fast) {
  const Tensor& x = *call.x;
  call.params.tf32 = fast;
  check_extents(op, call.params.geom);
  if (call.params.geom.n == 0) return;  // prepare_backward has zeroed what there is

  const CurrentDevice device(x);
  const DeviceLimits limits = device_limits();
  const BackwardParams& p = call.params;
  const BackwardPlan plan = plan_backward(p, limits);
  if (const SplitBackwardPlan split = plan_split_backward(p, limits); takes_split(p, split, plan, fast, limits)) {
    const Tensor workspace = empty_bytes(x, static_cast<int64_t>(split.workspace_bytes));
    check_launch(op, split_backward(
                         p, split, workspace.mutable_data_ptr(), limits, device.stream(),
                         [&](const void* g, void* du) { du_product(p, g, du, x); },
                         [&](const void* g, const void* act_z) { weight_product(p, g, act_z, x); }));
    return;
  }
  const Tensor workspace = empty_bytes(x, static_cast<int64_t>(plan.workspace_bytes));
  check_launch(op, backward(p, plan, workspace.mutable_data_ptr(), device.stream()));
}

BackwardResult run_backward(const char* op, const Tensor& dy, const Tensor& x, const Tensor& dw_weight,
                            const Tensor& pw_weight, const std::optional<Tensor>& dw_bias,
                            const std::optional<Tensor>& saved, const RowArguments& arguments, int64_t grad_mask) {
  BackwardCall call = prepare_backward(op, dy, x, dw_weight, pw_weight, dw_bias, saved, arguments.call, grad_mask);
  compute(call, op, arguments.fast);
  return take_grads(call);
}

BackwardResult bwd(const Tensor& dy, const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                   const std::optional<Tensor>& dw_bias, const std::optional<Tensor>& saved,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, int64_t act, int64_t out_act, int64_t grad_mask, bool fast) {
  constexpr const char* op = "dsconv_cuda::bwd";
  const RowArguments arguments{arguments_of(op, stride, padding, dilation, act, out_act), fast};
  return run_backward(op, dy, x, dw_weight, pw_weight, dw_bias, saved, arguments, grad_mask);
}

BackwardResult bwd_in_graph(const Tensor& dy, const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                            const std::optional<Tensor>& dw_bias, const std::optional<Tensor>& saved,
                            const std::vector<int64_t>& arguments, int64_t grad_mask) {
  constexpr const char* op = "dsconv_cuda::bwd_in_graph";
  return run_backward(op, dy, x, dw_weight, pw_weight, dw_bias, saved, arguments_of(op, arguments), grad_mask);
}

BackwardResult bwd_each(const Tensor& dy, const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                        const std::optional<Tensor>& dw_bias, const std::optional<Tensor>& saved,
                        const std::vector<int64_t>& row, int64_t grad_mask) {
  constexpr const char* op = "dsconv_cuda::bwd_each";
  const RowArguments arguments = arguments_of(op, row);
  return backward_each(op, dy, x, dw_weight, pw_weight, dw_bias, saved, arguments.call, grad_mask,
                       [&](BackwardCall& call) { compute(call, op, arguments.fast); });
}

}  // namespace
}  // namespace dsconv

STABLE_TORCH_LIBRARY_IMPL(dsconv_cuda, DSCONV_DISPATCH_KEY, m) {
  m.impl("fwd", TORCH_BOX(&dsconv::fwd));
  m.impl("fwd_with_pre", TORCH_BOX(&dsconv::fwd_with_pre));
  m.impl("bwd", TORCH_BOX(&dsconv::bwd));
  m.impl("fwd_in_graph", TORCH_BOX(&dsconv::fwd_in_graph));
  m.impl("fwd_with_pre_in_graph", TORCH_BOX(&dsconv::fwd_with_pre_in_graph));
  m.impl("bwd_in_graph", TORCH_BOX(&dsconv::bwd_in_graph));
  m.impl("fwd_each", TORCH_BOX(&dsconv::fwd_each));
  m.impl("fwd_with_pre_each", TORCH_BOX(&dsconv::fwd_with_pre_each));
  m.impl("bwd_each", TORCH_BOX(&dsconv::bwd_each));
}
