// Backward where there are many channels: one task computes everything that belongs to a panel of micro.columns
// channels of z, for all pixels. No partial sums, and du never leaves the task.
//
//   before:                g = dy * out_act'(saved) turned into the two orders the GEMMs read, and the sums of g
//   per chunk of images:   nchw: the panel of x turned into lanes           [pixels of x][columns]
//     per tile of pixels:  z of the panel recomputed, a = act(z)       [pixels][columns]
//                          sums[c_out][columns] += g^T . a             k = pixels
//                          du = (g . pw_weight) * act'(z)              k = c_out, [pixels][columns]
//     stage D              grad_dw_weight and grad_x of these channels (backward_depthwise.inl); nchw: over x, and back
//
// A block of kMicroRows rows of either operand g lies contiguous, padded to whole vectors:
//   g_rows   [c_out / kMicroRows][pixels][kRowPitch]                   columns of g, for the weight gradient
//   g_pixels [chunk][chunk_pixels / kMicroRows][c_out][kRowPitch]      pixels, for du
//
// Every panel reads g once more: c_mid / columns times a byte for each column * kMicroRows multiply-adds, against
// partial sums of c_out * c_mid values for every group of tiles in backward_pointwise.inl.
#ifndef DSCONV_ISA
#error "backward_panels.inl belongs inside an ISA region"
#endif

template <typename T>
DSCONV_INLINE int64_t row_pitch() {
  return round_up(kMicroRows, Vec<T>::n);
}

// Blocks of kMicroRows pixels are counted from the beginning of their chunk.
template <typename S, typename T>
static void turn_block(const BackwardContext& ctx, int64_t block, T* g_tile, T* saved_tile, T* bias_sums) {
  const BackwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  const CpuPlan& plan = ctx.plan;
  constexpr int n = Vec<T>::n;
  const int64_t pitch = row_pitch<T>(), per_chunk = ceil_div(plan.chunk_pixels, kMicroRows);
  const int64_t begin = block % per_chunk * kMicroRows, pixel = block / per_chunk * plan.chunk_pixels + begin;
  int count = lanes_left(plan.chunk_pixels - begin, kMicroRows);
  if (pixel >= plan.pixels) return;
  count = lanes_left(plan.pixels - pixel, count);
  load_output_gradient<S>(ctx, pixel, count, g_tile, saved_tile);
  if (p.grad_pw_bias != nullptr) {
    add_columns_exactly(g_tile, plan.out_ld, count, g.c_out, bias_sums, bias_sums + plan.out_columns);
  }
  if (ctx.g_rows != nullptr) {
    for (int64_t c = 0; c < g.c_out; c += kMicroRows) {
      T* to = static_cast<T*>(ctx.g_rows) + (c / kMicroRows * plan.pixels + pixel) * pitch;
      for (int i = 0; i < count; ++i, to += pitch) copy_row(g_tile + i * plan.out_ld + c, to, kMicroRows);
    }
  }
  if (ctx.g_pixels != nullptr) {
    T* to = static_cast<T*>(ctx.g_pixels) + block * g.c_out * pitch;
    for (int64_t c = 0; c < g.c_out; c += n) {
      const int channels = lanes_left(g.c_out - c, n);
      for (int i = 0; i < count; i += n) {
        transpose_block(g_tile + i * plan.out_ld + c, plan.out_ld, lanes_left(count - i, n), channels,
                        to + c * pitch + i, pitch);
      }
    }
  }
}

template <typename S, typename T>
static void backward_turn(const BackwardContext& ctx, int64_t group, void* scratch) {
  const CpuPlan& plan = ctx.plan;
  T* g_tile = static_cast<T*>(scratch);
  T* saved_tile = g_tile + (kMicroRows + 1) * plan.out_ld;
  const int64_t bias_size = 2 * plan.out_columns + plan.mid_columns;
  T* bias_sums = static_cast<T*>(ctx.bias_partial) + group * bias_size;
  zero_fill(bias_sums, bias_size);
  const int64_t blocks = plan.chunks * ceil_div(plan.chunk_pixels, kMicroRows);
  const int64_t first = blocks * group / plan.pointwise_groups, last = blocks * (group + 1) / plan.pointwise_groups;
  for (int64_t block = first; block < last; ++block) turn_block<S>(ctx, block, g_tile, saved_tile, bias_sums);
}

template <typename T>
struct ChannelPanel {
  int64_t k, width;
  T* weight;      // [c_out][columns] of pw_weight
  T* sums;        // [c_out][columns], its gradient
  T* a;           // [tile][columns], act(z)
  T* derivative;  // [tile][columns], act'(z), or zhat where there is a norm
  T* du;          // [chunk_pixels][columns]
  T* dw_sums;     // [kMicroVecs][taps][lanes]
  T* bias_sums;   // [columns]
  T* x;           // [chunk_images * h_in * w_in][columns], nchw
  T* rest;        // [grad_pixels][columns]
};

