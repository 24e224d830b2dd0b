// What the CPU kernels read of norms: rows of per-channel values, and depthwise weights with a norm folded in.
#pragma once

#include <vector>

#include "cpu_tasks.h"
#include "norm_args.h"

namespace dsconv {

constexpr int64_t kNormRows = 7;  // of NormContext::vectors

// The rows that the kernels read, in the compute type and padded to ld. Without sums a gradient goes through the norm
// as through constants.
template <typename T>
void fill_norm_rows(int64_t channels, int64_t ld, const double* vectors, const double* sums, double count, T* to) {
  const double *mean = vectors + kMean * channels, *invstd = vectors + kInvstd * channels;
  const double *gamma = vectors + kGamma * channels, *beta = vectors + kBeta * channels;
  const auto fill = [&](int64_t row, const auto& value) {
    for (int64_t c = 0; c < channels; ++c) to[row * ld + c] = static_cast<T>(value(c));
  };
  const auto through_sums = [&](int64_t row, int64_t first) {
    if (sums == nullptr) return fill(row, [](int64_t) { return 0; });
    fill(row, [&](int64_t c) { return -gamma[c] * invstd[c] * sums[first + c] / count; });
  };
  fill(0, [&](int64_t c) { return mean[c]; });
  fill(1, [&](int64_t c) { return invstd[c]; });
  fill(2, [&](int64_t c) { return gamma[c]; });
  fill(3, [&](int64_t c) { return beta[c]; });
  fill(4, [&](int64_t c) { return gamma[c] * invstd[c]; });
  through_sums(5, channels);
  through_sums(6, 0);
  for (int64_t row = 0; row < kNormRows; ++row) {
    for (int64_t c = channels; c < ld; ++c) to[row * ld + c] = 0;
  }
}
inline void fill_norm_rows(int64_t element, int64_t channels, int64_t ld, const double* vectors, const double* sums,
                           double count, void* to) {
  if (element == 8) return fill_norm_rows(channels, ld, vectors, sums, count, static_cast<double*>(to));
  fill_norm_rows(channels, ld, vectors, sums, count, static_cast<float*>(to));
}

// The norm that x goes through as the kernels read it: its vectors [4][c_in] as the ops have them, null where there is
// none, and the memory for its rows.
struct InputNormCall {
  const double* vectors = nullptr;
  Activation act = Activation::identity;
  void* rows = nullptr;

  InputNorm fill(const Geometry& g, const CpuPlan& plan) const {
    if (vectors == nullptr) return {};
    fill_norm_rows(plan.element, g.c_in, ld(g, plan), vectors, nullptr, 0, rows);
    return {rows, ld(g, plan), act};
  }
  int64_t elements(const Geometry& g, const CpuPlan& plan) const { return kNormRows * ld(g, plan); }
  static int64_t ld(const Geometry& g, const CpuPlan& plan) { return round_up(g.c_in, plan.micro.lanes); }
};

inline InputNormCall input_norm_of(const char* op, const std::optional<Tensor>& vectors, int64_t act, int64_t c_in) {
  InputNormCall norm;
  if (!vectors.has_value()) return norm;
  norm.vectors = doubles_of(op, "in_vectors", *vectors, kVectorRows, c_in);
  norm.act = activation_of(op, "in_activation", act);
  return norm;
}

// Kernels too large for that (turns_channels) get an x that has been through its norm.
inline bool norms_as_it_reads(const Geometry& g, const KernelTable& table, DType dtype) {
  return turns_channels(g, micro_of(table, dtype), element_bytes(dtype));
}

inline int64_t channel_of(const Geometry& g, int64_t k) {
  return g.multiplier == 1 ? k : k % g.c_in * g.multiplier + k / g.c_in;
}

// Packed depthwise weights and bias that make gamma * zhat + beta, or zhat, instead of z; order of k.
enum class Fold { affine, zhat };

template <typename T>
void fold_norm(const Geometry& g, const CpuPlan& plan, const double* vectors, Fold kind, const T* weight, T* folded,
               T* bias) {
  std::vector<T> scales(static_cast<size_t>(g.c_mid));
  for (int64_t k = 0; k < g.c_mid; ++k) {
    const double* of = vectors + channel_of(g, k);
    const bool affine = kind == Fold::affine;
    const double scale = of[kInvstd * g.c_mid] * (affine ? of[kGamma * g.c_mid] : 1);
    scales[k] = static_cast<T>(scale);
    const double centred = static_cast<double>(bias[k]) - of[kMean * g.c_mid];
    bias[k] = static_cast<T>(centred * scale + (affine ? of[kBeta * g.c_mid] : 0));
  }
  for (int64_t tap = 0; tap < plan.taps; ++tap) {
    const int64_t row = tap * plan.mid_columns;
    for (int64_t k = 0; k < g.c_mid; ++k) folded[row + k] = weight[row + k] * scales[k];
    for (int64_t k = g.c_mid; k < plan.mid_columns; ++k) folded[row + k] = 0;
  }
}
inline void fold_norm(const Geometry& g, const CpuPlan& plan, const double* vectors, Fold kind, const void* weight,
                      void* folded, void* bias) {
  if (plan.element == 8) {
    return fold_norm(g, plan, vectors, kind, static_cast<const double*>(weight), static_cast<double*>(folded),
                     static_cast<double*>(bias));
  }
  fold_norm(g, plan, vectors, kind, static_cast<const float*>(weight), static_cast<float*>(folded),
            static_cast<float*>(bias));
}

// A call that makes z and nothing of the shape of y.
struct MomentsCall {
  ForwardParams params;
  std::optional<Tensor> x, dw_weight, pw_weight, dw_bias;
};

// ---- the ops, for whoever joins them in one (op_cpu_norm_train.cpp) ----

using Bias = std::optional<Tensor>;

// op_cpu_norm.cpp
Tensor z_moments(const char* op, const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight, const Bias& dw_bias,
                 const CallArguments& arguments, const Bias& in_vectors, int64_t in_act);
Tensor norm_vectors(Tensor moments, Bias gamma, Bias beta, double eps);
void norm_track(Tensor moments, double count, double momentum, Bias running_mean, Bias running_var);
std::tuple<Tensor, Tensor> fwd_norm(const char* op, const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                                    const Bias& dw_bias, const Bias& pw_bias, const Tensor& vectors,
                                    const CallArguments& arguments, bool want_moments, const Bias& in_vectors,
                                    int64_t in_act);
Tensor norm_act(Tensor v, Tensor vectors, int64_t act);
Tensor norm_act_sums(Tensor grad, Tensor v, Tensor vectors, int64_t act);

// Of (x, dw_weight, pw_weight, pw_bias), and the sums of du.
using NormGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace dsconv
