// z of a tile of whole rows where x is nchw and z is kept as it is, [channel][pixels]: lanes are pixels, nothing turns.
//
// A block is R rows of U vectors of outputs: each of its (R - 1) * step + K rows of x is loaded once for all outputs
// that it meets, and for all taps, of which those beside the middle one take it shifted by a lane, or where that takes
// longer (kSingleTaps) once for each tap. Columns outside the image are lanes masked off, rows outside are a row of
// zeros. So x is read where it lies; while a channel is summed, the lines of one to come are asked for. In 3-D a block
// goes through the slices of x that it reads, each with its plane of taps.
//
// For kernels whose planes of taps are 3 x 3 of step 1 and 2, or with AVX-512 5 x 5 of step 2, with no dilation and no
// multiplier (cpu_plan.h: planes_pay).
#ifndef DSCONV_ISA
#error "depthwise_planes.inl belongs inside an ISA region"
#endif

// One channel of a tile: `count` rows of `columns` outputs, densely to `out`.
template <typename S>
struct PlaneRows {
  typedef typename ComputeOf<S>::type T;
  const S**
      row;  // of each slice the one that the outputs' first taps lie in, and all after it; zeros outside the image
  int64_t slices, slice_rows;
  int64_t in_w, first_column;  // of x, and of the first output's first tap
  int64_t count, columns;
  int64_t to_next;  // to the plane of the channel that comes next, whose lines are asked for
  T weight[25];     // of the only slice
  T* weights;       // else of all, [slice][K * K]
  T start;
  Clamp<T> clamp;
  T* out;
};

// What a block reads of a row: vectors from the column of its first output's middle tap on, one behind another, and the
// single columns beside them. Which lanes, and which of these, lie inside the image.
template <int K, int Step, int U, typename T>
struct ColumnMasks {
  typename Vec<T>::mask at[U * Step];
  bool before[2], after;            // before: one and two columns
  typename Vec<T>::mask tap[K][U];  // of step 1: what each tap reads by itself
};
// Of a vector of columns from `column` on: those inside an image of `width` columns.
template <typename T>
DSCONV_INLINE typename Vec<T>::mask lanes_inside(int64_t column, int64_t width) {
  const int64_t before = column < 0 ? -column : 0, inside = width > column ? width - column : 0;
  return lanes_between<T>(lanes_left(before, Vec<T>::n), lanes_left(inside, Vec<T>::n));
}
// column: of the first output's first tap.
template <int K, int Step, int U, typename T>
DSCONV_INLINE void fill_masks(int64_t column, int64_t width, ColumnMasks<K, Step, U, T>& masks) {
  constexpr int n = Vec<T>::n;
  const int64_t middle = column + K / 2, behind = middle + U * Step * n;
  for (int v = 0; v < U * Step; ++v) masks.at[v] = lanes_inside<T>(middle + v * n, width);
  for (int j = 0; Step == 1 && j < K; ++j) {
    for (int u = 0; u < U; ++u) masks.tap[j][u] = lanes_inside<T>(column + j + u * n, width);
  }
  for (int i = 0; i < 2; ++i) masks.before[i] = middle - 1 - i >= 0 && middle - 1 - i < width;
  masks.after = behind >= 0 && behind < width;
}

// A vector of which only the lane next to those that are wanted matters: one column of the image, or zero.
template <bool Edge, typename S>
DSCONV_INLINE auto load_beside(const S* at, bool inside) {
  typedef typename ComputeOf<S>::type T;
  return vset(Edge && !inside ? T(0) : widen_one(at));
}

