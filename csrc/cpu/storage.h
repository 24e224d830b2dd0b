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

// The type a kernel accumulates in.
template <typename S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

}  // namespace dsconv
