// Backward, stage D, where columns are adjacent in memory: the formulas of backward_depthwise.cuh in one kernel, from
// boxes in shared memory (depthwise_planes_plan.h), for Half, BFloat16 and float. Sums in fp32.
//
//   du --cp.async--> a box of cells and its halo, kPlaneChannels channels
//   x  --cp.async--> the pixels of these cells, as they lie in memory
//
//   a lane has a strip of four cells at a time, of the channel of its warp: each value of du that it reads is a factor
//   of grad_x and, with x, of grad_dw_weight
//
//   grad_x takes the place of x in shared memory, and goes to global memory 16 bytes at a time
//
// A block is a chunk of channels and the boxes of one split. Square kernels of 3 and 5 at stride 1 and 2 have their
// taps and the taps' sums in registers from the first box to the last; others go by four taps of a row or column at a
// time, whose sums are added up in shared memory. Lanes are added by shuffles: always the same tree. One partial sum a
// split, see reduce.cuh.
//
// Global traffic: du once with the halo of the boxes, x once, grad_x once. Shared memory as planned.
#pragma once

#include "box_input.cuh"
#include "cuda_plan.h"
#include "launch_blocks.cuh"
#include "reduce.cuh"

namespace dsconv {

struct alignas(4) CellStrip {
  int32_t corner;  // byte in the staged chunk of du of the first tap; -1: no cell of it exists
  int16_t slice, row, column, unused;
};

struct alignas(16) PlaneLine {
  int64_t source;  // elements from the first channel of the box's first image; -1: not there
  int32_t length;  // elements
  int32_t first;   // of the line in the region of the box, counted along whole rows or along its own
};

// x and grad_x of a box. Elements are counted from the tile's beginning.
template <typename T>
struct PlaneTile {
  static constexpr int kVec = kVecWidth<T>;

  const Geometry& g;
  const DepthwisePlanesPlan& plan;
  BoxPlace place;
  int32_t c0;
  T* tile;
  PlaneLine* lines;

  DSCONV_DEVICE int32_t row0() const {
    return place.row * static_cast<int32_t>(g.stride_h) -
           static_cast<int32_t>(g.pad_top) % static_cast<int32_t>(g.stride_h);
  }
  DSCONV_DEVICE int32_t column0() const {
    return place.column * static_cast<int32_t>(g.stride_w) -
           static_cast<int32_t>(g.pad_left) % static_cast<int32_t>(g.stride_w);
  }

  // The depth in x of slice `line` of the region, and its image.
  DSCONV_DEVICE Slice slice_of(int32_t line) const {
    const int32_t stride_d = static_cast<int32_t>(g.stride_d);
    const Slice cell = place.slice_at(line / stride_d, plan.cells);
    return {cell.n, cell.depth * stride_d - static_cast<int32_t>(g.pad_front) % stride_d + line % stride_d};
  }

  DSCONV_DEVICE void fill_lines() const {
    const int32_t h = static_cast<int32_t>(g.h_in), w = static_cast<int32_t>(g.w_in), row0 = this->row0(),
                  column0 = this->column0();
#pragma unroll 1
    for (int i = thread_here(); i < plan.lines; i += kBlockThreads) {
      const int32_t slice = plan.whole ? i : i / plan.region_h, row_in_box = plan.whole ? 0 : i - slice * plan.region_h;
      const Slice at = slice_of(slice);
      const int32_t first_row = plan.whole && row0 < 0 ? 0 : row0 + row_in_box;
      const int32_t row_end = row0 + plan.region_h < h ? row0 + plan.region_h : h;
      const int32_t first_column = column0 > 0 ? column0 : 0;
      const int32_t column_end = column0 + plan.region_w < w ? column0 + plan.region_w : w;
      const bool exists = at.n < g.n && inside(at.depth, static_cast<int32_t>(g.d_in)) && inside(first_row, h) &&
                          first_column < column_end;
      const int32_t rows = plan.whole ? row_end - first_row : 1;
      int32_t length = rows * (column_end - first_column);
      if (plan.together)
        length = static_cast<int32_t>(g.c_in - c0 < kPlaneChannels ? g.c_in - c0 : kPlaneChannels) * h * w;
      lines[i] = {
          exists ? (at.n - place.n) * plan.strides.n + at.depth * plan.strides.d + int64_t{first_row} * w + first_column
                 : -1,
          exists ? length : 0, (first_row - row0 - row_in_box) * w + first_column - column0};
    }
  }

