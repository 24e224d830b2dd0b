#include "norm.cuh"

namespace dsconv {

template LaunchStatus launch_norm_moments<DType::f32>(const NormPass&, void*);
template LaunchStatus launch_norm_sums<DType::f32>(const NormPass&, void*);
template LaunchStatus launch_norm_forward<DType::f32>(const NormPass&, void*);
template LaunchStatus launch_norm_backward<DType::f32>(const NormPass&, void*);
template LaunchStatus launch_norm_fold<DType::f32>(const NormPass&, int64_t, void*, void*, void*);

}  // namespace dsconv
