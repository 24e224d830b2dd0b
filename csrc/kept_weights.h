// Packed weights that outlive a call. Python owns the memory, one uint8 tensor per module, and hands it to every call
// that may use it; here is what lies in it, and who may read or write it when. Torch-free.
//
//   [KeptHeader | packed weights, as cpu_kernels.h has them]
//
// What lies there is good for a call whose key equals the one it was packed under. The key holds everything that the
// packed bytes follow from: the kernels, the sizes, the panels of the plan, where the weights lie, the sum of their
// version counters, and a fingerprint of their contents, for those who write without touching a version counter
// (weight.data, numpy, shared memory). A call whose key differs packs anew, in place where it is alone and where the
// panels fit, else into memory of its own. So a buffer is never wrong, and nobody waits for anybody.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#include "cpu/cpu_plan.h"
#include "params.h"

namespace dsconv {

// Eight-byte members only: keys are compared as bytes.
struct KeptKey {
  const void* kernels;  // of an instruction set and a dtype
  int64_t c_in, c_mid, c_out, taps, tap_pairs, by_planes;
  MicroTile micro;
  int64_t mid_columns, out_columns;
  const void *dw_weight, *dw_bias, *pw_weight, *pw_bias;
  int64_t version;
  uint64_t fingerprint;
};

inline bool same_key(const KeptKey& a, const KeptKey& b) { return std::memcmp(&a, &b, sizeof(KeptKey)) == 0; }

struct alignas(kCacheLine) KeptHeader {
  uint64_t magic;
  CallArguments arguments;     // of the module
  int64_t weight_sizes[5];     // c_mid, kernel_d, kernel_h, kernel_w, c_out that these arguments go with
  int64_t capacity;            // bytes behind the header
  KeptKey key;                 // of what lies there
  std::atomic<int32_t> users;  // calls that read; -1 while one writes
};

constexpr uint64_t kKeptMagic = 0x64736b6570740001;  // "dskept", and the version of this layout

// ---- the fingerprint
// -------------------------------------------------------------------------------------------------

// Through the rows of a matrix, per_row lines in each, and at the same time through the lines of a row.
struct Walk {
  const char* row;
  int64_t row_bytes, lines, per_row, line = 0, in_row = 0;

  const char* next() {
    const int64_t offset = line * kCacheLine, last = row_bytes - kCacheLine;
    const char* address = row + (offset < last ? offset : last);
    line = line + 1 < lines ? line + 1 : 0;
    if (++in_row == per_row) {
      in_row = 0;
      row += row_bytes;
    }
    return address;
  }
};

// Eight sums, one for each word of a line. 3 is odd, so that no single difference is lost.
struct LineSums {
  uint64_t sum[8] = {};

  void add(const void* line) {
    uint64_t word[8];
    std::memcpy(word, line, sizeof(word));
    for (int i = 0; i < 8; ++i) sum[i] = sum[i] * 3 + word[i];
  }
  void add_whole(const char* data, int64_t bytes) {
    for (; bytes >= kCacheLine; data += kCacheLine, bytes -= kCacheLine) add(data);
    char rest[kCacheLine] = {};
    std::memcpy(rest, data, static_cast<size_t>(bytes));
    add(rest);
  }
  // Whole where that is little. Of a large matrix one cache line of each row at least, the lines moving along from row
  // to row so that every column is met: reading all of it would take as long as packing it.
  void add_matrix(const void* matrix, int64_t rows, int64_t row_bytes) {
    constexpr int64_t kWhole = 16 << 10, kShortRow = 2 * kCacheLine, kLeastLines = kWhole / kCacheLine;
    const char* data = static_cast<const char*>(matrix);
    if (data == nullptr) return add_whole("", 1);
    if (rows * row_bytes <= kWhole || row_bytes < kShortRow) return add_whole(data, rows * row_bytes);
    const int64_t lines = ceil_div(row_bytes, kCacheLine);
    const int64_t per_row = ceil_div(lines > kLeastLines ? lines : kLeastLines, rows);
    // Every line is in a page of its own: the next ones are called for in time.
    constexpr int64_t kAhead = 24;
    Walk here{data, row_bytes, lines, per_row}, ahead = here;
    for (int64_t i = 0; i < rows * per_row + kAhead; ++i) {
      if (i < rows * per_row) __builtin_prefetch(ahead.next());
      if (i >= kAhead) add(here.next());
    }
  }
  uint64_t total() const {
    uint64_t h = 0;
    for (const uint64_t s : sum) h = (h ^ s ^ (s >> 32)) * 0x9e3779b97f4a7c15;
    return h;
  }
};

inline uint64_t fingerprint(const ForwardParams& p, int64_t element) {
  const Geometry& g = p.geom;
  LineSums sums;
  sums.add_matrix(p.pw_weight, g.c_out, g.c_mid * element);
  sums.add_matrix(p.dw_weight, g.c_mid, g.kernel_d * g.kernel_h * g.kernel_w * element);
  sums.add_matrix(p.dw_bias, 1, g.c_mid * element);
  sums.add_matrix(p.pw_bias, 1, g.c_out * element);
  return sums.total();
}

// ---- use
// -------------------------------------------------------------------------------------------------------------

// The packed weights of one call: `memory` to read them from, or null; where `to_pack`, the call has to write them
// first and to say so.
class KeptUse {
 public:
  KeptUse(KeptHeader* header, const KeptKey& key, int64_t bytes) : header_(header) {
    if (header == nullptr || bytes > header->capacity) return;
    std::atomic<int32_t>& users = header->users;
    for (int32_t n = users.load(std::memory_order_relaxed); n >= 0;) {
      if (!users.compare_exchange_weak(n, n + 1, std::memory_order_acquire, std::memory_order_relaxed)) continue;
      if (same_key(header->key, key)) {
        held_ = true;
        memory_ = header + 1;
        return;
      }
      users.fetch_sub(1, std::memory_order_release);
      break;
    }
    int32_t nobody = 0;
    if (!users.compare_exchange_strong(nobody, -1, std::memory_order_acquire, std::memory_order_relaxed)) return;
    header->key = {};  // fits no call, in case packing does not come to its end
    held_ = to_pack_ = true;
    memory_ = header + 1;
  }
  KeptUse(const KeptUse&) = delete;
  KeptUse& operator=(const KeptUse&) = delete;
  ~KeptUse() {
    if (!held_) return;
    if (to_pack_) {
      header_->users.store(0, std::memory_order_release);
    } else {
      header_->users.fetch_sub(1, std::memory_order_release);
    }
  }

  void* memory() const { return memory_; }
  bool to_pack() const { return memory_ == nullptr || to_pack_; }
  void packed(const KeptKey& key) {
    if (!to_pack_) return;
    header_->key = key;
    to_pack_ = false;
    header_->users.store(1, std::memory_order_release);
  }

 private:
  KeptHeader* header_;
  void* memory_ = nullptr;
  bool held_ = false, to_pack_ = false;
};

}  // namespace dsconv
