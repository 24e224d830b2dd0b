// Fibers: stacks that one host thread switches between. Each CUDA thread of a block is one.
//
// With CUDA_HOST_ASAN or CUDA_HOST_TSAN defined the sanitizer's runtime is told of every switch. To TSan each fiber is
// a thread of its own, and a switch orders nothing.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#define CUDA_HOST_UCONTEXT 1
#endif

#if defined(CUDA_HOST_UCONTEXT)
#include <ucontext.h>
#endif

namespace cuda_host {

class Fiber {
 public:
  using Entry = void (*)();

  void allocate(int index);   // once: the stack, with a guard page below it
  void start(Entry entry);    // the next resume() enters `entry`, which must not return but call leave()
  void resume();              // from the scheduler, until the fiber yields or leaves
  void yield();               // from the fiber, back to the scheduler
  [[noreturn]] void leave();  // as yield, for good
  void abandon();             // it was stopped halfway and will never be resumed, only started again

 private:
  void to_scheduler(bool for_good);

  char* stack_ = nullptr;
  std::size_t color_ = 0;
#if defined(CUDA_HOST_UCONTEXT)
  ucontext_t context_{}, scheduler_{};
#else
  void* context_ = nullptr;
  void* scheduler_ = nullptr;
#endif
#if defined(CUDA_HOST_ASAN)
  const void* scheduler_stack_ = nullptr;
  std::size_t scheduler_stack_bytes_ = 0;
  void* fake_stack_ = nullptr;
  static void entered(Fiber* fiber);
#endif
#if defined(CUDA_HOST_TSAN)
  void* tsan_ = nullptr;
  void* tsan_scheduler_ = nullptr;
#endif
  Entry entry_ = nullptr;
  static void trampoline();
};

}  // namespace cuda_host
