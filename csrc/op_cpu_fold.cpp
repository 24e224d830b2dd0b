// A norm with given statistics folded into the weights before it, and the gradients of that: what fold_norm() in
// dsconv_cuda/norms.py says in some twelve operations of PyTorch, which for small layers take longer than the layer.
//
//   scale = gamma / sqrt(var + eps)     weight' = weight * scale     bias' = (bias - mean) * scale + beta
//
//   grad weight = grad weight' * scale                         grad bias = grad bias' * scale
//   grad gamma  = (sum grad weight' * weight + grad bias' * (bias - mean)) / sqrt(var + eps)
//   grad beta   = grad bias'
//
// A channel is a row of the weight. Numbers of a channel and sums are float64, products in the type of the weight, of
// 16-bit ones in float. On CUDA there is the first of the two: fold_norm() in cuda/op_cuda_norm.cu, cuda/cuda_fold.cu.

#include <cmath>
#include <vector>

#include "norm_args.h"

namespace dsconv {
namespace {

using Optional = std::optional<Tensor>;

// A vector of the norm, or of the convolution; a missing one has one value for all.
using Channels = std::vector<double>;

Channels channels_of(const char* op, const char* arg, const Optional& t, int64_t channels, double otherwise) {
  Channels values(static_cast<size_t>(channels));
  read_parameter(op, arg, t, channels, otherwise, values.data());
  return values;
}

struct Norm {
  Channels bias, mean, gamma, invstd;

  Norm(const char* op, const Optional& of_bias, const Tensor& of_mean, const Tensor& var, const Optional& of_gamma,
       int64_t channels, double eps)
      : bias(channels_of(op, "bias", of_bias, channels, 0)),
        mean(channels_of(op, "mean", of_mean, channels, 0)),
        gamma(channels_of(op, "gamma", of_gamma, channels, 1)),
        invstd(channels_of(op, "var", var, channels, 1)) {
    for (double& v : invstd) v = 1 / std::sqrt(v + eps);
  }
};

Tensor empty_vector(const Tensor& like, int64_t channels) { return empty_contiguous(like, {&channels, 1}); }

template <typename T>
std::tuple<Tensor, Tensor> fold(const Tensor& weight, int64_t row, const Norm& norm, const Channels& beta) {
  const int64_t channels = weight.size(0);
  Tensor folded = like_weight(weight), bias = empty_vector(weight, channels);
  const T* from = static_cast<const T*>(weight.const_data_ptr());
  T* to = static_cast<T*>(folded.mutable_data_ptr());
  T* shift = static_cast<T*>(bias.mutable_data_ptr());
  for (int64_t c = 0; c < channels; ++c, from += row, to += row) {
    const double scale = norm.invstd[static_cast<size_t>(c)] * norm.gamma[static_cast<size_t>(c)];
    const auto rounded = static_cast<Wide<T>>(scale);
    for (int64_t i = 0; i < row; ++i) to[i] = static_cast<T>(static_cast<Wide<T>>(from[i]) * rounded);
    shift[c] = static_cast<T>(
        static_cast<Wide<T>>((norm.bias[static_cast<size_t>(c)] - norm.mean[static_cast<size_t>(c)]) * scale +
                             beta[static_cast<size_t>(c)]));
  }
  return {folded, bias};
}

std::tuple<Tensor, Tensor> fold_norm(Tensor weight, Optional bias, Tensor mean, Tensor var, Optional gamma,
                                     Optional beta, double eps) {
  constexpr const char* op = "dsconv_cuda::fold_norm";
  const int64_t row = row_of_weight(op, "weight", weight), channels = weight.size(0);
  const Norm norm(op, bias, mean, var, gamma, channels, eps);
  const Channels shift = channels_of(op, "beta", beta, channels, 0);
  return by_type(op, weight, [&](auto value) { return fold<decltype(value)>(weight, row, norm, shift); });
}

// Some sums side by side, which do not wait for one another.
template <typename T>
double dot(const T* a, const T* b, int64_t count) {
  constexpr int64_t kSums = 8;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int64_t j = 0; j < kSums; ++j) sums[j] += static_cast<double>(a[i + j]) * static_cast<double>(b[i + j]);
  }
  for (; i < count; ++i) sums[0] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Gradients fold_backward(const Tensor& grad_weight, const Tensor& grad_bias, const Tensor& weight, int64_t row,
                        const Norm& norm) {
  const int64_t channels = weight.size(0);
  Gradients grads = {like_weight(weight), empty_vector(weight, channels), empty_vector(weight, channels),
                     empty_vector(weight, channels)};
  const T* g = static_cast<const T*>(grad_weight.const_data_ptr());
  const T* g_bias = static_cast<const T*>(grad_bias.const_data_ptr());
  const T* w = static_cast<const T*>(weight.const_data_ptr());
  T* of_weight = static_cast<T*>(std::get<0>(grads).mutable_data_ptr());
  T* of_bias = static_cast<T*>(std::get<1>(grads).mutable_data_ptr());
  T* of_gamma = static_cast<T*>(std::get<2>(grads).mutable_data_ptr());
  T* of_beta = static_cast<T*>(std::get<3>(grads).mutable_data_ptr());
  for (int64_t c = 0; c < channels; ++c, g += row, w += row, of_weight += row) {
    const double invstd = norm.invstd[static_cast<size_t>(c)], scale = invstd * norm.gamma[static_cast<size_t>(c)];
    const auto rounded = static_cast<Wide<T>>(scale);
    for (int64_t i = 0; i < row; ++i) of_weight[i] = static_cast<T>(static_cast<Wide<T>>(g[i]) * rounded);
    const double sum = dot(g, w, row) + static_cast<double>(g_bias[c]) *
                                            (norm.bias[static_cast<size_t>(c)] - norm.mean[static_cast<size_t>(c)]);
    of_bias[c] = static_cast<T>(static_cast<Wide<T>>(static_cast<double>(g_bias[c]) * scale));
    of_gamma[c] = static_cast<T>(static_cast<Wide<T>>(sum * invstd));
    of_beta[static_cast<size_t>(c)] = g_bias[c];
  }
  return grads;
}

// Of (weight, bias, gamma, beta), in the type of the weight.
Gradients fold_norm_bwd(Tensor grad_weight, Tensor grad_bias, Tensor weight, Optional bias, Tensor mean, Tensor var,
                        Optional gamma, double eps) {
  constexpr const char* op = "dsconv_cuda::fold_norm_bwd";
  const int64_t row = row_of_weight(op, "weight", weight), channels = weight.size(0);
  const Tensor grad = dense(grad_weight), grad_of_bias = dense(grad_bias);
  STD_TORCH_CHECK(same_sizes(grad, weight) && grad.scalar_type() == weight.scalar_type(), op,
                  ": grad_weight must be like weight");
  check_bias(op, "grad_bias", grad_of_bias, weight, channels);
  const Norm norm(op, bias, mean, var, gamma, channels, eps);
  return by_type(op, weight,
                 [&](auto value) { return fold_backward<decltype(value)>(grad, grad_of_bias, weight, row, norm); });
}

}  // namespace
}  // namespace dsconv

STABLE_TORCH_LIBRARY_IMPL(dsconv_cuda, CPU, m) {
  m.impl("fold_norm", TORCH_BOX(&dsconv::fold_norm));
  m.impl("fold_norm_bwd", TORCH_BOX(&dsconv::fold_norm_bwd));
}
