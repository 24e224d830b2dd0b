// Stage D of backward, from du (the gradient of z):
//
//   grad_x[ih, iw, c]  = sum over planes and taps with oh * stride + tap * dilation - pad == ih (so along w and d) of
//                        dw_weight[tap][k] * du[oh, ow, k]                       gathered: every value written once
//   grad_dw_weight[tap] = sum over pixels of x[tap of pixel] * du[pixel]
//
// Vectors along the channels. grad_x: channel_row.inl where its rows are a plain convolution of du, else grad_row.inl,
// else a plain convolution for each residue modulo the stride. grad_dw_weight: correlate.inl.
#ifndef DSCONV_ISA
#error "backward_depthwise.inl belongs inside an ISA region"
#endif

// The taps that connect input position `position` to outputs: tap first + i * step reads output out - i * out_step,
// whichever of them exist. No tap: first == taps.
struct TapWalk {
  int64_t first, step, count;
  int64_t out, out_step;
};
DSCONV_INLINE TapWalk taps_to(int64_t position, int64_t pad, int64_t stride, int64_t dilation, int64_t taps) {
  int64_t divisor = stride, rest = dilation % stride;
  while (rest != 0) {
    const int64_t t = divisor % rest;
    divisor = rest;
    rest = t;
  }
  TapWalk walk = {0, stride / divisor, 0, 0, dilation / divisor};
  const int64_t padded = position + pad;
  while (walk.first < walk.step && (padded - walk.first * dilation) % stride != 0) ++walk.first;
  if (walk.first >= walk.step || walk.first >= taps) return walk;
  walk.out = (padded - walk.first * dilation) / stride;
  walk.count = ceil_div(taps - walk.first, walk.step);
  return walk;
}

// du: panels of plan.du_width channels, [c_mid / du_width][pixels][du_width].
template <typename T>
DSCONV_INLINE const T* du_at(const BackwardContext& ctx, int64_t pixel, int64_t k) {
  const int64_t width = ctx.plan.du_width;
  return static_cast<const T*>(ctx.du) + (k / width * ctx.plan.pixels + pixel) * width + k % width;
}

// What follows computes rows of a slice of grad_x for some channels from c on, a panel of micro.columns of them at most
// where not said otherwise. Rows are numbered through the image, d_in * h_in of them. `du` is the image's, at these
// channels of its first plane; `grad` points to the first pixel, `step` from pixel to pixel and `out_row` from row to
// row.

// Unit stride, one plane: a plain convolution of du with the kernel turned around, for any number of channels.
template <typename T>
static void backward_x_plain(const BackwardContext& ctx, int64_t first_row, int64_t rows, int64_t c, int64_t channels,
                             const T* du, T* grad, int64_t step, int64_t out_row, Stores stores) {
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  const int64_t id = first_row / g.h_in, ih = first_row % g.h_in;
  const int64_t panel = plan.pixels * plan.du_width, panels = ceil_div(channels, plan.du_width);
  ChannelRow<T> row;
  row.row_step = g.w_out * plan.du_width;
  row.column_step = plan.du_width;
  row.in_h = g.h_out;
  row.in_w = g.w_out;
  row.taps_h = g.kernel_h;
  row.taps_w = g.kernel_w;
  row.dilation_h = g.dilation_h;
  row.dilation_w = g.dilation_w;
  row.step_w = 1;
  row.weight = static_cast<const T*>(ctx.packed.dw_weight) + (plan.taps - 1) * plan.mid_columns + c;
  row.weight_row = -plan.mid_columns * g.kernel_w;
  row.weight_column = -plan.mid_columns;
  row.weight_slice = -plan.mid_columns * plan.slice_taps;
  row.weight += row.weight_slice * place_slices(row, du, id + g.pad_front - (g.kernel_d - 1) * g.dilation_d,
                                                g.dilation_d, g.d_out, g.kernel_d, plan.slice_pixels * plan.du_width);
  row.start = ZeroVector<T>::data;
  row.start_step = 0;
  row.start_stays = true;
  row.channels = channels;
  row.to_panel = panel - plan.du_width;
  row.stores = stores;
  row.end = du + (panels - 1) * panel + plan.image_pixels * plan.du_width;
  convolve_rows<true>(row, 1, ih + g.pad_top - (g.kernel_h - 1) * g.dilation_h,
                      g.pad_left - (g.kernel_w - 1) * g.dilation_w, rows, g.w_in, clamp_of<T>(Activation::identity),
                      grad, step, out_row);
}

