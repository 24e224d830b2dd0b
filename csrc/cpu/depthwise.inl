// z of a tile: z[p][k] = clamp(dw_bias[k] + sum over taps dw_weight[tap][k] * x[tap of p][c(k)]).
//
// nhwc: vectors along the channels (channel_row.inl), a row of pixels at a time.
// nchw: x is turned in registers, `lanes` channels of some rows at a time, and goes the same way. So does an x of
//       either layout that goes through a norm and an activation first. Along the depth (tile_order.h) the slices that
//       the next tile reads too stay turned: for all channels, in a ring of kernel_d slices.
//       Kernels whose windows are too large for that: vectors along w (plane.inl). Strips of the tile's pixels are
//       summed for `lanes` channels, then turned into the tile.
#ifndef DSCONV_ISA
#error "depthwise.inl belongs inside an ISA region"
#endif

// What plan.ring elements hold: the slices, input rows [row, row_end) of them. Slice s is in place s % kernel_d.
struct TurnedRing {
  int64_t image, row, row_end;
  Range slices;
};

template <typename S>
struct DepthwiseInput {
  const Geometry* g;
  const CpuPlan* plan;
  const S* x;
  Strides stride;
  Layout layout;
  const typename ComputeOf<S>::type* weight;  // PackedWeights
  const typename ComputeOf<S>::type* bias;
  InputNorm norm;
  const S* end;      // of the memory of x, where vectors past the last channel may be read and written to z; else null
  TurnedRing* ring;  // of the tiles before this one, where plan.ring > 0
  Ahead* ahead = nullptr;  // what plain nhwc asks for meanwhile
};

// All but where x and the weights are.
template <typename S>
DSCONV_INLINE ChannelRow<S> channel_row(const Geometry& g, const CpuPlan& plan) {
  ChannelRow<S> row = {};
  row.in_h = g.h_in;
  row.in_w = g.w_in;
  row.taps_h = g.kernel_h;
  row.taps_w = g.kernel_w;
  row.dilation_h = g.dilation_h;
  row.dilation_w = g.dilation_w;
  row.step_w = g.stride_w;
  row.weight_row = plan.mid_columns * g.kernel_w;
  row.weight_column = plan.mid_columns;
  row.weight_slice = plan.mid_columns * plan.slice_taps;
  row.channels = g.c_in;
  return row;
}

// Of x in nhwc: behind the last channel of its last pixel. Null where z keeps planes of channels one behind another.
template <typename S>
DSCONV_INLINE const S* end_of_channels(const Geometry& g, const S* x, const Strides& s, int64_t channels) {
  if (g.multiplier != 1) return nullptr;
  return last_pixel(g, x, s) + channels;
}

// Points the row to the slices of x that the output slice reads. Returns the first tap along the depth.
template <typename S>
DSCONV_INLINE int64_t read_slices(const DepthwiseInput<S>& in, int64_t slice, ChannelRow<S>& row) {
  const Geometry& g = *in.g;
  return place_slices(row, in.x + slice / g.d_out * in.stride.n, slice % g.d_out * g.stride_d - g.pad_front,
                      g.dilation_d, g.d_in, g.kernel_d, in.stride.d);
}

template <typename S, typename T, typename M>
static void depthwise_nhwc(const DepthwiseInput<S>& in, int64_t pixel, int64_t count, Clamp<T> clamp, M* z) {
  const Geometry& g = *in.g;
  ChannelRow<S> row = channel_row<S>(g, *in.plan);
  row.row_step = in.stride.h;
  row.column_step = in.stride.w;
  row.end = in.end;
  row.padded = in.end != nullptr;
  row.ahead = in.ahead;
  for (int64_t p = 0; p < count;) {
    const PixelRun run = run_at(pixel + p, count - p, g.h_out, g.w_out, false);
    int64_t rows = run.length == g.w_out ? (count - p) / g.w_out : 1;
    if (rows > g.h_out - run.oh) rows = g.h_out - run.oh;
    const T* weight = in.weight + read_slices(in, run.slice, row) * row.weight_slice;
    for (int64_t plane = 0; plane < g.multiplier; ++plane) {
      row.weight = weight + plane * g.c_in;
      row.start = in.bias + plane * g.c_in;
      convolve_rows(row, g.stride_h, run.oh * g.stride_h - g.pad_top, run.ow * g.stride_w - g.pad_left, rows,
                    run.length, clamp, z + p * in.plan->mid_ld + plane * g.c_in, in.plan->mid_ld,
                    g.w_out * in.plan->mid_ld);
    }
    p += rows * run.length;
  }
}

