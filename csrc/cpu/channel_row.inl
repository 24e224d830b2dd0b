// Sums over taps for rows of pixels of an nhwc tensor, vectors along the channels.
//
//   out(p, c) = clamp(start(p, c) + sum over taps (i, j) of weight[i][j][c] * in(top + i * dilation_h,
//                                                                             left + p * step_w + j * dilation_w, c))
//
// One vector of channels at a time; its sums of P <= 7 pixels of a row stay in registers through all taps:
//
//   in   . x x x x x x x x x .     a row of taps goes 7, 5 or 3 at a time: their weights are loaded once for the P
//          \ | /                   pixels, and a value of x once for all taps and pixels that read it
//   out      o o o o o o o         (P - 1) * step + J loads of x and J of weights for P * J multiply-adds
//
// In 3-D the taps are some such planes of taps: an outer loop over the slices of x that they read.
//
// With dilation, or strides above 2, tap by tap: P + 1 loads for P multiply-adds. Columns outside the image are loads
// of a vector of zeros, rows outside are left out of the loop.
//
// The channels left of a last vector are computed as a whole one, whose other lanes are dropped: they hold the first
// channels of the next pixel. Only where that would be read beyond the end of x, masks read what there is.
#ifndef DSCONV_ISA
#error "channel_row.inl belongs inside an ISA region"
#endif

// How outputs are written. ahead: the lines of the next pixels are asked for before these are computed, since no
// prefetcher follows stores that go from pixel to pixel. stream: past the caches, whole lines of a vector.
enum class Stores { plain, ahead, stream };

constexpr int kPairPixels = 7;  // of each of two rows at a time

// AVX2, whose rows do not go by pairs: single ones ask.
constexpr bool kAsksForNext = DSCONV_ISA == DSCONV_ISA_AVX2;

template <typename S>
struct ChannelRow {
  typedef typename ComputeOf<S>::type T;
  const S* x;                     // of the first slice that is read
  int64_t row_step, column_step;  // strides of x
  int64_t in_h, in_w;
  int64_t taps_h, taps_w, dilation_h, dilation_w, step_w;
  const T* weight;                    // of the first tap on that slice
  int64_t weight_row, weight_column;  // may be negative: a kernel walked backwards
  int64_t slices;                     // that are read: planes of taps inside the image
  int64_t slice_step, weight_slice;   // from one to the next
  int64_t wrap = 0, wrap_back = 0;    // after slice number `wrap` x goes back by that much: slices of a ring
  const T* start;                     // bias, with start_step 0, or what to add to
  int64_t start_step;                 // per pixel
  bool start_stays = false;           // the same for all channels, a vector
  int64_t channels;
  int64_t to_panel = 0;  // x of channels in panels of kMicroVecs vectors: from behind one to where the next begins
  Stores stores = Stores::plain;  // of pairs of rows, where these are compiled to ask (Far); of others with AVX2, ahead
  const S* end = nullptr;         // of the memory of x; null: no lane past the last channel may be read
  bool padded = false;            // outputs have room for whole vectors
  Ahead* ahead = nullptr;         // what is asked for meanwhile, a part with each vector of a group of pixels
};

template <typename S>
DSCONV_INLINE void ask_meanwhile(const ChannelRow<S>& row) {
  if (row.ahead != nullptr) prefetch_some(*row.ahead);
}

// From x of vector number `vector` to the next, and from what its sums start with.
template <typename S>
DSCONV_INLINE int64_t next_vector(const ChannelRow<S>& row, int64_t vector) {
  return Vec<typename ComputeOf<S>::type>::n + (vector % kMicroVecs == kMicroVecs - 1 ? row.to_panel : 0);
}
template <typename S>
DSCONV_INLINE int64_t next_start(const ChannelRow<S>& row) {
  return row.start_stays ? 0 : Vec<typename ComputeOf<S>::type>::n;
}

// How often at least, for `count` pixels.
template <typename T>
DSCONV_INLINE int64_t depthwise_calls(int64_t count, int64_t channels) {
  return ceil_div(count, 2 * kPairPixels) * ceil_div(channels, Vec<T>::n);
}

// From slice number `slice` to the next.
template <typename S>
DSCONV_INLINE int64_t next_slice(const ChannelRow<S>& row, int64_t slice) {
  return row.slice_step - (slice + 1 == row.wrap ? row.wrap_back : 0);
}

