// The op schemas and the Python module (what is not a tensor op). Implementations register themselves: op_cpu.cpp for
// CPU, cuda/op_cuda.cu for CUDA (compiling that file is what turns CUDA on), dsconv_cuda/ops.py for fake tensors.
//
// padding is (top, left, bottom, right); act and out_act are the numbers of params.h's Activation.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "cpu/cpu_isa.h"
#include "op_args.h"
#include "plan_query.h"

STABLE_TORCH_LIBRARY(dsconv_cuda, m) {
  // y
  m.def(
      "fwd(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, int[2] stride, int[4] "
      "padding, int[2] dilation, int act, int out_act) -> Tensor");
  // fwd for a module whose weights stay as they are between calls, on the CPU: `kept`, made by keep(), holds the
  // arguments that are no tensors, and the packed weights (kept_weights.h). version is the sum of the weights' version
  // counters. Below autograd, for calls that need no gradient, and for plain tensors only: no fake kernel, no vmap.
  m.def(
      "keep(Tensor dw_weight, Tensor pw_weight, int[2] stride, int[4] padding, int[2] dilation, int act, int out_act) "
      "-> Tensor");
  m.def(
      "fwd_kept(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, Tensor kept, int "
      "version) -> Tensor");
  // (y, pre): pre is y before out_act, kept for backward where its derivative cannot be told from y
  m.def(
      "fwd_with_pre(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? pw_bias, int[2] stride, "
      "int[4] padding, int[2] dilation, int act, int out_act) -> (Tensor, Tensor)");
  // Gradients of (x, dw_weight, pw_weight, dw_bias, pw_bias); one that grad_mask does not ask for has shape [0].
  m.def(
      "bwd(Tensor dy, Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor? dw_bias, Tensor? saved, int[2] stride, "
      "int[4] padding, int[2] dilation, int act, int out_act, int grad_mask) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
}

namespace {

// A planner's question as Python asks it: positional sizes, the rest by name.
template <dsconv::PlanNumbers (*kPlan)(const dsconv::PlanQuery&, int64_t)>
void define_plan(pybind11::module_& m, const char* name, const char* units, const char* text) {
  namespace py = pybind11;
  using Sizes = std::vector<int64_t>;
  m.def(
      name,
      [](Sizes input, Sizes dw_weight, int64_t c_out, Sizes stride, Sizes padding, Sizes dilation, std::string dtype,
         bool channels_last, bool backward, int64_t units) {
        return kPlan({input, dw_weight, c_out, stride, padding, dilation, dtype, channels_last, backward}, units);
      },
      py::arg("input"), py::arg("dw_weight"), py::arg("c_out"), py::arg("stride") = Sizes{1, 1},
      py::arg("padding") = Sizes{0, 0, 0, 0}, py::arg("dilation") = Sizes{1, 1}, py::arg("dtype") = "float32",
      py::arg("channels_last") = false, py::arg("backward") = false, py::arg(units) = 1, text);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &dsconv::build_info, "How this library was built");
  m.def("isa_built", &dsconv::isa_built, "The CPU instruction sets that this library has kernels for");
  m.def("isa_available", &dsconv::isa_available, "Those of them that this machine runs");
  m.def("isa_active", [] { return dsconv::isa_name(dsconv::isa_active()); }, "The one in use");
  m.def("set_isa", &dsconv::set_isa, pybind11::arg("name"), "Uses another one from now on, in the whole process");
  define_plan<dsconv::cpu_plan>(m, "cpu_plan", "threads", "How the active CPU kernels would cut a call into tasks");
  define_plan<dsconv::cuda_plan>(m, "cuda_plan", "multiprocessors",
                                 "How the CUDA kernels would cut a call into blocks; needs no GPU");
}
