// The depthwise stage that multiplies pairs of bf16: two taps at a time, sums in fp32, rows of pixels of an nhwc
// tensor.
//
//   x of the upper tap   c0 c1 c2 ... c31     \  zipped to pairs of one channel, 16 in each of two vectors; times the
//   x of the lower tap   c0 c1 c2 ... c31     /  packed pairs of weights (pack_bf16.inl)
//
// Which taps make a pair: one and that below it, in rows 0 and 1, 2 and 3, ...; in a last single row neighbours, the
// last one alone. A group of 32 channels and P <= 7 pixels of a row: its sums stay in registers through all taps, and a
// zipped column of x serves all taps and pixels that read it, as in channel_row.inl. What lies outside the image is
// loaded from a line of zeros. Zipping changes the order of the channels; sums are brought back when they are rounded.
#ifndef DSCONV_ISA
#error "depthwise_bf16.inl belongs inside an ISA region"
#endif

constexpr int kGroup = 2 * Vec<float>::n;  // channels

struct ZeroLine {
  static constexpr bf16 data[kGroup] = {};
};

template <Columns Where>
DSCONV_INLINE __m512i load_group(const bf16* p, const ColumnRange& range, int64_t i) {
  const bool inside = static_cast<uint64_t>(range.column + i) < static_cast<uint64_t>(range.in_w);
  if constexpr (Where == Columns::inside) {
    return vload_two(p);
  } else if constexpr (Where == Columns::edge) {
    return vload_two(inside ? p : ZeroLine::data);
  } else {
    return vload_two(p, inside ? range.left : 0);
  }
}

// A row of x, from the column of the first pixel's first tap on.
struct TapRow {
  const bf16* x;
  int64_t step;  // 0: a row outside the image, x is zeros
};
DSCONV_INLINE TapRow tap_row(const ChannelRow<bf16>& row, const bf16* x, int64_t tap, const Range& inside) {
  const bool in = tap >= inside.begin && tap < inside.end;
  const TapRow r = {in ? x + tap * row.dilation_h * row.row_step : ZeroLine::data, in ? row.column_step : 0};
  return r;
}

template <int P>
struct PairSums {
  __m512 low[P], high[P];
};

// J taps next to one another and the J below them meet P pixels Step columns apart.
template <int J, int Step, int P, Columns Where>
DSCONV_INLINE void add_two_rows(TapRow upper, TapRow lower, int64_t first, const bf16x2* weight,
                                const ColumnRange& range, PairSums<P>& sums) {
  constexpr int n = Vec<float>::n;
  __m512i low[J], high[J];
  DSCONV_UNROLL
  for (int j = 0; j < J; ++j) low[j] = vload(weight + j * kGroup), high[j] = vload(weight + j * kGroup + n);
  const bf16 *a = upper.x + first * upper.step, *b = lower.x + first * lower.step;
  DSCONV_UNROLL
  for (int i = 0; i < (P - 1) * Step + J; ++i) {
    const __m512i va = load_group<Where>(a, range, first + i), vb = load_group<Where>(b, range, first + i);
    const __m512i x_low = vzip_low(va, vb), x_high = vzip_high(va, vb);
    advance(a, upper.step);
    advance(b, lower.step);
    DSCONV_UNROLL
    for (int p = 0; p < P; ++p) {
      const int j = i - p * Step;
      if (j >= 0 && j < J) {
        sums.low[p] = vfma(low[j], x_low, sums.low[p]);
        sums.high[p] = vfma(high[j], x_high, sums.high[p]);
      }
    }
  }
}

