// From tensors to params.h: the checks, the output allocation and the layout rules that the CPU and the CUDA host entry
// share. The friendly errors live in dsconv_cuda/functional.py; what is checked again here is what would make a kernel
// read or write outside a tensor when torch.ops.dsconv_cuda is called directly.
#pragma once

// The oldest torch this source runs on; it also hides newer API. Set here, so that a hand-written
// torch.utils.cpp_extension.load() of these files needs no macro.
#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION 0x020a000000000000
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "params.h"

namespace dsconv {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      STD_TORCH_CHECK(false, op, ": input must be float64, float32, float16 or bfloat16");
  }
  return DType::f32;
}

inline Activation activation_of(const char* op, const char* arg, int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value < kActivationCount, op, ": ", arg, " must be an activation number in 0..",
                  kActivationCount - 1, ", got ", value);
  return static_cast<Activation>(value);
}

// What PyTorch calls suggest_memory_format() == channels_last: walking c, w, h, n, strides never decrease, and an
// ambiguous one-element shape counts as contiguous.
inline bool suggests_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  const int order[4] = {1, 3, 2, 0};
  int64_t min_stride = 0;
  if (t.stride(1) == 0) return false;
  for (const int d : order) {
    if (t.size(d) == 0 || t.stride(d) < min_stride) return false;
    if (d == 0 && min_stride == t.stride(1)) return false;
    min_stride = t.stride(d) * (t.size(d) > 1 ? t.size(d) : 1);
  }
  return true;
}

inline Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// True, and `layout` set, where a kernel can walk the tensor as it lies.
inline bool walkable(const Tensor& t, Layout& layout) {
  const bool unit_c = t.stride(1) == 1, unit_w = t.stride(3) == 1 || t.size(3) == 1;
  if (unit_c && t.size(1) > 1) {
    layout = Layout::nhwc;
    return true;
  }
  layout = Layout::nchw;
  return unit_w;
}

// A dispatcher call costs about a microsecond, so it is only made where there is something to copy.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor contiguous_copy(const Tensor& t) {
  return torch::stable::contiguous(t,
                                   suggests_channels_last(t) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// Keeps the tensor as it is where a kernel can walk it (any strides with unit stride along c or w, including slices and
// expanded images), and copies it otherwise.
inline Tensor walkable_or_copy(const Tensor& t, Layout& layout) {
  if (walkable(t, layout)) return t;
  Tensor copy = contiguous_copy(t);
  walkable(copy, layout);
  return copy;
}

// Strides of dimensions of size one never matter; the unit one is set to 1 so that kernels need not special-case it.
inline Strides walk_strides(const Tensor& t, Layout layout) {
  Strides s = strides_of(t);
  (layout == Layout::nhwc ? s.c : s.w) = 1;
  return s;
}

inline Tensor empty_4d(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last) {
  const int64_t size[4] = {n, c, h, w};
  return torch::stable::empty({size, 4}, like.scalar_type(), torch::headeronly::Layout::Strided, like.device(),
                              std::nullopt, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline int64_t checked_product(const char* op, int64_t a, int64_t b) {
  int64_t result = 0;
  STD_TORCH_CHECK(!__builtin_mul_overflow(a, b, &result), op, ": the sizes overflow 64 bits (", a, " * ", b, ")");
  return result;
}

inline int64_t output_extent(const char* op, const char* axis, int64_t in, int64_t kernel, int64_t pad_before,
                             int64_t pad_after, int64_t stride, int64_t dilation) {
  STD_TORCH_CHECK(stride > 0 && dilation > 0, op, ": stride and dilation must be positive along ", axis);
  STD_TORCH_CHECK(pad_before >= 0 && pad_after >= 0, op, ": padding must not be negative along ", axis);
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max() / 4;
  STD_TORCH_CHECK(in < kMax && pad_before < kMax && pad_after < kMax, op, ": the padded input overflows along ", axis);
  const int64_t span = checked_product(op, dilation, kernel - 1) + 1;
  const int64_t padded = in + pad_before + pad_after;
  STD_TORCH_CHECK(padded >= span, op, ": kernel larger than the padded input along ", axis, ": ", span, " > ", padded);
  return (padded - span) / stride + 1;
}

inline void check_operand(const char* op, const char* arg, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), op, ": ", arg, " must have the dtype of input");
  STD_TORCH_CHECK(t.device() == x.device(), op, ": ", arg, " must be on the device of input");
}

inline void check_bias(const char* op, const char* arg, const std::optional<Tensor>& t, const Tensor& x, int64_t size) {
  if (!t.has_value()) return;
  check_operand(op, arg, *t, x);
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == size, op, ": ", arg, " must have shape [", size, "]");
}

