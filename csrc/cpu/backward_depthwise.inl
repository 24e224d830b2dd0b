// Stage D of backward, from du (the gradient of z):
//
//   grad_x[ih, iw, c]  = sum over planes and taps with oh * stride + tap * dilation - pad == ih (and so along w) of
//                        dw_weight[tap][k] * du[oh, ow, k]                       gathered: every value written once
//   grad_dw_weight[tap] = sum over pixels of x[tap of pixel] * du[pixel]
//
// Vectors along the channels; rows of images are tasks, groups of rows the partial sums of the weight gradient
// (correlate.inl).
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

template <typename A, typename B>
struct SameType {
  static constexpr bool value = false;
};
template <typename A>
struct SameType<A, A> {
  static constexpr bool value = true;
};

// du of an image from some channel on; `plane` elements from plane to plane, `panel` from panel to panel.
template <typename T>
struct ImageDu {
  const T* data;
  int64_t plane, panel;
};

// `count` pixels of grad_x, `step` elements apart, for up to kMicroVecs vectors of channels from c on: straight to
// where they go, or by way of `tile` where that is of another type.
template <typename G, typename T>
static void backward_x_pixels(const BackwardContext& ctx, ChannelRow<T>& row, int64_t c, const ImageDu<T>& du,
                              const T* weight, int64_t top, int64_t left, int64_t count, G* grad, int64_t step,
                              T* tile) {
  constexpr int n = Vec<T>::n;
  constexpr int64_t columns = kMicroVecs * n;
  const Geometry& g = ctx.p.geom;
  T zeros[columns];
  zero_fill(zeros, columns);
  T* out = tile;
  int64_t ld = columns;
  if constexpr (SameType<G, T>::value) out = grad, ld = step;
  row.channels = g.c_in - c < columns ? g.c_in - c : columns;
  row.start = zeros;
  row.start_step = 0;
  for (int64_t plane = 0; plane < g.multiplier; ++plane) {
    row.x = du.data + plane * du.plane;
    row.weight = weight + plane * g.c_in + c;
    convolve_row(row, top, left, count, clamp_of<T>(Activation::identity), out, ld);
    row.start = out;
    row.start_step = ld;
  }
  if constexpr (!SameType<G, T>::value) {
    for (int64_t i = 0; i < count; ++i) store_row(tile + i * columns, grad + i * step, row.channels);
  }
}

// `channels` channels of row ih of grad_x from c on, where has_grad_row() says yes. `grad` points to the first one of
// the row's first pixel, `step` from pixel to pixel.
template <typename G, typename T>
static void backward_x_row_direct(const BackwardContext& ctx, int64_t ih, int64_t c, int64_t channels,
                                  const ImageDu<T>& du, G* grad, int64_t step) {
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  GradRow<T> row;
  row.rows = 0;
  for (int64_t i = 0; i < g.kernel_h; ++i) {
    const int64_t above = ih + g.pad_top - i * g.dilation_h;
    if (above < 0 || above % g.stride_h != 0 || above / g.stride_h >= g.h_out) continue;
    row.du[row.rows] = du.data + above / g.stride_h * g.w_out * plan.du_width;
    row.weight[row.rows++] = static_cast<const T*>(ctx.packed.dw_weight) + i * g.kernel_w * plan.mid_columns + c;
  }
  row.du_column = plan.du_width;
  row.du_panel = du.panel;
  row.weight_column = plan.mid_columns;
  row.planes = g.multiplier;
  row.du_plane = du.plane;
  row.weight_plane = g.c_in;
  row.w_in = g.w_in;
  row.w_out = g.w_out;
  row.pad = g.pad_left;
  grad_row(g, row, channels, grad, step);
}

