// Which instruction set the CPU kernels run with: what is in this library, what the machine has, what is active.
#pragma once

#include <string>
#include <vector>

namespace dsconv {

struct KernelTable;

enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2 };
constexpr int kIsaCount = 3;

const char* isa_name(Isa isa);
std::vector<std::string> isa_built();      // compiled into this library
std::vector<std::string> isa_available();  // built, and this machine can run it

// The best available one, lowered by the environment variable DSCONV_CPU_ISA, which is read at first use. A name that
// is unknown or not available throws std::runtime_error, which lists what there is.
Isa isa_active();

// Overrides the choice for the whole process; the same errors.
void set_isa(const std::string& name);

// AVX512-BF16, which not every machine with avx512 has: bf16 is then multiplied two numbers at a time.
bool bf16_dot_available();  // built, and this machine can run it
bool bf16_dot_active();     // available, not switched off, and the active ISA is avx512
void set_bf16_dot(bool on);

// What multiplies_by_halves() of cpu_kernels.h says from now on; at first the machine is asked.
void set_multiplies_by_halves(bool on);

// The kernels of the active ISA.
const KernelTable& active_kernels();

}  // namespace dsconv
