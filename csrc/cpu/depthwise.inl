// z of a tile: z[p][k] = clamp(dw_bias[k] + sum over taps dw_weight[tap][k] * x[tap of p][c(k)]).
//
// nhwc: vectors along the channels, the taps of a pixel limited to those inside the image.
// nchw: vectors along w (plane.inl). Strips of the tile's pixels are summed for `lanes` channels, then turned into it.
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

// The strips of one piece of an image for the channels k .. k + lanes, each plan.strip_ld long.
template <typename S, typename T>
static void depthwise_strips(const DepthwiseInput<S>& in, const PlaneShape& shape, const PlaneTaps& taps, int64_t image,
                             int64_t begin, int64_t end, int64_t k, int channels, Clamp<T> clamp, Window<T>& w,
                             T* strips) {
  const Geometry& g = *in.g;
  const Clamp<T> open = clamp_of<T>(Activation::identity);
  for (int64_t first = 0, last = 0; first < taps.count; first = last) {
    last = chunk_end<Vec<T>::n>(*in.plan, shape, taps, first, end - begin < g.w_out ? end - begin : g.w_out);
    prepare_window(shape, taps, first, last, begin, end, w);
    for (int i = 0; i < channels; ++i) {
      const S* plane = in.x + image * in.stride.n + (k + i) % g.c_in * in.stride.c;
      for (int64_t t = first; t < last; ++t) w.weight[t - first] = in.weight[t * in.plan->mid_columns + k + i];
      fill_window(shape, plane, in.stride.h, w);
      convolve_window(w, last - first, in.bias[k + i], first > 0, last == taps.count ? clamp : open,
                      strips + i * in.plan->strip_ld);
    }
  }
}

template <typename S, typename T>
static void depthwise_nchw(const DepthwiseInput<S>& in, int64_t pixel, int64_t count, Clamp<T> clamp, T* z, T* strips,
                           void* memory) {
  constexpr int n = Vec<T>::n;
  const Geometry& g = *in.g;
  const CpuPlan& plan = *in.plan;
  const PlaneShape shape = {g.h_in, g.w_in, g.w_out, g.stride_h, g.stride_w};
  PlaneTaps taps;
  Window<T> w;
  plane_memory(plan, memory, taps, w);
  forward_taps(g, taps);
  for (int64_t p = 0; p < count;) {
    const int64_t image = (pixel + p) / plan.image_pixels, begin = (pixel + p) % plan.image_pixels;
    const int64_t left = count - p < plan.image_pixels - begin ? count - p : plan.image_pixels - begin;
    const int64_t end = piece_end<n>(plan, shape, taps, begin, begin + left);
    for (int64_t k = 0; k < g.c_mid; k += n) {
      const int channels = lanes_left(g.c_mid - k, n);
      depthwise_strips(in, shape, taps, image, begin, end, k, channels, clamp, w, strips);
      for (int64_t i = 0; i < end - begin; i += n) {
        transpose_block(strips + i, plan.strip_ld, channels, lanes_left(end - begin - i, n),
                        z + (p + i) * plan.mid_ld + k, plan.mid_ld);
      }
    }
    p += end - begin;
  }
}

// `strips` holds lanes rows of plan.strip_ld, `memory` plane_bytes(plan); nchw uses them.
template <typename S, typename T>
static void depthwise_tile(const DepthwiseInput<S>& in, int64_t pixel, int64_t count, Clamp<T> clamp, T* z, T* strips,
                           void* memory) {
  if (in.layout == Layout::nhwc) {
    depthwise_nhwc(in, pixel, count, clamp, z);
  } else {
    depthwise_nchw(in, pixel, count, clamp, z, strips, memory);
  }
}