// The part of x that some rows of outputs read, turned into [tap along the depth][row][column][lanes of channels].
struct TurnedPiece {
  int64_t slice, oh, rows, ow, width;                    // outputs: `width` columns of each of `rows` rows
  int64_t in_row, in_row_end, in_column, in_column_end;  // what they read, inside the image
  int64_t tap, slices, in_slice;                         // depth taps inside the image, and the slice of the first one
};

DSCONV_INLINE Range input_range(int64_t first, int64_t count, int64_t stride, int64_t pad, int64_t reach, int64_t in) {
  const int64_t begin = first * stride - pad, end = begin + (count - 1) * stride + reach;
  const Range r = {begin > 0 ? (begin < in ? begin : in) : 0, end < in ? (end > 0 ? end : 0) : in};
  return r;
}

// The piece that begins at `pixel`, of `limit` pixels at most: whole rows as far as they fit, else a part of one.
template <typename T>
DSCONV_INLINE TurnedPiece turned_piece(const Geometry& g, const CpuPlan& plan, int64_t pixel, int64_t limit) {
  const int64_t reach_h = (g.kernel_h - 1) * g.dilation_h + 1, reach_w = (g.kernel_w - 1) * g.dilation_w + 1;
  const int64_t most = turned_columns_of(g, plan);
  const PixelRun run = run_at(pixel, limit < most ? limit : most, g.h_out, g.w_out, false);
  TurnedPiece piece = {};
  piece.slice = run.slice, piece.oh = run.oh, piece.rows = 1, piece.ow = run.ow, piece.width = run.length;
  if (run.length == g.w_out) {
    const int64_t in_rows = plan.turned / (Vec<T>::n * g.w_in * g.kernel_d);
    const int64_t fit = in_rows < reach_h ? 1 : (in_rows - reach_h) / g.stride_h + 1;
    const int64_t left = limit / g.w_out < g.h_out - run.oh ? limit / g.w_out : g.h_out - run.oh;
    piece.rows = fit < left ? fit : left;
  }
  const Range rows = input_range(piece.oh, piece.rows, g.stride_h, g.pad_top, reach_h, g.h_in);
  const Range columns = input_range(piece.ow, piece.width, g.stride_w, g.pad_left, reach_w, g.w_in);
  piece.in_row = rows.begin, piece.in_row_end = rows.end;
  piece.in_column = columns.begin, piece.in_column_end = columns.end;
  const int64_t depth = run.slice % g.d_out * g.stride_d - g.pad_front;
  const Range taps = valid_taps(depth, g.dilation_d, g.d_in, g.kernel_d);
  piece.tap = taps.begin, piece.slices = taps.end - taps.begin;
  piece.in_slice = depth + taps.begin * g.dilation_d;
  return piece;
}

// `slices` of its slices, from `first` on.
template <typename S, typename T>
static void turn_channels(const DepthwiseInput<S>& in, const TurnedPiece& piece, int64_t first, int64_t slices,
                          int64_t c, int channels, T* to) {
  constexpr int n = Vec<T>::n;
  const Geometry& g = *in.g;
  const S* from = in.x + piece.slice / g.d_out * in.stride.n + c * in.stride.c + piece.in_column * in.stride.w;
  int64_t columns = piece.in_column_end - piece.in_column, rows = piece.in_row_end - piece.in_row;
  // Whole rows of a plane, one behind another.
  if (in.layout == Layout::nchw && columns == in.stride.h) columns *= rows, rows = 1;
  T* const begin = to;
  for (int64_t slice = 0; slice < slices; ++slice) {
    const S* x = from + (first + slice * g.dilation_d) * in.stride.d + piece.in_row * in.stride.h;
    if (in.layout == Layout::nhwc) {
      norm_lanes(in.norm, c, channels, x, in.stride.h, in.stride.w, rows, columns, to);
      to += rows * columns * n;
      continue;
    }
    for (int64_t row = 0; row < rows; ++row, x += in.stride.h) {
      for (int64_t i = 0; i < columns; i += n) {
        transpose_block(x + i, in.stride.c, channels, lanes_left(columns - i, n), to + i * n, n);
      }
      to += columns * n;
    }
  }
  if (in.layout == Layout::nchw && in.norm.rows != nullptr)
    norm_lanes(in.norm, c, n, begin, 0, n, 1, (to - begin) / n, begin);
}

