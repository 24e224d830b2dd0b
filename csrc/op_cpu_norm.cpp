// CPU host entries of training through BatchNorm, dw -> norm -> act -> pw -> norm -> act. dsconv_cuda/batchnorm.py
// joins them; between any two of them statistics can be reduced over processes.
//
//   z_moments      mean and variance of z, which is made tile by tile and forgotten
//   norm_vectors   from these and the affine pair: mean, invstd, gamma, beta of every channel
//   norm_track     running statistics
//   fwd_norm       y, the scale and the shift of the first norm folded into the packed depthwise weights; and mean and
//                  variance of y, tile by tile while it is in cache, where they are asked for
//   moments        mean and variance of a tensor
//   norm_act       act(gamma * yhat + beta) in one pass
//   norm_act_sums, norm_act_grad    its gradient: sums over the pixels, then a pass
//
// In a chain of blocks x is the y of the block before: with in_vectors and in_act the first two, and backward, take it
// through the norm and the activation after it as they read it.
//
// Per-channel values are doubles in tensors of shape [2, C] or [4, C]: they cost nothing beside the maps, and what is
// reduced over tiles, threads and processes keeps its digits. As in op_cpu.cpp, how a call is cut into tasks follows
// from the shape, so sums have the same bits for every number of threads.

#include <cmath>
#include <numeric>
#include <vector>

#include "cpu_norm.h"
#include "cpu_tasks.h"
#include "op_args.h"

namespace dsconv {
namespace {

constexpr int64_t kMaxGroups = 32;         // partial sums of a pass
constexpr int64_t kZTileBytes = 48 << 10;  // z of the statistics pass: read twice after it is made
constexpr int64_t kNormTileBytes = 16 << 10;
constexpr int64_t kSumTileBytes = 64 << 10;  // where a tile's sums, each channel by itself, go into those of the group
constexpr int64_t kLeastPlane = 32;          // pixels
using Ints = std::vector<int64_t>;

// Chan's formula over the groups, in their order, into the first of them. to: [2][channels], mean and variance.
template <typename CountOf, typename ChannelOf>
void merge_moments(double* partial, int64_t groups, int64_t channels, const CountOf& count_of,
                   const ChannelOf& channel_of, double* to) {
  double *mean = partial, *m2 = partial + channels;
  double count = count_of(0);
  for (int64_t group = 1; group < groups; ++group) {
    const double more = count_of(group), total = count + more;
    if (more == 0) continue;
    const double share = more / total, spread = count * more / total;
    const double *mean_of = partial + group * 2 * channels, *m2_of = mean_of + channels;
    for (int64_t c = 0; c < channels; ++c) {
      const double delta = mean_of[c] - mean[c];
      mean[c] += delta * share;
      m2[c] += m2_of[c] + delta * delta * spread;
    }
    count = total;
  }
  for (int64_t c = 0; c < channels; ++c) {
    to[channel_of(c)] = mean[c];
    to[channels + channel_of(c)] = m2[c] / count;
  }
}

// Of the groups that plan.tiles are cut into.
auto pixels_of_groups(const CpuPlan& plan, int64_t groups) {
  return [&plan, groups](int64_t group) {
    const int64_t first = plan.tiles * group / groups, last = plan.tiles * (group + 1) / groups;
    return static_cast<double>(pixels_of_tiles(plan.order, first, last));
  };
}

}  // namespace

Tensor norm_vectors(Tensor moments, Bias gamma, Bias beta, double eps) {
  constexpr const char* op = "dsconv_cuda::norm_vectors";
  STD_TORCH_CHECK(moments.dim() == 2, op, ": moments must have shape [2, C]");
  const int64_t channels = moments.size(1);
  const double* from = doubles_of(op, "moments", moments, 2, channels);
  Tensor result = empty_doubles(moments, kVectorRows, channels);
  double* to = static_cast<double*>(result.mutable_data_ptr());
  for (int64_t c = 0; c < channels; ++c) {
    to[kMean * channels + c] = from[c];
    to[kInvstd * channels + c] = 1 / std::sqrt(from[channels + c] + eps);
  }
  read_parameter(op, "weight", gamma, channels, 1, to + kGamma * channels);
  read_parameter(op, "bias", beta, channels, 0, to + kBeta * channels);
  return result;
}

namespace {

// running += momentum * (scale * value - running)
template <typename T>
void move_towards(const Tensor& running, const double* values, double scale, double momentum) {
  T* to = static_cast<T*>(running.mutable_data_ptr());
  const int64_t count = running.size(0), step = running.stride(0);
  for (int64_t i = 0; i < count; ++i) {
    const double old = static_cast<double>(to[i * step]);
    to[i * step] = static_cast<T>(static_cast<Wide<T>>(old + momentum * (scale * values[i] - old)));
  }
}

}  // namespace

void norm_track(Tensor moments, double count, double momentum, Bias running_mean, Bias running_var) {
  constexpr const char* op = "dsconv_cuda::norm_track";
  STD_TORCH_CHECK(moments.dim() == 2, op, ": moments must have shape [2, C]");
  const int64_t channels = moments.size(1);
  const double* from = doubles_of(op, "moments", moments, 2, channels);
  const auto track = [&](const char* arg, const Bias& t, const double* values, double scale) {
    if (!t.has_value()) return;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == channels, op, ": ", arg, " must have shape [", channels, "]");
    STD_TORCH_CHECK(t->device() == moments.device(), op, ": ", arg, " must be on the device of moments");
    by_type(op, *t, [&](auto value) { move_towards<decltype(value)>(*t, values, scale, momentum); });
  };
  track("running_mean", running_mean, from, 1);
  // Without bias, as PyTorch's.
  track("running_var", running_var, from + channels, count / (count - 1));
}

