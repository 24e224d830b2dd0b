// Runs the launchers of csrc/cuda over a matrix of calls, without torch: every dtype, layout, launcher path and
// activation, kernels around the edges of tiles. For sanitizer builds, so every buffer is exactly as large as what it
// holds and starts out as NaNs.
//
//   driver [EVERY [FIRST]]    runs each EVERY-th call from number FIRST on (default: all); prints what is wrong, then
//       cases N                of calls run, forward and backward counted apart
//       digest X               of every output, the same in every thread order
//       layer SECONDS          the forward of 32 -> 64 channels on 28 x 28, where that call was run
//   and exits with 1 on a wrong result or a failed launch.
//
// A result is right within 2 * (error of the unfused computation in the same types) + eps * max|oracle|.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cuda/cuda_dispatch.h"
#include "../../csrc/cuda/dtype.cuh"
#include "../../csrc/cuda/pixel.cuh"
#include "cuda_host.h"
#include "driver_calls.h"
#include "driver_tensors.h"
#include "host_runtime.h"
#include "reference.h"
#include "storage.h"

using namespace driver;
using reference::Inputs;

namespace {

// Of these the second has room for the widest tiles, and so few blocks at a time that the planner takes them.
constexpr int kDevices = 2;
DeviceLimits device_limits(int device) { return device == 0 ? limits_of(86, 4) : limits_of(90, 1); }

void set_device(const DeviceLimits& d) {
  cuda_host::set_device({static_cast<int>(d.capability / 10), static_cast<int>(d.capability % 10),
                         static_cast<int>(d.multiprocessors), static_cast<int>(d.shared_per_block)});
}

template <typename To, typename From>
std::vector<To> as(const std::vector<From>& values) {
  return {values.begin(), values.end()};
}

template <typename R>
Inputs<R> inputs_as(const Inputs<long double>& in) {
  return {as<R>(in.x),       as<R>(in.dw_weight), as<R>(in.dw_bias), as<R>(in.pw_weight),
          as<R>(in.pw_bias), as<R>(in.dy),        as<R>(in.saved)};
}

template <typename R, DType type>
R rounded(R value) {
  return storage::round_to(storage::format_of(type), value);
}

// What the product rounds its operands to: 10 bits of the fraction, or nothing that round() has not done.
template <typename R>
R tf32_rounded(R value) {
  return storage::round_to(storage::Format{4, 10, -126, 127}, value);
}
template <typename R>
R unrounded(R value) {
  return value;
}

// Calls visit with the type that is accumulated in and the rounding to what is stored.
template <typename Visit>
void with_types_of(DType type, Visit visit) {
  switch (type) {
    case DType::f64:
      return visit(&rounded<double, DType::f64>);
    case DType::f32:
      return visit(&rounded<float, DType::f32>);
    case DType::f16:
      return visit(&rounded<float, DType::f16>);
    case DType::bf16:
      return visit(&rounded<float, DType::bf16>);
  }
}

struct Tally {
  int forward = 0, backward = 0, wrong = 0;
  uint64_t digest = 1469598103934665603u;
  double layer_seconds = -1;

  void digest_bytes(const Buffer& buffer) {
    const auto* bytes = static_cast<const unsigned char*>(buffer.data());
    for (std::size_t i = 0; i < buffer.bytes(); ++i) digest = (digest ^ bytes[i]) * 1099511628211u;
  }
};

long double largest_difference(const Values& a, const Values& b) {
  long double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const long double difference = std::abs(a[i] - b[i]);
    if (!(difference <= largest)) largest = difference;  // NaN too
  }
  return largest;
}

long double largest_magnitude(const Values& a) {
  long double largest = 0;
  for (const long double value : a) largest = std::max(largest, std::abs(value));
  return largest;
}

