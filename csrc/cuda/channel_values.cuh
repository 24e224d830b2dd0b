// Values a channel of whatever dtype they come in: parameters and statistics of a norm.
#pragma once

#include "cuda_norm.h"
#include "dtype.cuh"

namespace dsconv {

DSCONV_DEVICE double value_of(const ChannelValues& values, int64_t c, double otherwise) {
  if (values.data == nullptr) return otherwise;
  switch (values.dtype) {
    case DType::f64:
      return static_cast<const double*>(values.data)[c];
    case DType::f16:
      return static_cast<double>(to_acc(static_cast<const Half*>(values.data)[c]));
    case DType::bf16:
      return static_cast<double>(to_acc(static_cast<const BFloat16*>(values.data)[c]));
    default:
      return static_cast<double>(static_cast<const float*>(values.data)[c]);
  }
}

}  // namespace dsconv
