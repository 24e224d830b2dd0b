#include "cpu_isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu_kernels.h"
#include "isa_region.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace dsconv {
namespace {

#if defined(__x86_64__)
constexpr bool kX86 = true;
bool machine_has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool machine_has_avx512() {
#if defined(DSCONV_EMULATE_AVX512)  // only in a test build: the AVX-512 kernels on emulated intrinsics
  return machine_has_avx2();
#else
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && machine_has_avx2();
#endif
}
// AMD's family 19h, of which Zen 4 has AVX-512. __builtin_cpu_is() knows it from gcc 11 on only.
bool machine_multiplies_by_halves() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(0, &eax, &ebx, &ecx, &edx) == 0 || ebx != signature_AMD_ebx) return false;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 8 & 0xf) + (eax >> 20 & 0xff) == 0x19;
}
#else
constexpr bool kX86 = false;
bool machine_multiplies_by_halves() { return false; }
bool machine_has_avx2() { return false; }
bool machine_has_avx512() { return false; }
#endif

#if DSCONV_BUILDS_BF16 && defined(DSCONV_EMULATE_AVX512)
bool machine_has_bf16_dot() { return machine_has_avx512(); }
#elif DSCONV_BUILDS_BF16
bool machine_has_bf16_dot() { return __builtin_cpu_supports("avx512bf16") && machine_has_avx512(); }
#else
bool machine_has_bf16_dot() { return false; }
#endif

bool built(Isa isa) { return isa == Isa::generic || kX86; }

bool available(Isa isa) {
  if (isa == Isa::generic) return true;
  return built(isa) && (isa == Isa::avx2 ? machine_has_avx2() : machine_has_avx512());
}

std::vector<std::string> names_where(bool (*holds)(Isa)) {
  std::vector<std::string> names;
  for (int i = 0; i < kIsaCount; ++i) {
    if (holds(static_cast<Isa>(i))) names.push_back(isa_name(static_cast<Isa>(i)));
  }
  return names;
}

Isa parse(const std::string& source, const std::string& name) {
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (name == isa_name(isa) && available(isa)) return isa;
  }
  std::string list;
  for (const std::string& n : isa_available()) list += (list.empty() ? "" : ", ") + n;
  bool known = false;
  for (int i = 0; i < kIsaCount; ++i) known = known || name == isa_name(static_cast<Isa>(i));
  throw std::runtime_error(source + ": " + (known ? "this machine or build lacks " : "unknown instruction set ") + "'" +
                           name + "'; available: " + list);
}

Isa choose() {
  const char* requested = std::getenv("DSCONV_CPU_ISA");
  if (requested != nullptr && requested[0] != '\0') return parse("DSCONV_CPU_ISA", requested);
  Isa best = Isa::generic;
  for (int i = 0; i < kIsaCount; ++i) {
    if (available(static_cast<Isa>(i))) best = static_cast<Isa>(i);
  }
  return best;
}

constexpr int kNotChosen = -1;
std::atomic<int> chosen{kNotChosen};
std::atomic<bool> bf16_dot_on{true};
std::atomic<bool> by_halves{machine_multiplies_by_halves()};

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* names[kIsaCount] = {"generic", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

std::vector<std::string> isa_built() { return names_where(built); }
std::vector<std::string> isa_available() { return names_where(available); }

Isa isa_active() {
  int isa = chosen.load(std::memory_order_relaxed);
  if (isa == kNotChosen) {
    isa = static_cast<int>(choose());
    chosen.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

void set_isa(const std::string& name) { chosen.store(static_cast<int>(parse("set_isa", name))); }

bool bf16_dot_available() {
  static const bool available = machine_has_bf16_dot();
  return available;
}
bool bf16_dot_active() {
  return bf16_dot_available() && bf16_dot_on.load(std::memory_order_relaxed) && isa_active() == Isa::avx512;
}
void set_bf16_dot(bool on) { bf16_dot_on.store(on); }

bool multiplies_by_halves() { return by_halves.load(std::memory_order_relaxed); }
void set_multiplies_by_halves(bool on) { by_halves.store(on); }

const KernelTable& active_kernels() {
#if DSCONV_BUILDS_BF16
  if (bf16_dot_active()) return kernels_avx512_bf16();
#endif
#if defined(__x86_64__)
  switch (isa_active()) {
    case Isa::avx512:
      return kernels_avx512();
    case Isa::avx2:
      return kernels_avx2();
    case Isa::generic:
      break;
  }
#endif
  return kernels_generic();
}

}  // namespace dsconv