namespace {

// ---- passes over tensors of the shape of y ----

struct NormCall {
  NormContext ctx{};
  DType dtype = DType::f32;
  int64_t element = 4, lanes = 1;
  const DTypeKernels* kernels = nullptr;
  std::optional<Tensor> v, grad;
};

NormCall prepare_norm(const char* op, const Tensor& v, int64_t act) {
  STD_TORCH_CHECK(v.dim() == 4 || v.dim() == 5, op, ": input must have 4 dimensions, 5 in 3-D, got ", v.dim());
  NormCall call;
  NormContext& ctx = call.ctx;
  const KernelTable& table = active_table(op);
  call.dtype = dtype_of(op, v);
  call.element = element_bytes(call.dtype);
  call.kernels = &table.by_dtype[static_cast<int>(call.dtype)];
  ctx.act = activation_of(op, "activation", act);
  const int64_t h = v.dim() - 2;
  ctx.n = v.size(0), ctx.channels = v.size(1), ctx.d = h == 3 ? v.size(2) : 1, ctx.h = v.size(h), ctx.w = v.size(h + 1);
  ctx.pixels = ctx.n * ctx.d * ctx.h * ctx.w;
  ctx.beyond_cache = 2 * ctx.pixels * ctx.channels * call.element > kSharedCacheBytes;
  call.v = walkable_or_copy(v, ctx.v.layout);
  ctx.v.data = call.v->const_data_ptr();
  ctx.v.strides = walk_strides(*call.v, ctx.v.layout);
  call.lanes = micro_of(table, call.dtype).lanes;
  return call;
}

void add_gradient(const char* op, NormCall& call, const Tensor& grad) {
  NormContext& ctx = call.ctx;
  check_operand(op, "grad_output", grad, *call.v);
  STD_TORCH_CHECK(same_sizes(grad, *call.v), op, ": grad_output must have the shape of the output");
  call.grad = walkable_or_copy(grad, ctx.grad.layout);
  ctx.grad.data = call.grad->const_data_ptr();
  ctx.grad.strides = walk_strides(*call.grad, ctx.grad.layout);
}

Tensor empty_output(NormCall& call, const Tensor& like) {
  NormContext& ctx = call.ctx;
  Tensor out = empty_images(like, ctx.n, ctx.channels, ctx.d, ctx.h, ctx.w, suggests_channels_last(like));
  walkable(out, ctx.out_layout);
  ctx.out = out.mutable_data_ptr();
  return out;
}

// By planes where all tensors have them, and long enough for vectors of pixels.
void choose_planes(NormCall& call) {
  NormContext& ctx = call.ctx;
  const int64_t plane = ctx.d * ctx.h * ctx.w;
  const auto has_planes = [&](const ImageTensor& t) {
    return t.layout == Layout::nchw && t.strides.w == 1 && t.strides.h == ctx.w &&
           (ctx.d == 1 || t.strides.d == ctx.h * ctx.w);
  };
  ctx.planes = has_planes(ctx.v) && (ctx.grad.data == nullptr || has_planes(ctx.grad)) &&
               (ctx.out == nullptr || ctx.out_layout == Layout::nchw) && plane >= kLeastPlane;
}

void set_tiles(NormCall& call, bool partial) {
  NormContext& ctx = call.ctx;
  ctx.ld = round_up(ctx.channels, call.lanes);
  ctx.tile_pixels = clamp64((partial ? kSumTileBytes : kNormTileBytes) / at_least_1(ctx.ld * call.element), 8, 256);
  const int64_t planes = ctx.n * ctx.channels;
  if (ctx.planes) {
    const int64_t bytes = ctx.pixels * ctx.channels * call.element;
    ctx.groups = clamp64(ceil_div(bytes, kNormTileBytes), 1, planes < kMaxGroups ? planes : kMaxGroups);
  } else {
    ctx.groups = clamp64(ceil_div(ctx.pixels, ctx.tile_pixels), 1, kMaxGroups);
  }
}

// Whether the values lie one behind another, channel by channel.
bool is_dense_matrix(const ImageTensor& t, const NormContext& ctx) {
  return t.strides.w == ctx.channels && is_matrix(t, ctx.n, ctx.d, ctx.h, ctx.w);
}

// Channels that fill no whole vectors: some pixels side by side do, and count as one pixel with all their channels.
// How many; 1 where this cannot be, or need not.
int64_t join_pixels(NormCall& call) {
  constexpr int64_t kMostChannels = 1024;
  NormContext& ctx = call.ctx;
  const int64_t joined = call.lanes / std::gcd(ctx.channels, call.lanes);
  const bool as_stored = call.dtype == DType::f32 || call.dtype == DType::f64;
  if (ctx.planes || joined == 1 || !as_stored || ctx.pixels % joined != 0 || joined * ctx.channels > kMostChannels ||
      !is_dense_matrix(ctx.v, ctx) || (ctx.grad.data != nullptr && !is_dense_matrix(ctx.grad, ctx)) ||
      (ctx.out != nullptr && ctx.out_layout != Layout::nhwc)) {
    return 1;
  }
  ctx.pixels /= joined, ctx.channels *= joined;
  ctx.n = ctx.d = ctx.h = 1, ctx.w = ctx.pixels;
  for (ImageTensor* t : {&ctx.v, &ctx.grad}) {
    t->strides.w = ctx.channels;
    t->strides.h = t->strides.d = t->strides.n = ctx.pixels * ctx.channels;
  }
  return joined;
}

// `rows` rows of `channels` values, each row `times` times side by side.
std::vector<double> repeated(const double* values, int64_t rows, int64_t channels, int64_t times) {
  std::vector<double> to;
  if (values == nullptr) return to;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < times; ++i) to.insert(to.end(), values + row * channels, values + (row + 1) * channels);
  }
  return to;
}

