// What backward reads x through, and writes grad_x through: images whose channels are neighbours. An nchw x is turned
// into such a copy once, in the compute type, since backward reads it twice: for z, and for the depthwise weight
// gradient. So is an x of either layout that goes through a norm and an activation first. Rows of grad_x are turned
// back as they are done.
#ifndef DSCONV_ISA
#error "turned.inl belongs inside an ISA region"
#endif

template <typename X>
struct ChannelsLast {
  X* data;
  int64_t image, slice, row, column;  // strides
  X* end;                             // of what is there to be read, lanes past the last channel included

  Strides strides() const { return {image, 1, row, column, slice}; }
};

template <typename S>
DSCONV_INLINE ChannelsLast<const S> x_as_given(const BackwardContext& ctx) {
  const Strides& stride = ctx.p.x_strides;
  const Geometry& g = ctx.p.geom;
  const S* x = static_cast<const S*>(ctx.p.x);
  return {x, stride.n, stride.d, stride.h, stride.w, end_of_channels(g, x, stride, g.c_in)};
}

template <typename T>
DSCONV_INLINE ChannelsLast<T> dense_lanes(const Geometry& g, int64_t images, T* data, int64_t column) {
  const int64_t slice = g.h_in * g.w_in * column, image = g.d_in * slice;
  return {data, image, slice, g.w_in * column, column, g.multiplier == 1 ? data + images * image : nullptr};
}

// From channel c on.
template <typename X>
DSCONV_INLINE ChannelsLast<X> channels_from(ChannelsLast<X> x, int64_t c) {
  x.data += c;
  return x;
}

// `count` pixels of x from `pixel` on, the channels c .. c + channels, into dst[pixel][ld]; what comes out of a norm is
// written as `stores` says.
template <typename S, typename T>
static void turn_x(const BackwardContext& ctx, int64_t c, int64_t channels, int64_t pixel, int64_t count, T* dst,
                   int64_t ld, Stores stores = Stores::plain) {
  const Geometry& g = ctx.p.geom;
  const Strides& stride = ctx.p.x_strides;
  const S* x = static_cast<const S*>(ctx.p.x) + c * stride.c;
  if (ctx.in_norm.rows == nullptr) {
    return load_tile(x, stride, ctx.p.x_layout, g.d_in, g.h_in, g.w_in, channels, pixel, count, dst, ld);
  }
  NormTile<T> t = {};
  t.channels = channels, t.out_ld = ld, t.stores = stores;
  t.of = norm_vectors<T>(norm_from<T>(ctx.in_norm, c).rows, ctx.in_norm.ld);
  const ImageTensor from = {x, stride, ctx.p.x_layout};
  int64_t done = 0;
  if constexpr (sizeof(S) == sizeof(T)) {
    if (is_matrix(from, g.n, g.d_in, g.h_in, g.w_in)) {
      // Whole vectors reach into the channels of the next pixel, which the last ones of the tensor have not.
      const T *first = x + pixel * stride.w, *end = x + (g.n * g.d_in * g.h_in * g.w_in - 1) * stride.w + channels;
      const int64_t width = round_up(channels, Vec<T>::n);
      for (done = count; done > 0 && first + (done - 1) * stride.w + width > end;) --done;
      t.rows = done, t.v = first, t.v_ld = stride.w, t.v_ahead = count * stride.w, t.out = dst;
      for_activation<NormForward>(ctx.in_norm.act, t);
    }
  }
  if (done == count) return;
  t.rows = count - done, t.out = dst + done * ld;
  load_tile(x, stride, ctx.p.x_layout, g.d_in, g.h_in, g.w_in, channels, pixel + done, t.rows, t.out, ld);
  t.v = t.out, t.v_ld = ld, t.v_ahead = 0;
  for_activation<NormForward>(ctx.in_norm.act, t);
}

// The task's part of the copy as a whole.
template <typename S, typename T>
static void backward_turn_x(const BackwardContext& ctx, int64_t task) {
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  const int64_t pixels = g.n * g.d_in * g.h_in * g.w_in, begin = task * plan.turned_pixels;
  const int64_t count = pixels - begin < plan.turned_pixels ? pixels - begin : plan.turned_pixels;
  T* const dst = static_cast<T*>(ctx.x_turned) + begin * plan.x_ld;
  const uint64_t misaligned = reinterpret_cast<uint64_t>(dst) | static_cast<uint64_t>(plan.x_ld) * sizeof(T);
  const bool stream =
      pixels * plan.x_ld * static_cast<int64_t>(sizeof(T)) > kSharedCacheBytes && misaligned % kCacheLine == 0;
  turn_x<S>(ctx, 0, g.c_in, begin, count, dst, plan.x_ld, stream ? Stores::stream : Stores::plain);
  if (stream) vstream_fence();
}

template <typename T>
DSCONV_INLINE ChannelsLast<const T> x_turned(const BackwardContext& ctx) {
  return dense_lanes(ctx.p.geom, ctx.p.geom.n, static_cast<const T*>(ctx.x_turned), ctx.plan.x_ld);
}

// The channels c .. c + channels of `count` pixels of grad_x from src[pixel][ld].
template <typename S, typename T>
static void turn_grad_x_back(const BackwardContext& ctx, const T* src, int64_t ld, int64_t c, int64_t channels,
                             int64_t pixel, int64_t count) {
  const Geometry& g = ctx.p.geom;
  store_tile(src, ld, c, channels, pixel, count, static_cast<S*>(ctx.p.grad_x), ctx.p.grad_x_layout, g.c_in,
             g.d_in * g.h_in * g.w_in);
}
