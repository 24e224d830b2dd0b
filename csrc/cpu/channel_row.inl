// Sums over taps for a row of pixels of an nhwc tensor, vectors along the channels.
//
//   out(p, c) = clamp(start(p, c) + sum over taps (i, j) of weight[i][j][c] * in(top + i * dilation_h,
//                                                                             left + p * step_w + j * dilation_w, c))
//
// Pixels whose taps all lie inside the row go kPixels at a time: a weight is loaded once for them, and for 3 and 5
// taps without dilation a value of x is loaded once for all pixels of the group that read it.
#ifndef DSCONV_ISA
#error "channel_row.inl belongs inside an ISA region"
#endif

template <typename S>
struct ChannelRow {
  typedef typename ComputeOf<S>::type T;
  const S* x;                     // of one image
  int64_t row_step, column_step;  // strides of x
  int64_t in_h, in_w;
  int64_t taps_h, taps_w, dilation_h, dilation_w, step_w;
  const T* weight;                    // the first tap's
  int64_t weight_row, weight_column;  // may be negative: a kernel walked backwards
  const T* start;                     // bias, with start_step 0, or what to add to
  int64_t start_step;                 // per pixel
  int64_t channels;
};

// The taps of a pixel that lie inside the image.
struct TapBlock {
  int64_t rows, columns;
  int64_t x_row, x_column;  // steps of x from tap to tap
  int64_t weight_row, weight_column;
};

constexpr int kPixels = 4;

template <bool Tail, typename S>
DSCONV_INLINE auto load_lanes(const S* p, int left) {
  if constexpr (Tail) {
    return vload(p, left);
  } else {
    return vload(p);
  }
}

// One pixel, U vectors of channels, or the last `left` channels.
template <int U, bool Tail, typename S, typename T>
DSCONV_INLINE void convolve_pixel(const TapBlock& taps, const S* x, const T* weight, const T* start, int left,
                                  Clamp<T> clamp, T* out) {
  constexpr int n = Vec<T>::n;
  typename Vec<T>::type acc[U];
  DSCONV_UNROLL
  for (int u = 0; u < U; ++u) acc[u] = load_lanes<Tail>(start + u * n, left);
  for (int64_t i = 0; i < taps.rows; ++i) {
    const S* xp = x + i * taps.x_row;
    const T* wp = weight + i * taps.weight_row;
    for (int64_t j = 0; j < taps.columns; ++j, xp += taps.x_column, wp += taps.weight_column) {
      DSCONV_UNROLL
      for (int u = 0; u < U; ++u) {
        acc[u] = vfma(load_lanes<Tail>(wp + u * n, left), load_lanes<Tail>(xp + u * n, left), acc[u]);
      }
    }
  }
  DSCONV_UNROLL
  for (int u = 0; u < U; ++u) {
    const typename Vec<T>::type v = vmin(vset(clamp.hi), vmax(vset(clamp.lo), acc[u]));
    if constexpr (Tail) {
      vstore(out, v, left);
    } else {
      vstore(out + u * n, v);
    }
  }
}

template <typename S, typename T>
static void convolve_one(const TapBlock& taps, const S* x, const T* weight, const T* start, int64_t channels,
                         Clamp<T> clamp, T* out) {
  constexpr int n = Vec<T>::n;
  int64_t c = 0;
  for (; c + 4 * n <= channels; c += 4 * n) {
    convolve_pixel<4, false>(taps, x + c, weight + c, start + c, n, clamp, out + c);
  }
  for (; c + n <= channels; c += n) convolve_pixel<1, false>(taps, x + c, weight + c, start + c, n, clamp, out + c);
  if (c < channels) {
    convolve_pixel<1, true>(taps, x + c, weight + c, start + c, static_cast<int>(channels - c), clamp, out + c);
  }
}

// kPixels pixels `step` columns of taps apart, one vector of channels. Columns > 0: that many taps in a row, with no
// dilation, known when compiled, as is Step; 0: taps.columns of them, at any distance.
template <int Columns, int Step, bool Tail, typename S, typename T>
DSCONV_INLINE void convolve_group(const TapBlock& taps, const S* x, int64_t pixel_step, const T* weight, const T* start,
                                  int64_t start_step, int left, Clamp<T> clamp, T* out, int64_t ld) {
  typedef typename Vec<T>::type V;
  V acc[kPixels];
  DSCONV_UNROLL
  for (int p = 0; p < kPixels; ++p) acc[p] = load_lanes<Tail>(start + p * start_step, left);
  for (int64_t i = 0; i < taps.rows; ++i, x += taps.x_row, weight += taps.weight_row) {
    if constexpr (Columns > 0) {
      V w[Columns];
      DSCONV_UNROLL
      for (int j = 0; j < Columns; ++j) w[j] = load_lanes<Tail>(weight + j * taps.weight_column, left);
      DSCONV_UNROLL
      for (int column = 0; column < (kPixels - 1) * Step + Columns; ++column) {
        const V v = load_lanes<Tail>(x + column * taps.x_column, left);
        DSCONV_UNROLL
        for (int p = 0; p < kPixels; ++p) {
          const int j = column - p * Step;
          if (j >= 0 && j < Columns) acc[p] = vfma(w[j], v, acc[p]);
        }
      }
    } else {
      const S* xp = x;
      const T* wp = weight;
      for (int64_t j = 0; j < taps.columns; ++j, xp += taps.x_column, wp += taps.weight_column) {
        const V w = load_lanes<Tail>(wp, left);
        DSCONV_UNROLL
        for (int p = 0; p < kPixels; ++p) acc[p] = vfma(w, load_lanes<Tail>(xp + p * pixel_step, left), acc[p]);
      }
    }
  }
  DSCONV_UNROLL
  for (int p = 0; p < kPixels; ++p) {
    const V v = vmin(vset(clamp.hi), vmax(vset(clamp.lo), acc[p]));
    if constexpr (Tail) {
      vstore(out + p * ld, v, left);
    } else {
      vstore(out + p * ld, v);
    }
  }
}

