// What the kernels must compute, written out: forward and backward of the op in plain loops, for the driver.
//
// With R = long double it is the oracle. With the type that the kernels accumulate in, and `round` to the type they
// store, it is the peer whose error sets the budget: the unfused computation, which rounds z, a, da and du on their way
// through memory, summed in one order or the other.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../../csrc/params.h"

namespace reference {

using dsconv::Activation;
using dsconv::Geometry;
using dsconv::output_pixels;
using dsconv::tap_count;

template <typename R>
R activate(Activation kind, R v) {
  const R half = R(1) / 2, root_half = std::sqrt(half);
  switch (kind) {
    case Activation::identity:
      return v;
    case Activation::relu:
      return v > 0 ? v : R(0);
    case Activation::relu6:
      return std::min(std::max(v, R(0)), R(6));
    case Activation::leaky_relu:
      return v > 0 ? v : v / 100;
    case Activation::silu:
      return v / (1 + std::exp(-v));
    case Activation::hardswish:
      return v * std::min(std::max(v + 3, R(0)), R(6)) / 6;
    case Activation::gelu:
      return half * v * (1 + std::erf(v * root_half));
    case Activation::gelu_tanh:
      return half * v * (1 + std::tanh(std::sqrt(2 / std::acos(R(-1))) * (v + R(44715) / 1000000 * v * v * v)));
    case Activation::sigmoid:
      return 1 / (1 + std::exp(-v));
    case Activation::tanh:
      return std::tanh(v);
    case Activation::hardsigmoid:
      return std::min(std::max(v + 3, R(0)), R(6)) / 6;
  }
  return v;
}

template <typename R>
R derivative(Activation kind, R v) {
  const R pi = std::acos(R(-1)), half = R(1) / 2;
  switch (kind) {
    case Activation::identity:
      return 1;
    case Activation::relu:
      return v > 0 ? 1 : 0;
    case Activation::relu6:
      return v > 0 && v < 6 ? 1 : 0;
    case Activation::leaky_relu:
      return v > 0 ? R(1) : R(1) / 100;
    case Activation::silu: {
      const R s = 1 / (1 + std::exp(-v));
      return s * (1 + v * (1 - s));
    }
    case Activation::hardswish:
      return v <= -3 ? R(0) : v >= 3 ? R(1) : (2 * v + 3) / 6;
    case Activation::gelu:
      return half * (1 + std::erf(v * std::sqrt(half))) + v * std::exp(-v * v * half) / std::sqrt(2 * pi);
    case Activation::gelu_tanh: {
      const R scale = std::sqrt(2 / pi), cubic = R(44715) / 1000000;
      const R t = std::tanh(scale * (v + cubic * v * v * v));
      return half * (1 + t) + half * v * (1 - t * t) * scale * (1 + 3 * cubic * v * v);
    }
    case Activation::sigmoid: {
      const R s = 1 / (1 + std::exp(-v));
      return s * (1 - s);
    }
    case Activation::tanh: {
      const R t = std::tanh(v);
      return 1 - t * t;
    }
    case Activation::hardsigmoid:
      return v > -3 && v < 3 ? R(1) / 6 : R(0);
  }
  return 1;
}

// The same from the activation's result, for those that params.h says it can be told from.
template <typename R>
R derivative_from_result(Activation kind, R y) {
  switch (kind) {
    case Activation::sigmoid:
      return y * (1 - y);
    case Activation::tanh:
      return 1 - y * y;
    default:
      return derivative(kind, y);
  }
}

template <typename R>
struct Inputs {
  std::vector<R> x, dw_weight, dw_bias, pw_weight, pw_bias;  // an empty bias is none
  std::vector<R> dy, saved;                                  // dense [n, c_out, d_out, h_out, w_out]
};

template <typename R>
struct Forward {
  std::vector<R> y, pre;
};

template <typename R>
struct Backward {
  std::vector<R> x, dw_weight, pw_weight, dw_bias, pw_bias;
};

template <typename R>
class Reference {
 public:
  using Round = R (*)(R);

  // `round` makes of a value what is stored, `operand` of that what the pointwise products take.
  Reference(const Geometry& g, Activation act, Activation out_act, const Inputs<R>& in, Round round, Round operand,
            bool backwards)
      : g_(g), act_(act), out_act_(out_act), in_(in), round_(round), operand_(operand), backwards_(backwards) {}

  Forward<R> forward() const {
    const std::vector<R> z = depthwise();
    Forward<R> out;
    out.y.resize(count(g_.c_out * outputs()));
    out.pre.resize(out.y.size());
    each_output([&](int64_t n, int64_t d, int64_t h, int64_t w) {
      for (int64_t o = 0; o < g_.c_out; ++o) {
        R sum = in_.pw_bias.empty() ? R(0) : in_.pw_bias[at(o)];
        for (int64_t i = 0; i < g_.c_mid; ++i) {
          const int64_t c = turned(i, g_.c_mid);
          const R a = round_(activate(act_, z[at(z_index(n, c, d, h, w))]));
          sum += operand_(in_.pw_weight[at(o * g_.c_mid + c)]) * operand_(a);
        }
        out.pre[at(y_index(n, o, d, h, w))] = round_(sum);
        out.y[at(y_index(n, o, d, h, w))] = round_(activate(out_act_, round_(sum)));
      }
    });
    return out;
  }