// z and what follows from it, as if the panel's channels and the chunk's images were all there are.
template <typename X, typename T>
static void recompute_panel(const BackwardContext& ctx, const ChannelsLast<const X>& x, int64_t begin, int64_t count,
                            const ChannelPanel<T>& t) {
  constexpr int64_t columns = kMicroVecs * Vec<T>::n;
  const BackwardParams& p = ctx.p;
  Geometry g = p.geom;
  g.c_in = g.c_mid = t.width;
  CpuPlan plan = ctx.plan;
  plan.mid_ld = columns;
  const DepthwiseInput<X> in = {&g,
                                &plan,
                                x.data,
                                {x.image, 1, x.row, x.column},
                                Layout::nhwc,
                                z_weight<T>(ctx) + t.k,
                                static_cast<const T*>(ctx.packed.dw_bias) + t.k};
  const bool linear = p.act == Activation::identity && ctx.norm == nullptr;
  depthwise_nhwc(in, begin, count, clamp_of<T>(Activation::identity), linear ? t.a : t.derivative);
  if (ctx.norm != nullptr) return activate_zhat(ctx, count, t.width, t.derivative, t.a, columns, t.k);
  if (!linear) activation_pass<ActivateAndDerive, T>(p.act, count * columns, t.derivative, t.a);
}

// The tile of `count` pixels, the first of which is number `begin` of its chunk.
template <typename X, typename T>
static void backward_panel_tile(const BackwardContext& ctx, const ChannelsLast<const X>& x, int64_t chunk,
                                int64_t begin, int64_t count, const ChannelPanel<T>& t) {
  constexpr int n = Vec<T>::n;
  constexpr int64_t columns = kMicroVecs * n;
  const BackwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  const CpuPlan& plan = ctx.plan;
  const int64_t pitch = row_pitch<T>(), pixel = chunk * plan.chunk_pixels + begin;
  const bool linear = p.act == Activation::identity && ctx.norm == nullptr, need_du = ctx.g_pixels != nullptr;
  if (ctx.g_rows != nullptr || (need_du && !linear)) recompute_panel(ctx, x, begin, count, t);
  if (ctx.g_rows != nullptr) {
    for (int64_t c = 0; c < g.c_out; c += kMicroRows) {
      const T* rows = static_cast<const T*>(ctx.g_rows) + (c / kMicroRows * plan.pixels + pixel) * pitch;
      add_gemm_block<T>(lanes_left(g.c_out - c, kMicroRows), t.width, count, {rows, pitch}, {t.a, columns},
                        t.sums + c * columns, columns);
    }
  }
  if (!need_du) return;
  const int64_t chains = chains_of(g.c_out), per_chunk = ceil_div(plan.chunk_pixels, kMicroRows);
  const T* pixels = static_cast<const T*>(ctx.g_pixels) + (chunk * per_chunk + begin / kMicroRows) * g.c_out * pitch;
  T* du = t.du + begin * columns;
  for (int64_t chain = 0; chain < chains; ++chain) {
    for (int64_t i = 0; i < count; i += kMicroRows) {
      const T* block = pixels + i / kMicroRows * g.c_out * pitch;
      gemm_chain<T, false>(chain, chains, lanes_left(count - i, kMicroRows), t.width, g.c_out, {block, pitch},
                           {t.weight, columns}, SumTarget<T>{du + i * columns, columns, chain > 0});
    }
  }
  if (ctx.norm != nullptr) {
    du_and_its_sums(ctx, count, t.width, t.k, t.derivative, columns, du, ctx.norm_partial);
  } else if (!linear) {
    for (int64_t i = 0; i < count * columns; i += n) vstore(du + i, vload(du + i) * vload(t.derivative + i));
  }
  if (p.grad_dw_bias != nullptr) add_column_sums(du, columns, count, t.width, t.bias_sums);
}

// Between the stages, where all images are one chunk. zhat of a single tile is still there.
template <typename X, typename T>
static void panel_du_to_dz(const BackwardContext& ctx, const ChannelsLast<const X>& x, int64_t pixels,
                           const ChannelPanel<T>& t) {
  constexpr int64_t columns = kMicroVecs * Vec<T>::n;
  finish_norm<T>(ctx, t.k, t.width);
  for (int64_t begin = 0; begin < pixels; begin += ctx.plan.panel_tile) {
    const int64_t count = pixels - begin < ctx.plan.panel_tile ? pixels - begin : ctx.plan.panel_tile;
    if (pixels > count) recompute_panel(ctx, x, begin, count, t);
    du_to_dz(ctx, count, t.width, t.k, t.derivative, columns, t.du + begin * columns, columns);
  }
}

