// The products of the split forms by the library behind torch (cuBLAS; in the emulation what torch has on the CPU), on
// the current stream. By the dispatcher's names of the ops, which is what a binary for every torch can call.
#pragma once

#include <array>
#include <optional>

#include "cuda_call.h"
#include "split_forward_plan.h"

namespace dsconv {

// A tensor over memory that the caller keeps, by sizes and strides in elements.
template <size_t kDims>
Tensor tensor_over(const void* data, const Tensor& like, const std::array<int64_t, kDims>& size,
                   const std::array<int64_t, kDims>& stride) {
  return torch::stable::from_blob(const_cast<void*>(data), {size.data(), kDims}, {stride.data(), kDims}, like.device(),
                                  like.scalar_type());
}

inline void call_op(const char* name, const char* overload, StableIValue* stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // owned, and no more than `out` again
}

// part.y = part.pw_weight . act_z (+ part.pw_bias), as split_forward() wants it.
inline void pointwise_product(const ForwardParams& part, const void* act_z, const Tensor& like) {
  const Geometry& g = part.geom;
  const int64_t pixels = g.d_out * g.h_out * g.w_out;
  const auto from = [](const auto& value) { return torch::stable::detail::from(value); };
  if (is_one_product(part)) {
    const Tensor rows = tensor_over<2>(act_z, like, {g.n * pixels, g.c_mid}, {g.c_mid, 1});
    const Tensor weight = tensor_over<2>(part.pw_weight, like, {g.c_out, g.c_mid}, {g.c_mid, 1});
    const Tensor y = tensor_over<2>(part.y, like, {g.n * pixels, g.c_out}, {g.c_out, 1});
    std::optional<Tensor> bias;
    if (part.pw_bias != nullptr) bias = tensor_over<1>(part.pw_bias, like, {g.c_out}, {1});
    StableIValue stack[4] = {from(rows), from(weight), from(bias), from(y)};
    return call_op("aten::linear", "out", stack);
  }
  // A product an image, in whichever layouts.
  const auto images = [&](const void* data, Layout layout, int64_t channels, const Strides& s) {
    return tensor_over<3>(data, like, {g.n, channels, pixels},
                          {s.n, s.c, layout == Layout::nhwc ? channels : int64_t{1}});
  };
  const Tensor weight = tensor_over<3>(part.pw_weight, like, {g.n, g.c_out, g.c_mid}, {0, g.c_mid, 1});
  StableIValue stack[3] = {from(weight), from(images(act_z, part.x_layout, g.c_mid, act_z_strides(part))),
                           from(images(part.y, part.y_layout, g.c_out, part.y_strides))};
  call_op("aten::bmm", "out", stack);
}

// Pixels as rows: du = g . pw_weight, and grad_pw_weight = g^T . act_z, as split_backward() wants them.
inline void du_product(const BackwardParams& p, const void* g, void* du, const Tensor& like) {
  const int64_t pixels = output_pixels(p.geom), c_mid = p.geom.c_mid, c_out = p.geom.c_out;
  const auto from = [](const Tensor& t) { return torch::stable::detail::from(t); };
  StableIValue stack[3] = {from(tensor_over<2>(g, like, {pixels, c_out}, {c_out, 1})),
                           from(tensor_over<2>(p.pw_weight, like, {c_out, c_mid}, {c_mid, 1})),
                           from(tensor_over<2>(du, like, {pixels, c_mid}, {c_mid, 1}))};
  call_op("aten::mm", "out", stack);
}

inline void weight_product(const BackwardParams& p, const void* g, const void* act_z, const Tensor& like) {
  const int64_t pixels = output_pixels(p.geom), c_mid = p.geom.c_mid, c_out = p.geom.c_out;
  const auto from = [](const Tensor& t) { return torch::stable::detail::from(t); };
  StableIValue stack[3] = {from(tensor_over<2>(g, like, {c_out, pixels}, {1, c_out})),
                           from(tensor_over<2>(act_z, like, {pixels, c_mid}, {c_mid, 1})),
                           from(tensor_over<2>(p.grad_pw_weight, like, {c_out, c_mid}, {c_mid, 1}))};
  call_op("aten::mm", "out", stack);
}

}  // namespace dsconv
