// Backward where there are many pixels: groups of tiles, in order, each group into its own partial sums.
//
//   per tile of pixels:       g loaded, and its column sums
//     per panel of channels:  stage P (backward_pointwise.inl)
//     stage D                 of what is ready: the weight gradient of the tile's pixels, and the rows of grad_x all of
//                             whose du lies in the group and is done (backward_rows.inl). du and x are in cache still.
//   after all groups:         the rows of grad_x between groups (backward_depthwise.inl), and the sums of the groups
//
// Where a norm's sums stand between the stages, stage D goes over the groups a second time, in the same way. x may be
// in the memory of grad_x then: who reads a row of x are the pixels that its row of grad_x waits for.
//
// Which tiles form a group follows from the shape alone, and groups are added in order: the same bits for any number
// of threads.
#ifndef DSCONV_ISA
#error "backward_groups.inl belongs inside an ISA region"
#endif

template <typename T>
struct GroupMemory {
  T *g, *saved;  // [tile_pixels][out_ld]
  T* da;         // [tile_pixels][columns], where du is not kept in panels
  T* tile;       // [grad_pixels][columns]
};

// Stage P of a tile.
template <typename S, typename X, typename T, typename F>
static void backward_group_tile(const BackwardContext& ctx, const X& x, Ahead ahead, int64_t tile,
                                const GroupMemory<T>& memory, ChannelPanel<T, F> t, T* pw_partial, T* bias_partial) {
  constexpr int64_t columns = kMicroVecs * Vec<T>::n;
  const BackwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  const CpuPlan& plan = ctx.plan;
  const Range pixels = tile_range(plan.order, tile);
  const int64_t pixel = pixels.begin, count = pixels.end - pixel;
  int64_t ld = 0;
  const T* dy = gradient_in_place<S, T>(ctx, pixel, ld);
  if (dy == nullptr) {
    load_output_gradient<S>(ctx, pixel, count, memory.g, memory.saved);
    dy = memory.g, ld = plan.out_ld;
  }
  T *lost = bias_partial + plan.out_columns, *dw_bias_partial = lost + plan.out_columns;
  if (p.grad_pw_bias != nullptr) add_columns_exactly(dy, ld, count, g.c_out, bias_partial, lost);
  GradTile<F> grad;
  if constexpr (SameType<T, F>::value) {
    grad = {dy, kMicroRows, ld, dy, kMicroRows * ld, ld, true};
  } else {
    grad = pair_gradient(ctx, count, memory.g, memory.saved);
  }
  T* du = static_cast<T*>(ctx.du);
  const bool panels = du != nullptr && plan.du_width == columns;
  ChannelPanel<T, F> z = t;
  for (int64_t block = 0; block < g.c_mid; block += plan.z_channels) {
    z.k = block;
    z.width = g.c_mid - block < plan.z_channels ? g.c_mid - block : plan.z_channels;
    if (needs_z(ctx)) recompute_panel(ctx, x, 0, pixel, count, z);
    for (t.k = block; t.k < block + z.width; t.k += columns) {
      t.width = g.c_mid - t.k < columns ? g.c_mid - t.k : columns;
      t.a = z.a + t.k - block;
      t.derivative = z.derivative + t.k - block;
      t.weight = static_cast<const F*>(ctx.packed.pw_backward);
      if (t.weight != nullptr) t.weight += t.k * ceil_div(g.c_out, kNumbersOf<F>);
      t.sums = pw_partial != nullptr ? pw_partial + t.k : nullptr;
      t.sums_ld = plan.mid_columns;
      t.bias_sums = dw_bias_partial + t.k;
      T* const to = panels ? du + t.k * plan.pixels + pixel * columns : memory.da;
      backward_pointwise(ctx, pixel, count, grad, t, to, ahead);
      if (du != nullptr && !panels) {
        const Layout layout = plan.by_planes ? Layout::nchw : Layout::nhwc;
        store_tile(memory.da, columns, t.k, t.width, pixel, count, du, layout, g.c_mid, plan.image_pixels);
      }
    }
  }
}

// The group's partial sums of the depthwise weight gradient, null where it is not needed.
template <typename T>
static T* zero_depthwise_partial(const BackwardContext& ctx, int64_t group) {
  if (ctx.dw_partial == nullptr) return nullptr;
  const int64_t size = depthwise_sums(ctx.plan, ctx.p.geom);
  T* partial = static_cast<T*>(ctx.dw_partial) + group * size;
  zero_fill(partial, size);
  return partial;
}

