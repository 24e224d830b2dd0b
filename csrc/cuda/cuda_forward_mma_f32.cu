#include "forward_mma.cuh"

template dsconv::LaunchStatus dsconv::launch_forward_mma<dsconv::DType::f32>(const dsconv::ForwardParams&,
                                                                             const dsconv::MmaForwardPlan&, void*);
