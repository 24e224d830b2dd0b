#include "norm.cuh"

namespace dsconv {

template LaunchStatus launch_norm<DType::f32>(const NormPass&, const NormPlan&, void*);
template LaunchStatus launch_norm_fold<DType::f32>(const NormPass&, int64_t, void*, void*, void*);

}  // namespace dsconv
