// cuda_plan(): the numbers of cuda_plan.h for a device of a number of multiprocessors, which need not be there.

#include "../plan_query.h"
#include "cuda_plan.h"

namespace dsconv {

PlanNumbers cuda_plan(const PlanQuery& query, int64_t multiprocessors) {
  const DeviceLimits device{multiprocessors > 0 ? multiprocessors : 1};
  if (!query.backward) {
    ForwardParams p{};
    p.geom = geometry_of(query);
    p.dtype = dtype_of(query);
    p.x_layout = p.y_layout = layout_of(query);
    const ForwardPlan plan = plan_forward(p, device);
    const ForwardTile tile = forward_tile(accumulator_bytes(p.dtype), plan.wide);
    return {{"unrolled_kernel", plan.kernel},  {"tile_pixels", tile.pixels},          {"tile_channels", tile.channels},
            {"pixel_tiles", plan.pixel_tiles}, {"channel_tiles", plan.channel_tiles}, {"blocks", plan.blocks}};
  }
  // Every gradient; where they lie does not matter to the planner.
  static char grad;
  BackwardParams p{};
  p.geom = geometry_of(query);
  p.dtype = dtype_of(query);
  p.x_layout = p.dy_layout = p.grad_x_layout = layout_of(query);
  p.grad_x = p.grad_dw_weight = p.grad_pw_weight = p.grad_dw_bias = p.grad_pw_bias = &grad;
  const BackwardPlan plan = plan_backward(p, device);
  return {{"unrolled_kernel", plan.kernel},          {"du_blocks", plan.du_blocks},
          {"pointwise_splits", plan.pw_split.count}, {"pointwise_blocks", plan.pw_blocks},
          {"grad_x_blocks", plan.grad_x_blocks},     {"depthwise_splits", plan.dw_split.count},
          {"depthwise_blocks", plan.dw_blocks},      {"workspace_bytes", static_cast<int64_t>(plan.workspace_bytes)}};
}

}  // namespace dsconv