// One row where has_grad_row() says yes, for any number of channels.
template <typename T>
static void backward_x_strided(const BackwardContext& ctx, int64_t in_row, int64_t c, int64_t channels, const T* du,
                               T* grad, int64_t step, Stores stores) {
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  GradRow<T> row;
  row.stores = stores;
  row.rows = 0;
  for (int64_t i = 0; i < g.kernel_d * g.kernel_h; ++i) {
    const int64_t before = in_row / g.h_in + g.pad_front - i / g.kernel_h * g.dilation_d;
    const int64_t above = in_row % g.h_in + g.pad_top - i % g.kernel_h * g.dilation_h;
    if (before < 0 || before % g.stride_d != 0 || before / g.stride_d >= g.d_out) continue;
    if (above < 0 || above % g.stride_h != 0 || above / g.stride_h >= g.h_out) continue;
    row.du[row.rows] = du + (before / g.stride_d * g.h_out + above / g.stride_h) * g.w_out * plan.du_width;
    row.weight[row.rows++] = static_cast<const T*>(ctx.packed.dw_weight) + i * g.kernel_w * plan.mid_columns + c;
  }
  row.du_column = plan.du_width;
  row.weight_column = plan.mid_columns;
  row.du_panel = plan.pixels * plan.du_width;
  row.planes = g.multiplier;
  row.plane = g.c_in;
  row.w_in = g.w_in;
  row.w_out = g.w_out;
  row.pad = g.pad_left;
  grad_row(g, row, channels, grad, step);
}

// Columns [begin, end) of one row, any geometry; begin is a multiple of the stride, and `grad` points to it. The
// columns of one residue modulo the stride are a plain convolution of a few rows of du with the kernel walked
// backwards.
template <typename T>
static void backward_x_general(const BackwardContext& ctx, int64_t in_row, int64_t begin, int64_t end, int64_t c,
                               int64_t channels, const T* du, T* grad, int64_t step) {
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  const Clamp<T> open = clamp_of<T>(Activation::identity);
  T zeros[kMicroVecs * Vec<T>::n];
  zero_fill(zeros, kMicroVecs * Vec<T>::n);
  ChannelRow<T> row;
  row.row_step = g.w_out * plan.du_width;
  row.column_step = plan.du_width;
  row.in_h = g.h_out;
  row.in_w = g.w_out;
  row.step_w = 1;
  row.channels = channels;
  const TapWalk kd = taps_to(in_row / g.h_in, g.pad_front, g.stride_d, g.dilation_d, g.kernel_d);
  const TapWalk kh = taps_to(in_row % g.h_in, g.pad_top, g.stride_h, g.dilation_h, g.kernel_h);
  // The last tap of a walk reads the first output.
  const int64_t tap_d = kd.first + (kd.count - 1) * kd.step, tap_h = kh.first + (kh.count - 1) * kh.step;
  row.weight_slice = -kd.step * plan.slice_taps * plan.mid_columns;
  const int64_t slices_before = place_slices(row, du, kd.out - (kd.count - 1) * kd.out_step, kd.out_step, g.d_out,
                                             kd.count, plan.slice_pixels * plan.du_width);
  const T* const first_x = row.x;
  for (int64_t residue = 0; residue < g.stride_w && begin + residue < end; ++residue) {
    const TapWalk kw = taps_to(begin + residue, g.pad_left, g.stride_w, g.dilation_w, g.kernel_w);
    row.taps_h = kw.count > 0 ? kh.count : 0;
    row.taps_w = kh.count > 0 ? kw.count : 0;
    row.dilation_h = kh.out_step;
    row.dilation_w = kw.out_step;
    const int64_t tap_w = kw.first + (kw.count - 1) * kw.step;
    const T* weight = static_cast<const T*>(ctx.packed.dw_weight) + c;
    if (row.slices > 0 && row.taps_h > 0 && row.taps_w > 0) {
      weight += (tap_d * plan.slice_taps + tap_h * g.kernel_w + tap_w) * plan.mid_columns;
      weight += slices_before * row.weight_slice;
    }
    row.weight_row = -kh.step * g.kernel_w * plan.mid_columns;
    row.weight_column = -kw.step * plan.mid_columns;
    T* out = grad + residue * step;
    row.start = zeros;
    row.start_step = 0;
    for (int64_t plane = 0; plane < g.multiplier; ++plane) {
      row.x = first_x + plane * g.c_in;
      row.weight = weight + plane * g.c_in;
      convolve_row(row, kh.out - (kh.count - 1) * kh.out_step, kw.out - (kw.count - 1) * kw.out_step,
                   ceil_div(end - begin - residue, g.stride_w), open, out, g.stride_w * step);
      row.start = out;
      row.start_step = g.stride_w * step;
    }
  }
}

