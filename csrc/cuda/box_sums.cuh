// The sums of a depthwise convolution over staged x: of a patch, a strip or a pair of strips in registers, whose pixels
// share values and taps. Unrolled for 3x3 and 5x5 in steps of 1 and 2, looped for the others. In fp32.
#pragma once

#include "box_tables.cuh"
#include "depthwise.cuh"

namespace dsconv {

static_assert(kStripPixels == kStrip, "a strip of accumulate_taps");

// What a strip walks along: a is its own direction, b the other one. Bytes from tap to tap.
struct StripSteps {
  int32_t taps_a, taps_b, stride_a, dilation_a;
  int32_t pitch_a, pitch_b;    // bytes from tap to tap: along a with dilation 1, along b with its dilation
  int32_t weight_a, weight_b;  // elements of dw_weight from tap to tap
  int32_t taps;
};

DSCONV_DEVICE StripSteps strip_steps(const PixelBox& box, const Geometry& g) {
  const int32_t kh = static_cast<int32_t>(g.kernel_h), kw = static_cast<int32_t>(g.kernel_w);
  const int32_t dh = static_cast<int32_t>(g.dilation_h), dw = static_cast<int32_t>(g.dilation_w);
  if (box.strips_down) {
    return {kh, kw, static_cast<int32_t>(g.stride_h), dh, box.row_pitch, dw * box.column_pitch, kw, 1, kh * kw};
  }
  return {kw, kh, static_cast<int32_t>(g.stride_w), dw, box.column_pitch, dh * box.row_pitch, 1, kw, kh * kw};
}

template <typename T, int kUnit>
DSCONV_DEVICE void load_unit(const unsigned char* at, float (&values)[kUnit]) {
  const Vec<T, kUnit> loaded = *reinterpret_cast<const Vec<T, kUnit>*>(at);
#pragma unroll
  for (int u = 0; u < kUnit; ++u) values[u] = to_acc(loaded.v[u]);
}

// One row of x for both rows of outputs of a patch, whose taps there are `upper` and `lower`: each value is read once
// and goes to every output that it reaches.
template <bool kUpper, bool kLower, typename T, int kUnit, int kKernel, int kStride>
DSCONV_DEVICE void patch_row(const unsigned char* x, const float (&upper)[kKernel][kUnit],
                             const float (&lower)[kKernel][kUnit], float (&z)[kPatchPixels * kUnit]) {
#pragma unroll
  for (int column = 0; column < 3 * kStride + kKernel; ++column) {
    float value[kUnit];
    load_unit<T, kUnit>(x + column * kChunkBytes, value);
#pragma unroll
    for (int i = 0; i < kPatchPixels; ++i) {
      const int kw = column - i % 4 * kStride;
      if (kw < 0 || kw >= kKernel || (i < 4 ? !kUpper : !kLower)) continue;
#pragma unroll
      for (int u = 0; u < kUnit; ++u) {
        z[i * kUnit + u] = fused_multiply_add(value[u], i < 4 ? upper[kw][u] : lower[kw][u], z[i * kUnit + u]);
      }
    }
  }
}

// A square kernel and its stride, known to the compiler; dilation 1. Two rows of four pixels, channels together.
// kReversed: the taps from the last to the first.
template <typename T, int kUnit, int kKernel, int kStride, bool kReversed = false>
DSCONV_DEVICE void unrolled_patch(const unsigned char* x, int32_t row_pitch, const T* weight,
                                  float (&z)[kPatchPixels * kUnit]) {
  constexpr int kTaps = kKernel * kKernel;
  const auto place_of = [](int u, int kh, int kw) {
    const int tap = kh * kKernel + kw;
    return u * kTaps + (kReversed ? kTaps - 1 - tap : tap);
  };
  float upper[kKernel][kUnit], lower[kKernel][kUnit];
  if constexpr (kKernel == 3) {
    // The taps of the patch's channels lie together, and are loaded by words: an odd number, so that the lanes' are in
    // different banks.
    static_assert(kUnit * sizeof(T) == sizeof(uint32_t));
    Vec<T, kUnit> words[kTaps];
#pragma unroll
    for (int i = 0; i < kTaps; ++i) words[i] = reinterpret_cast<const Vec<T, kUnit>*>(weight)[i];
    const auto unpack_taps = [&](int kh, float (&taps)[kKernel][kUnit]) {
#pragma unroll
      for (int i = 0; i < kKernel * kUnit; ++i) {
        const int at = place_of(i % kUnit, kh, i / kUnit);
        taps[i / kUnit][i % kUnit] = to_acc(words[at / kUnit].v[at % kUnit]);
      }
    };
#pragma unroll
    for (int row = 0; row < kStride + kKernel; ++row, x += row_pitch) {
      if (row < kKernel) unpack_taps(row, upper);
      if (row >= kStride) unpack_taps(row - kStride, lower);
      if (row < kStride) patch_row<true, false, T, kUnit, kKernel, kStride>(x, upper, lower, z);
      if (row >= kStride && row < kKernel) patch_row<true, true, T, kUnit, kKernel, kStride>(x, upper, lower, z);
      if (row >= kKernel) patch_row<false, true, T, kUnit, kKernel, kStride>(x, upper, lower, z);
    }
    return;
  }
  // A row of x in flight at a time: more would spill.
  const auto load_taps = [&](int kh, float (&taps)[kKernel][kUnit]) {
#pragma unroll
    for (int i = 0; i < kKernel * kUnit; ++i) {
      taps[i / kUnit][i % kUnit] = to_acc(weight[place_of(i % kUnit, kh, i / kUnit)]);
    }
  };
#pragma unroll 1
  for (int row = 0; row < kStride; ++row, x += row_pitch) {
    load_taps(row, upper);
    patch_row<true, false, T, kUnit, kKernel, kStride>(x, upper, lower, z);
  }
#pragma unroll 1
  for (int row = kStride; row < kKernel; ++row, x += row_pitch) {
    load_taps(row - kStride, lower);
    // At stride 2 the row is read once for each row of outputs: the taps of both beside eleven values would spill.
    if constexpr (kStride == 2) patch_row<false, true, T, kUnit, kKernel, kStride>(x, upper, lower, z);
    load_taps(row, upper);
    patch_row<true, kStride == 1, T, kUnit, kKernel, kStride>(x, upper, lower, z);
  }
#pragma unroll 1
  for (int row = kKernel; row < kKernel + kStride; ++row, x += row_pitch) {
    load_taps(row - kStride, lower);
    patch_row<false, true, T, kUnit, kKernel, kStride>(x, upper, lower, z);
  }
}

// Strips down a column, columns together: each row of x is read once and goes to every output that it reaches.
template <typename T, int kKernel, int kStride>
DSCONV_DEVICE void column_strip(const unsigned char* x, int32_t row_pitch, const T* weight, float (&z)[kStripPixels]) {
  float taps[kKernel][kKernel];
#pragma unroll
  for (int kh = 0; kh < kKernel; ++kh) {
#pragma unroll
    for (int kw = 0; kw < kKernel; ++kw) taps[kh][kw] = to_acc(weight[kh * kKernel + kw]);
  }
#pragma unroll
  for (int r = 0; r < (kStripPixels - 1) * kStride + kKernel; ++r) {
    float row[kKernel];
#pragma unroll
    for (int kw = 0; kw < kKernel; ++kw) {
      row[kw] = to_acc(*reinterpret_cast<const T*>(x + kw * static_cast<int>(sizeof(T))));
    }
    x += row_pitch;
#pragma unroll
    for (int i = 0; i < kStripPixels; ++i) {
      const int kh = r - i * kStride;
      if (kh < 0 || kh >= kKernel) continue;
      float sum = 0;
#pragma unroll
      for (int kw = 0; kw < kKernel; ++kw) sum = fused_multiply_add(row[kw], taps[kh][kw], sum);
      z[i] += sum;
    }
  }
}

// The columns of x, some values of a row, by words of two. `odd`: the first is the second one of its word.
struct ColumnsByTwos {
  bool odd;

