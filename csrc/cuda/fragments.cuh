// Tiles in shared memory for the tensor cores: rows of 16-byte chunks, the chunks of a row exchanged (swizzled) so that
// the 8 rows of a matrix that ldmatrix reads at once lie in different banks; and a warp's product of two such tiles.
//
//   acc[m][n] += sum over k of a[m][k] * b[n][k]
//
// A k step is 32 bytes of k, two chunks: 16 elements of 2 bytes (m16n8k16) or 8 floats (m16n8k8, TF32). A tile is
// stored along k ("rows of k": row m or n, chunks along k), or across it ("columns of k": row k, chunks along m or n).
// Floats across k have no transposing ldmatrix, and are read one by one.
#pragma once

#include "ptx.cuh"

namespace dsconv {

// Where chunk `chunk` of row `row` lies, in chunks from the start of the row.
template <int kRowBytes>
DSCONV_DEVICE int swizzled(int row, int chunk) {
  if constexpr (kRowBytes >= 128) return chunk ^ (row & 7);
  if constexpr (kRowBytes == 32) return chunk ^ (row >> 2 & 1);
  return chunk;
}

// Rows of 64 bytes, two to a line of 128: the 8 chunks of a line are exchanged. Apart in their banks are the 8 rows
// that ldmatrix reads; the 8 bytes a lane that a warp's accumulators are stored in and the 16 bytes they are loaded in
// (mma_tile_io.cuh); and the two rows that the half warps of the depthwise stage write (fill_strips), which are in runs
// of four with an odd distance or twice an odd one.
DSCONV_DEVICE int swizzled_in_line(int row, int chunk) {
  const int line = row >> 1, run = row >> 2;
  return ((row & 1) << 2 | chunk) ^ ((line * 3 & 3) | ((run ^ run >> 1) & 1) << 2);
}

// The first byte of element `column` of row `row`. kAcross: of a tile across k, of floats: a lane quad reads 4 rows of
// k at 8 neighbouring m, and the swizzle keeps these apart instead.
template <typename T, int kRowBytes, bool kAcross = false>
DSCONV_DEVICE int at_row(int row, int column) {
  const int byte = column * static_cast<int>(sizeof(T)), chunk = byte / 16;
  if constexpr (kRowBytes == 64 && !(kAcross && sizeof(T) == 4)) {
    return (row >> 1) * 128 + swizzled_in_line(row, chunk) * 16 + byte % 16;
  }
  const int place = kAcross && sizeof(T) == 4 ? chunk ^ (row & 3) << 1 : swizzled<kRowBytes>(row, chunk);
  return row * kRowBytes + place * 16 + byte % 16;
}

// Where a warp reads its fragments of a tile: rows `first` .. of a, or of b 16 at a time. One place a lane is computed
// once; what differs from fragment to fragment is a constant on top of it.
//   a, 16 rows:  a[0], a[1] rows 0-7, 8-15 of the near chunk, a[2], a[3] of the far one
//   b, 16 rows:  b[0], b[1] near and far chunk of rows 0-7, b[2], b[3] of rows 8-15

// From rows of k. kAcross is the swizzle that the tile was written with.
template <typename T, int kRowBytes_, bool kAcross = false>
struct RowFragments {
  static constexpr int kRowBytes = kRowBytes_;
  int at;  // byte of this lane's row, k step 0

