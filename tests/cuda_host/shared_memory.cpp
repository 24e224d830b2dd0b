#include "shared_memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#if defined(CUDA_HOST_ASAN)
#include <sanitizer/asan_interface.h>
#else
#define __asan_poison_memory_region(address, bytes) static_cast<void>(0)
#define __asan_unpoison_memory_region(address, bytes) static_cast<void>(0)
#endif

namespace cuda_host {
namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kStaticArea = 128 * 1024;  // the arrays, their canaries and alignment
constexpr uint64_t kDynamicArea = SharedMemory::kMaxDynamicBytes + kPage;
constexpr uint64_t kMappingBytes = kPage + kStaticArea + kPage + kDynamicArea + kPage;
constexpr uint64_t kDynamicAlignment = 128;
constexpr unsigned char kCanary = 0xa5;
constexpr unsigned char kNaNByte = 0xff;  // all ones is a NaN in every floating-point type

constexpr uint64_t round_up(uint64_t value, uint64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Byte by byte: the sanitizers' memset and memcmp would look at the poison.
void write_canary(volatile unsigned char* p, uint64_t bytes) {
  for (uint64_t i = 0; i < bytes; ++i) p[i] = kCanary;
}

bool canary_intact(const volatile unsigned char* p, uint64_t bytes) {
  for (uint64_t i = 0; i < bytes; ++i) {
    if (p[i] != kCanary) return false;
  }
  return true;
}

}  // namespace

void SharedMemory::map() {
  const int place = mapping_ == nullptr ? 0 : MAP_FIXED;
  void* const got = mmap(mapping_, kMappingBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | place, -1, 0);
  if (got == MAP_FAILED) std::abort();
  mapping_ = static_cast<unsigned char*>(got);
  constexpr uint64_t kGuards[] = {0, kPage + kStaticArea, kMappingBytes - kPage};
  for (const uint64_t guard : kGuards) {
    if (mprotect(mapping_ + guard, kPage, PROT_NONE) != 0) std::abort();
  }
  std::memset(mapping_ + kPage, kNaNByte, kStaticArea);
}

void SharedMemory::fill(unsigned char* data, uint64_t bytes) {
  __asan_unpoison_memory_region(data, bytes);
  std::memset(data, kNaNByte, bytes);
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
  map();
#endif
  for (int i = 0; i < array_count_; ++i) {
    fill(arrays_[i].data, arrays_[i].bytes);
    write_canary(arrays_[i].data + arrays_[i].bytes, kCanaryBytes);
  }
  if (dynamic_bytes_ > 0) {
    fill(dynamic_, dynamic_bytes_);
    write_canary(dynamic_ - kCanaryBytes, kCanaryBytes);
    write_canary(dynamic_ + dynamic_bytes_, round_up(dynamic_bytes_, kDynamicAlignment) - dynamic_bytes_);
  }
}

bool SharedMemory::end_block() {
  for (int i = 0; i < array_count_; ++i) {
    if (!canary_intact(arrays_[i].data + arrays_[i].bytes, kCanaryBytes)) return false;
  }
  if (dynamic_bytes_ == 0) return true;
  return canary_intact(dynamic_ - kCanaryBytes, kCanaryBytes) &&
         canary_intact(dynamic_ + dynamic_bytes_, round_up(dynamic_bytes_, kDynamicAlignment) - dynamic_bytes_);
}

// Outside a launch the static area is all NaN bytes, so that an array's first user need not fill it.
void SharedMemory::end_launch() { fill(mapping_ + kPage, static_place_); }

void* SharedMemory::static_array(const void* key, uint64_t bytes, uint64_t alignment) {
  for (int i = 0; i < array_count_; ++i) {
    if (arrays_[i].key == key) return arrays_[i].data;
  }
  static_bytes_ = round_up(static_bytes_, alignment) + bytes;
  if (static_bytes_ > kMaxStaticBytes || array_count_ == kMaxArrays) return nullptr;
  unsigned char* const data = mapping_ + kPage + round_up(static_place_, alignment < 16 ? 16 : alignment);
  static_place_ = static_cast<uint64_t>(data - mapping_) - kPage + bytes + kCanaryBytes;
  __asan_unpoison_memory_region(data, bytes);
  write_canary(data + bytes, kCanaryBytes);
  arrays_[array_count_++] = {key, data, bytes};
  return data;
}

}  // namespace cuda_host
