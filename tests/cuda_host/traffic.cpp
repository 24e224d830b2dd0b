// Counts the memory traffic of the launchers' kernels (counters.h), and tells how they are launched.
//
//   traffic count        reads calls from the standard input, a line each:
//                        name dtype layout mode n c h w kernel_h kernel_w stride dilation c_out multiplier act out_act
//                        capability multiprocessors blocks
//       dtype is f16, bf16, f32, tf32 or f64; mode is forward, fused (forward), training or training_bn; act and
//       out_act are numbers of params.h; `blocks` of each launch are counted.
//   traffic launches     reads calls too, adds those of driver_calls.h for every GPU of the table, and runs no block:
//                        of every kernel its symbol, threads and bytes of dynamic shared memory, for each capability,
//                        and how many blocks the planner plans to share a multiprocessor; 0 for the passes of norms,
//                        which it predicts nothing for
//
//   Prints one JSON object a line.

#include <cstdio>
#include <cstring>
#include <iostream>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../../csrc/cuda/cuda_dispatch.h"
#include "../../csrc/cuda/cuda_norm.h"
#include "../../csrc/cuda/cuda_schedule.h"
#include "counters.h"
#include "cuda_host.h"
#include "driver_calls.h"
#include "norm_calls.h"

using namespace dsconv;

namespace {

// As aligned as what PyTorch allocates on a GPU.
class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes_(bytes), data_(std::aligned_alloc(512, (bytes + 511) / 512 * 512)) {
    std::memset(data_, 0, static_cast<std::size_t>(bytes));
  }
  ~Memory() { std::free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() const { return data_; }

 private:
  int64_t bytes_;
  void* data_;
};

class Tensors {
 public:
  void* make(const char* name, int64_t bytes) {
    memory_.push_back(std::make_unique<Memory>(bytes));
    cuda_host::count_tensor(name, memory_.back()->data(), static_cast<uint64_t>(bytes));
    return memory_.back()->data();
  }
  ~Tensors() { cuda_host::forget_tensors(); }