class CallRun {
 public:
  CallRun(const Call& call, Tally& tally) : call_(call), g_(geometry_of(*call.shape)), tally_(tally) {
    Random random(call.number);
    in_ = draw(random);
    // One evaluation of a few numbers can be right by luck, so the peer computes more of them where there are few.
    others_.resize(input_pixels(g_) * g_.c_in < 64 ? 3 : 0);
    for (Inputs<long double>& other : others_) other = draw(random);

    x_ = Tensor5(call.type, g_.n, g_.c_in, g_.d_in, g_.h_in, g_.w_in, call.x_layout, call.padded_x ? 3 : 0);
    x_.set(in_.x);
    dw_weight_ = buffer_of(call.type, in_.dw_weight);
    pw_weight_ = buffer_of(call.type, in_.pw_weight);
    dw_bias_ = buffer_of(call.type, in_.dw_bias);
    pw_bias_ = buffer_of(call.type, in_.pw_bias);
  }

  void forward() {
    ++tally_.forward;
    Tensor5 y = y_like(), pre = y_like();
    ForwardParams p{};
    p.geom = g_;
    p.dtype = call_.type;
    p.tf32 = call_.tf32;
    p.act = call_.act;
    p.out_act = call_.out_act;
    p.x = x_.buffer.data();
    p.x_strides = x_.strides;
    p.x_layout = call_.x_layout;
    p.dw_weight = dw_weight_.data();
    p.dw_bias = call_.dw_bias ? dw_bias_.data() : nullptr;
    p.pw_weight = pw_weight_.data();
    p.pw_bias = call_.pw_bias ? pw_bias_.data() : nullptr;
    p.y = y.buffer.data();
    p.y_strides = y.strides;
    p.y_layout = call_.y_layout;
    p.pre = call_.pre ? pre.buffer.data() : nullptr;
    const auto start = std::chrono::steady_clock::now();
    set_device(device_limits(0));
    const LaunchStatus status = dsconv::forward(p, plan_forward(p, device_limits(0)), nullptr);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    if (call_.number == 0) tally_.layer_seconds = seconds.count();
    if (failed(status)) return;

    check_forward(y, pre);
    if (!can_split(p, device_limits(0))) return;
    // The same in two launches and a product between them, two images at a time.
    ++tally_.forward;
    Tensor5 y_of_two = y_like(), pre_of_two = y_like();
    p.y = y_of_two.buffer.data();
    if (call_.pre) p.pre = pre_of_two.buffer.data();
    const SplitForwardPlan split = split_by(p, std::min(p.geom.n, int64_t{2}));
    Buffer act_z(call_.type, split.workspace_bytes / static_cast<int64_t>(element_bytes(call_.type)));
    if (failed(split_forward(p, split, act_z.data(), device_limits(0), nullptr,
                             [&](const ForwardParams& part) { multiply(part, act_z); }))) {
      return;
    }
    check_forward(y_of_two, pre_of_two);
  }

  Tensor5 y_like() const {
    return Tensor5(call_.type, g_.n, g_.c_out, g_.d_out, g_.h_out, g_.w_out, call_.y_layout, 0);
  }

  void check_forward(const Tensor5& y, const Tensor5& pre) {
    const auto oracle = exact(in_).forward();
    long double y_error = 0, pre_error = 0;
    each_peer([&](const auto& peer, const auto& expected) {
      const auto result = peer.forward(), right = expected.forward();
      y_error = std::max(y_error, largest_difference(as<long double>(result.y), right.y));
      pre_error = std::max(pre_error, largest_difference(as<long double>(result.pre), right.pre));
    });
    compare("y", y.values(), oracle.y, y_error);
    tally_.digest_bytes(y.buffer);
    if (!call_.pre) return;
    compare("pre", pre.values(), oracle.pre, pre_error);
    tally_.digest_bytes(pre.buffer);
  }

