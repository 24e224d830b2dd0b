// The kernels of bf16 for AVX-512 with AVX512-BF16: forward and stage P of backward multiply pairs of bf16, the others
// have its rounding. Those of the other types are those of cpu_avx512.cpp.
// isa_region.h says how this file has to be laid out.
#include "isa_region.h"
#if DSCONV_BUILDS_BF16

// gcc takes the undefined registers that its own intrinsics start from for mistakes of their callers.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstdint>

#include "cpu_kernels.h"
#include "storage.h"

#define DSCONV_ISA DSCONV_ISA_AVX512
#define DSCONV_BF16_DOT

#if defined(DSCONV_EMULATE_AVX512)  // tests/isa_emulation: the intrinsics are functions of the test build
DSCONV_REGION_BEGIN("avx2,fma,f16c,prfchw")
#else
DSCONV_REGION_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prfchw")
#endif

namespace dsconv {
namespace avx512_bf16 {

// clang-format off: each builds on those before it
#include "vec_avx512.h"
#include "vec_avx512_bf16.h"
#include "math.inl"
#include "activation.inl"
#include "ahead.inl"
#include "gemm.inl"
#include "tile_io.inl"
#include "tile_io_bf16.inl"
#include "pack.inl"
#include "pack_bf16.inl"
#include "plane.inl"
#include "channel_row.inl"
#include "input_norm.inl"
#include "depthwise.inl"
#include "depthwise_bf16.inl"
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
#include "backward_bf16.inl"
#include "correlate.inl"
#include "grad_row.inl"
#include "backward_planes.inl"
#include "backward_depthwise.inl"
#include "backward_rows.inl"
#include "backward_groups.inl"
#include "backward_panels.inl"
#include "table.inl"
// clang-format on

static DTypeKernels kernels() {
  DTypeKernels k = kernels_of<bf16>();
  k.bytes.middle = sizeof(bf16);
  k.pack_depthwise_forward = pack_depthwise_forward_bf16;
  k.pack_pointwise_forward = pack_pointwise_pairs;
  k.forward = forward<bf16, float, bf16>;
  k.forward_moments = forward_moments<bf16, float, bf16>;
  k.pack_pointwise_backward = pack_pointwise_backward_pairs;
  k.backward_group = backward_group<bf16, float, bf16x2>;
  k.backward_turn = backward_turn<bf16, float, bf16x2>;
  k.backward_panel = backward_panel<bf16, float, bf16x2>;
  return k;
}

}  // namespace avx512_bf16
}  // namespace dsconv

DSCONV_REGION_END

namespace dsconv {

const KernelTable& kernels_avx512_bf16() {
  static const KernelTable table = [] {
    KernelTable t = kernels_avx512();
    t.by_dtype[static_cast<int>(DType::bf16)] = avx512_bf16::kernels();
    return t;
  }();
  return table;
}

}  // namespace dsconv

#endif