// The vectors x[j] of the taps of a row, of which the first output's first tap reads *row. What is loaded once serves
// all taps: a tap to the left reads a lane further left.
template <int K, int Step, int U, bool Edge, typename S, typename T>
DSCONV_INLINE void load_taps(const S* row, const ColumnMasks<K, Step, U, T>& masks, typename Vec<T>::type (&x)[K][U]) {
  typedef typename Vec<T>::type V;
  constexpr int n = Vec<T>::n, kMiddle = K / 2;
  const S* const middle = row + kMiddle;
  V v[U * Step];
  DSCONV_UNROLL
  for (int i = 0; i < U * Step; ++i) {
    if constexpr (Edge) {
      v[i] = vload_lanes(middle + i * n, masks.at[i]);
    } else {
      v[i] = vload(middle + i * n);
    }
  }
  const V before = load_beside<Edge>(middle - 1, masks.before[0]);
  if constexpr (Step == 1) {
    static_assert(K == 3, "two taps beside the middle");
    const V after = load_beside<Edge>(middle + U * n, masks.after);
    DSCONV_UNROLL
    for (int u = 0; u < U; ++u) {
      x[0][u] = vbehind(u > 0 ? v[u - 1] : before, v[u]);
      x[1][u] = v[u];
      x[2][u] = vahead(v[u], u + 1 < U ? v[u + 1] : after);
    }
  } else {
    DSCONV_UNROLL
    for (int u = 0; u < U; ++u) {
      x[kMiddle][u] = veven(v[2 * u], v[2 * u + 1]);
      x[kMiddle + 1][u] = vodd(v[2 * u], v[2 * u + 1]);
      x[kMiddle - 1][u] = vbehind(u > 0 ? x[kMiddle + 1][u - 1] : before, x[kMiddle + 1][u]);
    }
    if constexpr (K == 5) {
      const V two_before = load_beside<Edge>(middle - 2, masks.before[1]);
      const V after = load_beside<Edge>(middle + 2 * U * n, masks.after);
      DSCONV_UNROLL
      for (int u = 0; u < U; ++u) {
        x[0][u] = vbehind(u > 0 ? x[kMiddle][u - 1] : two_before, x[kMiddle][u]);
        x[4][u] = vahead(x[kMiddle][u], u + 1 < U ? x[kMiddle][u + 1] : after);
      }
    }
  }
}

// The same of step 1, each tap by itself: where the loop over slices takes registers, or there are only 16, the shifts
// are what costs more, 1.02 to 1.3 of the time of X3D's layers, with AVX2 1.02 of those of 2-D.
template <bool Deep>
constexpr bool kSingleTaps = Deep || DSCONV_ISA == DSCONV_ISA_AVX2;
template <int K, int U, bool Edge, typename S, typename T>
DSCONV_INLINE void load_single_taps(const S* row, const ColumnMasks<K, 1, U, T>& masks,
                                    typename Vec<T>::type (&x)[K][U]) {
  DSCONV_UNROLL
  for (int j = 0; j < K; ++j) {
    DSCONV_UNROLL
    for (int u = 0; u < U; ++u) {
      const S* const at = row + j + u * Vec<T>::n;
      if constexpr (Edge) {
        x[j][u] = vload_lanes(at, masks.tap[j][u]);
      } else {
        x[j][u] = vload(at);
      }
    }
  }
}

// The taps of one slice. from: the rows that they read, of which the first output's first tap reads `in_column`.
template <int K, int Step, bool Deep, int R, int U, bool Edge, typename S, typename T, typename V>
DSCONV_INLINE void add_plane_taps(const S* const* from, int64_t in_column, int64_t to_next, const T* weight,
                                  const ColumnMasks<K, Step, U, T>& masks, V (&acc)[R][U]) {
  DSCONV_UNROLL
  for (int i = 0; i < (R - 1) * Step + K; ++i) {
    const S* in = from[i] + in_column;
    DSCONV_UNROLL
    for (int v = 0; v < U * Step; v += kVectorsOfLine<S>) __builtin_prefetch(in + to_next + v * Vec<T>::n, 0, 3);
    V x[K][U];
    if constexpr (kSingleTaps<Deep> && Step == 1) {
      load_single_taps<K, U, Edge>(in, masks, x);
    } else {
      load_taps<K, Step, U, Edge>(in, masks, x);
    }
    DSCONV_UNROLL
    for (int j = 0; j < K; ++j) {
      DSCONV_UNROLL
      for (int r = 0; r < R; ++r) {
        const int tap = i - r * Step;
        if (tap < 0 || tap >= K) continue;
        const V w = vset(weight[tap * K + j]);
        DSCONV_UNROLL
        for (int u = 0; u < U; ++u) acc[r][u] = vfma(w, x[j][u], acc[r][u]);
      }
    }
  }
}

