// The hooks that instrumented kernels call, and what is made of them (counters.h).

#include "counters.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <unordered_map>
#include <utility>

namespace cuda_host {
namespace {

constexpr int kLanes = 32, kMaxThreads = 1024;
constexpr uint64_t kSector = 32, kBanks = 32, kWord = 4;

enum Kind : uint8_t { global_read, global_write, shared_read, shared_write };

struct Access {
  uint64_t key;
  uintptr_t address;
  uint32_t bytes;
  int16_t tensor;
  Kind kind;
};

uint64_t mix(uint64_t a, uint64_t b) {
  uint64_t h = (a ^ b) * 0x9e3779b97f4a7c15u;
  h = (h ^ h >> 32) * 0xd6e8feb86659fd93u;
  return h ^ h >> 32;
}

struct Loop {
  uintptr_t header;
  uintptr_t* end;  // the last block from which it was seen to jump back, shared by all threads
  uint64_t outer;  // the hash of the loops around it
  uint32_t iteration;

  uint64_t hash() const { return mix(outer, mix(header, iteration)); }
};

struct Lane {
  std::vector<Loop> loops;
  uintptr_t block = 0;   // the basic block it is in
  uint64_t place = 0;    // the hash of `loops`
  uint64_t entered = 0;  // basic blocks so far: stores of one block may be merged
  uint64_t last_entered = ~uint64_t{0};
  std::vector<Access> accesses;
};

struct Tensor {
  std::string name;
  uintptr_t begin, end;
  std::vector<uint32_t> seen;  // by sector: the number of the last block that touched it
};

Lane lanes[kMaxThreads];
Lane* current = nullptr;
bool counting = false;
int threads = 0;
uint64_t most_blocks = 0;
uint32_t block_number = 0;
uintptr_t shared_begin = 0, shared_end = 0;
std::vector<Tensor> tensors;
std::vector<KernelTraffic> launches;
std::unordered_map<uintptr_t, uintptr_t> loop_ends;

inline void enter_block(uintptr_t block) {
  Lane& lane = *current;
  auto& loops = lane.loops;
  if (block <= lane.block) {
    while (!loops.empty() && loops.back().header > block) loops.pop_back();
    if (loops.empty() || loops.back().header != block) {
      loops.push_back({block, &loop_ends[block], loops.empty() ? 0 : loops.back().hash(), 0});
    }
    Loop& loop = loops.back();
    ++loop.iteration;
    if (*loop.end < lane.block) *loop.end = lane.block;
  } else {
    while (!loops.empty() && block > *loops.back().end) loops.pop_back();
  }
  lane.block = block;
  ++lane.entered;
}

void record(uintptr_t place, uintptr_t address, uint32_t bytes, bool write) {
  Lane& lane = *current;
  Kind kind;
  int16_t tensor = -1;
  if (address >= shared_begin && address < shared_end) {
    kind = write ? shared_write : shared_read;
  } else {
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      if (address >= tensors[i].begin && address < tensors[i].end) tensor = static_cast<int16_t>(i);
    }
    if (tensor < 0) return;
    kind = write ? global_write : global_read;
  }
  // A vector that is made of its elements and stored is one store to nvcc, which knows its alignment.
  if (write && lane.last_entered == lane.entered && !lane.accesses.empty()) {
    Access& last = lane.accesses.back();
    if (last.kind == kind && last.address + last.bytes == address && last.address % 16 + last.bytes + bytes <= 16) {
      last.bytes += bytes;
      return;
    }
  }
  lane.last_entered = lane.entered;
  lane.accesses.push_back(
      {mix(place, lane.loops.empty() ? 0 : lane.loops.back().hash()), address, bytes, tensor, kind});
}

// ----------------------------------------------------------------------------------------------- one warp instruction

struct Instruction {
  uint64_t key;
  std::size_t slot;
  Kind kind;
  int16_t tensor;
  uint32_t bytes;
  uint32_t mask;
  uintptr_t address[kLanes];
};

void count_sectors(const Instruction& i, KernelTraffic& traffic) {
  uint64_t sectors[2 * kLanes];
  int count = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((i.mask >> lane & 1) == 0) continue;
    const uint64_t first = i.address[lane] / kSector, last = (i.address[lane] + i.bytes - 1) / kSector;
    if (count == 0 || sectors[count - 1] != first) sectors[count++] = first;
    if (last != first) sectors[count++] = last;
  }
  std::sort(sectors, sectors + count);
  count = static_cast<int>(std::unique(sectors, sectors + count) - sectors);
  TensorTraffic& of = traffic.tensors[static_cast<std::size_t>(i.tensor)];
  Tensor& tensor = tensors[static_cast<std::size_t>(i.tensor)];
  (i.kind == global_write ? of.written_sectors : of.read_sectors) += static_cast<uint64_t>(count);
  ++of.requests;
  for (int k = 0; k < count; ++k) {
    uint32_t& seen = tensor.seen[sectors[k] - tensor.begin / kSector];
    of.block_sectors += seen != block_number;
    seen = block_number;
  }
}

