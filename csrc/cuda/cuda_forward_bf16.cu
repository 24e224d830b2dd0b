#include "forward.cuh"

template dsconv::LaunchStatus dsconv::launch_forward<dsconv::DType::bf16>(const dsconv::ForwardParams&,
                                                                          const dsconv::ForwardPlan&, void*);
