// cpu_plan(): the numbers of cpu_plan.h for the active instruction set.

#include "../plan_query.h"
#include "cpu_isa.h"
#include "cpu_kernels.h"

namespace dsconv {

PlanNumbers cpu_plan(const PlanQuery& query, int64_t threads) {
  const Geometry g = geometry_of(query);
  const DType dtype = dtype_of(query);
  const KernelTable& table = active_kernels();
  const MicroTile micro = dtype == DType::f64 ? table.micro_f64 : table.micro_f32;
  const DTypeKernels& kernels = table.by_dtype[static_cast<int>(dtype)];
  const ElementBytes bytes = kernels.bytes;
  BackwardParams p{};
  p.dtype = dtype;
  p.x_layout = layout_of(query);
  const bool planes = may_go_by_planes(kernels, g, p.x_layout);
  const bool by_planes = planes && planes_pay_for_forward(g, bytes, false);
  const bool back_by_planes = planes && planes_pay_for_backward(g, bytes);
  const CpuPlan plan = query.backward
                           ? plan_backward(g, walked_in_place(p) ? Layout::nhwc : Layout::nchw, micro, bytes.compute,
                                           BetweenStages::nothing, back_by_planes)
                           : plan_forward(g, p.x_layout, micro, bytes, threads > 0 ? threads : 1, false, by_planes);
  return {{"micro_rows", micro.rows},
          {"micro_columns", micro.columns},
          {"pixels", plan.pixels},
          {"tiles", plan.tiles},
          {"tile_pixels", plan.tile_pixels},
          {"by_planes", plan.by_planes ? 1 : 0},
          {"walks_depth", walks_depth(plan.order)},
          {"ring_elements", plan.ring},
          {"x_rows", plan.x_rows},
          {"pointwise_groups", plan.pointwise_groups},
          {"scratch_bytes", plan.scratch_bytes}};
}

}  // namespace dsconv
