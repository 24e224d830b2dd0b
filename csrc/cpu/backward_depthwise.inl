// Stage D of backward, from du (the gradient of z):
//
//   grad_x[ih, iw, c]  = sum over planes and taps with oh * stride + tap * dilation - pad == ih (and so along w) of
//                        dw_weight[tap][k] * du[oh, ow, k]                       gathered: every value written once
//   grad_dw_weight[tap] = sum over pixels of x[tap of pixel] * du[pixel]
//
// nhwc: vectors along the channels; rows of images are tasks, groups of rows the partial sums of the weight gradient
// (correlate.inl).
// nchw: vectors along w; a channel's plane is a task, so the weight gradient needs no partial sums.
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

// du of the nhwc stage D: panels of plan.du_width channels, [c_mid / du_width][pixels][du_width].
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

// `count` pixels of grad_x, `step` elements apart, for up to kMicroVecs vectors of channels from c on: straight into
// the tensor where it can be, else through `tile`.
template <typename S, typename T>
static void backward_x_pixels(const BackwardContext& ctx, ChannelRow<T>& row, int64_t c, const ImageDu<T>& du,
                              const T* weight, int64_t top, int64_t left, int64_t count, S* grad, int64_t step,
                              T* tile) {
  constexpr int n = Vec<T>::n;
  constexpr int64_t columns = kMicroVecs * n;
  const Geometry& g = ctx.p.geom;
  const int64_t grad_channel = ctx.p.grad_x_strides.c;
  T zeros[columns];
  zero_fill(zeros, columns);
  T* out = tile;
  int64_t ld = columns;
  if constexpr (SameType<S, T>::value) {
    if (grad_channel == 1) out = grad, ld = step;
  }
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
  if (out != tile) return;
  for (int64_t i = 0; i < count; ++i, grad += step, tile += columns) {
    if (grad_channel == 1) {
      store_row(tile, grad, row.channels);
    } else {
      for (int64_t j = 0; j < row.channels; ++j) store_one(tile[j], grad + j * grad_channel);
    }
  }
}

// `channels` channels of a row of grad_x from c on, where has_grad_row() says yes.
template <typename S, typename T>
static void backward_x_row_direct(const BackwardContext& ctx, int64_t image, int64_t ih, int64_t c, int64_t channels,
                                  const ImageDu<T>& du) {
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  const Strides& stride = ctx.p.grad_x_strides;
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
  grad_row(g, row, channels, static_cast<S*>(ctx.p.grad_x) + image * stride.n + ih * stride.h + c, stride.w);
}

// A row of grad_x for up to kMicroVecs vectors of channels from c on, any geometry. Its columns of one residue modulo
// the stride are a plain convolution of a few rows of du with the kernel walked backwards. `tile` holds
// plan.grad_pixels of them.
template <typename S, typename T>
static void backward_x_row_general(const BackwardContext& ctx, int64_t image, int64_t ih, int64_t c,
                                   const ImageDu<T>& du, T* tile) {
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  const Strides& stride = ctx.p.grad_x_strides;
  const int64_t step = g.stride_w * stride.w;
  S* grad_row = static_cast<S*>(ctx.p.grad_x) + image * stride.n + ih * stride.h + c * stride.c;
  ChannelRow<T> row;
  row.row_step = g.w_out * plan.du_width;
  row.column_step = plan.du_width;
  row.in_h = g.h_out;
  row.in_w = g.w_out;
  row.step_w = 1;
  const TapWalk kh = taps_to(ih, g.pad_top, g.stride_h, g.dilation_h, g.kernel_h);
  for (int64_t first_column = 0; first_column < g.stride_w && first_column < g.w_in; ++first_column) {
    const TapWalk kw = taps_to(first_column, g.pad_left, g.stride_w, g.dilation_w, g.kernel_w);
    const int64_t columns = ceil_div(g.w_in - first_column, g.stride_w);
    row.taps_h = kw.count > 0 ? kh.count : 0;
    row.taps_w = kh.count > 0 ? kw.count : 0;
    row.dilation_h = kh.out_step;
    row.dilation_w = kw.out_step;
    // The last tap of the walk reads the first output.
    const int64_t tap_h = kh.first + (kh.count - 1) * kh.step, tap_w = kw.first + (kw.count - 1) * kw.step;
    const T* weight = static_cast<const T*>(ctx.packed.dw_weight);
    if (row.taps_h > 0) weight += (tap_h * g.kernel_w + tap_w) * plan.mid_columns;
    row.weight_row = -kh.step * g.kernel_w * plan.mid_columns;
    row.weight_column = -kw.step * plan.mid_columns;
    const int64_t top = kh.out - (kh.count - 1) * kh.out_step, left = kw.out - (kw.count - 1) * kw.out_step;
    for (int64_t p = 0; p < columns; p += plan.grad_pixels) {
      const int64_t count = columns - p < plan.grad_pixels ? columns - p : plan.grad_pixels;
      backward_x_pixels(ctx, row, c, du, weight, top, left + p, count, grad_row + first_column * stride.w + p * step,
                        step, tile);
    }
  }
}

template <typename S, typename T>
static void backward_x_row(const BackwardContext& ctx, int64_t image, int64_t ih, int64_t c, int64_t channels,
                           const ImageDu<T>& du, T* tile) {
  constexpr int64_t columns = kMicroVecs * Vec<T>::n;
  if (has_grad_row(ctx.p.geom, ctx.p.grad_x_strides)) {
    return backward_x_row_direct<S>(ctx, image, ih, c, channels, du);
  }
  const int64_t width = ctx.plan.du_width;
  for (int64_t i = 0; i < channels; i += columns) {
    const ImageDu<T> part = {du.data + i / width * du.panel + i % width, du.plane, du.panel};
    backward_x_row_general<S>(ctx, image, ih, c + i, part, tile);
  }
}

template <typename S, typename T>
static void backward_x_nhwc(const BackwardContext& ctx, int64_t task, void* scratch) {
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  const int64_t image = task / g.h_in;
  const ImageDu<T> du = {du_at<T>(ctx, image * plan.image_pixels, 0), g.c_in, plan.pixels * plan.du_width};
  backward_x_row<S>(ctx, image, task % g.h_in, 0, g.c_in, du, static_cast<T*>(scratch));
}

// sums[tap][lanes] of a vector of channels += the correlation over rows [row, row_end) of an image, in blocks of about
// kLongestSum pixels.
template <typename S, typename T>
static void correlate_rows(const BackwardContext& ctx, int64_t image, int64_t row, int64_t row_end, int64_t c,
                           const T* du, T* sums) {
  const BackwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  Correlation<S, T> in;
  in.g = &g;
  in.x = static_cast<const S*>(p.x) + image * p.x_strides.n + c;
  in.x_row = p.x_strides.h;
  in.x_column = p.x_strides.w;
  in.du = du;
  in.du_row = g.w_out * ctx.plan.du_width;
  in.du_column = ctx.plan.du_width;
  in.sums = sums;
  in.left = lanes_left(g.c_in - c, Vec<T>::n);
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
template <typename S, typename T>
static void backward_dw_nhwc(const BackwardContext& ctx, int64_t task) {
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
      correlate_rows<S>(ctx, image, oh, oh + count, c,
                        du_at<T>(ctx, image * plan.image_pixels, v / per_plane * g.c_in + c),
                        partial + v * plan.taps * n);
    }
    row += count;
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
