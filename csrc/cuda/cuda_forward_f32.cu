#include "forward.cuh"

template dsconv::LaunchStatus dsconv::launch_forward<dsconv::DType::f32>(const dsconv::ForwardParams&,
                                                                         const dsconv::ForwardPlan&, void*);
