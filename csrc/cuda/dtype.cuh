// Element types of the kernels, and their conversion to and from the type they accumulate in.
//
//   storage   bytes   accumulates in
//   float       4     float
//   double      8     double
//   Half        2     float            IEEE binary16
//   BFloat16    2     float            the upper half of a float
//
// The 2-byte types are plain storage without operators. Conversions to storage round to nearest even; NaN stays NaN.
#pragma once

#include <cstdint>

#include "../params.h"
#include "portability.cuh"

namespace dsconv {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using acc_t = typename AccOf<T>::type;

template <DType kType>
struct StorageOf {
  using type = float;
};
template <>
struct StorageOf<DType::f64> {
  using type = double;
};
template <>
struct StorageOf<DType::f16> {
  using type = Half;
};
template <>
struct StorageOf<DType::bf16> {
  using type = BFloat16;
};
template <DType kType>
using storage_t = typename StorageOf<kType>::type;

// N elements that are loaded and stored as one: up to 16 bytes in one instruction, more in as few as possible.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vec {
  T v[N];
};

// Elements in 16 bytes, the widest access there is.
template <typename T>
constexpr int kVecWidth = 16 / static_cast<int>(sizeof(T));

DSCONV_HOST_DEVICE bool is_aligned(const void* pointer, unsigned bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Reinterpretation of a float's bits, where device and host spell it differently.
DSCONV_HOST_DEVICE uint32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  return __builtin_bit_cast(uint32_t, value);
#endif
}

DSCONV_HOST_DEVICE float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return __builtin_bit_cast(float, bits);
#endif
}

DSCONV_HOST_DEVICE float to_acc(float value) { return value; }
DSCONV_HOST_DEVICE double to_acc(double value) { return value; }
DSCONV_HOST_DEVICE float to_acc(BFloat16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }

DSCONV_HOST_DEVICE float to_acc(Half value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // infinity and NaN
  if (magnitude < 0x400u) {  // zero and subnormals: a multiple of 2^-24, exact in a float
    const float scaled = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return sign != 0 ? -scaled : scaled;
  }
  return bits_float(sign | ((magnitude << 13) + (112u << 23)));
#endif
}

template <typename T>
DSCONV_HOST_DEVICE T from_acc(acc_t<T> value) {
  return value;
}

template <>
DSCONV_HOST_DEVICE BFloat16 from_acc<BFloat16>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};  // NaN, made quiet
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}

template <>
DSCONV_HOST_DEVICE Half from_acc<Half>(float value) {
#if defined(__CUDA_ARCH__)
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t bits = float_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 makes the float's last bit worth 2^-24, and the addition rounds to nearest even.
    const uint32_t sum = float_bits(bits_float(magnitude) + 0.5f);
    return {static_cast<uint16_t>(sign | (sum - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13))};
#endif
}

// Fused multiply-add: a * b + c with one rounding, on the device and on the host alike.
DSCONV_HOST_DEVICE float fused_multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DSCONV_HOST_DEVICE double fused_multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }

}  // namespace dsconv