// Columns [begin, end) of a row of grad_x for up to kMicroVecs vectors of channels from c on, any geometry; begin is a
// multiple of the stride. The columns of one residue modulo the stride are a plain convolution of a few rows of du with
// the kernel walked backwards. `grad` points to column `begin`. `tile` holds plan.grad_pixels pixels.
template <typename G, typename T>
static void backward_x_row_general(const BackwardContext& ctx, int64_t ih, int64_t begin, int64_t end, int64_t c,
                                   const ImageDu<T>& du, G* grad, int64_t step, T* tile) {
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  ChannelRow<T> row;
  row.row_step = g.w_out * plan.du_width;
  row.column_step = plan.du_width;
  row.in_h = g.h_out;
  row.in_w = g.w_out;
  row.step_w = 1;
  const TapWalk kh = taps_to(ih, g.pad_top, g.stride_h, g.dilation_h, g.kernel_h);
  for (int64_t residue = 0; residue < g.stride_w && begin + residue < end; ++residue) {
    const TapWalk kw = taps_to(begin + residue, g.pad_left, g.stride_w, g.dilation_w, g.kernel_w);
    const int64_t columns = ceil_div(end - begin - residue, g.stride_w);
    row.taps_h = kw.count > 0 ? kh.count : 0;
    row.taps_w = kh.count > 0 ? kw.count : 0;
    row.dilation_h = kh.out_step;
    row.dilation_w = kw.out_step;
    // The last tap of the walk reads the first output.
    const int64_t tap_h = kh.first + (kh.count - 1) * kh.step, tap_w = kw.first + (kw.count - 1) * kw.step;
    const T* weight = static_cast<const T*>(ctx.packed.dw_weight);
    if (row.taps_h > 0 && row.taps_w > 0) weight += (tap_h * g.kernel_w + tap_w) * plan.mid_columns;
    row.weight_row = -kh.step * g.kernel_w * plan.mid_columns;
    row.weight_column = -kw.step * plan.mid_columns;
    const int64_t top = kh.out - (kh.count - 1) * kh.out_step, left = kw.out - (kw.count - 1) * kw.out_step;
    for (int64_t p = 0; p < columns; p += plan.grad_pixels) {
      const int64_t count = columns - p < plan.grad_pixels ? columns - p : plan.grad_pixels;
      backward_x_pixels(ctx, row, c, du, weight, top, left + p, count, grad + (residue + p * g.stride_w) * step,
                        g.stride_w * step, tile);
    }
  }
}

// `channels` channels from c on of row ih of an image of grad_x.
template <typename G, typename T>
static void backward_x_row(const BackwardContext& ctx, int64_t ih, int64_t c, int64_t channels, const ImageDu<T>& du,
                           G* grad, int64_t step, T* tile) {
  constexpr int64_t columns = kMicroVecs * Vec<T>::n;
  const Geometry& g = ctx.p.geom;
  if (has_grad_row(g)) return backward_x_row_direct(ctx, ih, c, channels, du, grad, step);
  const int64_t width = ctx.plan.du_width;
  for (int64_t i = 0; i < channels; i += columns) {
    const ImageDu<T> part = {du.data + i / width * du.panel + i % width, du.plane, du.panel};
    backward_x_row_general(ctx, ih, 0, g.w_in, c + i, part, grad + i, step, tile);
  }
}

template <typename T>
DSCONV_INLINE ImageDu<T> image_du(const BackwardContext& ctx, int64_t image, int64_t c) {
  const CpuPlan& plan = ctx.plan;
  return {du_at<T>(ctx, image * plan.image_pixels, c), ctx.p.geom.c_in, plan.pixels * plan.du_width};
}

template <typename S, typename T>
static void backward_x_nhwc(const BackwardContext& ctx, int64_t task, void* scratch) {
  const Geometry& g = ctx.p.geom;
  const Strides& stride = ctx.p.grad_x_strides;
  const int64_t image = task / g.h_in, ih = task % g.h_in;
  S* grad = static_cast<S*>(ctx.p.grad_x) + image * stride.n + ih * stride.h;
  backward_x_row(ctx, ih, 0, g.c_in, image_du<T>(ctx, image, 0), grad, stride.w, static_cast<T*>(scratch));
}

// nchw: some rows of one image, a panel of channels after the other, through [pixels][columns]; pieces of a row where
// one is longer than that.
template <typename S, typename T>
static void backward_x_nchw(const BackwardContext& ctx, int64_t task, void* scratch) {
  constexpr int64_t columns = kMicroVecs * Vec<T>::n;
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  T* tile = static_cast<T*>(scratch);
  const int64_t tasks = ceil_div(g.h_in, plan.grad_rows), image = task / tasks;
  const int64_t first = task % tasks * plan.grad_rows;
  const int64_t last = g.h_in - first < plan.grad_rows ? g.h_in : first + plan.grad_rows;
  const int64_t pixel = image * g.h_in * g.w_in;
  for (int64_t c = 0; c < g.c_in; c += columns) {
    const int64_t width = g.c_in - c < columns ? g.c_in - c : columns;
    const ImageDu<T> du = image_du<T>(ctx, image, c);
    if (g.w_in * (last - first) <= plan.grad_pixels) {
      for (int64_t ih = first; ih < last; ++ih) {
        backward_x_row(ctx, ih, c, width, du, tile + (ih - first) * g.w_in * columns, columns, tile);
      }
      turn_grad_x_back<S>(ctx, tile, columns, c, width, pixel + first * g.w_in, (last - first) * g.w_in);
      continue;
    }
    const int64_t most = plan.grad_pixels / g.stride_w * g.stride_w;
    for (int64_t begin = 0; begin < g.w_in; begin += most) {
      const int64_t end = g.w_in - begin < most ? g.w_in : begin + most;
      backward_x_row_general(ctx, first, begin, end, c, du, tile, columns, tile);
      turn_grad_x_back<S>(ctx, tile, columns, c, width, pixel + first * g.w_in + begin, end - begin);
    }
  }
}

