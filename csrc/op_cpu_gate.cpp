// CPU host entries for a gate between the activation and the pointwise part, as of squeeze-excite (cpu/gate.inl). What
// makes the gate of the means is the caller's; dsconv_cuda/gated.py joins the two.
//
//   gate_means   the means of act(z) over the pixels of an image, which is made tile by tile; and act(z) itself, where
//                fwd_gated is to have it, with `keep`
//   fwd_gated    y, with act(z) times the gate in between
//   bwd_gate     the gradients of pw_weight and of the gate, from those of the weights that one image by itself has
//   bwd_gated    with the gradient of the means, when the caller has it: those of x and the depthwise part
//
// Gates and means are tensors [n, c_mid] in the compute type. `vectors` are those of a norm before the activation that
// took statistics of the batch: it folds into the depthwise weights, and bwd_gated goes through it.

#include "cpu_gate.h"
#include "cpu_tasks.h"
#include "kept_args.h"
#include "op_args.h"

namespace dsconv {
namespace {

using Ints = std::vector<int64_t>;

constexpr int64_t kMaxGroups = 8;          // partial sums of an image
constexpr int64_t kZTileBytes = 48 << 10;  // read once after it is made

// [rows, columns] in the compute type of x.
Tensor empty_wide(const Tensor& x, int64_t rows, int64_t columns) {
  const int64_t size[2] = {rows, columns}, stride[2] = {at_least_1(columns), 1};
  const bool wide = x.scalar_type() == ScalarType::Double;
  return empty_of_dtype(wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(), x, 2, size, stride);
}

template <typename T>
void means_of_sums(const MomentsContext& ctx, int64_t images, T* to) {
  const int64_t c_mid = ctx.geom.c_mid;
  const double pixels = static_cast<double>(output_pixels(ctx.geom));
  const double* sums = ctx.partial;
  for (int64_t image = 0; image < images; ++image, to += c_mid) {
    for (int64_t k = 0; k < c_mid; ++k) {
      double sum = 0;
      for (int64_t group = 0; group < ctx.groups; ++group) sum += sums[group * c_mid + k];
      to[channel_of(ctx.geom, k)] = static_cast<T>(sum / pixels);
    }
    sums += ctx.groups * c_mid;
  }
}

const double* vectors_of(const char* op, const Bias& vectors, const Geometry& g) {
  return vectors.has_value() ? doubles_of(op, "vectors", *vectors, kVectorRows, g.c_mid) : nullptr;
}

// (means, act(z) in channels_last, of shape [0] where it is not kept)
std::tuple<Tensor, Tensor> gate_means(Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Bias vectors,
                                      Ints stride, Ints padding, Ints dilation, int64_t act, bool keep) {
  constexpr const char* op = "dsconv_cuda::gate_means";
  MomentsCall call{};
  prepare_operands(call, op, x, dw_weight, pw_weight, dw_bias, arguments_of(op, stride, padding, dilation, act, 0));
  const ForwardParams& p = call.params;
  GateCall gate;
  gate.vectors = vectors_of(op, vectors, p.geom);
  Tensor result = empty_wide(x, p.geom.n, p.geom.c_mid);
  const KernelTable& table = active_table(op);
  const DTypeKernels& kernels = table.by_dtype[static_cast<int>(p.dtype)];
  STD_TORCH_CHECK(!keep || p.geom.multiplier == 1, op, ": act(z) is not kept where there is a channel multiplier");
  Tensor kept = keep ? empty_images(x, p.geom.n, p.geom.c_mid, p.geom.d_out, p.geom.h_out, p.geom.w_out, true)
                     : empty_of_nothing(x);
  if (result.numel() == 0) return {result, kept};
  const int64_t element = element_bytes(p.dtype);
  MomentsContext ctx{};
  ctx.geom = p.geom;
  ctx.geom.n = 1;
  ctx.act = p.act;
  ctx.kept = keep ? kept.mutable_data_ptr() : nullptr;
  const Geometry& g = ctx.geom;
  const bool by_planes = !keep && may_go_by_planes(kernels, g, p.x_layout) && planes_pay_for_moments(g, element);
  ctx.plan = plan_moments(g, p.x_layout, micro_of(table, p.dtype), element, kZTileBytes, by_planes, p.geom.n);
  ctx.x = {p.x, p.x_strides, p.x_layout};
  const CpuPlan& plan = ctx.plan;
  ctx.groups = plan.tiles < kMaxGroups ? plan.tiles : kMaxGroups;
  ctx.panels = ceil_div(g.c_mid, plan.mid_ld);
  const int64_t images = p.geom.n;
  Workspace workspace(1), weights(element);
  reserve_depthwise(weights, plan, ctx.packed);
  workspace.reserve(reinterpret_cast<void**>(&ctx.partial), images * ctx.groups * g.c_mid * sizeof(double));
  workspace.allocate();
  const auto pack = [&](const MomentsContext& own, int64_t, int64_t) {
    pack_all(kernels, {g, plan, own.packed, p.dw_weight, p.dw_bias, nullptr, nullptr}, {0, 0}, nullptr);
    gate.fold(g, plan, own.packed);
  };
  run_with_copies(ctx, weights, images * plan.pixels, images * ctx.groups * ctx.panels, pack, kernels.depthwise_sums);
  if (element == 8) {
    means_of_sums(ctx, images, static_cast<double*>(result.mutable_data_ptr()));
  } else {
    means_of_sums(ctx, images, static_cast<float*>(result.mutable_data_ptr()));
  }
  return {result, kept};
}

// The call whose x is act(z) already: a depthwise kernel of one tap, `ones`.
ForwardParams of_activated(const ForwardParams& p, const Tensor& a, const Tensor& ones) {
  ForwardParams of = p;
  Geometry& g = of.geom;
  g.c_in = g.c_mid, g.d_in = g.d_out, g.h_in = g.h_out, g.w_in = g.w_out;
  g.kernel_d = g.kernel_h = g.kernel_w = g.stride_d = g.stride_h = g.stride_w = 1;
  g.dilation_d = g.dilation_h = g.dilation_w = 1;
  g.pad_front = g.pad_top = g.pad_left = 0;
  of.x = a.const_data_ptr();
  of.x_strides = walk_strides(a, Layout::nhwc);
  of.x_layout = Layout::nhwc;
  of.dw_weight = ones.const_data_ptr();
  of.dw_bias = nullptr;
  of.act = Activation::identity;
  return of;
}

Tensor fwd_gated(Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Bias pw_bias, Tensor gate, Bias vectors,
                 Bias kept, Ints stride, Ints padding, Ints dilation, int64_t act, int64_t out_act) {
  constexpr const char* op = "dsconv_cuda::fwd_gated";
  const CallArguments arguments = arguments_of(op, stride, padding, dilation, act, out_act);
  const ForwardCall call = prepare_forward(op, x, dw_weight, pw_weight, dw_bias, pw_bias, arguments, false);
  check_gate(op, "gate", gate, x, call.params.geom);
  if (kept.has_value() && kept->numel() > 0 && call.y->numel() > 0) {
    const Geometry& g = call.params.geom;
    STD_TORCH_CHECK(kept->scalar_type() == x.scalar_type() && kept->dim() == x.dim() && kept->stride(1) == 1 &&
                        kept->numel() == output_pixels(g) * g.c_mid,
                    op, ": kept is not what gate_means returned");
    const int64_t size[1] = {g.c_mid};
    Tensor ones = empty_contiguous(x, {size, 1});
    torch::stable::fill_(ones, 1);
    const GateCall of = {&gate, nullptr, nullptr};
    run_forward(op, of_activated(call.params, *kept, ones), nullptr, 0, {}, of);
    return *call.y;
  }
  const GateCall of = {&gate, nullptr, vectors_of(op, vectors, call.params.geom)};
  if (call.y->numel() > 0) run_forward(op, call.params, nullptr, 0, {}, of);
  return *call.y;
}

// The call of one image of `all`.
BackwardParams of_image(const BackwardParams& all, int64_t image, int64_t stored) {
  BackwardParams p = all;
  p.geom.n = 1;
  p.x = static_cast<const char*>(all.x) + image * all.x_strides.n * stored;
  p.dy = static_cast<const char*>(all.dy) + image * all.dy_strides.n * stored;
  return p;
}

std::tuple<Tensor, Tensor> bwd_gate(Tensor dy, Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Tensor gate,
                                    Bias vectors, Ints stride, Ints padding, Ints dilation, int64_t act) {
  constexpr const char* op = "dsconv_cuda::bwd_gate";
  const BackwardCall call = prepare_backward(op, dy, x, dw_weight, pw_weight, dw_bias, {},
                                             arguments_of(op, stride, padding, dilation, act, 0), kGradPwWeight);
  const BackwardParams& p = call.params;
  const Geometry& g = p.geom;
  check_gate(op, "gate", gate, x, g);
  Tensor grad_gate = empty_wide(x, g.n, g.c_mid), sums = empty_wide(x, g.c_out, g.c_mid);
  if (g.n == 0) return {torch::stable::zero_(sums), grad_gate};
  GateCall folded;
  folded.vectors = vectors_of(op, vectors, g);
  const KernelTable& table = active_table(op);
  const DTypeKernels& kernels = table.by_dtype[static_cast<int>(p.dtype)];
  const int64_t element = element_bytes(p.dtype), lanes = micro_of(table, p.dtype).lanes;
  GateContext ctx{g.c_out, g.c_mid, p.grad_pw_weight, p.pw_weight, nullptr, sums.mutable_data_ptr(), nullptr, true};
  for (int64_t image = 0; image < g.n; ++image) {
    run_backward(op, of_image(p, image, kernels.bytes.stored), folded);
    const int64_t row = image * g.c_mid * element;
    ctx.gate = static_cast<const char*>(gate.const_data_ptr()) + row;
    ctx.grad_gate = static_cast<char*>(grad_gate.mutable_data_ptr()) + row;
    ctx.first = image == 0;
    for_each_task(ceil_div(g.c_mid, lanes), [&](int64_t task) { kernels.gate_gradients(ctx, task); });
  }
  return {sums, grad_gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd_gated(Tensor dy, Tensor x, Tensor dw_weight, Tensor pw_weight,
                                                     Bias dw_bias, Tensor gate, Tensor push, Bias vectors, Ints stride,
                                                     Ints padding, Ints dilation, int64_t act, int64_t grad_mask) {
  constexpr const char* op = "dsconv_cuda::bwd_gated";
  const CallArguments arguments = arguments_of(op, stride, padding, dilation, act, 0);
  const Geometry g = geometry_of(op, x, dw_weight, pw_weight, arguments);
  check_gate(op, "gate", gate, x, g);
  check_gate(op, "push", push, x, g);
  const GateCall gates = {&gate, &push};
  const int64_t mask = grad_mask & (kGradX | kGradDwWeight | kGradDwBias);
  if (vectors.has_value()) {
    const NormGradients grads =
        bwd_norm(op, dy, {}, x, dw_weight, pw_weight, dw_bias, *vectors, {}, {}, 0, arguments, mask, {}, 0, gates);
    return {std::get<0>(grads), std::get<1>(grads), empty_of_nothing(x), std::get<4>(grads)};
  }
  const BackwardCall call = prepare_backward(op, dy, x, dw_weight, pw_weight, dw_bias, {}, arguments, mask);
  if (g.n > 0 && mask != 0) run_backward(op, call.params, gates);
  return {call.grad_x, call.grad_dw_weight, call.grad_dw_bias, empty_doubles(x, 2, 0)};
}

}  // namespace
}  // namespace dsconv

STABLE_TORCH_LIBRARY_IMPL(dsconv_cuda, CPU, m) {
  m.impl("gate_means", TORCH_BOX(&dsconv::gate_means));
  m.impl("fwd_gated", TORCH_BOX(&dsconv::fwd_gated));
  m.impl("bwd_gate", TORCH_BOX(&dsconv::bwd_gate));
  m.impl("bwd_gated", TORCH_BOX(&dsconv::bwd_gated));
}