  void backward() {
    ++tally_.backward;
    const DType type = call_.type;
    Tensor5 dy(type, g_.n, g_.c_out, g_.d_out, g_.h_out, g_.w_out, call_.dy_layout, call_.number % 4 == 2 ? 1 : 0);
    dy.set(in_.dy);
    Tensor5 saved(type, g_.n, g_.c_out, g_.d_out, g_.h_out, g_.w_out, call_.y_layout, 0);
    saved.set(in_.saved);

    const auto asked = [&](GradBit bit) { return (call_.grad_mask & bit) != 0; };
    BackwardParams p{};
    p.geom = g_;
    p.dtype = type;
    p.tf32 = call_.tf32;
    p.act = call_.act;
    p.out_act = call_.out_act;
    p.x = x_.buffer.data();
    p.x_strides = x_.strides;
    p.x_layout = call_.x_layout;
    p.dw_weight = dw_weight_.data();
    p.dw_bias = call_.dw_bias ? dw_bias_.data() : nullptr;
    p.pw_weight = pw_weight_.data();
    p.dy = dy.buffer.data();
    p.dy_strides = dy.strides;
    p.dy_layout = call_.dy_layout;
    if (call_.out_act != Activation::identity) {
      p.saved = saved.buffer.data();
      p.saved_strides = saved.strides;
      p.saved_layout = saved.layout;
    }

    const auto oracle = exact(in_).backward();
    long double error[5] = {};
    each_peer([&](const auto& peer, const auto& expected) {
      const auto result = peer.backward();
      const auto right = expected.backward();
      const auto raise = [&](int i, const auto& values, const Values& right_values) {
        error[i] = std::max(error[i], largest_difference(as<long double>(values), right_values));
      };
      raise(0, result.x, right.x);
      raise(1, result.dw_weight, right.dw_weight);
      raise(2, result.pw_weight, right.pw_weight);
      raise(3, result.dw_bias, right.dw_bias);
      raise(4, result.pw_bias, right.pw_bias);
    });
    const int64_t taps = tap_count(g_);
    for (int device = 0; device < kDevices; ++device) {
      Tensor5 grad_x(type, g_.n, g_.c_in, g_.d_in, g_.h_in, g_.w_in, call_.grad_x_layout, 0);
      Buffer grad_dw_weight(type, g_.c_mid * taps), grad_pw_weight(type, g_.c_out * g_.c_mid);
      Buffer grad_dw_bias(type, g_.c_mid), grad_pw_bias(type, g_.c_out);
      if (asked(kGradX)) {
        p.grad_x = grad_x.buffer.data();
        p.grad_x_strides = grad_x.strides;
        p.grad_x_layout = grad_x.layout;
      }
      if (asked(kGradDwWeight)) p.grad_dw_weight = grad_dw_weight.data();
      if (asked(kGradPwWeight)) p.grad_pw_weight = grad_pw_weight.data();
      if (asked(kGradDwBias)) p.grad_dw_bias = grad_dw_bias.data();
      if (asked(kGradPwBias)) p.grad_pw_bias = grad_pw_bias.data();
      set_device(device_limits(device));
      const BackwardPlan plan = plan_backward(p, device_limits(device));
      // Where it can be, on the second device, split around products.
      const SplitBackwardPlan split = plan_split_backward(p, device_limits(device));
      const bool splits = device == 1 && split.possible;
      const size_t bytes = splits ? split.workspace_bytes : plan.workspace_bytes;
      Buffer workspace(DType::f64, static_cast<int64_t>((bytes + 7) / 8));
      if (failed(splits ? split_backward(
                              p, split, workspace.data(), device_limits(device), nullptr,
                              [&](const void* g, void* du) { multiply_du(g, du); },
                              [&](const void* g, const void* a) { multiply_weight(g, a, p.grad_pw_weight); })
                        : dsconv::backward(p, plan, workspace.data(), nullptr))) {
        return;
      }

      if (asked(kGradX)) {
        compare("grad_x", grad_x.values(), oracle.x, error[0]);
        tally_.digest_bytes(grad_x.buffer);
      }
      const auto check = [&](GradBit bit, const char* name, const Buffer& grad, const Values& expected, int i) {
        if (!asked(bit)) return;
        compare(name, values_of(grad, static_cast<int64_t>(expected.size())), expected, error[i]);
        tally_.digest_bytes(grad);
      };
      check(kGradDwWeight, "grad_dw_weight", grad_dw_weight, oracle.dw_weight, 1);
      check(kGradPwWeight, "grad_pw_weight", grad_pw_weight, oracle.pw_weight, 2);
      check(kGradDwBias, "grad_dw_bias", grad_dw_bias, oracle.dw_bias, 3);
      check(kGradPwBias, "grad_pw_bias", grad_pw_bias, oracle.pw_bias, 4);
    }
  }

