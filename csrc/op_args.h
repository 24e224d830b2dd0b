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
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "geometry.h"
#include "huge_pages.h"
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

// What PyTorch calls suggest_memory_format() == channels_last, or channels_last_3d: walking c, w, h, d, n, strides
// never decrease, and an ambiguous one-element shape counts as contiguous.
inline bool suggests_channels_last(const Tensor& t) {
  const int64_t dims = t.dim();
  if (dims != 4 && dims != 5) return false;
  int64_t min_stride = 0;
  if (t.stride(1) == 0) return false;
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t d = i == 0 ? 1 : (i + 1 == dims ? 0 : dims - i);
    if (t.size(d) == 0 || t.stride(d) < min_stride) return false;
    if (d == 0 && min_stride == t.stride(1)) return false;
    min_stride = t.stride(d) * (t.size(d) > 1 ? t.size(d) : 1);
  }
  return true;
}

inline Strides strides_of(const Tensor& t) {
  const int64_t dims = t.dim();
  return {t.stride(0), t.stride(1), t.stride(dims - 2), t.stride(dims - 1), dims == 5 ? t.stride(2) : 0};
}

// True, and `layout` set, where a kernel can walk the tensor as it lies.
inline bool walkable(const Tensor& t, Layout& layout) {
  const int64_t w = t.dim() - 1;
  const bool unit_c = t.stride(1) == 1, unit_w = t.stride(w) == 1 || t.size(w) == 1;
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
  const MemoryFormat channels_last = t.dim() == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
  return torch::stable::contiguous(t, suggests_channels_last(t) ? channels_last : MemoryFormat::Contiguous);
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

// By strides, and so past the lookup of an op by its name: that takes longer than the allocation. On the device of
// `like`, of a dtype that aoti_torch_dtype_*() name.
inline Tensor empty_of_dtype(int32_t dtype, const Tensor& like, int64_t dims, const int64_t* size,
                             const int64_t* stride) {
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, size, stride, dtype, device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty_strided(const Tensor& like, int64_t dims, const int64_t* size, const int64_t* stride) {
  int32_t dtype = 0, device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  Tensor made = empty_of_dtype(dtype, like, dims, size, stride);
  if (device_type == aoti_torch_device_type_cpu()) {
    int64_t bytes = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(made.get(), &bytes));
    ask_for_huge_pages(made.mutable_data_ptr(), bytes);
  }
  return made;
}

constexpr int64_t at_least_1(int64_t extent) { return extent > 1 ? extent : 1; }

// [n, c, d, h, w], or [n, c, h, w] where `like` has four dimensions.
inline Tensor empty_images(const Tensor& like, int64_t n, int64_t c, int64_t d, int64_t h, int64_t w,
                           bool channels_last) {
  const int64_t pixel = channels_last ? at_least_1(c) : 1, row = pixel * at_least_1(w), slice = row * at_least_1(h);
  const int64_t image = slice * at_least_1(d);
  const int64_t size[5] = {n, c, d, h, w};
  const int64_t stride[5] = {channels_last ? image : image * at_least_1(c), channels_last ? 1 : image, slice, row,
                             pixel};
  if (like.dim() == 5) return empty_strided(like, 5, size, stride);
  const int64_t flat_size[4] = {n, c, h, w}, flat_stride[4] = {stride[0], stride[1], row, pixel};
  return empty_strided(like, 4, flat_size, flat_stride);
}

// Of up to five dimensions.
inline Tensor empty_contiguous(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size) {
  int64_t stride[5] = {1, 1, 1, 1, 1};
  const int64_t dims = static_cast<int64_t>(size.size());
  for (int64_t d = dims - 2; d >= 0; --d) stride[d] = stride[d + 1] * at_least_1(size[d + 1]);
  return empty_strided(like, dims, size.data(), stride);
}

// Of shape [0], for what was not asked for.
inline Tensor empty_of_nothing(const Tensor& like) {
  const int64_t none[1] = {0};
  return empty_contiguous(like, {none, 1});
}

inline void check_device(const char* op, const char* arg, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.device() == x.device(), op, ": ", arg, " must be on the device of input");
}

inline void check_operand(const char* op, const char* arg, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), op, ": ", arg, " must have the dtype of input");
  check_device(op, arg, t, x);
}

inline void check_bias(const char* op, const char* arg, const std::optional<Tensor>& t, const Tensor& x, int64_t size) {
  if (!t.has_value()) return;
  check_operand(op, arg, *t, x);
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == size, op, ": ", arg, " must have shape [", size, "]");
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  return same;
}

