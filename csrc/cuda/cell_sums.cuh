// What a lane of backward_depthwise_planes.cuh does for a strip of four cells: grad_x of their pixels from du and the
// taps, and the taps' sums from du and x. Unrolled for square kernels of 3 and 5 in steps of 1 and 2, looped for the
// others.
#pragma once

#include "box_sums.cuh"
#include "cell_tile.cuh"

namespace dsconv {

DSCONV_DEVICE float sum_over_warp(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// The pixels of x, and of grad_x, of the strips of a warp.
template <typename T>
struct StripPixels {
  const PlaneTile<T>& tile;
  const T* x;  // of the tensor
  const Strides& strides;
  int k;  // the warp's channel in the chunk
  bool staged;
  int32_t first_row, end_row, first_column, end_column;  // of the image, in the region

  DSCONV_DEVICE static StripPixels of(const PlaneTile<T>& tile, const T* x, const Strides& strides, int k) {
    const int32_t row0 = tile.row0(), column0 = tile.column0();
    return {tile,
            x,
            strides,
            k,
            tile.plan.x_staged,
            row0 < 0 ? -row0 : 0,
            static_cast<int32_t>(tile.g.h_in) - row0,
            column0 < 0 ? -column0 : 0,
            static_cast<int32_t>(tile.g.w_in) - column0};
  }

  DSCONV_DEVICE bool exists(int32_t row, int32_t column) const {
    return row >= first_row && row < end_row && column >= first_column && column < end_column;
  }

  // Where (row, column) of a slice is in the tile; corner: corner_of(slice, 0, k).
  DSCONV_DEVICE int32_t at(int32_t corner, int32_t slice, int32_t row, int32_t column) const {
    if (tile.plan.whole) return corner + row * static_cast<int32_t>(tile.g.w_in) + column;
    return tile.corner_of(slice, row, k) + column;
  }

  DSCONV_DEVICE float load(int32_t corner, int32_t slice, int32_t row, int32_t column) const {
    if (!exists(row, column)) return 0;
    if (staged) return to_acc(tile.tile[at(corner, slice, row, column)]);
    const Slice from = tile.slice_of(slice);
    return to_acc(x[from.n * strides.n + from.depth * strides.d + (tile.row0() + row) * strides.h +
                    (tile.column0() + column) * strides.w + quotient(tile.c0 + k, tile.g.multiplier) * strides.c]);
  }

  DSCONV_DEVICE void store(int32_t corner, int32_t slice, int32_t row, int32_t column, float value) const {
    if (exists(row, column)) tile.tile[at(corner, slice, row, column)] = from_acc<T>(value);
  }

  // Whether the slice is one of x.
  DSCONV_DEVICE bool has(int32_t slice) const {
    const Slice at = tile.slice_of(slice);
    return at.n < tile.g.n && inside(at.depth, static_cast<int32_t>(tile.g.d_in));
  }
};

// Where a strip's first tap is in du. What is not there is staged as zero, and its product with x is left out: x may be
// infinite there.
struct DuPlace {
  int32_t row, column, height, width;

  template <typename T>
  DSCONV_DEVICE static DuPlace of(const PlaneTile<T>& tile, int32_t row, int32_t column) {
    const Geometry& cells = tile.plan.cells;
    return {tile.place.row + row - static_cast<int32_t>(cells.pad_top),
            tile.place.column + column - static_cast<int32_t>(cells.pad_left), static_cast<int32_t>(cells.h_in),
            static_cast<int32_t>(cells.w_in)};
  }
  DSCONV_DEVICE bool has(int32_t down, int32_t along) const {
    return inside(row + down, height) && inside(column + along, width);
  }
  // Bits of the next 16 rows and, above them, columns, in one register.
  template <int kRows, int kColumns>
  DSCONV_DEVICE unsigned bits() const {
    static_assert(kRows <= 16 && kColumns <= 16, "a bit each");
    unsigned result = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) result |= inside(row + i, height) ? 1u << i : 0u;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) result |= inside(column + i, width) ? 1u << (16 + i) : 0u;
    return result;
  }
};