// Q pairs of neighbours in one row.
template <int Q, int Step, int P, Columns Where>
DSCONV_INLINE void add_neighbours(TapRow row, int64_t first, const bf16x2* weight, const ColumnRange& range,
                                  PairSums<P>& sums) {
  constexpr int n = Vec<float>::n;
  __m512i low[Q], high[Q];
  DSCONV_UNROLL
  for (int q = 0; q < Q; ++q) low[q] = vload(weight + q * kGroup), high[q] = vload(weight + q * kGroup + n);
  const bf16* a = row.x + first * row.step;
  __m512i here = load_group<Where>(a, range, first);
  DSCONV_UNROLL
  for (int i = 0; i < (P - 1) * Step + 2 * Q - 1; ++i) {
    advance(a, row.step);
    const __m512i next = load_group<Where>(a, range, first + i + 1);
    const __m512i x_low = vzip_low(here, next), x_high = vzip_high(here, next);
    DSCONV_UNROLL
    for (int p = 0; p < P; ++p) {
      const int j = i - p * Step;
      if (j >= 0 && j < 2 * Q && j % 2 == 0) {
        sums.low[p] = vfma(low[j / 2], x_low, sums.low[p]);
        sums.high[p] = vfma(high[j / 2], x_high, sums.high[p]);
      }
    }
    here = next;
  }
}

// One pair, for any dilation and stride; Single: its lower tap is none.
template <bool Single, int P, Columns Where>
DSCONV_INLINE void add_pair(TapRow upper, int64_t upper_column, TapRow lower, int64_t lower_column, int64_t step_w,
                            const bf16x2* weight, const ColumnRange& range, PairSums<P>& sums) {
  const __m512i low = vload(weight), high = vload(weight + Vec<float>::n);
  const bf16 *a = upper.x + upper_column * upper.step, *b = lower.x + lower_column * lower.step;
  DSCONV_UNROLL
  for (int p = 0; p < P; ++p) {
    const __m512i va = load_group<Where>(a, range, upper_column + p * step_w);
    advance(a, upper.step * step_w);
    __m512i vb = vzero_two();
    if constexpr (!Single) {
      vb = load_group<Where>(b, range, lower_column + p * step_w);
      advance(b, lower.step * step_w);
    }
    sums.low[p] = vfma(low, vzip_low(va, vb), sums.low[p]);
    sums.high[p] = vfma(high, vzip_high(va, vb), sums.high[p]);
  }
}

template <int K, int Step, int P, Columns Where>
DSCONV_INLINE void add_rows_of_taps(const ChannelRow<bf16>& row, TapRow upper, TapRow lower, const bf16x2* weight,
                                    const ColumnRange& range, PairSums<P>& sums) {
  const int64_t taps_w = K > 0 ? K : row.taps_w;
  int64_t j = 0;
  if constexpr (Step > 0) {
    for (; j + 5 <= taps_w; j += 5, weight += 5 * kGroup) {
      add_two_rows<5, Step, P, Where>(upper, lower, j, weight, range, sums);
    }
    if (j + 3 <= taps_w) {
      add_two_rows<3, Step, P, Where>(upper, lower, j, weight, range, sums);
      j += 3, weight += 3 * kGroup;
    }
  }
  for (; j < taps_w; ++j, weight += kGroup) {
    add_pair<false, P, Where>(upper, j * row.dilation_w, lower, j * row.dilation_w, row.step_w, weight, range, sums);
  }
}

template <int K, int Step, int P, Columns Where>
DSCONV_INLINE void add_single_row(const ChannelRow<bf16>& row, TapRow taps, const bf16x2* weight,
                                  const ColumnRange& range, PairSums<P>& sums) {
  const int64_t taps_w = K > 0 ? K : row.taps_w, d = Step > 0 ? 1 : row.dilation_w;
  int64_t j = 0;
  if constexpr (Step > 0) {
    for (; j + 4 <= taps_w; j += 4, weight += 2 * kGroup) {
      add_neighbours<2, Step, P, Where>(taps, j, weight, range, sums);
    }
    if (j + 2 <= taps_w) {
      add_neighbours<1, Step, P, Where>(taps, j, weight, range, sums);
      j += 2, weight += kGroup;
    }
  }
  for (; j + 2 <= taps_w; j += 2, weight += kGroup) {
    add_pair<false, P, Where>(taps, j * d, taps, (j + 1) * d, row.step_w, weight, range, sums);
  }
  if (j < taps_w) add_pair<true, P, Where>(taps, j * d, taps, j * d, row.step_w, weight, range, sums);
}

