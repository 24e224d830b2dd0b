// What the CPU host entries (op_cpu.cpp and those beside it) run a call with: memory for one call and for each thread,
// tasks on torch's own threads, the active kernels, and weights packed for them.
#pragma once

#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>

#include "cpu/cpu_isa.h"
#include "cpu/cpu_kernels.h"
#include "op_args.h"

namespace dsconv {

constexpr std::align_val_t kAlign{kCacheLine};

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, kAlign); }
};
using AlignedBytes = std::unique_ptr<void, AlignedDelete>;

// A thread's scratch: grows, and stays with the thread. Zeroed once, so that lanes past a tensor's last channel, which
// kernels compute and drop, start as numbers.
inline void* thread_scratch(int64_t bytes) {
  thread_local AlignedBytes buffer;
  thread_local int64_t size = 0;
  if (size < bytes) {
    buffer.reset();
    size = 0;
    buffer.reset(::operator new(static_cast<size_t>(bytes), kAlign));
    std::memset(buffer.get(), 0, static_cast<size_t>(bytes));
    size = bytes;
  }
  return buffer.get();
}

// What lives for one call: packed weights, partial sums, du. One block, cut into cache-line aligned pieces.
class Workspace {
 public:
  explicit Workspace(int64_t element) : element_(element) {}
  void reserve(void** pointer, int64_t elements) {
    STD_TORCH_CHECK(count_ < kMaxPieces, "dsconv_cuda: a workspace of too many pieces");
    pieces_[count_++] = {pointer, total_};
    total_ += round_up(elements * element_, kCacheLine);
  }
  int64_t bytes() const { return total_; }
  void allocate() {
    block_.reset(::operator new(static_cast<size_t>(total_), kAlign));
    place_in(block_.get());
  }
  void place_in(void* memory) {
    for (int i = 0; i < count_; ++i) *pieces_[i].pointer = static_cast<char*>(memory) + pieces_[i].offset;
  }

 private:
  static constexpr int kMaxPieces = 16;
  struct Piece {
    void** pointer;
    int64_t offset;
  };
  int64_t element_, total_ = 0;
  Piece pieces_[kMaxPieces];
  int count_ = 0;
  AlignedBytes block_;
};

template <typename F>
inline void for_each_task(int64_t tasks, const F& f) {
  if (tasks == 1) return f(0);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) f(task);
  });
}

inline int64_t element_bytes(DType dtype) { return dtype == DType::f64 ? 8 : 4; }
inline MicroTile micro_of(const KernelTable& table, DType dtype) {
  return dtype == DType::f64 ? table.micro_f64 : table.micro_f32;
}

inline const KernelTable& active_table(const char* op) {
  try {
    return active_kernels();
  } catch (const std::exception& e) {
    STD_TORCH_CHECK(false, op, ": ", e.what());
    throw;
  }
}

inline void reserve_depthwise(Workspace& workspace, const CpuPlan& plan, PackedWeights& packed) {
  workspace.reserve(&packed.dw_weight, plan.taps * plan.mid_columns);
  workspace.reserve(&packed.dw_bias, plan.mid_columns);
}

using PackPanel = void (*)(const PackContext&, int64_t panel);

// pack_depthwise: null for weights in the compute type, which backward and all but the plain forward take.
inline void pack_all(const DTypeKernels& kernels, const PackContext& pack, int64_t pointwise_panels,
                     PackPanel pack_pointwise, PackPanel pack_depthwise = nullptr) {
  if (pack_depthwise == nullptr) pack_depthwise = kernels.pack_depthwise;
  kernels.pack_biases(pack);
  for_each_task(pointwise_panels + pack.plan.mid_columns / pack.plan.micro.columns, [&](int64_t task) {
    if (task < pointwise_panels) {
      pack_pointwise(pack, task);
    } else {
      pack_depthwise(pack, task - pointwise_panels);
    }
  });
}

}  // namespace dsconv
