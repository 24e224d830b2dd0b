// CPU host entry: checks, allocation, and the tasks of one call on torch's own threads.
//
// Every loop below hands out independent tasks, and no result depends on which thread runs which: partial sums belong
// to tasks, and how many there are follows from the shape (cpu/cpu_plan.h).

#include <algorithm>
#include <new>
#include <utility>

#include "cpu_gate.h"
#include "cpu_norm.h"
#include "cpu_stages.h"
#include "cpu_tasks.h"
#include "each_args.h"
#include "kept_args.h"
#include "op_args.h"

namespace dsconv {
namespace {

KeptKey key_of(const ForwardParams& p, const CpuPlan& plan, const DTypeKernels& kernels, int64_t version) {
  const Geometry& g = p.geom;
  return {&kernels,         g.c_in,           g.c_mid,        g.c_out,
          plan.taps,        plan.tap_pairs,   plan.by_planes, plan.micro,
          plan.mid_columns, plan.out_columns, p.dw_weight,    p.dw_bias,
          p.pw_weight,      p.pw_bias,        version,        fingerprint(p, kernels.bytes.stored)};
}

}  // namespace

// kept: where packed weights of earlier calls are, or null; version as in KeptKey. in_norm: what x goes through first.
void run_forward(const char* op, const ForwardParams& p, KeptHeader* kept, int64_t version, InputNormCall in_norm,
                 const GateCall& gate) {
  const KernelTable& table = active_table(op);
  const DTypeKernels& kernels = table.by_dtype[static_cast<int>(p.dtype)];
  const bool normed = in_norm.vectors != nullptr;
  ForwardContext ctx{};
  ctx.p = p;
  const MicroTile micro = micro_of(table, p.dtype);
  ctx.plan =
      plan_forward(p.geom, normed ? Layout::nchw : p.x_layout, micro, kernels.bytes, torch::stable::get_num_threads(),
                   false, !normed && goes_by_planes(p, kernels, gate.vectors != nullptr));
  // x comes out of the norm in the compute type, and a norm folds into weights of that.
  const bool folded = gate.vectors != nullptr;
  if (normed || folded) ctx.plan.tap_pairs = 0;
  const CpuPlan& plan = ctx.plan;
  Workspace rows(plan.element);
  void* of_gate = nullptr;
  if (normed) rows.reserve(&in_norm.rows, in_norm.elements(p.geom, plan));
  if (gate.gate != nullptr) rows.reserve(&of_gate, p.geom.n * plan.mid_columns);
  if (normed || gate.gate != nullptr) rows.allocate();
  ctx.in_norm = in_norm.fill(p.geom, plan);
  ctx.gate = fill_gate_rows(p.geom, plan, gate.gate, of_gate);

  Workspace weights(plan.element);
  reserve_depthwise(weights, plan, ctx.packed);
  weights.reserve(&ctx.packed.pw_forward, packed_outputs(plan, kernels.bytes) * p.geom.c_mid);
  weights.reserve(&ctx.packed.pw_bias, plan.out_columns);

  const KeptKey key = kept != nullptr ? key_of(p, plan, kernels, version) : KeptKey{};
  KeptUse use(kept, key, weights.bytes());
  const int64_t tasks = forward_tasks(plan), panels = packed_outputs(plan, kernels.bytes) / plan.micro.columns;
  const auto pack = [&](const ForwardContext& own, int64_t begin, int64_t end) {
    // All tasks of one tile need but their own parts of the output channels.
    const Range part = plan.tiles == 1 ? Range{panels * begin / tasks, panels * end / tasks} : Range{0, panels};
    pack_all(kernels, {p.geom, plan, own.packed, p.dw_weight, p.dw_bias, p.pw_weight, p.pw_bias}, part,
             kernels.pack_pointwise_forward, normed || folded ? nullptr : kernels.pack_depthwise_forward);
    gate.fold(p.geom, plan, own.packed);
  };
  if (use.memory() == nullptr) return run_with_copies(ctx, weights, plan.pixels, tasks, pack, kernels.forward);
  weights.place_in(use.memory());
  if (use.to_pack()) {
    pack(ctx, 0, tasks);
    use.packed(key);
  }
  for_each_task(tasks, [&](int64_t task) { kernels.forward(ctx, task, thread_scratch(plan.scratch_bytes)); });
}

void run_backward(const char* op, const BackwardParams& p, const GateCall& gate) {
  const KernelTable& table = active_table(op);
  const DTypeKernels& kernels = table.by_dtype[static_cast<int>(p.dtype)];
  const int64_t element = kernels.bytes.compute;
  const Geometry& g = p.geom;
  BackwardContext ctx{};
  ctx.p = p;
  ctx.plan = plan_backward(g, walked_in_place(p) ? Layout::nhwc : Layout::nchw, micro_of(table, p.dtype), element,
                           BetweenStages::nothing, goes_back_by_planes(p, kernels));
  const CpuPlan& plan = ctx.plan;
  const bool need_du = p.grad_x != nullptr || p.grad_dw_weight != nullptr;
  const int64_t vectors = g.multiplier * ceil_div(g.c_in, plan.micro.lanes);
  const bool need_da = need_du || p.grad_dw_bias != nullptr;

  Workspace workspace(element);
  reserve_depthwise(workspace, plan, ctx.packed);
  PointwiseStage stage(workspace, ctx, need_da);
  GateRows rows(workspace, g, plan, gate);
  if (plan.panels > 0) {
    workspace.allocate();
    rows.fill(ctx);
    pack_depthwise(kernels, ctx);
    gate.fold(g, plan, ctx.packed);
    return stage.run(kernels, ctx);
  }
  if (need_du) workspace.reserve(&ctx.du, plan.pixels * ceil_div(g.c_mid, plan.du_width) * plan.du_width);
  const int64_t x_pixels = g.n * g.d_in * g.h_in * g.w_in;
  if (p.x_layout == Layout::nchw) reserve_turned(workspace, ctx);
  if (p.grad_dw_weight != nullptr) {
    workspace.reserve(&ctx.dw_partial, plan.pointwise_groups * depthwise_sums(plan, g));
  }
  workspace.allocate();
  rows.fill(ctx);

  pack_depthwise(kernels, ctx);
  gate.fold(g, plan, ctx.packed);
  if (ctx.x_turned != nullptr) {
    for_each_task(ceil_div(x_pixels, plan.turned_pixels), [&](int64_t task) { kernels.backward_turn_x(ctx, task); });
  }
  stage.run(kernels, ctx);

  if (p.grad_x != nullptr) {
    for_each_task(g.n * g.d_in * ceil_div(g.h_in, plan.task_rows),
                  [&](int64_t task) { kernels.backward_x(ctx, task, thread_scratch(plan.scratch_bytes)); });
  }
  if (p.grad_dw_weight != nullptr) {
    if (!plan.joined) {
      for_each_task(plan.pointwise_groups, [&](int64_t group) { kernels.backward_dw(ctx, group); });
    }
    for_each_task(vectors, [&](int64_t vector) { kernels.reduce_depthwise(ctx, vector); });
  }
}

namespace {

using Ints = std::vector<int64_t>;

void compute(const ForwardCall& call, const char* op) {
  if (call.y->numel() > 0) run_forward(op, call.params, nullptr, 0);
}

ForwardCall forward(const char* op, const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                    const Bias& dw_bias, const Bias& pw_bias, const CallArguments& arguments, bool want_pre) {
  ForwardCall call = prepare_forward(op, x, dw_weight, pw_weight, dw_bias, pw_bias, arguments, want_pre);
  compute(call, op);
  return call;
}

Tensor fwd(Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Bias pw_bias, Ints stride, Ints padding,
           Ints dilation, int64_t act, int64_t out_act, bool /*fast*/) {
  constexpr const char* op = "dsconv_cuda::fwd";
  const CallArguments arguments = arguments_of(op, stride, padding, dilation, act, out_act);
  return *forward(op, x, dw_weight, pw_weight, dw_bias, pw_bias, arguments, false).y;
}

Tensor fwd_in_graph(Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Bias pw_bias, Ints arguments) {
  constexpr const char* op = "dsconv_cuda::fwd_in_graph";
  return *forward(op, x, dw_weight, pw_weight, dw_bias, pw_bias, arguments_of(op, arguments).call, false).y;
}

// What fwd_kept() and bwd_kept() take for these weights and arguments, nothing packed yet; without `room` nothing ever.
Tensor keep(Tensor dw_weight, Tensor pw_weight, Ints stride, Ints padding, Ints dilation, int64_t act, int64_t out_act,
            bool room) {
  constexpr const char* op = "dsconv_cuda::keep";
  const CallArguments arguments = arguments_of(op, stride, padding, dilation, act, out_act);
  STD_TORCH_CHECK(dw_weight.dim() == arguments.dims + 2 && pw_weight.dim() >= 2, op,
                  ": dw_weight or pw_weight has a wrong shape");
  int64_t kernel[3];
  with_depth(dw_weight.sizes().data() + 2, arguments.dims, 1, kernel);
  // Room for the panels of every instruction set: their widths divide this one.
  constexpr int64_t kWidest = 64;
  const int64_t c_mid = dw_weight.size(0), mid = round_up(c_mid, kWidest), out = round_up(pw_weight.size(0), kWidest);
  const int64_t elements = (kernel[0] * kernel[1] * kernel[2] + 1) * mid + out * (c_mid + 1);
  const int64_t capacity = room ? elements * element_bytes(dtype_of(op, dw_weight)) + 4 * kCacheLine : 0;
  const int64_t size[1] = {static_cast<int64_t>(sizeof(KeptHeader)) + capacity + kCacheLine}, unit[1] = {1};
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, size, unit, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), 0, &handle));
  Tensor memory(handle);
  auto* header = new (first_line(memory.mutable_data_ptr())) KeptHeader{};
  header->magic = kKeptMagic;
  header->arguments = arguments;
  const int64_t sizes[5] = {c_mid, kernel[0], kernel[1], kernel[2], pw_weight.size(0)};
  std::copy(sizes, sizes + 5, header->weight_sizes);
  header->capacity = capacity;
  return memory;
}