inline CallArguments arguments_of(const char* op, const std::vector<int64_t>& stride,
                                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                  int64_t act, int64_t out_act) {
  const size_t dims = stride.size();
  STD_TORCH_CHECK((dims == 2 || dims == 3) && padding.size() == 2 * dims && dilation.size() == dims, op,
                  ": stride and dilation take 2 numbers, padding 4 (top, left, bottom, right); in 3-D 3, and 6 (front, "
                  "top, left, back, bottom, right)");
  CallArguments arguments = call_arguments(static_cast<int64_t>(dims), stride.data(), padding.data(), dilation.data());
  arguments.act = act;
  arguments.out_act = out_act;
  return arguments;
}

// Those of the ops *_in_graph, which lie in a row: stride, padding, dilation, act, out_act, fast.
struct RowArguments {
  CallArguments call;
  bool fast;
};

inline RowArguments arguments_of(const char* op, const std::vector<int64_t>& row) {
  const size_t size = row.size(), dims = size < 3 ? 0 : (size - 3) / 4;
  STD_TORCH_CHECK((dims == 2 || dims == 3) && size == 4 * dims + 3, op,
                  ": arguments takes 11 numbers, (*stride, *padding, *dilation, act, out_act, fast); in 3-D 15");
  const int64_t* stride = row.data();
  const int64_t *padding = stride + dims, *dilation = padding + 2 * dims, *rest = dilation + dims;
  CallArguments call = call_arguments(static_cast<int64_t>(dims), stride, padding, dilation);
  call.act = rest[0];
  call.out_act = rest[1];
  return {call, rest[2] != 0};
}

inline Geometry geometry_of(const char* op, const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                            const CallArguments& arguments) {
  const int64_t dims = arguments.dims + 2;
  const bool flat = dims == 4;
  STD_TORCH_CHECK(x.dim() == dims, op, ": input must have ", dims, " dimensions, got ", x.dim());
  STD_TORCH_CHECK(dw_weight.dim() == dims && dw_weight.size(1) == 1, op, ": dw_weight must have shape [C * m, 1, ",
                  flat ? "" : "kd, ", "kh, kw]");
  bool pointwise = pw_weight.dim() == 2 || pw_weight.dim() == dims;
  for (int64_t d = 2; d < pw_weight.dim(); ++d) pointwise = pointwise && pw_weight.size(d) == 1;
  STD_TORCH_CHECK(pointwise, op, ": pw_weight must have shape [C_out, C * m", flat ? "" : ", 1",
                  ", 1, 1] or [C_out, C * m]");
  check_operand(op, "dw_weight", dw_weight, x);
  check_operand(op, "pw_weight", pw_weight, x);
  STD_TORCH_CHECK(pw_weight.size(1) == dw_weight.size(0), op, ": pw_weight must have ", dw_weight.size(0),
                  " input channels, got ", pw_weight.size(1));
  try {
    return geometry_of_sizes(x.sizes().data(), dw_weight.sizes().data(), pw_weight.size(0), arguments);
  } catch (const std::invalid_argument& error) {
    STD_TORCH_CHECK(false, op, ": ", error.what());
    throw;
  }
}

// What forward and backward have in common, checked and made ready: everything but pw_bias and what is output-shaped.
// Call has params, and the tensors that keep alive what the pointers of params point into.
template <typename Call>
void prepare_operands(Call& call, const char* op, const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                      const std::optional<Tensor>& dw_bias, const CallArguments& arguments) {
  auto& p = call.params;
  p.dtype = dtype_of(op, x);
  p.geom = geometry_of(op, x, dw_weight, pw_weight, arguments);
  check_bias(op, "dw_bias", dw_bias, x, p.geom.c_mid);
  p.act = activation_of(op, "activation", arguments.act);
  p.out_act = activation_of(op, "out_activation", arguments.out_act);

  call.x = walkable_or_copy(x, p.x_layout);
  call.dw_weight = dense(dw_weight);
  call.pw_weight = dense(pw_weight);
  if (dw_bias.has_value()) call.dw_bias = dense(*dw_bias);
  p.x = call.x->const_data_ptr();
  p.x_strides = walk_strides(*call.x, p.x_layout);
  p.dw_weight = call.dw_weight->const_data_ptr();
  p.dw_bias = call.dw_bias.has_value() ? call.dw_bias->const_data_ptr() : nullptr;
  p.pw_weight = call.pw_weight->const_data_ptr();
}

struct ForwardCall {
  ForwardParams params;
  std::optional<Tensor> x, dw_weight, pw_weight, dw_bias, pw_bias, y, pre;  // an empty Tensor would be an allocation
};

