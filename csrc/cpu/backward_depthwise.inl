// Stage D of backward, from du (the gradient of z):
//
//   grad_x[ih, iw, c]  = sum over planes and taps with oh * stride + tap * dilation - pad == ih (and so along w) of
//                        dw_weight[tap][k] * du[oh, ow, k]                       gathered: every value written once
//   grad_dw_weight[tap] = sum over pixels of x[tap of pixel] * du[pixel]
//
// nhwc: vectors along the channels; rows of images are tasks, groups of rows the partial sums of the weight gradient.
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

// A row of grad_x. Its columns of one residue modulo the stride are a plain convolution of a few rows of du with the
// kernel walked backwards. `tile` holds plan.grad_pixels of them.
template <typename S, typename T>
static void backward_x_columns(const BackwardContext& ctx, ChannelRow<T>& row, const TapWalk& kh, int64_t first_column,
                               S* grad_row, T* tile) {
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  const Strides& stride = ctx.p.grad_x_strides;
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
  const T* image = row.x;
  for (int64_t p = 0; p < columns; p += plan.grad_pixels) {
    const int64_t count = columns - p < plan.grad_pixels ? columns - p : plan.grad_pixels;
    zero_fill(tile, count * plan.mid_ld);
    for (int64_t plane = 0; row.taps_h > 0 && plane < g.multiplier; ++plane) {
      row.x = image + plane * g.c_in;
      row.weight = weight + plane * g.c_in;
      row.start = tile;
      convolve_row(row, top, left + p, count, clamp_of<T>(Activation::identity), tile, plan.mid_ld);
    }
    row.x = image;
    for (int64_t i = 0; i < count; ++i) {
      S* grad = grad_row + (first_column + (p + i) * g.stride_w) * stride.w;
      if (stride.c == 1) {
        store_row(tile + i * plan.mid_ld, grad, g.c_in);
      } else {
        for (int64_t c = 0; c < g.c_in; ++c) store_one(tile[i * plan.mid_ld + c], grad + c * stride.c);
      }
    }
  }
}

template <typename S, typename T>
static void backward_x_nhwc(const BackwardContext& ctx, int64_t task, void* scratch) {
  const Geometry& g = ctx.p.geom;
  const int64_t image = task / g.h_in, ih = task % g.h_in;
  const Strides& stride = ctx.p.grad_x_strides;
  ChannelRow<T> row;
  row.x = static_cast<const T*>(ctx.du) + image * ctx.plan.image_pixels * g.c_mid;
  row.row_step = g.w_out * g.c_mid;
  row.column_step = g.c_mid;
  row.in_h = g.h_out;
  row.in_w = g.w_out;
  row.step_w = 1;
  row.start_step = ctx.plan.mid_ld;
  row.channels = g.c_in;
  const TapWalk kh = taps_to(ih, g.pad_top, g.stride_h, g.dilation_h, g.kernel_h);
  S* grad_row = static_cast<S*>(ctx.p.grad_x) + image * stride.n + ih * stride.h;
  for (int64_t column = 0; column < g.stride_w && column < g.w_in; ++column) {
    backward_x_columns(ctx, row, kh, column, grad_row, static_cast<T*>(scratch));
  }
}

// Rows longer than this many pixels are summed in parts: rounding errors grow with the chain of additions.
constexpr int kLongestRow = 64;

// sums[0..U) += sum over `count` pixels of x * du, vectors along channels.
template <int U, typename S, typename T>
DSCONV_INLINE void correlate_row(const S* x, int64_t x_step, const T* du, int64_t du_step, int64_t count, T* sums) {
  typedef typename Vec<T>::type V;
  constexpr int n = Vec<T>::n;
  V acc[U];
  DSCONV_UNROLL
  for (int u = 0; u < U; ++u) acc[u] = vset(T(0));
  for (int64_t i = 0; i < count; ++i, x += x_step, du += du_step) {
    DSCONV_UNROLL
    for (int u = 0; u < U; ++u) acc[u] = vfma(vload(x + u * n), vload(du + u * n), acc[u]);
  }
  DSCONV_UNROLL
  for (int u = 0; u < U; ++u) vstore(sums + u * n, vload(sums + u * n) + acc[u]);
}
template <typename S, typename T>
DSCONV_INLINE void correlate_row_tail(const S* x, int64_t x_step, const T* du, int64_t du_step, int64_t count, T* sums,
                                      int left) {
  typename Vec<T>::type acc = vset(T(0));
  for (int64_t i = 0; i < count; ++i, x += x_step, du += du_step) acc = vfma(vload(x, left), vload(du, left), acc);
  vstore(sums, vload(sums, left) + acc, left);
}

