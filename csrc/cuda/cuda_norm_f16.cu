#include "norm.cuh"

namespace dsconv {

template LaunchStatus launch_norm_moments<DType::f16>(const NormPass&, void*);
template LaunchStatus launch_norm_sums<DType::f16>(const NormPass&, void*);
template LaunchStatus launch_norm_forward<DType::f16>(const NormPass&, void*);
template LaunchStatus launch_norm_backward<DType::f16>(const NormPass&, void*);
template LaunchStatus launch_norm_fold<DType::f16>(const NormPass&, int64_t, void*, void*, void*);

}  // namespace dsconv
