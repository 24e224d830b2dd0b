// Stage P of backward as bwd and the ops of norms run it, by groups of tiles (cpu/backward_groups.inl) or by panels of
// channels (cpu/backward_panels.inl): its memory, its tasks and the sums of their partial sums.
#pragma once

#include "cpu_tasks.h"

namespace dsconv {

inline void pack_depthwise(const DTypeKernels& kernels, const BackwardContext& ctx) {
  const BackwardParams& p = ctx.p;
  pack_all(kernels, {p.geom, ctx.plan, ctx.packed, p.dw_weight, p.dw_bias, p.pw_weight, nullptr}, {0, 0}, nullptr);
}

// Memory for an x that is turned by groups of tiles (cpu/turned.inl): for the rows that these keep, or for all of it.
inline void reserve_turned(Workspace& workspace, BackwardContext& ctx) {
  const CpuPlan& plan = ctx.plan;
  const Geometry& g = ctx.p.geom;
  if (plan.by_planes) return;
  const int64_t unit = plan.element / workspace.element(), row = g.w_in * plan.x_ld;
  if (plan.x_rows > 0) {
    workspace.reserve(&ctx.x_rows, plan.pointwise_groups * plan.x_rows * row * unit);
  } else {
    workspace.reserve(&ctx.x_turned, g.n * g.d_in * g.h_in * row * unit);
  }
}

class PointwiseStage {
 public:
  // need_da: something is asked for that follows from the gradient of act(z). Beside what it reserves in `workspace`
  // the stage has pieces of its own: the pointwise weights, or dy as panels read it.
  PointwiseStage(Workspace& workspace, BackwardContext& ctx, bool need_da) : own_(ctx.plan.element) {
    const CpuPlan& plan = ctx.plan;
    const Geometry& g = ctx.p.geom;
    const int64_t unit = plan.element / workspace.element();
    const bool need_grad = ctx.p.grad_pw_weight != nullptr;
    workspace.reserve(&ctx.bias_partial, plan.pointwise_groups * (2 * plan.out_columns + plan.mid_columns) * unit);
    if (plan.panels > 0) {
      const int64_t pitch = round_up(plan.micro.rows, plan.micro.lanes);
      const int64_t pixel_blocks = plan.chunks * ceil_div(plan.chunk_pixels, plan.micro.rows);
      if (need_grad) own_.reserve(&ctx.g_rows, ceil_div(g.c_out, plan.micro.rows) * plan.pixels * pitch);
      if (need_da) own_.reserve(&ctx.g_pixels, pixel_blocks * g.c_out * pitch);
      return;
    }
    if (need_grad) workspace.reserve(&ctx.pw_partial, plan.pointwise_groups * g.c_out * plan.mid_columns * unit);
    if (need_da) own_.reserve(&ctx.packed.pw_backward, plan.mid_columns * g.c_out);
  }

  void run(const DTypeKernels& kernels, BackwardContext& ctx) {
    const CpuPlan& plan = ctx.plan;
    const BackwardParams& p = ctx.p;
    if (plan.panels > 0) {
      // The sums of dy are made by the first that turns it.
      const auto turn = [&](BackwardContext& own, int64_t begin, int64_t) {
        if (begin > 0) own.p.grad_pw_bias = nullptr;
        for_each_task(plan.pointwise_groups,
                      [&](int64_t group) { kernels.backward_turn(own, group, thread_scratch(plan.scratch_bytes)); });
      };
      run_with_copies(ctx, own_, p.geom.c_mid, plan.panels, turn, kernels.backward_panel);
    } else {
      const auto pack = [&](const BackwardContext& own, int64_t, int64_t) {
        if (own.packed.pw_backward == nullptr) return;
        const PackContext weights = {p.geom, plan, own.packed, nullptr, nullptr, p.pw_weight, nullptr};
        for_each_task(plan.mid_columns / plan.micro.columns,
                      [&](int64_t panel) { kernels.pack_pointwise_backward(weights, panel); });
      };
      run_with_copies(ctx, own_, plan.pixels, plan.pointwise_groups, pack, kernels.backward_group);
      if (p.grad_pw_weight != nullptr) {
        for_each_task(p.geom.c_out, [&](int64_t channel) { kernels.reduce_pointwise(ctx, channel); });
      }
    }
    if (p.grad_pw_bias != nullptr || p.grad_dw_bias != nullptr) kernels.reduce_biases(ctx);
  }

 private:
  Workspace own_;
};

}  // namespace dsconv
