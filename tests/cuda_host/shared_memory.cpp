#include "shared_memory.h"

#include <sys/mman.h>

#include <cstdlib>

#if defined(CUDA_HOST_ASAN)
#include <sanitizer/asan_interface.h>
#else
#define __asan_poison_memory_region(address, bytes) static_cast<void>(0)
#define __asan_unpoison_memory_region(address, bytes) static_cast<void>(0)
#endif

namespace cuda_host {
namespace {

constexpr uint64_t kPage = SharedMemory::kPage, kStaticArea = SharedMemory::kStaticArea;
constexpr uint64_t kDynamicArea = SharedMemory::kDynamicArea, kMappingBytes = SharedMemory::kMappingBytes;
constexpr uint64_t kDynamicAlignment = 128;
constexpr unsigned char kCanary = 0xa5;
constexpr unsigned char kNaNByte = 0xff;  // all ones is a NaN in every floating-point type

constexpr uint64_t round_up(uint64_t value, uint64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// In loops that are compiled to stores and loads: the sanitizers' memset and memcmp would look at the poison, and TSan
// would take them for the running thread's own accesses.
void fill_bytes(unsigned char* p, uint64_t bytes, unsigned char value) {
  for (uint64_t i = 0; i < bytes; ++i) p[i] = value;
}

bool canary_intact(const unsigned char* p, uint64_t bytes) {
  for (uint64_t i = 0; i < bytes; ++i) {
    if (p[i] != kCanary) return false;
  }
  return true;
}

}  // namespace

void SharedMemory::map() {
  void* const got = mmap(nullptr, kMappingBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (got == MAP_FAILED) std::abort();
  mapping_ = static_cast<unsigned char*>(got);
  constexpr uint64_t kGuards[] = {0, kPage + kStaticArea, kMappingBytes - kPage};
  for (const uint64_t guard : kGuards) {
    if (mprotect(mapping_ + guard, kPage, PROT_NONE) != 0) std::abort();
  }
}

#if defined(CUDA_HOST_TSAN)
// Puts new pages under what the last block used.
void SharedMemory::renew(unsigned char* begin, unsigned char* end) {
  unsigned char* const page = begin - reinterpret_cast<uintptr_t>(begin) % kPage;
  if (begin == end) return;
  const uint64_t bytes = static_cast<uint64_t>(end - page);
  const void* const got = mmap(page, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  if (got != page) std::abort();
}
#endif

void SharedMemory::prepare(const Array& array) {
  __asan_unpoison_memory_region(array.data, array.bytes);
  fill_bytes(array.data, array.bytes, kNaNByte);
  fill_bytes(array.data + array.bytes, kCanaryBytes, kCanary);
}

void SharedMemory::begin_launch(uint64_t dynamic_bytes) {
  if (mapping_ == nullptr) map();
  array_count_ = 0;
  static_bytes_ = static_place_ = 0;
  dynamic_bytes_ = dynamic_bytes;
  dynamic_ = mapping_ + kMappingBytes - kPage - round_up(dynamic_bytes, kDynamicAlignment);
  __asan_poison_memory_region(mapping_ + kPage, kStaticArea);
  __asan_poison_memory_region(mapping_ + kPage + kStaticArea + kPage, kDynamicArea);
}

void SharedMemory::begin_block() {
#if defined(CUDA_HOST_TSAN)
  renew(mapping_ + kPage, mapping_ + kPage + static_place_);
  renew(dynamic_, dynamic_ + dynamic_bytes_);
#endif
  for (int i = 0; i < array_count_; ++i) prepare(arrays_[i]);
  if (dynamic_bytes_ == 0) return;
  __asan_unpoison_memory_region(dynamic_, dynamic_bytes_);
  fill_bytes(dynamic_, dynamic_bytes_, kNaNByte);
  fill_bytes(dynamic_ - kCanaryBytes, kCanaryBytes, kCanary);
  fill_bytes(dynamic_ + dynamic_bytes_, round_up(dynamic_bytes_, kDynamicAlignment) - dynamic_bytes_, kCanary);
}

bool SharedMemory::end_block() {
  for (int i = 0; i < array_count_; ++i) {
    if (!canary_intact(arrays_[i].data + arrays_[i].bytes, kCanaryBytes)) return false;
  }
  if (dynamic_bytes_ == 0) return true;
  return canary_intact(dynamic_ - kCanaryBytes, kCanaryBytes) &&
         canary_intact(dynamic_ + dynamic_bytes_, round_up(dynamic_bytes_, kDynamicAlignment) - dynamic_bytes_);
}

void* SharedMemory::static_array(const void* key, uint64_t bytes, uint64_t alignment) {
  for (int i = 0; i < array_count_; ++i) {
    if (arrays_[i].key == key) return arrays_[i].data;
  }
  static_bytes_ = round_up(static_bytes_, alignment) + bytes;
  if (static_bytes_ > kMaxStaticBytes || array_count_ == kMaxArrays) return nullptr;
  unsigned char* const data = mapping_ + kPage + round_up(static_place_, alignment < 16 ? 16 : alignment);
  static_place_ = static_cast<uint64_t>(data - mapping_) - kPage + bytes + kCanaryBytes;
  arrays_[array_count_] = {key, data, bytes};
  prepare(arrays_[array_count_++]);
  return data;
}

}  // namespace cuda_host