  // Elements from the tensor's beginning to a line of channel c0 + k, or of all channels.
  DSCONV_DEVICE int64_t start_of(const PlaneLine& line, int k) const {
    return line.source + place.n * plan.strides.n + quotient(c0 + k, g.multiplier) * plan.strides.c;
  }

  // Where a line lies in the tile: as far behind a multiple of 16 bytes as in the tensor.
  DSCONV_DEVICE int32_t place_of(int32_t line, int k, int64_t start) const {
    return (plan.together ? line : line * kPlaneChannels + k) * plan.line_elements + static_cast<int32_t>(start % kVec);
  }

  // The pixel in row 0 and column 0 of slice `slice` of the region, channel k; of row `row` where rows are lines.
  DSCONV_DEVICE int32_t corner_of(int32_t slice, int32_t row, int k) const {
    const int32_t at = plan.whole ? slice : slice * plan.region_h + row;
    const PlaneLine line = lines[at];
    const int own = plan.together ? 0 : k;
    const int32_t channel = plan.together ? k * static_cast<int32_t>(g.h_in * g.w_in) : 0;
    return place_of(at, own, start_of(line, own)) + channel - line.first;
  }

  // Calls f(place in the tile, elements from the tensor's beginning, first, end) for each piece of 16 bytes of the
  // tensor that has elements of the box, those from `first` to `end` of the piece.
  template <typename F>
  DSCONV_DEVICE void for_pieces(const F& f) const {
    const unsigned pieces = static_cast<unsigned>(plan.line_elements / kVec);
    const unsigned channels = plan.together ? 1 : kPlaneChannels,
                   count = pieces * channels * static_cast<unsigned>(plan.lines);
#pragma unroll 1
    for (unsigned i = static_cast<unsigned>(thread_here()); i < count; i += kBlockThreads) {
      const unsigned part = i / pieces, at = part / channels;
      const int k = static_cast<int>(part - at * channels);
      const PlaneLine line = lines[at];
      if (line.source < 0 || c0 + k >= g.c_mid) continue;
      const int64_t start = start_of(line, k);
      const int32_t skipped = static_cast<int32_t>(start % kVec);
      const int32_t piece = static_cast<int32_t>(i - part * pieces) * kVec, end = skipped + line.length - piece;
      if (end <= 0) continue;
      f(place_of(static_cast<int32_t>(at), k, start) - skipped + piece, start - skipped + piece,
        piece == 0 ? skipped : 0, end < kVec ? end : kVec);
    }
  }

  // The caller commits, waits and puts the barriers.
  DSCONV_DEVICE void load(const T* x) const {
    for_pieces([&](int32_t to, int64_t from, int32_t, int32_t end) {
      cp_async<16>(tile + to, x + from, end * static_cast<int>(sizeof(T)));
    });
  }

  DSCONV_DEVICE void store(T* grad_x) const {
    for_pieces([&](int32_t from, int64_t to, int32_t first, int32_t end) {
      const Vec<T, kVec> values = *reinterpret_cast<const Vec<T, kVec>*>(tile + from);
      if (first == 0 && end == kVec) {
        *reinterpret_cast<Vec<T, kVec>*>(grad_x + to) = values;
      } else {
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          if (e >= first && e < end) grad_x[to + e] = values.v[e];
        }
      }
    });
  }
};