// The first slice of the piece that the ring does not hold; then it will hold those of the piece.
DSCONV_INLINE int64_t first_missing_slice(const Geometry& g, const TurnedPiece& piece, TurnedRing& ring) {
  const int64_t image = piece.slice / g.d_out, first = piece.in_slice, last = first + piece.slices;
  if (piece.slices == 0) return first;
  const bool same = ring.image == image && ring.row == piece.in_row && ring.row_end == piece.in_row_end;
  const int64_t missing = same && first >= ring.slices.begin && first < ring.slices.end ? ring.slices.end : first;
  ring = {image, piece.in_row, piece.in_row_end, {first, last}};
  return missing;
}

template <typename S, typename T, typename M>
static void depthwise_turned(const DepthwiseInput<S>& in, int64_t pixel, int64_t count, Clamp<T> clamp, M* z,
                             T* turned) {
  constexpr int n = Vec<T>::n;
  const Geometry& g = *in.g;
  ChannelRow<T> row = channel_row<T>(g, *in.plan);
  for (int64_t p = 0; p < count;) {
    const TurnedPiece piece = turned_piece<T>(g, *in.plan, pixel + p, count - p);
    const int64_t columns = piece.in_column_end - piece.in_column;
    row.column_step = n;
    row.row_step = columns * n;
    row.slices = piece.slices;
    row.slice_step = (piece.in_row_end - piece.in_row) * row.row_step;
    const bool keeps = in.plan->ring > 0;
    const int64_t place = keeps ? piece.in_slice % g.kernel_d : 0, of_ring = keeps ? g.kernel_d * row.slice_step : 0;
    const int64_t missing = keeps ? first_missing_slice(g, piece, *in.ring) : piece.in_slice;
    row.wrap = keeps ? g.kernel_d - place : 0;
    row.wrap_back = of_ring;
    for (int64_t c = 0; c < g.c_in; c += n) {
      const int channels = lanes_left(g.c_in - c, n);
      T* const slices = turned + c / n * of_ring;
      for (int64_t slice = missing; keeps && slice < piece.in_slice + piece.slices; ++slice) {
        turn_channels(in, piece, slice, 1, c, channels, slices + slice % g.kernel_d * row.slice_step);
      }
      if (!keeps) turn_channels(in, piece, piece.in_slice, piece.slices, c, channels, slices);
      row.x = slices + place * row.slice_step - piece.in_row * row.row_step - piece.in_column * n;
      // Lanes past the last channel are zeros, and where nothing stands behind them in z they need no mask.
      row.channels = g.multiplier == 1 ? n : channels;
      for (int64_t k = c; k < g.c_mid; k += g.c_in) {
        row.weight = in.weight + k + piece.tap * row.weight_slice;
        row.start = in.bias + k;
        convolve_rows(row, g.stride_h, piece.oh * g.stride_h - g.pad_top, piece.ow * g.stride_w - g.pad_left,
                      piece.rows, piece.width, clamp, z + p * in.plan->mid_ld + k, in.plan->mid_ld,
                      piece.width * in.plan->mid_ld);
      }
    }
    p += piece.rows * piece.width;
  }
}