// Strips down a column, of a square kernel and its stride, known to the compiler: taps and sums in registers.
template <typename T, int kKernel, int kStride>
DSCONV_DEVICE void unrolled_cells(const DepthwisePlanesPlan& plan, const StripPixels<T>& pixels, bool sums,
                                  const CellStrip* strips, const unsigned char* du,
                                  const float (&taps)[kKernel * kKernel], float (&weight)[kKernel * kKernel]) {
  constexpr int kReach = (kKernel - 1 + kStride - 1) / kStride + 1, kPhases = kStride * kStride;
  const PixelBox& box = plan.box;
  const int lane = thread_here() % 32;
#pragma unroll 1
  for (int i = lane; i < plan.strips; i += 32) {
    const CellStrip strip = strips[i];
    if (strip.corner < 0) continue;
    const int32_t corner =
        plan.whole && (plan.grad_x || pixels.staged) ? pixels.tile.corner_of(strip.slice, 0, pixels.k) : 0;
    float x[kStripPixels][kPhases] = {}, grad[kStripPixels][kPhases] = {};
    if (sums) {
#pragma unroll
      for (int cell = 0; cell < kStripPixels; ++cell) {
#pragma unroll
        for (int phase = 0; phase < kPhases; ++phase) {
          x[cell][phase] = pixels.load(corner, strip.slice, (strip.row + cell) * kStride + phase / kStride,
                                       strip.column * kStride + phase % kStride);
        }
      }
    }
    const unsigned char* from = du + strip.corner;
    const unsigned there =
        DuPlace::of(pixels.tile, strip.row, strip.column).template bits<kStripPixels + kReach - 1, kReach>();
#pragma unroll
    for (int row = 0; row < kStripPixels + kReach - 1; ++row, from += box.row_pitch) {
#pragma unroll
      for (int b = 0; b < kReach; ++b) {
        const float value = to_acc(*reinterpret_cast<const T*>(from + b * static_cast<int>(sizeof(T))));
        const bool exists = (there >> row & there >> (16 + b) & 1) != 0;
#pragma unroll
        for (int cell = 0; cell < kStripPixels; ++cell) {
          const int a = row - cell;
          if (a < 0 || a >= kReach) continue;
#pragma unroll
          for (int phase = 0; phase < kPhases; ++phase) {
            const int kh = phase / kStride + kStride * (kReach - 1 - a);
            const int kw = phase % kStride + kStride * (kReach - 1 - b);
            if (kh >= kKernel || kw >= kKernel) continue;
            const int tap = kh * kKernel + kw;
            grad[cell][phase] = fused_multiply_add(value, taps[tap], grad[cell][phase]);
            if (exists) weight[tap] = fused_multiply_add(value, x[cell][phase], weight[tap]);
          }
        }
      }
    }
    if (!plan.grad_x) continue;
#pragma unroll
    for (int cell = 0; cell < kStripPixels; ++cell) {
#pragma unroll
      for (int phase = 0; phase < kPhases; ++phase) {
        pixels.store(corner, strip.slice, (strip.row + cell) * kStride + phase / kStride,
                     strip.column * kStride + phase % kStride, grad[cell][phase]);
      }
    }
  }
}

// The taps of one phase of the cells, those of dw_weight that its pixels meet, against their order there.
struct PhaseTaps {
  int32_t d, h, w;           // taps in each direction
  StripSteps steps;          // the strips' walk over du, a along the strips, b across
  int32_t first;             // bytes from a strip's corner to the first of du that is met
  int32_t at_d, at_h, at_w;  // the same in slices, rows and columns of du
  int32_t weight, weight_d;  // elements of dw_weight: of the tap there; from a tap of the depth to the next
};

