#include "depthwise_forward.cuh"
#include "outputs.cuh"

namespace dsconv {

template LaunchStatus launch_depthwise_forward<DType::f16>(const ForwardParams&, bool, const DepthwiseForwardPlan&,
                                                           void*);
template LaunchStatus launch_outputs<DType::f16>(const ForwardParams&, bool, void*);
template LaunchStatus launch_gradient<DType::f16>(const BackwardParams&, void*, void*);

}  // namespace dsconv
