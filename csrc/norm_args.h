// Per-channel values of the norms, as they go between the ops.
//
//   moments [2, C]   mean, variance              sums [2, C]   sum g, sum g * vhat
//   vectors [4, C]   mean, invstd, gamma, beta                                          all float64
#pragma once

#include "op_args.h"

namespace dsconv {

enum VectorRow { kMean, kInvstd, kGamma, kBeta, kVectorRows };
inline Tensor empty_doubles(const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t size[2] = {rows, columns}, stride[2] = {at_least_1(columns), 1};
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, size, stride, aoti_torch_dtype_float64(), device_type,
                                                         like.get_device_index(), &handle));
  return Tensor(handle);
}

inline const double* doubles_of(const char* op, const char* arg, const Tensor& t, int64_t rows, int64_t channels) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double && t.dim() == 2 && t.size(0) == rows && t.size(1) == channels &&
                      t.is_contiguous(),
                  op, ": ", arg, " must be a contiguous float64 tensor of shape [", rows, ", ", channels, "]");
  return static_cast<const double*>(t.const_data_ptr());
}

}  // namespace dsconv