// The moments of `channels` channels from those of `parts` equal parts of their values, side by side.
void join_moments(const double* of_parts, int64_t parts, int64_t channels, double* to) {
  const double *means = of_parts, *variances = of_parts + parts * channels;
  for (int64_t c = 0; c < channels; ++c) {
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < parts; ++i) mean += means[i * channels + c] / static_cast<double>(parts);
    for (int64_t i = 0; i < parts; ++i) {
      const double delta = means[i * channels + c] - mean;
      variance += (variances[i * channels + c] + delta * delta) / static_cast<double>(parts);
    }
    to[c] = mean;
    to[channels + c] = variance;
  }
}

void run_norm(NormCall& call, const double* vectors, const double* sums, double count, bool partial,
              void (*kernel)(const NormContext&, int64_t, void*), double* to) {
  NormContext& ctx = call.ctx;
  const int64_t channels = ctx.channels;
  if (vectors != nullptr) choose_planes(call);
  const int64_t joined = join_pixels(call);
  set_tiles(call, partial);
  const int64_t partials = ctx.planes ? ctx.n : ctx.groups;
  Workspace workspace(1);
  void* rows = nullptr;
  if (vectors != nullptr) workspace.reserve(&rows, kNormRows * ctx.ld * call.element);
  if (partial) {
    workspace.reserve(reinterpret_cast<void**>(&ctx.partial), partials * 2 * ctx.channels * sizeof(double));
  }
  workspace.allocate();
  if (vectors != nullptr) {
    std::vector<double> of, summed;
    if (joined > 1) {
      of = repeated(vectors, kVectorRows, channels, joined), summed = repeated(sums, 2, channels, joined);
      vectors = of.data(), sums = sums == nullptr ? nullptr : summed.data();
    }
    fill_norm_rows(call.element, ctx.channels, ctx.ld, vectors, sums, count, rows);
  }
  ctx.vectors = rows;
  const int64_t scratch = 3 * ctx.tile_pixels * ctx.ld * call.element + kCacheLine;
  for_each_task(ctx.groups, [&](int64_t group) { kernel(ctx, group, thread_scratch(scratch)); });
  if (!partial) return;
  if (vectors == nullptr) {
    const auto begin = [&](int64_t group) { return ctx.pixels * group / ctx.groups; };
    std::vector<double> moments(static_cast<size_t>(2 * ctx.channels));
    merge_moments(
        ctx.partial, ctx.groups, ctx.channels,
        [&](int64_t group) { return static_cast<double>(begin(group + 1) - begin(group)); },
        [](int64_t c) { return c; }, moments.data());
    return join_moments(moments.data(), joined, channels, to);
  }
  for (int64_t i = 0; i < 2 * channels; ++i) to[i] = 0;
  for (int64_t part = 0; part < partials * 2 * joined; ++part) {  // of a row, that of sums or the other
    double* row = to + part / joined % 2 * channels;
    for (int64_t c = 0; c < channels; ++c) row[c] += ctx.partial[part * channels + c];
  }
}