  DSCONV_DEVICE static RowFragments of_a(int first) {
    const int lane = thread_here() % 32;
    return at_place(first + lane % 16, lane / 16);
  }
  DSCONV_DEVICE static RowFragments of_b(int first) {
    const int lane = thread_here() % 32;
    return at_place(first + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
  // 16 rows further on the swizzle is the same, and a k step of two chunks flips bits of its own.
  DSCONV_DEVICE void load(const unsigned char* tile, int m, int step, uint32_t (&out)[4]) const {
    ldmatrix_x4(tile + (at ^ step * 32) + m * kRowBytes, out);
  }

 private:
  DSCONV_DEVICE static RowFragments at_place(int row, int chunk) {
    return {at_row<T, kRowBytes, kAcross>(row, chunk * kVecWidth<T>)};
  }
};

// From columns of k: a row of the tile is one k, chunks along m or n. `first` is a multiple of the warp's rows, a power
// of two.
template <typename T, int kRowBytes_, bool kAcross = true>
struct ColumnFragments {
  static constexpr int kRowBytes = kRowBytes_, kStep = 32 / static_cast<int>(sizeof(T));
  int at[sizeof(T) == 2 ? 1
                        : 2];  // 2 bytes: of this lane's row, k step 0; floats: of this lane's element, near and far
  bool is_a;

  DSCONV_DEVICE static ColumnFragments of_a(int first) {
    const int lane = thread_here() % 32;
    if constexpr (sizeof(T) == 2) {
      return {{at_row<T, kRowBytes, kAcross>(lane % 8 + lane / 16 * 8, first + lane / 8 % 2 * 8)}, true};
    } else {
      return {{at_row<T, kRowBytes, kAcross>(lane % 4, first + lane / 4),
               at_row<T, kRowBytes, kAcross>(lane % 4 + 4, first + lane / 4)},
              true};
    }
  }
  DSCONV_DEVICE static ColumnFragments of_b(int first) {
    ColumnFragments result = of_a(first);
    result.is_a = false;
    if constexpr (sizeof(T) == 2) {
      const int lane = thread_here() % 32;
      result.at[0] = at_row<T, kRowBytes, kAcross>(lane % 16, first + lane / 16 * 8);
    }
    return result;
  }
  // A step goes 16 rows on (8 of floats), so the swizzle stays; m, a multiple of 16, flips bits of the chunk.
  DSCONV_DEVICE void load(const unsigned char* tile, int m, int step, uint32_t (&out)[4]) const {
    const int flip = m * static_cast<int>(sizeof(T));
    if constexpr (sizeof(T) == 2) {
      ldmatrix_x4_trans(tile + (at[0] ^ flip) + step * kStep * kRowBytes, out);
    } else {
      const int far_m = 8 * static_cast<int>(sizeof(T));
      const unsigned char* near_k = tile + step * kStep * kRowBytes;
      const int half = kRowBytes == 64 && !kAcross ? (step & 1) * 64 : 0;  // rows of 64 bytes: the swizzle of 8 rows on
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int far_k = is_a ? i / 2 : i % 2, row = is_a ? i % 2 : i / 2;
        out[i] = *reinterpret_cast<const uint32_t*>(near_k + (at[far_k] ^ flip ^ half ^ row * far_m));
      }
    }
  }
};

// Floats as they came from global memory: rounded to TF32. 2-byte types are left as they are.
template <typename T>
DSCONV_DEVICE void round_fragment(uint32_t (&words)[4]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = to_tf32(bits_float(words[i]));
  }
}

// A value as the tensor core takes it.
template <typename T>
DSCONV_DEVICE T to_operand(float value) {
  if constexpr (sizeof(T) == 4) {
    return bits_float(to_tf32(value));
  } else {
    return from_acc<T>(value);
  }
}

// A warp's accumulators: kM rows x kN columns. acc[i][j][r] is row 16 i + g + r / 2 * 8, column 8 j + 2 t + r % 2.
template <int kM_, int kN_>
struct WarpTile {
  static constexpr int kM = kM_, kN = kN_;
  static_assert(kM % 16 == 0 && kN % 16 == 0, "whole fragments, b two at a time");
  float acc[kM / 16][kN / 8][4];

  DSCONV_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
        for (int r = 0; r < 4; ++r) acc[i][j][r] = 0;
      }
    }
  }

  // acc += a . b^T over one k step.
  template <typename T, bool kRoundA, bool kRoundB, typename FragmentsA, typename FragmentsB>
  DSCONV_DEVICE void multiply(const FragmentsA& a_at, const unsigned char* a_tile, const FragmentsB& b_at,
                              const unsigned char* b_tile, int step) {
    uint32_t a[kM / 16][4];
#pragma unroll
    for (int i = 0; i < kM / 16; ++i) {
      a_at.load(a_tile, 16 * i, step, a[i]);
      if (kRoundA) round_fragment<T>(a[i]);
    }
#pragma unroll
    for (int j = 0; j < kN / 16; ++j) {
      uint32_t b[4];
      b_at.load(b_tile, 16 * j, step, b);
      if (kRoundB) round_fragment<T>(b);
#pragma unroll
      for (int i = 0; i < kM / 16; ++i) {
        mma<T>(acc[i][2 * j], a[i], {b[0], b[1]});
        mma<T>(acc[i][2 * j + 1], a[i], {b[2], b[3]});
      }
    }
  }
};

}  // namespace dsconv