template <bool Tail, typename S>
DSCONV_INLINE auto load_lanes(const S* p, int left) {
  if constexpr (Tail) {
    return vload(p, left);
  } else {
    return vload(p);
  }
}

// Where the columns of a group of pixels lie: all inside the image, or some of them outside; rest: and these are the
// last channels, fewer than a vector, read by masks.
enum class Columns { inside, edge, rest };
struct ColumnRange {
  int64_t column, in_w;  // input column of the first tap of the group's first pixel, columns of the image
  int left;              // lanes of the last vector that are stored, and for Columns::rest read
};

template <typename S>
struct ZeroVector {
  static constexpr S data[Vec<typename ComputeOf<S>::type>::n] = {};
};

// Input column `column` + i of the image's row, zero outside the image.
template <Columns Where, typename S>
DSCONV_INLINE auto load_column(const S* p, const ColumnRange& range, int64_t i) {
  const bool inside = static_cast<uint64_t>(range.column + i) < static_cast<uint64_t>(range.in_w);
  if constexpr (Where == Columns::inside) {
    return vload(p);
  } else if constexpr (Where == Columns::edge) {
    return vload(inside ? p : ZeroVector<S>::data);
  } else {
    return vload(p, inside ? range.left : 0);
  }
}

template <typename M, typename V>
DSCONV_INLINE void vstore_as(Stores stores, M* p, V v) {
  if (stores == Stores::stream) {
    vstream(p, v);
  } else {
    vstore(p, v);
  }
}

// J taps next to one another meet P pixels Step columns apart.
template <int J, int Step, int P, Columns Where, typename S, typename T, typename V>
DSCONV_INLINE void add_taps(const S* x, int64_t column_step, const T* weight, int64_t weight_column,
                            const ColumnRange& range, int64_t column, V (&acc)[P]) {
  V w[J];
  DSCONV_UNROLL
  for (int j = 0; j < J; ++j) {
    w[j] = load_lanes<Where == Columns::rest>(weight, range.left);
    advance(weight, weight_column);
  }
  DSCONV_UNROLL
  for (int i = 0; i < (P - 1) * Step + J; ++i) {
    const V v = load_column<Where>(x, range, column + i);
    advance(x, column_step);
    DSCONV_UNROLL
    for (int p = 0; p < P; ++p) {
      const int j = i - p * Step;
      if (j >= 0 && j < J) acc[p] = vfma(w[j], v, acc[p]);
    }
  }
}

// The same for P pixels of each of two rows of outputs: a row of x meets one row of taps for the upper and another for
// the lower.
template <int J, int Step, int P, Columns Where, typename S, typename T, typename V>
DSCONV_INLINE void add_taps_pair(const S* x, int64_t column_step, const T* upper_weight, const T* lower_weight,
                                 int64_t weight_column, const ColumnRange& range, int64_t column, V (&upper)[P],
                                 V (&lower)[P]) {
  V wu[J], wl[J];
  DSCONV_UNROLL
  for (int j = 0; j < J; ++j) {
    wu[j] = vload(upper_weight);
    wl[j] = vload(lower_weight);
    advance(upper_weight, weight_column);
    advance(lower_weight, weight_column);
  }
  DSCONV_UNROLL
  for (int i = 0; i < (P - 1) * Step + J; ++i) {
    const V v = load_column<Where>(x, range, column + i);
    advance(x, column_step);
    DSCONV_UNROLL
    for (int p = 0; p < P; ++p) {
      const int j = i - p * Step;
      if (j >= 0 && j < J) {
        upper[p] = vfma(wu[j], v, upper[p]);
        lower[p] = vfma(wl[j], v, lower[p]);
      }
    }
  }
}

// Of J taps from tap `column` on, at an edge: none reads a column of the image, or all read nothing else. Kernels
// nearly as wide as the image spend most of their taps so.
template <int J, int Step, int P>
DSCONV_INLINE bool all_outside(const ColumnRange& range, int64_t column) {
  const int64_t first = range.column + column;
  return first + (P - 1) * Step + J <= 0 || first >= range.in_w;
}
template <int J, int Step, int P>
DSCONV_INLINE bool all_inside(const ColumnRange& range, int64_t column) {
  const int64_t first = range.column + column;
  return first >= 0 && first + (P - 1) * Step + J <= range.in_w;
}