// The taps on one slice of x. K: taps in each direction, whose loops are then unrolled; 0: as many as there are.
template <int K, int Step, int P, Columns Where>
DSCONV_INLINE void add_slice(const ChannelRow<bf16>& row, const Range& inside, const bf16* x, const bf16x2* weight,
                             const ColumnRange& range, PairSums<P>& sums) {
  if constexpr (K > 0) {
    DSCONV_UNROLL
    for (int i = 0; i + 2 <= K; i += 2) {
      add_rows_of_taps<K, Step, P, Where>(row, tap_row(row, x, i, inside), tap_row(row, x, i + 1, inside),
                                          weight + i / 2 * K * kGroup, range, sums);
    }
    add_single_row<K, Step, P, Where>(row, tap_row(row, x, K - 1, inside), weight + K / 2 * K * kGroup, range, sums);
  } else {
    for (int64_t i = inside.begin / 2 * 2; i < inside.end; i += 2) {
      const TapRow upper = tap_row(row, x, i, inside);
      const bf16x2* w = weight + i / 2 * row.taps_w * kGroup;
      if (i + 1 < row.taps_h) {
        add_rows_of_taps<0, Step, P, Where>(row, upper, tap_row(row, x, i + 1, inside), w, range, sums);
      } else {
        add_single_row<0, Step, P, Where>(row, upper, w, range, sums);
      }
    }
  }
}

// P pixels, `groups` groups of channels one after another. x: where the first pixel's first tap would be.
template <int K, int Step, int P, Columns Where>
static void convolve_group_pairs(const ChannelRow<bf16>& row, const Range& inside, int64_t tap_pairs, int64_t groups,
                                 const bf16* x, const bf16x2* weight, const float* bias, const ColumnRange& range,
                                 Clamp<float> clamp, bf16* out, int64_t ld) {
  const __m512 lo = vset(clamp.lo), hi = vset(clamp.hi);
  for (int64_t group = 0; group < groups; ++group) {
    PairSums<P> sums;
    __m512 low, high;
    vzip_order(vload(bias), vload(bias + Vec<float>::n), low, high);
    DSCONV_UNROLL
    for (int p = 0; p < P; ++p) sums.low[p] = low, sums.high[p] = high;
    const bf16* x_slice = x;
    const bf16x2* weight_slice = weight;
    for (int64_t slice = 0; slice < row.slices; ++slice) {
      add_slice<K, Step, P, Where>(row, inside, x_slice, weight_slice, range, sums);
      x_slice += row.slice_step;
      weight_slice += row.weight_slice;
    }
    bf16* to = out;
    DSCONV_UNROLL
    for (int p = 0; p < P; ++p) {
      const __m512 a = vmin(hi, vmax(lo, sums.low[p])), b = vmin(hi, vmax(lo, sums.high[p]));
      vstore(reinterpret_cast<bf16x2*>(to), vunzip(a, b));
      advance(to, ld);
    }
    x += kGroup;
    weight += tap_pairs * kGroup;
    bias += kGroup;
    out += kGroup;
  }
}

template <int Step, Columns Where>
static void convolve_pixels_pairs(int pixels, const ChannelRow<bf16>& row, const Range& inside, int64_t tap_pairs,
                                  int64_t groups, const bf16* x, const bf16x2* weight, const float* bias,
                                  const ColumnRange& range, Clamp<float> clamp, bf16* out, int64_t ld) {
#define DSCONV_PIXELS(K, P) \
  convolve_group_pairs<K, Step, P, Where>(row, inside, tap_pairs, groups, x, weight, bias, range, clamp, out, ld)
  if constexpr (Step > 0 && Where != Columns::rest) {
    if (pixels == 7 && row.taps_h == 3 && row.taps_w == 3) return DSCONV_PIXELS(3, 7);
    if (pixels == 7 && row.taps_h == 5 && row.taps_w == 5) return DSCONV_PIXELS(5, 7);
  }
  switch (pixels) {
    case 7:
      return DSCONV_PIXELS(0, 7);
    case 5:
      return DSCONV_PIXELS(0, 5);
    case 3:
      return DSCONV_PIXELS(0, 3);
    default:
      return DSCONV_PIXELS(0, 1);
  }
#undef DSCONV_PIXELS
}