void check_kept_sizes(const char* op, const KeptHeader& header, const Geometry& g) {
  const int64_t* sizes = header.weight_sizes;
  STD_TORCH_CHECK(g.c_mid == sizes[0] && g.kernel_d == sizes[1] && g.kernel_h == sizes[2] && g.kernel_w == sizes[3] &&
                      g.c_out == sizes[4],
                  op, ": kept was made for weights of other sizes");
}

ForwardCall forward_kept(const char* op, const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                         const Bias& dw_bias, const Bias& pw_bias, const Tensor& kept, int64_t version, bool want_pre) {
  KeptHeader* header = kept_of(op, kept);
  ForwardCall call = prepare_forward(op, x, dw_weight, pw_weight, dw_bias, pw_bias, header->arguments, want_pre);
  check_kept_sizes(op, *header, call.params.geom);
  if (call.y->numel() > 0) run_forward(op, call.params, header->capacity > 0 ? header : nullptr, version);
  return call;
}

Tensor fwd_kept(Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Bias pw_bias, Tensor kept,
                int64_t version) {
  return *forward_kept("dsconv_cuda::fwd_kept", x, dw_weight, pw_weight, dw_bias, pw_bias, kept, version, false).y;
}

// y of x behind a norm and in_act; kept is of module calls, else null, and version as in run_forward.
Tensor forward_after_norm(const char* op, const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                          const Bias& dw_bias, const Bias& pw_bias, const CallArguments& arguments, KeptHeader* kept,
                          int64_t version, const Tensor& in_vectors, int64_t in_act) {
  const Geometry g = geometry_of(op, x, dw_weight, pw_weight, arguments);
  if (kept != nullptr) check_kept_sizes(op, *kept, g);
  if (kept != nullptr && kept->capacity == 0) kept = nullptr;
  const bool as_it_reads = norms_as_it_reads(g, active_table(op), dtype_of(op, x));
  const ForwardCall call = prepare_forward(op, as_it_reads ? x : norm_act(x, in_vectors, in_act), dw_weight, pw_weight,
                                           dw_bias, pw_bias, arguments, false);
  const InputNormCall in_norm = as_it_reads ? input_norm_of(op, in_vectors, in_act, g.c_in) : InputNormCall{};
  if (call.y->numel() > 0) run_forward(op, call.params, kept, version, in_norm);
  return *call.y;
}

