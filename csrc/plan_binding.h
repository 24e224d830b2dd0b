// The planners' queries (plan_query.h) as functions of the Python module.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "plan_query.h"

namespace dsconv {
namespace plan_binding {

namespace py = pybind11;
using Sizes = std::vector<int64_t>;

// A planner's question as Python asks it: sizes, then the rest by name. kPlan's last argument is called `units`.
template <typename Result, typename Units, Result (*kPlan)(const PlanQuery&, Units), typename Default>
void define(py::module_& m, const char* name, const char* units, Default default_units, const char* text) {
  using Given = std::remove_cv_t<std::remove_reference_t<Units>>;
  m.def(
      name,
      [](Sizes input, Sizes dw_weight, int64_t c_out, Sizes stride, Sizes padding, Sizes dilation, std::string dtype,
         bool channels_last, bool backward, bool bent, const Given& units) {
        return kPlan({input, dw_weight, c_out, stride, padding, dilation, dtype, channels_last, backward, bent}, units);
      },
      py::arg("input"), py::arg("dw_weight"), py::arg("c_out"), py::arg("stride") = Sizes{1, 1},
      py::arg("padding") = Sizes{0, 0, 0, 0}, py::arg("dilation") = Sizes{1, 1}, py::arg("dtype") = "float32",
      py::arg("channels_last") = false, py::arg("backward") = false, py::arg("bent") = false,
      py::arg(units) = default_units, text);
}

inline py::dict numbers_of(const PlannedKernel& kernel) {
  const KernelCost& cost = kernel.cost;
  const Prediction& prediction = kernel.prediction;
  py::dict d;
  d["name"] = cost.name;
  d["tile"] = py::make_tuple(cost.tile_rows, cost.tile_columns, cost.tile_depth);
  d["stages"] = cost.stages;
  d["launches"] = cost.launches;
  d["blocks"] = cost.blocks;
  d["threads"] = cost.threads;
  d["shared_bytes"] = cost.shared_bytes;
  d["blocks_per_multiprocessor"] = prediction.blocks_per_multiprocessor;
  d["waves"] = prediction.waves;
  d["multiply_adds"] = cost.multiply_adds;
  d["dram_bytes"] = cost.dram_bytes;
  d["l2_bytes"] = cost.l2_bytes;
  d["dram_seconds"] = prediction.dram_seconds;
  d["l2_seconds"] = prediction.l2_seconds;
  d["shared_seconds"] = prediction.shared_seconds;
  d["arithmetic_seconds"] = prediction.arithmetic_seconds;
  d["seconds"] = prediction.seconds;
  return d;
}

// Every field of DeviceLimits by its name.
template <typename Visit>
void each_limit(DeviceLimits& d, Visit visit) {
  visit("multiprocessors", d.multiprocessors);
  visit("capability", d.capability);
  visit("shared_per_block", d.shared_per_block);
  visit("shared_per_multiprocessor", d.shared_per_multiprocessor);
  visit("shared_reserved", d.shared_reserved);
  visit("threads_per_multiprocessor", d.threads_per_multiprocessor);
  visit("blocks_per_multiprocessor", d.blocks_per_multiprocessor);
  visit("l2_bytes", d.l2_bytes);
  visit("bandwidth", d.bandwidth);
  visit("l2_bandwidth", d.l2_bandwidth);
  visit("fma_f32", d.fma_f32);
  visit("fma_f64", d.fma_f64);
  visit("mma_f16", d.mma_f16);
  visit("mma_tf32", d.mma_tf32);
}

inline py::list alternatives(const PlanQuery& query, const py::dict& limits) {
  DeviceLimits device;
  each_limit(device, [&](const char* name, auto& value) {
    value = py::cast<std::remove_reference_t<decltype(value)>>(limits[name]);
  });
  py::list calls;
  for (const PlannedCall& call : cuda_alternatives(query, device)) {
    py::list kernels;
    for (const PlannedKernel& kernel : call.kernels) kernels.append(numbers_of(kernel));
    py::dict d;
    d["name"] = call.name;
    d["chosen"] = call.chosen;
    d["ours"] = call.ours;
    d["workspace_bytes"] = call.workspace_bytes;
    d["kernels"] = kernels;
    calls.append(d);
  }
  return calls;
}

// Of every GPU of the table: its architecture, its name and its limits.
inline py::list gpus() {
  py::list result;
  for (const Gpu& gpu : kGpus) {
    py::dict d;
    d["architecture"] = gpu.architecture;
    d["name"] = gpu.name;
    DeviceLimits limits = gpu.limits;
    each_limit(limits, [&](const char* name, const auto& value) { d[name] = value; });
    result.append(d);
  }
  return result;
}

}  // namespace plan_binding

inline void define_plans(pybind11::module_& m) {
  using namespace plan_binding;
  define<PlanNumbers, int64_t, cpu_plan>(m, "cpu_plan", "threads", 1,
                                         "How the active CPU kernels would cut a call into tasks");
  define<PlanNumbers, int64_t, cuda_plan>(m, "cuda_plan", "multiprocessors", 1,
                                          "How the CUDA kernels would cut a call into blocks; needs no GPU");
  define<py::list, const py::dict&, alternatives>(m, "cuda_alternatives", "device", py::dict(),
                                                  "What the CUDA planner chooses from, with predicted costs");
  m.def("gpus", &gpus, "The GPUs that a plan can be asked for by name");
}

}  // namespace dsconv