// One tap, the channels of each plane from `channel` on.
template <typename S, typename T>
static void correlate_tap(const Geometry& g, const S* x, int64_t x_step, const T* du, int64_t count, int64_t channel,
                          T* sums) {
  constexpr int n = Vec<T>::n;
  for (int64_t plane = 0; plane < g.multiplier; ++plane, du += g.c_in, sums += g.c_in) {
    int64_t c = channel;
    for (; c + 4 * n <= g.c_in; c += 4 * n) correlate_row<4>(x + c, x_step, du + c, g.c_mid, count, sums + c);
    for (; c + n <= g.c_in; c += n) correlate_row<1>(x + c, x_step, du + c, g.c_mid, count, sums + c);
    if (c < g.c_in) {
      correlate_row_tail(x + c, x_step, du + c, g.c_mid, count, sums + c, static_cast<int>(g.c_in - c));
    }
  }
}

// One kernel row of Taps taps without dilation, where all of them lie inside the image: 2 pixels at a time, so that a
// value of x meets every tap that reads it. sums[tap][c] for 2 vectors of channels.
template <int Taps, int Step, typename S, typename T>
DSCONV_INLINE void correlate_taps_row(const S* x, int64_t x_column, const T* du, int64_t du_step, int64_t pairs,
                                      T* sums, int64_t sums_ld) {
  typedef typename Vec<T>::type V;
  constexpr int n = Vec<T>::n;
  V acc[Taps][2];
  DSCONV_UNROLL
  for (int j = 0; j < Taps; ++j) acc[j][0] = acc[j][1] = vset(T(0));
  for (int64_t i = 0; i < pairs; ++i, x += 2 * Step * x_column, du += 2 * du_step) {
    const V d[2][2] = {{vload(du), vload(du + n)}, {vload(du + du_step), vload(du + du_step + n)}};
    DSCONV_UNROLL
    for (int column = 0; column < Step + Taps; ++column) {
      const V v[2] = {vload(x + column * x_column), vload(x + column * x_column + n)};
      DSCONV_UNROLL
      for (int p = 0; p < 2; ++p) {
        const int j = column - p * Step;
        if (j >= 0 && j < Taps) {
          acc[j][0] = vfma(v[0], d[p][0], acc[j][0]);
          acc[j][1] = vfma(v[1], d[p][1], acc[j][1]);
        }
      }
    }
  }
  DSCONV_UNROLL
  for (int j = 0; j < Taps; ++j) {
    DSCONV_UNROLL
    for (int u = 0; u < 2; ++u) {
      T* to = sums + j * sums_ld + u * n;
      vstore(to, vload(to) + acc[j][u]);
    }
  }
}

// The channels c .. of all planes that go 2 vectors at a time; returns how many of a plane's they are.
template <int Taps, int Step, typename S, typename T>
static int64_t correlate_inner(const Geometry& g, const S* x, int64_t x_column, const T* du, int64_t pairs, T* sums,
                               int64_t sums_ld) {
  constexpr int n = Vec<T>::n;
  const int64_t channels = g.c_in / (2 * n) * (2 * n);
  for (int64_t plane = 0; plane < g.multiplier; ++plane, du += g.c_in, sums += g.c_in) {
    for (int64_t c = 0; c < channels; c += 2 * n) {
      for (int64_t pair = 0; pair < pairs; pair += kLongestRow / 2) {
        correlate_taps_row<Taps, Step>(x + c + pair * 2 * Step * x_column, x_column, du + c + pair * 2 * g.c_mid,
                                       g.c_mid, lanes_left(pairs - pair, kLongestRow / 2), sums + c, sums_ld);
      }
    }
  }
  return channels;
}

