// The op schemas and the Python module (what is not a tensor op). Implementations register themselves: op_cpu.cpp for
// CPU, cuda/op_cuda.cu for CUDA (compiling that file is what turns CUDA on), dsconv_cuda/ops.py for fake tensors.
//
// padding is (top, left, bottom, right); act and out_act are the numbers of params.h's Activation. fast lets CUDA round
// the operands of float32 products to TF32, and leave those of other types to cuBLAS; it means nothing to the CPU. All
// take 3-D convolutions too, with three numbers for two and padding (front, top, left, back, bottom, right).

#include "build_info.h"
#include "cpu/cpu_isa.h"
#include "cpu/cpu_kernels.h"
#include "op_args.h"
#include "plan_binding.h"

STABLE_TORCH_LIBRARY(dsconv_cuda, m) {
  // y
  m.def(
      "fwd(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, int[2] stride, int[4] "
      "padding, int[2] dilation, int act, int out_act, bool fast=False) -> Tensor");
  // What graphs of torch.compile hold for them, below autograd: `arguments` has what is no tensor in a row, (*stride,
  // *padding, *dilation, act, out_act, fast), as every list makes a call longer. On a small layer the dispatcher, and
  // gradients that are registered in Python, take as long as the kernels.
  m.def(
      "fwd_in_graph(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, int[] arguments) "
      "-> Tensor");
  m.def(
      "fwd_with_pre_in_graph(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, int[] "
      "arguments) -> (Tensor, Tensor)");
  m.def(
      "bwd_in_graph(Tensor dy, Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? saved, int[] "
      "arguments, int grad_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // With x through a norm and an activation first, as in the ops of training below; on the CPU.
  m.def(
      "fwd_after_norm_in_graph(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, int[] "
      "arguments, Tensor in_vectors, int in_act) -> Tensor");
  // The same for a batch of calls of one shape, in which every tensor has the elements in front (each_args.h), for
  // vmap.
  m.def(
      "fwd_each(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, int[] arguments) -> "
      "Tensor");
  m.def(
      "fwd_with_pre_each(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, int[] "
      "arguments) -> (Tensor, Tensor)");
  m.def(
      "bwd_each(Tensor dy, Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? saved, int[] "
      "arguments, int grad_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The ops below for a module, on the CPU: `kept`, made by keep(), holds the arguments that are no tensors, and
  // with `room` the packed weights while they stay as they are (kept_weights.h); version is the sum of the weights'
  // version counters. Below autograd, and for plain tensors only: no fake kernel, no vmap.
  m.def(
      "keep(Tensor dw_weight, Tensor pw_weight, int[2] stride, int[4] padding, int[2] dilation, int act, int out_act, "
      "bool room=True) -> Tensor");
  m.def(
      "fwd_kept(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, Tensor(a!) kept, int "
      "version) -> Tensor");
  // With x through a norm and an activation first, as in the ops of training below.
  m.def(
      "fwd_after_norm_kept(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, Tensor(a!) "
      "kept, int version, Tensor in_vectors, int in_act) -> Tensor");
  m.def(
      "fwd_with_pre_kept(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, Tensor(a!) "
      "kept) -> (Tensor, Tensor)");
  m.def(
      "bwd_kept(Tensor dy, Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? saved, Tensor kept, "
      "int grad_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Whether these are what they were when `seen` was written, which is brought up to date where its size fits: all of
  // the vectors, the ends of the rows of the matrices. On the CPU, below autograd.
  m.def("seen_again(Tensor[] vectors, Tensor[] matrices, Tensor(a!) seen) -> bool");
  // (y, pre): pre is y before out_act, kept for backward where its derivative cannot be told from y
  m.def(
      "fwd_with_pre(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, int[2] stride, "
      "int[4] padding, int[2] dilation, int act, int out_act, bool fast=False) -> (Tensor, Tensor)");
  // Gradients of (x, dw_weight, pw_weight, dw_bias, pw_bias); one that grad_mask does not ask for has shape [0].
  m.def(
      "bwd(Tensor dy, Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? saved, int[2] stride, "
      "int[4] padding, int[2] dilation, int act, int out_act, int grad_mask, bool fast=False) -> (Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");

  // Training through BatchNorm: op_cpu_norm.cpp says what each computes. moments and sums are [2, C], vectors [4, C]
  // (mean, invstd, gamma, beta), all float64; pw_weight tells z_moments nothing but is there as everywhere. With
  // in_vectors and in_act, x goes through a norm and an activation first, in every op that has them. A count or
  // out_count of 0 stands for the pixels of v or y, which a graph of free sizes has no number for.
  m.def(
      "z_moments(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, int[2] stride, int[4] padding, int[2] "
      "dilation, Tensor? in_vectors=None, int in_act=0) -> Tensor");
  m.def("norm_vectors(Tensor moments, Tensor? weight, Tensor? bias, float eps) -> Tensor");
  // Running statistics move towards the moments of `count` values by momentum; in one call, since a small layer's step
  // is not much longer than those of PyTorch that do the same. On the CPU.
  m.def(
      "norm_track(Tensor moments, float count, float momentum, Tensor(a!)? running_mean, Tensor(b!)? running_var) -> "
      "()");
  // y and its moments, [2, 0] where not asked for.
  m.def(
      "fwd_norm(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, Tensor vectors, int[2] "
      "stride, int[4] padding, int[2] dilation, int act, bool want_moments, Tensor? in_vectors=None, int in_act=0, "
      "bool fast=False) -> (Tensor, Tensor)");
  m.def("moments(Tensor v) -> Tensor");
  m.def("norm_act(Tensor v, Tensor vectors, int act) -> Tensor");
  m.def("norm_act_sums(Tensor grad, Tensor v, Tensor vectors, int act) -> Tensor");
  m.def("norm_act_grad(Tensor grad, Tensor v, Tensor vectors, Tensor? sums, float count, int act) -> Tensor");
  // Gradients of (x, dw_weight, pw_weight, pw_bias) and the sums of du. With y, grad is that of the output, behind a
  // norm with out_vectors and out_act; out_sums and out_count make its statistics those of the batch. With in_vectors
  // the first gradient is that of what x is after its norm and activation.
  m.def(
      "bwd_norm(Tensor grad, Tensor? y, Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor vectors, "
      "Tensor? out_vectors, Tensor? out_sums, float out_count, int[2] stride, int[4] padding, int[2] dilation, int "
      "act, int out_act, int grad_mask, Tensor? in_vectors=None, int in_act=0, bool fast=False) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");
  // The same in two, for sums that are reduced in between: (du, sums, grad pw_weight, grad pw_bias), then the other
  // two.
  m.def(
      "bwd_norm_pointwise(Tensor grad, Tensor? y, Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, "
      "Tensor vectors, Tensor? out_vectors, Tensor? out_sums, float out_count, int[2] stride, int[4] padding, int[2] "
      "dilation, int act, int out_act, int grad_mask, Tensor? in_vectors=None, int in_act=0, bool fast=False) -> "
      "(Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def(
      "bwd_norm_depthwise(Tensor(a!) du, Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor "
      "vectors, Tensor sums, float count, int[2] stride, int[4] padding, int[2] dilation, int grad_mask, Tensor? "
      "in_vectors=None, int in_act=0) -> (Tensor, Tensor)");
  // A gate between the activation and the pointwise part: op_cpu_gate.cpp says what each computes. gate, push, means
  // and their gradients are [N, C * m] in the compute type; vectors, those of a norm that took statistics of the batch
  // before the activation. (grad_pw_weight in the compute type, grad_gate), then the gradients of (x, dw_weight,
  // dw_bias) and with vectors the sums of du. On the CPU.
  m.def(
      "gate_means(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? vectors, int[2] stride, "
      "int[4] padding, int[2] dilation, int act, bool keep) -> (Tensor, Tensor)");
  m.def(
      "fwd_gated(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, Tensor gate, "
      "Tensor? vectors, Tensor? kept, int[2] stride, int[4] padding, int[2] dilation, int act, int out_act) -> Tensor");
  m.def(
      "bwd_gate(Tensor dy, Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor gate, Tensor? "
      "vectors, "
      "int[2] stride, int[4] padding, int[2] dilation, int act) -> (Tensor, Tensor)");
  m.def(
      "bwd_gated(Tensor dy, Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor gate, Tensor push, "
      "Tensor? vectors, int[2] stride, int[4] padding, int[2] dilation, int act, int grad_mask) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
  // A norm with given statistics folded into the weight and the bias before it, and the gradients of (weight, bias,
  // gamma, beta) from those of the two. For plain tensors of the CPU, as the next two.
  m.def(
      "fold_norm(Tensor weight, Tensor? bias, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps) -> "
      "(Tensor, Tensor)");
  m.def(
      "fold_norm_bwd(Tensor grad_weight, Tensor grad_bias, Tensor weight, Tensor? bias, Tensor mean, Tensor var, "
      "Tensor? gamma, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  // A step of training in two calls, for a block of the CPU with both norms, of which no statistics are shared: what
  // the ops above do one by one, running statistics and the count of batches included. `kept` is what keep() made of
  // the arguments, out_act that of the second norm; tensors have the dtype of x, parameters of the norms its compute
  // type. Below autograd, and for plain tensors only: no fake kernel, no vmap. (out, y before the second norm, and the
  // vectors of both); with `defer` out is y.
  m.def(
      "train_fwd(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, Tensor? weight1, "
      "Tensor? bias1, Tensor? weight2, Tensor? bias2, Tensor(a!)? mean1, Tensor(b!)? var1, Tensor(c!)? batches1, "
      "Tensor(d!)? mean2, Tensor(e!)? var2, Tensor(f!)? batches2, float eps1, float momentum1, float eps2, float "
      "momentum2, Tensor kept, Tensor? in_vectors, int in_act, bool defer) -> (Tensor, Tensor, Tensor, Tensor)");
  // Gradients of (x, dw_weight, pw_weight, dw_bias, pw_bias, weight1, bias1, weight2, bias2), of which grad_mask has a
  // bit each, in this order; none for those that it does not ask for.
  m.def(
      "train_bwd(Tensor grad, Tensor? y, Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? "
      "pw_bias, Tensor vectors1, Tensor vectors2, Tensor kept, int grad_mask, Tensor? in_vectors, int in_act) -> "
      "(Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)");
  // The same for graphs, which move running statistics themselves: (y, out, the vectors of both norms, the moments of
  // both), out of shape [0] with `defer`; and gradients, of shape [0] where grad_mask does not ask for them.
  m.def(
      "train_fwd_in_graph(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, Tensor? "
      "weight1, Tensor? bias1, Tensor? weight2, Tensor? bias2, float eps1, float eps2, int[] arguments, Tensor? "
      "in_vectors, int in_act, bool defer) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "train_bwd_in_graph(Tensor grad, Tensor? y, Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, "
      "Tensor? pw_bias, Tensor vectors1, Tensor vectors2, int[] arguments, int grad_mask, Tensor? in_vectors, int "
      "in_act) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &dsconv::build_info, "How this library was built");
  m.def("isa_built", &dsconv::isa_built, "The CPU instruction sets that this library has kernels for");
  m.def("isa_available", &dsconv::isa_available, "Those of them that this machine runs");
  m.def("isa_active", [] { return dsconv::isa_name(dsconv::isa_active()); }, "The one in use");
  m.def("set_isa", &dsconv::set_isa, pybind11::arg("name"), "Uses another one from now on, in the whole process");
  m.def("bf16_dot_available", &dsconv::bf16_dot_available, "Whether this library and machine have AVX512-BF16 kernels");
  m.def("bf16_dot_active", &dsconv::bf16_dot_active, "Whether bfloat16 uses them");
  m.def("set_bf16_dot", &dsconv::set_bf16_dot, pybind11::arg("on"), "False: bfloat16 is computed in float32");
  m.def(
      "multiplies_by_halves", &dsconv::multiplies_by_halves,
      "Whether AVX-512 kernels take this machine for one whose vectors of 512 bits take twice the time of half of one");
  m.def("set_multiplies_by_halves", &dsconv::set_multiplies_by_halves, pybind11::arg("on"),
        "Takes it for one that does, or not; results are the same");
  dsconv::define_plans(m);
}