DSCONV_INLINE bool is_plain(const Geometry& g) {
  return g.stride_d == 1 && g.stride_h == 1 && g.stride_w == 1 && g.multiplier == 1;
}

// Any number of channels where it is plain or has_grad_row() says yes.
template <typename T>
static void backward_x_channels(const BackwardContext& ctx, int64_t row, int64_t rows, int64_t c, int64_t channels,
                                const T* du, T* grad, int64_t step, int64_t out_row, Stores stores = Stores::plain) {
  const Geometry& g = ctx.p.geom;
  if (is_plain(g)) {
    return backward_x_plain(ctx, row, rows, c, channels, du, grad, step, out_row, stores);
  }
  for (int64_t i = 0; i < rows; ++i, grad += out_row) {
    if (has_grad_row(g)) {
      backward_x_strided(ctx, row + i, c, channels, du, grad, step, stores);
    } else {
      backward_x_general(ctx, row + i, 0, g.w_in, c, channels, du, grad, step);
    }
  }
}

// grad_x where it is walked in place. Past the caches only what does not fit into them, and by whole lines.
template <typename T>
DSCONV_INLINE Stores stores_of_grad_x(const BackwardContext& ctx) {
  const Strides& s = ctx.p.grad_x_strides;
  const uint64_t misaligned =
      reinterpret_cast<uint64_t>(ctx.p.grad_x) | static_cast<uint64_t>(s.w | s.h | s.d | s.n) * sizeof(T);
  const bool lines = Vec<T>::n * sizeof(T) == kCacheLine && misaligned % kCacheLine == 0;
  return lines && ctx.plan.beyond_cache ? Stores::stream : Stores::ahead;
}