// Chunk `chunk` of `images` images. `x` and `grad` begin with the panel's channels of its first image, and may be the
// same memory: grad_x comes last.
template <typename X, typename G, typename T>
static void backward_panel_chunk(const BackwardContext& ctx, int64_t chunk, int64_t images,
                                 const ChannelsLast<const X>& x, const ChannelsLast<G>& grad,
                                 const ChannelPanel<T>& t) {
  constexpr int n = Vec<T>::n;
  constexpr int64_t columns = kMicroVecs * n;
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  const int64_t pixels = images * plan.image_pixels;
  for (int64_t begin = 0; begin < pixels; begin += plan.panel_tile) {
    const int64_t count = pixels - begin < plan.panel_tile ? pixels - begin : plan.panel_tile;
    backward_panel_tile(ctx, x, chunk, begin, count, t);
  }
  if (ctx.norm != nullptr) panel_du_to_dz(ctx, x, pixels, t);
  for (int64_t image = 0; image < images; ++image) {
    const T* du = t.du + image * plan.image_pixels * columns;
    for (int64_t c = 0; ctx.p.grad_dw_weight != nullptr && c < t.width; c += n) {
      const ChannelsLast<const X> from = {x.data + c, x.image, x.row, x.column};
      correlate_rows(ctx, from, image, 0, g.h_out, t.width - c, du + c, t.dw_sums + c * plan.taps);
    }
    for (int64_t ih = 0; ctx.p.grad_x != nullptr && ih < g.h_in; ++ih) {
      backward_x_row(ctx, ih, t.k, t.width, {du, 0, 0}, grad.data + image * grad.image + ih * grad.row, grad.column,
                     t.rest);
    }
  }
}

template <typename S, typename T>
static void store_panel_gradients(const BackwardContext& ctx, const ChannelPanel<T>& t) {
  constexpr int n = Vec<T>::n;
  constexpr int64_t columns = kMicroVecs * n;
  const BackwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  const int64_t width = t.width, k = t.k;
  if (S* grad = static_cast<S*>(p.grad_pw_weight)) {
    for (int64_t c = 0; c < g.c_out; ++c) store_row(t.sums + c * columns, grad + c * g.c_mid + k, width);
  }
  if (S* grad = static_cast<S*>(p.grad_dw_bias)) store_row(t.bias_sums, grad + k, width);
  if (p.grad_dw_weight != nullptr) {
    for (int64_t c = 0; c < width; c += n) {
      store_depthwise_gradient<S>(ctx, (k + c) / n, t.dw_sums + c * ctx.plan.taps, 1, 0);
    }
  }
}

template <typename S, typename T>
static void backward_panel(const BackwardContext& ctx, int64_t task, void* scratch) {
  constexpr int n = Vec<T>::n;
  constexpr int64_t columns = kMicroVecs * n;
  const BackwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  const CpuPlan& plan = ctx.plan;
  ChannelPanel<T> t;
  t.k = task * columns;
  t.width = g.c_mid - t.k < columns ? g.c_mid - t.k : columns;
  t.weight = static_cast<T*>(scratch);
  t.sums = t.weight + g.c_out * columns;
  t.a = t.sums + g.c_out * columns;
  t.derivative = t.a + plan.panel_tile * columns;
  t.du = t.derivative + plan.panel_tile * columns;
  t.dw_sums = t.du + plan.chunk_pixels * columns;
  t.bias_sums = t.dw_sums + plan.taps * columns;
  t.rest = t.bias_sums + columns;
  t.x = t.rest + plan.grad_pixels * columns;

  if (ctx.g_pixels != nullptr) {
    const S* weight = static_cast<const S*>(p.pw_weight) + t.k;
    for (int64_t c = 0; c < g.c_out; ++c) copy_row(weight + c * g.c_mid, t.weight + c * columns, t.width);
  }
  zero_fill(t.sums, g.c_out * columns);
  zero_fill(t.dw_sums, plan.taps * columns + columns);
  const int64_t image_pixels = g.h_in * g.w_in;
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const int64_t first = chunk * plan.chunk_images;
    const int64_t images = g.n - first < plan.chunk_images ? g.n - first : plan.chunk_images;
    if (channels_last(p)) {
      const Strides& to = p.grad_x_strides;
      ChannelsLast<const S> x = x_as_given<S>(ctx);
      x.data += first * x.image + t.k;
      const ChannelsLast<S> grad = {static_cast<S*>(p.grad_x) + first * to.n + t.k, to.n, to.h, to.w};
      backward_panel_chunk(ctx, chunk, images, x, grad, t);
    } else {
      turn_x<S>(ctx, t.k, t.width, first * image_pixels, images * image_pixels, t.x, columns);
      backward_panel_chunk(ctx, chunk, images, dense_lanes(g, static_cast<const T*>(t.x), columns),
                           dense_lanes(g, t.x, columns), t);
      if (p.grad_x == nullptr) continue;
      turn_grad_x_back<S>(ctx, t.x, columns, t.k, t.width, first * image_pixels, images * image_pixels);
    }
  }
  store_panel_gradients<S>(ctx, t);
}
