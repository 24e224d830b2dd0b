#include "backward_mma.cuh"

template dsconv::LaunchStatus dsconv::launch_backward_mma<dsconv::DType::f16>(const dsconv::BackwardParams&,
                                                                              const dsconv::BackwardPlan&, void*,
                                                                              void*);
