// Counts the memory traffic of the launchers' kernels (counters.h), and tells how they are launched.
//
//   traffic launches     every kernel that the calls of driver_calls.h come to, once for each launch that differs:
//                        symbol, threads, bytes of dynamic shared memory
//   traffic count        reads calls from the standard input, a line each:
//                        name dtype layout mode n c h w kernel_h kernel_w stride dilation c_out multiplier act out_act
//                        capability multiprocessors blocks
//       mode is forward or training; act and out_act are numbers of params.h; `blocks` of each launch are counted.
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
#include <vector>

#include "../../csrc/cuda/cuda_dispatch.h"
#include "counters.h"
#include "cuda_host.h"
#include "driver_calls.h"

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

bool count(const Request& r) {
  const Geometry& g = r.g;
  const Layout layout = r.layout == "nhwc" ? Layout::nhwc : Layout::nchw;
  const DType dtype = r.dtype == "f16"    ? DType::f16
                      : r.dtype == "bf16" ? DType::bf16
                      : r.dtype == "f64"  ? DType::f64
                                          : DType::f32;
  const DeviceLimits device = limits_of(r.capability, r.multiprocessors);
  cuda_host::set_device({static_cast<int>(r.capability / 10), static_cast<int>(r.capability % 10),
                         static_cast<int>(r.multiprocessors), static_cast<int>(device.shared_per_block)});
  cuda_host::count_blocks(static_cast<uint64_t>(r.blocks));
  const int64_t bytes = static_cast<int64_t>(element_bytes(dtype));
  const int64_t x_bytes = bytes * g.n * g.c_in * g.h_in * g.w_in, y_bytes = bytes * g.n * g.c_out * g.h_out * g.w_out;
  const int64_t dw_bytes = bytes * g.c_mid * g.kernel_h * g.kernel_w, pw_bytes = bytes * g.c_mid * g.c_out;
  const auto act = static_cast<Activation>(r.act), out_act = static_cast<Activation>(r.out_act);

  Tensors tensors;
  ForwardParams p{};
  p.geom = g;
  p.dtype = dtype;
  p.act = act;
  p.out_act = out_act;
  p.x = tensors.make("x", x_bytes);
  p.x_layout = p.y_layout = layout;
  p.x_strides = dense_strides(layout, g.c_in, g.h_in, g.w_in);
  p.dw_weight = tensors.make("dw_weight", dw_bytes);
  p.dw_bias = tensors.make("dw_bias", bytes * g.c_mid);
  p.pw_weight = tensors.make("pw_weight", pw_bytes);
  p.pw_bias = tensors.make("pw_bias", bytes * g.c_out);
  p.y = tensors.make("y", y_bytes);
  p.y_strides = dense_strides(layout, g.c_out, g.h_out, g.w_out);
  const bool training = r.mode == "training";
  if (training && !derivative_from_output(out_act)) p.pre = tensors.make("pre", y_bytes);
  if (failed(forward(p, plan_forward(p, device), nullptr))) return false;
  print(r, "forward", 0);
  if (!training) return true;

  BackwardParams b{};
  b.geom = g;
  b.dtype = dtype;
  b.act = act;
  b.out_act = out_act;
  b.x = p.x;
  b.x_strides = p.x_strides;
  b.x_layout = layout;
  b.dw_weight = p.dw_weight;
  b.dw_bias = p.dw_bias;
  b.pw_weight = p.pw_weight;
  b.dy = tensors.make("dy", y_bytes);
  b.dy_strides = p.y_strides;
  b.dy_layout = layout;
  if (out_act != Activation::identity) {
    b.saved = derivative_from_output(out_act) ? p.y : p.pre;
    b.saved_strides = p.y_strides;
    b.saved_layout = layout;
  }
  b.grad_x = tensors.make("grad_x", x_bytes);
  b.grad_x_strides = p.x_strides;
  b.grad_x_layout = layout;
  b.grad_dw_weight = tensors.make("grad_dw_weight", dw_bytes);
  b.grad_pw_weight = tensors.make("grad_pw_weight", pw_bytes);
  b.grad_dw_bias = tensors.make("grad_dw_bias", bytes * g.c_mid);
  b.grad_pw_bias = tensors.make("grad_pw_bias", bytes * g.c_out);
  const BackwardPlan plan = plan_backward(b, device);
  void* workspace = tensors.make("workspace", static_cast<int64_t>(plan.workspace_bytes));
  if (failed(backward(b, plan, workspace, nullptr))) return false;
  print(r, "backward", static_cast<int64_t>(plan.workspace_bytes));
  return true;
}

// Launches without running a block.
bool list_launches() {
  std::set<std::tuple<std::string, uint64_t, uint64_t>> seen;
  cuda_host::count_blocks(0);
  static uint64_t nowhere[64];  // no block reads or writes it
  for (const driver::Call& call : driver::all_calls()) {
    ForwardParams p{};
    p.geom = driver::geometry_of(*call.shape);
    p.dtype = call.type;
    p.x_layout = call.x_layout;
    p.y_layout = call.y_layout;
    BackwardParams b{};
    b.geom = p.geom;
    b.dtype = call.type;
    b.act = call.act;
    b.x_layout = call.x_layout;
    b.dy_layout = call.dy_layout;
    b.grad_x_layout = call.grad_x_layout;
    p.x = p.dw_weight = p.pw_weight = b.x = b.dw_weight = b.pw_weight = b.dy = nowhere;
    p.y = b.grad_x = b.grad_dw_weight = b.grad_pw_weight = b.grad_dw_bias = b.grad_pw_bias = nowhere;
    for (const Gpu& gpu : kGpus) {
      if (failed(forward(p, plan_forward(p, gpu.limits), nullptr))) return false;
      if (failed(backward(b, plan_backward(b, gpu.limits), nowhere, nullptr))) return false;
    }
    for (int i = 0; i < kForwardPlans; ++i) {
      if (failed(forward(p, forward_candidate(p, i), nullptr))) return false;
    }
    for (const cuda_host::KernelTraffic& k : cuda_host::take_traffic()) {
      if (!seen.insert({k.symbol, k.threads, k.dynamic_shared}).second) continue;
      std::printf("{\"symbol\": \"%s\", \"threads\": %llu, \"dynamic_shared\": %llu}\n", k.symbol.c_str(),
                  static_cast<unsigned long long>(k.threads), static_cast<unsigned long long>(k.dynamic_shared));
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "launches") == 0) return list_launches() ? 0 : 1;
  if (argc != 2 || std::strcmp(argv[1], "count") != 0) {
    std::fprintf(stderr, "usage: traffic launches | count\n");
    return 2;
  }
  Request request;
  while (read(std::cin, request)) {
    if (!count(request)) return 1;
    std::fflush(stdout);
  }
  return 0;
}
