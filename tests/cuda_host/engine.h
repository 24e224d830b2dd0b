// Between the emulated runtime API, which checks a launch, and the engine, which runs it.
#pragma once

#include "host_runtime.h"

namespace cuda_host {

// Runs a grid within the limits, and returns false where the engine stopped it with a report. One at a time.
bool run_grid(KernelBody body, void* arguments, const cudaLaunchConfig_t& config);

}  // namespace cuda_host
