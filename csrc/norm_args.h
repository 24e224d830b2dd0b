// Per-channel values of the norms, as they go between the ops.
//
//   moments [2, C]   mean, variance              sums [2, C]   sum g, sum g * vhat
//   vectors [4, C]   mean, invstd, gamma, beta                                          all float64
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "op_args.h"

namespace dsconv {

enum VectorRow { kMean, kInvstd, kGamma, kBeta, kVectorRows };
inline Tensor empty_doubles(const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t size[2] = {rows, columns}, stride[2] = {at_least_1(columns), 1};
  return empty_of_dtype(aoti_torch_dtype_float64(), like, 2, size, stride);
}

inline const double* doubles_of(const char* op, const char* arg, const Tensor& t, int64_t rows, int64_t channels) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double && t.dim() == 2 && t.size(0) == rows && t.size(1) == channels &&
                      t.is_contiguous(),
                  op, ": ", arg, " must be a contiguous float64 tensor of shape [", rows, ", ", channels, "]");
  return static_cast<const double*>(t.const_data_ptr());
}

// Calls f with a value of the tensor's type.
template <typename F>
auto by_type(const char* op, const Tensor& t, const F& f) {
  switch (dtype_of(op, t)) {
    case DType::f64:
      return f(double{});
    case DType::f16:
      return f(torch::headeronly::Half{});
    case DType::bf16:
      return f(torch::headeronly::BFloat16{});
    default:
      return f(float{});
  }
}

// In which values of type T are computed: what is made in float64 is rounded to T by way of it.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
void read_values(const Tensor& t, int64_t count, double* to) {
  const T* from = static_cast<const T*>(t.const_data_ptr());
  const int64_t step = t.stride(0);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<double>(from[i * step]);
}

// A parameter of a norm; `otherwise` where there is none.
inline void read_parameter(const char* op, const char* arg, const std::optional<Tensor>& t, int64_t channels,
                           double otherwise, double* to) {
  if (!t.has_value()) {
    for (int64_t i = 0; i < channels; ++i) to[i] = otherwise;
    return;
  }
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == channels, op, ": ", arg, " must have shape [", channels, "]");
  by_type(op, *t, [&](auto value) { read_values<decltype(value)>(*t, channels, to); });
}

// Elements of a channel of a weight that a norm folds into.
inline int64_t row_of_weight(const char* op, const char* arg, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() >= 2 && t.is_contiguous(), op, ": ", arg, " must be contiguous, with channels first");
  return t.size(0) == 0 ? 0 : t.numel() / t.size(0);
}

// Of the same sizes and strides, which say what memory format outputs will have.
inline Tensor like_weight(const Tensor& t) { return empty_strided(t, t.dim(), t.sizes().data(), t.strides().data()); }

}  // namespace dsconv
