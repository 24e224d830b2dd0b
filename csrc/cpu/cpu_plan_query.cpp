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
  const ElementBytes bytes = table.by_dtype[static_cast<int>(dtype)].bytes;
  BackwardParams p{};
  p.dtype = dtype;
  p.x_layout = layout_of(query);
  const CpuPlan plan = query.backward
                           ? plan_backward(g, walked_in_place(p) ? Layout::nhwc : Layout::nchw, micro, bytes.compute)
                           : plan_forward(g, p.x_layout, micro, bytes, threads > 0 ? threads : 1);
  return {{"micro_rows", micro.rows},
          {"micro_columns", micro.columns},
          {"pixels", plan.pixels},
          {"tiles", plan.tiles},
          {"tile_pixels", plan.tile_pixels},
          {"walks_depth", walks_depth(plan.order)},
          {"ring_elements", plan.ring},
          {"pointwise_groups", plan.pointwise_groups},
          {"scratch_bytes", plan.scratch_bytes}};
}

}  // namespace dsconv