// One row of taps, taps that are neighbours, for P pixels.
template <int Step, int P, Columns Where, typename S, typename T, typename V>
DSCONV_INLINE void add_tap_row(const ChannelRow<S>& row, const S* x, const T* w, const ColumnRange& range,
                               V (&acc)[P]) {
  const int64_t column_step = row.column_step, weight_column = row.weight_column, taps_w = row.taps_w;
  int64_t j = 0;
  for (; j + 7 <= taps_w; j += 7) {
    const S* const from = x + j * column_step;
    const T* const weight = w + j * weight_column;
    if constexpr (Where == Columns::edge) {
      if (all_outside<7, Step, P>(range, j)) continue;
      if (all_inside<7, Step, P>(range, j)) {
        add_taps<7, Step, P, Columns::inside>(from, column_step, weight, weight_column, range, j, acc);
        continue;
      }
    }
    add_taps<7, Step, P, Where>(from, column_step, weight, weight_column, range, j, acc);
  }
  if (j + 5 <= taps_w) {
    add_taps<5, Step, P, Where>(x + j * column_step, column_step, w + j * weight_column, weight_column, range, j, acc);
    j += 5;
  }
  if (j + 3 <= taps_w) {
    add_taps<3, Step, P, Where>(x + j * column_step, column_step, w + j * weight_column, weight_column, range, j, acc);
    j += 3;
  }
  for (; j < taps_w; ++j) {
    add_taps<1, Step, P, Where>(x + j * column_step, column_step, w + j * weight_column, weight_column, range, j, acc);
  }
}

// A row of x that meets two rows of taps.
template <int Step, int P, Columns Where, typename S, typename T, typename V>
DSCONV_INLINE void add_tap_row_pair(const ChannelRow<S>& row, const S* x, const T* w, const T* w_lower,
                                    const ColumnRange& range, V (&upper)[P], V (&lower)[P]) {
  const int64_t column_step = row.column_step, weight_column = row.weight_column, taps_w = row.taps_w;
  int64_t j = 0;
  for (; j + 7 <= taps_w; j += 7) {
    const S* const from = x + j * column_step;
    const T* const upper_weight = w + j * weight_column;
    const T* const lower_weight = w_lower + j * weight_column;
    if constexpr (Where == Columns::edge) {
      if (all_outside<7, Step, P>(range, j)) continue;
      if (all_inside<7, Step, P>(range, j)) {
        add_taps_pair<7, Step, P, Columns::inside>(from, column_step, upper_weight, lower_weight, weight_column, range,
                                                   j, upper, lower);
        continue;
      }
    }
    add_taps_pair<7, Step, P, Where>(from, column_step, upper_weight, lower_weight, weight_column, range, j, upper,
                                     lower);
  }
  for (; j + 5 <= taps_w; j += 5) {
    add_taps_pair<5, Step, P, Where>(x + j * column_step, column_step, w + j * weight_column,
                                     w_lower + j * weight_column, weight_column, range, j, upper, lower);
  }
  if (j + 3 <= taps_w) {
    add_taps_pair<3, Step, P, Where>(x + j * column_step, column_step, w + j * weight_column,
                                     w_lower + j * weight_column, weight_column, range, j, upper, lower);
    j += 3;
  }
  for (; j < taps_w; ++j) {
    add_taps_pair<1, Step, P, Where>(x + j * column_step, column_step, w + j * weight_column,
                                     w_lower + j * weight_column, weight_column, range, j, upper, lower);
  }
}

