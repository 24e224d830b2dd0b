// In place of csrc/cpu in the emulated library: register.cpp asks which CPU instruction sets there are, and here the
// CPU dispatch key runs the CUDA kernels.

#include <stdexcept>

#include "../../csrc/cpu/cpu_isa.h"
#include "../../csrc/cpu/cpu_kernels.h"
#include "../../csrc/plan_query.h"

namespace dsconv {

const char* isa_name(Isa) { return "emulated CUDA"; }

std::vector<std::string> isa_built() { return {}; }

std::vector<std::string> isa_available() { return {}; }

Isa isa_active() { return Isa::generic; }

void set_isa(const std::string&) { throw std::runtime_error("the emulated library has no CPU kernels"); }

bool bf16_dot_available() { return false; }

bool bf16_dot_active() { return false; }

void set_bf16_dot(bool) { throw std::runtime_error("the emulated library has no CPU kernels"); }

bool multiplies_by_halves() { return false; }

void set_multiplies_by_halves(bool) { throw std::runtime_error("the emulated library has no CPU kernels"); }

PlanNumbers cpu_plan(const PlanQuery&, int64_t) { throw std::runtime_error("the emulated library has no CPU kernels"); }

}  // namespace dsconv
