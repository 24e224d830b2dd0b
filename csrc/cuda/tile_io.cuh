// Moves tiles from global to shared memory: pieces of a row-major matrix, and of the gradient of the output.
#pragma once

#include "activation.cuh"
#include "dtype.cuh"
#include "pixel.cuh"
#include "ptx.cuh"

namespace dsconv {

// Copies rows row0.. and columns col0.. of a row-major matrix [rows, cols] to tile[r * kStride + c]; what lies outside
// the matrix becomes zero. 16 bytes at a time where every row starts on 16 bytes, asynchronously from sm_80 on: the
// caller commits and waits (cp_async_commit, cp_async_wait) and puts the barriers.
template <int kRows, int kCols, int kStride, int kThreads, typename T>
DSCONV_DEVICE void load_matrix_tile(const T* matrix, int64_t rows, int64_t cols, int32_t row0, int32_t col0, T* tile) {
  constexpr int kVec = kVecWidth<T>, kRowVecs = kCols / kVec;
  static_assert(kCols % kVec == 0 && kStride % kVec == 0, "a tile's row is whole vectors");
  const int32_t row_end = static_cast<int32_t>(rows), col_end = static_cast<int32_t>(cols);
  if (is_aligned(matrix, 16) && cols % kVec == 0) {
#pragma unroll 1
    for (int item = static_cast<int>(threadIdx.x); item < kRows * kRowVecs; item += kThreads) {
      const int r = item / kRowVecs, c = item % kRowVecs * kVec;
      const bool valid = row0 + r < row_end && col0 + c < col_end;
      cp_async<16>(tile + r * kStride + c, valid ? matrix + (row0 + r) * cols + col0 + c : matrix, valid ? 16 : 0);
    }
  } else {
#pragma unroll 1
    for (int item = static_cast<int>(threadIdx.x); item < kRows * kCols; item += kThreads) {
      const int r = item / kCols, c = item % kCols;
      const bool valid = row0 + r < row_end && col0 + c < col_end;
      tile[r * kStride + c] = valid ? matrix[(row0 + r) * cols + col0 + c] : T{};
    }
  }
}

// Where one output pixel lies in dy and in what forward saved; first channel.
struct alignas(16) OutputOffsets {
  int64_t dy;  // -1 for a pixel that is not there
  int64_t saved;
};

DSCONV_DEVICE OutputOffsets output_offsets_at(int64_t q, int64_t pixel_count, const BackwardParams& p) {
  if (q >= pixel_count) return {-1, 0};
  const Pixel pixel = output_pixel_at(q, p.geom);
  return {pixel_offset(pixel, p.dy_strides), pixel_offset(pixel, p.saved_strides)};
}

// Whether four channels, starting on a multiple of four, can be loaded as one vector at every pixel of a tensor.
template <typename T>
DSCONV_DEVICE bool channels_are_vectors(const T* tensor, const Strides& s, int64_t channels) {
  return s.c == 1 && (s.n | s.d | s.h | s.w | channels) % 4 == 0 && is_aligned(tensor, sizeof(Vec<T, 4>));
}

// The `count` first of four channels at `from`, the rest zero.
template <typename T>
DSCONV_DEVICE Vec<acc_t<T>, 4> load_four(const T* from, int64_t stride, int count, bool vector) {
  Vec<acc_t<T>, 4> result = {};
  if (vector && count >= 4) {
    const Vec<T, 4> loaded = *reinterpret_cast<const Vec<T, 4>*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) result.v[i] = to_acc(loaded.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) result.v[i] = to_acc(from[i * stride]);
    }
  }
  return result;
}

// The gradient before out_act, g = dy * out_act'(.), of kPixels pixels x kChannels output channels from o0 on, to
// tile[pixel * kStride + channel]; zero where there is no pixel or channel. An item is one pixel x 4 channels; lanes
// run along the pixels where dy is unit-strided along w, else along the channels, 4 in one load where they are aligned.
template <typename T, int kPixels, int kChannels, int kStride, int kThreads>
DSCONV_DEVICE void load_output_gradient(const BackwardParams& p, int32_t o0, const OutputOffsets* offsets,
                                        acc_t<T>* tile) {
  constexpr int kGroups = kChannels / 4, kItems = kPixels * kGroups;
  static_assert(kChannels % 4 == 0 && kStride % 4 == 0, "an item is stored as one vector");
  const T* dy = static_cast<const T*>(p.dy);
  const T* saved = static_cast<const T*>(p.saved);
  const int32_t c_out = static_cast<int32_t>(p.geom.c_out);
  const bool along_w = p.dy_layout == Layout::nchw;
  const bool dy_vector = channels_are_vectors(dy, p.dy_strides, p.geom.c_out);
  const bool saved_vector = channels_are_vectors(saved, p.saved_strides, p.geom.c_out);
#pragma unroll 1
  for (int item = static_cast<int>(threadIdx.x); item < kItems; item += kThreads) {
    const int pixel = along_w ? item % kPixels : item / kGroups;
    const int channel = (along_w ? item / kPixels : item % kGroups) * 4;
    const OutputOffsets at = offsets[pixel];
    const int32_t o = o0 + channel;
    const int count = at.dy < 0 ? 0 : c_out - o;
    Vec<acc_t<T>, 4> g = load_four(dy + (at.dy < 0 ? 0 : at.dy) + o * p.dy_strides.c, p.dy_strides.c, count, dy_vector);
    if (saved != nullptr) {
      const auto value = load_four(saved + at.saved + o * p.saved_strides.c, p.saved_strides.c, count, saved_vector);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < count) g.v[i] *= derivative_from_saved(p.out_act, value.v[i]);
      }
    }
    *reinterpret_cast<Vec<acc_t<T>, 4>*>(tile + pixel * kStride + channel) = g;
  }
}

// Four elements that lie together and aligned to global memory, as one access.
template <typename T>
DSCONV_DEVICE void store_four(T* to, const acc_t<T> (&values)[4]) {
  *reinterpret_cast<Vec<T, 4>*>(to) = {from_acc<T>(values[0]), from_acc<T>(values[1]), from_acc<T>(values[2]),
                                       from_acc<T>(values[3])};
}

}  // namespace dsconv
