// What backward reads x through, and writes grad_x through: images whose channels are neighbours. An nchw x is turned
// into such a copy, in the compute type, since backward reads it twice: for z, and for the depthwise weight gradient.
// So is an x of either layout that goes through a norm and an activation first. In 2-D a group of tiles turns the rows
// of each tile as it comes to it, and keeps those that the next one reads too:
//
//   rows of x   . . . [ k e p t | n e w ] . . .      in memory of plan.x_rows rows, which stays in L2
//
// Else, and where x is not much larger than what the groups would keep, all of it is turned before. Rows of grad_x are
// turned back as they are done.
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
    return load_tile(x, stride, ctx.p.x_layout, g.d_in, g.h_in, g.w_in, channels, pixel, count, dst, ld,
                     ctx.plan.beyond_cache);
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

// x for a group of tiles that come in the order of their pixels: there as a whole,
template <typename X>
struct WholeX {
  ChannelsLast<const X> x;

  const ChannelsLast<const X>& of_tile(const BackwardContext&, const Range&) { return x; }
  // What of it the tile after this one will read.
  void ask_for(const BackwardContext& ctx, Ahead& ahead, const Range& next) const {
    add_rows(ahead, x.data, x.strides(), Layout::nhwc, ctx.p.geom, next, walks_depth(ctx.plan.order));
  }
};

// The rows that pixels of z read, numbered through the images.
DSCONV_INLINE Range rows_read(const Geometry& g, const Range& pixels) {
  const int64_t first = pixels.begin / g.w_out, last = (pixels.end - 1) / g.w_out;
  const int64_t top = first % g.h_out * g.stride_h - g.pad_top;
  const int64_t bottom = last % g.h_out * g.stride_h - g.pad_top + (g.kernel_h - 1) * g.dilation_h + 1;
  const Range r = {first / g.h_out * g.h_in + clamp64(top, 0, g.h_in),
                   last / g.h_out * g.h_in + clamp64(bottom, 0, g.h_in)};
  return r;
}

// or turned from S as its tiles come.
template <typename S, typename T>
struct RowsOfX {
  T* memory;
  Range held;

  ChannelsLast<const T> of_tile(const BackwardContext& ctx, const Range& pixels) {
    const Geometry& g = ctx.p.geom;
    const int64_t column = ctx.plan.x_ld, row = g.w_in * column;
    const Range read = rows_read(g, pixels);
    const int64_t kept = held.end > read.begin ? held.end - read.begin : 0;
    // Rows that stay move to the front, past what they leave.
    if (kept > 0 && read.begin > held.begin) {
      const T* from = memory + (read.begin - held.begin) * row;
      for (int64_t i = 0; i < kept * row; i += Vec<T>::n) vstore(memory + i, vload(from + i));
    }
    const int64_t begin = read.begin + kept;
    if (read.end > begin) {
      turn_x<S>(ctx, 0, g.c_in, begin * g.w_in, (read.end - begin) * g.w_in, memory + kept * row, column);
    }
    held = {read.begin, read.end > begin ? read.end : begin};
    ChannelsLast<const T> x = dense_lanes(g, 1, static_cast<const T*>(memory), column);
    x.data -= read.begin * row;
    if (x.end != nullptr) x.end = memory + ctx.plan.x_rows * row;
    return x;
  }
  void ask_for(const BackwardContext& ctx, Ahead& ahead, const Range& next) const {
    const BackwardParams& p = ctx.p;
    add_rows(ahead, static_cast<const S*>(p.x), p.x_strides, p.x_layout, p.geom, next, false);
  }
};

template <typename S, typename T>
DSCONV_INLINE RowsOfX<S, T> rows_of_x(const BackwardContext& ctx, int64_t group) {
  const int64_t size = ctx.plan.x_rows * ctx.p.geom.w_in * ctx.plan.x_ld;
  return {static_cast<T*>(ctx.x_rows) + group * size, {0, 0}};
}

// The channels c .. c + channels of `count` pixels of grad_x from src[pixel][ld].
template <typename S, typename T>
static void turn_grad_x_back(const BackwardContext& ctx, const T* src, int64_t ld, int64_t c, int64_t channels,
                             int64_t pixel, int64_t count) {
  const Geometry& g = ctx.p.geom;
  store_tile(src, ld, c, channels, pixel, count, static_cast<S*>(ctx.p.grad_x), ctx.p.grad_x_layout, g.c_in,
             g.d_in * g.h_in * g.w_in, ctx.plan.beyond_cache);
}
