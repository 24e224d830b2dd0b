// Which rows of grad_x a group of tiles computes as it goes: those all of whose du it makes itself. A row is ready once
// the last tile with du that it reads is done. Rows are numbered through the images, n * d_in * h_in of them.
#ifndef DSCONV_ISA
#error "backward_rows.inl belongs inside an ISA region"
#endif

DSCONV_INLINE Range group_tiles(const CpuPlan& plan, int64_t group) {
  const int64_t columns = columns_of(plan.order, plan.tiles), groups = plan.pointwise_groups;
  const Range tiles = {first_tile(plan.order, columns * group / groups),
                       first_tile(plan.order, columns * (group + 1) / groups)};
  return tiles;
}
DSCONV_INLINE int64_t group_of_column(const CpuPlan& plan, int64_t column) {
  return ((column + 1) * plan.pointwise_groups - 1) / columns_of(plan.order, plan.tiles);
}

// The outputs that read input `position`, along one axis.
DSCONV_INLINE Range outputs_reading(int64_t position, int64_t pad, int64_t stride, int64_t dilation, int64_t taps,
                                    int64_t out) {
  const int64_t back = position + pad, before = back - (taps - 1) * dilation, last = back / stride;
  const Range r = {before > 0 ? ceil_div(before, stride) : 0, last < out ? last + 1 : out};
  return r;
}
DSCONV_INLINE Range rows_reading(const Geometry& g, int64_t ih) {
  return outputs_reading(ih, g.pad_top, g.stride_h, g.dilation_h, g.kernel_h, g.h_out);
}
DSCONV_INLINE Range slices_reading(const Geometry& g, int64_t id) {
  return outputs_reading(id, g.pad_front, g.stride_d, g.dilation_d, g.kernel_d, g.d_out);
}

// The pixels of z that a row reads, as a range; in 3-D whole slices, so that rows are ready in the order of their
// numbers.
DSCONV_INLINE Range pixels_for_row(const Geometry& g, int64_t row) {
  const int64_t image = row / g.h_in / g.d_in * g.d_out, pixels = g.h_out * g.w_out;
  if (has_depth(g)) {
    const Range slices = slices_reading(g, row / g.h_in % g.d_in);
    const Range r = {(image + slices.begin) * pixels, (image + slices.end) * pixels};
    return r;
  }
  const Range rows = rows_reading(g, row % g.h_in);
  const Range r = {image * pixels + rows.begin * g.w_out, image * pixels + rows.end * g.w_out};
  return r;
}

// Whether a group has done the row, where stage D joins stage P.
static bool done_in_group(const BackwardContext& ctx, int64_t row) {
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  if (!plan.joined) return false;
  Range pixels = pixels_for_row(g, row);
  if (walks_depth(plan.order)) {
    const int64_t image = row / g.h_in / g.d_in * g.d_out;
    const Range slices = slices_reading(g, row / g.h_in % g.d_in), rows = rows_reading(g, row % g.h_in);
    if (slices.begin >= slices.end || rows.begin >= rows.end) return false;
    if (slices.begin / plan.order.part_depth != (slices.end - 1) / plan.order.part_depth) return false;
    pixels.begin = (image + slices.begin) * plan.slice_pixels + rows.begin * g.w_out;
    pixels.end = (image + slices.end - 1) * plan.slice_pixels + rows.end * g.w_out;
  }
  if (pixels.begin >= pixels.end) return false;
  return group_of_column(plan, column_of(plan.order, pixels.begin)) ==
         group_of_column(plan, column_of(plan.order, pixels.end - 1));
}

// Tiles in the order of pixels: the rows from `row` on that are ready once the group's pixels are done up to `done`;
// returns the first that is not.
template <typename S, typename T>
static int64_t backward_ready_rows(const BackwardContext& ctx, int64_t row, int64_t begin, int64_t done, T* memory) {
  const Geometry& g = ctx.p.geom;
  const int64_t rows = g.n * g.d_in * g.h_in;
  while (row < rows) {
    const int64_t first = row;
    for (; row < rows && row - first < ctx.plan.grad_rows && row / g.h_in == first / g.h_in; ++row) {
      const Range pixels = pixels_for_row(g, row);
      if (pixels.begin < begin || pixels.begin >= pixels.end || pixels.end > done) break;
    }
    if (row > first) {
      backward_x_rows<S>(ctx, first, row, memory);
      continue;
    }
    if (pixels_for_row(g, row).end > done) break;
    ++row;  // another group's, or no pixel reaches it
  }
  return row;
}

// The inputs whose last output lies in `outputs`, along one axis.
DSCONV_INLINE Range inputs_behind(const Range& outputs, int64_t pad, int64_t stride, int64_t out, int64_t in) {
  const int64_t begin = outputs.begin * stride - pad, end = outputs.end < out ? outputs.end * stride - pad : in;
  const Range r = {begin > 0 ? begin : 0, end < in ? end : in};
  return r;
}

// Tiles along the depth: the rows whose last du lies in this one and whose first the group's first column, or one
// behind it, has made.
template <typename S, typename T>
static void backward_rows_behind(const BackwardContext& ctx, const Range& tiles, int64_t tile, T* memory) {
  const Geometry& g = ctx.p.geom;
  const TileOrder& order = ctx.plan.order;
  const TilePosition at = tile_position(order, tile), first = tile_position(order, tiles.begin);
  const bool same_part = first.image == at.image && first.part == at.part;
  const int64_t first_row = same_part ? strip_begin(order, first.strip) / g.w_out : 0;
  const Range outputs = {strip_begin(order, at.strip) / g.w_out, strip_begin(order, at.strip + 1) / g.w_out};
  const Range rows = inputs_behind(outputs, g.pad_top, g.stride_h, g.h_out, g.h_in);
  const Range slices = inputs_behind({at.slice, at.slice + 1}, g.pad_front, g.stride_d, g.d_out, g.d_in);
  for (int64_t id = slices.begin; id < slices.end; ++id) {
    const Range du_slices = slices_reading(g, id);
    if (du_slices.begin >= du_slices.end || du_slices.begin < at.part * order.part_depth) continue;
    const int64_t slice_row = (at.image * g.d_in + id) * g.h_in;
    for (int64_t row = rows.begin; row < rows.end;) {
      int64_t last = row;
      for (; last < rows.end && last - row < ctx.plan.grad_rows; ++last) {
        const Range du_rows = rows_reading(g, last);
        if (du_rows.begin >= du_rows.end || du_rows.begin < first_row) break;
      }
      if (last > row) backward_x_rows<S>(ctx, slice_row + row, slice_row + last, memory);
      row = last > row ? last : row + 1;
    }
  }
}

// Where a group begins to look for rows that are ready.
DSCONV_INLINE int64_t first_row_of_group(const BackwardContext& ctx, const Range& tiles) {
  const Geometry& g = ctx.p.geom;
  return tile_range(ctx.plan.order, tiles.begin).begin / ctx.plan.image_pixels * g.d_in * g.h_in;
}

// What is ready once `tile` of the group is done; `row` and what is returned: first_row_of_group(), and then how far it
// has come.
template <typename S, typename T>
static int64_t backward_rows_of_tile(const BackwardContext& ctx, const Range& tiles, int64_t tile, int64_t row,
                                     T* memory) {
  const TileOrder& order = ctx.plan.order;
  if (!walks_depth(order)) {
    return backward_ready_rows<S>(ctx, row, tile_range(order, tiles.begin).begin, tile_range(order, tile).end, memory);
  }
  backward_rows_behind<S>(ctx, tiles, tile, memory);
  return row;
}