// As convolve_row_steps() of channel_row.inl. Writes whole groups.
template <int Step>
static void convolve_row_pairs(const ChannelRow<bf16>& row, const bf16x2* weight, int64_t tap_pairs, int64_t top,
                               int64_t left, int64_t count, Clamp<float> clamp, bf16* out, int64_t ld) {
  const int64_t groups = row.channels / kGroup, rest = groups * kGroup;
  const Range inside = valid_taps(top, row.dilation_h, row.in_h, row.taps_h);
  const bf16* x = row.x + top * row.row_step + left * row.column_step;
  const int64_t inside_begin = valid_outputs(left, row.step_w, row.in_w, count).begin;
  const int64_t inside_end = valid_outputs(left + (row.taps_w - 1) * row.dilation_w, row.step_w, row.in_w, count).end;
  for (int64_t p = 0; p < count;) {
    const int pixels = group_pixels(count - p);
    const ColumnRange range = {left + p * row.step_w, row.in_w, lanes_left(row.channels - rest, kGroup)};
    const bf16* from = x + p * row.step_w * row.column_step;
    bf16* to = out + p * ld;
    if (p >= inside_begin && p + pixels <= inside_end) {
      convolve_pixels_pairs<Step, Columns::inside>(pixels, row, inside, tap_pairs, groups, from, weight, row.start,
                                                   range, clamp, to, ld);
    } else {
      convolve_pixels_pairs<Step, Columns::edge>(pixels, row, inside, tap_pairs, groups, from, weight, row.start, range,
                                                 clamp, to, ld);
    }
    if (rest < row.channels) {
      convolve_pixels_pairs<Step, Columns::rest>(pixels, row, inside, tap_pairs, 1, from + rest,
                                                 weight + rest * tap_pairs, row.start + rest, range, clamp, to + rest,
                                                 ld);
    }
    p += pixels;
  }
}

// The rows of one run of outputs, by the form that their strides and dilations have.
static void convolve_run_pairs(const Geometry& g, const ChannelRow<bf16>& row, const bf16x2* weight, int64_t tap_pairs,
                               int64_t oh, int64_t ow, int64_t count, Clamp<float> clamp, bf16* out, int64_t ld) {
  const int64_t top = oh * g.stride_h - g.pad_top, left = ow * g.stride_w - g.pad_left;
  if (g.dilation_w == 1 && g.stride_w == 1) {
    convolve_row_pairs<1>(row, weight, tap_pairs, top, left, count, clamp, out, ld);
  } else if (g.dilation_w == 1 && g.stride_w == 2) {
    convolve_row_pairs<2>(row, weight, tap_pairs, top, left, count, clamp, out, ld);
  } else {
    convolve_row_pairs<0>(row, weight, tap_pairs, top, left, count, clamp, out, ld);
  }
}

// From the pairs of one plane of taps to those of the next.
DSCONV_INLINE int64_t pairs_slice(const Geometry& g) { return tap_pairs_of(g) / g.kernel_d * kGroup; }

static void depthwise_pairs(const DepthwiseInput<bf16>& in, int64_t pixel, int64_t count, Clamp<float> clamp, bf16* z) {
  const Geometry& g = *in.g;
  const CpuPlan& plan = *in.plan;
  ChannelRow<bf16> row = channel_row<bf16>(g, plan);
  row.row_step = in.stride.h;
  row.column_step = in.stride.w;
  row.start = in.bias;
  row.weight_slice = pairs_slice(g);
  for (int64_t p = 0; p < count;) {
    const PixelRun run = run_at(pixel + p, count - p, g.h_out, g.w_out, false);
    const bf16x2* weight =
        reinterpret_cast<const bf16x2*>(in.weight) + read_slices(in, run.slice, row) * row.weight_slice;
    convolve_run_pairs(g, row, weight, plan.tap_pairs, run.oh, run.ow, run.length, clamp, z + p * plan.mid_ld,
                       plan.mid_ld);
    p += run.length;
  }
}

