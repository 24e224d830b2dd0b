#include "norm.cuh"

namespace dsconv {

template LaunchStatus launch_norm_moments<DType::bf16>(const NormPass&, void*);
template LaunchStatus launch_norm_sums<DType::bf16>(const NormPass&, void*);
template LaunchStatus launch_norm_forward<DType::bf16>(const NormPass&, void*);
template LaunchStatus launch_norm_backward<DType::bf16>(const NormPass&, void*);
template LaunchStatus launch_norm_fold<DType::bf16>(const NormPass&, int64_t, void*, void*, void*);

}  // namespace dsconv