// All taps of one kernel row against one row of du.
template <typename S, typename T>
static void correlate_kernel_row(const BackwardContext& ctx, const S* x, const T* du, T* sums) {
  const Geometry& g = ctx.p.geom;
  const int64_t column = ctx.p.x_strides.w, ld = ctx.plan.mid_columns;
  const Range first = valid_outputs(-g.pad_left, g.stride_w, g.w_in, g.w_out);
  const Range last = valid_outputs((g.kernel_w - 1) * g.dilation_w - g.pad_left, g.stride_w, g.w_in, g.w_out);
  const int64_t inner = first.begin;
  int64_t pairs = last.end > inner ? (last.end - inner) / 2 : 0, channels = 0;
  const S* x_inner = x + (inner * g.stride_w - g.pad_left) * column;
  const T* du_inner = du + inner * g.c_mid;
  if (pairs == 0 || g.dilation_w != 1 || g.stride_w > 2) {
    pairs = 0;
  } else if (g.kernel_w == 3 && g.stride_w == 1) {
    channels = correlate_inner<3, 1>(g, x_inner, column, du_inner, pairs, sums, ld);
  } else if (g.kernel_w == 3) {
    channels = correlate_inner<3, 2>(g, x_inner, column, du_inner, pairs, sums, ld);
  } else if (g.kernel_w == 5 && g.stride_w == 1) {
    channels = correlate_inner<5, 1>(g, x_inner, column, du_inner, pairs, sums, ld);
  } else if (g.kernel_w == 5) {
    channels = correlate_inner<5, 2>(g, x_inner, column, du_inner, pairs, sums, ld);
  }
  if (channels == 0) pairs = 0;
  for (int64_t j = 0; j < g.kernel_w; ++j) {
    const int64_t offset = j * g.dilation_w - g.pad_left;
    const Range ow = valid_outputs(offset, g.stride_w, g.w_in, g.w_out);
    // What the pairs have left: the pixels beside them, and beside their channels.
    const Range part[3] = {
        {ow.begin, pairs > 0 ? inner : ow.end}, {inner, inner + 2 * pairs}, {inner + 2 * pairs, ow.end}};
    for (int i = 0; i < (pairs > 0 ? 3 : 1); ++i) {
      for (int64_t begin = part[i].begin; begin < part[i].end; begin += kLongestRow) {
        correlate_tap(g, x + (begin * g.stride_w + offset) * column, g.stride_w * column, du + begin * g.c_mid,
                      lanes_left(part[i].end - begin, kLongestRow), i == 1 ? channels : 0, sums + j * ld);
      }
    }
  }
}

template <typename S, typename T>
static void backward_dw_nhwc(const BackwardContext& ctx, int64_t group) {
  const BackwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  const CpuPlan& plan = ctx.plan;
  T* partial = static_cast<T*>(ctx.dw_partial) + group * plan.taps * plan.mid_columns;
  zero_fill(partial, plan.taps * plan.mid_columns);
  const int64_t rows = g.n * g.h_out;
  for (int64_t row = rows * group / plan.depthwise_groups; row < rows * (group + 1) / plan.depthwise_groups; ++row) {
    const int64_t image = row / g.h_out, oh = row % g.h_out;
    const T* du = static_cast<const T*>(ctx.du) + row * g.w_out * g.c_mid;
    const int64_t top = oh * g.stride_h - g.pad_top;
    const Range kh = valid_taps(top, g.dilation_h, g.h_in, g.kernel_h);
    for (int64_t i = kh.begin; i < kh.end; ++i) {
      const S* x = static_cast<const S*>(p.x) + image * p.x_strides.n + (top + i * g.dilation_h) * p.x_strides.h;
      correlate_kernel_row(ctx, x, du, partial + i * g.kernel_w * plan.mid_columns);
    }
  }
}

template <typename S, typename T>
static void reduce_depthwise(const BackwardContext& ctx, int64_t tap) {
  constexpr int n = Vec<T>::n;
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  const T* partial = static_cast<const T*>(ctx.dw_partial) + tap * plan.mid_columns;
  S* grad = static_cast<S*>(ctx.p.grad_dw_weight) + tap;
  for (int64_t k = 0; k < g.c_mid; k += n) {
    typename Vec<T>::type sum = vset(T(0));
    for (int64_t i = 0; i < plan.depthwise_groups; ++i) {
      sum = sum + vload(partial + i * plan.taps * plan.mid_columns + k);
    }
    const int left = lanes_left(g.c_mid - k, n);
    for (int i = 0; i < left; ++i) store_one(sum[i], grad + tensor_channel(g, k + i) * plan.taps);
  }
}