// Rows [row, row_end) of grad_x, n * d_in * h_in of them, of one slice, for all channels: in place where grad_x allows
// it, else by way of tile[grad_pixels][columns], some rows or a part of one at a time.
template <typename S, typename T>
static void backward_x_rows(const BackwardContext& ctx, int64_t row, int64_t row_end, T* tile) {
#if DSCONV_ISA != DSCONV_ISA_GENERIC
  if constexpr (SameType<S, T>::value) {
    if (ctx.plan.by_planes) return backward_x_planes<T>(ctx, row, row_end);
  }
#endif
  constexpr int64_t columns = kMicroVecs * Vec<T>::n;
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  const Strides& stride = ctx.p.grad_x_strides;
  const int64_t rows_of_image = g.d_in * g.h_in, image = row / rows_of_image, first = row % rows_of_image;
  const Stores stores = stores_of_grad_x<T>(ctx);
  const int64_t last = first + row_end - row,
                to_first = image * stride.n + first / g.h_in * stride.d + first % g.h_in * stride.h;
  if constexpr (SameType<S, T>::value) {
    if (ctx.p.grad_x_layout == Layout::nhwc) {
      T* grad = static_cast<T*>(ctx.p.grad_x) + to_first;
      // All channels of some pixels, that lines are written one behind another; but past the caches, where that gains
      // nothing, a panel, whose du stays in L1 from row to row.
      const bool all = has_grad_row(g) || (is_plain(g) && stores != Stores::stream);
      const int64_t at_once = all ? g.c_in : columns;
      for (int64_t c = 0; c < g.c_in; c += at_once) {
        const int64_t width = g.c_in - c < at_once ? g.c_in - c : at_once;
        backward_x_channels(ctx, first, last - first, c, width, du_at<T>(ctx, image * plan.image_pixels, c), grad + c,
                            stride.w, stride.h, stores);
      }
      if (stores == Stores::stream) vstream_fence();
      return;
    }
  }
  const int64_t rows_at_once = plan.grad_pixels / g.w_in, part = plan.grad_pixels / g.stride_w * g.stride_w;
  for (int64_t c = 0; c < g.c_in; c += columns) {
    const int64_t width = g.c_in - c < columns ? g.c_in - c : columns;
    const T* du = du_at<T>(ctx, image * plan.image_pixels, c);
    for (int64_t i = first; i < last;) {
      const int64_t rows = rows_at_once < 1 ? 1 : (rows_at_once < last - i ? rows_at_once : last - i);
      const int64_t pixel = (image * rows_of_image + i) * g.w_in;
      if (rows_at_once > 0) {
        backward_x_channels(ctx, i, rows, c, width, du, tile, columns, g.w_in * columns);
        turn_grad_x_back<S>(ctx, tile, columns, c, width, pixel, rows * g.w_in);
      }
      for (int64_t begin = 0; rows_at_once < 1 && begin < g.w_in; begin += part) {
        const int64_t end = g.w_in - begin < part ? g.w_in : begin + part;
        backward_x_general(ctx, i, begin, end, c, width, du, tile, columns);
        turn_grad_x_back<S>(ctx, tile, columns, c, width, pixel + begin, end - begin);
      }
      i += rows;
    }
  }
}

// Whether whole vectors of x may be read for output rows before `row_end` where it reads this slice. Those of du may
// wherever x tells its end.
template <typename X>
DSCONV_INLINE bool reads_whole_vectors(const Geometry& g, const ChannelsLast<const X>& x, const X* slice,
                                       int64_t row_end) {
  const int64_t bottom = (row_end - 1) * g.stride_h - g.pad_top + (g.kernel_h - 1) * g.dilation_h;
  const int64_t last_row = bottom < g.h_in ? bottom : g.h_in - 1;
  const int64_t last_pixel = last_row * x.row + (g.w_in - 1) * x.column;
  return x.end != nullptr && last_pixel + Vec<typename ComputeOf<X>::type>::n <= x.end - slice;
}

// sums[tap][lanes] of the vector of channels that x begins with += the correlation over rows [row, row_end), columns
// [column, column_end) of a slice, in blocks of about kLongestSum pixels. du is the slice's. Sums of lanes past the
// last channel may be made too.
template <typename X, typename T>
static void correlate_rows(const BackwardContext& ctx, const ChannelsLast<const X>& x, int64_t slice, PixelBlock block,
                           int64_t channels, const T* du, T* sums) {
  const Geometry& g = ctx.p.geom;
  Correlation<X, T> in;
  in.g = &g;
  in.x_row = x.row;
  in.x_column = x.column;
  in.du = du;
  in.du_row = g.w_out * ctx.plan.du_width;
  in.du_column = ctx.plan.du_width;
  const int64_t width = block.column_end - block.column, rows_at_once = rows_of_a_chain(width, correlates_pairs(g));
  const int64_t pieces = ceil_div(width, kLongestSum), depth = slice % g.d_out * g.stride_d - g.pad_front;
  const Range taps = valid_taps(depth, g.dilation_d, g.d_in, g.kernel_d);
  for (int64_t row = block.row; row < block.row_end; row += rows_at_once) {
    const int64_t last = block.row_end - row < rows_at_once ? block.row_end : row + rows_at_once;
    for (int64_t tap = taps.begin; tap < taps.end; ++tap) {
      in.x = x.data + slice / g.d_out * x.image + (depth + tap * g.dilation_d) * x.slice;
      in.sums = sums + tap * ctx.plan.slice_taps * Vec<T>::n;
      in.left = reads_whole_vectors(g, x, in.x, last) ? Vec<T>::n : lanes_left(channels, Vec<T>::n);
      for (int64_t i = 0; i < pieces; ++i) {
        correlate_vector(in, {row, last, block.column + width * i / pieces, block.column + width * (i + 1) / pieces});
      }
    }
  }
}