// last: lanes in use of the last vector. Deep: of p.slices slices; else of one.
template <int K, int Step, bool Deep, int R, int U, bool Edge, typename S, typename T>
DSCONV_INLINE void convolve_block(const PlaneRows<S>& p, int64_t row, int64_t column,
                                  const ColumnMasks<K, Step, U, T>& masks, int last) {
  typedef typename Vec<T>::type V;
  constexpr int n = Vec<T>::n;
  V acc[R][U];
  DSCONV_UNROLL
  for (int r = 0; r < R; ++r) {
    DSCONV_UNROLL
    for (int u = 0; u < U; ++u) acc[r][u] = vset(p.start);
  }
  const S* const* from = p.row + row * Step;
  const int64_t in_column = p.first_column + column * Step;
  if constexpr (Deep) {
    const T* weight = p.weights;
    for (int64_t slice = 0; slice < p.slices; ++slice, from += p.slice_rows, weight += K * K) {
      add_plane_taps<K, Step, Deep, R, U, Edge>(from, in_column, p.to_next, weight, masks, acc);
    }
  } else {
    add_plane_taps<K, Step, Deep, R, U, Edge>(from, in_column, p.to_next, p.weight, masks, acc);
  }
  T* out = p.out + row * p.columns + column;
  DSCONV_UNROLL
  for (int r = 0; r < R; ++r) {
    DSCONV_UNROLL
    for (int u = 0; u < U; ++u) {
      const V v = vmin(vset(p.clamp.hi), vmax(vset(p.clamp.lo), acc[r][u]));
      if (u < U - 1 || last == n) {
        vstore(out + u * n, v);
      } else {
        vstore(out + u * n, v, last);
      }
    }
    advance(out, p.columns);
  }
}

// All rows of U vectors of outputs.
template <int K, int Step, bool Deep, int U, bool Edge, typename S>
static void convolve_columns(const PlaneRows<S>& p, int64_t column) {
  typedef typename ComputeOf<S>::type T;
  constexpr int kRows = 4;  // what is unrolled: kRows * K * K * U multiply-adds
  ColumnMasks<K, Step, U, T> masks;
  if constexpr (Edge) fill_masks(p.first_column + column * Step, p.in_w, masks);
  const int last = lanes_left(p.columns - column - (U - 1) * Vec<T>::n, Vec<T>::n);
  int64_t row = 0;
  for (; row + kRows <= p.count; row += kRows)
    convolve_block<K, Step, Deep, kRows, U, Edge>(p, row, column, masks, last);
  for (; row < p.count; ++row) convolve_block<K, Step, Deep, 1, U, Edge>(p, row, column, masks, last);
}

template <int K, int Step, bool Deep, typename S>
static void convolve_plane_rows(const PlaneRows<S>& p) {
  constexpr int n = Vec<typename ComputeOf<S>::type>::n;
  for (int64_t c = 0; c < p.columns; c += 2 * n) {
    const int64_t begin = p.first_column + c * Step, end = begin + 2 * n * Step + K - 1;
    if (p.columns - c <= n) {
      convolve_columns<K, Step, Deep, 1, true>(p, c);
    } else if (begin >= 0 && end <= p.in_w) {
      convolve_columns<K, Step, Deep, 2, false>(p, c);
    } else {
      convolve_columns<K, Step, Deep, 2, true>(p, c);
    }
  }
}

template <bool Deep, typename S>
static void convolve_plane_rows(const Geometry& g, const PlaneRows<S>& p) {
  if constexpr (kWidestByPlanes<S> >= 5) {
    if (g.kernel_w == 5) return convolve_plane_rows<5, 2, Deep>(p);
  }
  g.stride_w == 1 ? convolve_plane_rows<3, 1, Deep>(p) : convolve_plane_rows<3, 2, Deep>(p);
}

