// The driver's buffers and tensors. Each is exactly as large as what it holds, so that ASan sees the first element
// beyond.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "../../csrc/params.h"
#include "storage.h"

namespace driver {

using namespace dsconv;

// Bytes exactly as many as the elements need, all ones: NaN in every type.
class Buffer {
 public:
  Buffer() = default;
  Buffer(DType type, int64_t elements) : type_(type), elements_(elements), bytes_(new unsigned char[bytes()]) {
    std::memset(bytes_.get(), 0xff, bytes());
  }
  void* data() const { return bytes_.get(); }
  void set(int64_t i, long double value) { storage::store(type_, bytes_.get(), i, value); }
  long double get(int64_t i) const { return storage::load(type_, bytes_.get(), i); }
  std::size_t bytes() const { return static_cast<std::size_t>(elements_ * storage::format_of(type_).bytes); }

 private:
  DType type_ = DType::f32;
  int64_t elements_ = 0;
  std::unique_ptr<unsigned char[]> bytes_;
};

using Values = std::vector<long double>;

inline Buffer buffer_of(DType type, const Values& values) {
  Buffer buffer(type, static_cast<int64_t>(values.size()));
  for (std::size_t i = 0; i < values.size(); ++i) buffer.set(static_cast<int64_t>(i), values[i]);
  return buffer;
}

inline Values values_of(const Buffer& buffer, int64_t count) {
  Values values;
  for (int64_t i = 0; i < count; ++i) values.push_back(buffer.get(i));
  return values;
}

// [n, c, d, h, w] in memory; `gap` makes it a part of something larger, whose rows and images lie further apart.
struct Tensor5 {
  Tensor5() = default;
  Tensor5(DType type, int64_t n_, int64_t c_, int64_t d_, int64_t h_, int64_t w_, Layout layout_, int64_t gap)
      : n(n_), c(c_), d(d_), h(h_), w(w_), layout(layout_) {
    if (layout == Layout::nhwc) {
      strides.c = 1;
      strides.w = c + gap;
      strides.h = w * strides.w + gap;
      strides.d = h * strides.h + gap;
      strides.n = d * strides.d + gap;
    } else {
      strides.w = 1;
      strides.h = w + gap;
      strides.d = h * strides.h + gap;
      strides.c = d * strides.d + gap;
      strides.n = c * strides.c + gap;
    }
    buffer = Buffer(type, offset(n - 1, c - 1, d - 1, h - 1, w - 1) + 1);
  }
  int64_t offset(int64_t in, int64_t ic, int64_t id, int64_t ih, int64_t iw) const {
    return in * strides.n + ic * strides.c + id * strides.d + ih * strides.h + iw * strides.w;
  }
  template <typename Visit>
  void each(Visit visit) const {
    std::size_t i = 0;
    for (int64_t in = 0; in < n; ++in) {
      for (int64_t ic = 0; ic < c; ++ic) {
        for (int64_t line = 0; line < d * h; ++line) {
          for (int64_t iw = 0; iw < w; ++iw) visit(i++, offset(in, ic, line / h, line % h, iw));
        }
      }
    }
  }
  void set(const Values& values) {
    each([&](std::size_t i, int64_t at) { buffer.set(at, values[i]); });
  }
  Values values() const {
    Values result(static_cast<std::size_t>(n * c * d * h * w));
    each([&](std::size_t i, int64_t at) { result[i] = buffer.get(at); });
    return result;
  }

  int64_t n = 0, c = 0, d = 0, h = 0, w = 0;
  Layout layout = Layout::nchw;
  Strides strides{};
  Buffer buffer;
};

// Values in [-2, 2) that the type holds.
class Random {
 public:
  explicit Random(int seed) : state_(static_cast<uint64_t>(seed) * 2 + 1) {}
  Values draw(DType type, int64_t count) {
    const storage::Format f = storage::format_of(type);
    Values values;
    for (int64_t i = 0; i < count; ++i) {
      state_ = state_ * 6364136223846793005u + 1442695040888963407u;
      values.push_back(storage::round_to(f, static_cast<long double>(state_ >> 11) * 0x1p-51L - 2));
    }
    return values;
  }

 private:
  uint64_t state_;
};

}  // namespace driver
