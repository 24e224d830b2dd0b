// Sums over taps on one plane of an nchw tensor, vectors along w.
//
//   out(oh, ow) = sum over taps t of weight[t] * in(oh * step_h + row[t], ow * step_w + column[t])
//
// A piece of the output (some rows, or a part of one row) reads its input from a window: a copy in the compute type,
// zero outside the image, its columns split into step_w phases, so that every tap of a vector of outputs is one
// unaligned load at a fixed offset from the vector's position:
//
//   window row | phase 0: columns 0, s, 2s, ... | phase 1: columns 1, s + 1, ... |     out vector at  in[i] + offset[t]
//
// Positions, offsets and the zeros are the same for every channel: prepared once per piece, then filled per channel.
// Taps whose span is too wide for a window go through several, in chunks.
#ifndef DSCONV_ISA
#error "plane.inl belongs inside an ISA region"
#endif

struct PlaneShape {
  int64_t in_h, in_w, out_w, step_h, step_w;
};

// Sorted by row. `which` is the index into the kernel.
struct PlaneTaps {
  int64_t count;
  int64_t *row, *column, *which;
};

template <typename T>
struct Window {
  int64_t begin, end, first_tap, last_tap;       // what it is prepared for
  int64_t first_row, rows, first_column, width;  // of the input; may begin outside the image
  int64_t phases, phase_pitch, row_pitch;
  int64_t positions;
  int32_t *in, *out, *valid;  // per vector of outputs: where it begins in the window and in the strip, lanes in use
  int32_t* offset;            // per tap
  T* buffer;                  // plan.window elements
  T* weight;                  // per tap, of the channel at hand
};

// Lays the arrays out in `memory`, plane_bytes(plan) of them.
template <typename T>
DSCONV_INLINE void plane_memory(const CpuPlan& plan, void* memory, PlaneTaps& taps, Window<T>& w) {
  const int64_t most = plan.window / Vec<T>::n;
  taps.row = static_cast<int64_t*>(memory);
  taps.column = taps.row + plan.taps;
  taps.which = taps.column + plan.taps;
  w.buffer = reinterpret_cast<T*>(taps.which + plan.taps);
  w.weight = w.buffer + plan.window;
  w.in = reinterpret_cast<int32_t*>(w.weight + plan.taps);
  w.out = w.in + most;
  w.valid = w.out + most;
  w.offset = w.valid + most;
  w.begin = -1;
}

// The taps of a depthwise convolution, for the plain (forward) direction.
DSCONV_INLINE void forward_taps(const Geometry& g, PlaneTaps& taps) {
  taps.count = g.kernel_h * g.kernel_w;  // of one slice
  for (int64_t t = 0; t < taps.count; ++t) {
    taps.row[t] = t / g.kernel_w * g.dilation_h - g.pad_top;
    taps.column[t] = t % g.kernel_w * g.dilation_w - g.pad_left;
    taps.which[t] = t;
  }
}

struct TapSpan {
  int64_t first_row, last_row, first_column, last_column;
};
DSCONV_INLINE TapSpan span_of(const PlaneTaps& taps, int64_t begin, int64_t end) {
  TapSpan s = {taps.row[begin], taps.row[begin], taps.column[begin], taps.column[begin]};
  for (int64_t t = begin + 1; t < end; ++t) {
    s.first_row = taps.row[t] < s.first_row ? taps.row[t] : s.first_row;
    s.last_row = taps.row[t] > s.last_row ? taps.row[t] : s.last_row;
    s.first_column = taps.column[t] < s.first_column ? taps.column[t] : s.first_column;
    s.last_column = taps.column[t] > s.last_column ? taps.column[t] : s.last_column;
  }
  return s;
}

template <int Lanes>
DSCONV_INLINE int64_t row_pitch_of(const PlaneShape& shape, const TapSpan& s, int64_t columns, int64_t& phases,
                                   int64_t& phase_pitch) {
  const int64_t reach = s.last_column - s.first_column;
  phases = reach + 1 < shape.step_w ? reach + 1 : shape.step_w;
  phase_pitch = round_up(columns, Lanes) + reach / shape.step_w + Lanes;
  return phases * phase_pitch;
}

