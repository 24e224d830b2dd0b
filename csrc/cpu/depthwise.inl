// z of a tile: z[p][k] = clamp(dw_bias[k] + sum over taps dw_weight[tap][k] * x[tap of p][c(k)]).
//
// nhwc: vectors along the channels, the taps of a pixel limited to those inside the image.
// nchw: vectors along w. A strip of the tile's pixels is summed for `lanes` channels, then turned into the tile.
#ifndef DSCONV_ISA
#error "depthwise.inl belongs inside an ISA region"
#endif

template <typename S>
struct DepthwiseInput {
  const Geometry* g;
  const CpuPlan* plan;
  const S* x;
  Strides stride;
  Layout layout;
  const typename ComputeOf<S>::type* weight;  // PackedWeights
  const typename ComputeOf<S>::type* bias;
};

// U vectors of channels of one pixel. `x` is the first valid tap's, `weight` too.
template <int U, typename S, typename T>
DSCONV_INLINE void depthwise_pixel(const S* x, int64_t row_step, int64_t column_step, const T* weight,
                                   int64_t weight_row, int64_t weight_column, int64_t rows, int64_t columns,
                                   const T* bias, Clamp<T> clamp, T* z) {
  typedef typename Vec<T>::type V;
  constexpr int n = Vec<T>::n;
  V acc[U];
  DSCONV_UNROLL
  for (int u = 0; u < U; ++u) acc[u] = vload(bias + u * n);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const S* xp = x + i * row_step + j * column_step;
      const T* wp = weight + i * weight_row + j * weight_column;
      DSCONV_UNROLL
      for (int u = 0; u < U; ++u) acc[u] = vfma(vload(wp + u * n), vload(xp + u * n), acc[u]);
    }
  }
  DSCONV_UNROLL
  for (int u = 0; u < U; ++u) vstore(z + u * n, vmin(vset(clamp.hi), vmax(vset(clamp.lo), acc[u])));
}

// The last channels, fewer than a vector.
template <typename S, typename T>
DSCONV_INLINE void depthwise_pixel_tail(const S* x, int64_t row_step, int64_t column_step, const T* weight,
                                        int64_t weight_row, int64_t weight_column, int64_t rows, int64_t columns,
                                        const T* bias, Clamp<T> clamp, T* z, int left) {
  typename Vec<T>::type acc = vload(bias, left);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      acc = vfma(vload(weight + i * weight_row + j * weight_column, left),
                 vload(x + i * row_step + j * column_step, left), acc);
    }
  }
  vstore(z, vmin(vset(clamp.hi), vmax(vset(clamp.lo), acc)), left);
}

template <typename S, typename T>
static void depthwise_nhwc(const DepthwiseInput<S>& in, int64_t pixel, int64_t count, Clamp<T> clamp, T* z) {
  constexpr int n = Vec<T>::n;
  const Geometry& g = *in.g;
  const int64_t row_step = g.dilation_h * in.stride.h, column_step = g.dilation_w * in.stride.w;
  const int64_t weight_column = in.plan->mid_columns, weight_row = weight_column * g.kernel_w;
  for (int64_t p = 0; p < count; ++p) {
    const PixelRun at = run_at(pixel + p, 1, g.h_out, g.w_out, false);
    const int64_t ih = at.oh * g.stride_h - g.pad_top, iw = at.ow * g.stride_w - g.pad_left;
    const Range kh = valid_taps(ih, g.dilation_h, g.h_in, g.kernel_h);
    const Range kw = valid_taps(iw, g.dilation_w, g.w_in, g.kernel_w);
    const int64_t rows = kh.end - kh.begin, columns = kw.end - kw.begin;
    const S* x = in.x;
    if (rows > 0 && columns > 0) {
      x += at.n * in.stride.n + (ih + kh.begin * g.dilation_h) * in.stride.h +
           (iw + kw.begin * g.dilation_w) * in.stride.w;
    }
    const T* weight = in.weight + kh.begin * weight_row + kw.begin * weight_column;
    for (int64_t plane = 0; plane < g.multiplier; ++plane) {
      const T* w = weight + plane * g.c_in;
      const T* bias = in.bias + plane * g.c_in;
      T* out = z + p * in.plan->mid_ld + plane * g.c_in;
      int64_t c = 0;
      for (; c + 4 * n <= g.c_in; c += 4 * n) {
        depthwise_pixel<4>(x + c, row_step, column_step, w + c, weight_row, weight_column, rows, columns, bias + c,
                           clamp, out + c);
      }
      for (; c + n <= g.c_in; c += n) {
        depthwise_pixel<1>(x + c, row_step, column_step, w + c, weight_row, weight_column, rows, columns, bias + c,
                           clamp, out + c);
      }
      if (c < g.c_in) {
        depthwise_pixel_tail(x + c, row_step, column_step, w + c, weight_row, weight_column, rows, columns, bias + c,
                             clamp, out + c, static_cast<int>(g.c_in - c));
      }
    }
  }
}

