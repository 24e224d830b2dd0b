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

// Two adjacent channels, the lower one in the lower bits: what the bf16 dot product multiplies at a time.
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

// What the GEMM takes from a tile at a time, and how many channels that are.
template <typename M>
struct Factor {
  using type = M;
  static constexpr int channels = 1;
};
template <>
struct Factor<bf16> {
  using type = bf16x2;
  static constexpr int channels = 2;
};

}  // namespace dsconv
