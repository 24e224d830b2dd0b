// The shared memory of the block that runs: one mapping, of static arrays and of dynamic memory.
//
//   | guard page | static arrays, a canary after each | guard page | canary | dynamic memory | canary | guard page |
//
// Both are filled with NaN bits before each block. Dynamic memory ends at the guard page but for the rounding to its
// alignment. Under ASan all but the arrays is poisoned; canaries tell the plain build of small overruns. Under TSan
// each block gets new pages, so that two blocks' use of the same address is no race.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_host {

class SharedMemory {
 public:
  static constexpr uint64_t kMaxStaticBytes = 48 * 1024;
  static constexpr uint64_t kMaxDynamicBytes = 256 * 1024;
  static constexpr uint64_t kPage = 4096;
  static constexpr uint64_t kStaticArea = 128 * 1024;  // the arrays, their canaries and alignment
  static constexpr uint64_t kDynamicArea = kMaxDynamicBytes + kPage;
  static constexpr uint64_t kMappingBytes = kPage + kStaticArea + kPage + kDynamicArea + kPage;

  void begin_launch(uint64_t dynamic_bytes);
  void begin_block();
  // False where a canary was overwritten.
  bool end_block();

  void* dynamic() const { return dynamic_; }
  // Null where the arrays no longer fit in kMaxStaticBytes.
  void* static_array(const void* key, uint64_t bytes, uint64_t alignment);
  const void* mapping() const { return mapping_; }
  uint64_t static_bytes() const { return static_bytes_; }

 private:
  struct Array {
    const void* key;
    unsigned char* data;
    uint64_t bytes;
  };
  static constexpr int kMaxArrays = 64;
  static constexpr uint64_t kCanaryBytes = 64;

  void map();
  void renew(unsigned char* begin, unsigned char* end);
  static void prepare(const Array& array);

  unsigned char* mapping_ = nullptr;
  unsigned char* dynamic_ = nullptr;
  uint64_t dynamic_bytes_ = 0;
  uint64_t static_bytes_ = 0;  // as CUDA counts them
  uint64_t static_place_ = 0;  // where the next array goes
  Array arrays_[kMaxArrays];
  int array_count_ = 0;
};

}  // namespace cuda_host
