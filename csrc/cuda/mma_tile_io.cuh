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

// Where a warp's results go.
template <typename T>
struct OutputTensor {
  T* data;
  int32_t channels;
  int64_t channel_stride;  // elements
  bool runs;               // slots_are_runs
};

// acc += bias of output channels o0 .., null for none.
template <typename T, typename Warp>
DSCONV_DEVICE void add_bias(Warp& warp, const T* bias, int32_t o0, int32_t channels) {
  if (bias == nullptr) return;
  const int t = thread_here() % 4;
  const bool aligned = is_aligned(bias + o0, 2 * sizeof(T));
#pragma unroll
  for (int j = 0; j < Warp::kN / 8; ++j) {
    const int32_t o = o0 + 8 * j + 2 * t;
    Vec<T, 2> two = {};
    if (aligned && o + 1 < channels) {
      two = *reinterpret_cast<const Vec<T, 2>*>(bias + o);
    } else {
      if (o < channels) two.v[0] = bias[o];
      if (o + 1 < channels) two.v[1] = bias[o + 1];
    }
#pragma unroll
    for (int i = 0; i < Warp::kM / 16; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) warp.acc[i][j][r] += to_acc(two.v[r % 2]);
    }
  }
}

// acc = act(acc): a kind that is_piecewise() at once, the others some values after the other with one copy of the code.
template <typename Warp>
DSCONV_DEVICE void activate_tile(Activation act, Warp& warp) {
  constexpr int kRow = Warp::kN / 8 * 4, kAll = Warp::kM / 16 * kRow, kFew = 8;
  if (act == Activation::identity) return;
  if (is_piecewise(act)) {
#pragma unroll
    for (int i = 0; i < Warp::kM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < Warp::kN / 8; ++j) activate_piecewise(act, warp.acc[i][j]);
    }
    return;
  }
  const auto value = [&](int at) -> float& { return warp.acc[at / kRow][at % kRow / 4][at % 4]; };
#pragma unroll 1
  for (int turn = 0; turn < kAll / kFew; ++turn) {
    float part[kFew];
#pragma unroll
    for (int e = 0; e < kFew; ++e) part[e] = value(e);
    activate_in_turn(act, part);
#pragma unroll
    for (int at = 0; at < kAll; ++at) value(at) = at + kFew < kAll ? value(at + kFew) : part[at + kFew - kAll];
  }
}

// A slice of a warp's tile in shared memory, as it goes to an output tensor: `slots` are the offsets of its pixels, o0
// the first of its channels. A lane has 16 bytes of it along the unit-strided dimension.
template <bool kAlongC, typename T>
DSCONV_DEVICE void store_slice(const OutputTensor<T>& out, SlotOffsets slots, int32_t o0, const unsigned char* slice) {
  constexpr int kVec = kVecWidth<T>;
  constexpr int kRows = kAlongC ? kSlicePixels : kSliceChannels, kColumns = kAlongC ? kSliceChannels : kSlicePixels;
  constexpr int kRowBytes = kColumns * static_cast<int>(sizeof(T));
  const int lane = thread_here() % 32;
  if (!kAlongC && !out.runs) {
#pragma unroll 1
    for (int i = lane; i < kRows * kColumns; i += 32) {
      const int32_t o = o0 + i / kColumns;
      const int64_t slot = slots[i % kColumns];
      if (slot < 0 || o >= out.channels) continue;
      out.data[slot + o * out.channel_stride] =
          *reinterpret_cast<const T*>(slice + at_row<T, kRowBytes>(i / kColumns, i % kColumns));
    }
    return;
  }
#pragma unroll 1
  for (int i = lane; i < kRows * (kColumns / kVec); i += 32) {
    const int row = i / (kColumns / kVec), first = i % (kColumns / kVec) * kVec;
    const auto values = *reinterpret_cast<const Vec<T, kVec>*>(slice + at_row<T, kRowBytes>(row, first));
    // The run's place in y, and which of its elements exist, all of them in a row or not.
    const int32_t o = o0 + (kAlongC ? first : row);
    const SlotOffsets run = slots + (kAlongC ? row : first);
    const int64_t at = run[0] + o * out.channel_stride;
    const bool together =
        run[0] >= 0 && (kAlongC ? o + kVec <= out.channels : o < out.channels && run[kVec - 1] == run[0] + kVec - 1);
    if (together && is_aligned(out.data + at, 16)) {
      *reinterpret_cast<Vec<T, kVec>*>(out.data + at) = values;
      continue;
    }
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      const int64_t slot = kAlongC ? run[0] : run[e];
      const int32_t of = o + (kAlongC ? e : 0);
      if (slot >= 0 && of < out.channels) out.data[slot + of * out.channel_stride] = values.v[e];
    }
  }
}

