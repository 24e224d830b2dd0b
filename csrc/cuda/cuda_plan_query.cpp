// cuda_plan() and cuda_alternatives(): the numbers of cuda_plan.h for a device that need not be there.

#include "../plan_query.h"
#include "cuda_schedule.h"
#include "split_backward_plan.h"

namespace dsconv {
namespace {

Activation middle_of(const PlanQuery& query) { return query.bent ? Activation::relu : Activation::identity; }

ForwardParams forward_params(const PlanQuery& query) {
  ForwardParams p{};
  p.geom = geometry_of(query);
  p.dtype = dtype_of(query);
  p.x_layout = p.y_layout = layout_of(query);
  p.x_strides = dense_strides(p.x_layout, p.geom.c_in, p.geom.d_in, p.geom.h_in, p.geom.w_in);
  p.act = middle_of(query);
  return p;
}

// Every gradient; where they lie does not matter to the planner.
BackwardParams backward_params(const PlanQuery& query) {
  alignas(256) static char grad;
  BackwardParams p{};
  p.geom = geometry_of(query);
  p.dtype = dtype_of(query);
  p.x_layout = p.dy_layout = p.grad_x_layout = layout_of(query);
  p.x_strides = dense_strides(p.x_layout, p.geom.c_in, p.geom.d_in, p.geom.h_in, p.geom.w_in);
  p.grad_x_strides = p.x_strides;
  p.dy_strides = dense_strides(p.dy_layout, p.geom.c_out, p.geom.d_out, p.geom.h_out, p.geom.w_out);
  p.act = middle_of(query);
  p.grad_x = p.grad_dw_weight = p.grad_pw_weight = p.grad_dw_bias = p.grad_pw_bias = &grad;
  return p;
}

PlannedCall planned(const std::string& name, bool chosen, bool ours, const Schedule& schedule,
                    const DeviceLimits& device) {
  PlannedCall call{name, chosen, ours, schedule.workspace_bytes, {}};
  for (int i = 0; i < schedule.count; ++i) {
    call.kernels.push_back({schedule.kernels[i], predict(schedule.kernels[i], device)});
  }
  return call;
}

}  // namespace

PlanNumbers cuda_plan(const PlanQuery& query, int64_t multiprocessors) {
  const DeviceLimits device{multiprocessors > 0 ? multiprocessors : 1};
  if (!query.backward) {
    const ForwardParams p = forward_params(query);
    const ForwardPlan plan = plan_forward(p, device);
    ForwardTile tile = forward_tile(accumulator_bytes(p.dtype), plan.wide);
    if (plan.tensor_cores) tile = {mma_tile(plan.mma.kind).pixels, mma_tile(plan.mma.kind).channels};
    return {{"unrolled_kernel", plan.kernel},  {"tile_pixels", tile.pixels},          {"tile_channels", tile.channels},
            {"pixel_tiles", plan.pixel_tiles}, {"channel_tiles", plan.channel_tiles}, {"blocks", plan.blocks}};
  }
  const BackwardPlan plan = plan_backward(backward_params(query), device);
  return {{"unrolled_kernel", plan.kernel},          {"du_blocks", plan.du_blocks},
          {"pointwise_splits", plan.pw_split.count}, {"pointwise_blocks", plan.pw_blocks},
          {"grad_x_blocks", plan.grad_x_blocks},     {"depthwise_splits", plan.dw_split.count},
          {"depthwise_blocks", plan.dw_blocks},      {"workspace_bytes", static_cast<int64_t>(plan.workspace_bytes)}};
}

std::vector<PlannedCall> cuda_alternatives(const PlanQuery& query, const DeviceLimits& device) {
  if (device.multiprocessors < 1) throw_invalid("a GPU has at least one multiprocessor");
  if (query.backward) {
    const BackwardParams p = backward_params(query);
    const BackwardPlan plan = plan_backward(p, device);
    const SplitBackwardPlan split = plan_split_backward(p, device);
    const bool splits = split_is_faster(p, split, plan, device);
    std::vector<PlannedCall> calls{planned("backward", !splits, true, backward_schedule(p, plan, device), device)};
    if (split.possible) {
      calls.push_back(planned("backward, split", splits, true, split_backward_schedule(p, split, device), device));
    }
    return calls;
  }
  const ForwardParams p = forward_params(query);
  const ForwardPlan chosen = plan_forward(p, device);
  const SplitForwardPlan split = plan_split_forward(p, device);
  const bool splits = split_is_faster(p, split, chosen, device);
  std::vector<PlannedCall> calls;
  for (int i = 0; i < kForwardPlans; ++i) {
    const ForwardPlan plan = forward_candidate(p, i, device);
    if (!can_run(p, plan, device)) continue;
    const Schedule schedule = forward_schedule(p, plan, device);
    calls.push_back(planned(schedule.kernels[0].name, !splits && same_plan(plan, chosen), true, schedule, device));
  }
  if (split.images > 0) {
    calls.push_back(planned("split, " + std::to_string(split.images) + " images at a time", splits, true,
                            split_forward_schedule(p, split, device), device));
  }
  calls.push_back(planned("unfused, at the ceilings", false, false, unfused_forward(p, device), device));
  return calls;
}

}  // namespace dsconv
