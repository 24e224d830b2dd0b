// Backward where there are many channels: one task computes everything that belongs to a panel of micro.columns
// channels of z, for all pixels. No partial sums, and du never leaves the task.
//
//   before:                g = dy * out_act'(saved) turned into the two orders the GEMMs read, and the sums of g
//   per chunk of images:   nchw, or 16 bits: the panel of x turned into lanes  [pixels of x][columns]
//     per tile of pixels:  z of the panel recomputed, a = act(z)       [pixels][columns]
//                          sums[c_out][columns] += g^T . a             k = pixels
//                          du = (g . pw_weight) * act'(z)              k = c_out, [pixels][columns]
//     stage D              grad_dw_weight and grad_x of these channels (backward_depthwise.inl); over x, and back
//
// A block of kMicroRows rows of either operand g lies contiguous, padded to whole vectors:
//   g_rows   [c_out / kMicroRows][chunk][chunk_pixels][kRowPitch]      columns of g, for the weight gradient
//   g_pixels [chunk][chunk_pixels / kMicroRows][c_out][kRowPitch]      pixels, for du
//
// As pairs of bf16 there are half as many pixels in the one, and channels in the other.
//
// Every panel reads g once more: c_mid / columns times a byte for each column * kMicroRows multiply-adds, against
// partial sums of c_out * c_mid values for every group of tiles in backward_groups.inl.
#ifndef DSCONV_ISA
#error "backward_panels.inl belongs inside an ISA region"
#endif

template <typename T>
DSCONV_INLINE int64_t row_pitch() {
  return round_up(kMicroRows, Vec<T>::n);
}

// Factors of type F along the pixels of a chunk, and of all chunks, of which the last may be shorter.
template <typename F>
DSCONV_INLINE int64_t chunk_factors(const CpuPlan& plan) {
  return ceil_div(plan.chunk_pixels, kNumbersOf<F>);
}
template <typename F>
DSCONV_INLINE int64_t all_factors(const CpuPlan& plan) {
  const int64_t before = plan.chunks - 1;
  return before * chunk_factors<F>(plan) + ceil_div(plan.pixels - before * plan.chunk_pixels, kNumbersOf<F>);
}

// g of `count` <= kMicroRows pixels to g_rows, `rows_block` apart.
template <typename T>
DSCONV_INLINE void turn_rows(const Geometry& g, T* g_tile, int64_t ld, int count, T* to, int64_t rows_block) {
  const int64_t pitch = row_pitch<T>();
  for (int64_t c = 0; c < g.c_out; c += kMicroRows, to += rows_block) {
    for (int i = 0; i < count; ++i) copy_row(g_tile + i * ld + c, to + i * pitch, kMicroRows);
  }
}

// And to g_pixels; `memory` has room for as much as g_tile.
template <typename T>
DSCONV_INLINE void turn_pixels(const Geometry& g, const T* g_tile, int64_t ld, int count, T*, T* to) {
  constexpr int n = Vec<T>::n;
  const int64_t pitch = row_pitch<T>();
  for (int64_t c = 0; c < g.c_out; c += n) {
    const int channels = lanes_left(g.c_out - c, n);
    for (int i = 0; i < count; i += n) {
      transpose_block(g_tile + i * ld + c, ld, lanes_left(count - i, n), channels, to + c * pitch + i, pitch);
    }
  }
}

// Blocks of kMicroRows pixels are counted from the beginning of their chunk.
template <typename S, typename F, typename T>
static void turn_block(const BackwardContext& ctx, int64_t block, T* g_tile, T* saved_tile, T* bias_sums) {
  const BackwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  const CpuPlan& plan = ctx.plan;
  const int64_t pitch = row_pitch<T>(), per_chunk = ceil_div(plan.chunk_pixels, kMicroRows), chunk = block / per_chunk;
  const int64_t begin = block % per_chunk * kMicroRows, pixel = chunk * plan.chunk_pixels + begin;
  int count = lanes_left(plan.chunk_pixels - begin, kMicroRows);
  if (pixel >= plan.pixels) return;
  count = lanes_left(plan.pixels - pixel, count);
  load_output_gradient<S>(ctx, pixel, count, g_tile, saved_tile);
  if (p.grad_pw_bias != nullptr) {
    add_columns_exactly(g_tile, plan.out_ld, count, g.c_out, bias_sums, bias_sums + plan.out_columns);
  }
  if (ctx.g_pixels != nullptr) {
    F* to = static_cast<F*>(ctx.g_pixels) + block * ceil_div(g.c_out, kNumbersOf<F>) * pitch;
    turn_pixels(g, g_tile, plan.out_ld, count, saved_tile, to);
  }
  if (ctx.g_rows != nullptr) {
    const int64_t of_chunk = chunk_factors<F>(plan);
    F* to = static_cast<F*>(ctx.g_rows) + (chunk * of_chunk + begin / kNumbersOf<F>)*pitch;
    turn_rows(g, g_tile, plan.out_ld, count, to, all_factors<F>(plan) * pitch);
  }
}