// The one place where accumulators become outputs: channels o0 .. of the warp's tile, `slots` being the offsets of its
// pixels. A slice of kSlicePixels x kSliceChannels at a time goes through `slice`, the warp's own; finish(values)
// changes four of them on their way.
template <bool kYAlongC, typename T, typename Warp, typename Finish>
DSCONV_DEVICE void store_warp_tile(const OutputTensor<T>& out, const Warp& warp, SlotOffsets slots, int32_t o0,
                                   unsigned char* slice, const Finish& finish) {
  constexpr int kRowBytes = (kYAlongC ? kSliceChannels : kSlicePixels) * static_cast<int>(sizeof(T));
  constexpr int kDown = Warp::kM / kSlicePixels, kSlices = kDown * (Warp::kN / kSliceChannels);
  constexpr int kI = kSlicePixels / 16, kJ = kSliceChannels / 8;  // fragments of a slice
  const int lane = thread_here() % 32, g = lane / 4, t = lane % 4;
  // at_row() of a row and a column is the exclusive or of at_row() of their bits.
  const int lane_at = kYAlongC ? at_row<T, kRowBytes>(g, 2 * t) : at_row<T, kRowBytes>(2 * t, g);
#pragma unroll 1
  for (int s = 0; s < kSlices; ++s) {
    const int32_t slice_o = o0 + s / kDown * kSliceChannels;
    if (slice_o >= out.channels) break;
#pragma unroll
    for (int column = 0; column < Warp::kN / 8; ++column) {
#pragma unroll
      for (int i = 0; i < Warp::kM / 16; ++i) {
        if (column / kJ * kDown + i / kI != s) continue;
        float values[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) values[r] = warp.acc[i][column][r];
        finish(values);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int pixel = 16 * (i % kI) + 8 * half, channel = 8 * (column % kJ);
          const T first = from_acc<T>(values[2 * half]), second = from_acc<T>(values[2 * half + 1]);
          if constexpr (kYAlongC) {
            *reinterpret_cast<Vec<T, 2>*>(slice + (lane_at ^ at_row<T, kRowBytes>(pixel, channel))) = {first, second};
          } else {
            *reinterpret_cast<T*>(slice + (lane_at ^ at_row<T, kRowBytes>(channel, pixel))) = first;
            *reinterpret_cast<T*>(slice + (lane_at ^ at_row<T, kRowBytes>(channel + 1, pixel))) = second;
          }
        }
      }
    }
    __syncwarp();
    store_slice<kYAlongC>(out, slots + s % kDown * kSlicePixels, slice_o, slice);
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

  DSCONV_DEVICE const T* start(const SlotOffsets& at, int32_t o) const { return tensor + at[0] + o * channel_stride; }

  // Whether all of them exist, lie together and are aligned.
  DSCONV_DEVICE bool is_vector(const SlotOffsets& at, int32_t o) const {
    const bool together =
        kAlongC ? channel_stride == 1 && o + kVec <= channels : o < channels && at[kVec - 1] == at[0] + kVec - 1;
    return together && at[0] >= 0 && is_aligned(start(at, o), 16);
  }

  DSCONV_DEVICE Vec<T, kVec> load(const SlotOffsets& at, int32_t o) const {
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
DSCONV_DEVICE void stage_gradient(const BackwardParams& p, bool runs, int32_t o0, SlotOffsets dy_at,
                                  SlotOffsets saved_at, unsigned char* tile) {
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
