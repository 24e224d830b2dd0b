// The activations of params.h and their derivatives, for the host and the device.
//
// Derivatives at kinks and for NaN are those of PyTorch's backward functions: relu' is 0 at 0, relu6' is 0 at 0 and 6,
// leaky_relu' is 0.01 at 0, hardswish' is 0 at -3 and 1 at 3, hardsigmoid' is 0 at -3 and 3; relu and relu6 let NaN
// through. Constants are written to the last digit of a double.
//
// The kind is a runtime value, the same for a whole launch, so the branches never diverge. The kinds that need exp,
// tanh or erf live in functions that are not inlined: an epilogue applies an activation to dozens of registers, and one
// call each keeps the kernels small.
#pragma once

#include <cmath>

#include "../params.h"
#include "portability.cuh"

#if defined(__CUDACC__)
#define DSCONV_CALLED __device__ __noinline__
#else
#define DSCONV_CALLED inline
#endif

namespace dsconv {

constexpr double kLeakySlope = 0.01;
constexpr double kSqrtHalf = 0.70710678118654752440;       // 1 / sqrt(2)
constexpr double kInvSqrtTwoPi = 0.39894228040143267794;   // 1 / sqrt(2 pi)
constexpr double kSqrtTwoOverPi = 0.79788456080286535588;  // of gelu_tanh
constexpr double kGeluTanhCubic = 0.044715;

template <typename Acc>
DSCONV_DEVICE Acc sigmoid_of(Acc v) {
  return Acc(1) / (Acc(1) + std::exp(-v));
}

template <typename Acc>
DSCONV_CALLED Acc activate_smooth(Activation kind, Acc v) {
  switch (kind) {
    case Activation::silu:
      return v / (Acc(1) + std::exp(-v));
    case Activation::gelu:
      return v * Acc(0.5) * (Acc(1) + std::erf(v * Acc(kSqrtHalf)));
    case Activation::gelu_tanh:
      return Acc(0.5) * v * (Acc(1) + std::tanh(Acc(kSqrtTwoOverPi) * (v + Acc(kGeluTanhCubic) * v * v * v)));
    case Activation::sigmoid:
      return sigmoid_of(v);
    default:
      return std::tanh(v);
  }
}

template <typename Acc>
DSCONV_CALLED Acc derivative_smooth(Activation kind, Acc v) {
  switch (kind) {
    case Activation::silu: {
      const Acc s = sigmoid_of(v);
      return s * (Acc(1) + v * (Acc(1) - s));
    }
    case Activation::gelu: {
      const Acc cdf = Acc(0.5) * (Acc(1) + std::erf(v * Acc(kSqrtHalf)));
      return cdf + v * Acc(kInvSqrtTwoPi) * std::exp(Acc(-0.5) * v * v);
    }
    case Activation::gelu_tanh: {
      const Acc t = std::tanh(Acc(kSqrtTwoOverPi) * (v + Acc(kGeluTanhCubic) * v * v * v));
      const Acc inner = Acc(kSqrtTwoOverPi) * (Acc(1) + Acc(3 * kGeluTanhCubic) * v * v);
      return Acc(0.5) * (Acc(1) + t) + Acc(0.5) * v * (Acc(1) - t * t) * inner;
    }
    case Activation::sigmoid: {
      const Acc s = sigmoid_of(v);
      return s * (Acc(1) - s);
    }
    default: {
      const Acc t = std::tanh(v);
      return Acc(1) - t * t;
    }
  }
}

// act(v)
template <typename Acc>
DSCONV_DEVICE Acc activate(Activation kind, Acc v) {
  switch (kind) {
    case Activation::identity:
      return v;
    case Activation::relu:
      return v <= Acc(0) ? Acc(0) : v;
    case Activation::relu6:
      return v <= Acc(0) ? Acc(0) : v >= Acc(6) ? Acc(6) : v;
    case Activation::leaky_relu:
      return v > Acc(0) ? v : v * Acc(kLeakySlope);
    case Activation::hardswish:
      return v <= Acc(-3) ? Acc(0) : v >= Acc(3) ? v : v * (v + Acc(3)) * Acc(1.0 / 6.0);
    case Activation::hardsigmoid:
      return v <= Acc(-3) ? Acc(0) : v >= Acc(3) ? Acc(1) : (v + Acc(3)) * Acc(1.0 / 6.0);
    default:
      return activate_smooth(kind, v);
  }
}

// act'(v), from the value before the activation
template <typename Acc>
DSCONV_DEVICE Acc activation_derivative(Activation kind, Acc v) {
  switch (kind) {
    case Activation::identity:
      return Acc(1);
    case Activation::relu:
      return v <= Acc(0) ? Acc(0) : Acc(1);
    case Activation::relu6:
      return v <= Acc(0) || v >= Acc(6) ? Acc(0) : Acc(1);
    case Activation::leaky_relu:
      return v > Acc(0) ? Acc(1) : Acc(kLeakySlope);
    case Activation::hardswish:
      return v <= Acc(-3) ? Acc(0) : v < Acc(3) ? v * Acc(1.0 / 3.0) + Acc(0.5) : Acc(1);
    case Activation::hardsigmoid:
      return v > Acc(-3) && v < Acc(3) ? Acc(1.0 / 6.0) : Acc(0);
    default:
      return derivative_smooth(kind, v);
  }
}

// act'(.) from what forward saved: the output where derivative_from_output(kind), else the value before.
template <typename Acc>
DSCONV_DEVICE Acc derivative_from_saved(Activation kind, Acc saved) {
  if (kind == Activation::sigmoid) return saved * (Acc(1) - saved);
  if (kind == Activation::tanh) return Acc(1) - saved * saved;
  return activation_derivative(kind, saved);
}

}  // namespace dsconv