Tensor fwd_after_norm_kept(Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Bias pw_bias, Tensor kept,
                           int64_t version, Tensor in_vectors, int64_t in_act) {
  constexpr const char* op = "dsconv_cuda::fwd_after_norm_kept";
  KeptHeader* header = kept_of(op, kept);
  return forward_after_norm(op, x, dw_weight, pw_weight, dw_bias, pw_bias, header->arguments, header, version,
                            in_vectors, in_act);
}

Tensor fwd_after_norm_in_graph(Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Bias pw_bias, Ints arguments,
                               Tensor in_vectors, int64_t in_act) {
  constexpr const char* op = "dsconv_cuda::fwd_after_norm_in_graph";
  return forward_after_norm(op, x, dw_weight, pw_weight, dw_bias, pw_bias, arguments_of(op, arguments).call, nullptr, 0,
                            in_vectors, in_act);
}

std::tuple<Tensor, Tensor> fwd_with_pre_kept(Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Bias pw_bias,
                                             Tensor kept) {
  ForwardCall call =
      forward_kept("dsconv_cuda::fwd_with_pre_kept", x, dw_weight, pw_weight, dw_bias, pw_bias, kept, 0, true);
  return {*call.y, *call.pre};
}

std::tuple<Tensor, Tensor> fwd_with_pre(Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Bias pw_bias,
                                        Ints stride, Ints padding, Ints dilation, int64_t act, int64_t out_act,
                                        bool /*fast*/) {
  constexpr const char* op = "dsconv_cuda::fwd_with_pre";
  const CallArguments arguments = arguments_of(op, stride, padding, dilation, act, out_act);
  const ForwardCall call = forward(op, x, dw_weight, pw_weight, dw_bias, pw_bias, arguments, true);
  return {*call.y, *call.pre};
}

