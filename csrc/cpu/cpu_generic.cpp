// The kernels for every processor: the compiler's own vectors of 16 bytes. isa_region.h says how this file has to be
// laid out.

#include <cstdint>

#include "cpu_kernels.h"
#include "isa_region.h"
#include "storage.h"

#define DSCONV_ISA DSCONV_ISA_GENERIC

namespace dsconv {
namespace generic {

// clang-format off: each builds on those before it
#include "vec_generic.h"
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
#include "moments.inl"
#include "norm.inl"
#include "norm_planes.inl"
#include "gate.inl"
#include "forward.inl"
#include "turned.inl"
#include "backward_norm.inl"
#include "backward_pointwise.inl"
#include "correlate.inl"
#include "grad_row.inl"
#include "backward_depthwise.inl"
#include "backward_rows.inl"
#include "backward_groups.inl"
#include "backward_panels.inl"
#include "table.inl"
// clang-format on

}  // namespace generic
}  // namespace dsconv

namespace dsconv {

const KernelTable& kernels_generic() {
  static const KernelTable table = [] {
    KernelTable t{};
    generic::fill_table(t);
    return t;
  }();
  return table;
}

}  // namespace dsconv