// P pixels, `vectors` vectors of channels one after another: that way x is read as it lies in memory, which the
// prefetchers follow. Step: row.step_w where taps are neighbours, else 0. Taps: row.taps_w, on one slice, or 0 for any.
template <int Step, int P, Columns Where, int Taps, typename S, typename T, typename M>
static void convolve_group(const ChannelRow<S>& row, int64_t tap_rows, int64_t vectors, const S* x, const T* weight,
                           const T* start, const ColumnRange& range, Clamp<T> clamp, M* out, int64_t ld) {
  typedef typename Vec<T>::type V;
  const int64_t column_step = row.column_step, pixel_step = row.step_w * column_step, tap_step = row.dilation_w;
  const int64_t start_step = row.start_step, weight_column = row.weight_column;
  const int64_t x_down = row.dilation_h * row.row_step, weight_down = row.weight_row;
  const int64_t slices = Taps > 0 ? 1 : row.slices;
  const V lo = vset(clamp.lo), hi = vset(clamp.hi);
  [[maybe_unused]] M* const first_out = out;
  for (int64_t vector = 0; vector < vectors; ++vector) {
    ask_meanwhile(row);
    if constexpr (kAsksForNext) {
      if (row.stores == Stores::ahead) ask_for_next<P>(first_out, vector, row.channels, ld);
    }
    V acc[P];
    const T* from = start;
    DSCONV_UNROLL
    for (int p = 0; p < P; ++p) {
      acc[p] = load_lanes<Where == Columns::rest>(from, range.left);
      advance(from, start_step);
    }
    const S* x_slice = x;
    const T* weight_slice = weight;
    for (int64_t slice = 0; slice < slices; ++slice) {
      const S* x_row = x_slice;
      const T* weight_row = weight_slice;
      for (int64_t i = 0; i < tap_rows; ++i) {
        if constexpr (Taps > 0) {
          add_taps<Taps, Step, P, Where>(x_row, column_step, weight_row, weight_column, range, 0, acc);
        } else if constexpr (Step > 0) {
          add_tap_row<Step, P, Where>(row, x_row, weight_row, range, acc);
        } else {
          const T* w = weight_row;
          for (int64_t j = 0; j < row.taps_w; ++j, w += weight_column) {
            const V v = load_lanes<Where == Columns::rest>(w, range.left);
            const S* xp = x_row + j * tap_step * column_step;
            DSCONV_UNROLL
            for (int p = 0; p < P; ++p) {
              acc[p] = vfma(v, load_column<Where>(xp, range, j * tap_step + p * row.step_w), acc[p]);
              advance(xp, pixel_step);
            }
          }
        }
        x_row += x_down;
        weight_row += weight_down;
      }
      if (slice + 1 == slices) break;
      x_slice += next_slice(row, slice);
      weight_slice += row.weight_slice;
    }
    M* to = out;
    DSCONV_UNROLL
    for (int p = 0; p < P; ++p) {
      const V v = vmin(hi, vmax(lo, acc[p]));
      if (Where == Columns::rest || (vector + 1 == vectors && range.left < Vec<T>::n)) {
        vstore(to, v, range.left);
      } else {
        vstore(to, v);
      }
      advance(to, ld);
    }
    x += next_vector(row, vector);
    weight += Vec<T>::n;
    start += next_start(row);
    out += Vec<T>::n;
  }
}

// P pixels of each of two rows of outputs, `apart` rows of x from one another: x is read once for both. Taps that are
// neighbours, dilation_h 1.
template <int Step, int P, Columns Where, bool Far, typename S, typename T>
static void convolve_group_pair(const ChannelRow<S>& row, int64_t apart, const Range& rows, int64_t groups,
                                int64_t vectors, const S* x_first, const ColumnRange& range, Clamp<T> clamp,
                                T* out_first, int64_t ld, int64_t out_row) {
  typedef typename Vec<T>::type V;
  const int64_t column_step = row.column_step;
  const V lo = vset(clamp.lo), hi = vset(clamp.hi);
  for (int64_t group = 0; group < groups; ++group, x_first += P * Step * column_step, out_first += P * ld) {
    const S* x = x_first;
    T* out = out_first;
    const T* start = row.start;
    const T* weight = row.weight;
    for (int64_t vector = 0; vector < vectors; ++vector) {
      ask_meanwhile(row);
      V upper[P], lower[P];
      DSCONV_UNROLL
      for (int p = 0; p < P; ++p) upper[p] = lower[p] = vload(start);
      const Stores stores = Far ? row.stores : Stores::plain;
      if (stores == Stores::ahead) {
        ask_for_next<P>(out_first, vector, row.channels, ld);
        ask_for_next<P>(out_first + out_row, vector, row.channels, ld);
      }
      const S* x_slice = x;
      const T* weight_slice = weight;
      for (int64_t slice = 0; slice < row.slices; ++slice) {
        for (int64_t i = rows.begin; i < rows.end; ++i) {
          const S* x_row = x_slice + i * row.row_step;
          const T* w = weight_slice + i * row.weight_row;
          const T* w_lower = w - apart * row.weight_row;
          if (i < apart) {
            add_tap_row<Step, P, Where>(row, x_row, w, range, upper);
          } else if (i >= row.taps_h) {
            add_tap_row<Step, P, Where>(row, x_row, w_lower, range, lower);
          } else {
            add_tap_row_pair<Step, P, Where>(row, x_row, w, w_lower, range, upper, lower);
          }
        }
        if (slice + 1 == row.slices) break;
        x_slice += next_slice(row, slice);
        weight_slice += row.weight_slice;
      }
      T* to = out;
      const bool part = Far && vector + 1 == vectors && range.left < Vec<T>::n;
      DSCONV_UNROLL
      for (int p = 0; p < P; ++p) {
        const V up = vmin(hi, vmax(lo, upper[p])), low = vmin(hi, vmax(lo, lower[p]));
        if (part) {
          vstore(to, up, range.left);
          vstore(to + out_row, low, range.left);
        } else {
          vstore_as(stores, to, up);
          vstore_as(stores, to + out_row, low);
        }
        advance(to, ld);
      }
      x += next_vector(row, vector);
      weight += Vec<T>::n;
      start += next_start(row);
      out += Vec<T>::n;
    }
  }
}

