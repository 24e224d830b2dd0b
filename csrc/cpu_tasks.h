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

// Memory that grows, and stays with its thread.
class ThreadMemory {
 public:
  void* get(int64_t bytes) {
    if (size_ < bytes) {
      buffer_.reset();
      size_ = 0;
      buffer_.reset(::operator new(static_cast<size_t>(bytes), kAlign));
      // Lanes past a tensor's last channel, which kernels compute and drop, start as numbers.
      std::memset(buffer_.get(), 0, static_cast<size_t>(bytes));
      size_ = bytes;
    }
    return buffer_.get();
  }

 private:
  AlignedBytes buffer_;
  int64_t size_ = 0;
};

// Of one task.
inline void* thread_scratch(int64_t bytes) {
  thread_local ThreadMemory memory;
  return memory.get(bytes);
}

// Of one call: what run_with_copies makes.
inline void* thread_copy(int64_t bytes) {
  thread_local ThreadMemory memory;
  return memory.get(bytes);
}

// The memory of the calls that a thread makes, up to kMost: handed out in order, and all given back when nothing of it
// is in use. So equal calls find their workspace where it was, and each thread its part of it in its own caches.
class CallMemory {
 public:
  static CallMemory& of_this_thread() {
    thread_local CallMemory memory;
    return memory;
  }
  // Null where there is no room.
  void* take(int64_t bytes) {
    wanted_ = used_ + bytes > wanted_ ? used_ + bytes : wanted_;
    if (users_ == 0 && wanted_ > size_ && bytes <= kMost) {
      const int64_t size = wanted_ < kMost ? wanted_ : kMost;
      buffer_.reset();
      size_ = 0;
      buffer_.reset(::operator new(static_cast<size_t>(size), kAlign));
      size_ = size;
    }
    if (used_ + bytes > size_) return nullptr;
    void* const memory = static_cast<char*>(buffer_.get()) + used_;
    used_ += bytes;
    ++users_;
    return memory;
  }
  void give_back() {
    if (--users_ == 0) used_ = 0;
  }

 private:
  static constexpr int64_t kMost = 8 << 20;
  AlignedBytes buffer_;
  int64_t size_ = 0, used_ = 0, wanted_ = 0;
  int users_ = 0;
};

// What lives for one call: packed weights, partial sums, du. One block, cut into cache-line aligned pieces, to which
// pointers of the call's context go. Lives and dies on one thread.
class Workspace {
 public:
  explicit Workspace(int64_t element) : element_(element) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (borrowed_) CallMemory::of_this_thread().give_back();
  }
  void reserve(void** pointer, int64_t elements) {
    STD_TORCH_CHECK(count_ < kMaxPieces, "dsconv_cuda: a workspace of too many pieces");
    pieces_[count_++] = {pointer, total_};
    total_ += round_up(elements * element_, kCacheLine);
  }
  int64_t element() const { return element_; }
  int64_t bytes() const { return total_; }
  void allocate() {
    void* memory = CallMemory::of_this_thread().take(total_);
    borrowed_ = memory != nullptr;
    if (!borrowed_) {
      block_.reset(::operator new(static_cast<size_t>(total_), kAlign));
      memory = block_.get();
      ask_for_huge_pages(memory, total_);
    }
    place_in(memory);
  }
  void place_in(void* memory) const {
    for (int i = 0; i < count_; ++i) *pieces_[i].pointer = static_cast<char*>(memory) + pieces_[i].offset;
  }
  // The pointers of `copy`, a copy of the context `of` in which all pointers are that were reserved for.
  template <typename Context>
  void place_in(void* memory, const Context& of, Context& copy) const {
    for (int i = 0; i < count_; ++i) {
      const auto member = reinterpret_cast<const char*>(pieces_[i].pointer) - reinterpret_cast<const char*>(&of);
      *reinterpret_cast<void**>(reinterpret_cast<char*>(&copy) + member) =
          static_cast<char*>(memory) + pieces_[i].offset;
    }
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
  bool borrowed_ = false;
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

// Whether forward takes the way of cpu/forward_planes.inl. folded: with a norm in the depthwise weights.
inline bool goes_by_planes(const ForwardParams& p, const DTypeKernels& kernels, bool folded = false) {
  return may_go_by_planes(kernels, p.geom, p.x_layout) && p.y_layout == Layout::nchw && p.pre == nullptr &&
         is_clamp(p.out_act) && planes_pay_for_forward(p.geom, kernels.bytes, folded);
}

// Whether backward may take that of cpu/backward_planes.inl.
inline bool goes_back_by_planes(const BackwardParams& p, const DTypeKernels& kernels) {
  return may_go_by_planes(kernels, p.geom, p.x_layout) && (p.grad_x == nullptr || p.grad_x_layout == Layout::nchw) &&
         planes_pay_for_backward(p.geom, kernels.bytes);
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

// The panels `pointwise` of the pointwise weights and all of the depthwise ones; pack_depthwise: null for weights in
// the compute type, which backward and all but the plain forward take.
inline void pack_all(const DTypeKernels& kernels, const PackContext& pack, Range pointwise, PackPanel pack_pointwise,
                     PackPanel pack_depthwise = nullptr) {
  if (pack_depthwise == nullptr) pack_depthwise = kernels.pack_depthwise;
  kernels.pack_biases(pack);
  const int64_t panels = pointwise.end - pointwise.begin;
  for_each_task(panels + pack.plan.mid_columns / pack.plan.micro.columns, [&](int64_t task) {
    if (task < panels) {
      pack_pointwise(pack, pointwise.begin + task);
    } else {
      pack_depthwise(pack, task - panels);
    }
  });
}

// What one core has written is dear for another to read, and dearer to write again while both hold it: between two
// chiplets 400 ns a line. So what a call makes for all its tasks to read, its `pieces`, each thread makes for itself,
// in memory that stays its own, unless that is much work beside what it does with it: making an element takes as long
// as some 12 of the `uses` that the whole call has for it, multiply-adds.
//
// make(context, begin, end) fills the pieces for the tasks begin .. end; then kernel(context, task, scratch).
template <typename Context, typename Make, typename Kernel>
inline void run_with_copies(Context& ctx, Workspace& pieces, int64_t uses, int64_t tasks, const Make& make,
                            const Kernel& kernel) {
  constexpr int64_t kUsesWorthACopy = 100, kMostBytes = 8 << 20;
  const int64_t threads = torch::stable::get_num_threads();
  const auto run = [&](const Context& own, int64_t task) { kernel(own, task, thread_scratch(own.plan.scratch_bytes)); };
  if (pieces.bytes() > kMostBytes || (threads > 2 && uses < kUsesWorthACopy * threads)) {
    pieces.allocate();
    make(ctx, 0, tasks);
    return for_each_task(tasks, [&](int64_t task) { run(ctx, task); });
  }
  const auto stretch = [&](int64_t begin, int64_t end) {
    Context own = ctx;
    pieces.place_in(thread_copy(pieces.bytes()), ctx, own);
    make(own, begin, end);
    for (int64_t task = begin; task < end; ++task) run(own, task);
  };
  if (threads == 1 || tasks == 1) return stretch(0, tasks);
  torch::stable::parallel_for(0, tasks, 1, stretch);
}

}  // namespace dsconv