// The strips of one piece of a slice for the channels k .. k + lanes, each plan.strip_ld long.
template <typename S, typename T>
static void depthwise_strips(const DepthwiseInput<S>& in, const PlaneShape& shape, const PlaneTaps& taps, int64_t slice,
                             int64_t begin, int64_t end, int64_t k, int channels, Clamp<T> clamp, Window<T>& w,
                             T* strips) {
  const Geometry& g = *in.g;
  const Clamp<T> open = clamp_of<T>(Activation::identity);
  const int64_t depth = slice % g.d_out * g.stride_d - g.pad_front, mid_columns = in.plan->mid_columns;
  const Range inside = valid_taps(depth, g.dilation_d, g.d_in, g.kernel_d);
  // No slice inside: one plane of no taps, for the bias.
  const int64_t planes = inside.begin < inside.end ? inside.end - inside.begin : 1;
  for (int64_t d = 0; d < planes; ++d) {
    const int64_t tap = inside.begin + d, count = inside.begin < inside.end ? taps.count : 0;
    const S* x = in.x + slice / g.d_out * in.stride.n + (depth + tap * g.dilation_d) * in.stride.d;
    const T* weight = in.weight + tap * taps.count * mid_columns + k;
    for (int64_t first = 0, last = 0; first < taps.count; first = last) {
      last = chunk_end<Vec<T>::n>(*in.plan, shape, taps, first, end - begin < g.w_out ? end - begin : g.w_out);
      prepare_window(shape, taps, first, last, begin, end, w);
      const bool finished = last == taps.count && d + 1 == planes;
      for (int i = 0; i < channels; ++i) {
        for (int64_t t = first; t < last && count > 0; ++t) w.weight[t - first] = weight[t * mid_columns + i];
        if (count > 0) fill_window(shape, x + (k + i) % g.c_in * in.stride.c, in.stride.h, w);
        convolve_window(w, count > 0 ? last - first : 0, in.bias[k + i], first > 0 || d > 0, finished ? clamp : open,
                        strips + i * in.plan->strip_ld);
      }
    }
  }
}

template <typename S, typename T, typename M>
static void depthwise_nchw(const DepthwiseInput<S>& in, int64_t pixel, int64_t count, Clamp<T> clamp, M* z, T* strips,
                           void* memory) {
  constexpr int n = Vec<T>::n;
  const Geometry& g = *in.g;
  const CpuPlan& plan = *in.plan;
  const PlaneShape shape = {g.h_in, g.w_in, g.w_out, g.stride_h, g.stride_w};
  PlaneTaps taps;
  Window<T> w = {};
  plane_memory(plan, memory, taps, w);
  forward_taps(g, taps);
  for (int64_t p = 0; p < count;) {
    const int64_t slice = (pixel + p) / plan.slice_pixels, begin = (pixel + p) % plan.slice_pixels;
    const int64_t left = count - p < plan.slice_pixels - begin ? count - p : plan.slice_pixels - begin;
    const int64_t end = piece_end<n>(plan, shape, taps, begin, begin + left);
    for (int64_t k = 0; k < g.c_mid; k += n) {
      const int channels = lanes_left(g.c_mid - k, n);
      depthwise_strips(in, shape, taps, slice, begin, end, k, channels, clamp, w, strips);
      for (int64_t i = 0; i < end - begin; i += n) {
        transpose_block(strips + i, plan.strip_ld, channels, lanes_left(end - begin - i, n),
                        z + (p + i) * plan.mid_ld + k, plan.mid_ld);
      }
    }
    p += end - begin;
  }
}

// `memory`: depthwise_scratch(plan) bytes, which all but plain nhwc uses.
template <typename S, typename T, typename M>
static void depthwise_tile(const DepthwiseInput<S>& in, int64_t pixel, int64_t count, Clamp<T> clamp, M* z, T* memory) {
  if (in.layout == Layout::nhwc && in.norm.rows == nullptr) {
    depthwise_nhwc(in, pixel, count, clamp, z);
  } else if (turned_columns_of(*in.g, *in.plan) > 0) {
    depthwise_turned(in, pixel, count, clamp, z, memory);
  } else {
    depthwise_nchw(in, pixel, count, clamp, z, memory, memory + in.plan->micro.lanes * in.plan->strip_ld);
  }
}
