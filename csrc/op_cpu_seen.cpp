// Whether tensors are what they were at the call before, for whoever keeps what was made of them (dsconv_cuda/folded.py
// folds norms into weights): also after writes that PyTorch does not count. Compared are all bytes of each vector, and
// of each matrix, whose rows are all that has the same first index, the fingerprint that kept_weights.h has: of all of
// it where it is small, else of a part of every row that together meet all columns.
//
//   seen   [ dtype, vector | dtype, vector | ... | dtype, fingerprint | ... ]

#include <cstring>

#include "kept_weights.h"
#include "op_args.h"

namespace dsconv {
namespace {

// Walks over `seen`, writes what differs, and knows whether anything did.
struct Seen {
  char* at;
  bool same = true;

  void compare_dtype(const Tensor& t) {
    const char dtype = static_cast<char>(t.scalar_type());
    compare(&dtype, 1);
  }
  void compare(const char* from, int64_t bytes) {
    if (std::memcmp(at, from, static_cast<size_t>(bytes)) != 0) {
      std::memcpy(at, from, static_cast<size_t>(bytes));
      same = false;
    }
    at += bytes;
  }
};

bool seen_again(std::vector<Tensor> vectors, std::vector<Tensor> matrices, Tensor seen) {
  constexpr const char* op = "dsconv_cuda::seen_again";
  int64_t bytes = 0;
  for (const Tensor& t : vectors) {
    STD_TORCH_CHECK(t.dim() == 1, op, ": vectors must have one dimension");
    bytes += 1 + t.numel() * static_cast<int64_t>(t.element_size());
  }
  for (const Tensor& t : matrices) {
    STD_TORCH_CHECK(t.dim() >= 1 && t.numel() > 0, op, ": matrices must have a dimension, and elements");
    bytes += 1 + static_cast<int64_t>(sizeof(uint64_t));
  }
  STD_TORCH_CHECK(seen.scalar_type() == ScalarType::Byte && seen.is_contiguous(), op,
                  ": seen must be a contiguous uint8 tensor");
  if (seen.numel() != bytes) return false;  // made for others
  Seen was{static_cast<char*>(seen.mutable_data_ptr())};
  for (const Tensor& t : vectors) {
    was.compare_dtype(t);
    const char* from = static_cast<const char*>(t.const_data_ptr());
    const int64_t element = static_cast<int64_t>(t.element_size()), count = t.size(0), step = t.stride(0) * element;
    if (step == element) {
      was.compare(from, count * element);
    } else {
      for (int64_t i = 0; i < count; ++i) was.compare(from + i * step, element);
    }
  }
  for (const Tensor& t : matrices) {
    was.compare_dtype(t);
    const Tensor rows = dense(t);
    LineSums sums;
    sums.add_matrix(rows.const_data_ptr(), t.size(0), t.numel() / t.size(0) * static_cast<int64_t>(t.element_size()));
    const uint64_t fingerprint = sums.total();
    was.compare(reinterpret_cast<const char*>(&fingerprint), static_cast<int64_t>(sizeof(fingerprint)));
  }
  return was.same;
}

}  // namespace
}  // namespace dsconv

STABLE_TORCH_LIBRARY_IMPL(dsconv_cuda, CPU, m) { m.impl("seen_again", TORCH_BOX(&dsconv::seen_again)); }
