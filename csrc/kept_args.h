// The tensor that dsconv_cuda::keep returns, as the host entries take it.
#pragma once

#include "kept_weights.h"
#include "op_args.h"

namespace dsconv {

inline void* first_line(void* memory) {
  return reinterpret_cast<void*>(round_up(reinterpret_cast<intptr_t>(memory), kCacheLine));
}

inline KeptHeader* kept_of(const char* op, const Tensor& memory) {
  auto* header = static_cast<KeptHeader*>(first_line(memory.mutable_data_ptr()));
  STD_TORCH_CHECK(memory.scalar_type() == ScalarType::Byte && memory.is_contiguous() &&
                      memory.numel() >= static_cast<int64_t>(sizeof(KeptHeader)) + kCacheLine &&
                      header->magic == kKeptMagic &&
                      memory.numel() == static_cast<int64_t>(sizeof(KeptHeader)) + header->capacity + kCacheLine,
                  op, ": kept is not what dsconv_cuda::keep returned");
  return header;
}

}  // namespace dsconv