Tensor moments(Tensor v) {
  constexpr const char* op = "dsconv_cuda::moments";
  NormCall call = prepare_norm(op, v, 0);
  Tensor result = empty_doubles(v, 2, call.ctx.channels);
  if (v.numel() == 0) return torch::stable::zero_(result);
  run_norm(call, nullptr, nullptr, 0, true, call.kernels->norm_moments,
           static_cast<double*>(result.mutable_data_ptr()));
  return result;
}

}  // namespace

Tensor norm_act(Tensor v, Tensor vectors, int64_t act) {
  constexpr const char* op = "dsconv_cuda::norm_act";
  NormCall call = prepare_norm(op, v, act);
  const double* of = doubles_of(op, "vectors", vectors, kVectorRows, call.ctx.channels);
  Tensor out = empty_output(call, v);
  if (v.numel() > 0) run_norm(call, of, nullptr, 0, false, call.kernels->norm_forward, nullptr);
  return out;
}

Tensor norm_act_sums(Tensor grad, Tensor v, Tensor vectors, int64_t act) {
  constexpr const char* op = "dsconv_cuda::norm_act_sums";
  NormCall call = prepare_norm(op, v, act);
  const double* of = doubles_of(op, "vectors", vectors, kVectorRows, call.ctx.channels);
  add_gradient(op, call, grad);
  Tensor result = empty_doubles(v, 2, call.ctx.channels);
  if (v.numel() == 0) return torch::stable::zero_(result);
  run_norm(call, of, nullptr, 0, true, call.kernels->norm_sums, static_cast<double*>(result.mutable_data_ptr()));
  return result;
}

namespace {

Tensor norm_act_grad(Tensor grad, Tensor v, Tensor vectors, Bias sums, double count, int64_t act) {
  constexpr const char* op = "dsconv_cuda::norm_act_grad";
  NormCall call = prepare_norm(op, v, act);
  const double* of = doubles_of(op, "vectors", vectors, kVectorRows, call.ctx.channels);
  const double* summed = sums.has_value() ? doubles_of(op, "sums", *sums, 2, call.ctx.channels) : nullptr;
  add_gradient(op, call, grad);
  Tensor out = empty_output(call, v);
  if (count == 0) count = static_cast<double>(call.ctx.pixels);
  if (v.numel() > 0) run_norm(call, of, summed, count, false, call.kernels->norm_backward, nullptr);
  return out;
}

// ---- the block ----

}  // namespace

