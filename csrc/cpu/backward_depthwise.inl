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

// The taps that connect input position `position` to an output: tap = first + i * step reads output out - i * out_step.
struct TapWalk {
  int64_t first, step, count;
  int64_t out, out_step;
};
DSCONV_INLINE TapWalk taps_to(int64_t position, int64_t pad, int64_t stride, int64_t dilation, int64_t taps,
                              int64_t outputs) {
  int64_t divisor = stride, rest = dilation % stride;
  while (rest != 0) {
    const int64_t t = divisor % rest;
    divisor = rest;
    rest = t;
  }
  TapWalk walk = {0, stride / divisor, 0, 0, dilation / divisor};
  const int64_t padded = position + pad;
  while (walk.first < walk.step && (padded - walk.first * dilation) % stride != 0) ++walk.first;
  if (walk.first == walk.step) return walk;
  // Outputs fall by out_step with each tap. Skip those beyond the last output, stop below the first.
  walk.out = (padded - walk.first * dilation) / stride;
  const int64_t skip = walk.out < outputs ? 0 : ceil_div(walk.out - outputs + 1, walk.out_step);
  walk.first += skip * walk.step;
  walk.out -= skip * walk.out_step;
  if (walk.out < 0 || walk.first >= taps) return walk;
  const int64_t by_taps = ceil_div(taps - walk.first, walk.step), by_outputs = walk.out / walk.out_step + 1;
  walk.count = by_taps < by_outputs ? by_taps : by_outputs;
  return walk;
}

template <int U, typename T>
DSCONV_INLINE void gather_pixel(const Geometry& g, int64_t weight_ld, const TapWalk& kh, const TapWalk& kw, const T* du,
                                const T* weight, int left, typename Vec<T>::type (&acc)[U]) {
  constexpr int n = Vec<T>::n;
  for (int u = 0; u < U; ++u) acc[u] = vset(T(0));
  for (int64_t plane = 0; plane < g.multiplier; ++plane) {
    for (int64_t i = 0; i < kh.count; ++i) {
      for (int64_t j = 0; j < kw.count; ++j) {
        const int64_t tap = (kh.first + i * kh.step) * g.kernel_w + kw.first + j * kw.step;
        const int64_t pixel = (kh.out - i * kh.out_step) * g.w_out + kw.out - j * kw.out_step;
        const T* wp = weight + tap * weight_ld + plane * g.c_in;
        const T* dp = du + pixel * g.c_mid + plane * g.c_in;
        if (left == n) {
          DSCONV_UNROLL
          for (int u = 0; u < U; ++u) acc[u] = vfma(vload(wp + u * n), vload(dp + u * n), acc[u]);
        } else {
          acc[0] = vfma(vload(wp, left), vload(dp, left), acc[0]);
        }
      }
    }
  }
}

template <typename S, typename V>
DSCONV_INLINE void store_lanes(S* p, int64_t step, V v, int count, int lanes) {
  if (step == 1 && count == lanes) {
    vstore(p, v);
  } else if (step == 1) {
    vstore(p, v, count);
  } else {
    for (int i = 0; i < count; ++i) store_one(v[i], p + i * step);
  }
}

template <typename S, typename T>
static void backward_x_nhwc(const BackwardContext& ctx, int64_t row) {
  constexpr int n = Vec<T>::n;
  constexpr int U = 4;
  typedef typename Vec<T>::type V;
  const Geometry& g = ctx.p.geom;
  const int64_t image = row / g.h_in, ih = row % g.h_in;
  const Strides& stride = ctx.p.grad_x_strides;
  const T* weight = static_cast<const T*>(ctx.packed.dw_weight);
  const T* du = static_cast<const T*>(ctx.du) + image * ctx.plan.image_pixels * g.c_mid;
  const TapWalk kh = taps_to(ih, g.pad_top, g.stride_h, g.dilation_h, g.kernel_h, g.h_out);
  for (int64_t iw = 0; iw < g.w_in; ++iw) {
    const TapWalk kw = taps_to(iw, g.pad_left, g.stride_w, g.dilation_w, g.kernel_w, g.w_out);
    S* grad = static_cast<S*>(ctx.p.grad_x) + image * stride.n + ih * stride.h + iw * stride.w;
    int64_t c = 0;
    for (; c + U * n <= g.c_in; c += U * n) {
      V acc[U];
      gather_pixel(g, ctx.plan.mid_columns, kh, kw, du + c, weight + c, n, acc);
      for (int u = 0; u < U; ++u) store_lanes(grad + (c + u * n) * stride.c, stride.c, acc[u], n, n);
    }
    for (; c < g.c_in; c += n) {
      V acc[1];
      const int left = lanes_left(g.c_in - c, n);
      gather_pixel(g, ctx.plan.mid_columns, kh, kw, du + c, weight + c, left, acc);
      store_lanes(grad + c * stride.c, stride.c, acc[0], left, n);
    }
  }
}

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

template <typename S, typename T>
static void correlate_tap(const Geometry& g, const S* x, int64_t x_step, const T* du, int64_t count, T* sums) {
  constexpr int n = Vec<T>::n;
  for (int64_t plane = 0; plane < g.multiplier; ++plane, du += g.c_in, sums += g.c_in) {
    int64_t c = 0;
    for (; c + 4 * n <= g.c_in; c += 4 * n) correlate_row<4>(x + c, x_step, du + c, g.c_mid, count, sums + c);
    for (; c + n <= g.c_in; c += n) correlate_row<1>(x + c, x_step, du + c, g.c_mid, count, sums + c);
    if (c < g.c_in) {
      correlate_row_tail(x + c, x_step, du + c, g.c_mid, count, sums + c, static_cast<int>(g.c_in - c));
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
    const Range kh = valid_taps(oh * g.stride_h - g.pad_top, g.dilation_h, g.h_in, g.kernel_h);
    for (int64_t i = kh.begin; i < kh.end; ++i) {
      const S* x = static_cast<const S*>(p.x) + image * p.x_strides.n +
                   (oh * g.stride_h - g.pad_top + i * g.dilation_h) * p.x_strides.h;
      for (int64_t j = 0; j < g.kernel_w; ++j) {
        const int64_t offset = j * g.dilation_w - g.pad_left;
        const Range ow = valid_outputs(offset, g.stride_w, g.w_in, g.w_out);
        if (ow.begin == ow.end) continue;
        correlate_tap(g, x + (ow.begin * g.stride_w + offset) * p.x_strides.w, g.stride_w * p.x_strides.w,
                      du + ow.begin * g.c_mid, ow.end - ow.begin, partial + (i * g.kernel_w + j) * plan.mid_columns);
      }
    }
  }
}

template <typename S, typename T>
static void reduce_depthwise(const BackwardContext& ctx, int64_t tap) {
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  const T* partial = static_cast<const T*>(ctx.dw_partial) + tap * plan.mid_columns;
  S* grad = static_cast<S*>(ctx.p.grad_dw_weight) + tap;
  const int64_t step = plan.taps * plan.mid_columns;
  for (int64_t k = 0; k < g.c_mid; ++k) {
    store_one(sum_groups(partial + k, step, plan.depthwise_groups), grad + tensor_channel(g, k) * plan.taps);
  }
}
