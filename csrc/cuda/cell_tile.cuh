// What a block of backward_depthwise_planes.cuh has in shared memory beside du: the pixels of x of a box of cells, as
// they lie in memory, in whose place grad_x comes, and where the strips of cells begin.
#pragma once

#include "box_tables.cuh"

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

}  // namespace dsconv
