// What a cpu_<isa>.cpp exports: one table of functions over one task each. Torch-free; the host entry op_cpu.cpp
// allocates, and runs the tasks on torch's threads. Packed weights and partial sums are in the compute type.
#pragma once

#include <cstdint>

#include "../params.h"
#include "cpu_plan.h"

namespace dsconv {

// Whether the machine multiplies vectors of 512 bits one half after the other, as Zen 4 does: half a vector takes half
// the time then, and need not share a whole one (gemm.inl). Says nothing about results. cpu_isa.cpp knows.
bool multiplies_by_halves();

// Weights as the kernels walk them; k is the channel order of cpu_plan.h, panels have micro.columns columns. Kernels
// that multiply bf16 have their own forms of dw_weight (of the forward), pw_forward and pw_backward (pack_bf16.inl), no
// larger ones.
struct PackedWeights {
  void* dw_weight;    // [taps][mid_columns]
  void* dw_bias;      // [mid_columns], zeros where there is none
  void* pw_forward;   // [out_columns / columns][c_mid][columns]: column = output channel
  void* pw_backward;  // [mid_columns / columns][c_out][columns]: column = k; null in forward
  void* pw_bias;      // [out_columns]
};

// A norm and an activation that x goes through as it is read (input_norm.inl): rows as of NormContext::vectors, null
// where there is none.
struct InputNorm {
  const void* rows;
  int64_t ld;
  Activation act;
};

struct ForwardContext {
  ForwardParams p;
  CpuPlan plan;
  PackedWeights packed;
  InputNorm in_norm;
  const void* gate;  // [n][mid_columns], what act(z) is multiplied by (gate.inl); null for nothing
  // forward_moments: tasks are `groups` ranges of the plan's tiles.
  int64_t groups;
  double* partial;  // [groups][2][c_out]: mean of y and sum of squares about it
};

// A null pointer: not needed for the gradients that were asked for.
struct BackwardContext {
  BackwardParams p;
  CpuPlan plan;
  PackedWeights packed;
  InputNorm in_norm;
  // Of an nchw x or of one with a norm, null where x is read as it is, or by panels; turned.inl.
  void* x_turned;  // [pixels of x][x_ld]
  void* x_rows;    // or [pointwise_groups][plan.x_rows][w_in][x_ld]
  void* du;        // gradient of z: [c_mid / du_width][pixels][du_width]
  void* g_rows;    // backward_panels.inl says how these two hold dy * out_act'
  void* g_pixels;
  void* pw_partial;    // [pointwise_groups][c_out][mid_columns]
  void* bias_partial;  // [pointwise_groups][2 * out_columns + mid_columns]: pw bias, what its sums lost, dw bias
  void* dw_partial;    // [pointwise_groups][vector of channels][taps][lanes]
  // Norms (backward_norm.inl): rows as of NormContext::vectors, null where there is none.
  void* norm;            // after the depthwise, order of k, ld = mid_columns; zhat has mean 0 and invstd 1
  void* zhat_weight;     // as packed.dw_weight, what makes zhat; packed.dw_bias goes with it
  double* norm_partial;  // [pointwise_groups, panels: 1][2][c_mid]: sums of du and of du * zhat
  double norm_count;     // values a channel, where the stages are not apart
  const void* out_norm;  // after the pointwise, ld = out_columns; p.saved is y
  // A gate (gate.inl), [n][mid_columns] both, null where there is none. The gradient of pw_weight is not for these.
  const void *gate, *push;
};

// Whether x is read, and grad_x written, where they are.
inline bool x_in_place(const BackwardContext& ctx) { return walked_in_place(ctx.p) && ctx.in_norm.rows == nullptr; }

// Packing. A panel is micro.columns channels: of k for the depthwise and pw_backward, output channels for pw_forward.
struct PackContext {
  Geometry geom;
  CpuPlan plan;
  PackedWeights packed;
  const void* dw_weight;
  const void* dw_bias;
  const void* pw_weight;
  const void* pw_bias;
};

struct ImageTensor {
  const void* data;
  Strides strides;
  Layout layout;
};

// Whether pixel follows pixel in memory, strides.w apart, each with its channels.
constexpr bool is_matrix(const ImageTensor& t, int64_t n, int64_t d, int64_t h, int64_t w) {
  const int64_t row = w * t.strides.w, slice = h * row;
  return t.layout == Layout::nhwc && t.strides.h == row && (d == 1 || t.strides.d == slice) &&
         (n == 1 || t.strides.n == d * slice);
}

// Moments of z (moments.inl). Tasks are `groups` ranges of the plan's tiles, for each of `panels` panels of channels.
// Sums of act(z) (gate.inl): the geometry is that of one image, and there are so many tasks for each.
struct MomentsContext {
  Geometry geom;
  CpuPlan plan;
  PackedWeights packed;
  ImageTensor x;
  InputNorm in_norm;
  int64_t groups, panels;
  double* partial;  // [groups][2][c_mid]: mean and sum of squares about it, order of k; sums: [images][groups][c_mid]
  Activation act;   // of the sums
  void* kept;       // act(z) as it is made, [images][pixels][c_mid], stored type; or null
};

// The gradients of a gate and of the weights behind it from those of one image's weights (gate.inl). Tasks are vectors
// of channels, in the order of the tensors.
struct GateContext {
  int64_t c_out, c_mid;
  const void* own;     // [c_out][c_mid], of this image as if there were no gate; stored type, as the weights
  const void* weight;  // [c_out][c_mid]
  const void* gate;    // [c_mid], compute type, as what follows
  void* sums;          // [c_out][c_mid]: written where `first`, else added to
  void* grad_gate;     // [c_mid]
  bool first;
};

// A pass over tensors [n, channels, d, h, w] (norm.inl). Tasks are `groups` ranges of pixels.
struct NormContext {
  int64_t n, channels, d, h, w, pixels;
  int64_t ld, tile_pixels, groups;
  Activation act;
  ImageTensor v, grad;
  void* out;  // dense
  Layout out_layout;
  bool beyond_cache;    // v and out come from and go to DRAM
  bool planes;          // all tensors are nchw with dense planes; groups are ranges of the n * channels planes
  const void* vectors;  // compute type, [7][ld]: mean, invstd, gamma, beta, scale, along, across
  double* partial;      // [groups][2][channels], of planes [n][2][channels]
};

struct DTypeKernels {
  ElementBytes bytes;
  int64_t widest_by_planes;  // the widest kernel for which there is that way (depthwise_planes.inl); 0: none
  void (*pack_biases)(const PackContext&);
  void (*pack_depthwise)(const PackContext&, int64_t panel);          // of backward
  void (*pack_depthwise_forward)(const PackContext&, int64_t panel);  // the same, or a form of the forward's own
  void (*pack_pointwise_forward)(const PackContext&, int64_t panel);
  void (*pack_pointwise_backward)(const PackContext&, int64_t panel);
  void (*forward)(const ForwardContext&, int64_t task, void* scratch);  // tiles * parts
  void (*forward_moments)(const ForwardContext&, int64_t group, void* scratch);
  void (*backward_group)(const BackwardContext&, int64_t group, void* scratch);
  void (*reduce_pointwise)(const BackwardContext&, int64_t out_channel);
  void (*reduce_biases)(const BackwardContext&);
  void (*backward_turn_x)(const BackwardContext&, int64_t task);            // of turned_pixels of x
  void (*backward_x)(const BackwardContext&, int64_t rows, void* scratch);  // of grad_rows, per image
  void (*backward_dw)(const BackwardContext&, int64_t group);
  void (*reduce_depthwise)(const BackwardContext&, int64_t vector);
  void (*backward_turn)(const BackwardContext&, int64_t group, void* scratch);
  void (*backward_panel)(const BackwardContext&, int64_t panel, void* scratch);
  void (*depthwise_moments)(const MomentsContext&, int64_t task, void* scratch);  // groups * panels
  void (*depthwise_sums)(const MomentsContext&, int64_t task, void* scratch);     // images * groups * panels
  void (*gate_gradients)(const GateContext&, int64_t task);
  void (*norm_moments)(const NormContext&, int64_t group, void* scratch);
  void (*norm_forward)(const NormContext&, int64_t group, void* scratch);
  void (*norm_sums)(const NormContext&, int64_t group, void* scratch);
  void (*norm_backward)(const NormContext&, int64_t group, void* scratch);
  void (*backward_norm_group)(const BackwardContext&, int64_t group, void* scratch);
};

// Whether there may be kernels that read x by planes: planes_pay() (cpu_plan.h) says of which shapes.
inline bool may_go_by_planes(const DTypeKernels& kernels, const Geometry& g, Layout x_layout) {
  return x_layout == Layout::nchw && g.kernel_w <= kernels.widest_by_planes;
}

struct KernelTable {
  MicroTile micro_f32, micro_f64;
  DTypeKernels by_dtype[4];  // DType
};

const KernelTable& kernels_generic();
const KernelTable& kernels_avx2();  // x86-64 only, as is the next
const KernelTable& kernels_avx512();
const KernelTable& kernels_avx512_bf16();  // the same, but bf16 is multiplied as it is; only where DSCONV_BUILDS_BF16

}  // namespace dsconv
