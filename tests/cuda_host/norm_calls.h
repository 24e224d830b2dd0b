// The launches of a training step through BatchNorm, in the order of op_cuda_norm.cu, without torch.
#pragma once

#include <cstdint>

#include "../../csrc/cuda/cuda_dispatch.h"
#include "../../csrc/cuda/cuda_norm.h"

namespace norm_calls {

using namespace dsconv;

inline NormSource z_source(const ForwardParams& p) {
  const Geometry& g = p.geom;
  return {g.n, g.c_mid, g.d_out, g.h_out, g.w_out, p.x_layout, nullptr, g, p.x, p.x_strides, p.dw_weight, nullptr};
}

// `make(name, bytes)` gives the memory of a tensor, `backward_of(p)` the backward of a forward; `phase(name)` is called
// behind each part of the step.
template <DType kType, typename Make, typename Backward, typename Phase>
LaunchStatus step(const ForwardParams& call, const DeviceLimits& device, Make make, Backward backward_of, Phase phase) {
  const Geometry& g = call.geom;
  const int64_t element = static_cast<int64_t>(element_bytes(call.dtype));
  const auto doubles = [&](const char* name, int64_t count) { return static_cast<double*>(make(name, 8 * count)); };
  double* moments = doubles("moments", 2 * g.c_mid);
  double* vectors = doubles("vectors", 4 * g.c_mid);
  double* out_moments = doubles("moments", 2 * g.c_out);
  double* out_vectors = doubles("vectors", 4 * g.c_out);
  LaunchStatus status;
  const auto run = [&](const LaunchStatus& next) {
    if (status.error == 0) status = next;
  };
  const auto run_pass = [&](NormPass& pass, NormUse use, double* result) {
    const NormPlan plan = plan_norm(pass, kType, use, device);
    if (is_sum(use)) pass.partial = doubles("partial", plan.splits * kPartialRows * pass.source.channels);
    pass.result = result;
    run(launch_norm<kType>(pass, plan, nullptr));
  };

  NormPass z{};
  z.source = z_source(call);
  z.vectors = vectors;
  run_pass(z, NormUse::moments, moments);
  run(launch_norm_vectors(moments, {}, {}, 1e-5, g.c_mid, vectors, nullptr));
  phase("statistics");

  ForwardParams folded = call;
  folded.out_act = Activation::identity;
  folded.pre = nullptr;
  folded.pw_bias = nullptr;
  void* weight = make("dw_weight", element * g.c_mid * tap_count(g));
  void* bias = make("dw_bias", element * g.c_mid);
  run(launch_norm_fold<kType>(z, tap_count(g), weight, bias, nullptr));
  folded.dw_weight = weight;
  folded.dw_bias = bias;
  const ForwardPlan plan = plan_forward(folded, device);
  const int64_t tiles = pixel_tiles_of(plan);
  constexpr bool kDouble = kType == DType::f64;
  folded.y_parts = make("y_parts", (kDouble ? 8 : 4) * tiles * (2 * g.c_out + 1));
  run(forward(folded, plan, nullptr));
  run(launch_norm_parts(folded.y_parts, kDouble, tiles, g.c_out,
                        doubles("partial", parts_splits(tiles) * kPartialRows * g.c_out), out_moments, nullptr));
  run(launch_norm_vectors(out_moments, {}, {}, 1e-5, g.c_out, out_vectors, nullptr));
  phase("forward");

  NormPass y{};
  y.source.n = g.n, y.source.channels = g.c_out;
  y.source.d = g.d_out, y.source.h = g.h_out, y.source.w = g.w_out;
  y.source.layout = call.y_layout;
  y.source.v = call.y;
  y.vectors = out_vectors;
  y.act = call.out_act;
  const int64_t y_bytes = element * output_pixels(g) * g.c_out;
  y.out = make("out", y_bytes);
  run_pass(y, NormUse::forward, nullptr);
  phase("norm");

  BackwardParams b = backward_of(folded);
  y.grad = make("grad", y_bytes);
  run_pass(y, NormUse::sums, out_moments);
  y.out = const_cast<void*>(b.dy);
  y.sums = out_moments;
  y.count = 1;
  run_pass(y, NormUse::backward, nullptr);
  const BackwardPlan backward_plan = plan_backward(b, device);
  void* workspace = make("workspace", static_cast<int64_t>(backward_plan.workspace_bytes));
  BackwardParams through = b;
  through.grad_x = through.grad_dw_weight = nullptr;  // of stage D; grad_dw_bias has du made
  run(launch_stage_p<kType>(through, backward_plan, workspace, nullptr));
  z.grad = z.out = static_cast<unsigned char*>(workspace) + backward_plan.du_at;
  run_pass(z, NormUse::sums, moments);
  z.sums = moments;
  z.count = 1;
  run_pass(z, NormUse::backward, nullptr);
  b.grad_dw_bias = nullptr;
  b.dw_weight = call.dw_weight;
  run(launch_backward_depthwise<kType>(b, backward_plan, workspace, nullptr));
  phase("backward");
  return status;
}

// Every kernel of them that is not a forward's or a backward's own, launched once for the geometry of `call`.
template <DType kType>
LaunchStatus every_launch(const ForwardParams& call, const DeviceLimits& device) {
  LaunchStatus status;
  const auto run = [&](const LaunchStatus& next) {
    if (status.error == 0) status = next;
  };
  const auto every_use = [&](const NormPass& pass, bool of_z) {
    for (const NormUse use : {NormUse::moments, NormUse::sums, NormUse::forward, NormUse::backward}) {
      if (!of_z || use != NormUse::forward) run(launch_norm<kType>(pass, plan_norm(pass, kType, use, device), nullptr));
    }
  };
  NormPass z{};
  z.source = z_source(call);
  every_use(z, true);
  run(launch_norm_fold<kType>(z, 1, nullptr, nullptr, nullptr));
  for (const Layout layout : {Layout::nchw, Layout::nhwc}) {
    for (const int64_t extent : {int64_t{3}, int64_t{4}}) {  // by elements, by vectors
      NormPass v{};
      v.source.n = 1, v.source.channels = v.source.w = extent, v.source.d = v.source.h = 1;
      v.source.layout = layout;
      v.source.v = call.x;
      every_use(v, false);
    }
  }
  run(launch_norm_parts(nullptr, kType == DType::f64, 1, 1, nullptr, nullptr, nullptr));
  run(launch_norm_vectors(nullptr, {}, {}, 1, 1, nullptr, nullptr));
  run(launch_fold_norm({nullptr, 1, 0, {}, {}, {}, {}, {}, 1, nullptr, nullptr}, kType, nullptr));
  return status;
}

}  // namespace norm_calls