template <typename S, typename T, typename F>
static void backward_turn(const BackwardContext& ctx, int64_t group, void* scratch) {
  const CpuPlan& plan = ctx.plan;
  T* g_tile = static_cast<T*>(scratch);
  T* saved_tile = g_tile + (kMicroRows + 1) * plan.out_ld;
  const int64_t bias_size = 2 * plan.out_columns + plan.mid_columns;
  T* bias_sums = static_cast<T*>(ctx.bias_partial) + group * bias_size;
  if (ctx.p.grad_pw_bias != nullptr) zero_fill(bias_sums, bias_size);
  const int64_t blocks = plan.chunks * ceil_div(plan.chunk_pixels, kMicroRows);
  const int64_t first = blocks * group / plan.pointwise_groups, last = blocks * (group + 1) / plan.pointwise_groups;
  for (int64_t block = first; block < last; ++block) turn_block<S, F>(ctx, block, g_tile, saved_tile, bias_sums);
}

// What a task holds beside its panel.
template <typename T>
struct PanelMemory {
  T* du;       // [chunk_pixels][columns]
  T* dw_sums;  // [kMicroVecs][taps][lanes]
  T* x;        // [chunk_images * d_in * h_in * w_in][columns], where it is turned
};

template <typename F>
static GradTile<F> panel_tile(const BackwardContext& ctx, int64_t chunk, int64_t begin) {
  const CpuPlan& plan = ctx.plan;
  const int64_t pitch = row_pitch<F>(), per_chunk = ceil_div(plan.chunk_pixels, kMicroRows);
  const int64_t of_chunk = chunk_factors<F>(plan), block = ceil_div(ctx.p.geom.c_out, kNumbersOf<F>) * pitch;
  return {static_cast<const F*>(ctx.g_rows) + (chunk * of_chunk + begin / kNumbersOf<F>)*pitch,
          all_factors<F>(plan) * pitch,
          pitch,
          static_cast<const F*>(ctx.g_pixels) + (chunk * per_chunk + begin / kMicroRows) * block,
          block,
          pitch,
          false};
}

// Between the stages, where all images are one chunk. zhat of a single tile is still there.
template <typename T, typename F>
static void panel_du_to_dz(const BackwardContext& ctx, const ChannelsLast<const T>& x, int64_t pixels,
                           const ChannelPanel<T, F>& t, T* du) {
  constexpr int64_t columns = kMicroVecs * Vec<T>::n;
  finish_norm<T>(ctx, t.k, t.width);
  Ahead nothing = {};
  for (int64_t begin = 0; begin < pixels; begin += ctx.plan.panel_tile) {
    const int64_t count = pixels - begin < ctx.plan.panel_tile ? pixels - begin : ctx.plan.panel_tile;
    if (pixels > count) recompute_z(ctx, x, t.k, begin, count, t.k, t.width, t.derivative, columns);
    du_to_dz(ctx, count, t.width, t.k, t.derivative, columns, du + begin * columns, columns, nothing);
  }
}

// Chunk `chunk` of `images` images. `x` and `grad` begin with the panel's channels of its first image, and may be the
// same memory: grad_x comes last.
template <typename T, typename F>
static void backward_panel_chunk(const BackwardContext& ctx, int64_t chunk, int64_t images,
                                 const ChannelsLast<const T>& x, const ChannelsLast<T>& grad, ChannelPanel<T, F>& t,
                                 const PanelMemory<T>& memory) {
  constexpr int n = Vec<T>::n;
  constexpr int64_t columns = kMicroVecs * n;
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  const int64_t pixels = images * plan.image_pixels, first = chunk * plan.chunk_images * plan.image_pixels;
  Ahead nothing = {};
  for (int64_t begin = 0; begin < pixels; begin += plan.panel_tile) {
    const int64_t count = pixels - begin < plan.panel_tile ? pixels - begin : plan.panel_tile;
    if (needs_z(ctx)) recompute_panel(ctx, x, t.k, begin, count, t);
    t.add_to_sums = chunk > 0 || begin > 0;
    backward_pointwise(ctx, first + begin, count, panel_tile<F>(ctx, chunk, begin), t, memory.du + begin * columns,
                       nothing);
  }
  if (ctx.norm != nullptr) panel_du_to_dz(ctx, x, pixels, t, memory.du);
  for (int64_t image = 0; image < images; ++image) {
    const T* du = memory.du + image * plan.image_pixels * columns;
    for (int64_t d = 0; ctx.p.grad_dw_weight != nullptr && d < g.d_out; ++d) {
      const T* du_slice = du + d * plan.slice_pixels * columns;
      for (int64_t c = 0; c < t.width; c += n) {
        correlate_rows(ctx, channels_from(x, c), image * g.d_out + d, {0, g.h_out, 0, g.w_out}, t.width - c,
                       du_slice + c, memory.dw_sums + c * plan.taps);
      }
    }
    for (int64_t d = 0; ctx.p.grad_x != nullptr && d < g.d_in; ++d) {
      backward_x_channels(ctx, d * g.h_in, g.h_in, t.k, t.width, du, grad.data + image * grad.image + d * grad.slice,
                          grad.column, grad.row);
    }
  }
}