DSCONV_DEVICE void fill_cell_strips(const DepthwisePlanesPlan& plan, const BoxPlace& place, int element,
                                    CellStrip* strips) {
  const PixelBox& box = plan.box;
  const Geometry& cells = plan.cells;
  const int32_t rows = box.strips_down ? kStripPixels : 1, columns = kStripPixels / rows;
  const int32_t height = box.h / rows, width = box.w / columns;
  const int32_t phase = -static_cast<int32_t>(cells.pad_left) + place.column - first_column(box, place, cells, element);
#pragma unroll 1
  for (int i = thread_here(); i < plan.strips; i += kBlockThreads) {
    const int32_t line = i / width, slice = line / height;
    const int32_t row = (line - slice * height) * rows, column = (i - line * width) * columns;
    const bool exists = place.slice_at(slice, cells).n < cells.n && place.row + row < cells.h_out &&
                        place.column + column < cells.w_out;
    const int32_t corner = slice * static_cast<int32_t>(cells.kernel_d) * box.plane_pitch + row * box.row_pitch +
                           (column + phase) * box.column_pitch;
    strips[i] = {exists ? corner : -1, static_cast<int16_t>(slice), static_cast<int16_t>(row),
                 static_cast<int16_t>(column), 0};
  }
}

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

// kKernel, kStride: 3 or 5, 1 or 2, dilation 1, without a depth; kKernel 0: any. weight_partial [splits][c_mid][taps],
// bias_partial [splits][c_mid]; either may be null.
template <typename T, int kKernel, int kStride>
DSCONV_KERNEL void DSCONV_BOUNDS(kBlockThreads, 2)
    depthwise_planes_kernel(BackwardParams p, DepthwisePlanesPlan plan, const T* du, Strides du_strides,
                            float* weight_partial, float* bias_partial) {
  constexpr int kElement = static_cast<int>(sizeof(T)), kTaps = kKernel > 0 ? kKernel * kKernel : 1;
  DSCONV_DYNAMIC_SHARED(unsigned char, shared);
  const Geometry& g = p.geom;
  const Geometry& cells = plan.cells;
  const PixelBox& box = plan.box;
  Span* spans = reinterpret_cast<Span*>(shared + plan.spans);
  CellStrip* strips = reinterpret_cast<CellStrip*>(shared + plan.strips_at);
  PlaneLine* lines = reinterpret_cast<PlaneLine*>(shared + plan.lines_at);
  T* taps = reinterpret_cast<T*>(shared + plan.taps);
  const int lane = thread_here() % 32, warp = thread_here() / 32;
  const int64_t split = blockIdx.x / static_cast<unsigned>(plan.chunks);
  const int32_t c0 = static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(plan.chunks)) * kPlaneChannels;
  const bool there = c0 + warp < g.c_mid, sums = weight_partial != nullptr;
  const int32_t tap_total = static_cast<int32_t>(tap_count(g));
  const int32_t left = static_cast<int32_t>(g.c_mid) - c0, channels = left < kPlaneChannels ? left : kPlaneChannels;
  stage_run(static_cast<const T*>(p.dw_weight) + int64_t{c0} * tap_total, channels * tap_total,
            kPlaneChannels * tap_total, taps);
  cp_async_commit();
  cp_async_wait<0>();
  float* looped_sums = reinterpret_cast<float*>(shared + plan.sums_at) + warp * tap_total;
  if constexpr (kKernel == 0) {
#pragma unroll 1
    for (int i = lane; i < tap_total; i += 32) looped_sums[i] = 0;
  }
  __syncthreads();
  [[maybe_unused]] float own_taps[kTaps] = {}, own_sums[kTaps] = {};
  if constexpr (kKernel > 0) {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) own_taps[tap] = to_acc(taps[warp * kTaps + tap]);
  }

  const DepthwiseInput<T> in{du, nullptr, nullptr, cells, du_strides, Layout::nchw, Activation::identity};
  const int64_t first_box = split * plan.boxes_of_split, boxes_left = box.tiles - first_box;
  const int32_t boxes = static_cast<int32_t>(boxes_left < plan.boxes_of_split ? boxes_left : plan.boxes_of_split);
  // From a strip's corner to du of its first cell.
  const int32_t middle = static_cast<int32_t>(cells.pad_front) / static_cast<int32_t>(g.dilation_d) * box.plane_pitch +
                         static_cast<int32_t>(cells.pad_top) * box.row_pitch +
                         static_cast<int32_t>(cells.pad_left) * box.column_pitch;
  float bias = 0;
