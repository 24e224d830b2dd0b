// What this machine can do at best: multiply-adds a second at each vector width, and bytes a second read from memory.
// Compiled and called by ceilings.py; knows nothing of torch.
//
// Every kernel is written once with the compiler's vector types and instantiated by macro for each instruction set,
// which a target attribute allows inside one translation unit. The caller asks isa_available() before it runs one.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// Enough independent chains to hide the latency of a multiply-add (4 to 5 cycles) on two pipes; with the two operands
// they fit into the 16 registers of AVX2.
constexpr int kChains = 12;
constexpr int64_t kMacRounds = 100000;

// Returns a value that depends on every operation, so that none can be left out. The operands keep each chain near 1.
#define DEFINE_MAC_KERNEL(NAME, TARGET, ELEMENT, BYTES)                                                     \
  TARGET double NAME() {                                                                                    \
    typedef ELEMENT Vec __attribute__((vector_size(BYTES)));                                                \
    Vec chains[kChains], scale = {}, shift = {};                                                            \
    scale = scale + ELEMENT(0.5);                                                                           \
    shift = shift + ELEMENT(0.5);                                                                           \
    for (int i = 0; i < kChains; ++i) chains[i] = shift + ELEMENT(i);                                       \
    for (int64_t round = 0; round < kMacRounds; ++round) {                                                  \
      _Pragma("GCC unroll 12") for (int i = 0; i < kChains; ++i) { chains[i] = chains[i] * scale + shift; } \
    }                                                                                                       \
    Vec sum = {};                                                                                           \
    for (int i = 0; i < kChains; ++i) sum += chains[i];                                                     \
    double total = 0;                                                                                       \
    for (unsigned lane = 0; lane < BYTES / sizeof(ELEMENT); ++lane) total += sum[lane];                     \
    return total;                                                                                           \
  }

// XORs a buffer of whole 512-byte lines; 8 loads in flight, no arithmetic that could be the limit.
#define DEFINE_READ_KERNEL(NAME, TARGET, BYTES)                                              \
  TARGET uint64_t NAME(const char* data, int64_t bytes) {                                    \
    typedef uint64_t Vec __attribute__((vector_size(BYTES)));                                \
    Vec chains[8] = {};                                                                      \
    for (const char* at = data; at != data + bytes; at += 8 * BYTES) {                       \
      _Pragma("GCC unroll 8") for (int i = 0; i < 8; ++i) {                                  \
        chains[i] ^= *reinterpret_cast<const Vec*>(at + i * BYTES);                          \
      }                                                                                      \
    }                                                                                        \
    for (int i = 1; i < 8; ++i) chains[0] ^= chains[i];                                      \
    uint64_t all = 0;                                                                        \
    for (unsigned lane = 0; lane < BYTES / sizeof(uint64_t); ++lane) all ^= chains[0][lane]; \
    return all;                                                                              \
  }

struct Isa {
  const char* name;
  int bytes;  // of a vector
  double (*mac_f32)();
  double (*mac_f64)();
  uint64_t (*read)(const char*, int64_t);
  bool (*available)();
};

DEFINE_MAC_KERNEL(mac_f32_base, , float, 16)
DEFINE_MAC_KERNEL(mac_f64_base, , double, 16)
DEFINE_READ_KERNEL(read_base, , 16)
bool base_available() { return true; }

#if defined(__x86_64__)
#define TARGET_256 __attribute__((target("avx2,fma")))
#define TARGET_512 __attribute__((target("avx512f")))
#define TARGET_BF16 __attribute__((target("avx512f,avx512bf16")))

DEFINE_MAC_KERNEL(mac_f32_256, TARGET_256, float, 32)
DEFINE_MAC_KERNEL(mac_f64_256, TARGET_256, double, 32)
DEFINE_READ_KERNEL(read_256, TARGET_256, 32)
bool avx2_available() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

DEFINE_MAC_KERNEL(mac_f32_512, TARGET_512, float, 64)
DEFINE_MAC_KERNEL(mac_f64_512, TARGET_512, double, 64)
DEFINE_READ_KERNEL(read_512, TARGET_512, 64)
bool avx512_available() { return __builtin_cpu_supports("avx512f"); }

