// The host side of a gate (cpu/gate.inl), and the calls of op_cpu.cpp and op_cpu_norm_backward.cpp that take one.
#pragma once

#include "cpu_norm.h"
#include "kept_weights.h"

namespace dsconv {

// What a call with a gate has more than one without.
struct GateCall {
  // What the kernels read of the gate, and in backward of what it sends back: [n, c_mid] in the compute type,
  // contiguous.
  const Tensor* gate = nullptr;
  const Tensor* push = nullptr;
  const double* vectors = nullptr;  // [4][c_mid], of a norm before the activation that folds into the depthwise weights

  void fold(const Geometry& g, const CpuPlan& plan, const PackedWeights& packed) const {
    if (vectors == nullptr) return;
    fold_norm(g, plan, vectors, Fold::affine, packed.dw_weight, packed.dw_weight, packed.dw_bias);
  }
};

inline void check_gate(const char* op, const char* arg, const Tensor& t, const Tensor& x, const Geometry& g) {
  const bool wide = x.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(t.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float), op, ": ", arg,
                  " must be float32, beside float64 inputs float64");
  check_device(op, arg, t, x);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == g.n && t.size(1) == g.c_mid && t.is_contiguous(), op, ": ", arg,
                  " must be contiguous, of shape [", g.n, ", ", g.c_mid, "]");
}

// t as rows [n][mid_columns] in the order of k.
template <typename T>
const void* fill_gate_rows(const Geometry& g, const CpuPlan& plan, const Tensor& t, T* rows) {
  const T* from = static_cast<const T*>(t.const_data_ptr());
  for (int64_t image = 0; image < g.n; ++image, from += g.c_mid) {
    T* row = rows + image * plan.mid_columns;
    for (int64_t k = 0; k < g.c_mid; ++k) row[k] = from[channel_of(g, k)];
    for (int64_t k = g.c_mid; k < plan.mid_columns; ++k) row[k] = 0;
  }
  return rows;
}
inline const void* fill_gate_rows(const Geometry& g, const CpuPlan& plan, const Tensor* t, void* rows) {
  if (t == nullptr) return nullptr;
  if (plan.element == 8) return fill_gate_rows(g, plan, *t, static_cast<double*>(rows));
  return fill_gate_rows(g, plan, *t, static_cast<float*>(rows));
}

// The rows of backward, in memory that `workspace`, of elements as large as the plan's or of bytes, allocates before
// they are filled.
struct GateRows {
  GateRows(Workspace& workspace, const Geometry& geom, const CpuPlan& of, const GateCall& call)
      : g(geom), plan(of), gate(call) {
    if (gate.gate == nullptr) return;
    const int64_t elements = g.n * plan.mid_columns * (plan.element / workspace.element());
    workspace.reserve(&of_gate, elements);
    workspace.reserve(&of_push, elements);
  }
  GateRows(const GateRows&) = delete;
  GateRows& operator=(const GateRows&) = delete;
  void fill(BackwardContext& ctx) const {
    ctx.gate = fill_gate_rows(g, plan, gate.gate, of_gate);
    ctx.push = fill_gate_rows(g, plan, gate.push, of_push);
  }
  const Geometry& g;
  const CpuPlan& plan;
  GateCall gate;
  void *of_gate = nullptr, *of_push = nullptr;
};

// op_cpu.cpp
void run_forward(const char* op, const ForwardParams& p, KeptHeader* kept, int64_t version, InputNormCall in_norm = {},
                 const GateCall& gate = {});
void run_backward(const char* op, const BackwardParams& p, const GateCall& gate = {});

// op_cpu_norm_backward.cpp
NormGradients bwd_norm(const char* op, const Tensor& grad, const Bias& y, const Tensor& x, const Tensor& dw_weight,
                       const Tensor& pw_weight, const Bias& dw_bias, const Tensor& vectors, const Bias& out_vectors,
                       const Bias& out_sums, double out_count, const CallArguments& arguments, int64_t grad_mask,
                       const Bias& in_vectors, int64_t in_act, const GateCall& gate = {});

}  // namespace dsconv
