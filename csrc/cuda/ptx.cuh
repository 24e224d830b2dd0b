// Instructions that C++ has no name for, each in three bodies: PTX where the architecture has it, plain C++ where it
// does not, and the emulation's form on the host. Only this file looks at __CUDA_ARCH__.
#pragma once

#include "portability.cuh"

namespace dsconv {

// Copies 16 bytes from global to shared memory, asynchronously from sm_80 on; zeros where `pred` is false (src is not
// read then). Both addresses are multiples of 16. The bytes may be read by this thread after cp_async_wait, by others
// after a barrier that follows it. Every copy is waited for before its thread returns.
DSCONV_DEVICE void cp_async_16(void* dst, const void* src, bool pred) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const unsigned shared_dst = static_cast<unsigned>(__cvta_generic_to_shared(dst));
  const int src_bytes = pred ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_dst), "l"(__cvta_generic_to_global(src)),
               "r"(src_bytes)
               : "memory");
#elif defined(__CUDA_ARCH__)
  *static_cast<uint4*>(dst) = pred ? *static_cast<const uint4*>(src) : make_uint4(0, 0, 0, 0);
#elif !defined(__CUDACC__)
  cuda_host::cp_async_16(dst, src, pred);
#endif
}

// Closes the group of the copies issued since the last commit.
DSCONV_DEVICE void cp_async_commit() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#elif !defined(__CUDACC__)
  cuda_host::cp_async_commit();
#endif
}

// Waits until at most the N youngest committed groups of this thread are still under way.
template <int N>
DSCONV_DEVICE void cp_async_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
#elif !defined(__CUDACC__)
  cuda_host::cp_async_wait(N);
#endif
}

}  // namespace dsconv
