// The kernels for AVX2 + FMA + F16C. isa_region.h says how this file has to be laid out.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>

#include "cpu_kernels.h"
#include "isa_region.h"
#include "storage.h"

#define DSCONV_ISA DSCONV_ISA_AVX2

DSCONV_REGION_BEGIN("avx2,fma,f16c,prfchw")

namespace dsconv {
namespace avx2 {

// clang-format off: each builds on those before it
#include "vec_avx2.h"
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

}  // namespace avx2
}  // namespace dsconv

DSCONV_REGION_END

namespace dsconv {

const KernelTable& kernels_avx2() {
  static const KernelTable table = [] {
    KernelTable t{};
    avx2::fill_table(t);
    return t;
  }();
  return table;
}

}  // namespace dsconv

#endif
