// A step of training through two norms in two ops, for a block whose statistics stay in this process: what
// batchnorm_autograd.py does with the ops of op_cpu_norm.cpp and op_cpu_norm_backward.cpp one by one. After a layer of
// some megabytes each call of the dispatcher and each line of Python comes from memory again; on small maps that is a
// third of the step.
//
//   train_fwd    z_moments -> norm_vectors -> fwd_norm -> norm_vectors -> norm_act, norm_track for both
//   train_bwd    norm_act_sums -> bwd_norm, and the gradients of the norms' parameters from the sums
//
// The ops *_in_graph are the same for graphs of torch.compile, without what changes in place.
//
// Arguments are checked before anything is written, so that a call that was refused can be made again step by step.

#include "cpu_gate.h"
#include "kept_args.h"
#include "op_args.h"

namespace dsconv {
namespace {

// Parameters of a norm are in the compute type; its running statistics may be in the type of x too.
ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
void check_vector(const char* op, const char* arg, const Bias& t, const Tensor& x, int64_t channels,
                  bool may_be_narrow = false) {
  if (!t.has_value()) return;
  STD_TORCH_CHECK(t->scalar_type() == wide_type(x) || (may_be_narrow && t->scalar_type() == x.scalar_type()), op, ": ",
                  arg, " must be float32, beside float64 inputs float64");
  STD_TORCH_CHECK(t->device() == x.device(), op, ": ", arg, " must be on the device of input");
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == channels, op, ": ", arg, " must have shape [", channels, "]");
}

// Running statistics of one norm.
struct Running {
  const Bias &mean, &var, &batches;
  double momentum;

  void check(const char* op, const Tensor& x, int64_t channels) const {
    check_vector(op, "running_mean", mean, x, channels, true);
    check_vector(op, "running_var", var, x, channels, true);
    if (!batches.has_value()) return;
    STD_TORCH_CHECK(
        batches->scalar_type() == ScalarType::Long && batches->numel() == 1 && batches->device() == x.device(), op,
        ": num_batches_tracked must be one int64");
  }
  void track(const Tensor& moments, double count) const {
    norm_track(moments, count, momentum, mean, var);
    if (batches.has_value()) ++*static_cast<int64_t*>(batches->mutable_data_ptr());
  }
};

// Of y, which out_act does not reach before its norm.
CallArguments of_y(CallArguments arguments) {
  arguments.out_act = 0;
  return arguments;
}

double pixels_of(const Geometry& g) { return static_cast<double>(output_pixels(g)); }

struct Operands {
  const Tensor &x, &dw_weight, &pw_weight;
  const Bias &dw_bias, &pw_bias;
  CallArguments arguments;
  const Bias& in_vectors;
  int64_t in_act;

  Geometry geometry(const char* op) const { return geometry_of(op, x, dw_weight, pw_weight, arguments); }
  std::tuple<Tensor, Tensor> fwd_norm(const char* op, const Tensor& vectors, bool want_moments) const {
    return dsconv::fwd_norm(op, x, dw_weight, pw_weight, dw_bias, pw_bias, vectors, of_y(arguments), want_moments,
                            in_vectors, in_act);
  }
};

struct Affine {
  const Bias &weight, &bias;
  double eps;