// How many output rows of `columns` fit a window with these taps; 0 where not even one does.
template <int Lanes>
DSCONV_INLINE int64_t rows_that_fit(const CpuPlan& plan, const PlaneShape& shape, const TapSpan& s, int64_t columns) {
  int64_t phases, phase_pitch;
  const int64_t pitch = row_pitch_of<Lanes>(shape, s, columns, phases, phase_pitch);
  const int64_t rows = (plan.window - Lanes) / pitch - (s.last_row - s.first_row);
  return rows < 1 ? 0 : (rows - 1) / shape.step_h + 1;
}

// The end of the chunk of taps from `begin` that fits a window for one row of `columns`: all, one kernel row, or less.
template <int Lanes>
static int64_t chunk_end(const CpuPlan& plan, const PlaneShape& shape, const PlaneTaps& taps, int64_t begin,
                         int64_t columns) {
  if (rows_that_fit<Lanes>(plan, shape, span_of(taps, begin, taps.count), columns) > 0) return taps.count;
  int64_t end = begin + 1;
  while (end < taps.count && taps.row[end] == taps.row[begin] &&
         rows_that_fit<Lanes>(plan, shape, span_of(taps, begin, end + 1), columns) > 0) {
    ++end;
  }
  return end;
}

// The end of the piece from flat position `begin`: as many rows as a window holds, or a part of a long row.
template <int Lanes>
static int64_t piece_end(const CpuPlan& plan, const PlaneShape& shape, const PlaneTaps& taps, int64_t begin,
                         int64_t end) {
  constexpr int64_t longest = 256;
  const int64_t row = begin / shape.out_w, row_end = (row + 1) * shape.out_w;
  int64_t rows = 1;
  if (shape.out_w <= longest && taps.count > 0) {
    rows = rows_that_fit<Lanes>(plan, shape, span_of(taps, 0, taps.count), shape.out_w);
  }
  int64_t last = rows > 1 ? (row + rows) * shape.out_w : row_end;
  if (rows <= 1 && begin + longest < last) last = begin + longest;
  return last < end ? last : end;
}

// For the outputs [begin, end) of an image, a piece as above, and taps [first, last). Does nothing where the window is
// prepared for them: whoever changes shape or taps sets w.begin to -1.
template <typename T>
static void prepare_window(const PlaneShape& shape, const PlaneTaps& taps, int64_t first, int64_t last, int64_t begin,
                           int64_t end, Window<T>& w) {
  constexpr int n = Vec<T>::n;
  if (w.begin == begin && w.end == end && w.first_tap == first && w.last_tap == last) return;
  w.begin = begin;
  w.end = end;
  w.first_tap = first;
  w.last_tap = last;
  const TapSpan s = span_of(taps, first, last);
  const int64_t top = begin / shape.out_w, bottom = (end - 1) / shape.out_w;
  const int64_t left = top == bottom ? begin - top * shape.out_w : 0;
  const int64_t columns = top == bottom ? end - begin : shape.out_w;
  w.row_pitch = row_pitch_of<n>(shape, s, columns, w.phases, w.phase_pitch);
  w.first_row = top * shape.step_h + s.first_row;
  w.rows = (bottom - top) * shape.step_h + s.last_row - s.first_row + 1;
  w.first_column = left * shape.step_w + s.first_column;
  w.width = (columns - 1) * shape.step_w + s.last_column - s.first_column + 1;
  zero_fill(w.buffer, w.rows * w.row_pitch);
  for (int64_t t = first; t < last; ++t) {
    const int64_t column = taps.column[t] - s.first_column;
    w.offset[t - first] = static_cast<int32_t>((taps.row[t] - s.first_row) * w.row_pitch +
                                               column % shape.step_w * w.phase_pitch + column / shape.step_w);
  }
  w.positions = 0;
  for (int64_t row = top; row <= bottom; ++row) {
    const int64_t from = row == top ? begin - top * shape.out_w : 0;
    const int64_t to = row == bottom ? end - bottom * shape.out_w : shape.out_w;
    for (int64_t column = from; column < to; column += n) {
      w.in[w.positions] = static_cast<int32_t>((row - top) * shape.step_h * w.row_pitch + column - left);
      w.out[w.positions] = static_cast<int32_t>(row * shape.out_w + column - begin);
      w.valid[w.positions++] = lanes_left(to - column, n);
    }
  }
}

