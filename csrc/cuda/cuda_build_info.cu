// What nvcc knows of the build and build_info.h passes on to Python. Compiled only where the .cu files are.

#include <cuda_runtime_api.h>

#define DSCONV_TEXT_OF(...) #__VA_ARGS__
#define DSCONV_TEXT(...) DSCONV_TEXT_OF(__VA_ARGS__)

extern "C" const char* dsconv_cuda_toolkit_version() {
  return DSCONV_TEXT(__CUDACC_VER_MAJOR__) "." DSCONV_TEXT(__CUDACC_VER_MINOR__);
}

// In nvcc's numbers, such as "800,900" for sm_80 and sm_90.
extern "C" const char* dsconv_cuda_architectures() { return DSCONV_TEXT(__CUDA_ARCH_LIST__); }

extern "C" const char* dsconv_cuda_nvcc_flags() {
#ifdef DSCONV_BUILD_FLAGS
  return DSCONV_BUILD_FLAGS;
#else
  return nullptr;
#endif
}