void count_wavefronts(const Instruction& i, KernelTraffic& traffic) {
  const int group = i.bytes > 8 ? 8 : i.bytes > 4 ? 16 : 32;
  uint64_t taken = 0, needed = 0;
  for (int first = 0; first < kLanes; first += group) {
    uintptr_t words[kLanes * 4];
    int count = 0;
    for (int lane = first; lane < first + group; ++lane) {
      if ((i.mask >> lane & 1) == 0) continue;
      const uintptr_t end = (i.address[lane] + i.bytes - 1) / kWord;
      for (uintptr_t word = i.address[lane] / kWord; word <= end; ++word) words[count++] = word;
    }
    if (count == 0) continue;
    std::sort(words, words + count);
    count = static_cast<int>(std::unique(words, words + count) - words);
    int in_bank[kBanks] = {}, fullest = 0;
    for (int k = 0; k < count; ++k) fullest = std::max(fullest, ++in_bank[words[k] % kBanks]);
    taken += static_cast<uint64_t>(fullest);
    ++needed;
  }
  const bool write = i.kind == shared_write;
  (write ? traffic.store_wavefronts : traffic.load_wavefronts) += taken;
  (write ? traffic.free_store_wavefronts : traffic.free_load_wavefronts) += needed;
}

// Open addressing; emptied after each use.
class Instructions {
 public:
  void add(const Access& access, int lane) {
    // The kinds of one place are apart: an asynchronous copy reads and writes. A lane that comes to a key again (a loop
    // that was not recognised) is at another instruction.
    const uint64_t key = mix(access.key, static_cast<uint64_t>(access.kind) + 1);
    Instruction* i = &find(key, access);
    for (uint64_t again = 1; (i->mask >> lane & 1) != 0; ++again) i = &find(mix(key, again), access);
    i->bytes = std::max(i->bytes, access.bytes);
    i->mask |= 1u << lane;
    i->address[lane] = access.address;
  }
  template <typename Visit>
  void take(Visit visit) {
    for (const Instruction& i : all_) {
      visit(i);
      slots_[i.slot] = 0;
    }
    all_.clear();
  }

 private:
  std::size_t slot_of(uint64_t key) const {
    std::size_t slot = key & (slots_.size() - 1);
    while (slots_[slot] != 0 && all_[slots_[slot] - 1].key != key) slot = (slot + 1) & (slots_.size() - 1);
    return slot;
  }
  Instruction& find(uint64_t key, const Access& a) {
    if (2 * (all_.size() + 1) > slots_.size()) grow();
    const std::size_t slot = slot_of(key);
    if (slots_[slot] == 0) {
      all_.push_back({key, slot, a.kind, a.tensor, 0, 0, {}});
      slots_[slot] = static_cast<uint32_t>(all_.size());
    }
    return all_[slots_[slot] - 1];
  }
  void grow() {
    slots_.assign(std::max<std::size_t>(1024, 2 * slots_.size()), 0);
    for (std::size_t i = 0; i < all_.size(); ++i) {
      all_[i].slot = slot_of(all_[i].key);
      slots_[all_[i].slot] = static_cast<uint32_t>(i + 1);
    }
  }

  std::vector<Instruction> all_;
  std::vector<uint32_t> slots_;
};

Instructions instructions;

}  // namespace

// ------------------------------------------------------------------------------------------------ the driver's side

void count_tensor(std::string name, const void* data, uint64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  if (bytes == 0) return;
  const uint64_t sectors = (begin + bytes - 1) / kSector - begin / kSector + 1;
  tensors.push_back({std::move(name), begin, begin + bytes, std::vector<uint32_t>(sectors, 0)});
}

void forget_tensors() { tensors.clear(); }

void count_blocks(uint64_t most) { most_blocks = most; }

std::vector<KernelTraffic> take_traffic() { return std::exchange(launches, {}); }

// ------------------------------------------------------------------------------------------------- the engine's side

void count_launch(const void* kernel, uint64_t blocks, uint64_t thread_count, uint64_t dynamic_shared) {
  Dl_info info{};
  KernelTraffic traffic;
  if (dladdr(kernel, &info) != 0 && info.dli_sname != nullptr) traffic.symbol = info.dli_sname;
  traffic.blocks = blocks;
  traffic.threads = thread_count;
  traffic.dynamic_shared = dynamic_shared;
  for (const Tensor& tensor : tensors) traffic.tensors.push_back({tensor.name});
  launches.push_back(std::move(traffic));
  threads = static_cast<int>(thread_count);
}

