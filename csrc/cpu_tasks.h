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
  int64_t element() const { return element_; }
  int64_t bytes() const { return total_; }
  // The pointers go to the first of the copies, each bytes() behind the one before.
  void allocate(int64_t copies = 1) {
    block_.reset(::operator new(static_cast<size_t>(copies * total_), kAlign));
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

// ---- memory that each thread has for itself ----
//
// What one core has written is dear for another to read, and dearer to write again while both hold it: 400 ns a line
// between cores of two chiplets. So what a call makes for all its tasks to read, each thread makes for itself, in one
// of `copies` pieces of memory, unless that is much work beside what it does with it.

// `uses`: multiply-adds of the whole call for each element that is made. Making one takes as long as some 12 of them.
inline int64_t copies_for(int64_t uses) {
  constexpr int64_t kUsesWorthACopy = 100;
  const int64_t threads = torch::stable::get_num_threads();
  return threads <= 2 || uses >= kUsesWorthACopy * threads ? threads : 1;
}

// From the first copy to another one.
inline void move_pointer(int64_t offset, void*& pointer) {
  if (pointer != nullptr) pointer = static_cast<char*>(pointer) + offset;
}
inline void move_copy(int64_t offset, PackedWeights& packed) {
  move_pointer(offset, packed.dw_weight);
  move_pointer(offset, packed.dw_bias);
  move_pointer(offset, packed.pw_forward);
  move_pointer(offset, packed.pw_bias);
}
inline void move_copy(int64_t offset, ForwardContext& ctx) { move_copy(offset, ctx.packed); }
inline void move_copy(int64_t offset, MomentsContext& ctx) { move_copy(offset, ctx.packed); }
inline void move_copy(int64_t offset, BackwardContext& ctx) {
  move_pointer(offset, ctx.packed.pw_backward);
  if (ctx.plan.panels == 0) return;
  move_pointer(offset, ctx.g_rows);
  move_pointer(offset, ctx.g_pixels);
  move_pointer(offset, ctx.bias_partial);
}

// make(context) fills the memory, once for all threads or once for each; then kernel(context, task, scratch).
template <typename Context, typename Make, typename Kernel>
inline void run_with_copies(const Context& ctx, int64_t copies, int64_t copy_bytes, int64_t tasks, const Make& make,
                            const Kernel& kernel) {
  const auto stretch = [&](const Context& own, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) kernel(own, task, thread_scratch(ctx.plan.scratch_bytes));
  };
  const int64_t threads = torch::stable::get_num_threads();
  if (copies == 1 || tasks == 1 || threads == 1) {
    make(ctx);
    return for_each_task(tasks, [&](int64_t task) { stretch(ctx, task, task + 1); });
  }
  // Stretches of equal length, as parallel_for cuts them, so that a thread finds its copy of the call before.
  const int64_t length = ceil_div(tasks, threads < tasks ? threads : tasks);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Context own = ctx;
    move_copy(begin / length * copy_bytes, own);
    make(own);
    stretch(own, begin, end);
  });
}

}  // namespace dsconv