std::tuple<Tensor, Tensor> fwd_with_pre_in_graph(Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias,
                                                 Bias pw_bias, Ints arguments) {
  constexpr const char* op = "dsconv_cuda::fwd_with_pre_in_graph";
  const ForwardCall call =
      forward(op, x, dw_weight, pw_weight, dw_bias, pw_bias, arguments_of(op, arguments).call, true);
  return {*call.y, *call.pre};
}

Tensor fwd_each(Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Bias pw_bias, Ints arguments) {
  constexpr const char* op = "dsconv_cuda::fwd_each";
  return forward_each(op, x, dw_weight, pw_weight, dw_bias, pw_bias, arguments_of(op, arguments).call, false,
                      [](const ForwardCall& call) { compute(call, op); })
      .y;
}

std::tuple<Tensor, Tensor> fwd_with_pre_each(Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Bias pw_bias,
                                             Ints arguments) {
  constexpr const char* op = "dsconv_cuda::fwd_with_pre_each";
  const ForwardBatch made =
      forward_each(op, x, dw_weight, pw_weight, dw_bias, pw_bias, arguments_of(op, arguments).call, true,
                   [](const ForwardCall& call) { compute(call, op); });
  return {made.y, *made.pre};
}

void compute(const BackwardCall& call, const char* op) {
  const BackwardParams& p = call.params;
  const bool asked = p.grad_x != nullptr || p.grad_dw_weight != nullptr || p.grad_pw_weight != nullptr ||
                     p.grad_dw_bias != nullptr || p.grad_pw_bias != nullptr;
  if (p.geom.n > 0 && asked) run_backward(op, p);
}