 private:
  using Exact = reference::Reference<long double>;

  // What the library's products do.
  void multiply_du(const void* g, void* du) const {
    product(output_pixels(g_), g_.c_mid, g_.c_out, g, {g_.c_out, 1}, pw_weight_.data(), {g_.c_mid, 1}, du);
  }
  void multiply_weight(const void* g, const void* act_z, void* grad) const {
    product(g_.c_out, g_.c_mid, output_pixels(g_), g, {1, g_.c_out}, act_z, {g_.c_mid, 1}, grad);
  }

  struct Steps {
    int64_t row, column;
  };

  // c = a . b, c being dense [rows, columns].
  void product(int64_t rows, int64_t columns, int64_t depth, const void* a, Steps of_a, const void* b, Steps of_b,
               void* c) const {
    const auto load = [&](const void* from, int64_t at) { return storage::load(call_.type, from, at); };
    with_types_of(call_.type, [&]<typename R>(R (*round)(R)) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          R sum = 0;
          for (int64_t k = 0; k < depth; ++k) {
            sum += static_cast<R>(load(a, i * of_a.row + k * of_a.column)) *
                   static_cast<R>(load(b, k * of_b.row + j * of_b.column));
          }
          storage::store(call_.type, c, i * columns + j, static_cast<long double>(round(sum)));
        }
      }
    });
  }

  void multiply(const ForwardParams& part, const Buffer& act_z) const {
    const Geometry& g = part.geom;
    const Strides from = act_z_strides(part);
    const Values a = values_of(act_z, g.n * from.n);
    const Values weight = values_of(pw_weight_, g.c_out * g.c_mid);
    const Values bias = call_.pw_bias ? values_of(pw_bias_, g.c_out) : Values{};
    with_types_of(call_.type, [&]<typename R>(R (*round)(R)) {
      for (int64_t q = 0; q < output_pixels(g); ++q) {
        const Pixel pixel = output_pixel_at(q, g);
        for (int64_t o = 0; o < g.c_out; ++o) {
          R sum = is_one_product(part) && call_.pw_bias ? static_cast<R>(bias[static_cast<std::size_t>(o)]) : R(0);
          for (int64_t c = 0; c < g.c_mid; ++c) {
            sum += static_cast<R>(a[static_cast<std::size_t>(pixel_offset(pixel, from) + c * from.c)]) *
                   static_cast<R>(weight[static_cast<std::size_t>(o * g.c_mid + c)]);
          }
          const int64_t at = pixel_offset(pixel, part.y_strides) + o * part.y_strides.c;
          storage::store(call_.type, static_cast<unsigned char*>(part.y), at, static_cast<long double>(round(sum)));
        }
      }
    });
  }

  Exact exact(const Inputs<long double>& in) const {
    const auto as_it_is = [](long double value) { return value; };
    return Exact(g_, call_.act, call_.out_act, in, as_it_is, as_it_is, false);
  }

  Inputs<long double> draw(Random& random) const {
    const DType type = call_.type;
    Inputs<long double> in;
    in.x = random.draw(type, input_pixels(g_) * g_.c_in);
    in.dw_weight = random.draw(type, g_.c_mid * tap_count(g_));
    in.pw_weight = random.draw(type, g_.c_out * g_.c_mid);
    if (call_.dw_bias) in.dw_bias = random.draw(type, g_.c_mid);
    if (call_.pw_bias) in.pw_bias = random.draw(type, g_.c_out);
    in.dy = random.draw(type, output_pixels(g_) * g_.c_out);
    const auto forward = exact(in).forward();
    in.saved = derivative_from_output(call_.out_act) ? forward.y : forward.pre;
    for (long double& value : in.saved) value = storage::round_to(storage::format_of(type), value);
    return in;
  }

  // Calls visit with the unfused computation of the same call, in one order of summation and the other, and with what
  // it should compute.
  template <typename Visit>
  void each_peer(Visit visit) const {
    with_types_of(call_.type, [&]<typename R>(R (*round)(R)) {
      R (*operand)(R) = call_.tf32 ? &tf32_rounded<R> : &unrounded<R>;
      const auto visit_both = [&](const Inputs<long double>& exact_in) {
        const Inputs<R> in = inputs_as<R>(exact_in);
        for (const bool backwards : {false, true}) {
          visit(reference::Reference<R>(g_, call_.act, call_.out_act, in, round, operand, backwards), exact(exact_in));
        }
      };
      visit_both(in_);
      for (const Inputs<long double>& other : others_) visit_both(other);
    });
  }

  bool failed(const LaunchStatus& status) {
    if (status.error == 0) return false;
    std::printf("call %d (%s): launch of %s: %s\n", call_.number, call_.shape->name, status.kernel,
                cudaGetErrorString(static_cast<cudaError_t>(status.error)));
    ++tally_.wrong;
    return true;
  }

  void compare(const char* what, const Values& actual, const Values& expected, long double peer_error) {
    const long double eps = storage::format_of(call_.type).eps();
    const long double budget = 2 * peer_error + eps * largest_magnitude(expected);
    const long double difference = largest_difference(actual, expected);
    if (difference <= budget) return;
    std::printf("call %d (%s, dtype %d, act %d, out_act %d): %s is off by %Lg, allowed is %Lg\n", call_.number,
                call_.shape->name, static_cast<int>(call_.type), static_cast<int>(call_.act),
                static_cast<int>(call_.out_act), what, difference, budget);
    ++tally_.wrong;
  }

  const Call& call_;
  Geometry g_;
  Tally& tally_;
  Inputs<long double> in_;
  std::vector<Inputs<long double>> others_;
  Tensor5 x_;
  Buffer dw_weight_, pw_weight_, dw_bias_, pw_bias_;
};