template <int Step, Columns Where, int Taps, typename S, typename T, typename M>
static void convolve_taps(int pixels, const ChannelRow<S>& row, int64_t tap_rows, int64_t vectors, const S* x,
                          const T* weight, const T* start, const ColumnRange& range, Clamp<T> clamp, M* out,
                          int64_t ld) {
  switch (pixels) {
    case 7:
      return convolve_group<Step, 7, Where, Taps>(row, tap_rows, vectors, x, weight, start, range, clamp, out, ld);
    case 5:
      return convolve_group<Step, 5, Where, Taps>(row, tap_rows, vectors, x, weight, start, range, clamp, out, ld);
    case 3:
      return convolve_group<Step, 3, Where, Taps>(row, tap_rows, vectors, x, weight, start, range, clamp, out, ld);
    default:
      return convolve_group<Step, 1, Where, Taps>(row, tap_rows, vectors, x, weight, start, range, clamp, out, ld);
  }
}

template <int Step, Columns Where, typename S, typename T, typename M>
static void convolve_pixels(int pixels, const ChannelRow<S>& row, int64_t tap_rows, int64_t vectors, const S* x,
                            const T* weight, const T* start, const ColumnRange& range, Clamp<T> clamp, M* out,
                            int64_t ld) {
  // Of rows whose length is known the code is short: 0.85 to 0.99 of the time of a forward. AVX-512 goes by pairs.
  if constexpr (DSCONV_ISA == DSCONV_ISA_AVX2 && Step > 0 && Where != Columns::rest) {
    if (row.taps_w == 3 && row.slices == 1) {
      return convolve_taps<Step, Where, 3>(pixels, row, tap_rows, vectors, x, weight, start, range, clamp, out, ld);
    }
    if (row.taps_w == 5 && row.slices == 1) {
      return convolve_taps<Step, Where, 5>(pixels, row, tap_rows, vectors, x, weight, start, range, clamp, out, ld);
    }
  }
  convolve_taps<Step, Where, 0>(pixels, row, tap_rows, vectors, x, weight, start, range, clamp, out, ld);
}

// The first of the groups that `left` pixels are cut into: 7, 5, 3 or 1, with no rest of 1 or 2 where that can be.
DSCONV_INLINE int group_pixels(int64_t left) {
  if (left < 3) return 1;
  if (left == 7 || left >= 10) return 7;
  return left == 5 || left == 8 ? 5 : 3;
}

// The channels that are computed as whole vectors for outputs whose last tap reads row `bottom` of x.
template <typename S>
DSCONV_INLINE int64_t whole_channels(const ChannelRow<S>& row, int64_t bottom) {
  constexpr int n = Vec<typename ComputeOf<S>::type>::n;
  const int64_t padded = round_up(row.channels, n), whole = row.channels / n * n;
  if (whole == row.channels || row.end == nullptr) return whole;
  const int64_t last_row = bottom < row.in_h ? bottom : row.in_h - 1;
  const int64_t last_pixel =
      (row.slices - 1) * row.slice_step + last_row * row.row_step + (row.in_w - 1) * row.column_step;
  return last_pixel + padded <= row.end - row.x ? padded : whole;
}