inline ForwardCall prepare_forward(const char* op, const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                                   const std::optional<Tensor>& dw_bias, const std::optional<Tensor>& pw_bias,
                                   const CallArguments& arguments, bool want_pre) {
  ForwardCall call{};
  ForwardParams& p = call.params;
  prepare_operands(call, op, x, dw_weight, pw_weight, dw_bias, arguments);
  const Geometry& g = p.geom;
  check_bias(op, "pw_bias", pw_bias, x, g.c_out);
  if (pw_bias.has_value()) call.pw_bias = dense(*pw_bias);
  p.pw_bias = call.pw_bias.has_value() ? call.pw_bias->const_data_ptr() : nullptr;

  const bool channels_last =
      suggests_channels_last(x) || suggests_channels_last(dw_weight) || suggests_channels_last(pw_weight);
  call.y = empty_images(x, g.n, g.c_out, g.d_out, g.h_out, g.w_out, channels_last);
  if (want_pre) call.pre = empty_images(x, g.n, g.c_out, g.d_out, g.h_out, g.w_out, channels_last);
  walkable(*call.y, p.y_layout);
  p.y = call.y->mutable_data_ptr();
  p.y_strides = walk_strides(*call.y, p.y_layout);
  p.pre = call.pre.has_value() ? call.pre->mutable_data_ptr() : nullptr;
  return call;
}

struct BackwardCall {
  BackwardParams params;
  std::optional<Tensor> dy, x, dw_weight, pw_weight, dw_bias, saved;
  Tensor grad_x, grad_dw_weight, grad_pw_weight, grad_dw_bias, grad_pw_bias;  // shape [0] where not asked for
};

inline void allocate_grads(BackwardCall& call, const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                           int64_t grad_mask) {
  BackwardParams& p = call.params;
  const Geometry& g = p.geom;
  const auto allocate = [&](GradBit bit, torch::headeronly::IntHeaderOnlyArrayRef size, Tensor& grad, void*& pointer) {
    const bool asked = (grad_mask & bit) != 0;
    grad = asked ? empty_contiguous(x, size) : empty_of_nothing(x);
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
    call.grad_x = empty_images(x, g.n, g.c_in, g.d_in, g.h_in, g.w_in, suggests_channels_last(x));
    walkable(call.grad_x, p.grad_x_layout);
    p.grad_x = call.grad_x.mutable_data_ptr();
    p.grad_x_strides = walk_strides(call.grad_x, p.grad_x_layout);
  } else {
    call.grad_x = empty_of_nothing(x);
  }
}

inline BackwardCall prepare_backward(const char* op, const Tensor& dy, const Tensor& x, const Tensor& dw_weight,
                                     const Tensor& pw_weight, const std::optional<Tensor>& dw_bias,
                                     const std::optional<Tensor>& saved, const CallArguments& arguments,
                                     int64_t grad_mask) {
  BackwardCall call{};
  BackwardParams& p = call.params;
  prepare_operands(call, op, x, dw_weight, pw_weight, dw_bias, arguments);
  const Geometry& g = p.geom;
  const auto check_output_shaped = [&](const char* arg, const Tensor& t) {
    check_operand(op, arg, t, x);
    const int64_t h = arguments.dims, w = h + 1;
    STD_TORCH_CHECK(t.dim() == x.dim() && t.size(0) == g.n && t.size(1) == g.c_out &&
                        (h == 2 || t.size(2) == g.d_out) && t.size(h) == g.h_out && t.size(w) == g.w_out,
                    op, ": ", arg, " must have the shape of the output, [", g.n, ", ", g.c_out, ", ",
                    h == 3 ? std::to_string(g.d_out) + ", " : "", g.h_out, ", ", g.w_out, "]");
  };
  check_output_shaped("grad_output", dy);
  call.dy = walkable_or_copy(dy, p.dy_layout);
  p.dy = call.dy->const_data_ptr();
  p.dy_strides = walk_strides(*call.dy, p.dy_layout);
  STD_TORCH_CHECK(saved.has_value() == (p.out_act != Activation::identity), op,
                  ": saved is given exactly where out_activation is not identity");
  if (saved.has_value()) {
    check_output_shaped("saved", *saved);
    call.saved = walkable_or_copy(*saved, p.saved_layout);
    p.saved = call.saved->const_data_ptr();
    p.saved_strides = walk_strides(*call.saved, p.saved_layout);
  }

  allocate_grads(call, x, dw_weight, pw_weight, grad_mask);
  return call;
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

inline BackwardResult take_grads(const BackwardCall& call) {
  return {call.grad_x, call.grad_dw_weight, call.grad_pw_weight, call.grad_dw_bias, call.grad_pw_bias};
}

}  // namespace dsconv
