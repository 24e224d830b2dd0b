// Instructions that C++ has no name for, each in three bodies: PTX where the architecture has it, plain C++ where it
// does not, and the emulation's form on the host. Only this file and dtype.cuh look at __CUDA_ARCH__.
//
// The warp's matrix instructions are collective: all 32 lanes come to the same one. Lane l is called g = l / 4 and
// t = l % 4 below. A register of a fragment holds two 16-bit elements, the lower column in its lower half, or one float
// of which the tensor core reads the upper 19 bits (TF32).
//
//   c, d of all  [16][8]    d[0], d[1]: row g, columns 2t, 2t + 1         d[2], d[3]: row g + 8
//   16-bit   a   [16][16]   a[0], a[1]: rows g, g + 8, columns 2t ..      a[2], a[3]: the same, columns 2t + 8 ..
//            b   [8][16]    b[0], b[1]: row (n) g, columns (k) 2t .., 2t + 8 ..
//   TF32     a   [16][8]    a[0], a[1]: rows g, g + 8, column t           a[2], a[3]: the same, column t + 4
//            b   [8][8]     b[0], b[1]: row (n) g, columns (k) t, t + 4
#pragma once

#include <cstdint>

#include "dtype.cuh"
#include "portability.cuh"

namespace dsconv {

// threadIdx.x of a one-dimensional block, read anew: what is computed from it inside a loop is computed there, and
// takes no registers outside.
DSCONV_DEVICE int thread_here() {
#if defined(__CUDA_ARCH__)
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
  return thread;
#else
  return static_cast<int>(threadIdx.x);
#endif
}

// The same of blockIdx.x.
DSCONV_DEVICE unsigned block_here() {
#if defined(__CUDA_ARCH__)
  unsigned block;
  asm volatile("mov.u32 %0, %%ctaid.x;\n" : "=r"(block));
  return block;
#else
  return blockIdx.x;
#endif
}

// The same of a value: what follows from it is not computed ahead of a loop, for all of the loop's turns.
DSCONV_DEVICE int fresh(int value) {
#if defined(__CUDA_ARCH__)
  int copy;
  asm volatile("mov.u32 %0, %1;\n" : "=r"(copy) : "r"(value));
  return copy;
#else
  return value;
#endif
}

// ------------------------------------------------------------------------------------------------ asynchronous copies

// Copies the first `valid` of kBytes bytes from global to shared memory, asynchronously from sm_80 on, and puts zeros
// into the rest; with valid == 0 src is not read. Both addresses are multiples of kBytes, valid is even. The bytes may
// be read by this thread after cp_async_wait, by others after a barrier that follows it. Every copy is waited for
// before its thread returns.
template <int kBytes>
DSCONV_DEVICE void cp_async(void* dst, const void* src, int valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const unsigned shared_dst = static_cast<unsigned>(__cvta_generic_to_shared(dst));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_dst),
                 "l"(__cvta_generic_to_global(src)), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;\n" ::"r"(shared_dst),
                 "l"(__cvta_generic_to_global(src)), "r"(valid), "n"(kBytes)
                 : "memory");
  }
#elif defined(__CUDA_ARCH__)
  Vec<uint16_t, kBytes / 2> bytes = {};
  if (valid == kBytes) {
    bytes = *static_cast<const Vec<uint16_t, kBytes / 2>*>(src);
  } else {
#pragma unroll
    for (int i = 0; i < kBytes / 2; ++i) {
      if (2 * i < valid) bytes.v[i] = static_cast<const uint16_t*>(src)[i];
    }
  }
  *static_cast<Vec<uint16_t, kBytes / 2>*>(dst) = bytes;
#elif !defined(__CUDACC__)
  cuda_host::cp_async<kBytes>(dst, src, valid);
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

// ----------------------------------------------------------------------------------------------------------- ldmatrix

// Four 8 x 16-byte matrices from shared memory: lane 8i + j has the address, a multiple of 16, of row j of matrix i.
// As 16-bit elements, out[i] is row g, columns 2t and 2t + 1 of matrix i; as floats, row g, column t.
DSCONV_DEVICE void ldmatrix_x4(const void* row, uint32_t (&out)[4]) {
#if defined(__CUDA_ARCH__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
#elif !defined(__CUDACC__)
  cuda_host::ldmatrix_x4(row, out, false);
#endif
}

// The same with each matrix, of 16-bit elements, transposed: out[i] is rows 2t and 2t + 1, column g of matrix i.
DSCONV_DEVICE void ldmatrix_x4_trans(const void* row, uint32_t (&out)[4]) {
#if defined(__CUDA_ARCH__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
#elif !defined(__CUDACC__)
  cuda_host::ldmatrix_x4(row, out, true);
#endif
}

// ---------------------------------------------------------------------------------------------------------------- mma

// d += a . b^T over 8 columns, half a k16 step: what sm_75 has. a: a[0], a[1] of above; b: b[0].
DSCONV_DEVICE void mma_m16n8k8_f16(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
#if defined(__CUDA_ARCH__)
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b));
#elif !defined(__CUDACC__)
  const uint32_t a4[4] = {a[0], a[1], 0, 0}, b2[2] = {b, 0};
  cuda_host::mma(cuda_host::MmaType::f16_k8, d, a4, b2);
#endif
}

// At the start of a kernel that the planner sends to sm_80 and later only: for sm_75 nothing of it is compiled.
template <bool kOnlySm80>
DSCONV_DEVICE void never_on_sm_75() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  if constexpr (kOnlySm80) {
    asm volatile("trap;\n");
    __builtin_unreachable();
  }
#endif
}

// d += a . b^T, one k step: 16 columns of Half or BFloat16, 8 of float (TF32). The planner sends no BFloat16 and no
// TF32 to sm_75, which has neither.
template <typename T>
DSCONV_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
DSCONV_DEVICE void mma<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(__CUDA_ARCH__)
  mma_m16n8k8_f16(d, {a[0], a[1]}, b[0]);
  mma_m16n8k8_f16(d, {a[2], a[3]}, b[1]);
#elif !defined(__CUDACC__)
  cuda_host::mma(cuda_host::MmaType::f16, d, a, b);
#endif
}

template <>
DSCONV_DEVICE void mma<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(__CUDA_ARCH__)
  never_on_sm_75<true>();
#elif !defined(__CUDACC__)
  cuda_host::mma(cuda_host::MmaType::bf16, d, a, b);
#endif
}

template <>
DSCONV_DEVICE void mma<float>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(__CUDA_ARCH__)
  never_on_sm_75<true>();
#elif !defined(__CUDACC__)
  cuda_host::mma(cuda_host::MmaType::tf32, d, a, b);
#endif
}

// A float's bits rounded to TF32, to nearest with ties away from zero. Without it the tensor core would cut the lower
// bits off, an error twice as large and always towards zero.
DSCONV_DEVICE uint32_t to_tf32(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
  return bits;
#else
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return (bits & 0x7fffffu) != 0 ? bits | 0x400000u : bits;
  return (bits + 0x1000u) & ~0x1fffu;
#endif
}

}  // namespace dsconv