std::vector<uint64_t> blocks_to_run(uint64_t blocks) {
  std::vector<uint64_t> chosen;
  if (most_blocks == 0) return chosen;
  if (blocks <= most_blocks) {
    for (uint64_t i = 0; i < blocks; ++i) chosen.push_back(i);
  } else {
    // One of each stretch of the grid, at a random place in it: evenly spaced blocks might all be of one kind.
    std::mt19937_64 random(blocks);
    for (uint64_t i = 0; i < most_blocks; ++i) {
      const uint64_t begin = blocks * i / most_blocks, end = blocks * (i + 1) / most_blocks;
      chosen.push_back(begin + random() % (end - begin));
    }
  }
  chosen.insert(chosen.begin(), chosen.front());
  return chosen;
}

void count_block_start(bool counted) {
  counting = counted;
  launches.back().counted_blocks += counted;
  ++block_number;
  for (int i = 0; i < threads; ++i) {
    lanes[i].loops.clear();
    lanes[i].accesses.clear();
    lanes[i].block = lanes[i].entered = 0;
    lanes[i].last_entered = ~uint64_t{0};
  }
}

void count_lane(int thread) { current = thread < 0 ? nullptr : &lanes[thread]; }

void count_shared(const void* begin, uint64_t bytes) {
  shared_begin = reinterpret_cast<uintptr_t>(begin);
  shared_end = shared_begin + bytes;
}

void count_barrier() {
  if (!counting) return;
  KernelTraffic& traffic = launches.back();
  for (int first = 0; first < threads; first += kLanes) {
    for (int i = first; i < std::min(first + kLanes, threads); ++i) {
      for (const Access& access : lanes[i].accesses) instructions.add(access, i - first);
      lanes[i].accesses.clear();
      lanes[i].last_entered = ~uint64_t{0};
    }
    instructions.take([&](const Instruction& i) {
      if (i.kind == global_read || i.kind == global_write) {
        count_sectors(i, traffic);
      } else {
        count_wavefronts(i, traffic);
      }
    });
  }
}

#define DSCONV_PLACE reinterpret_cast<uintptr_t>(__builtin_return_address(0))

void count_copy(void* dst, const void* src, int bytes, int valid) {
  std::memcpy(dst, src, static_cast<std::size_t>(valid));
  std::memset(static_cast<char*>(dst) + valid, 0, static_cast<std::size_t>(bytes - valid));
  if (current == nullptr || !counting) return;
  const uintptr_t place = DSCONV_PLACE;
  if (valid > 0) record(place, reinterpret_cast<uintptr_t>(src), static_cast<uint32_t>(valid), false);
  ++current->last_entered;  // two copies are never one
  record(place, reinterpret_cast<uintptr_t>(dst), static_cast<uint32_t>(bytes), true);
  ++current->last_entered;
}

}  // namespace cuda_host

// ------------------------------------------------------------------------------- what instrumented kernels call (GCC)

using cuda_host::counting;
using cuda_host::current;

extern "C" {

void __sanitizer_cov_trace_pc() {
  if (current != nullptr) cuda_host::enter_block(DSCONV_PLACE);
}

#define DSCONV_HOOKS(bytes)                                                                \
  void __tsan_read##bytes(void* address) {                                                 \
    if (current != nullptr && counting)                                                    \
      cuda_host::record(DSCONV_PLACE, reinterpret_cast<uintptr_t>(address), bytes, false); \
  }                                                                                        \
  void __tsan_write##bytes(void* address) {                                                \
    if (current != nullptr && counting)                                                    \
      cuda_host::record(DSCONV_PLACE, reinterpret_cast<uintptr_t>(address), bytes, true);  \
  }
DSCONV_HOOKS(1)
DSCONV_HOOKS(2)
DSCONV_HOOKS(4)
DSCONV_HOOKS(8)
DSCONV_HOOKS(16)
#undef DSCONV_HOOKS

// More than 16 bytes at a time: as many accesses of 16 bytes, which differ in their place.
#define DSCONV_RANGE_HOOK(name, write)                                                                 \
  void name(void* address, long bytes) {                                                               \
    if (current == nullptr || !counting) return;                                                       \
    const auto begin = reinterpret_cast<uintptr_t>(address);                                           \
    for (long at = 0; at < bytes; at += 16) {                                                          \
      cuda_host::record(DSCONV_PLACE + static_cast<uintptr_t>(at), begin + static_cast<uintptr_t>(at), \
                        static_cast<uint32_t>(bytes - at < 16 ? bytes - at : 16), write);              \
    }                                                                                                  \
  }
DSCONV_RANGE_HOOK(__tsan_read_range, false)
DSCONV_RANGE_HOOK(__tsan_write_range, true)
#undef DSCONV_RANGE_HOOK

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

}  // extern "C"