// nchw: the part of x that a piece of outputs reads, turned into [tap along the depth][row][column][group of channels];
// rows that follow one another in memory turn as one.
static void turn_group(const DepthwiseInput<bf16>& in, const TurnedPiece& piece, int64_t c, int channels, bf16* to) {
  const int64_t columns = piece.in_column_end - piece.in_column, rows = piece.in_row_end - piece.in_row;
  const bool joined = columns == in.stride.h;
  const int64_t length = joined ? rows * columns : columns;
  const Geometry& g = *in.g;
  const bf16* first =
      in.x + piece.slice / g.d_out * in.stride.n + c * in.stride.c + piece.in_row * in.stride.h + piece.in_column;
  for (int64_t slice = 0; slice < piece.slices; ++slice) {
    const bf16* x = first + (piece.in_slice + slice * g.dilation_d) * in.stride.d;
    for (int64_t row = 0; row < (joined ? 1 : rows); ++row, x += in.stride.h, to += length * kGroup) {
      for (int64_t i = 0; i < length; i += kGroup) {
        turn_block<true>(x + i, in.stride.c, channels, lanes_left(length - i, kGroup), to + i * kGroup, kGroup);
      }
    }
  }
}

static void depthwise_turned_pairs(const DepthwiseInput<bf16>& in, int64_t pixel, int64_t count, Clamp<float> clamp,
                                   bf16* z, bf16* turned) {
  const Geometry& g = *in.g;
  const CpuPlan& plan = *in.plan;
  ChannelRow<bf16> row = channel_row<bf16>(g, plan);
  row.column_step = kGroup;
  row.channels = kGroup;
  row.weight_slice = pairs_slice(g);
  for (int64_t p = 0; p < count;) {
    const TurnedPiece piece = turned_piece<float>(g, plan, pixel + p, count - p);
    row.row_step = (piece.in_column_end - piece.in_column) * kGroup;
    row.slices = piece.slices;
    row.slice_step = (piece.in_row_end - piece.in_row) * row.row_step;
    row.x = turned - piece.in_row * row.row_step - piece.in_column * kGroup;
    for (int64_t c = 0; c < g.c_in; c += kGroup) {
      turn_group(in, piece, c, lanes_left(g.c_in - c, kGroup), turned);
      row.start = in.bias + c;
      const bf16x2* weight =
          reinterpret_cast<const bf16x2*>(in.weight) + c * plan.tap_pairs + piece.tap * row.weight_slice;
      for (int64_t i = 0; i < piece.rows; ++i) {
        convolve_run_pairs(g, row, weight, plan.tap_pairs, piece.oh + i, piece.ow, piece.width, clamp,
                           z + (p + i * piece.width) * plan.mid_ld + c, plan.mid_ld);
      }
    }
    p += piece.rows * piece.width;
  }
}

// A last odd channel has a partner for the GEMM, whose weight is zero: it must be a number.
static void zero_partners(int64_t channel, int64_t count, bf16* z, int64_t ld) {
  for (int64_t p = 0; p < count; ++p) z[p * ld + channel].bits = 0;
}

static void depthwise_tile(const DepthwiseInput<bf16>& in, int64_t pixel, int64_t count, Clamp<float> clamp, bf16* z,
                           float* memory) {
  if (in.plan->tap_pairs > 0 && in.layout == Layout::nhwc) return depthwise_pairs(in, pixel, count, clamp, z);
  if (in.plan->tap_pairs > 0) {
    return depthwise_turned_pairs(in, pixel, count, clamp, z, reinterpret_cast<bf16*>(memory));
  }
  depthwise_tile<bf16, float, bf16>(in, pixel, count, clamp, z, memory);
  if (in.g->c_mid % 2 != 0) zero_partners(in.g->c_mid, count, z, in.plan->mid_ld);
}
