// The kernels for AVX-512 F + BW + DQ + VL. isa_region.h says how this file has to be laid out.
#if defined(__x86_64__)

// gcc takes the undefined registers that its own intrinsics start from for mistakes of their callers.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstdint>

#include "cpu_kernels.h"
#include "isa_region.h"
#include "storage.h"

#define DSCONV_ISA DSCONV_ISA_AVX512

#if defined(DSCONV_EMULATE_AVX512)  // tests/isa_emulation: the intrinsics are functions of the test build
DSCONV_REGION_BEGIN("avx2,fma,f16c,prfchw")
#else
DSCONV_REGION_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prfchw")
#endif

namespace dsconv {
namespace avx512 {

// clang-format off: each builds on those before it
#include "vec_avx512.h"
#include "math.inl"
#include "activation.inl"
#include "ahead.inl"
#include "gemm.inl"
#include "tile_io.inl"
#include "pack.inl"
#include "plane.inl"
#include "channel_row.inl"
#include "input_norm.inl"
#include "depthwise.inl"
#include "depthwise_planes.inl"
#include "moments.inl"
#include "norm.inl"
#include "norm_planes.inl"
#include "gate.inl"
#include "forward_planes.inl"
#include "forward.inl"
#include "turned.inl"
#include "backward_norm.inl"
#include "backward_pointwise.inl"
#include "correlate.inl"
#include "grad_row.inl"
#include "backward_planes.inl"
#include "backward_depthwise.inl"
#include "backward_rows.inl"
#include "backward_groups.inl"
#include "backward_panels.inl"
#include "table.inl"
// clang-format on

}  // namespace avx512
}  // namespace dsconv

DSCONV_REGION_END

namespace dsconv {

const KernelTable& kernels_avx512() {
  static const KernelTable table = [] {
    KernelTable t{};
    avx512::fill_table(t);
    return t;
  }();
  return table;
}

}  // namespace dsconv

#endif