// Lanes that are stored of the last of `vectors` vectors.
template <typename S>
DSCONV_INLINE int last_lanes(const ChannelRow<S>& row, int64_t vectors) {
  constexpr int n = Vec<typename ComputeOf<S>::type>::n;
  return row.padded ? n : lanes_left(row.channels - (vectors - 1) * n, n);
}

template <int Step, typename S, typename T, typename M>
static void convolve_row_steps(const ChannelRow<S>& row, int64_t top, int64_t left, int64_t count, Clamp<T> clamp,
                               M* out, int64_t ld) {
  constexpr int n = Vec<T>::n;
  constexpr int kRestStep = DSCONV_ISA == DSCONV_ISA_AVX512 ? Step : 0;  // masks cost little there
  const int64_t rest = whole_channels(row, top + (row.taps_h - 1) * row.dilation_h), vectors = rest / n;
  const Range taps = valid_taps(top, row.dilation_h, row.in_h, row.taps_h);
  const int64_t tap_rows = row.taps_w > 0 && taps.begin < taps.end ? taps.end - taps.begin : 0;
  const S* x = row.x + (top + taps.begin * row.dilation_h) * row.row_step + left * row.column_step;
  const T* weight = row.weight + taps.begin * row.weight_row;
  // The pixels all of whose columns lie inside the image.
  const int64_t inside_begin = valid_outputs(left, row.step_w, row.in_w, count).begin;
  const int64_t inside_end = valid_outputs(left + (row.taps_w - 1) * row.dilation_w, row.step_w, row.in_w, count).end;
  for (int64_t p = 0; p < count;) {
    const int pixels = group_pixels(count - p);
    const ColumnRange range = {left + p * row.step_w, row.in_w, last_lanes(row, vectors)};
    const S* from = x + p * row.step_w * row.column_step;
    const T* start = row.start + p * row.start_step;
    M* to = out + p * ld;
    if (p >= inside_begin && p + pixels <= inside_end) {
      convolve_pixels<Step, Columns::inside>(pixels, row, tap_rows, vectors, from, weight, start, range, clamp, to, ld);
    } else {
      convolve_pixels<Step, Columns::edge>(pixels, row, tap_rows, vectors, from, weight, start, range, clamp, to, ld);
    }
    if (rest < row.channels) {
      const ColumnRange masked = {range.column, row.in_w, lanes_left(row.channels - rest, n)};
      convolve_pixels<kRestStep, Columns::rest>(pixels, row, tap_rows, 1, from + rest, weight + rest, start + rest,
                                                masked, clamp, to + rest, ld);
    }
    p += pixels;
  }
}

// `vectors` vectors of two rows of `count` pixels, a multiple of kPairPixels.
template <int Step, bool Far, typename S, typename T>
static void convolve_row_pair(const ChannelRow<S>& row, int64_t vectors, int64_t apart, int64_t top, int64_t left,
                              int64_t count, Clamp<T> clamp, T* out, int64_t ld, int64_t out_row) {
  constexpr int P = kPairPixels;
  const Range rows = valid_taps(top, 1, row.in_h, row.taps_h + apart);
  const S* x = row.x + top * row.row_step + left * row.column_step;
  const int64_t inside_begin = valid_outputs(left, row.step_w, row.in_w, count).begin;
  const int64_t inside_end = valid_outputs(left + row.taps_w - 1, row.step_w, row.in_w, count).end;
  for (int64_t p = 0; p < count;) {
    const ColumnRange range = {left + p * row.step_w, row.in_w, last_lanes(row, vectors)};
    const S* from = x + p * row.step_w * row.column_step;
    const int64_t groups = p >= inside_begin && p < inside_end ? (inside_end - p) / P : 0;
    if (groups > 0) {
      convolve_group_pair<Step, P, Columns::inside, Far>(row, apart, rows, groups, vectors, from, range, clamp,
                                                         out + p * ld, ld, out_row);
      p += groups * P;
    } else {
      convolve_group_pair<Step, P, Columns::edge, Far>(row, apart, rows, 1, vectors, from, range, clamp, out + p * ld,
                                                       ld, out_row);
      p += P;
    }
  }
}