template <typename S, typename T, typename F, typename Source>
static void backward_group_of(const BackwardContext& ctx, Source source, int64_t group, void* scratch) {
  constexpr int64_t columns = kMicroVecs * Vec<T>::n;
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  ChannelPanel<T, F> t;
  t.a = static_cast<T*>(scratch);
  t.ld = plan.z_ld;
  t.norm_sums = ctx.norm != nullptr ? ctx.norm_partial + group * 2 * g.c_mid : nullptr;
  for (int64_t i = 0; t.norm_sums != nullptr && i < 2 * g.c_mid; ++i) t.norm_sums[i] = 0;
  t.derivative = t.a + plan.tile_pixels * t.ld;
  GroupMemory<T> memory;
  memory.da = t.derivative + plan.tile_pixels * t.ld;
  memory.tile = memory.da + plan.tile_pixels * columns;
  memory.g = memory.tile + plan.grad_pixels * columns;
  memory.saved = memory.g + plan.tile_pixels * plan.out_ld;

  const int64_t pw_size = g.c_out * plan.mid_columns, bias_size = 2 * plan.out_columns + plan.mid_columns;
  T* pw_partial = ctx.pw_partial != nullptr ? static_cast<T*>(ctx.pw_partial) + group * pw_size : nullptr;
  T* bias_partial = static_cast<T*>(ctx.bias_partial) + group * bias_size;
  zero_fill(bias_partial, bias_size);
  const bool joined = plan.joined && ctx.norm == nullptr;
  T* dw_partial = joined ? zero_depthwise_partial<T>(ctx, group) : nullptr;

  const Range tiles = group_tiles(plan, group);
  int64_t row = first_row_of_group(ctx, tiles);
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const Range pixels = tile_range(plan.order, tile);
    const auto& x = source.of_tile(ctx, pixels);
    t.add_to_sums = tile > tiles.begin;
    backward_group_tile<S>(ctx, x, next_tile<S, F>(ctx, source, tile, pixels.end - pixels.begin), tile, memory, t,
                           pw_partial, bias_partial);
    if (dw_partial != nullptr) correlate_run(ctx, x, pixels, dw_partial);
    if (joined && ctx.p.grad_x != nullptr) row = backward_rows_of_tile<S>(ctx, tiles, tile, row, memory.tile);
  }
}

template <typename S, typename T, typename F>
static void backward_group(const BackwardContext& ctx, int64_t group, void* scratch) {
#if DSCONV_ISA != DSCONV_ISA_GENERIC
  if constexpr (SameType<S, T>::value) {
    T* const strips = static_cast<T*>(scratch);
    if (ctx.plan.by_planes) {
      const int64_t of_x = strips_elements(ctx.plan, ctx.p.geom);
      return backward_group_of<S, T, F>(ctx, PlanesOfX<T>{strips}, group, strips + of_x);
    }
  }
#endif
  if (ctx.x_rows != nullptr) {
    backward_group_of<S, T, F>(ctx, rows_of_x<S, T>(ctx, group), group, scratch);
  } else if (ctx.x_turned != nullptr) {
    backward_group_of<S, T, F>(ctx, WholeX<T>{x_turned<T>(ctx)}, group, scratch);
  } else {
    backward_group_of<S, T, F>(ctx, WholeX<S>{x_as_given<S>(ctx)}, group, scratch);
  }
}

// How often tile_du_to_dz() of `count` pixels asks for a part.
template <typename T>
DSCONV_INLINE int64_t du_to_dz_calls(const BackwardContext& ctx, int64_t count) {
  const int64_t c_mid = ctx.p.geom.c_mid;
  return depthwise_calls<T>(count, c_mid) + ceil_div(c_mid, ctx.plan.du_width) * ceil_div(count, kRowsAtOnce);
}

// What the tile after `tile`, of `count` pixels, will read of x, in parts for tile_du_to_dz() of this one; or nothing,
// where `tile` itself is read first. Of its du du_to_dz() asks for a line with each that it reads.
template <typename X>
DSCONV_INLINE Ahead tile_of_x(const BackwardContext& ctx, const WholeX<X>& of, int64_t tile, int64_t count) {
  const int64_t calls = du_to_dz_calls<typename ComputeOf<X>::type>(ctx, count);
  return rows_of_tile(ctx.plan, of.x.data, of.x.strides(), ctx.p.geom, tile, calls);
}
template <typename S, typename T>
DSCONV_INLINE Ahead tile_of_x(const BackwardContext& ctx, const RowsOfX<S, T>& of, int64_t tile, int64_t count) {
  Ahead ahead = {};
  if (tile + 1 < ctx.plan.tiles) of.ask_for(ctx, ahead, tile_range(ctx.plan.order, tile + 1));
  share_out(ahead, du_to_dz_calls<T>(ctx, count));
  return ahead;
}

