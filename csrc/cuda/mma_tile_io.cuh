// Global memory and the tiles of the tensor-core kernels: pieces of a row-major matrix and of the output's gradient
// into shared memory (fragments.cuh has their form), and a warp's accumulators into an output tensor.
#pragma once

#include "box_input.cuh"
#include "mma_plan.h"

namespace dsconv {

// Rows r0 .. r0 + kRows - 1 of a row-major matrix [rows][columns], kRowBytes of columns from c0 on; zeros outside. The
// caller commits, waits and puts the barriers.
template <typename T, int kRows, int kRowBytes, bool kAcross>
DSCONV_DEVICE void stage_matrix(const T* matrix, int32_t rows, int32_t columns, int32_t r0, int32_t c0, int copy_bytes,
                                unsigned char* tile) {
  constexpr int kElement = static_cast<int>(sizeof(T));
  with_copy_bytes<T>(copy_bytes, [&](auto bytes) {
    constexpr int kBytes = decltype(bytes)::value, kPieces = kRowBytes / kBytes;
    static_assert(kBlockThreads % kPieces == 0, "a thread keeps to one piece of the rows");
    const int thread = thread_here(), column = thread % kPieces * (kBytes / kElement);
    const int there = clamped(int64_t{columns - c0 - column} * kElement, kBytes);
    const T* from = matrix + int64_t{r0} * columns + c0 + column;
#pragma unroll 1
    for (int row = thread / kPieces; row < kRows; row += kBlockThreads / kPieces) {
      const int valid = r0 + row < rows ? there : 0;
      const T* source = valid > 0 ? from + int64_t{row} * columns : matrix;
      copy_piece<kBytes>(tile + at_row<T, kRowBytes, kAcross>(row, column), source, valid);
    }
  });
}

// The widest piece that a row-major matrix's rows can be copied by.
template <typename T>
DSCONV_DEVICE int matrix_copy_bytes(const T* matrix, int64_t columns) {
  const int64_t bytes = columns * static_cast<int64_t>(sizeof(T));
  if (is_aligned(matrix, 16) && bytes % 16 == 0) return 16;
  if (is_aligned(matrix, 8) && bytes % 8 == 0) return 8;
  return is_aligned(matrix, 4) && bytes % 4 == 0 ? 4 : static_cast<int>(sizeof(T));
}

// Whether the slots of a box, columns adjacent in the tensor, are runs of kVec that lie together and aligned, but for
// some at its edges. Where they are not, a lane moves one element at a time, and neighbours move neighbours.
template <typename T>
DSCONV_DEVICE bool slots_are_runs(const PixelBox& box, const Geometry& g, const Strides& strides, const void* tensor) {
  constexpr int kVec = kVecWidth<T>;
  const bool whole_rows = box.w % kVec == 0 && strides.h % kVec == 0;
  const bool even_boxes = box.h * box.w % kVec == 0 || (box.n == 1 && box.tiles_h == 1);
  const bool adjacent_rows = box.w == g.w_out && strides.h == g.w_out && even_boxes;
  return is_aligned(tensor, 16) && strides.c % kVec == 0 && (g.n == 1 || strides.n % kVec == 0) &&
         (g.d_out == 1 || strides.d % kVec == 0) && (whole_rows || adjacent_rows);
}

// A warp's results: + bias, `before` the activation where it is asked for, and `after` it. Either null bias or before
// is none.
template <typename T>
struct Outputs {
  const T* bias;
  T* before;
  Activation act;
  T* after;
  int32_t channels;
  int64_t channel_stride;  // elements
  bool runs;               // slots_are_runs
};

// kVecWidth<T> elements of a vector of `count` from `first` on, zeros behind it.
template <typename T>
DSCONV_DEVICE Vec<T, kVecWidth<T>> load_run(const T* from, int32_t first, int32_t count) {
  constexpr int kVec = kVecWidth<T>;
  if (first + kVec <= count && is_aligned(from + first, 16)) {
    return *reinterpret_cast<const Vec<T, kVec>*>(from + first);
  }
  Vec<T, kVec> result = {};
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    if (first + e < count) result.v[e] = from[first + e];
  }
  return result;
}