 private:
  std::vector<std::unique_ptr<Memory>> memory_;
};

struct Request {
  std::string name, dtype, layout, mode;
  Geometry g{};
  int64_t act, out_act, capability, multiprocessors, blocks;
};

bool read(std::istream& in, Request& r) {
  Geometry& g = r.g;
  int64_t stride = 0, dilation = 0;
  if (!(in >> r.name >> r.dtype >> r.layout >> r.mode >> g.n >> g.c_in >> g.h_in >> g.w_in >> g.kernel_h >>
        g.kernel_w >> stride >> dilation >> g.c_out >> g.multiplier >> r.act >> r.out_act >> r.capability >>
        r.multiprocessors >> r.blocks)) {
    return false;
  }
  g.c_mid = g.c_in * g.multiplier;
  g.d_in = g.d_out = g.kernel_d = g.stride_d = g.dilation_d = 1;
  g.stride_h = g.stride_w = stride;
  g.dilation_h = g.dilation_w = dilation;
  g.pad_top = dilation * (g.kernel_h - 1) / 2;
  g.pad_left = dilation * (g.kernel_w - 1) / 2;
  const auto out = [&](int64_t in_size, int64_t kernel, int64_t pad) {
    return (in_size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
  };
  g.h_out = out(g.h_in, g.kernel_h, g.pad_top);
  g.w_out = out(g.w_in, g.kernel_w, g.pad_left);
  return true;
}

void print(const Request& r, const char* phase, int64_t workspace_bytes) {
  for (const cuda_host::KernelTraffic& k : cuda_host::take_traffic()) {
    std::printf(
        "{\"call\": \"%s\", \"phase\": \"%s\", \"symbol\": \"%s\", \"blocks\": %llu, \"counted_blocks\": %llu, "
        "\"threads\": %llu, \"dynamic_shared\": %llu, \"workspace_bytes\": %lld, \"load_wavefronts\": %llu, "
        "\"free_load_wavefronts\": %llu, \"store_wavefronts\": %llu, \"free_store_wavefronts\": %llu, \"tensors\": {",
        r.name.c_str(), phase, k.symbol.c_str(), static_cast<unsigned long long>(k.blocks),
        static_cast<unsigned long long>(k.counted_blocks), static_cast<unsigned long long>(k.threads),
        static_cast<unsigned long long>(k.dynamic_shared), static_cast<long long>(workspace_bytes),
        static_cast<unsigned long long>(k.load_wavefronts), static_cast<unsigned long long>(k.free_load_wavefronts),
        static_cast<unsigned long long>(k.store_wavefronts), static_cast<unsigned long long>(k.free_store_wavefronts));
    const char* between = "";
    for (const cuda_host::TensorTraffic& t : k.tensors) {
      if (t.requests == 0) continue;
      std::printf("%s\"%s\": [%llu, %llu, %llu, %llu]", between, t.name.c_str(),
                  static_cast<unsigned long long>(t.read_sectors), static_cast<unsigned long long>(t.written_sectors),
                  static_cast<unsigned long long>(t.block_sectors), static_cast<unsigned long long>(t.requests));
      between = ", ";
    }
    std::printf("}}\n");
  }
}

bool failed(const LaunchStatus& status) {
  if (status.error == 0) return false;
  std::fprintf(stderr, "launch of %s: %s\n", status.kernel, cudaGetErrorString(static_cast<cudaError_t>(status.error)));
  return true;
}

DType dtype_of(const std::string& name) {
  return name == "f16" ? DType::f16 : name == "bf16" ? DType::bf16 : name == "f64" ? DType::f64 : DType::f32;
}

void prepare(const DeviceLimits& d) {
  cuda_host::set_device({static_cast<int>(d.capability / 10), static_cast<int>(d.capability % 10),
                         static_cast<int>(d.multiprocessors), static_cast<int>(d.shared_per_block)});
}

// `make(name, bytes)` gives the memory of a tensor.
template <typename Make>
ForwardParams forward_params(const Request& r, Make make) {
  const Geometry& g = r.g;
  const int64_t bytes = static_cast<int64_t>(element_bytes(dtype_of(r.dtype)));
  ForwardParams p{};
  p.geom = g;
  p.dtype = dtype_of(r.dtype);
  p.tf32 = r.dtype == "tf32";
  p.act = static_cast<Activation>(r.act);
  p.out_act = static_cast<Activation>(r.out_act);
  p.x_layout = p.y_layout = r.layout == "nhwc" ? Layout::nhwc : Layout::nchw;
  p.x = make("x", bytes * x_elements(g));
  p.x_strides = dense_strides(p.x_layout, g.c_in, 1, g.h_in, g.w_in);
  p.dw_weight = make("dw_weight", bytes * g.c_mid * g.kernel_h * g.kernel_w);
  p.dw_bias = make("dw_bias", bytes * g.c_mid);
  p.pw_weight = make("pw_weight", bytes * g.c_mid * g.c_out);
  p.pw_bias = make("pw_bias", bytes * g.c_out);
  p.y = make("y", bytes * g.n * g.c_out * g.h_out * g.w_out);
  p.y_strides = dense_strides(p.y_layout, g.c_out, 1, g.h_out, g.w_out);
  const bool needs_pre = r.mode == "training" && !derivative_from_output(p.out_act);
  if (needs_pre) p.pre = make("pre", bytes * g.n * g.c_out * g.h_out * g.w_out);
  return p;
}

// Of that forward, with every gradient.
template <typename Make>
BackwardParams backward_params(const ForwardParams& p, Make make) {
  const Geometry& g = p.geom;
  const int64_t bytes = static_cast<int64_t>(element_bytes(p.dtype));
  BackwardParams b{};
  b.geom = g;
  b.dtype = p.dtype;
  b.tf32 = p.tf32;
  b.act = p.act;
  b.out_act = p.out_act;
  b.x = p.x;
  b.x_strides = p.x_strides;
  b.x_layout = b.dy_layout = b.saved_layout = b.grad_x_layout = p.x_layout;
  b.dw_weight = p.dw_weight;
  b.dw_bias = p.dw_bias;
  b.pw_weight = p.pw_weight;
  b.dy = make("dy", bytes * g.n * g.c_out * g.h_out * g.w_out);
  b.dy_strides = b.saved_strides = p.y_strides;
  if (p.out_act != Activation::identity) b.saved = derivative_from_output(p.out_act) ? p.y : p.pre;
  b.grad_x = make("grad_x", bytes * x_elements(g));
  b.grad_x_strides = p.x_strides;
  b.grad_dw_weight = make("grad_dw_weight", bytes * g.c_mid * g.kernel_h * g.kernel_w);
  b.grad_pw_weight = make("grad_pw_weight", bytes * g.c_mid * g.c_out);
  b.grad_dw_bias = make("grad_dw_bias", bytes * g.c_mid);
  b.grad_pw_bias = make("grad_pw_bias", bytes * g.c_out);
  return b;
}

// Calls f with the dtype as a constant.
template <typename F>
LaunchStatus by_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f64:
      return f(std::integral_constant<DType, DType::f64>{});
    case DType::f16:
      return f(std::integral_constant<DType, DType::f16>{});
    case DType::bf16:
      return f(std::integral_constant<DType, DType::bf16>{});
    default:
      return f(std::integral_constant<DType, DType::f32>{});
  }
}

