// Large blocks of fresh memory in pages of 2 MiB, where the system gives them to who asks. A page of 4 KiB costs a
// fault when it is first written to, which for a tensor of tens of megabytes takes longer than to compute it: measured,
// 64 MiB from the C library are written in 21 to 33 ms, and in 3 ms so. What is asked is a wish, and lasts as long as
// the mapping: memory that the C library hands out again keeps its pages.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dsconv {

inline void ask_for_huge_pages([[maybe_unused]] void* block, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  constexpr int64_t kLeast = int64_t{4} << 20;  // below that the C library keeps what is freed
  if (bytes < kLeast) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(block);
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace dsconv
