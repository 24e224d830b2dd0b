// CUDA's vector types and small intrinsics, for a compiler that has no CUDA headers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3() = default;
  constexpr dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct uint3 {
  unsigned x, y, z;
};

#define CUDA_HOST_VECTOR(type, base)                                                      \
  struct alignas(2 * sizeof(type)) base##2 { type x, y; };                                \
  struct alignas(sizeof(type) >= 4 ? 16 : 4 * sizeof(type)) base##4 { type x, y, z, w; }; \
  inline constexpr base##2 make_##base##2(type x, type y) { return {x, y}; }              \
  inline constexpr base##4 make_##base##4(type x, type y, type z, type w) { return {x, y, z, w}; }

CUDA_HOST_VECTOR(float, float)
CUDA_HOST_VECTOR(double, double)
CUDA_HOST_VECTOR(int, int)
CUDA_HOST_VECTOR(unsigned, uint)
CUDA_HOST_VECTOR(short, short)
CUDA_HOST_VECTOR(unsigned short, ushort)
#undef CUDA_HOST_VECTOR

// CUDA has these in the global namespace for device code.
using std::max;
using std::min;

namespace cuda_host {
template <typename To, typename From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}
}  // namespace cuda_host

inline unsigned __float_as_uint(float v) { return cuda_host::bits_as<unsigned>(v); }
inline int __float_as_int(float v) { return cuda_host::bits_as<int>(v); }
inline float __uint_as_float(unsigned v) { return cuda_host::bits_as<float>(v); }
inline float __int_as_float(int v) { return cuda_host::bits_as<float>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }

template <typename T>
inline T __ldg(const T* p) {
  return *p;
}