BackwardResult backward(const char* op, BackwardCall call) {
  compute(call, op);
  return take_grads(call);
}

BackwardResult bwd(Tensor dy, Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Bias saved, Ints stride,
                   Ints padding, Ints dilation, int64_t act, int64_t out_act, int64_t grad_mask, bool /*fast*/) {
  constexpr const char* op = "dsconv_cuda::bwd";
  return backward(op, prepare_backward(op, dy, x, dw_weight, pw_weight, dw_bias, saved,
                                       arguments_of(op, stride, padding, dilation, act, out_act), grad_mask));
}

BackwardResult bwd_in_graph(Tensor dy, Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Bias saved,
                            Ints arguments, int64_t grad_mask) {
  constexpr const char* op = "dsconv_cuda::bwd_in_graph";
  return backward(op, prepare_backward(op, dy, x, dw_weight, pw_weight, dw_bias, saved,
                                       arguments_of(op, arguments).call, grad_mask));
}

BackwardResult bwd_each(Tensor dy, Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Bias saved,
                        Ints arguments, int64_t grad_mask) {
  constexpr const char* op = "dsconv_cuda::bwd_each";
  return backward_each(op, dy, x, dw_weight, pw_weight, dw_bias, saved, arguments_of(op, arguments).call, grad_mask,
                       [](const BackwardCall& call) { compute(call, op); });
}

BackwardResult bwd_kept(Tensor dy, Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Bias saved, Tensor kept,
                        int64_t grad_mask) {
  constexpr const char* op = "dsconv_cuda::bwd_kept";
  const KeptHeader* header = kept_of(op, kept);
  BackwardCall call = prepare_backward(op, dy, x, dw_weight, pw_weight, dw_bias, saved, header->arguments, grad_mask);
  check_kept_sizes(op, *header, call.params.geom);
  return backward(op, std::move(call));
}

}  // namespace
}  // namespace dsconv

STABLE_TORCH_LIBRARY_IMPL(dsconv_cuda, CPU, m) {
  m.impl("fwd", TORCH_BOX(&dsconv::fwd));
  m.impl("keep", TORCH_BOX(&dsconv::keep));
  m.impl("fwd_kept", TORCH_BOX(&dsconv::fwd_kept));
  m.impl("fwd_after_norm_kept", TORCH_BOX(&dsconv::fwd_after_norm_kept));
  m.impl("fwd_with_pre_kept", TORCH_BOX(&dsconv::fwd_with_pre_kept));
  m.impl("fwd_with_pre", TORCH_BOX(&dsconv::fwd_with_pre));
  m.impl("bwd", TORCH_BOX(&dsconv::bwd));
  m.impl("bwd_kept", TORCH_BOX(&dsconv::bwd_kept));
  m.impl("fwd_in_graph", TORCH_BOX(&dsconv::fwd_in_graph));
  m.impl("fwd_after_norm_in_graph", TORCH_BOX(&dsconv::fwd_after_norm_in_graph));
  m.impl("fwd_with_pre_in_graph", TORCH_BOX(&dsconv::fwd_with_pre_in_graph));
  m.impl("bwd_in_graph", TORCH_BOX(&dsconv::bwd_in_graph));
  m.impl("fwd_each", TORCH_BOX(&dsconv::fwd_each));
  m.impl("fwd_with_pre_each", TORCH_BOX(&dsconv::fwd_with_pre_each));
  m.impl("bwd_each", TORCH_BOX(&dsconv::bwd_each));
}
