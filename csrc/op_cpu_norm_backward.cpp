// CPU host entries of backward through the norm between z and the activation (cpu/backward_norm.inl), and through the
// one after the pointwise part where y is given:
//
//   bwd_norm             both stages, the sums of this process between them
//   bwd_norm_pointwise   stage P: du, its sums, the gradients of the pointwise part
//   bwd_norm_depthwise   stage D from these, after the sums have been reduced over processes
//
// du is a tensor of one dimension in the compute type, in the order of the workspace that bwd has.

#include "cpu_gate.h"
#include "cpu_stages.h"
#include "cpu_tasks.h"
#include "op_args.h"

namespace dsconv {
namespace {

using Ints = std::vector<int64_t>;

// The norm after the pointwise part; y is null where there is none.
struct OutputNorm {
  const Bias& y;
  const Bias& vectors;
  const Bias& sums;
  double count;
};

struct Run {
  explicit Run(const char* name) : op(name), table(active_table(name)) {}
  const char* op;
  const KernelTable& table;
  const DTypeKernels* kernels = nullptr;
  BackwardCall call{};
  BackwardContext ctx{};
  Workspace workspace{1};
  std::optional<PointwiseStage> pointwise;
  void* out_rows = nullptr;
  const double* vectors = nullptr;
  InputNormCall in_norm{};

  const Geometry& geom() const { return ctx.p.geom; }
  bool need_du() const { return ctx.p.grad_x != nullptr || ctx.p.grad_dw_weight != nullptr; }

  void plan(BetweenStages between, const Tensor& norm_vectors, const Bias& in_vectors, int64_t in_act) {
    const BackwardParams& p = ctx.p = call.params;
    kernels = &table.by_dtype[static_cast<int>(p.dtype)];
    vectors = doubles_of(op, "vectors", norm_vectors, kVectorRows, p.geom.c_mid);
    in_norm = input_norm_of(op, in_vectors, in_act, p.geom.c_in);
    const bool in_place = walked_in_place(p) && !in_vectors.has_value();
    // du that goes to the caller has one order for both stages.
    const bool by_planes =
        between != BetweenStages::caller && !in_vectors.has_value() && goes_back_by_planes(p, *kernels);
    ctx.plan = plan_backward(p.geom, in_place ? Layout::nhwc : Layout::nchw, micro_of(table, p.dtype),
                             element_bytes(p.dtype), between, by_planes);
    // x behind its norm is read a last time before grad_x is written (cpu/backward_groups.inl): it stands there until
    // then.
    if (in_norm.vectors != nullptr && ctx.plan.panels == 0 && ctx.plan.x_rows == 0 && p.grad_x != nullptr &&
        walked_in_place(p) && p.geom.c_in % ctx.plan.micro.lanes == 0) {
      ctx.x_turned = p.grad_x;
      ctx.plan.x_ld = p.geom.c_in;
    }
  }
  void reserve(void** pointer, int64_t elements) { workspace.reserve(pointer, elements * ctx.plan.element); }

  void reserve_z() {
    const CpuPlan& plan = ctx.plan;
    reserve(&ctx.packed.dw_weight, plan.taps * plan.mid_columns);
    reserve(&ctx.packed.dw_bias, plan.mid_columns);
    reserve(&ctx.zhat_weight, plan.taps * plan.mid_columns);
    reserve(&ctx.norm, kNormRows * plan.mid_columns);
    if (in_norm.vectors != nullptr) reserve(&in_norm.rows, in_norm.elements(geom(), plan));
    const bool turned = ctx.p.x_layout == Layout::nchw || in_norm.vectors != nullptr;
    if (turned && plan.panels == 0 && ctx.x_turned == nullptr) reserve_turned(workspace, ctx);
  }
  void reserve_pointwise(bool out_norm) {
    const CpuPlan& plan = ctx.plan;
    const Geometry& g = geom();
    pointwise.emplace(workspace, ctx, true);
    workspace.reserve(reinterpret_cast<void**>(&ctx.norm_partial), (plan.panels > 0 ? 1 : plan.pointwise_groups) * 2 *
                                                                       g.c_mid * static_cast<int64_t>(sizeof(double)));
    if (out_norm) reserve(&out_rows, kNormRows * plan.out_columns);
  }
  void reserve_depthwise() {
    const CpuPlan& plan = ctx.plan;
    if (ctx.p.grad_dw_weight != nullptr && plan.panels == 0) {
      reserve(&ctx.dw_partial, plan.pointwise_groups * depthwise_sums(plan, geom()));
    }
  }
  // For the panels of every instruction set: their widths divide this one, so that fake tensors know the size.
  int64_t du_elements() const {
    constexpr int64_t kWidest = 64;
    return ctx.plan.pixels * (geom().multiplier == 1 ? round_up(geom().c_mid, kWidest) : geom().c_mid);
  }

