#include "norm.cuh"

namespace dsconv {

template LaunchStatus launch_norm_moments<DType::f64>(const NormPass&, void*);
template LaunchStatus launch_norm_sums<DType::f64>(const NormPass&, void*);
template LaunchStatus launch_norm_forward<DType::f64>(const NormPass&, void*);
template LaunchStatus launch_norm_backward<DType::f64>(const NormPass&, void*);
template LaunchStatus launch_norm_fold<DType::f64>(const NormPass&, int64_t, void*, void*, void*);

}  // namespace dsconv
