#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#if defined(CUDA_HOST_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(CUDA_HOST_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace cuda_host {
namespace {

constexpr std::size_t kPage = 4096;
#if defined(CUDA_HOST_ASAN) || defined(CUDA_HOST_TSAN)
constexpr std::size_t kStackBytes = 256 * 1024;  // instrumented frames are several times larger
#else
constexpr std::size_t kStackBytes = 64 * 1024;
#endif

Fiber* entering = nullptr;  // the fiber that resume() is about to enter

}  // namespace

#if !defined(CUDA_HOST_UCONTEXT)
// Saves the callee-saved registers on the current stack, its pointer in *from, and takes up the stack `to`.
extern "C" void cuda_host_switch(void** from, void* to);
asm(R"(
  .text
  .globl cuda_host_switch
  .hidden cuda_host_switch
  .type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cuda_host_switch, . - cuda_host_switch
)");
#endif

void Fiber::allocate(int index) {
  void* const mapping = mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED || mprotect(mapping, kPage, PROT_NONE) != 0) std::abort();
  stack_ = static_cast<char*>(mapping) + kPage;
  // Stacks of the block's threads are a few cache lines apart beyond the page, so that their hot frames do not all fall
  // on the same cache sets.
  color_ = static_cast<std::size_t>(index) * 5 % 64 * 64;
#if defined(CUDA_HOST_TSAN)
  tsan_ = __tsan_create_fiber(0);
#endif
}

void Fiber::start(Entry entry) {
  entry_ = entry;
#if defined(CUDA_HOST_ASAN)
  fake_stack_ = nullptr;
#endif
#if defined(CUDA_HOST_UCONTEXT)
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes - color_;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::trampoline, 0);
#else
  // Six registers and the return address, as cuda_host_switch pops them. The trampoline then finds the stack aligned as
  // after a call: a multiple of 16, less 8.
  void** top = reinterpret_cast<void**>(stack_ + kStackBytes - color_ - 72);
  top[0] = nullptr;
  top[-1] = reinterpret_cast<void*>(&Fiber::trampoline);
  for (int i = 2; i <= 7; ++i) top[-i] = nullptr;
  context_ = top - 7;
#endif
}

void Fiber::resume() {
  entering = this;
#if defined(CUDA_HOST_TSAN)
  tsan_scheduler_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(CUDA_HOST_ASAN)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, stack_, kStackBytes);
#endif
#if defined(CUDA_HOST_UCONTEXT)
  swapcontext(&scheduler_, &context_);
#else
  cuda_host_switch(&scheduler_, context_);
#endif
#if defined(CUDA_HOST_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void Fiber::to_scheduler(bool for_good) {
#if defined(CUDA_HOST_TSAN)
  __tsan_switch_to_fiber(tsan_scheduler_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(CUDA_HOST_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, scheduler_stack_, scheduler_stack_bytes_);
#else
  static_cast<void>(for_good);
#endif
#if defined(CUDA_HOST_UCONTEXT)
  swapcontext(&context_, &scheduler_);
#else
  cuda_host_switch(&context_, scheduler_);
#endif
#if defined(CUDA_HOST_ASAN)
  entered(this);
#endif
}

#if defined(CUDA_HOST_ASAN)
void Fiber::entered(Fiber* fiber) {
  __sanitizer_finish_switch_fiber(fiber->fake_stack_, &fiber->scheduler_stack_, &fiber->scheduler_stack_bytes_);
}
#endif

void Fiber::yield() { to_scheduler(false); }

void Fiber::leave() {
  to_scheduler(true);
  std::abort();  // a finished fiber was resumed
}

void Fiber::abandon() {
#if defined(CUDA_HOST_ASAN)
  __asan_unpoison_memory_region(stack_, kStackBytes);  // of its frames
#endif
#if defined(CUDA_HOST_TSAN)
  // Its end is the end of the kernel to whoever waits for that: switch there and back, this time with order.
  void* const scheduler = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_, 0);
  __tsan_switch_to_fiber(scheduler, 0);
  __tsan_destroy_fiber(tsan_);  // its call stack was not unwound
  tsan_ = __tsan_create_fiber(0);
#endif
}

void Fiber::trampoline() {
#if defined(CUDA_HOST_ASAN)
  entered(entering);
#endif
  entering->entry_();
  std::abort();  // the entry must leave(), not return
}

}  // namespace cuda_host