  // The rows of the first norm in the order of k. sums: [2][c_mid] in the order of the tensors, null before they are
  // known.
  void fill_norm(const double* sums, double count) {
    const int64_t c_mid = geom().c_mid;
    const double *rows = vectors, *summed = sums;
    std::vector<double> by_k;
    if (geom().multiplier > 1) {
      by_k.resize(static_cast<size_t>((kVectorRows + 2) * c_mid));
      const auto in_order = [&](const double* from, int64_t count_of_rows, double* to) {
        for (int64_t i = 0; i < count_of_rows * c_mid; ++i)
          to[i] = from[i / c_mid * c_mid + channel_of(geom(), i % c_mid)];
      };
      in_order(vectors, kVectorRows, by_k.data());
      if (sums != nullptr) in_order(sums, 2, by_k.data() + kVectorRows * c_mid);
      rows = by_k.data();
      if (sums != nullptr) summed = rows + kVectorRows * c_mid;
    }
    fill_norm_rows(ctx.plan.element, c_mid, ctx.plan.mid_columns, rows, summed, count, ctx.norm);
    // What the kernels make is zhat already.
    for (int64_t k = 0; k < c_mid; ++k) {
      if (ctx.plan.element == 8) {
        set_standard(static_cast<double*>(ctx.norm), k);
      } else {
        set_standard(static_cast<float*>(ctx.norm), k);
      }
    }
  }
  template <typename T>
  void set_standard(T* rows, int64_t k) const {
    rows[kMean * ctx.plan.mid_columns + k] = 0;
    rows[kInvstd * ctx.plan.mid_columns + k] = 1;
  }

  void pack() {
    const CpuPlan& plan = ctx.plan;
    ctx.in_norm = in_norm.fill(geom(), plan);
    pack_depthwise(*kernels, ctx);
    fold_norm(geom(), plan, vectors, Fold::zhat, ctx.packed.dw_weight, ctx.zhat_weight, ctx.packed.dw_bias);
    if (ctx.x_turned != nullptr) {
      for_each_task(ceil_div(input_pixels(geom()), plan.turned_pixels),
                    [&](int64_t task) { kernels->backward_turn_x(ctx, task); });
    }
  }

  void fill_output_norm(const OutputNorm& norm) {
    if (out_rows == nullptr) return;
    const int64_t c_out = geom().c_out;
    const double count = norm.count == 0 ? static_cast<double>(ctx.plan.pixels) : norm.count;
    fill_norm_rows(ctx.plan.element, c_out, ctx.plan.out_columns,
                   doubles_of(op, "out_vectors", *norm.vectors, kVectorRows, c_out),
                   norm.sums.has_value() ? doubles_of(op, "out_sums", *norm.sums, 2, c_out) : nullptr, count, out_rows);
    ctx.out_norm = out_rows;
  }

  template <typename Kernel>
  void each(int64_t tasks, Kernel kernel, int64_t scratch) {
    for_each_task(tasks, [&](int64_t task) { kernel(ctx, task, thread_scratch(scratch)); });
  }