// padding is (top, left, bottom, right).
inline Geometry geometry_of(const char* op, const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": input must have 4 dimensions, got ", x.dim());
  STD_TORCH_CHECK(dw_weight.dim() == 4 && dw_weight.size(1) == 1, op, ": dw_weight must have shape [C * m, 1, kh, kw]");
  STD_TORCH_CHECK(pw_weight.dim() == 2 || (pw_weight.dim() == 4 && pw_weight.size(2) == 1 && pw_weight.size(3) == 1),
                  op, ": pw_weight must have shape [C_out, C * m, 1, 1] or [C_out, C * m]");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 4 && dilation.size() == 2, op,
                  ": stride and dilation take 2 numbers, padding 4 (top, left, bottom, right)");
  check_operand(op, "dw_weight", dw_weight, x);
  check_operand(op, "pw_weight", pw_weight, x);

  Geometry g{};
  g.n = x.size(0);
  g.c_in = x.size(1);
  g.h_in = x.size(2);
  g.w_in = x.size(3);
  g.c_mid = dw_weight.size(0);
  STD_TORCH_CHECK(g.c_in > 0 && g.c_mid > 0 && g.c_mid % g.c_in == 0, op,
                  ": dw_weight's channels must be a positive multiple of input's ", g.c_in, ", got ", g.c_mid);
  g.multiplier = g.c_mid / g.c_in;
  g.c_out = pw_weight.size(0);
  STD_TORCH_CHECK(pw_weight.size(1) == g.c_mid, op, ": pw_weight must have ", g.c_mid, " input channels, got ",
                  pw_weight.size(1));
  g.kernel_h = dw_weight.size(2);
  g.kernel_w = dw_weight.size(3);
  STD_TORCH_CHECK(g.kernel_h > 0 && g.kernel_w > 0, op, ": dw_weight has an empty kernel");
  g.stride_h = stride[0];
  g.stride_w = stride[1];
  g.pad_top = padding[0];
  g.pad_left = padding[1];
  g.dilation_h = dilation[0];
  g.dilation_w = dilation[1];
  g.h_out = output_extent(op, "height", g.h_in, g.kernel_h, padding[0], padding[2], g.stride_h, g.dilation_h);
  g.w_out = output_extent(op, "width", g.w_in, g.kernel_w, padding[1], padding[3], g.stride_w, g.dilation_w);
  // 16 bytes an element leaves room for every workspace that is computed from these sizes.
  const int64_t pixels = checked_product(op, checked_product(op, g.n, g.h_out), checked_product(op, g.w_out, 16));
  checked_product(op, pixels, g.c_mid);
  checked_product(op, pixels, g.c_out);
  return g;
}

struct ForwardCall {
  ForwardParams params;
  Tensor x, dw_weight, pw_weight;  // keep alive what the pointers of params point into
  std::optional<Tensor> dw_bias, pw_bias;
  Tensor y;
  std::optional<Tensor> pre;
};

inline ForwardCall prepare_forward(const char* op, const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                                   const std::optional<Tensor>& dw_bias, const std::optional<Tensor>& pw_bias,
                                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                   const std::vector<int64_t>& dilation, int64_t act, int64_t out_act, bool want_pre) {
  ForwardCall call{};
  ForwardParams& p = call.params;
  p.dtype = dtype_of(op, x);
  p.geom = geometry_of(op, x, dw_weight, pw_weight, stride, padding, dilation);
  const Geometry& g = p.geom;
  check_bias(op, "dw_bias", dw_bias, x, g.c_mid);
  check_bias(op, "pw_bias", pw_bias, x, g.c_out);
  p.act = activation_of(op, "activation", act);
  p.out_act = activation_of(op, "out_activation", out_act);

  const bool channels_last =
      suggests_channels_last(x) || suggests_channels_last(dw_weight) || suggests_channels_last(pw_weight);
  call.y = empty_4d(x, g.n, g.c_out, g.h_out, g.w_out, channels_last);
  if (want_pre) call.pre = empty_4d(x, g.n, g.c_out, g.h_out, g.w_out, channels_last);

  call.x = walkable_or_copy(x, p.x_layout);
  call.dw_weight = dense(dw_weight);
  call.pw_weight = dense(pw_weight);
  if (dw_bias.has_value()) call.dw_bias = dense(*dw_bias);
  if (pw_bias.has_value()) call.pw_bias = dense(*pw_bias);

  walkable(call.y, p.y_layout);
  p.x = call.x.const_data_ptr();
  p.x_strides = walk_strides(call.x, p.x_layout);
  p.dw_weight = call.dw_weight.const_data_ptr();
  p.dw_bias = call.dw_bias.has_value() ? call.dw_bias->const_data_ptr() : nullptr;
  p.pw_weight = call.pw_weight.const_data_ptr();
  p.pw_bias = call.pw_bias.has_value() ? call.pw_bias->const_data_ptr() : nullptr;
  p.y = call.y.mutable_data_ptr();
  p.y_strides = walk_strides(call.y, p.y_layout);
  p.pre = call.pre.has_value() ? call.pre->mutable_data_ptr() : nullptr;
  return call;
}