  template <typename T, int kColumns>
  DSCONV_DEVICE void load(const unsigned char* x, float (&row)[kColumns]) const {
    constexpr int kWords = (kColumns + 1) / 2, kLoads = (kColumns + 2) / 2;
    if (odd) x -= sizeof(T);
    uint32_t words[kLoads + 1] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (i < kWords || odd) words[i] = *reinterpret_cast<const uint32_t*>(x + 4 * i);
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const uint32_t word = odd ? words[i / 2] >> 16 | words[i / 2 + 1] << 16 : words[i / 2];
      row[i] = to_acc(T{static_cast<uint16_t>(i % 2 == 0 ? word : word >> 16)});
    }
  }
};

// The same by fours, the first being number kFirst of its four. At stride 2 the lanes' words are two apart, every other
// bank twice; their fours are neighbours.
template <int kFirst>
struct ColumnsByFours {
  template <typename T, int kColumns>
  DSCONV_DEVICE void load(const unsigned char* x, float (&row)[kColumns]) const {
    constexpr int kFours = (kFirst + kColumns + 3) / 4;
    const auto* from = reinterpret_cast<const Vec<T, 4>*>(x - kFirst * static_cast<int>(sizeof(T)));
    Vec<T, 4> fours[kFours];
#pragma unroll
    for (int i = 0; i < kFours; ++i) fours[i] = from[i];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) row[i] = to_acc(fours[(kFirst + i) / 4].v[(kFirst + i) % 4]);
  }
};

template <int kKernel>
using PairByFours = ColumnsByFours<pair_start(kKernel)>;