// One instruction multiplies 32 pairs of bf16 and adds them to 16 fp32 sums.
TARGET_BF16 double dot_bf16_512() {
  __m512 chains[kChains];
  const __m512bh operand = (__m512bh)_mm512_set1_epi32(0);
  for (int i = 0; i < kChains; ++i) chains[i] = _mm512_set1_ps(static_cast<float>(i));
  for (int64_t round = 0; round < kMacRounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chains[i] = _mm512_dpbf16_ps(chains[i], operand, operand);
  }
  double sum = 0;
  for (int i = 0; i < kChains; ++i) sum += _mm512_cvtss_f32(chains[i]);
  return sum;
}
#endif

const Isa kIsas[] = {
    {"baseline (128 bits)", 16, mac_f32_base, mac_f64_base, read_base, base_available},
#if defined(__x86_64__)
    {"AVX2+FMA (256 bits)", 32, mac_f32_256, mac_f64_256, read_256, avx2_available},
    {"AVX-512 (512 bits)", 64, mac_f32_512, mac_f64_512, read_512, avx512_available},
#endif
};
constexpr int kIsaCount = sizeof(kIsas) / sizeof(kIsas[0]);

std::atomic<uint64_t> sink;

template <class T>
void keep(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  sink.fetch_xor(bits, std::memory_order_relaxed);
}

// Runs work(thread) on every thread at once and returns the seconds from the common start until the last has ended.
// `work` has a first, unmeasured call: it warms the caches and brings the clock up.
template <class Work>
double seconds_together(int threads, const Work& work) {
  using Clock = std::chrono::steady_clock;
  std::atomic<int> waiting{threads};
  std::vector<Clock::time_point> begins(threads), ends(threads);
  auto body = [&](int thread) {
    work(thread);
    waiting.fetch_sub(1);
    while (waiting.load() > 0) {
    }
    begins[thread] = Clock::now();
    work(thread);
    ends[thread] = Clock::now();
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(body, thread);
  body(0);
  for (std::thread& other : others) other.join();
  Clock::time_point begin = begins[0], end = ends[0];
  for (int thread = 1; thread < threads; ++thread) {
    if (begins[thread] < begin) begin = begins[thread];
    if (ends[thread] > end) end = ends[thread];
  }
  return std::chrono::duration<double>(end - begin).count();
}

double mac_flops(int threads, double (*kernel)(), int64_t macs_per_operation) {
  const double seconds = seconds_together(threads, [&](int) { keep(kernel()); });
  return 2.0 * threads * macs_per_operation * kChains * kMacRounds / seconds;
}

}  // namespace

extern "C" {

int isa_count() { return kIsaCount; }
const char* isa_name(int isa) { return kIsas[isa].name; }
bool isa_available(int isa) { return kIsas[isa].available(); }

// Floating-point operations a second (a multiply-add is two) of all threads together.
double fma_flops_f32(int isa, int threads) { return mac_flops(threads, kIsas[isa].mac_f32, kIsas[isa].bytes / 4); }
double fma_flops_f64(int isa, int threads) { return mac_flops(threads, kIsas[isa].mac_f64, kIsas[isa].bytes / 8); }

// The same of the bf16 dot product; 0 where the machine has none.
double dot_flops_bf16(int threads) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16")) return mac_flops(threads, dot_bf16_512, 32);
#endif
  return 0;
}

// Bytes a second that all threads together read, each again and again from its own `bytes` of memory.
double read_bandwidth(int isa, int threads, int64_t bytes) {
  constexpr int64_t kLine = 512;
  constexpr int64_t kBytesPerMeasurement = int64_t{64} << 20;
  bytes = (bytes + kLine - 1) / kLine * kLine;
  const int64_t passes = bytes < kBytesPerMeasurement ? kBytesPerMeasurement / bytes : 1;
  struct Release {
    void operator()(char* block) const { operator delete(block, std::align_val_t{4096}); }
  };
  std::vector<std::unique_ptr<char, Release>> blocks;
  for (int thread = 0; thread < threads; ++thread) {
    blocks.emplace_back(static_cast<char*>(operator new(bytes, std::align_val_t{4096})));
    std::memset(blocks.back().get(), thread + 1, bytes);  // pages that were never written share one page of zeros
  }
  const double seconds = seconds_together(threads, [&](int thread) {
    for (int64_t pass = 0; pass < passes; ++pass) keep(kIsas[isa].read(blocks[thread].get(), bytes));
  });
  return static_cast<double>(threads) * passes * bytes / seconds;
}

}  // extern "C"
