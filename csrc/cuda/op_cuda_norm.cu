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

// doubles_of(), and on the device of x.
const double* doubles_beside(const Tensor& x, const char* op, const char* arg, const Tensor& t, int64_t rows,
                             int64_t channels) {
  check_device(op, arg, t, x);
  return doubles_of(op, arg, t, rows, channels);
}

// v as the passes take it: dense, channels together or pixels together.
struct Dense {
  Tensor tensor;
  Layout layout;
};

bool is_dense(const Tensor& t, Layout layout) {
  const int64_t channels = t.size(1);
  const auto lies = [&](int64_t dim, int64_t stride) { return t.size(dim) <= 1 || t.stride(dim) == stride; };
  int64_t stride = layout == Layout::nhwc ? channels : 1;
  for (int64_t dim = t.dim() - 1; dim > 1; --dim) {
    if (!lies(dim, stride)) return false;
    stride *= t.size(dim);
  }
  return layout == Layout::nhwc ? lies(1, 1) && lies(0, stride) : lies(1, stride) && lies(0, stride * channels);
}

Tensor dense_in(const Tensor& t, Layout layout) {
  if (is_dense(t, layout)) return t;
  const MemoryFormat channels_last = t.dim() == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
  return torch::stable::contiguous(t, layout == Layout::nhwc ? channels_last : MemoryFormat::Contiguous);
}

Dense dense_images(const Tensor& t) {
  const Layout layout = suggests_channels_last(t) ? Layout::nhwc : Layout::nchw;
  return {dense_in(t, layout), layout};
}

void set_v(NormSource& source, const Dense& v) {
  const Tensor& t = v.tensor;
  const int64_t h = t.dim() - 2;
  source.n = t.size(0), source.channels = t.size(1);
  source.d = h == 3 ? t.size(2) : 1, source.h = t.size(h), source.w = t.size(h + 1);
  source.layout = v.layout;
  source.v = t.const_data_ptr();
}

template <typename Params>
void set_z(NormSource& source, const Params& p) {
  const Geometry& g = p.geom;
  source.n = g.n, source.channels = g.c_mid, source.d = g.d_out, source.h = g.h_out, source.w = g.w_out;
  source.layout = p.x_layout;
  source.geom = g;
  source.x = p.x;
  source.x_strides = p.x_strides;
  source.dw_weight = p.dw_weight;
  source.dw_bias = p.dw_bias;
}

void run(const char* op, const NormPass& pass, DType dtype, const NormPlan& plan, const CurrentDevice& device) {
  check_launch(op, DSCONV_BY_DTYPE(dtype, launch_norm, pass, plan, device.stream()));
}

void run(const char* op, const NormPass& pass, DType dtype, NormUse use, const CurrentDevice& device) {
  run(op, pass, dtype, plan_norm(pass, dtype, use, device_limits()), device);
}

// Sums over all pixels: [2, channels].
Tensor run_sums(const char* op, NormPass& pass, DType dtype, NormUse use, const Tensor& like,
                const CurrentDevice& device) {
  const int64_t channels = pass.source.channels;
  Tensor result = empty_doubles(like, 2, channels);
  const NormPlan plan = plan_norm(pass, dtype, use, device_limits());
  if (plan.blocks == 0) return torch::stable::zero_(result);
  const Tensor partial = empty_doubles(like, plan.splits, kPartialRows * channels);
  pass.partial = static_cast<double*>(partial.mutable_data_ptr());
  pass.result = static_cast<double*>(result.mutable_data_ptr());
  run(op, pass, dtype, plan, device);
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
  return run_sums(op, pass, call.params.dtype, NormUse::moments, x, device);
}

// A vector of a norm, `kept` alive and dense.
ChannelValues values_of(const char* op, const char* arg, const Bias& t, const Tensor& beside, int64_t channels,
                        std::vector<Tensor>& kept) {
  if (!t.has_value()) return {};
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == channels, op, ": ", arg, " must have shape [", channels, "]");
  check_device(op, arg, *t, beside);
  kept.push_back(dense(*t));
  return {kept.back().const_data_ptr(), dtype_of(op, *t)};
}