// du -> dz of a tile's pixels, some panels of channels at a time; zhat: room for plan.z_ld a pixel, and as much for
// rows that are no whole vectors.
template <typename X, typename T>
static void tile_du_to_dz(const BackwardContext& ctx, const ChannelsLast<const X>& x, int64_t pixel, int64_t count,
                          T* zhat, Ahead& ahead) {
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  const int64_t width = plan.du_width;
  T *du = static_cast<T*>(ctx.du), *copy = zhat + plan.tile_pixels * plan.z_ld;
  for (int64_t block = 0; block < g.c_mid; block += plan.z_channels) {
    const int64_t channels = g.c_mid - block < plan.z_channels ? g.c_mid - block : plan.z_channels;
    recompute_z(ctx, x, 0, pixel, count, block, channels, zhat, plan.z_ld, &ahead);
    if (g.multiplier == 1) {
      for (int64_t k = block; k < block + channels; k += width) {
        const int64_t part = g.c_mid - k < width ? g.c_mid - k : width;
        du_to_dz(ctx, count, part, k, zhat + k - block, plan.z_ld, du + k * plan.pixels + pixel * width, width, ahead);
      }
      continue;
    }
    T* rows = du + pixel * width + block;
    for (int64_t i = 0; i < count; ++i) copy_row(rows + i * width, copy + i * plan.z_ld, channels);
    du_to_dz(ctx, count, channels, block, zhat, plan.z_ld, copy, plan.z_ld, ahead);
    for (int64_t i = 0; i < count; ++i) store_row(copy + i * plan.z_ld, rows + i * width, channels);
  }
}

template <typename S, typename T, typename Source>
static void backward_norm_group_of(const BackwardContext& ctx, Source source, int64_t group, T* zhat) {
  const CpuPlan& plan = ctx.plan;
  T* grad_tile = zhat + 2 * plan.tile_pixels * plan.z_ld;
  T* dw_partial = zero_depthwise_partial<T>(ctx, group);
  const Range tiles = group_tiles(plan, group);
  int64_t row = first_row_of_group(ctx, tiles);
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const Range pixels = tile_range(plan.order, tile);
    const int64_t count = pixels.end - pixels.begin;
    const auto& x = source.of_tile(ctx, pixels);
    Ahead ahead = tile_of_x(ctx, source, tile, count);
    tile_du_to_dz(ctx, x, pixels.begin, count, zhat, ahead);
    if (dw_partial != nullptr) correlate_run(ctx, x, pixels, dw_partial);
    if (plan.joined && ctx.p.grad_x != nullptr) row = backward_rows_of_tile<S>(ctx, tiles, tile, row, grad_tile);
  }
}

template <typename S, typename T>
static void backward_norm_group(const BackwardContext& ctx, int64_t group, void* scratch) {
  T* const zhat = static_cast<T*>(scratch);
#if DSCONV_ISA != DSCONV_ISA_GENERIC
  if constexpr (SameType<S, T>::value) {
    if (ctx.plan.by_planes) return backward_norm_group_of<S>(ctx, PlanesOfX<T>{zhat}, group, zhat);
  }
#endif
  if (ctx.x_rows != nullptr) {
    backward_norm_group_of<S>(ctx, rows_of_x<S, T>(ctx, group), group, zhat);
  } else if (ctx.x_turned != nullptr) {
    backward_norm_group_of<S>(ctx, WholeX<T>{x_turned<T>(ctx)}, group, zhat);
  } else {
    backward_norm_group_of<S>(ctx, WholeX<S>{x_as_given<S>(ctx)}, group, zhat);
  }
}

// Rows of grad_x, plan.task_rows of a slice, but for those that the groups have done.
template <typename S, typename T>
static void backward_x(const BackwardContext& ctx, int64_t task, void* scratch) {
  const Geometry& g = ctx.p.geom;
  const int64_t at_once = ctx.plan.grad_rows, of_task = ctx.plan.task_rows;
  const int64_t tasks = ceil_div(g.h_in, of_task), slice = task / tasks, begin = task % tasks * of_task;
  const int64_t end = g.h_in - begin < of_task ? g.h_in : begin + of_task;
  for (int64_t row = slice * g.h_in + begin, last = slice * g.h_in + end; row < last;) {
    int64_t row_end = row;
    while (row_end < last && row_end - row < at_once && !done_in_group(ctx, row_end)) ++row_end;
    if (row_end > row) backward_x_rows<S>(ctx, row, row_end, static_cast<T*>(scratch));
    row = row_end > row ? row_end : row + 1;
  }
}

// The depthwise weight gradient of a group's pixels, where stage D comes after, in their order.
template <typename S, typename T>
static void backward_dw(const BackwardContext& ctx, int64_t group) {
  const TileOrder& order = ctx.plan.order;
  const Range tiles = group_tiles(ctx.plan, group);
  const Range pixels = {tile_range(order, tiles.begin).begin, tile_range(order, tiles.end - 1).end};
  T* partial = zero_depthwise_partial<T>(ctx, group);
  if (ctx.x_turned != nullptr) {
    correlate_run(ctx, x_turned<T>(ctx), pixels, partial);
  } else {
    correlate_run(ctx, x_as_given<S>(ctx), pixels, partial);
  }
}
