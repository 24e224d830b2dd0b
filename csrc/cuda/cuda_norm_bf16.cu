#include "norm.cuh"

namespace dsconv {

template LaunchStatus launch_norm<DType::bf16>(const NormPass&, const NormPlan&, void*);
template LaunchStatus launch_norm_fold<DType::bf16>(const NormPass&, int64_t, void*, void*, void*);

}  // namespace dsconv