// sums[tap][lanes] of the vector of channels that x begins with += the correlation over rows [row, row_end) of an
// image, in blocks of about kLongestSum pixels.
template <typename X, typename T>
static void correlate_rows(const BackwardContext& ctx, const ChannelsLast<const X>& x, int64_t image, int64_t row,
                           int64_t row_end, int64_t channels, const T* du, T* sums) {
  const Geometry& g = ctx.p.geom;
  Correlation<X, T> in;
  in.g = &g;
  in.x = x.data + image * x.image;
  in.x_row = x.row;
  in.x_column = x.column;
  in.du = du;
  in.du_row = g.w_out * ctx.plan.du_width;
  in.du_column = ctx.plan.du_width;
  in.sums = sums;
  in.left = lanes_left(channels, Vec<T>::n);
  const int64_t rows_at_once = g.w_out < kLongestSum ? kLongestSum / g.w_out : 1;
  const int64_t pieces = ceil_div(g.w_out, kLongestSum);
  for (; row < row_end; row += rows_at_once) {
    const int64_t last = row_end - row < rows_at_once ? row_end : row + rows_at_once;
    for (int64_t i = 0; i < pieces; ++i) {
      correlate_vector(in, {row, last, g.w_out * i / pieces, g.w_out * (i + 1) / pieces});
    }
  }
}

// A group is a range of rows of du, summed into dw_partial[group][vector of channels][tap][lanes]. Few rows at a time
// meet all channels of the task: they stay in cache, and within few pages.
template <typename X, typename T>
static void backward_dw_group(const BackwardContext& ctx, const ChannelsLast<const X>& x, int64_t task) {
  constexpr int n = Vec<T>::n;
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  const int64_t per_plane = ceil_div(g.c_in, n), vectors = g.multiplier * per_plane;
  const int64_t group = task / plan.depthwise_parts, part = task % plan.depthwise_parts;
  const int64_t first_vector = vectors * part / plan.depthwise_parts;
  const int64_t last_vector = vectors * (part + 1) / plan.depthwise_parts;
  T* partial = static_cast<T*>(ctx.dw_partial) + group * vectors * plan.taps * n;
  zero_fill(partial + first_vector * plan.taps * n, (last_vector - first_vector) * plan.taps * n);
  const int64_t rows = g.n * g.h_out, last_row = rows * (group + 1) / plan.depthwise_groups;
  const int64_t rows_at_once = g.w_out < kLongestSum ? kLongestSum / g.w_out : 1;
  for (int64_t row = rows * group / plan.depthwise_groups; row < last_row;) {
    const int64_t image = row / g.h_out, oh = row % g.h_out;
    int64_t count = g.h_out - oh < rows_at_once ? g.h_out - oh : rows_at_once;
    if (count > last_row - row) count = last_row - row;
    for (int64_t v = first_vector; v < last_vector; ++v) {
      const int64_t c = v % per_plane * n;
      const ChannelsLast<const X> from = {x.data + c, x.image, x.row, x.column};
      correlate_rows(ctx, from, image, oh, oh + count, g.c_in - c,
                     du_at<T>(ctx, image * plan.image_pixels, v / per_plane * g.c_in + c), partial + v * plan.taps * n);
    }
    row += count;
  }
}

template <typename S, typename T>
static void backward_dw(const BackwardContext& ctx, int64_t task) {
  if (ctx.x_turned != nullptr) {
    backward_dw_group<T, T>(ctx, x_turned<T>(ctx), task);
  } else {
    backward_dw_group<S, T>(ctx, x_as_given<S>(ctx), task);
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
  const CpuPlan& plan = ctx.plan;
  const int64_t size = plan.taps * Vec<T>::n,
                step = ctx.p.geom.multiplier * ceil_div(ctx.p.geom.c_in, Vec<T>::n) * size;
  store_depthwise_gradient<S>(ctx, v, static_cast<const T*>(ctx.dw_partial) + v * size, plan.depthwise_groups, step);
}