// The one place where accumulators become outputs: channels o0 .. of the warp's tile, `slots` being the offsets of its
// pixels. A slice of kSliceChannels channels at a time goes through `slice`, the warp's own, so that a lane has 16
// bytes of outputs along the unit-strided dimension of y.
template <bool kYAlongC, typename T, typename Warp>
DSCONV_DEVICE void store_warp_tile(const Outputs<T>& out, const Warp& warp, const int64_t* slots, int32_t o0,
                                   unsigned char* slice) {
  constexpr int kVec = kVecWidth<T>;
  constexpr int kRows = kYAlongC ? Warp::kM : kSliceChannels;
  constexpr int kColumns = kYAlongC ? kSliceChannels : Warp::kM, kRowBytes = 4 * kColumns;
  const int lane = thread_here() % 32, g = lane / 4, t = lane % 4;
  const int32_t c_out = out.channels;
  const T* bias = out.bias;
#pragma unroll 1
  for (int s = 0; s < Warp::kN / kSliceChannels; ++s) {
    const int32_t slice_o = o0 + s * kSliceChannels;
    if (slice_o >= c_out) break;
#pragma unroll
    for (int column = 0; column < Warp::kN / 8; ++column) {
      if (column / (kSliceChannels / 8) != s) continue;
      const int j = column % (kSliceChannels / 8);
#pragma unroll
      for (int i = 0; i < Warp::kM / 16; ++i) {
        const float (&acc)[4] = warp.acc[i][column];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int pixel = 16 * i + g + 8 * half, channel = 8 * j + 2 * t;
          if constexpr (kYAlongC) {
            *reinterpret_cast<Vec<float, 2>*>(slice + at_row<float, kRowBytes>(pixel, channel)) = {acc[2 * half],
                                                                                                   acc[2 * half + 1]};
          } else {
            *reinterpret_cast<float*>(slice + at_row<float, kRowBytes>(channel, pixel)) = acc[2 * half];
            *reinterpret_cast<float*>(slice + at_row<float, kRowBytes>(channel + 1, pixel)) = acc[2 * half + 1];
          }
        }
      }
    }
    __syncwarp();
    if (!kYAlongC && !out.runs) {
#pragma unroll 1
      for (int i = lane; i < kRows * kColumns; i += 32) {
        const int32_t o = slice_o + i / kColumns;
        const int64_t slot = slots[i % kColumns];
        if (slot < 0 || o >= c_out) continue;
        float value[1] = {
            *reinterpret_cast<const float*>(slice + at_row<float, kRowBytes>(i / kColumns, i % kColumns))};
        if (bias != nullptr) value[0] += to_acc(bias[o]);
        const int64_t at = slot + o * out.channel_stride;
        if (out.before != nullptr) out.before[at] = from_acc<T>(value[0]);
        activate_all(out.act, value);
        out.after[at] = from_acc<T>(value[0]);
      }
      __syncwarp();
      continue;
    }
    // Along channels a lane has the same ones in every run.
    static_assert(!kYAlongC || 32 % (kColumns / kVec) == 0);
    [[maybe_unused]] Vec<T, kVec> added = {};
    if (kYAlongC && bias != nullptr) added = load_run(bias, slice_o + lane % (kColumns / kVec) * kVec, c_out);
#pragma unroll 1
    for (int i = lane; i < kRows * (kColumns / kVec); i += 32) {
      const int row = i / (kColumns / kVec), first = i % (kColumns / kVec) * kVec;
      float values[kVec];
#pragma unroll
      for (int e = 0; e < kVec; e += 4) {
        const auto four = *reinterpret_cast<const Vec<float, 4>*>(slice + at_row<float, kRowBytes>(row, first + e));
#pragma unroll
        for (int f = 0; f < 4; ++f) values[e + f] = four.v[f];
      }
      const int32_t o = slice_o + (kYAlongC ? first : row);
      if (!kYAlongC && bias != nullptr && o < c_out) added.v[0] = bias[o];
#pragma unroll
      for (int e = 0; e < kVec; ++e) values[e] += to_acc(added.v[kYAlongC ? e : 0]);
      // The run's place in y, and which of its elements exist, all of them in a row or not.
      const int64_t* run = slots + (kYAlongC ? row : first);
      const int64_t at = run[0] + o * out.channel_stride;
      const bool together =
          run[0] >= 0 && (kYAlongC ? o + kVec <= c_out : o < c_out && run[kVec - 1] == run[0] + kVec - 1);
      const auto store = [&](T* y) {
        if (together && is_aligned(y + at, 16)) {
          Vec<T, kVec> packed;
#pragma unroll
          for (int e = 0; e < kVec; ++e) packed.v[e] = from_acc<T>(values[e]);
          *reinterpret_cast<Vec<T, kVec>*>(y + at) = packed;
          return;
        }
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          const int64_t slot = kYAlongC ? run[0] : run[e];
          const int32_t of = o + (kYAlongC ? e : 0);
          if (slot >= 0 && of < c_out) y[slot + of * out.channel_stride] = from_acc<T>(values[e]);
        }
      };
      if (out.before != nullptr) store(out.before);
      activate_all(out.act, values);
      store(out.after);
    }
    __syncwarp();
  }
}