bool count_norms(const Request& r, const DeviceLimits& device, Tensors& tensors) {
  const auto make = [&](const char* name, int64_t bytes) { return tensors.make(name, bytes); };
  const auto backward_of = [&](const ForwardParams& p) { return backward_params(p, make); };
  const auto phase = [&](const char* name) { print(r, name, 0); };
  const ForwardParams p = forward_params(r, make);
  return !failed(by_dtype(p.dtype, [&](auto type) {
    return norm_calls::step<decltype(type)::value>(p, device, make, backward_of, phase);
  }));
}

bool launch_norms(const ForwardParams& p, const DeviceLimits& device) {
  return !failed(
      by_dtype(p.dtype, [&](auto type) { return norm_calls::every_launch<decltype(type)::value>(p, device); }));
}

// The tensors of a product's operands and result, the operands in the order of its rows and columns.
struct ProductTensors {
  const char *rows, *columns, *result;
};

// What a product of the library is assumed to ask for: tiles of 128 x 128, each operand read once a tile of the other.
// Behind the launches before it.
void print_product(const Request& r, const char* phase, DType dtype, const LibraryProduct& p,
                   const ProductTensors& names) {
  print(r, phase, 0);
  const int64_t bytes = static_cast<int64_t>(element_bytes(dtype));
  const int64_t rows = p.count * ceil_div(p.rows, 128), columns = ceil_div(p.columns, 128);
  const auto sectors = [&](int64_t elements) { return static_cast<long long>(ceil_div(elements * bytes, 32)); };
  const long long a = columns * sectors(p.count * p.rows * p.depth), b = rows * sectors(p.columns * p.depth);
  const long long c = sectors(p.count * p.rows * p.columns), blocks = rows * columns;
  std::printf(
      "{\"call\": \"%s\", \"phase\": \"%s\", \"symbol\": \"library_product\", \"blocks\": %lld, "
      "\"counted_blocks\": %lld, \"load_wavefronts\": 0, \"free_load_wavefronts\": 0, \"store_wavefronts\": 0, "
      "\"free_store_wavefronts\": 0, \"tensors\": {\"%s\": [%lld, 0, %lld, 1], \"%s\": [%lld, 0, %lld, 1], "
      "\"%s\": [0, %lld, %lld, 1]}}\n",
      r.name.c_str(), phase, blocks, blocks, names.rows, a, a, names.columns, b, b, names.result, c, c);
}

bool count_forward(const Request& r, const ForwardParams& p, const DeviceLimits& device, Tensors& tensors) {
  const ForwardPlan fused = plan_forward(p, device);
  const SplitForwardPlan split = plan_split_forward(p, device);
  if (r.mode == "fused" || !split_is_faster(p, split, fused, device)) {
    if (failed(forward(p, fused, nullptr))) return false;
    print(r, "forward", 0);
    return true;
  }
  void* act_z = tensors.make("act_z", split.workspace_bytes);
  const auto product = [&](const ForwardParams& part) {
    print_product(r, "forward", part.dtype, pointwise_product_of(part), {"act_z", "pw_weight", "y"});
  };
  if (failed(split_forward(p, split, act_z, device, nullptr, product))) return false;
  print(r, "forward", split.workspace_bytes);
  return true;
}

