// z of a tile: z[p][k] = clamp(dw_bias[k] + sum over taps dw_weight[tap][k] * x[tap of p][c(k)]).
//
// nhwc: vectors along the channels (channel_row.inl), a row of pixels at a time.
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

template <typename S, typename T>
static void depthwise_nhwc(const DepthwiseInput<S>& in, int64_t pixel, int64_t count, Clamp<T> clamp, T* z) {
  const Geometry& g = *in.g;
  ChannelRow<S> row;
  row.row_step = in.stride.h;
  row.column_step = in.stride.w;
  row.in_h = g.h_in;
  row.in_w = g.w_in;
  row.taps_h = g.kernel_h;
  row.taps_w = g.kernel_w;
  row.dilation_h = g.dilation_h;
  row.dilation_w = g.dilation_w;
  row.step_w = g.stride_w;
  row.weight_row = in.plan->mid_columns * g.kernel_w;
  row.weight_column = in.plan->mid_columns;
  row.channels = g.c_in;
  row.start_step = 0;
  for (int64_t p = 0; p < count;) {
    const PixelRun run = run_at(pixel + p, count - p, g.h_out, g.w_out, false);
    row.x = in.x + run.n * in.stride.n;
    for (int64_t plane = 0; plane < g.multiplier; ++plane) {
      row.weight = in.weight + plane * g.c_in;
      row.start = in.bias + plane * g.c_in;
      convolve_row(row, run.oh * g.stride_h - g.pad_top, run.ow * g.stride_w - g.pad_left, run.length, clamp,
                   z + p * in.plan->mid_ld + plane * g.c_in, in.plan->mid_ld);
    }
    p += run.length;
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