// 2-D has code of its own, which goes as one piece over the channels with nothing that a store could change: a loop
// over one slice, or a part of it that is called, costs it 5 to 20 %.
template <bool Deep, typename S, typename T, typename M>
static void depthwise_planes_of(const DepthwiseInput<S>& of, int64_t slice, int64_t begin, int64_t end, Clamp<T> clamp,
                                M* z, int64_t z_ld, T* memory) {
  // Of outputs: a plane is asked for while as many are summed as take longer than memory does.
  constexpr int64_t kAhead = 512, kMostAhead = 4;
  const Geometry& g = *of.g;
  const int64_t depth = slice % g.d_out * g.stride_d - g.pad_front;
  const Range taps_d = Deep ? valid_taps(depth, g.dilation_d, g.d_in, g.kernel_d) : Range{0, 1};
  const S* const x = of.x + slice / g.d_out * of.stride.n + (depth + taps_d.begin * g.dilation_d) * of.stride.d;
  zero_fill(memory, g.w_in);
  const S* const zeros = reinterpret_cast<const S*>(memory);
  PlaneRows<S> rows = {};
  rows.in_w = g.w_in, rows.first_column = -g.pad_left;
  rows.count = (end - begin) / g.w_out, rows.columns = g.w_out;
  rows.clamp = clamp;
  const int64_t top = begin / g.w_out * g.stride_h - g.pad_top;
  const int64_t in_rows = (rows.count - 1) * g.stride_h + g.kernel_h;
  rows.slices = taps_d.end - taps_d.begin, rows.slice_rows = in_rows;
  rows.row = reinterpret_cast<const S**>(memory + round_up(g.w_in, Vec<T>::n));
  rows.weights = reinterpret_cast<T*>(rows.row + g.kernel_d * in_rows);
  [[maybe_unused]] T* const pair = rows.weights + of.plan->taps;  // [2][z_ld]: z of channels that are to be a pair
  const Range inside = valid_taps(top, 1, g.h_in, in_rows);
  const int64_t slice_taps = of.plan->slice_taps, taps = rows.slices * slice_taps;
  const int64_t ahead = clamp64(ceil_div(kAhead, (end - begin) * g.kernel_d), 1, kMostAhead);
  for (int64_t i = 0; i < rows.slices * in_rows; ++i) rows.row[i] = zeros;
  for (int64_t k = 0; k < g.c_in; ++k) {
    const S* plane = x + k * of.stride.c + top * of.stride.h;
    for (int64_t s = 0; s < rows.slices; ++s, plane += g.dilation_d * of.stride.d) {
      for (int64_t i = inside.begin; i < inside.end; ++i) rows.row[s * in_rows + i] = plane + i * of.stride.h;
    }
    const T* const weight = of.weight + taps_d.begin * slice_taps * of.plan->mid_columns + k;
    T* const weights = Deep ? rows.weights : rows.weight;
    for (int64_t t = 0; t < taps; ++t) weights[t] = weight[t * of.plan->mid_columns];
    rows.to_next = k + ahead < g.c_in ? ahead * of.stride.c : 0;
    rows.start = of.bias[k];
    if constexpr (SameType<M, T>::value) {
      rows.out = z + k * z_ld;
      convolve_plane_rows<Deep>(g, rows);
    } else {
      rows.out = pair + k % 2 * z_ld;
      convolve_plane_rows<Deep>(g, rows);
      if (k % 2 != 0 || k + 1 == g.c_in) zip_pixels(pair, z_ld, k % 2 + 1, end - begin, z + k / 2 * z_ld, z_ld);
    }
  }
}

// z[k][i] of the outputs [begin, end) of slice n * d_out + od, whole rows, i from 0 on and z_ld elements from one k to
// the next. M: the compute type, or pairs of bf16, of channels 2 k and 2 k + 1, the last one's partner zero.
// memory: plan_detail::planes_memory() elements, for a row of zeros, a pointer to each row that the tile reads and the
// weights of a channel; for pairs 2 z_ld more.
template <typename S, typename T, typename M>
static void depthwise_planes(const DepthwiseInput<S>& of, int64_t slice, int64_t begin, int64_t end, Clamp<T> clamp,
                             M* z, int64_t z_ld, T* memory) {
  if (is_flat(*of.g)) return depthwise_planes_of<false>(of, slice, begin, end, clamp, z, z_ld, memory);
  depthwise_planes_of<true>(of, slice, begin, end, clamp, z, z_ld, memory);
}