// Two such strips side by side, z[row][column], of 2-byte types. x: the first of them. The sums are those of
// column_strip.
template <typename T, int kKernel, int kStride, typename Columns>
DSCONV_DEVICE void column_pair(const unsigned char* x, const Columns& columns, int32_t row_pitch, const T* weight,
                               float (&z)[2 * kStripPixels]) {
  static_assert(sizeof(T) == 2, "two columns a word");
  float taps[kKernel][kKernel];
#pragma unroll
  for (int kh = 0; kh < kKernel; ++kh) {
#pragma unroll
    for (int kw = 0; kw < kKernel; ++kw) taps[kh][kw] = to_acc(weight[kh * kKernel + kw]);
  }
#pragma unroll
  for (int r = 0; r < (kStripPixels - 1) * kStride + kKernel; ++r) {
    float row[kStride + kKernel];
    columns.template load<T>(x, row);
    x += row_pitch;
#pragma unroll
    for (int i = 0; i < kStripPixels; ++i) {
      const int kh = r - i * kStride;
      if (kh < 0 || kh >= kKernel) continue;
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        float sum = 0;
#pragma unroll
        for (int kw = 0; kw < kKernel; ++kw) sum = fused_multiply_add(row[column * kStride + kw], taps[kh][kw], sum);
        z[2 * i + column] += sum;
      }
    }
  }
}

template <typename T, bool kAlongC, int kUnit, int kKernel, int kStride, int kValues>
DSCONV_DEVICE void unrolled_item(const PixelBox& box, const unsigned char* x, const T* weight, float (&z)[kValues]) {
  const int32_t row_pitch = box.row_pitch;
  if constexpr (kAlongC) {
    unrolled_patch<T, kUnit, kKernel, kStride>(x, row_pitch, weight, z);
  } else if constexpr (kValues == 2 * kStripPixels) {
    if constexpr (kStride == 2) {
      if (box.fours) return column_pair<T, kKernel, kStride>(x, PairByFours<kKernel>{}, row_pitch, weight, z);
    }
    const ColumnsByTwos columns{(reinterpret_cast<uintptr_t>(x) & 2) != 0};
    column_pair<T, kKernel, kStride>(x, columns, row_pitch, weight, z);
  } else {
    column_strip<T, kKernel, kStride>(x, row_pitch, weight, z);
  }
}

// Any kernel; weight_unit: elements from a channel's taps to the next one's. kRuns runs of four pixels, run_pitch bytes
// apart. At stride and dilation 1 along a run the window slides: one load a tap, or along the columns of nchw one load
// of the four columns that four taps add to it, which are the lanes' neighbours too.
template <typename T, int kUnit, int kRuns>
DSCONV_DEVICE void looped_item(const unsigned char* x, int32_t run_pitch, const T* weight, int32_t weight_unit,
                               const StripSteps& s, float (&z)[kRuns * 4 * kUnit]) {
  const bool slides = s.stride_a == 1 && s.dilation_a == 1;
  constexpr bool kFours = kUnit == 1 && kRuns == 1 && sizeof(T) <= 4;
  const bool by_fours = kFours && slides && s.pitch_a == static_cast<int32_t>(sizeof(T));
#pragma unroll 1
  for (int32_t b = 0; b < s.taps_b; ++b) {
    const unsigned char* row = x + b * s.pitch_b;
    float window[kRuns][4][kUnit];
    if (slides) {
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
#pragma unroll
        for (int i = 1; i < 4; ++i) load_unit<T, kUnit>(row + r * run_pitch + (i - 1) * s.pitch_a, window[r][i]);
      }
    }
#pragma unroll 1
    for (int32_t a = 0; a < s.taps_a; ++a) {
      if constexpr (kFours) {
        const unsigned char* next = row + (a + 3) * s.pitch_a;
        if (by_fours && a + 4 <= s.taps_a && reinterpret_cast<uintptr_t>(next) % (4 * sizeof(T)) == 0) {
          float columns[7] = {window[0][1][0], window[0][2][0], window[0][3][0]};
          const auto four = *reinterpret_cast<const Vec<T, 4>*>(next);
#pragma unroll
          for (int i = 0; i < 4; ++i) columns[3 + i] = window[0][i][0] = to_acc(four.v[i]);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float tap = to_acc(weight[(a + j) * s.weight_a + b * s.weight_b]);
#pragma unroll
            for (int i = 0; i < 4; ++i) z[i] = fused_multiply_add(columns[i + j], tap, z[i]);
          }
          a += 3;
          continue;
        }
      }
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        if (slides) {
#pragma unroll
          for (int i = 0; i < 3; ++i) {
#pragma unroll
            for (int u = 0; u < kUnit; ++u) window[r][i][u] = window[r][i + 1][u];
          }
          load_unit<T, kUnit>(row + r * run_pitch + (a + 3) * s.pitch_a, window[r][3]);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            load_unit<T, kUnit>(row + r * run_pitch + (i * s.stride_a + a * s.dilation_a) * s.pitch_a, window[r][i]);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kUnit; ++u) {
        const float tap = to_acc(weight[u * weight_unit + a * s.weight_a + b * s.weight_b]);
#pragma unroll
        for (int i = 0; i < 4 * kRuns; ++i) {
          z[i * kUnit + u] = fused_multiply_add(window[i / 4][i % 4][u], tap, z[i * kUnit + u]);
        }
      }
    }
  }
}

}  // namespace dsconv