template <typename S, typename T, typename F>
static void store_panel_gradients(const BackwardContext& ctx, const ChannelPanel<T, F>& t, const T* dw_sums) {
  constexpr int n = Vec<T>::n;
  const BackwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  S* grad = static_cast<S*>(p.grad_pw_weight);
  if (grad != nullptr && static_cast<void*>(grad + t.k) != static_cast<void*>(t.sums)) {
    for (int64_t c = 0; c < g.c_out; ++c) {
      ask_for_row<1>(grad + (c + kWriteAhead) * g.c_mid + t.k, t.width);
      store_row(t.sums + c * t.sums_ld, grad + c * g.c_mid + t.k, t.width);
    }
  }
  if (S* grad_bias = static_cast<S*>(p.grad_dw_bias)) store_row(t.bias_sums, grad_bias + t.k, t.width);
  for (int64_t c = 0; p.grad_dw_weight != nullptr && c < t.width; c += n) {
    store_depthwise_gradient<S>(ctx, (t.k + c) / n, dw_sums + c * ctx.plan.taps, 1, 0);
  }
}

// The columns of pw_weight from `from` on, `width` of a panel.
template <typename S, typename T>
DSCONV_INLINE void copy_weight_rows(const Geometry& g, const S* from, int64_t width, T* to) {
  for (int64_t c = 0; c < g.c_out; ++c, from += g.c_mid, to += kMicroVecs * Vec<T>::n) {
    ask_for_row<0>(from + kReadAhead * g.c_mid, width);
    copy_row(from, to, width);
  }
}

template <typename S, typename T, typename F>
static void backward_panel(const BackwardContext& ctx, int64_t task, void* scratch) {
  constexpr int n = Vec<T>::n;
  constexpr int64_t columns = kMicroVecs * n;
  const BackwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  const CpuPlan& plan = ctx.plan;
  F* weight = static_cast<F*>(scratch);
  T* sums = static_cast<T*>(scratch) + g.c_out * columns;
  ChannelPanel<T, F> t;
  t.k = task * columns;
  t.width = g.c_mid - t.k < columns ? g.c_mid - t.k : columns;
  t.weight = ctx.g_pixels != nullptr ? weight : nullptr;
  t.sums = ctx.g_rows != nullptr ? sums : nullptr;
  t.sums_ld = t.ld = columns;
  t.norm_sums = ctx.norm_partial;
  t.a = sums + g.c_out * columns;
  t.derivative = t.a + plan.panel_tile * columns;
  t.bias_sums = t.derivative + plan.panel_tile * columns;
  PanelMemory<T> memory;
  memory.dw_sums = t.bias_sums + columns;
  memory.du = memory.dw_sums + plan.taps * columns;
  memory.x = memory.du + plan.chunk_pixels * columns;

  // The sums of a single tile go where they belong, while the next ones are made; but not in parts of vectors.
  if constexpr (SameType<S, T>::value) {
    if (t.sums != nullptr && plan.pixels <= plan.panel_tile && t.width % n == 0) {
      t.sums = static_cast<T*>(p.grad_pw_weight) + t.k;
      t.sums_ld = g.c_mid;
    }
  }
  if (t.weight != nullptr) copy_weight_rows(g, static_cast<const S*>(p.pw_weight) + t.k, t.width, weight);
  zero_fill(t.bias_sums, columns + plan.taps * columns);
  const int64_t image_pixels = g.d_in * g.h_in * g.w_in;
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const int64_t first = chunk * plan.chunk_images;
    const int64_t images = g.n - first < plan.chunk_images ? g.n - first : plan.chunk_images;
    if constexpr (SameType<S, T>::value) {
      if (x_in_place(ctx)) {
        const Strides& to = p.grad_x_strides;
        ChannelsLast<const T> x = x_as_given<S>(ctx);
        x.data += first * x.image + t.k;
        const ChannelsLast<T> grad = {static_cast<T*>(p.grad_x) + first * to.n + t.k, to.n, to.d, to.h, to.w, nullptr};
        backward_panel_chunk(ctx, chunk, images, x, grad, t, memory);
        continue;
      }
    }
    turn_x<S>(ctx, t.k, t.width, first * image_pixels, images * image_pixels, memory.x, columns);
    backward_panel_chunk(ctx, chunk, images, dense_lanes(g, images, static_cast<const T*>(memory.x), columns),
                         dense_lanes(g, images, memory.x, columns), t, memory);
    if (p.grad_x == nullptr) continue;
    turn_grad_x_back<S>(ctx, memory.x, columns, t.k, t.width, first * image_pixels, images * image_pixels);
  }
  store_panel_gradients<S>(ctx, t, memory.dw_sums);
}
