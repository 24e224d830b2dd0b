// The order in which a call's tiles of output pixels are walked: pure functions.
//
// By default tiles follow the pixels, n, od, oh, ow. A 3-D layer whose slices are large would then read each slice of x
// once for every tap along the depth, from beyond the cache. There a slice is cut into strips of rows, and tiles follow
// the depth: what the last tile has read but for one slice is what the next one reads.
//
//   image | part of the depth | strip of rows | slice of the part          a tile: one strip of one slice
//
// A column is the tiles of a strip in a part. Backward's groups are ranges of columns; there are several parts where
// groups would else have few rows (cpu_plan.h). By default an image of one slice stands for all pixels, its strips are
// the tiles, and each is a column.
#pragma once

#include <cstdint>

namespace dsconv {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Range {
  int64_t begin, end;
};

struct TileOrder {
  int64_t pixels;         // of a slice
  int64_t block, blocks;  // pixels that strips are made of, and how many of them a slice has; the last may be smaller
  int64_t strips;
  int64_t depth, part_depth;  // slices of an image, and of a part of them; the last may be smaller
};

constexpr bool walks_depth(const TileOrder& order) { return order.depth > 1; }

// Whole blocks, whose numbers differ by one at most.
constexpr int64_t strip_begin(const TileOrder& order, int64_t strip) {
  const int64_t pixel =
      (order.blocks / order.strips * strip + order.blocks % order.strips * strip / order.strips) * order.block;
  return pixel < order.pixels ? pixel : order.pixels;
}
constexpr int64_t strip_of(const TileOrder& order, int64_t pixel) {
  return ((pixel / order.block + 1) * order.strips - 1) / order.blocks;
}

struct TilePosition {
  int64_t image, part, strip, slice;
};
constexpr TilePosition tile_position(const TileOrder& order, int64_t tile) {
  const int64_t per_image = order.strips * order.depth, in_image = tile % per_image;
  const int64_t part = in_image / (order.strips * order.part_depth), first = part * order.part_depth;
  const int64_t left = order.depth - first, length = left < order.part_depth ? left : order.part_depth;
  const int64_t in_part = in_image - first * order.strips;
  return {tile / per_image, part, in_part / length, first + in_part % length};
}

// Its pixels.
constexpr Range tile_range(const TileOrder& order, int64_t tile) {
  const TilePosition at = tile_position(order, tile);
  const int64_t base = (at.image * order.depth + at.slice) * order.pixels;
  return {base + strip_begin(order, at.strip), base + strip_begin(order, at.strip + 1)};
}

constexpr int64_t pixels_of_tiles(const TileOrder& order, int64_t first, int64_t last) {
  int64_t pixels = 0;
  for (int64_t tile = first; tile < last; ++tile) {
    const Range range = tile_range(order, tile);
    pixels += range.end - range.begin;
  }
  return pixels;
}

constexpr int64_t parts_of_depth(const TileOrder& order) { return ceil_div(order.depth, order.part_depth); }

constexpr int64_t column_at(const TileOrder& order, int64_t image, int64_t slice, int64_t strip) {
  return (image * parts_of_depth(order) + slice / order.part_depth) * order.strips + strip;
}
// Of a pixel of the output.
constexpr int64_t column_of(const TileOrder& order, int64_t pixel) {
  const int64_t slice = pixel / order.pixels;
  return column_at(order, slice / order.depth, slice % order.depth, strip_of(order, pixel % order.pixels));
}

constexpr int64_t columns_of(const TileOrder& order, int64_t tiles) {
  return tiles / order.depth * parts_of_depth(order);
}
constexpr int64_t first_tile(const TileOrder& order, int64_t column) {
  const int64_t parts = parts_of_depth(order), image = column / (parts * order.strips);
  const int64_t first = column / order.strips % parts * order.part_depth, left = order.depth - first;
  const int64_t length = left < order.part_depth ? left : order.part_depth;
  return (image * order.depth + first) * order.strips + column % order.strips * length;
}

}  // namespace dsconv