  void check(const char* op, const char* weight_name, const char* bias_name, const Tensor& x, int64_t channels) const {
    STD_TORCH_CHECK(eps > 0, op, ": eps must be positive");
    check_vector(op, weight_name, weight, x, channels);
    check_vector(op, bias_name, bias, x, channels);
  }
};

struct Trained {
  Tensor y, moments1, moments2, vectors1, vectors2;
  Bias out;  // not with `defer`
};

Trained train(const char* op, const Operands& of, const Affine& norm1, const Affine& norm2, bool defer) {
  const Geometry g = of.geometry(op);
  STD_TORCH_CHECK(pixels_of(g) > 1, op, ": more than one value a channel is needed");
  norm1.check(op, "weight1", "bias1", of.x, g.c_mid);
  norm2.check(op, "weight2", "bias2", of.x, g.c_out);
  const Tensor moments1 =
      z_moments(op, of.x, of.dw_weight, of.pw_weight, of.dw_bias, of.arguments, of.in_vectors, of.in_act);
  const Tensor vectors1 = norm_vectors(moments1, norm1.weight, norm1.bias, norm1.eps);
  const auto [y, moments2] = of.fwd_norm(op, vectors1, true);
  const Tensor vectors2 = norm_vectors(moments2, norm2.weight, norm2.bias, norm2.eps);
  return {y,        moments1, moments2,
          vectors1, vectors2, defer ? Bias() : Bias(norm_act(y, vectors2, of.arguments.out_act))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> train_fwd(Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias,
                                                     Bias pw_bias, Bias weight1, Bias bias1, Bias weight2, Bias bias2,
                                                     Bias mean1, Bias var1, Bias batches1, Bias mean2, Bias var2,
                                                     Bias batches2, double eps1, double momentum1, double eps2,
                                                     double momentum2, Tensor kept, Bias in_vectors, int64_t in_act,
                                                     bool defer) {
  constexpr const char* op = "dsconv_cuda::train_fwd";
  const Operands of{x, dw_weight, pw_weight, dw_bias, pw_bias, kept_of(op, kept)->arguments, in_vectors, in_act};
  const Geometry g = of.geometry(op);
  const Running running1{mean1, var1, batches1, momentum1}, running2{mean2, var2, batches2, momentum2};
  running1.check(op, x, g.c_mid);
  running2.check(op, x, g.c_out);
  const Trained made = train(op, of, {weight1, bias1, eps1}, {weight2, bias2, eps2}, defer);
  running1.track(made.moments1, pixels_of(g));
  running2.track(made.moments2, pixels_of(g));
  return {defer ? made.y : *made.out, made.y, made.vectors1, made.vectors2};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> train_fwd_in_graph(
    Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Bias pw_bias, Bias weight1, Bias bias1, Bias weight2,
    Bias bias2, double eps1, double eps2, std::vector<int64_t> arguments, Bias in_vectors, int64_t in_act, bool defer) {
  constexpr const char* op = "dsconv_cuda::train_fwd_in_graph";
  const Operands of{x, dw_weight, pw_weight, dw_bias, pw_bias, arguments_of(op, arguments).call, in_vectors, in_act};
  const Trained made = train(op, of, {weight1, bias1, eps1}, {weight2, bias2, eps2}, defer);
  return {made.y, defer ? empty_of_nothing(x) : *made.out, made.vectors1, made.vectors2, made.moments1, made.moments2};
}

// What a bias adds, the norm after it takes off again.
Bias zeros_like(const Bias& bias) {
  Tensor grad = empty_contiguous(*bias, bias->sizes());
  return torch::stable::zero_(grad);
}

// One row of sums, [2, channels], in the dtype of the norm's parameters.
Tensor row_of_sums(const Tensor& sums, int64_t row, const Tensor& x) {
  const bool doubles = wide_type(x) == ScalarType::Double;
  const int64_t channels = sums.size(1), unit[1] = {1};
  Tensor grad =
      empty_of_dtype(doubles ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(), x, 1, &channels, unit);
  const double* from = static_cast<const double*>(sums.const_data_ptr()) + row * channels;
  if (doubles) {
    double* to = static_cast<double*>(grad.mutable_data_ptr());
    for (int64_t c = 0; c < channels; ++c) to[c] = from[c];
  } else {
    float* to = static_cast<float*>(grad.mutable_data_ptr());
    for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<float>(from[c]);
  }
  return grad;
}

enum NormGradBit : int64_t { kGradWeight1 = 32, kGradBias1 = 64, kGradWeight2 = 128, kGradBias2 = 256 };

using MaybeGrads = std::tuple<Bias, Bias, Bias, Bias, Bias, Bias, Bias, Bias, Bias>;

MaybeGrads gradients(const char* op, const Tensor& grad, const Bias& kept_y, const Operands& of, const Tensor& vectors1,
                     const Tensor& vectors2, int64_t mask) {
  const auto& [x, dw_weight, pw_weight, dw_bias, pw_bias, arguments, in_vectors, in_act] = of;
  const double count = pixels_of(of.geometry(op));
  const Bias y = kept_y.has_value() ? kept_y : Bias(std::get<0>(of.fwd_norm(op, vectors1, false)));
  const Tensor sums2 = norm_act_sums(grad, *y, vectors2, arguments.out_act);
  const auto [grad_x, grad_dw, grad_pw, grad_b2, sums1] =
      bwd_norm(op, grad, y, x, dw_weight, pw_weight, dw_bias, vectors1, vectors2, sums2, count, arguments,
               mask & (kGradX | kGradDwWeight | kGradPwWeight), in_vectors, in_act);
  const auto asked = [mask](int64_t bit, const Tensor& t) { return (mask & bit) != 0 ? Bias(t) : Bias(); };
  const auto row = [&](int64_t bit, const Tensor& sums, int64_t of) {
    return (mask & bit) != 0 ? Bias(row_of_sums(sums, of, x)) : Bias();
  };
  return {asked(kGradX, grad_x),
          asked(kGradDwWeight, grad_dw),
          asked(kGradPwWeight, grad_pw),
          (mask & kGradDwBias) != 0 ? zeros_like(dw_bias) : Bias(),
          (mask & kGradPwBias) != 0 ? zeros_like(pw_bias) : Bias(),
          row(kGradWeight1, sums1, 1),
          row(kGradBias1, sums1, 0),
          row(kGradWeight2, sums2, 1),
          row(kGradBias2, sums2, 0)};
}

MaybeGrads train_bwd(Tensor grad, Bias y, Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Bias pw_bias,
                     Tensor vectors1, Tensor vectors2, Tensor kept, int64_t mask, Bias in_vectors, int64_t in_act) {
  constexpr const char* op = "dsconv_cuda::train_bwd";
  const Operands of{x, dw_weight, pw_weight, dw_bias, pw_bias, kept_of(op, kept)->arguments, in_vectors, in_act};
  return gradients(op, grad, y, of, vectors1, vectors2, mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> train_bwd_in_graph(
    Tensor grad, Bias y, Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Bias pw_bias, Tensor vectors1,
    Tensor vectors2, std::vector<int64_t> arguments, int64_t mask, Bias in_vectors, int64_t in_act) {
  constexpr const char* op = "dsconv_cuda::train_bwd_in_graph";
  const Operands of{x, dw_weight, pw_weight, dw_bias, pw_bias, arguments_of(op, arguments).call, in_vectors, in_act};
  const auto there = [&x](const Bias& t) { return t.has_value() ? *t : empty_of_nothing(x); };
  return std::apply([&there](const auto&... grads) { return std::make_tuple(there(grads)...); },
                    gradients(op, grad, y, of, vectors1, vectors2, mask));
}

}  // namespace
}  // namespace dsconv

STABLE_TORCH_LIBRARY_IMPL(dsconv_cuda, CPU, m) {
  m.impl("train_fwd", TORCH_BOX(&dsconv::train_fwd));
  m.impl("train_bwd", TORCH_BOX(&dsconv::train_bwd));
  m.impl("train_fwd_in_graph", TORCH_BOX(&dsconv::train_fwd_in_graph));
  m.impl("train_bwd_in_graph", TORCH_BOX(&dsconv::train_bwd_in_graph));
}
