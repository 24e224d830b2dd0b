#include "backward_depthwise.cuh"

template dsconv::LaunchStatus dsconv::launch_backward_depthwise<dsconv::DType::f16>(const dsconv::BackwardParams&,
                                                                                    const dsconv::BackwardPlan&, void*,
                                                                                    void*);