// The kernels' conversions of 2-byte types, on the host, against arithmetic: every value there is, and on the way to
// storage also the neighbours of every value and of every midpoint between two.
template <typename T>
int wrong_conversions(DType type) {
  const storage::Format f = storage::format_of(type);
  int wrong = 0;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = to_acc(T{static_cast<uint16_t>(bits)}), expected = storage::decode<float>(f, bits);
    wrong +=
        std::isnan(expected) ? !std::isnan(value) : value != expected || std::signbit(value) != std::signbit(expected);
    const float next = storage::decode<float>(f, (bits + 1) & 0xffffu);
    if (std::isnan(expected)) {
      wrong += !std::isnan(to_acc(from_acc<T>(expected)));
      continue;
    }
    for (const float base : {expected, std::isfinite(next) ? expected + (next - expected) / 2 : expected}) {
      for (const float candidate : {base, std::nextafter(base, HUGE_VALF), std::nextafter(base, -HUGE_VALF)}) {
        wrong += from_acc<T>(candidate).bits != storage::encode(f, storage::round_to(f, candidate));
      }
    }
  }
  if (wrong != 0) std::printf("%d conversions of dtype %d are wrong\n", wrong, static_cast<int>(type));
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  const int every = argc > 1 ? std::atoi(argv[1]) : 1, first = argc > 2 ? std::atoi(argv[2]) : 0;
  if (every < 1 || first < 0) {
    std::printf("usage: driver [EVERY [FIRST]]\n");
    return 2;
  }
  Tally tally;
  for (const Call& call : all_calls()) {
    if (call.number < first || (call.number - first) % every != 0) continue;
    CallRun run(call, tally);
    run.forward();
    run.backward();
  }
  tally.wrong += wrong_conversions<Half>(DType::f16) + wrong_conversions<BFloat16>(DType::bf16);
  std::printf("cases %d\ndigest %016llx\n", tally.forward + tally.backward,
              static_cast<unsigned long long>(tally.digest));
  if (tally.layer_seconds >= 0) std::printf("layer %.4f\n", tally.layer_seconds);
  return tally.wrong == 0 ? 0 : 1;
}