bool count(const Request& r) {
  const DeviceLimits device = limits_of(r.capability, r.multiprocessors);
  prepare(device);
  cuda_host::count_blocks(static_cast<uint64_t>(r.blocks));
  Tensors tensors;
  if (r.mode == "training_bn") return count_norms(r, device, tensors);
  const auto make = [&](const char* name, int64_t bytes) { return tensors.make(name, bytes); };
  const ForwardParams p = forward_params(r, make);
  if (!count_forward(r, p, device, tensors)) return false;
  if (r.mode != "training") return true;
  const BackwardParams b = backward_params(p, make);
  const BackwardPlan plan = plan_backward(b, device);
  const SplitBackwardPlan split = plan_split_backward(b, device);
  if (split_is_faster(b, split, plan, device)) {
    void* all = tensors.make("workspace", static_cast<int64_t>(split.workspace_bytes));
    const int64_t pixels = output_pixels(b.geom);
    const auto du = [&](const void*, void*) {
      print_product(r, "backward", b.dtype, {"", 1, pixels, b.geom.c_mid, b.geom.c_out},
                    {"dy", "pw_weight", "workspace"});
    };
    const auto weight = [&](const void*, const void*) {
      print_product(r, "backward", b.dtype, {"", 1, b.geom.c_out, b.geom.c_mid, pixels},
                    {"dy", "workspace", "grad_pw_weight"});
    };
    if (failed(split_backward(b, split, all, device, nullptr, du, weight))) return false;
    print(r, "backward", static_cast<int64_t>(split.workspace_bytes));
    return true;
  }
  void* workspace = tensors.make("workspace", static_cast<int64_t>(plan.workspace_bytes));
  if (failed(backward(b, plan, workspace, nullptr))) return false;
  print(r, "backward", static_cast<int64_t>(plan.workspace_bytes));
  return true;
}

class Launches {
 public:
  // Without running a block, so that no tensor is read or written.
  bool add(const Request& r) {
    const DeviceLimits device = limits_of(r.capability, r.multiprocessors);
    prepare(device);
    cuda_host::count_blocks(0);
    const auto make = [this](const char*, int64_t) { return nowhere_; };
    const ForwardParams p = forward_params(r, make);
    const ForwardPlan plan = plan_forward(p, device);
    if (failed(forward(p, plan, nullptr)) || !print(device, forward_schedule(p, plan, device))) return false;
    for (const int64_t images : {p.geom.n, int64_t{1}}) {
      if (!add_split(images_of(p, 0, images), device)) return false;
    }
    if (r.mode != "training") return true;
    const BackwardParams b = backward_params(p, make);
    // One kernel makes both gradients of the depthwise convolution where both are wanted; others make either alone.
    BackwardParams of_x = b, of_weight = b;
    of_x.grad_dw_weight = of_x.grad_dw_bias = nullptr;
    of_weight.grad_x = nullptr;
    for (const BackwardParams& wanted : {b, of_x, of_weight}) {
      const BackwardPlan backward_plan = plan_backward(wanted, device);
      if (failed(backward(wanted, backward_plan, nowhere_, nullptr)) ||
          !print(device, backward_schedule(wanted, backward_plan, device))) {
        return false;
      }
    }
    const SplitBackwardPlan split = plan_split_backward(b, device);
    if (split.possible) {
      const auto no_product = [](const void*, const void*) {};
      if (failed(split_backward(b, split, nowhere_, device, nullptr, no_product, no_product)) ||
          !print(device, without_products(split_backward_schedule(b, split, device)))) {
        return false;
      }
    }
    return launch_norms(p, device) && print(device, Schedule{});
  }