DSCONV_DEVICE PhaseTaps phase_taps(const DepthwisePlanesPlan& plan, const Geometry& g, int32_t pd, int32_t ph,
                                   int32_t pw) {
  const PixelBox& box = plan.box;
  const auto taps_of = [](int64_t kernel, int64_t stride, int32_t phase) {
    const int32_t k = static_cast<int32_t>(kernel);
    return phase < k ? (k - 1 - phase) / static_cast<int32_t>(stride) + 1 : 0;
  };
  PhaseTaps t{};
  t.d = taps_of(g.kernel_d, g.stride_d, pd);
  t.h = taps_of(g.kernel_h, g.stride_h, ph);
  t.w = taps_of(g.kernel_w, g.stride_w, pw);
  const int32_t kernel_w = static_cast<int32_t>(g.kernel_w), plane = static_cast<int32_t>(g.kernel_h) * kernel_w;
  const int32_t stride_h = static_cast<int32_t>(g.stride_h), stride_w = static_cast<int32_t>(g.stride_w);
  const int32_t stride_d = static_cast<int32_t>(g.stride_d);
  const int32_t dilation_h = static_cast<int32_t>(g.dilation_h), dilation_w = static_cast<int32_t>(g.dilation_w);
  t.at_d = (static_cast<int32_t>(plan.cells.kernel_d) - t.d) * static_cast<int32_t>(g.dilation_d);
  t.at_h = (static_cast<int32_t>(plan.cells.kernel_h) - t.h) * dilation_h;
  t.at_w = (static_cast<int32_t>(plan.cells.kernel_w) - t.w) * dilation_w;
  t.first = (static_cast<int32_t>(plan.cells.kernel_d) - t.d) * box.plane_pitch + t.at_h * box.row_pitch +
            t.at_w * box.column_pitch;
  t.weight = (pd + stride_d * (t.d - 1)) * plane + (ph + stride_h * (t.h - 1)) * kernel_w + pw + stride_w * (t.w - 1);
  t.weight_d = -stride_d * plane;
  t.steps = strip_steps(box, g);
  const int32_t down = -stride_h * kernel_w, along = -stride_w;
  t.steps.taps_a = box.strips_down ? t.h : t.w;
  t.steps.taps_b = box.strips_down ? t.w : t.h;
  t.steps.stride_a = 1;
  t.steps.weight_a = box.strips_down ? down : along;
  t.steps.weight_b = box.strips_down ? along : down;
  return t;
}