struct BackwardCall {
  BackwardParams params;
  Tensor dy, x, dw_weight, pw_weight;
  std::optional<Tensor> dw_bias, saved;
  Tensor grad_x, grad_dw_weight, grad_pw_weight, grad_dw_bias, grad_pw_bias;  // shape [0] where not asked for
};

inline BackwardCall prepare_backward(const char* op, const Tensor& dy, const Tensor& x, const Tensor& dw_weight,
                                     const Tensor& pw_weight, const std::optional<Tensor>& dw_bias,
                                     const std::optional<Tensor>& saved, const std::vector<int64_t>& stride,
                                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                     int64_t act, int64_t out_act, int64_t grad_mask) {
  BackwardCall call{};
  BackwardParams& p = call.params;
  p.dtype = dtype_of(op, x);
  p.geom = geometry_of(op, x, dw_weight, pw_weight, stride, padding, dilation);
  const Geometry& g = p.geom;
  check_bias(op, "dw_bias", dw_bias, x, g.c_mid);
  p.act = activation_of(op, "activation", act);
  p.out_act = activation_of(op, "out_activation", out_act);
  const auto check_output_shaped = [&](const char* arg, const Tensor& t) {
    check_operand(op, arg, t, x);
    STD_TORCH_CHECK(
        t.dim() == 4 && t.size(0) == g.n && t.size(1) == g.c_out && t.size(2) == g.h_out && t.size(3) == g.w_out, op,
        ": ", arg, " must have the shape of the output, [", g.n, ", ", g.c_out, ", ", g.h_out, ", ", g.w_out, "]");
  };
  check_output_shaped("grad_output", dy);
  STD_TORCH_CHECK(saved.has_value() == (p.out_act != Activation::identity), op,
                  ": saved is given exactly where out_activation is not identity");
  if (saved.has_value()) check_output_shaped("saved", *saved);

  call.dy = walkable_or_copy(dy, p.dy_layout);
  call.x = walkable_or_copy(x, p.x_layout);
  call.dw_weight = dense(dw_weight);
  call.pw_weight = dense(pw_weight);
  if (dw_bias.has_value()) call.dw_bias = dense(*dw_bias);
  if (saved.has_value()) call.saved = walkable_or_copy(*saved, p.saved_layout);

  p.dy = call.dy.const_data_ptr();
  p.dy_strides = walk_strides(call.dy, p.dy_layout);
  p.x = call.x.const_data_ptr();
  p.x_strides = walk_strides(call.x, p.x_layout);
  p.dw_weight = call.dw_weight.const_data_ptr();
  p.dw_bias = call.dw_bias.has_value() ? call.dw_bias->const_data_ptr() : nullptr;
  p.pw_weight = call.pw_weight.const_data_ptr();
  if (call.saved.has_value()) {
    p.saved = call.saved->const_data_ptr();
    p.saved_strides = walk_strides(*call.saved, p.saved_layout);
  }

  const auto allocate = [&](GradBit bit, torch::headeronly::IntHeaderOnlyArrayRef size, Tensor& grad, void*& pointer) {
    const int64_t none[1] = {0};
    const bool asked = (grad_mask & bit) != 0;
    grad = torch::stable::new_empty(x, asked ? size : torch::headeronly::IntHeaderOnlyArrayRef{none, 1});
    if (!asked) return;
    if (g.n == 0) torch::stable::zero_(grad);  // no image, no kernel: the sum over nothing
    pointer = grad.mutable_data_ptr();
  };
  const int64_t c_mid[1] = {g.c_mid}, c_out[1] = {g.c_out};
  allocate(kGradDwWeight, dw_weight.sizes(), call.grad_dw_weight, p.grad_dw_weight);
  allocate(kGradPwWeight, pw_weight.sizes(), call.grad_pw_weight, p.grad_pw_weight);
  allocate(kGradDwBias, {c_mid, 1}, call.grad_dw_bias, p.grad_dw_bias);
  allocate(kGradPwBias, {c_out, 1}, call.grad_pw_bias, p.grad_pw_bias);
  if ((grad_mask & kGradX) != 0) {
    call.grad_x = empty_4d(x, g.n, g.c_in, g.h_in, g.w_in, suggests_channels_last(x));
    walkable(call.grad_x, p.grad_x_layout);
    p.grad_x = call.grad_x.mutable_data_ptr();
    p.grad_x_strides = walk_strides(call.grad_x, p.grad_x_layout);
  } else {
    const int64_t none[1] = {0};
    call.grad_x = torch::stable::new_empty(x, {none, 1});
  }
  return call;
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

inline BackwardResult take_grads(BackwardCall& call) {
  return {call.grad_x, call.grad_dw_weight, call.grad_pw_weight, call.grad_dw_bias, call.grad_pw_bias};
}

}  // namespace dsconv