template <typename T>
DSCONV_INLINE int64_t depthwise_vectors(const Geometry& g) {
  return g.multiplier * ceil_div(g.c_in, Vec<T>::n);
}

// partial[vector of channels][tap][lanes] += the correlation over these pixels of du. Few rows at a time meet
// all channels: they stay in cache, and within few pages.
template <typename X, typename T>
static void correlate_run(const BackwardContext& ctx, const ChannelsLast<const X>& x, const Range& pixels, T* partial) {
  constexpr int n = Vec<T>::n;
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  const int64_t per_plane = ceil_div(g.c_in, n), rows_at_once = rows_of_a_chain(g.w_out, correlates_pairs(g));
  for (int64_t pixel = pixels.begin; pixel < pixels.end;) {
    const PixelRun run = run_at(pixel, pixels.end - pixel, g.h_out, g.w_out, false);
    int64_t rows = run.length == g.w_out ? (pixels.end - pixel) / g.w_out : 1;
    if (rows > rows_at_once) rows = rows_at_once;
    if (rows > g.h_out - run.oh) rows = g.h_out - run.oh;
    for (int64_t v = 0; v < depthwise_vectors<T>(g); ++v) {
      const int64_t c = v % per_plane * n;
      correlate_rows(ctx, channels_from(x, c), run.slice, {run.oh, run.oh + rows, run.ow, run.ow + run.length},
                     g.c_in - c, du_at<T>(ctx, run.slice * plan.slice_pixels, v / per_plane * g.c_in + c),
                     partial + v * plan.taps * n);
    }
    pixel += rows * run.length;
  }
}

// grad_dw_weight of the vector of channels v from `groups` of sums, `step` apart.
template <typename S, typename T>
static void store_depthwise_gradient(const BackwardContext& ctx, int64_t v, const T* sums, int64_t groups,
                                     int64_t step) {
  constexpr int n = Vec<T>::n;
  const Geometry& g = ctx.p.geom;
  const int64_t taps = ctx.plan.taps, per_plane = ceil_div(g.c_in, n);
  const int64_t plane = v / per_plane, c = v % per_plane * n;
  const int left = lanes_left(g.c_in - c, n);
  S* grad = static_cast<S*>(ctx.p.grad_dw_weight) + (c * g.multiplier + plane) * taps;
  for (int64_t tap = 0; tap < taps; ++tap) {
    typename Vec<T>::type sum = vset(T(0));
    for (int64_t i = 0; i < groups; ++i) sum = sum + vload(sums + i * step + tap * n);
    for (int i = 0; i < left; ++i) store_one(sum[i], grad + i * g.multiplier * taps + tap);
  }
}

template <typename S, typename T>
static void reduce_depthwise(const BackwardContext& ctx, int64_t v) {
#if DSCONV_ISA != DSCONV_ISA_GENERIC
  if constexpr (SameType<S, T>::value) {
    if (ctx.plan.by_planes) return reduce_depthwise_planes<T>(ctx, v);
  }
#endif
  const CpuPlan& plan = ctx.plan;
  const int64_t size = plan.taps * Vec<T>::n, step = depthwise_vectors<T>(ctx.p.geom) * size;
  store_depthwise_gradient<S>(ctx, v, static_cast<const T*>(ctx.dw_partial) + v * size, plan.pointwise_groups, step);
}