template <int Columns, int Step, typename S, typename T>
static void convolve_groups(const ChannelRow<S>& row, const TapBlock& taps, const S* x, const T* start, int64_t groups,
                            const T* weight, Clamp<T> clamp, T* out, int64_t ld) {
  constexpr int n = Vec<T>::n;
  const int64_t pixel_step = row.step_w * row.column_step;
  for (int64_t i = 0; i < groups; ++i) {
    int64_t c = 0;
    for (; c + n <= row.channels; c += n) {
      convolve_group<Columns, Step, false>(taps, x + c, pixel_step, weight + c, start + c, row.start_step, n, clamp,
                                           out + c, ld);
    }
    if (c < row.channels) {
      convolve_group<Columns, Step, true>(taps, x + c, pixel_step, weight + c, start + c, row.start_step,
                                          static_cast<int>(row.channels - c), clamp, out + c, ld);
    }
    x += kPixels * pixel_step;
    start += kPixels * row.start_step;
    out += kPixels * ld;
  }
}

// `count` pixels; top and left are the input position of the first one's first tap, inside the image or not.
template <typename S, typename T>
static void convolve_row(const ChannelRow<S>& row, int64_t top, int64_t left, int64_t count, Clamp<T> clamp, T* out,
                         int64_t ld) {
  const Range kh = valid_taps(top, row.dilation_h, row.in_h, row.taps_h);
  const int64_t last_tap = (row.taps_w - 1) * row.dilation_w;
  const Range first = valid_outputs(left, row.step_w, row.in_w, count);
  const Range last = valid_outputs(left + last_tap, row.step_w, row.in_w, count);
  const int64_t inner_begin = first.begin < last.end ? first.begin : last.end;  // all taps inside: first's begin on
  const int64_t inner_end = first.end < last.end ? first.end : last.end;
  TapBlock taps = {
      kh.end - kh.begin, 0, row.dilation_h * row.row_step, row.dilation_w * row.column_step, row.weight_row,
      row.weight_column};
  const S* x_row = taps.rows > 0 ? row.x + (top + kh.begin * row.dilation_h) * row.row_step : row.x;
  const T* weight_row = row.weight + kh.begin * row.weight_row;
  for (int64_t p = 0; p < count;) {
    const int64_t column = left + p * row.step_w;
    const T* start = row.start + p * row.start_step;
    T* to = out + p * ld;
    const int64_t groups = p >= inner_begin && p < inner_end && taps.rows > 0 ? (inner_end - p) / kPixels : 0;
    if (groups > 0) {
      const S* x = x_row + column * row.column_step;
      taps.columns = row.taps_w;
      const bool dense = row.dilation_w == 1;
      if (dense && row.taps_w == 3 && row.step_w == 1) {
        convolve_groups<3, 1>(row, taps, x, start, groups, weight_row, clamp, to, ld);
      } else if (dense && row.taps_w == 3 && row.step_w == 2) {
        convolve_groups<3, 2>(row, taps, x, start, groups, weight_row, clamp, to, ld);
      } else if (dense && row.taps_w == 5 && row.step_w == 1) {
        convolve_groups<5, 1>(row, taps, x, start, groups, weight_row, clamp, to, ld);
      } else if (dense && row.taps_w == 5 && row.step_w == 2) {
        convolve_groups<5, 2>(row, taps, x, start, groups, weight_row, clamp, to, ld);
      } else {
        convolve_groups<0, 0>(row, taps, x, start, groups, weight_row, clamp, to, ld);
      }
      p += groups * kPixels;
      continue;
    }
    const Range kw = valid_taps(column, row.dilation_w, row.in_w, row.taps_w);
    TapBlock here = taps;
    here.columns = kw.end - kw.begin;
    const bool none = here.columns == 0 || here.rows == 0;
    if (none) here.rows = 0;
    convolve_one(here, none ? row.x : x_row + (column + kw.begin * row.dilation_w) * row.column_step,
                 weight_row + kw.begin * row.weight_column, start, row.channels, clamp, to);
    ++p;
  }
}
