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
DSCONV_DEVICE Acc smooth_value(Activation kind, Acc v) {
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
DSCONV_DEVICE Acc smooth_slope(Activation kind, Acc v) {
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

template <typename Acc>
DSCONV_DEVICE Acc hardswish_of(Acc v) {
  return v <= Acc(-3) ? Acc(0) : v >= Acc(3) ? v : v * (v + Acc(3)) * Acc(1.0 / 6.0);
}

template <typename Acc>
DSCONV_DEVICE Acc hardsigmoid_of(Acc v) {
  return v <= Acc(-3) ? Acc(0) : v >= Acc(3) ? Acc(1) : (v + Acc(3)) * Acc(1.0 / 6.0);
}

template <typename Acc>
DSCONV_CALLED Acc activate_smooth(Activation kind, Acc v) {
  return smooth_value(kind, v);
}

template <typename Acc>
DSCONV_CALLED Acc derivative_smooth(Activation kind, Acc v) {
  return smooth_slope(kind, v);
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
      return hardswish_of(v);
    case Activation::hardsigmoid:
      return hardsigmoid_of(v);
    default:
      return activate_smooth(kind, v);
  }
}

DSCONV_HOST_DEVICE bool is_piecewise(Activation kind) {
  return kind == Activation::identity || kind == Activation::relu || kind == Activation::relu6 ||
         kind == Activation::leaky_relu;
}

DSCONV_HOST_DEVICE bool is_smooth(Activation kind) {
  return !is_piecewise(kind) && kind != Activation::hardswish && kind != Activation::hardsigmoid;
}

// act'(v) of the kinds with kinks
template <typename Acc>
DSCONV_DEVICE Acc sharp_slope(Activation kind, Acc v) {
  switch (kind) {
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
      return Acc(1);
  }
}

// act'(v), from the value before the activation
template <typename Acc>
DSCONV_DEVICE Acc activation_derivative(Activation kind, Acc v) {
  return is_smooth(kind) ? derivative_smooth(kind, v) : sharp_slope(kind, v);
}

// Calls f on each value in turn, with one copy of f's code: the values move round through the first register. A call in
// its place would have every accumulator of the caller spilled around it.
template <typename Acc, int kCount, typename F>
DSCONV_DEVICE void in_turn(Acc (&values)[kCount], const F& f) {
#pragma unroll 1
  for (int turn = 0; turn < kCount; ++turn) {
    const Acc result = f(values[0]);
#pragma unroll
    for (int i = 0; i + 1 < kCount; ++i) values[i] = values[i + 1];
    values[kCount - 1] = result;
  }
}

// act of several values, of a kind that is_piecewise(): what most networks have, straight through.
template <typename Acc, int kCount>
DSCONV_DEVICE void activate_piecewise(Activation kind, Acc (&values)[kCount]) {
  const Acc below = kind == Activation::identity ? Acc(1) : kind == Activation::leaky_relu ? Acc(kLeakySlope) : Acc(0);
  const Acc most = kind == Activation::relu6 ? Acc(6) : Acc(HUGE_VAL);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const Acc v = values[i];
    values[i] = v <= Acc(0) ? (below != Acc(0) ? v * below : Acc(0)) : v >= most ? most : v;
  }
}

// The same of the other kinds, in turn.
template <typename Acc, int kCount>
DSCONV_DEVICE void activate_in_turn(Activation kind, Acc (&values)[kCount]) {
  in_turn(values, [&](Acc v) {
    if (kind == Activation::hardswish) return hardswish_of(v);
    return kind == Activation::hardsigmoid ? hardsigmoid_of(v) : smooth_value(kind, v);
  });
}

template <typename Acc, int kCount>
DSCONV_DEVICE void activate_all(Activation kind, Acc (&values)[kCount]) {
  if (kind == Activation::identity) return;
  if (is_piecewise(kind)) {
    activate_piecewise(kind, values);
  } else {
    activate_in_turn(kind, values);
  }
}

// act' of several values before the activation.
template <typename Acc, int kCount>
DSCONV_DEVICE void derive_all(Activation kind, Acc (&values)[kCount]) {
  in_turn(values, [&](Acc v) { return is_smooth(kind) ? smooth_slope(kind, v) : sharp_slope(kind, v); });
}

// act'(.) from what forward saved: the output where derivative_from_output(kind), else the value before.
template <typename Acc>
DSCONV_DEVICE Acc derivative_from_saved(Activation kind, Acc saved) {
  if (kind == Activation::sigmoid) return saved * (Acc(1) - saved);
  if (kind == Activation::tanh) return Acc(1) - saved * saved;
  return activation_derivative(kind, saved);
}

template <typename Acc, int kCount>
DSCONV_DEVICE void derive_all_from_saved(Activation kind, Acc (&saved)[kCount]) {
  in_turn(saved, [&](Acc v) {
    if (kind == Activation::sigmoid) return v * (Acc(1) - v);
    if (kind == Activation::tanh) return Acc(1) - v * v;
    return is_smooth(kind) ? smooth_slope(kind, v) : sharp_slope(kind, v);
  });
}

}  // namespace dsconv