Tensor norm_vectors(Tensor moments, Bias gamma, Bias beta, double eps) {
  constexpr const char* op = "dsconv_cuda::norm_vectors";
  STD_TORCH_CHECK(moments.dim() == 2, op, ": moments must have shape [2, C]");
  const int64_t channels = moments.size(1);
  const double* from = doubles_of(op, "moments", moments, 2, channels);
  const CurrentDevice device(moments);
  std::vector<Tensor> kept;
  const ChannelValues of_gamma = values_of(op, "weight", gamma, moments, channels, kept);
  const ChannelValues of_beta = values_of(op, "bias", beta, moments, channels, kept);
  Tensor result = empty_doubles(moments, kVectorRows, channels);
  check_launch(op, launch_norm_vectors(from, of_gamma, of_beta, eps, channels,
                                       static_cast<double*>(result.mutable_data_ptr()), device.stream()));
  return result;
}

std::tuple<Tensor, Tensor> fold_norm(Tensor weight, Bias bias, Tensor mean, Tensor var, Bias gamma, Bias beta,
                                     double eps) {
  constexpr const char* op = "dsconv_cuda::fold_norm";
  const int64_t row = row_of_weight(op, "weight", weight), channels = weight.size(0);
  const CurrentDevice device(weight);
  std::vector<Tensor> kept;
  const auto values = [&](const char* arg, const Bias& t) { return values_of(op, arg, t, weight, channels, kept); };
  Tensor folded = like_weight(weight), shift = empty_contiguous(weight, {&channels, 1});
  const FoldPass pass = {weight.const_data_ptr(),
                         channels,
                         row,
                         values("bias", bias),
                         values("mean", mean),
                         values("var", var),
                         values("gamma", gamma),
                         values("beta", beta),
                         eps,
                         folded.mutable_data_ptr(),
                         shift.mutable_data_ptr()};
  check_launch(op, launch_fold_norm(pass, dtype_of(op, weight), device.stream()));
  return {folded, shift};
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

// Mean and variance of y, out of what the forward put beside it.
Tensor joined_parts(const char* op, const Tensor& parts, DType dtype, int64_t tiles, int64_t channels,
                    const CurrentDevice& device) {
  Tensor result = empty_doubles(parts, 2, channels);
  if (tiles == 0) return torch::stable::zero_(result);
  const Tensor partial = empty_doubles(parts, parts_splits(tiles), kPartialRows * channels);
  check_launch(op, launch_norm_parts(parts.const_data_ptr(), dtype == DType::f64, tiles, channels,
                                     static_cast<double*>(partial.mutable_data_ptr()),
                                     static_cast<double*>(result.mutable_data_ptr()), device.stream()));
  return result;
}

std::tuple<Tensor, Tensor> fwd_norm(Tensor before, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Bias pw_bias,
                                    Tensor vectors, Ints stride, Ints padding, Ints dilation, int64_t act,
                                    bool want_moments, Bias in_vectors, int64_t in_act, bool fast) {
  constexpr const char* op = "dsconv_cuda::fwd_norm";
  const Tensor x = input_of(before, in_vectors, in_act);
  ForwardCall call = prepare_forward(op, x, dw_weight, pw_weight, dw_bias, pw_bias,
                                     arguments_of(op, stride, padding, dilation, act, 0), false);
  call.params.tf32 = fast;
  check_extents(op, call.params.geom);
  const double* of = doubles_beside(x, op, "vectors", vectors, kVectorRows, call.params.geom.c_mid);
  const CurrentDevice device(x);
  const Folded folded = fold(op, call.params, of, dw_weight, device);
  call.params.dw_weight = folded.weight.const_data_ptr();
  call.params.dw_bias = folded.bias.const_data_ptr();
  const ForwardPlan plan = planned_forward(call.params, device_limits());
  const int64_t tiles = pixel_tiles_of(plan), channels = call.params.geom.c_out;
  Bias parts;
  if (want_moments) {
    const int64_t size[1] = {tiles * (2 * channels + 1)};
    parts = torch::stable::empty({size, 1}, call.params.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float,
                                 torch::headeronly::Layout::Strided, x.device());
    call.params.y_parts = parts->mutable_data_ptr();
  }
  check_launch(op, forward(call.params, plan, device.stream()));
  return {*call.y,
          want_moments ? joined_parts(op, *parts, call.params.dtype, tiles, channels, device) : empty_doubles(x, 2, 0)};
}

// A pass over v, the tensors that it reads, and the one that it makes.
struct TensorPass {
  NormPass pass;
  Dense v;
  Bias grad;
  DType dtype;
};

void check_dims(const char* op, const Tensor& v) {
  STD_TORCH_CHECK(v.dim() == 4 || v.dim() == 5, op, ": input must have 4 dimensions, 5 in 3-D, got ", v.dim());
}

TensorPass pass_over(const char* op, const Tensor& v, const Bias& grad, const Tensor& vectors, int64_t act) {
  check_dims(op, v);
  TensorPass of = {{}, dense_images(v), {}, dtype_of(op, v)};
  set_v(of.pass.source, of.v);
  of.pass.act = activation_of(op, "activation", act);
  of.pass.vectors = doubles_beside(v, op, "vectors", vectors, kVectorRows, of.pass.source.channels);
  if (!grad.has_value()) return of;
  check_operand(op, "grad_output", *grad, v);
  STD_TORCH_CHECK(same_sizes(*grad, v), op, ": grad_output must have the shape of the output");
  of.grad = dense_in(*grad, of.v.layout);
  of.pass.grad = of.grad->const_data_ptr();
  return of;
}

Tensor output_of(TensorPass& of, const Tensor& v) {
  const NormSource& source = of.pass.source;
  const bool channels_last = of.v.layout == Layout::nhwc;
  Tensor out = empty_images(v, source.n, source.channels, source.d, source.h, source.w, channels_last);
  of.pass.out = out.mutable_data_ptr();
  return out;
}

Tensor moments(Tensor v) {
  constexpr const char* op = "dsconv_cuda::moments";
  check_dims(op, v);
  const CurrentDevice device(v);
  const Dense there = dense_images(v);
  NormPass pass{};
  set_v(pass.source, there);
  return run_sums(op, pass, dtype_of(op, v), NormUse::moments, v, device);
}

Tensor norm_act(Tensor v, Tensor vectors, int64_t act) {
  constexpr const char* op = "dsconv_cuda::norm_act";
  const CurrentDevice device(v);
  TensorPass of = pass_over(op, v, {}, vectors, act);
  Tensor out = output_of(of, v);
  run(op, of.pass, of.dtype, NormUse::forward, device);
  return out;
}

Tensor norm_act_sums(Tensor grad, Tensor v, Tensor vectors, int64_t act) {
  constexpr const char* op = "dsconv_cuda::norm_act_sums";
  const CurrentDevice device(v);
  TensorPass of = pass_over(op, v, grad, vectors, act);
  return run_sums(op, of.pass, of.dtype, NormUse::sums, v, device);
}

Tensor norm_act_grad(Tensor grad, Tensor v, Tensor vectors, Bias sums, double count, int64_t act) {
  constexpr const char* op = "dsconv_cuda::norm_act_grad";
  const CurrentDevice device(v);
  TensorPass of = pass_over(op, v, grad, vectors, act);
  of.pass.sums = sums.has_value() ? doubles_beside(v, op, "sums", *sums, 2, of.pass.source.channels) : nullptr;
  of.pass.count = count == 0 ? static_cast<double>(source_pixels(of.pass.source)) : count;
  Tensor out = output_of(of, v);
  run(op, of.pass, of.dtype, NormUse::backward, device);
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
NormPass du_pass(const BackwardParams& p, const double* vectors, const Tensor& du) {
  NormPass pass{};
  set_z(pass.source, p);
  pass.act = Activation::identity;
  pass.vectors = vectors;
  pass.grad = du.const_data_ptr();
  return pass;
}

struct Pointwise {
  Tensor du, sums, grad_pw_weight, grad_pw_bias;
};

Pointwise stage_pointwise(const char* op, const Tensor& grad, const Bias& y, const Tensor& x, const Tensor& dw_weight,
                          const Tensor& pw_weight, const Bias& dw_bias, const Tensor& vectors, const Bias& out_vectors,
                          const Bias& out_sums, double out_count, const CallArguments& arguments, int64_t grad_mask,
                          bool fast) {
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
  p.tf32 = fast;
  check_extents(op, p.geom);
  const double* of = doubles_beside(x, op, "vectors", vectors, kVectorRows, p.geom.c_mid);
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
  NormPass pass = du_pass(p, of, du);
  Tensor sums = run_sums(op, pass, p.dtype, NormUse::sums, x, device);
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
  check_device(op, "du", du, x);
  STD_TORCH_CHECK(du.scalar_type() == (p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float) &&
                      du.is_contiguous() && du.numel() == du_elements(p.geom),
                  op, ": du is not what bwd_norm_pointwise returned");
  const double* of = doubles_beside(x, op, "vectors", vectors, kVectorRows, p.geom.c_mid);
  const double* summed = doubles_beside(x, op, "sums", sums, 2, p.geom.c_mid);
  if (p.geom.n > 0 && (p.grad_x != nullptr || p.grad_dw_weight != nullptr)) {
    const Tensor workspace = workspace_for(p.geom, p.dtype, plan.workspace_bytes, x);
    NormPass pass = du_pass(p, of, du);
    pass.out = static_cast<unsigned char*>(workspace.mutable_data_ptr()) + plan.du_at;
    pass.sums = summed;
    pass.count = count;
    run(op, pass, p.dtype, NormUse::backward, device);
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
                                                            int64_t in_act, bool fast) {
  constexpr const char* op = "dsconv_cuda::bwd_norm";
  const CallArguments arguments = arguments_of(op, stride, padding, dilation, act, out_act);
  const Tensor x = input_of(before, in_vectors, in_act);
  const Pointwise first = stage_pointwise(op, grad, y, x, dw_weight, pw_weight, dw_bias, vectors, out_vectors, out_sums,
                                          out_count, arguments, grad_mask, fast);
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
                                                              int64_t in_act, bool fast) {
  constexpr const char* op = "dsconv_cuda::bwd_norm_pointwise";
  const Tensor x = input_of(before, in_vectors, in_act);
  const Pointwise first =
      stage_pointwise(op, grad, y, x, dw_weight, pw_weight, dw_bias, vectors, out_vectors, out_sums, out_count,
                      arguments_of(op, stride, padding, dilation, act, out_act), grad_mask, fast);
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
  m.impl("fold_norm", TORCH_BOX(&dsconv::fold_norm));
  m.impl("fwd_norm", TORCH_BOX(&dsconv::fwd_norm));
  m.impl("moments", TORCH_BOX(&dsconv::moments));
  m.impl("norm_act", TORCH_BOX(&dsconv::norm_act));
  m.impl("norm_act_sums", TORCH_BOX(&dsconv::norm_act_sums));
  m.impl("norm_act_grad", TORCH_BOX(&dsconv::norm_act_grad));
  m.impl("bwd_norm", TORCH_BOX(&dsconv::bwd_norm));
  m.impl("bwd_norm_pointwise", TORCH_BOX(&dsconv::bwd_norm_pointwise));
  m.impl("bwd_norm_depthwise", TORCH_BOX(&dsconv::bwd_norm_depthwise));
}
