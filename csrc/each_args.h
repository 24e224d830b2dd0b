// A batch of calls of one shape, one after another: what vmap asks for where weights, or gradients of weights, differ
// from element to element. Every tensor has the elements in front, with a stride of 0 where they share it. An element
// costs a call of the kernels, and not one of the dispatcher and of Python.
#pragma once

#include "op_args.h"

namespace dsconv {

// Element i, a view.
inline Tensor element_of(const Tensor& batch, int64_t i) {
  AtenTensorHandle handle = nullptr;
  int64_t offset = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(batch.get(), &offset));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(batch.get(), batch.dim() - 1, batch.sizes().data() + 1,
                                                               batch.strides().data() + 1, offset + i * batch.stride(0),
                                                               &handle));
  return Tensor(handle);
}
inline std::optional<Tensor> element_of(const std::optional<Tensor>& batch, int64_t i) {
  return batch.has_value() ? std::optional<Tensor>(element_of(*batch, i)) : std::nullopt;
}

// Room for `count` of what `one`, which is dense, is the first of; nothing of it is copied.
inline Tensor batch_of(const Tensor& one, int64_t count) {
  const int64_t dims = one.dim();
  int64_t size[6] = {count}, stride[6] = {at_least_1(one.numel())};
  for (int64_t d = 0; d < dims; ++d) {
    size[1 + d] = one.size(d);
    stride[1 + d] = one.stride(d);
  }
  return empty_strided(one, dims + 1, size, stride);
}

template <typename Pointer>
void point_into(Pointer& pointer, const Tensor& batch, int64_t i) {
  if (pointer == nullptr) return;
  int64_t bytes = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(batch.get(), &bytes));
  pointer = static_cast<char*>(batch.mutable_data_ptr()) + bytes / batch.size(0) * i;
}

inline int64_t elements_of(const char* op, const Tensor& first, std::initializer_list<const Tensor*> others,
                           std::initializer_list<const std::optional<Tensor>*> optional) {
  const int64_t count = first.dim() > 0 ? first.size(0) : 0;
  STD_TORCH_CHECK(count > 0, op, ": every tensor must have a dimension of elements in front, of one at least");
  const auto check = [&](const Tensor& t) {
    STD_TORCH_CHECK(t.dim() > 0 && t.size(0) == count, op, ": every tensor must have ", count, " elements in front");
  };
  for (const Tensor* t : others) check(*t);
  for (const std::optional<Tensor>* t : optional) {
    if (t->has_value()) check(**t);
  }
  return count;
}

struct ForwardBatch {
  Tensor y;
  std::optional<Tensor> pre;
};

// run(call) computes one element.
template <typename Run>
ForwardBatch forward_each(const char* op, const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                          const std::optional<Tensor>& dw_bias, const std::optional<Tensor>& pw_bias,
                          const CallArguments& arguments, bool want_pre, const Run& run) {
  const int64_t count = elements_of(op, x, {&dw_weight, &pw_weight}, {&dw_bias, &pw_bias});
  std::optional<ForwardBatch> made;
  for (int64_t i = 0; i < count; ++i) {
    ForwardCall call = prepare_forward(op, element_of(x, i), element_of(dw_weight, i), element_of(pw_weight, i),
                                       element_of(dw_bias, i), element_of(pw_bias, i), arguments, want_pre);
    if (!made.has_value()) {
      made = ForwardBatch{batch_of(*call.y, count), {}};
      if (want_pre) made->pre = batch_of(*call.pre, count);
    }
    point_into(call.params.y, made->y, i);
    if (want_pre) point_into(call.params.pre, *made->pre, i);
    run(call);
  }
  return *made;
}

template <typename Run>
BackwardResult backward_each(const char* op, const Tensor& dy, const Tensor& x, const Tensor& dw_weight,
                             const Tensor& pw_weight, const std::optional<Tensor>& dw_bias,
                             const std::optional<Tensor>& saved, const CallArguments& arguments, int64_t grad_mask,
                             const Run& run) {
  const int64_t count = elements_of(op, dy, {&x, &dw_weight, &pw_weight}, {&dw_bias, &saved});
  std::optional<BackwardResult> made;
  for (int64_t i = 0; i < count; ++i) {
    BackwardCall call =
        prepare_backward(op, element_of(dy, i), element_of(x, i), element_of(dw_weight, i), element_of(pw_weight, i),
                         element_of(dw_bias, i), element_of(saved, i), arguments, grad_mask);
    BackwardParams& p = call.params;
    if (!made.has_value()) {
      made = std::apply([count](const auto&... grad) { return BackwardResult(batch_of(grad, count)...); },
                        take_grads(call));
      if (p.geom.n == 0) std::apply([](auto&... grad) { (torch::stable::zero_(grad), ...); }, *made);
    }
    point_into(p.grad_x, std::get<0>(*made), i);
    point_into(p.grad_dw_weight, std::get<1>(*made), i);
    point_into(p.grad_pw_weight, std::get<2>(*made), i);
    point_into(p.grad_dw_bias, std::get<3>(*made), i);
    point_into(p.grad_pw_bias, std::get<4>(*made), i);
    run(call);
  }
  return *made;
}

}  // namespace dsconv