  void stage_pointwise() {
    for (int64_t i = 0; ctx.plan.panels > 0 && i < 2 * geom().c_mid; ++i) ctx.norm_partial[i] = 0;
    pointwise->run(*kernels, ctx);
  }
  void sum_groups(double* to) const {
    const int64_t c_mid = geom().c_mid, groups = ctx.plan.panels > 0 ? 1 : ctx.plan.pointwise_groups;
    for (int64_t row = 0; row < 2; ++row) {
      for (int64_t k = 0; k < c_mid; ++k) {
        double sum = 0;
        for (int64_t group = 0; group < groups; ++group) sum += ctx.norm_partial[(group * 2 + row) * c_mid + k];
        to[row * c_mid + channel_of(geom(), k)] = sum;
      }
    }
  }
  void stage_depthwise() {
    const CpuPlan& plan = ctx.plan;
    const BackwardParams& p = ctx.p;
    const Geometry& g = geom();
    each(plan.pointwise_groups, kernels->backward_norm_group, plan.scratch_bytes);
    if (p.grad_dw_weight != nullptr) {
      for_each_task(g.multiplier * ceil_div(g.c_in, plan.micro.lanes),
                    [&](int64_t vector) { kernels->reduce_depthwise(ctx, vector); });
    }
    if (p.grad_x != nullptr) {
      each(input_slices(g) * ceil_div(g.h_in, plan.task_rows), kernels->backward_x, plan.scratch_bytes);
    }
  }
};

void prepare(Run& run, const Tensor& grad, const OutputNorm& norm, const Tensor& x, const Tensor& dw_weight,
             const Tensor& pw_weight, const Bias& dw_bias, const CallArguments& arguments, int64_t grad_mask) {
  CallArguments linear = arguments;
  linear.out_act = 0;
  run.call = prepare_backward(run.op, grad, x, dw_weight, pw_weight, dw_bias, {}, linear, grad_mask);
  BackwardParams& p = run.call.params;
  if (!norm.y.has_value()) return;
  STD_TORCH_CHECK(norm.vectors.has_value(), run.op, ": out_vectors must be given with y");
  check_operand(run.op, "y", *norm.y, x);
  STD_TORCH_CHECK(same_sizes(*norm.y, grad), run.op, ": y must have the shape of the output");
  run.call.saved = walkable_or_copy(*norm.y, p.saved_layout);
  p.saved = run.call.saved->const_data_ptr();
  p.saved_strides = walk_strides(*run.call.saved, p.saved_layout);
  p.out_act = activation_of(run.op, "out_activation", arguments.out_act);
}

}  // namespace

NormGradients bwd_norm(const char* op, const Tensor& grad, const Bias& y, const Tensor& x, const Tensor& dw_weight,
                       const Tensor& pw_weight, const Bias& dw_bias, const Tensor& vectors, const Bias& out_vectors,
                       const Bias& out_sums, double out_count, const CallArguments& arguments, int64_t grad_mask,
                       const Bias& in_vectors, int64_t in_act, const GateCall& gate) {
  Run run(op);
  const OutputNorm norm = {y, out_vectors, out_sums, out_count};
  prepare(run, grad, norm, x, dw_weight, pw_weight, dw_bias, arguments, grad_mask & ~kGradDwBias);
  run.plan(BetweenStages::sums, vectors, in_vectors, in_act);
  const Geometry& g = run.geom();
  Tensor sums = empty_doubles(x, 2, g.c_mid);
  double* summed = static_cast<double*>(sums.mutable_data_ptr());
  const bool empty = g.n == 0;
  if (empty) torch::stable::zero_(sums);
  if (!empty) {
    run.reserve_z();
    run.reserve_pointwise(y.has_value());
    run.reserve_depthwise();
    if (run.ctx.plan.panels == 0)
      run.reserve(&run.ctx.du, run.ctx.plan.pixels * round_up(g.c_mid, run.ctx.plan.du_width));
    const GateRows rows(run.workspace, g, run.ctx.plan, gate);
    run.workspace.allocate();
    rows.fill(run.ctx);
    run.ctx.norm_count = static_cast<double>(run.ctx.plan.pixels);
    run.fill_norm(nullptr, 0);
    run.fill_output_norm(norm);
    run.pack();
    run.stage_pointwise();
    run.sum_groups(summed);
    if (run.ctx.plan.panels == 0 && run.need_du()) {
      run.fill_norm(summed, run.ctx.norm_count);
      run.stage_depthwise();
    }
  }
  return {run.call.grad_x, run.call.grad_dw_weight, run.call.grad_pw_weight, run.call.grad_pw_bias, sums};
}

namespace {

NormGradients bwd_norm_op(Tensor grad, Bias y, Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias,
                          Tensor vectors, Bias out_vectors, Bias out_sums, double out_count, Ints stride, Ints padding,
                          Ints dilation, int64_t act, int64_t out_act, int64_t grad_mask, Bias in_vectors,
                          int64_t in_act, bool /*fast*/) {
  constexpr const char* op = "dsconv_cuda::bwd_norm";
  return bwd_norm(op, grad, y, x, dw_weight, pw_weight, dw_bias, vectors, out_vectors, out_sums, out_count,
                  arguments_of(op, stride, padding, dilation, act, out_act), grad_mask, in_vectors, in_act);
}

Tensor empty_du(const Run& run, const Tensor& x, int64_t elements) {
  const int64_t size[1] = {elements}, stride[1] = {1};
  const int32_t dtype = run.ctx.p.dtype == DType::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  return empty_of_dtype(dtype, x, 1, size, stride);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd_norm_pointwise(Tensor grad, Bias y, Tensor x, Tensor dw_weight,
                                                              Tensor pw_weight, Bias dw_bias, Tensor vectors,
                                                              Bias out_vectors, Bias out_sums, double out_count,
                                                              Ints stride, Ints padding, Ints dilation, int64_t act,
                                                              int64_t out_act, int64_t grad_mask, Bias in_vectors,
                                                              int64_t in_act, bool /*fast*/) {
  Run run("dsconv_cuda::bwd_norm_pointwise");
  const OutputNorm norm = {y, out_vectors, out_sums, out_count};
  prepare(run, grad, norm, x, dw_weight, pw_weight, dw_bias,
          arguments_of(run.op, stride, padding, dilation, act, out_act), grad_mask & (kGradPwWeight | kGradPwBias));
  run.plan(BetweenStages::caller, vectors, in_vectors, in_act);
  const Geometry& g = run.geom();
  Tensor sums = empty_doubles(x, 2, g.c_mid);
  Tensor du = empty_du(run, x, run.du_elements());
  if (g.n == 0) {
    torch::stable::zero_(sums);
    return {du, sums, run.call.grad_pw_weight, run.call.grad_pw_bias};
  }
  run.reserve_z();
  run.reserve_pointwise(y.has_value());
  run.workspace.allocate();
  run.ctx.du = du.mutable_data_ptr();
  run.fill_norm(nullptr, 0);
  run.fill_output_norm(norm);
  run.pack();
  run.stage_pointwise();
  run.sum_groups(static_cast<double*>(sums.mutable_data_ptr()));
  return {du, sums, run.call.grad_pw_weight, run.call.grad_pw_bias};
}

// Writes over du.
std::tuple<Tensor, Tensor> bwd_norm_depthwise(Tensor du, Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias,
                                              Tensor vectors, Tensor sums, double count, Ints stride, Ints padding,
                                              Ints dilation, int64_t grad_mask, Bias in_vectors, int64_t in_act) {
  Run run("dsconv_cuda::bwd_norm_depthwise");
  prepare_operands(run.call, run.op, x, dw_weight, pw_weight, dw_bias,
                   arguments_of(run.op, stride, padding, dilation, 0, 0));
  allocate_grads(run.call, x, dw_weight, pw_weight, grad_mask & (kGradX | kGradDwWeight));
  run.plan(BetweenStages::caller, vectors, in_vectors, in_act);
  const Geometry& g = run.geom();
  const double* summed = doubles_of(run.op, "sums", sums, 2, g.c_mid);
  STD_TORCH_CHECK(du.numel() == run.du_elements() && du.is_contiguous() &&
                      du.scalar_type() == (run.ctx.p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float),
                  run.op, ": du is not what bwd_norm_pointwise returned");
  if (g.n > 0 && run.need_du()) {
    run.reserve_z();
    run.reserve_depthwise();
    run.workspace.allocate();
    run.ctx.du = du.mutable_data_ptr();
    run.fill_norm(summed, count);
    run.pack();
    run.stage_depthwise();
  }
  return {run.call.grad_x, run.call.grad_dw_weight};
}

}  // namespace
}  // namespace dsconv

STABLE_TORCH_LIBRARY_IMPL(dsconv_cuda, CPU, m) {
  m.impl("bwd_norm", TORCH_BOX(&dsconv::bwd_norm_op));
  m.impl("bwd_norm_pointwise", TORCH_BOX(&dsconv::bwd_norm_pointwise));
  m.impl("bwd_norm_depthwise", TORCH_BOX(&dsconv::bwd_norm_depthwise));
}
