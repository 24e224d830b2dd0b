#include "backward_pointwise.cuh"

template dsconv::LaunchStatus dsconv::launch_backward_pointwise<dsconv::DType::f64>(const dsconv::BackwardParams&,
                                                                                    const dsconv::BackwardPlan&, void*,
                                                                                    void*);