// kVec neighbouring elements of a tensor at slot at[0] and channel o: channels (kAlongC) or slots. Zeros where there is
// no pixel or no channel.
template <bool kAlongC, typename T>
struct TensorRun {
  static constexpr int kVec = kVecWidth<T>;
  const T* tensor;
  int64_t channel_stride;
  int32_t channels;

  DSCONV_DEVICE const T* start(const int64_t* at, int32_t o) const { return tensor + at[0] + o * channel_stride; }

  // Whether all of them exist, lie together and are aligned.
  DSCONV_DEVICE bool is_vector(const int64_t* at, int32_t o) const {
    const bool together =
        kAlongC ? channel_stride == 1 && o + kVec <= channels : o < channels && at[kVec - 1] == at[0] + kVec - 1;
    return together && at[0] >= 0 && is_aligned(start(at, o), 16);
  }

  DSCONV_DEVICE Vec<T, kVec> load(const int64_t* at, int32_t o) const {
    if (is_vector(at, o)) return *reinterpret_cast<const Vec<T, kVec>*>(start(at, o));
    Vec<T, kVec> result = {};
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      const int64_t slot = kAlongC ? at[0] : at[e];
      const int32_t channel = o + (kAlongC ? e : 0);
      if (slot >= 0 && channel < channels) result.v[e] = tensor[slot + channel * channel_stride];
    }
    return result;
  }
};

// g = dy * out_act'(.) of kSlots pixels x kChannels output channels from o0 on, as type T: rows of channels (kAlongC)
// or of slots, in runs (slots_are_runs) or not. Without an out_act it is dy, copied asynchronously where it can be: the
// caller commits, waits and puts the barriers.
template <typename T, bool kAlongC, bool kAcross, int kSlots, int kChannels>
DSCONV_DEVICE void stage_gradient(const BackwardParams& p, bool runs, int32_t o0, const int64_t* dy_at,
                                  const int64_t* saved_at, unsigned char* tile) {
  constexpr int kVec = kVecWidth<T>, kRow = kAlongC ? kChannels : kSlots, kLines = kAlongC ? kSlots : kChannels;
  constexpr int kRowBytes = kRow * static_cast<int>(sizeof(T));
  const int32_t c_out = static_cast<int32_t>(p.geom.c_out);
  const TensorRun<kAlongC, T> dy{static_cast<const T*>(p.dy), p.dy_strides.c, c_out};
  const TensorRun<kAlongC, T> saved{static_cast<const T*>(p.saved), p.saved_strides.c, c_out};
  if (!kAlongC && !runs) {
#pragma unroll 1
    for (int i = thread_here(); i < kLines * kRow; i += kBlockThreads) {
      const int line = i / kRow, slot = i % kRow;
      const int32_t o = o0 + line;
      T g = {};
      if (dy_at[slot] >= 0 && o < c_out) {
        g = dy.tensor[dy_at[slot] + o * dy.channel_stride];
        if (p.saved != nullptr) {
          float slope[1] = {to_acc(saved.tensor[saved_at[slot] + o * saved.channel_stride])};
          derive_all_from_saved(p.out_act, slope);
          g = from_acc<T>(to_acc(g) * slope[0]);
        }
      }
      *reinterpret_cast<T*>(tile + at_row<T, kRowBytes, kAcross>(line, slot)) = g;
    }
    return;
  }
#pragma unroll 1
  for (int i = thread_here(); i < kLines * (kRow / kVec); i += kBlockThreads) {
    const int line = i / (kRow / kVec), first = i % (kRow / kVec) * kVec;
    const int slot = kAlongC ? line : first;
    const int32_t o = o0 + (kAlongC ? first : line);
    unsigned char* to = tile + at_row<T, kRowBytes, kAcross>(line, first);
    if (p.saved == nullptr && dy.is_vector(dy_at + slot, o)) {
      cp_async<16>(to, dy.start(dy_at + slot, o), 16);
      continue;
    }
    Vec<T, kVec> g = dy.load(dy_at + slot, o);
    if (p.saved != nullptr) {
      const Vec<T, kVec> value = saved.load(saved_at + slot, o);
      float slope[kVec];
#pragma unroll
      for (int e = 0; e < kVec; ++e) slope[e] = to_acc(value.v[e]);
      derive_all_from_saved(p.out_act, slope);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        // What is not there is zero, whatever the slope of zero.
        g.v[e] = from_acc<T>(to_acc(g.v[e]) * slope[e]);
      }
    }
    *reinterpret_cast<Vec<T, kVec>*>(to) = g;
  }
}

}  // namespace dsconv