Tensor z_moments(const char* op, const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight, const Bias& dw_bias,
                 const CallArguments& arguments, const Bias& in_vectors, int64_t in_act) {
  MomentsCall call{};
  prepare_operands(call, op, x, dw_weight, pw_weight, dw_bias, arguments);
  const ForwardParams& p = call.params;
  const Geometry& g = p.geom;
  InputNormCall in_norm = input_norm_of(op, in_vectors, in_act, g.c_in);
  Tensor result = empty_doubles(x, 2, g.c_mid);
  if (output_pixels(g) == 0) return torch::stable::zero_(result);

  const KernelTable& table = active_table(op);
  if (in_vectors.has_value() && !norms_as_it_reads(g, table, p.dtype)) {
    return z_moments(op, norm_act(x, *in_vectors, in_act), dw_weight, pw_weight, dw_bias, arguments, {}, 0);
  }
  const DTypeKernels& kernels = table.by_dtype[static_cast<int>(p.dtype)];
  const int64_t element = element_bytes(p.dtype);
  MomentsContext ctx{};
  ctx.geom = g;
  const bool by_planes = !in_vectors.has_value() && may_go_by_planes(kernels, g, p.x_layout);
  ctx.plan = plan_moments(g, in_vectors.has_value() ? Layout::nchw : p.x_layout, micro_of(table, p.dtype), element,
                          kZTileBytes, by_planes && planes_pay_for_moments(g, element));
  ctx.x = {p.x, p.x_strides, p.x_layout};
  ctx.groups = ctx.plan.tiles < kMaxGroups ? ctx.plan.tiles : kMaxGroups;
  const CpuPlan& plan = ctx.plan;
  ctx.panels = ceil_div(g.c_mid, plan.mid_ld);
  Workspace workspace(1), weights(element);
  reserve_depthwise(weights, plan, ctx.packed);
  workspace.reserve(&in_norm.rows, in_norm.elements(g, plan) * element);
  workspace.reserve(reinterpret_cast<void**>(&ctx.partial), ctx.groups * 2 * g.c_mid * sizeof(double));
  workspace.allocate();
  ctx.in_norm = in_norm.fill(g, plan);
  const auto pack = [&](const MomentsContext& own, int64_t, int64_t) {
    pack_all(kernels, {g, plan, own.packed, p.dw_weight, p.dw_bias, nullptr, nullptr}, {0, 0}, nullptr);
  };
  run_with_copies(ctx, weights, plan.pixels, ctx.groups * ctx.panels, pack, kernels.depthwise_moments);
  merge_moments(
      ctx.partial, ctx.groups, g.c_mid, pixels_of_groups(plan, ctx.groups), [&](int64_t k) { return channel_of(g, k); },
      static_cast<double*>(result.mutable_data_ptr()));
  return result;
}