// sum[i] += w * x[i * step] for i < count.
template <typename S, typename T>
DSCONV_INLINE void add_scaled(T w, const S* x, int64_t step, int64_t count, T* sum) {
  constexpr int n = Vec<T>::n;
  int64_t i = 0;
  if (step == 1) {
    for (; i + n <= count; i += n) vstore(sum + i, vfma(vset(w), vload(x + i), vload(sum + i)));
    if (i < count) {
      const int left = static_cast<int>(count - i);
      vstore(sum + i, vfma(vset(w), vload(x + i, left), vload(sum + i, left)), left);
    }
  } else {
    for (; i < count; ++i) sum[i] += w * widen_one(x + i * step);
  }
}

template <typename S, typename T>
static void depthwise_strip(const DepthwiseInput<S>& in, int64_t k, int64_t pixel, int64_t count, Clamp<T> clamp,
                            T* strip) {
  constexpr int n = Vec<T>::n;
  const Geometry& g = *in.g;
  const S* plane = in.x + k % g.c_in * in.stride.c;
  for (int64_t i = 0; i < count; i += n) vstore(strip + i, vset(in.bias[k]));
  for (int64_t p = 0; p < count;) {
    const PixelRun run = run_at(pixel + p, count - p, g.h_out, g.w_out, false);
    const Range kh = valid_taps(run.oh * g.stride_h - g.pad_top, g.dilation_h, g.h_in, g.kernel_h);
    for (int64_t i = kh.begin; i < kh.end; ++i) {
      const S* row = plane + run.n * in.stride.n + (run.oh * g.stride_h - g.pad_top + i * g.dilation_h) * in.stride.h;
      for (int64_t j = 0; j < g.kernel_w; ++j) {
        const int64_t offset = j * g.dilation_w - g.pad_left;
        Range ow = valid_outputs(offset, g.stride_w, g.w_in, g.w_out);
        ow.begin = ow.begin > run.ow ? ow.begin : run.ow;
        ow.end = ow.end < run.ow + run.length ? ow.end : run.ow + run.length;
        if (ow.begin >= ow.end) continue;
        add_scaled(in.weight[(i * g.kernel_w + j) * in.plan->mid_columns + k], row + ow.begin * g.stride_w + offset,
                   g.stride_w, ow.end - ow.begin, strip + p + ow.begin - run.ow);
      }
    }
    p += run.length;
  }
  for (int64_t i = 0; i < count; i += n) {
    vstore(strip + i, vmin(vset(clamp.hi), vmax(vset(clamp.lo), vload(strip + i))));
  }
}

// `strips` holds lanes rows of plan.strip_ld.
template <typename S, typename T>
static void depthwise_tile(const DepthwiseInput<S>& in, int64_t pixel, int64_t count, Clamp<T> clamp, T* z, T* strips) {
  constexpr int n = Vec<T>::n;
  if (in.layout == Layout::nhwc) {
    depthwise_nhwc(in, pixel, count, clamp, z);
    return;
  }
  const int64_t ld = in.plan->mid_ld, strip_ld = in.plan->strip_ld;
  for (int64_t k = 0; k < in.g->c_mid; k += n) {
    const int channels = lanes_left(in.g->c_mid - k, n);
    for (int i = 0; i < channels; ++i) depthwise_strip(in, k + i, pixel, count, clamp, strips + i * strip_ld);
    for (int64_t p = 0; p < count; p += n) {
      transpose_block(strips + p, strip_ld, channels, lanes_left(count - p, n), z + p * ld + k, ld);
    }
  }
}
