// 16-bit storage types of the CPU kernels: bits only. Arithmetic happens in float; the conversions are in vec_*.h.
#pragma once

#include <cstdint>

namespace dsconv {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

// Two numbers that a product sums over one after the other, the first in the lower bits: what the bf16 dot product
// multiplies at a time.
struct bf16x2 {
  uint32_t bits;
};

// The type a kernel accumulates in.
template <typename S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

// What the GEMM takes from a tile of M at a time, and how many numbers that are.
template <typename M>
struct Factor {
  using type = M;
};
template <>
struct Factor<bf16> {
  using type = bf16x2;
};
template <typename F>
constexpr int64_t kNumbersOf = 1;
template <>
inline constexpr int64_t kNumbersOf<bf16x2> = 2;

template <typename A, typename B>
struct SameType {
  static constexpr bool value = false;
};
template <typename A>
struct SameType<A, A> {
  static constexpr bool value = true;
};

}  // namespace dsconv