std::tuple<Tensor, Tensor> fwd_norm(const char* op, const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                                    const Bias& dw_bias, const Bias& pw_bias, const Tensor& vectors,
                                    const CallArguments& arguments, bool want_moments, const Bias& in_vectors,
                                    int64_t in_act) {
  const KernelTable& table = active_table(op);
  if (in_vectors.has_value() &&
      !norms_as_it_reads(geometry_of(op, x, dw_weight, pw_weight, arguments), table, dtype_of(op, x))) {
    return fwd_norm(op, norm_act(x, *in_vectors, in_act), dw_weight, pw_weight, dw_bias, pw_bias, vectors, arguments,
                    want_moments, {}, 0);
  }
  ForwardCall call = prepare_forward(op, x, dw_weight, pw_weight, dw_bias, pw_bias, arguments, false);
  const ForwardParams& p = call.params;
  const Geometry& g = p.geom;
  const double* of = doubles_of(op, "vectors", vectors, kVectorRows, g.c_mid);
  InputNormCall in_norm = input_norm_of(op, in_vectors, in_act, g.c_in);
  Tensor moments = empty_doubles(x, 2, want_moments ? g.c_out : 0);
  if (call.y->numel() == 0) return {*call.y, torch::stable::zero_(moments)};
  const DTypeKernels& kernels = table.by_dtype[static_cast<int>(p.dtype)];
  ForwardContext ctx{};
  ctx.p = p;
  // Sums follow the tiles, and these then not the threads.
  const int64_t granule = want_moments ? 4 : static_cast<int64_t>(torch::stable::get_num_threads());
  const MicroTile micro = micro_of(table, p.dtype);
  ctx.plan = plan_forward(g, in_vectors.has_value() ? Layout::nchw : p.x_layout, micro, kernels.bytes, granule,
                          want_moments, !in_vectors.has_value() && goes_by_planes(p, kernels, true));
  ctx.plan.tap_pairs = 0;  // the norm is folded into weights in the compute type
  const CpuPlan& plan = ctx.plan;
  Workspace workspace(1), weights(plan.element);
  reserve_depthwise(weights, plan, ctx.packed);
  weights.reserve(&ctx.packed.pw_forward, packed_outputs(plan, kernels.bytes) * g.c_mid);
  weights.reserve(&ctx.packed.pw_bias, plan.out_columns);
  workspace.reserve(&in_norm.rows, in_norm.elements(g, plan) * plan.element);
  if (want_moments) {
    ctx.groups = plan.tiles < kMaxGroups ? plan.tiles : kMaxGroups;
    workspace.reserve(reinterpret_cast<void**>(&ctx.partial), ctx.groups * 2 * g.c_out * sizeof(double));
  }
  workspace.allocate();
  ctx.in_norm = in_norm.fill(g, plan);
  const auto pack = [&](const ForwardContext& own, int64_t, int64_t) {
    pack_all(kernels, {g, plan, own.packed, p.dw_weight, p.dw_bias, p.pw_weight, p.pw_bias},
             {0, packed_outputs(plan, kernels.bytes) / plan.micro.columns}, kernels.pack_pointwise_forward);
    fold_norm(g, plan, of, Fold::affine, own.packed.dw_weight, own.packed.dw_weight, own.packed.dw_bias);
  };
  run_with_copies(ctx, weights, plan.pixels, want_moments ? ctx.groups : forward_tasks(plan), pack,
                  want_moments ? kernels.forward_moments : kernels.forward);
  if (want_moments) {
    merge_moments(
        ctx.partial, ctx.groups, g.c_out, pixels_of_groups(plan, ctx.groups), [](int64_t c) { return c; },
        static_cast<double*>(moments.mutable_data_ptr()));
  }
  return {*call.y, moments};
}

namespace {

Tensor z_moments_op(Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Ints stride, Ints padding,
                    Ints dilation, Bias in_vectors, int64_t in_act) {
  constexpr const char* op = "dsconv_cuda::z_moments";
  return z_moments(op, x, dw_weight, pw_weight, dw_bias, arguments_of(op, stride, padding, dilation, 0, 0), in_vectors,
                   in_act);
}

std::tuple<Tensor, Tensor> fwd_norm_op(Tensor x, Tensor dw_weight, Tensor pw_weight, Bias dw_bias, Bias pw_bias,
                                       Tensor vectors, Ints stride, Ints padding, Ints dilation, int64_t act,
                                       bool want_moments, Bias in_vectors, int64_t in_act, bool /*fast*/) {
  constexpr const char* op = "dsconv_cuda::fwd_norm";
  return fwd_norm(op, x, dw_weight, pw_weight, dw_bias, pw_bias, vectors,
                  arguments_of(op, stride, padding, dilation, act, 0), want_moments, in_vectors, in_act);
}

}  // namespace
}  // namespace dsconv

STABLE_TORCH_LIBRARY_IMPL(dsconv_cuda, CPU, m) {
  m.impl("z_moments", TORCH_BOX(&dsconv::z_moments_op));
  m.impl("norm_vectors", TORCH_BOX(&dsconv::norm_vectors));
  m.impl("norm_track", TORCH_BOX(&dsconv::norm_track));
  m.impl("fwd_norm", TORCH_BOX(&dsconv::fwd_norm_op));
  m.impl("moments", TORCH_BOX(&dsconv::moments));
  m.impl("norm_act", TORCH_BOX(&dsconv::norm_act));
  m.impl("norm_act_sums", TORCH_BOX(&dsconv::norm_act_sums));
  m.impl("norm_act_grad", TORCH_BOX(&dsconv::norm_act_grad));
}