// `count` pixels; top and left are the input position of the first one's first tap, inside the image or not.
template <typename S, typename T, typename M>
static void convolve_row(const ChannelRow<S>& row, int64_t top, int64_t left, int64_t count, Clamp<T> clamp, M* out,
                         int64_t ld) {
  // The generic kernels go tap by tap: theirs is code that has to be right and small.
  constexpr int one = DSCONV_ISA != DSCONV_ISA_GENERIC, two = 2 * one;
  const bool neighbours = row.dilation_w == 1 && row.taps_w >= 3;
  if (neighbours && row.step_w == 1) {
    convolve_row_steps<one>(row, top, left, count, clamp, out, ld);
  } else if (neighbours && row.step_w == 2) {
    convolve_row_steps<two>(row, top, left, count, clamp, out, ld);
  } else {
    convolve_row_steps<0>(row, top, left, count, clamp, out, ld);
  }
}

// `taps` taps along the depth, of which number i reads slice `position` + i * dilation of `in`: those inside become the
// row's loop over slices, `step` apart from x on. Returns the first of them, at whose weights the row has to begin.
template <typename S>
DSCONV_INLINE int64_t place_slices(ChannelRow<S>& row, const S* x, int64_t position, int64_t dilation, int64_t in,
                                   int64_t taps, int64_t step) {
  const Range inside = valid_taps(position, dilation, in, taps);
  row.slices = inside.end - inside.begin;
  row.slice_step = dilation * step;
  row.x = x + (position + inside.begin * dilation) * step;
  return inside.begin;
}

// `row` from channel `begin` on.
template <typename S>
DSCONV_INLINE ChannelRow<S> channels_from(const ChannelRow<S>& row, int64_t begin) {
  ChannelRow<S> rest = row;
  rest.x += begin;
  rest.weight += begin;
  rest.start += begin;
  rest.channels -= begin;
  return rest;
}

// `rows` rows of `count` pixels, `apart` rows of x from one another, out_row elements apart in `out`; start_step is 0.
// Far: `out` is no tile that stays in cache, and written as row.stores says.
template <bool Far = false, typename S, typename T, typename M>
static void convolve_rows(const ChannelRow<S>& row, int64_t apart, int64_t top, int64_t left, int64_t rows,
                          int64_t count, Clamp<T> clamp, M* out, int64_t ld, int64_t out_row) {
  int64_t done = 0;
  // Twice the sums need the 32 registers of AVX-512. Rows that are stored as bf16 have a form of their own
  // (depthwise_bf16.inl), and go this way in rare cases only.
  if constexpr (DSCONV_ISA == DSCONV_ISA_AVX512 && sizeof(M) == sizeof(T)) {
    const int64_t paired = count / kPairPixels * kPairPixels;
    const bool pairs = row.dilation_w == 1 && row.dilation_h == 1 && row.taps_w >= 3 && apart < row.taps_h &&
                       row.step_w <= 2 && paired > 0;
    for (; pairs && done + 2 <= rows; done += 2) {
      const int64_t in = top + done * apart, whole = whole_channels(row, in + apart + row.taps_h - 1);
      if (whole == 0) break;
      const int64_t vectors = whole / Vec<T>::n;
      const ChannelRow<S> rest = channels_from(row, whole);
      T* const to = out + done * out_row;
      if (row.step_w == 1) {
        convolve_row_pair<1, Far>(row, vectors, apart, in, left, paired, clamp, to, ld, out_row);
      } else {
        convolve_row_pair<2, Far>(row, vectors, apart, in, left, paired, clamp, to, ld, out_row);
      }
      for (int64_t i = 0; i < 2; ++i) {
        if (paired < count) {
          convolve_row(row, in + i * apart, left + paired * row.step_w, count - paired, clamp,
                       to + i * out_row + paired * ld, ld);
        }
        if (rest.channels > 0) {
          convolve_row(rest, in + i * apart, left, paired, clamp, to + i * out_row + whole, ld);
        }
      }
    }
  }
  for (; done < rows; ++done) {
    convolve_row(row, top + done * apart, left, count, clamp, out + done * out_row, ld);
  }
}