// Any kernel. First the sums of all taps, then grad_x, which takes the place of x.
template <typename T>
DSCONV_DEVICE void looped_cells(const DepthwisePlanesPlan& plan, const StripPixels<T>& pixels, bool sums,
                                const CellStrip* strips, const unsigned char* du, const T* taps, float* weight) {
  const Geometry& g = pixels.tile.g;
  const PixelBox& box = plan.box;
  const int lane = thread_here() % 32;
  const int32_t stride_d = static_cast<int32_t>(g.stride_d), stride_h = static_cast<int32_t>(g.stride_h);
  const int32_t stride_w = static_cast<int32_t>(g.stride_w);
  const int32_t down = box.strips_down ? 1 : 0;
#pragma unroll 1
  for (int32_t phase = 0; phase < stride_d * stride_h * stride_w; ++phase) {
    const int32_t line = phase / stride_w, pw = phase - line * stride_w;
    const int32_t pd = line / stride_h, ph = line - pd * stride_h;
    const PhaseTaps t = phase_taps(plan, g, pd, ph, pw);
    const StripSteps& s = t.steps;
    const auto for_strips = [&](const auto& f) {
#pragma unroll 1
      for (int i = lane; i < plan.strips; i += 32) {
        const CellStrip strip = strips[i];
        const int32_t slice = strip.slice * stride_d + pd;
        if (strip.corner < 0 || !pixels.has(slice)) continue;
        const bool in_tile = plan.whole && (plan.grad_x || pixels.staged);
        f(strip, in_tile ? pixels.tile.corner_of(slice, 0, pixels.k) : 0, slice, strip.row * stride_h + ph,
          strip.column * stride_w + pw);
      }
    };
    if (sums) {
#pragma unroll 1
      for (int32_t tap = 0; tap < t.d * s.taps_b; ++tap) {
        const int32_t a_d = tap / s.taps_b, b = tap - a_d * s.taps_b;
#pragma unroll 1
        for (int32_t a = 0; a < s.taps_a; a += 4) {
          const int32_t last = s.taps_a - 1;
          const int32_t step = s.dilation_a * s.pitch_a;
          float sum[4] = {};
          for_strips([&](const CellStrip& strip, int32_t corner, int32_t slice, int32_t row, int32_t column) {
            const int32_t depth = pixels.tile.place.slice_at(strip.slice, plan.cells).depth + t.at_d +
                                  a_d * static_cast<int32_t>(g.dilation_d) - static_cast<int32_t>(plan.cells.pad_front);
            if (!inside(depth, static_cast<int32_t>(g.d_out))) return;
            const DuPlace place = DuPlace::of(pixels.tile, strip.row + t.at_h, strip.column + t.at_w);
            const auto exists = [&](int32_t along_a) {
              return down != 0 ? place.has(along_a, b * static_cast<int32_t>(g.dilation_w))
                               : place.has(b * static_cast<int32_t>(g.dilation_h), along_a);
            };
            const unsigned char* from = du + strip.corner + t.first + a_d * box.plane_pitch + b * s.pitch_b;
            float x[kStripPixels];
#pragma unroll
            for (int i = 0; i < kStripPixels; ++i) {
              x[i] = pixels.load(corner, slice, row + i * down * stride_h, column + i * (1 - down) * stride_w);
            }
            if (s.dilation_a == 1) {
              // The last taps of a group may be beyond the last one: what they sum up is not kept.
              float window[kStripPixels + 3];
              unsigned there = 0;
#pragma unroll
              for (int i = 0; i < kStripPixels + 3; ++i) {
                const int32_t of = a + i < last + kStripPixels ? a + i : last + kStripPixels - 1;
                window[i] = to_acc(*reinterpret_cast<const T*>(from + of * s.pitch_a));
                there |= exists(of) ? 1u << i : 0u;
              }
#pragma unroll
              for (int j = 0; j < 4; ++j) {
#pragma unroll
                for (int i = 0; i < kStripPixels; ++i) {
                  if ((there >> (i + j) & 1) != 0) sum[j] = fused_multiply_add(window[i + j], x[i], sum[j]);
                }
              }
            } else {
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const int32_t tap = a + j < last ? a + j : last;
                const unsigned char* own = from + tap * step;
#pragma unroll
                for (int i = 0; i < kStripPixels; ++i) {
                  if (!exists(i + tap * s.dilation_a)) continue;
                  sum[j] = fused_multiply_add(to_acc(*reinterpret_cast<const T*>(own + i * s.pitch_a)), x[i], sum[j]);
                }
              }
            }
          });
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float total = sum_over_warp(sum[j]);
            if (lane == 0 && a + j <= last) {
              weight[t.weight + a_d * t.weight_d + b * s.weight_b + (a + j) * s.weight_a] += total;
            }
          }
        }
      }
    }
    if (!plan.grad_x) continue;
    for_strips([&](const CellStrip& strip, int32_t corner, int32_t slice, int32_t row, int32_t column) {
      float grad[kStripPixels] = {};
#pragma unroll 1
      for (int32_t a_d = 0; a_d < t.d; ++a_d) {
        if (t.h == 0 || t.w == 0) break;
        looped_item<T, 1, 1>(du + strip.corner + t.first + a_d * box.plane_pitch, 0, taps + t.weight + a_d * t.weight_d,
                             0, s, grad);
      }
#pragma unroll
      for (int i = 0; i < kStripPixels; ++i) {
        pixels.store(corner, slice, row + i * down * stride_h, column + i * (1 - down) * stride_w, grad[i]);
      }
    });
  }
}

}  // namespace dsconv