  bool add_on_every_gpu(const driver::Call& call, const std::string& precision) {
    for (const Gpu& gpu : kGpus) {
      for (const int64_t multiprocessors : {int64_t{1}, gpu.limits.multiprocessors}) {
        Request r{};
        r.dtype = precision;
        r.layout = call.x_layout == Layout::nhwc ? "nhwc" : "nchw";
        r.mode = "training";
        r.g = driver::geometry_of(*call.shape);
        r.act = static_cast<int64_t>(call.act);
        r.out_act = static_cast<int64_t>(call.out_act);
        r.capability = gpu.limits.capability;
        r.multiprocessors = multiprocessors;
        if (!add(r)) return false;
      }
    }
    return true;
  }

  // The matrix of the driver; few multiprocessors and many make the planner choose otherwise.
  bool add_matrix() {
    constexpr const char* kPrecisions[] = {"f32", "f64", "f16", "bf16"};  // in the order of DType
    for (const driver::Call& call : driver::all_calls()) {
      if (!add_on_every_gpu(call, call.tf32 ? "tf32" : kPrecisions[static_cast<int>(call.type)])) return false;
    }
    return true;
  }

 private:
  static Schedule without_products(const Schedule& all) {
    Schedule own;
    for (int i = 0; i < all.count; ++i) {
      if (std::strstr(all.kernels[i].name, "the library's") == nullptr) own.add(all.kernels[i]);
    }
    return own;
  }

  // Of all images at once, whether the planner splits the call or not.
  bool add_split(const ForwardParams& p, const DeviceLimits& device) {
    if (!can_split(p, device)) return true;
    const SplitForwardPlan plan = split_by(p, p.geom.n);
    const Schedule own = without_products(split_forward_schedule(p, plan, device));
    const auto no_product = [](const ForwardParams&) {};
    return !failed(split_forward(p, plan, nowhere_, device, nullptr, no_product)) && print(device, own);
  }

  // Of the launches so far, which are those of the schedule, where it has any.
  bool print(const DeviceLimits& device, const Schedule& schedule) {
    const std::vector<cuda_host::KernelTraffic> launches = cuda_host::take_traffic();
    if (schedule.count > 0 && launches.size() != static_cast<std::size_t>(schedule.count)) {
      std::fprintf(stderr, "%zu launches, %d are planned\n", launches.size(), schedule.count);
      return false;
    }
    for (std::size_t i = 0; i < launches.size(); ++i) {
      const cuda_host::KernelTraffic& k = launches[i];
      if (schedule.count > 0 && k.blocks != static_cast<uint64_t>(schedule.kernels[i].blocks)) {
        std::fprintf(stderr, "%s: %llu blocks, %s is planned with %lld\n", k.symbol.c_str(),
                     static_cast<unsigned long long>(k.blocks), schedule.kernels[i].name,
                     static_cast<long long>(schedule.kernels[i].blocks));
        return false;
      }
      const int64_t planned = schedule.count > 0 ? blocks_per_multiprocessor(schedule.kernels[i], device) : 0;
      if (!seen_.insert({device.capability, k.symbol, k.threads, k.dynamic_shared, planned}).second) continue;
      std::printf(
          "{\"capability\": %lld, \"symbol\": \"%s\", \"threads\": %llu, \"dynamic_shared\": %llu, \"planned\": "
          "%lld}\n",
          static_cast<long long>(device.capability), k.symbol.c_str(), static_cast<unsigned long long>(k.threads),
          static_cast<unsigned long long>(k.dynamic_shared), static_cast<long long>(planned));
    }
    return true;
  }

  alignas(512) char nowhere_[512];
  std::set<std::tuple<int64_t, std::string, uint64_t, uint64_t, int64_t>> seen_;
};

}  // namespace

int main(int argc, char** argv) {
  const std::string command = argc == 2 ? argv[1] : "";
  if (command != "launches" && command != "count") {
    std::fprintf(stderr, "usage: traffic launches | count\n");
    return 2;
  }
  Launches launches;
  if (command == "launches" && !launches.add_matrix()) return 1;
  Request request;
  while (read(std::cin, request)) {
    if (!(command == "launches" ? launches.add(request) : count(request))) return 1;
    std::fflush(stdout);
  }
  return 0;
}