#pragma unroll 1
  for (int32_t b = 0; b < boxes; ++b) {
    const BoxPlace place = box_place(box, cells, first_box + b);
    const PlaneTile<T> tile{g, plan, place, c0, reinterpret_cast<T*>(shared + plan.tile), lines};
    __syncthreads();  // the box before has been read
    fill_spans<false>(box, place, cells, du_strides, kElement, spans, kPlaneChannels);
    fill_cell_strips(plan, place, kElement, strips);
    tile.fill_lines();
    __syncthreads();
    if (box.run_bytes > 0) {
      stage_runs<T, kPlaneChannels>(box, in, place, c0, shared);
    } else {
      stage_x<T, false, kPlaneChannels>(box, in, du + place.n * du_strides.n, c0, spans, shared);
    }
    if (plan.x_staged && sums) tile.load(static_cast<const T*>(p.x));
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    if (box.run_bytes > 0) {
      spread_runs<T, kPlaneChannels>(box, in, place, c0, spans, shared);
      __syncthreads();
    }
    if (there) {
      const unsigned char* own = shared + warp * box.channel_pitch;
      const auto pixels = StripPixels<T>::of(tile, static_cast<const T*>(p.x), p.x_strides, warp);
      if constexpr (kKernel > 0) {
        unrolled_cells<T, kKernel, kStride>(plan, pixels, sums, strips, own, own_taps, own_sums);
      } else {
        looped_cells<T>(plan, pixels, sums, strips, own, taps + warp * tap_total, looped_sums);
      }
      if (bias_partial != nullptr) {
        const int32_t step = box.strips_down ? box.row_pitch : box.column_pitch;
#pragma unroll 1
        for (int i = lane; i < plan.strips; i += 32) {
          if (strips[i].corner < 0) continue;
          const unsigned char* at = own + strips[i].corner + middle;
#pragma unroll
          for (int cell = 0; cell < kStripPixels; ++cell) bias += to_acc(*reinterpret_cast<const T*>(at + cell * step));
        }
      }
    }
    if (plan.grad_x) {
      __syncthreads();
      tile.store(static_cast<T*>(p.grad_x));
    }
  }

  if (sums) {
    float* to = weight_partial + (split * g.c_mid + c0 + warp) * tap_total;
    if constexpr (kKernel > 0) {
      float mine = 0;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const float sum = sum_over_warp(own_sums[tap]);
        if (lane == tap) mine = sum;
      }
      if (there && lane < kTaps) to[lane] = mine;
    } else {
      __syncwarp();
      if (there) {
#pragma unroll 1
        for (int i = lane; i < tap_total; i += 32) to[i] = looped_sums[i];
      }
    }
  }
  if (bias_partial != nullptr) {
    const float sum = sum_over_warp(bias);
    if (there && lane == 0) bias_partial[split * g.c_mid + c0 + warp] = sum;
  }
}

// ------------------------------------------------------------------------------------------------------------ launcher

// Whether the kernel's taps are unrolled; 0 where they are not.
constexpr int unrolled_planes(const DepthwisePlanesPlan& plan, const Geometry& g) {
  return plan.box.strips_down && g.stride_d == 1 ? unrolled_sums(g) : 0;
}

template <typename T>
LaunchStatus launch_depthwise_planes(const BackwardParams& p, const DepthwisePlanesPlan& plan, const T* du,
                                     const Strides& du_strides, float* weight, float* bias, cudaStream_t stream) {
  const auto run = [&](auto kernel, auto stride) {
    return launch_blocks(
        "depthwise_planes", depthwise_planes_kernel<T, decltype(kernel)::value, decltype(stride)::value>,
        plan.splits * plan.chunks, static_cast<size_t>(plan.bytes), stream, p, plan, du, du_strides, weight, bias);
  };
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  using Three = std::integral_constant<int, 3>;
  using Five = std::integral_constant<int, 5>;
  const int known = unrolled_planes(plan, p.geom);
  const bool one = p.geom.stride_h == 1;
  if (known == 3) return one ? run(Three{}, One{}) : run(Three{}, Two{});
  if (known == 5) return one ? run(Five{}, One{}) : run(Five{}, Two{});
  return run(std::integral_constant<int, 0>{}, One{});
}

}  // namespace dsconv
