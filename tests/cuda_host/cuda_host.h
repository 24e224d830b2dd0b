// CUDA on the host, for tests: what csrc/cuda/portability.cuh includes where the compiler is not nvcc. No CUDA toolkit
// is needed. The engine behind it (engine.cpp and its neighbours) runs every block's
// threads as fibers.
#pragma once

#include "host_device.h"
#include "host_runtime.h"
#include "host_types.h"