template <typename S, typename T>
static void fill_window(const PlaneShape& shape, const S* plane, int64_t row_stride, Window<T>& w) {
  constexpr int n = Vec<T>::n;
  const int64_t step = shape.step_w;
  const int64_t from = w.first_column > 0 ? w.first_column : 0;
  const int64_t to = w.first_column + w.width < shape.in_w ? w.first_column + w.width : shape.in_w;
  if (from >= to) return;
  for (int64_t row = 0; row < w.rows; ++row) {
    const int64_t ih = w.first_row + row;
    if (ih < 0 || ih >= shape.in_h) continue;
    const S* x = plane + ih * row_stride;
    T* dst = w.buffer + row * w.row_pitch;
    if (step == 1) {
      copy_row(x + from, dst + from - w.first_column, to - from);
      continue;
    }
    for (int64_t phase = 0; phase < w.phases; ++phase) {
      // The first column of this phase that lies in the image.
      const int64_t ahead = from - w.first_column - phase;
      const int64_t index = ahead > 0 ? ceil_div(ahead, step) : 0;
      T* out = dst + phase * w.phase_pitch + index;
      int64_t iw = w.first_column + phase + index * step;
      if (step == 2) {
        for (; iw + 2 * n <= to; iw += 2 * n, out += n) vstore(out, veven(vload(x + iw), vload(x + iw + n)));
      }
      for (; iw < to; iw += step) *out++ = widen_one(x + iw);
    }
  }
}

// strip[out[i]...] = clamp(start + sum over taps), or += the sum where `accumulate`. Without it whole vectors are
// stored: lanes past a row's end are overwritten by the next row, and the strip has room for the last one's.
template <int U, typename T>
DSCONV_INLINE void convolve_positions(const Window<T>& w, int64_t i, int64_t taps, T start, bool accumulate,
                                      Clamp<T> clamp, T* strip) {
  typename Vec<T>::type acc[U];
  const T* in[U];
  DSCONV_UNROLL
  for (int u = 0; u < U; ++u) {
    in[u] = w.buffer + w.in[i + u];
    acc[u] = accumulate ? vload(strip + w.out[i + u]) : vset(start);
  }
  for (int64_t t = 0; t < taps; ++t) {
    const typename Vec<T>::type wt = vset(w.weight[t]);
    const int64_t offset = w.offset[t];
    DSCONV_UNROLL
    for (int u = 0; u < U; ++u) acc[u] = vfma(wt, vload(in[u] + offset), acc[u]);
  }
  DSCONV_UNROLL
  for (int u = 0; u < U; ++u) {
    T* out = strip + w.out[i + u];
    const typename Vec<T>::type v = vmin(vset(clamp.hi), vmax(vset(clamp.lo), acc[u]));
    if (accumulate && w.valid[i + u] < Vec<T>::n) {
      vstore(out, v, w.valid[i + u]);
    } else {
      vstore(out, v);
    }
  }
}

template <int U = 8, typename T>
static void convolve_window(const Window<T>& w, int64_t taps, T start, bool accumulate, Clamp<T> clamp, T* strip,
                            int64_t i = 0) {
  for (; i + U <= w.positions; i += U) {
    convolve_positions<U>(w, i, taps, start, accumulate, clamp, strip);
  }
  if constexpr (U > 1) {
    if (i < w.positions) convolve_window<U / 2>(w, taps, start, accumulate, clamp, strip, i);
  }
}
