#include "forward_mma.cuh"

template dsconv::LaunchStatus dsconv::launch_forward_mma<dsconv::DType::bf16>(const dsconv::ForwardParams&,
                                                                              const dsconv::MmaForwardPlan&, void*);
