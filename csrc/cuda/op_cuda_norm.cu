// The CUDA host entries of training through BatchNorm: what op_cpu_norm.cpp and op_cpu_norm_backward.cpp are on the
// CPU. The norm after the depthwise part is folded into weights in the dtype of x, so forward and stage P are those of
// fwd and bwd; dz is made from du between the stages.

#include <optional>
#include <tuple>
#include <vector>

#include "../norm_args.h"
#include "cuda_call.h"
#include "cuda_dispatch.h"
#include "cuda_norm.h"

namespace dsconv {
namespace {

using Bias = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

#define DSCONV_BY_DTYPE(dtype, launch, ...)                    \
  ((dtype) == DType::f64    ? launch<DType::f64>(__VA_ARGS__)  \
   : (dtype) == DType::f16  ? launch<DType::f16>(__VA_ARGS__)  \
   : (dtype) == DType::bf16 ? launch<DType::bf16>(__VA_ARGS__) \
                            : launch<DType::f32>(__VA_ARGS__))

int64_t splits_of(int64_t pixels) {
  constexpr int64_t kMostSplits = 256;
  const int64_t splits = ceil_div(pixels, kNormSplit);
  return splits < kMostSplits ? splits : kMostSplits;
}

void set_v(NormSource& source, const Tensor& v) {
  const int64_t h = v.dim() - 2;
  source.n = v.size(0), source.channels = v.size(1);
  source.d = h == 3 ? v.size(2) : 1, source.h = v.size(h), source.w = v.size(h + 1);
  source.v = v.const_data_ptr();
  source.v_strides = strides_of(v);
}

template <typename Params>
void set_z(NormSource& source, const Params& p) {
  const Geometry& g = p.geom;
  source.n = g.n, source.channels = g.c_mid, source.d = g.d_out, source.h = g.h_out, source.w = g.w_out;
  source.from_x = true;
  source.geom = g;
  source.x = p.x;
  source.x_strides = p.x_strides;
  source.dw_weight = p.dw_weight;
  source.dw_bias = p.dw_bias;
}

// Sums over all pixels: [2, channels].
template <typename Launch>
Tensor run_sums(const char* op, NormPass& pass, const Tensor& like, const CurrentDevice& device, const Launch& launch) {
  const NormSource& source = pass.source;
  Tensor result = empty_doubles(like, 2, source.channels);
  const int64_t pixels = source_pixels(source);
  if (pixels == 0) return torch::stable::zero_(result);
  pass.splits = splits_of(pixels);
  const Tensor partial = empty_doubles(like, pass.splits, 2 * source.channels);
  pass.partial = static_cast<double*>(partial.mutable_data_ptr());
  pass.result = static_cast<double*>(result.mutable_data_ptr());
  check_launch(op, launch(pass, device.stream()));
  return result;
}

Tensor norm_act(Tensor v, Tensor vectors, int64_t act);

// x after the norm and the activation of the block before, made for the call and forgotten.
Tensor input_of(const Tensor& x, const Bias& in_vectors, int64_t in_act) {
  return in_vectors.has_value() ? norm_act(x, *in_vectors, in_act) : x;
}

struct MomentsCall {
  ForwardParams params;
  Bias x, dw_weight, pw_weight, dw_bias;
};

Tensor z_moments(Tensor before, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Ints stride, Ints padding,
                 Ints dilation, Bias in_vectors, int64_t in_act) {
  constexpr const char* op = "dsconv_cuda::z_moments";
  const Tensor x = input_of(before, in_vectors, in_act);
  MomentsCall call{};
  prepare_operands(call, op, x, dw_weight, pw_weight, dw_bias, arguments_of(op, stride, padding, dilation, 0, 0));
  check_extents(op, call.params.geom);
  const CurrentDevice device(x);
  NormPass pass{};
  set_z(pass.source, call.params);
  return run_sums(op, pass, x, device, [&](const NormPass& ready, void* stream) {
    return DSCONV_BY_DTYPE(call.params.dtype, launch_norm_moments, ready, stream);
  });
}

Tensor norm_vectors(Tensor moments, Bias gamma, Bias beta, double eps) {
  constexpr const char* op = "dsconv_cuda::norm_vectors";
  STD_TORCH_CHECK(moments.dim() == 2, op, ": moments must have shape [2, C]");
  const int64_t channels = moments.size(1);
  const double* from = doubles_of(op, "moments", moments, 2, channels);
  NormParameters parameters{};
  Bias kept_gamma, kept_beta;
  const auto take = [&](const char* arg, const Bias& t, Bias& kept, const void*& pointer, bool& is_double) {
    if (!t.has_value()) return;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == channels, op, ": ", arg, " must have shape [", channels, "]");
    is_double = t->scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK(is_double || t->scalar_type() == ScalarType::Float, op, ": ", arg, " must be float32 or float64");
    kept = dense(*t);
    pointer = kept->const_data_ptr();
  };
  take("weight", gamma, kept_gamma, parameters.gamma, parameters.gamma_double);
  take("bias", beta, kept_beta, parameters.beta, parameters.beta_double);
  const CurrentDevice device(moments);
  Tensor result = empty_doubles(moments, kVectorRows, channels);
  check_launch(op, launch_norm_vectors(from, parameters, eps, channels, static_cast<double*>(result.mutable_data_ptr()),
                                       device.stream()));
  return result;
}

struct Folded {
  Tensor weight, bias;
};
template <typename Params>
Folded fold(const char* op, const Params& p, const double* vectors, const Tensor& dw_weight,
            const CurrentDevice& device) {
  const int64_t channels[1] = {p.geom.c_mid};
  Folded folded = {empty_contiguous(dw_weight, dw_weight.sizes()), empty_contiguous(dw_weight, {channels, 1})};
  NormPass pass{};
  set_z(pass.source, p);
  pass.vectors = vectors;
  check_launch(op, DSCONV_BY_DTYPE(p.dtype, launch_norm_fold, pass, tap_count(p.geom), folded.weight.mutable_data_ptr(),
                                   folded.bias.mutable_data_ptr(), device.stream()));
  return folded;
}

Tensor moments(Tensor v);

std::tuple<Tensor, Tensor> fwd_norm(Tensor before, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Bias pw_bias,
                                    Tensor vectors, Ints stride, Ints padding, Ints dilation, int64_t act,
                                    bool want_moments, Bias in_vectors, int64_t in_act, bool tf32) {
  constexpr const char* op = "dsconv_cuda::fwd_norm";
  const Tensor x = input_of(before, in_vectors, in_act);
  ForwardCall call = prepare_forward(op, x, dw_weight, pw_weight, dw_bias, pw_bias,
                                     arguments_of(op, stride, padding, dilation, act, 0), false);
  call.params.tf32 = tf32;
  check_extents(op, call.params.geom);
  const double* of = doubles_of(op, "vectors", vectors, kVectorRows, call.params.geom.c_mid);
  const CurrentDevice device(x);
  const Folded folded = fold(op, call.params, of, dw_weight, device);
  call.params.dw_weight = folded.weight.const_data_ptr();
  call.params.dw_bias = folded.bias.const_data_ptr();
  check_launch(op, forward(call.params, plan_forward(call.params, device_limits()), device.stream()));
  return {*call.y, want_moments ? moments(*call.y) : empty_doubles(x, 2, 0)};
}

void check_dims(const char* op, const Tensor& v) {
  STD_TORCH_CHECK(v.dim() == 4 || v.dim() == 5, op, ": input must have 4 dimensions, 5 in 3-D, got ", v.dim());
}

NormPass norm_of(const char* op, const Tensor& v, const Tensor& vectors, int64_t act) {
  check_dims(op, v);
  NormPass pass{};
  set_v(pass.source, v);
  pass.act = activation_of(op, "activation", act);
  pass.vectors = doubles_of(op, "vectors", vectors, kVectorRows, pass.source.channels);
  return pass;
}

void set_grad(const char* op, NormPass& pass, const Tensor& grad, const Tensor& v) {
  check_operand(op, "grad_output", grad, v);
  STD_TORCH_CHECK(same_sizes(grad, v), op, ": grad_output must have the shape of the output");
  pass.grad = grad.const_data_ptr();
  pass.grad_strides = strides_of(grad);
}

Tensor output_of(NormPass& pass, const Tensor& v) {
  const bool channels_last = suggests_channels_last(v);
  const NormSource& source = pass.source;
  Tensor out = empty_images(v, source.n, source.channels, source.d, source.h, source.w, channels_last);
  pass.out = out.mutable_data_ptr();
  pass.out_strides = walk_strides(out, channels_last ? Layout::nhwc : Layout::nchw);
  if (!channels_last) pass.out_strides.c = source.d * source.h * source.w;
  return out;
}

Tensor moments(Tensor v) {
  constexpr const char* op = "dsconv_cuda::moments";
  check_dims(op, v);
  const DType dtype = dtype_of(op, v);
  const CurrentDevice device(v);
  NormPass pass{};
  set_v(pass.source, v);
  return run_sums(op, pass, v, device, [&](const NormPass& ready, void* stream) {
    return DSCONV_BY_DTYPE(dtype, launch_norm_moments, ready, stream);
  });
}

Tensor norm_act(Tensor v, Tensor vectors, int64_t act) {
  constexpr const char* op = "dsconv_cuda::norm_act";
  const DType dtype = dtype_of(op, v);
  NormPass pass = norm_of(op, v, vectors, act);
  const CurrentDevice device(v);
  Tensor out = output_of(pass, v);
  check_launch(op, DSCONV_BY_DTYPE(dtype, launch_norm_forward, pass, device.stream()));
  return out;
}

Tensor norm_act_sums(Tensor grad, Tensor v, Tensor vectors, int64_t act) {
  constexpr const char* op = "dsconv_cuda::norm_act_sums";
  const DType dtype = dtype_of(op, v);
  NormPass pass = norm_of(op, v, vectors, act);
  set_grad(op, pass, grad, v);
  const CurrentDevice device(v);
  return run_sums(op, pass, v, device, [&](const NormPass& ready, void* stream) {
    return DSCONV_BY_DTYPE(dtype, launch_norm_sums, ready, stream);
  });
}

Tensor norm_act_grad(Tensor grad, Tensor v, Tensor vectors, Bias sums, double count, int64_t act) {
  constexpr const char* op = "dsconv_cuda::norm_act_grad";
  const DType dtype = dtype_of(op, v);
  NormPass pass = norm_of(op, v, vectors, act);
  set_grad(op, pass, grad, v);
  pass.sums = sums.has_value() ? doubles_of(op, "sums", *sums, 2, pass.source.channels) : nullptr;
  pass.count = count == 0 ? static_cast<double>(source_pixels(pass.source)) : count;
  const CurrentDevice device(v);
  Tensor out = output_of(pass, v);
  check_launch(op, DSCONV_BY_DTYPE(dtype, launch_norm_backward, pass, device.stream()));
  return out;
}

// ---- backward
// --------------------------------------------------------------------------------------------------------

// The workspace of stage P as a tensor of the compute type, of whose beginning, du, bwd_norm_pointwise returns as many
// elements as fake tensors say.
int64_t du_elements(const Geometry& g) {
  constexpr int64_t kWidest = 64;
  const int64_t c_mid = g.multiplier == 1 ? ceil_div(g.c_mid, kWidest) * kWidest : g.c_mid;
  return output_pixels(g) * c_mid;
}

Tensor workspace_for(const Geometry& g, DType dtype, size_t bytes, const Tensor& x) {
  const int64_t element = dtype == DType::f64 ? 8 : 4, wanted = ceil_div(static_cast<int64_t>(bytes), element);
  const int64_t elements[1] = {wanted > du_elements(g) ? wanted : du_elements(g)};
  return torch::stable::empty({elements, 1}, dtype == DType::f64 ? ScalarType::Double : ScalarType::Float,
                              torch::headeronly::Layout::Strided, x.device());
}

// z and du, as sums and map read them.
NormPass du_pass(const BackwardParams& p, const BackwardPlan& plan, const double* vectors, const Tensor& du) {
  NormPass pass{};
  set_z(pass.source, p);
  pass.act = Activation::identity;
  pass.vectors = vectors;
  pass.grad = du.const_data_ptr();
  pass.grad_strides = pass.out_strides = plan.du_strides;
  return pass;
}

struct Pointwise {
  Tensor du, sums, grad_pw_weight, grad_pw_bias;
};

Pointwise stage_pointwise(const char* op, const Tensor& grad, const Bias& y, const Tensor& x, const Tensor& dw_weight,
                          const Tensor& pw_weight, const Bias& dw_bias, const Tensor& vectors, const Bias& out_vectors,
                          const Bias& out_sums, double out_count, const CallArguments& arguments, int64_t grad_mask,
                          bool tf32) {
  Bias dy;
  if (y.has_value()) {
    STD_TORCH_CHECK(out_vectors.has_value(), op, ": out_vectors must be given with y");
    check_operand(op, "y", *y, x);
    dy = norm_act_grad(grad, *y, *out_vectors, out_sums, out_count, arguments.out_act);
  }
  CallArguments linear = arguments;
  linear.out_act = 0;
  const int64_t mask = (grad_mask & (kGradPwWeight | kGradPwBias)) | kGradDwBias;  // the last one has du made
  BackwardCall call =
      prepare_backward(op, y.has_value() ? *dy : grad, x, dw_weight, pw_weight, dw_bias, {}, linear, mask);
  BackwardParams& p = call.params;
  p.tf32 = tf32;
  check_extents(op, p.geom);
  const double* of = doubles_of(op, "vectors", vectors, kVectorRows, p.geom.c_mid);
  const CurrentDevice device(x);
  const BackwardPlan plan = plan_backward(p, device_limits());
  Tensor workspace = workspace_for(p.geom, p.dtype, plan.workspace_bytes, x);
  const Tensor du = torch::stable::narrow(workspace, 0, 0, du_elements(p.geom));
  if (p.geom.n == 0) {
    Tensor sums = empty_doubles(x, 2, p.geom.c_mid);
    return {du, torch::stable::zero_(sums), call.grad_pw_weight, call.grad_pw_bias};
  }
  const Folded folded = fold(op, p, of, dw_weight, device);
  BackwardParams through = p;
  through.dw_weight = folded.weight.const_data_ptr();
  through.dw_bias = folded.bias.const_data_ptr();
  check_launch(op,
               DSCONV_BY_DTYPE(p.dtype, launch_stage_p, through, plan, workspace.mutable_data_ptr(), device.stream()));
  NormPass pass = du_pass(p, plan, of, du);
  Tensor sums = run_sums(op, pass, x, device, [&](const NormPass& ready, void* stream) {
    return DSCONV_BY_DTYPE(p.dtype, launch_norm_sums, ready, stream);
  });
  return {du, sums, call.grad_pw_weight, call.grad_pw_bias};
}

std::tuple<Tensor, Tensor> stage_depthwise(const char* op, const Tensor& du, const Tensor& x, const Tensor& dw_weight,
                                           const Tensor& pw_weight, const Bias& dw_bias, const Tensor& vectors,
                                           const Tensor& sums, double count, const CallArguments& arguments,
                                           int64_t grad_mask) {
  BackwardCall call{};
  CallArguments linear = arguments;
  linear.out_act = 0;
  prepare_operands(call, op, x, dw_weight, pw_weight, dw_bias, linear);
  allocate_grads(call, x, dw_weight, pw_weight, grad_mask & (kGradX | kGradDwWeight));
  const BackwardParams& p = call.params;
  check_extents(op, p.geom);
  const CurrentDevice device(x);
  const BackwardPlan plan = plan_backward(p, device_limits());
  STD_TORCH_CHECK(du.scalar_type() == (p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float) &&
                      du.is_contiguous() && du.numel() == du_elements(p.geom),
                  op, ": du is not what bwd_norm_pointwise returned");
  const double* of = doubles_of(op, "vectors", vectors, kVectorRows, p.geom.c_mid);
  const double* summed = doubles_of(op, "sums", sums, 2, p.geom.c_mid);
  if (p.geom.n > 0 && (p.grad_x != nullptr || p.grad_dw_weight != nullptr)) {
    const Tensor workspace = workspace_for(p.geom, p.dtype, plan.workspace_bytes, x);
    NormPass pass = du_pass(p, plan, of, du);
    pass.out = static_cast<unsigned char*>(workspace.mutable_data_ptr()) + plan.du_at;
    pass.sums = summed;
    pass.count = count;
    check_launch(op, DSCONV_BY_DTYPE(p.dtype, launch_norm_backward, pass, device.stream()));
    check_launch(op, DSCONV_BY_DTYPE(p.dtype, launch_backward_depthwise, p, plan, workspace.mutable_data_ptr(),
                                     device.stream()));
  }
  return {call.grad_x, call.grad_dw_weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bwd_norm(Tensor grad, Bias y, Tensor before, Tensor dw_weight,
                                                            Tensor pw_weight, Bias dw_bias, Tensor vectors,
                                                            Bias out_vectors, Bias out_sums, double out_count,
                                                            Ints stride, Ints padding, Ints dilation, int64_t act,
                                                            int64_t out_act, int64_t grad_mask, Bias in_vectors,
                                                            int64_t in_act, bool tf32) {
  constexpr const char* op = "dsconv_cuda::bwd_norm";
  const CallArguments arguments = arguments_of(op, stride, padding, dilation, act, out_act);
  const Tensor x = input_of(before, in_vectors, in_act);
  const Pointwise first = stage_pointwise(op, grad, y, x, dw_weight, pw_weight, dw_bias, vectors, out_vectors, out_sums,
                                          out_count, arguments, grad_mask, tf32);
  const double count = static_cast<double>(grad.numel() / at_least_1(grad.size(1)));
  const auto [grad_x, grad_dw_weight] =
      stage_depthwise(op, first.du, x, dw_weight, pw_weight, dw_bias, vectors, first.sums, count, arguments, grad_mask);
  return {grad_x, grad_dw_weight, first.grad_pw_weight, first.grad_pw_bias, first.sums};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd_norm_pointwise(Tensor grad, Bias y, Tensor before, Tensor dw_weight,
                                                              Tensor pw_weight, Bias dw_bias, Tensor vectors,
                                                              Bias out_vectors, Bias out_sums, double out_count,
                                                              Ints stride, Ints padding, Ints dilation, int64_t act,
                                                              int64_t out_act, int64_t grad_mask, Bias in_vectors,
                                                              int64_t in_act, bool tf32) {
  constexpr const char* op = "dsconv_cuda::bwd_norm_pointwise";
  const Tensor x = input_of(before, in_vectors, in_act);
  const Pointwise first =
      stage_pointwise(op, grad, y, x, dw_weight, pw_weight, dw_bias, vectors, out_vectors, out_sums, out_count,
                      arguments_of(op, stride, padding, dilation, act, out_act), grad_mask, tf32);
  return {first.du, first.sums, first.grad_pw_weight, first.grad_pw_bias};
}

std::tuple<Tensor, Tensor> bwd_norm_depthwise(Tensor du, Tensor before, Tensor dw_weight, Tensor pw_weight,
                                              Bias dw_bias, Tensor vectors, Tensor sums, double count, Ints stride,
                                              Ints padding, Ints dilation, int64_t grad_mask, Bias in_vectors,
                                              int64_t in_act) {
  constexpr const char* op = "dsconv_cuda::bwd_norm_depthwise";
  const Tensor x = input_of(before, in_vectors, in_act);
  return stage_depthwise(op, du, x, dw_weight, pw_weight, dw_bias, vectors, sums, count,
                         arguments_of(op, stride, padding, dilation, 0, 0), grad_mask);
}

}  // namespace
}  // namespace dsconv

STABLE_TORCH_LIBRARY_IMPL(dsconv_cuda, DSCONV_DISPATCH_KEY, m) {
  m.impl("z_moments", TORCH_BOX(&dsconv::z_moments));
  m.impl("norm_vectors", TORCH_BOX(&dsconv::norm_vectors));
  m.impl("fwd_norm", TORCH_BOX(&dsconv::fwd_norm));
  m.impl("moments", TORCH_BOX(&dsconv::moments));
  m.impl("norm_act", TORCH_BOX(&dsconv::norm_act));
  m.impl("norm_act_sums", TORCH_BOX(&dsconv::norm_act_sums));
  m.impl("norm_act_grad", TORCH_BOX(&dsconv::norm_act_grad));
  m.impl("bwd_norm", TORCH_BOX(&dsconv::bwd_norm));
  m.impl("bwd_norm_pointwise", TORCH_BOX(&dsconv::bwd_norm_pointwise));
  m.impl("bwd_norm_depthwise", TORCH_BOX(&dsconv::bwd_norm_depthwise));
}