  Backward<R> backward() const {
    const std::vector<R> z = depthwise();
    Backward<R> grad;
    grad.x.resize(in_.x.size());
    grad.dw_weight.resize(in_.dw_weight.size());
    grad.pw_weight.resize(in_.pw_weight.size());
    grad.dw_bias.resize(count(g_.c_mid));
    grad.pw_bias.resize(count(g_.c_out));
    std::vector<R> grad_out(count(g_.c_out));
    each_output([&](int64_t n, int64_t d, int64_t h, int64_t w) {
      for (int64_t o = 0; o < g_.c_out; ++o) {
        const std::size_t i = at(y_index(n, o, d, h, w));
        R slope = 1;
        if (out_act_ != Activation::identity) {
          slope = dsconv::derivative_from_output(out_act_) ? derivative_from_result(out_act_, in_.saved[i])
                                                           : derivative(out_act_, in_.saved[i]);
        }
        grad_out[at(o)] = round_(in_.dy[i] * slope);
        grad.pw_bias[at(o)] += grad_out[at(o)];
      }
      for (int64_t c = 0; c < g_.c_mid; ++c) {
        const R z_here = z[at(z_index(n, c, d, h, w))], a = round_(activate(act_, z_here));
        R da = 0;
        for (int64_t i = 0; i < g_.c_out; ++i) {
          const int64_t o = turned(i, g_.c_out);
          da += operand_(in_.pw_weight[at(o * g_.c_mid + c)]) * operand_(grad_out[at(o)]);
          grad.pw_weight[at(o * g_.c_mid + c)] += operand_(grad_out[at(o)]) * operand_(a);
        }
        const R du = round_(round_(da) * derivative(act_, z_here));
        grad.dw_bias[at(c)] += du;
        each_tap(n, c, d, h, w, [&](std::size_t x, std::size_t tap) {
          grad.x[x] += du * in_.dw_weight[tap];
          grad.dw_weight[tap] += du * in_.x[x];
        });
      }
    });
    for (std::vector<R>* values : {&grad.x, &grad.dw_weight, &grad.pw_weight, &grad.dw_bias, &grad.pw_bias}) {
      for (R& value : *values) value = round_(value);
    }
    return grad;
  }

 private:
  static std::size_t at(int64_t i) { return static_cast<std::size_t>(i); }
  static std::size_t count(int64_t i) { return static_cast<std::size_t>(i); }
  int64_t outputs() const { return output_pixels(g_); }
  int64_t turned(int64_t i, int64_t of) const { return backwards_ ? of - 1 - i : i; }
  int64_t z_index(int64_t n, int64_t c, int64_t d, int64_t h, int64_t w) const {
    return (((n * g_.c_mid + c) * g_.d_out + d) * g_.h_out + h) * g_.w_out + w;
  }
  int64_t y_index(int64_t n, int64_t o, int64_t d, int64_t h, int64_t w) const {
    return (((n * g_.c_out + o) * g_.d_out + d) * g_.h_out + h) * g_.w_out + w;
  }

  template <typename Visit>
  void each_output(Visit visit) const {
    for (int64_t i = 0; i < outputs(); ++i) {
      const int64_t q = turned(i, outputs());
      const int64_t line = q / g_.w_out, slice = line / g_.h_out;
      visit(slice / g_.d_out, slice % g_.d_out, line % g_.h_out, q % g_.w_out);
    }
  }

  // The elements of x under the taps of one output of the depthwise stage, and the taps' weights.
  template <typename Visit>
  void each_tap(int64_t n, int64_t c, int64_t d, int64_t h, int64_t w, Visit visit) const {
    const int64_t taps = tap_count(g_);
    for (int64_t i = 0; i < taps; ++i) {
      const int64_t tap = turned(i, taps), kw = tap % g_.kernel_w, line = tap / g_.kernel_w;
      const int64_t kh = line % g_.kernel_h, kd = line / g_.kernel_h;
      const int64_t depth = d * g_.stride_d - g_.pad_front + kd * g_.dilation_d;
      const int64_t row = h * g_.stride_h - g_.pad_top + kh * g_.dilation_h;
      const int64_t col = w * g_.stride_w - g_.pad_left + kw * g_.dilation_w;
      if (depth < 0 || depth >= g_.d_in || row < 0 || row >= g_.h_in || col < 0 || col >= g_.w_in) continue;
      const int64_t channel = n * g_.c_in + c / g_.multiplier;
      visit(at(((channel * g_.d_in + depth) * g_.h_in + row) * g_.w_in + col), at(c * taps + tap));
    }
  }

  std::vector<R> depthwise() const {
    std::vector<R> z(count(g_.c_mid * outputs()));
    each_output([&](int64_t n, int64_t d, int64_t h, int64_t w) {
      for (int64_t c = 0; c < g_.c_mid; ++c) {
        R sum = in_.dw_bias.empty() ? R(0) : in_.dw_bias[at(c)];
        each_tap(n, c, d, h, w, [&](std::size_t x, std::size_t tap) { sum += in_.x[x] * in_.dw_weight[tap]; });
        z[at(z_index(n, c, d, h, w))] = round_(sum);
      }
    });
    return z;
  }

  const Geometry& g_;
  Activation act_, out_act_;
  const Inputs<R>& in_;
  Round round_, operand_;
  bool backwards_;
};

}  // namespace reference
