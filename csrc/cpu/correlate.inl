// The depthwise weight gradient of nhwc tensors, vectors along the channels:
//
//   sums[i][j][c] += sum over a block of output pixels of x[oh * stride_h + i * dilation_h - pad_top,
//                                                           ow * stride_w + j * dilation_w - pad_left, c] * du[oh, ow,
//                                                           c]
//
// One vector of channels and a block of Rows x Cols taps at a time, the sums in registers for all pixels of the block:
//
//   x    . . . . . . . .      4 (or 7) values of du meet Rows rows of x; every value of x that is loaded meets all the
//        . . . . . . . .      taps of its row that read it. Rows outside the image cost a comparison, columns outside
//        . . . . . . . .      are loads of a vector of zeros.
//   du   . D D D D . . .
//
// With AVX-512, 3 x 3 taps and stride 1 take two rows of du together, each with sums of its own: a value of x meets the
// taps of both. Nine sums alone would wait for one another's additions.
//
// Without such neighbours (dilation, stride above 2, a rest of channels) a pixel at a time: one load a multiply-add.
#ifndef DSCONV_ISA
#error "correlate.inl belongs inside an ISA region"
#endif

#if DSCONV_ISA == DSCONV_ISA_AVX512
constexpr int kCorrelateSums = 26;  // of 32 registers
#else
constexpr int kCorrelateSums = 10;  // of 16
#endif
constexpr int taps_rows(int cols) {
  const int rows = kCorrelateSums / cols;
  return cols == 1 ? 5 : (rows < 1 ? 1 : (rows < cols ? rows : cols));
}

// Pixels at a time: widths of images are multiples of 7.
constexpr int correlate_pixels_at_once(int cols) { return DSCONV_ISA == DSCONV_ISA_AVX512 && cols == 3 ? 7 : 4; }

// The longest chain of additions, in pixels: rounding errors grow with it.
constexpr int64_t kLongestSum = 128;

// Rows whose sums make a chain: two rows are two.
DSCONV_INLINE int64_t rows_of_a_chain(int64_t width, bool pairs) {
  const int64_t rows = width < kLongestSum ? kLongestSum / width : 1;
  return pairs && width <= kLongestSum && rows % 2 != 0 ? rows + 1 : rows;
}

// Output pixels [row, row_end) x [column, column_end) of an image.
struct PixelBlock {
  int64_t row, row_end, column, column_end;
};

template <typename S, typename T>
struct Correlation {
  const Geometry* g;
  const S* x;  // of a slice, at the vector's channels
  int64_t x_row, x_column;
  const T* du;  // of a slice, at the vector's channels
  int64_t du_row, du_column;
  T* sums;                                // [kernel_h][kernel_w][lanes]
  int64_t tap_row, tap_rows, tap_column;  // the block of taps
  int left;                               // channels in the vector
};

// One pixel; row i of the block reads x + i * step, its taps `column_step` apart.
template <int Rows, int Cols, bool Tail, typename S, typename T, typename V>
DSCONV_INLINE void correlate_pixel(const S* x, int64_t row_step, int64_t column_step, const T* du, const Range& rows,
                                   const Range& cols, int left, V (&acc)[Rows][Cols]) {
  const V d = load_lanes<Tail>(du, left);
  DSCONV_UNROLL
  for (int i = 0; i < Rows; ++i) {
    if (i < rows.begin || i >= rows.end) continue;
    DSCONV_UNROLL
    for (int j = 0; j < Cols; ++j) {
      if (j < cols.begin || j >= cols.end) continue;
      acc[i][j] = vfma(load_lanes<Tail>(x + i * row_step + j * column_step, left), d, acc[i][j]);
    }
  }
}

// P pixels, Step columns of x apart, no dilation; x is the first tap's of the first pixel, in column `range.column`.
template <int Rows, int Cols, int Step, int P, Columns Where, typename S, typename T, typename V>
DSCONV_INLINE void correlate_pixels(const S* x, int64_t row_step, int64_t column_step, const T* du, int64_t du_step,
                                    const Range& rows, const ColumnRange& range, V (&acc)[Rows][Cols]) {
  V d[P];
  DSCONV_UNROLL
  for (int p = 0; p < P; ++p) d[p] = vload(du + p * du_step);
  DSCONV_UNROLL
  for (int i = 0; i < Rows; ++i) {
    if (i < rows.begin || i >= rows.end) continue;
    DSCONV_UNROLL
    for (int column = 0; column < (P - 1) * Step + Cols; ++column) {
      const V v = load_column<Where>(x + i * row_step + column * column_step, range, column);
      DSCONV_UNROLL
      for (int p = 0; p < P; ++p) {
        const int j = column - p * Step;
        if (j >= 0 && j < Cols) acc[i][j] = vfma(v, d[p], acc[i][j]);
      }
    }
  }
}

// A row of pixels [begin, end), those in [inside, inside_end) with all their taps inside the image.
template <int Rows, int Cols, int Step, int P, typename S, typename T, typename V>
DSCONV_INLINE void correlate_run_of_pixels(const Correlation<S, T>& in, const S* x, int64_t row_step, int64_t offset,
                                           const T* du, const Range& pixels, const Range& inside, const Range& rows,
                                           V (&acc)[Rows][Cols]) {
  int64_t ow = pixels.begin;
  for (; ow + P <= pixels.end; ow += P) {
    const S* from = x + ow * Step * in.x_column;
    const T* d = du + ow * in.du_column;
    const ColumnRange range = {offset + ow * Step, in.g->w_in, 0};
    if (all_outside<Cols, Step, P>(range, 0)) continue;
    if (ow >= inside.begin && ow + P <= inside.end) {
      correlate_pixels<Rows, Cols, Step, P, Columns::inside>(from, row_step, in.x_column, d, in.du_column, rows, range,
                                                             acc);
    } else {
      correlate_pixels<Rows, Cols, Step, P, Columns::edge>(from, row_step, in.x_column, d, in.du_column, rows, range,
                                                           acc);
    }
  }
  if constexpr (P > 1) {
    if (ow < pixels.end) {
      correlate_run_of_pixels<Rows, Cols, Step, (P > 4 ? 4 : P / 2)>(in, x, row_step, offset, du, {ow, pixels.end},
                                                                     inside, rows, acc);
    }
  }
}

// P pixels of each of two rows of du, of taps 3 x 3 and stride 1: row i of x meets taps of row i for the upper pixels
// and of row i - 1 for the lower.
template <int P, Columns Where, typename S, typename T, typename V>
DSCONV_INLINE void correlate_pixel_pairs(const S* x_row, int64_t row_step, int64_t column_step, const T* du,
                                         int64_t du_row, int64_t du_step, const Range& rows, const ColumnRange& range,
                                         V (&upper)[3][3], V (&lower)[3][3]) {
  DSCONV_UNROLL
  for (int i = 0; i < 4; ++i, x_row += row_step) {
    if (i < rows.begin || i >= rows.end) continue;
    const S* x = x_row;
    const T* d = du;
    V du_upper[P], du_lower[P];
    DSCONV_UNROLL
    for (int column = 0; column < P + 2; ++column) {
      if (column < P) {
        if (i < 3) du_upper[column < P ? column : 0] = vload(d);
        if (i > 0) du_lower[column < P ? column : 0] = vload(d + du_row);
        advance(d, du_step);
      }
      const V v = load_column<Where>(x, range, column);
      advance(x, column_step);
      DSCONV_UNROLL
      for (int j = 0; j < 3; ++j) {
        const int p = column - j;
        if (p < 0 || p >= P) continue;
        if (i < 3) upper[i < 3 ? i : 0][j] = vfma(v, du_upper[p], upper[i < 3 ? i : 0][j]);
        if (i > 0) lower[i > 0 ? i - 1 : 0][j] = vfma(v, du_lower[p], lower[i > 0 ? i - 1 : 0][j]);
      }
    }
  }
}

// Two rows of pixels, as correlate_run_of_pixels().
template <int P, typename S, typename T, typename V>
DSCONV_INLINE void correlate_run_of_pairs(const Correlation<S, T>& in, const S* x, int64_t row_step, int64_t offset,
                                          const T* du, const Range& pixels, const Range& inside, const Range& rows,
                                          V (&upper)[3][3], V (&lower)[3][3]) {
  int64_t ow = pixels.begin;
  for (; ow + P <= pixels.end; ow += P) {
    const S* from = x + ow * in.x_column;
    const T* d = du + ow * in.du_column;
    const ColumnRange range = {offset + ow, in.g->w_in, 0};
    if (ow >= inside.begin && ow + P <= inside.end) {
      correlate_pixel_pairs<P, Columns::inside>(from, row_step, in.x_column, d, in.du_row, in.du_column, rows, range,
                                                upper, lower);
    } else {
      correlate_pixel_pairs<P, Columns::edge>(from, row_step, in.x_column, d, in.du_row, in.du_column, rows, range,
                                              upper, lower);
    }
  }
  if constexpr (P > 1) {
    if (ow < pixels.end) {
      correlate_run_of_pairs<(P > 4 ? 4 : P / 2)>(in, x, row_step, offset, du, {ow, pixels.end}, inside, rows, upper,
                                                  lower);
    }
  }
}

DSCONV_INLINE bool correlates_pairs(const Geometry& g) {
  return DSCONV_ISA == DSCONV_ISA_AVX512 && g.kernel_h == 3 && g.kernel_w == 3 && g.stride_h == 1 && g.stride_w == 1 &&
         g.dilation_h == 1 && g.dilation_w == 1;
}

// 3 x 3 taps for an even number of rows.
template <typename S, typename T>
static void correlate_row_pairs(const Correlation<S, T>& in, const PixelBlock& block) {
  typedef typename Vec<T>::type V;
  constexpr int n = Vec<T>::n;
  const Geometry& g = *in.g;
  const Range inside = {valid_outputs(-g.pad_left, 1, g.w_in, block.column_end).begin,
                        valid_outputs(2 - g.pad_left, 1, g.w_in, block.column_end).end};
  V upper[3][3], lower[3][3];
  DSCONV_UNROLL
  for (int i = 0; i < 9; ++i) upper[i / 3][i % 3] = lower[i / 3][i % 3] = vset(T(0));
  for (int64_t oh = block.row; oh < block.row_end; oh += 2) {
    const int64_t top = oh - g.pad_top;
    const Range rows = valid_taps(top, 1, g.h_in, 4);
    correlate_run_of_pairs<7>(in, in.x + top * in.x_row - g.pad_left * in.x_column, in.x_row, -g.pad_left,
                              in.du + oh * in.du_row, {block.column, block.column_end}, inside, rows, upper, lower);
  }
  DSCONV_UNROLL
  for (int i = 0; i < 9; ++i) {
    vstore(in.sums + i * n, vload(in.sums + i * n) + (upper[i / 3][i % 3] + lower[i / 3][i % 3]));
  }
}

// Step > 0: stride_w, no dilation along w; 0: whatever they are.
template <int Cols, int Step, bool Tail, typename S, typename T>
static void correlate_taps_block(const Correlation<S, T>& in, const PixelBlock& block) {
  typedef typename Vec<T>::type V;
  constexpr int n = Vec<T>::n, Rows = taps_rows(Cols);
  const Geometry& g = *in.g;
  const int64_t offset = in.tap_column * g.dilation_w - g.pad_left;
  // All taps are inside from the first pixel of the first one to the last pixel of the last one.
  const int64_t begin = valid_outputs(offset, g.stride_w, g.w_in, block.column_end).begin;
  const int64_t end = valid_outputs(offset + (Cols - 1) * g.dilation_w, g.stride_w, g.w_in, block.column_end).end;
  const int64_t row_step = g.dilation_h * in.x_row, column_step = g.dilation_w * in.x_column;
  const int64_t pixel_step = g.stride_w * in.x_column;
  V acc[Rows][Cols];
  DSCONV_UNROLL
  for (int i = 0; i < Rows; ++i) {
    DSCONV_UNROLL
    for (int j = 0; j < Cols; ++j) acc[i][j] = vset(T(0));
  }
  for (int64_t oh = block.row; oh < block.row_end; ++oh) {
    const int64_t top = oh * g.stride_h - g.pad_top + in.tap_row * g.dilation_h;
    const Range rows = valid_taps(top, g.dilation_h, g.h_in, in.tap_rows);
    if (rows.begin >= rows.end) continue;
    const T* du = in.du + oh * in.du_row;
    const S* x = in.x + top * in.x_row + offset * in.x_column;
    if constexpr (Step > 0 && !Tail) {
      correlate_run_of_pixels<Rows, Cols, Step, correlate_pixels_at_once(Cols)>(
          in, x, row_step, offset, du, {block.column, block.column_end}, {begin, end}, rows, acc);
    } else {
      for (int64_t ow = block.column; ow < block.column_end; ++ow) {
        const Range cols = valid_taps(offset + ow * g.stride_w, g.dilation_w, g.w_in, Cols);
        correlate_pixel<Rows, Cols, Tail>(x + ow * pixel_step, row_step, column_step, du + ow * in.du_column, rows,
                                          cols, in.left, acc);
      }
    }
  }
  DSCONV_UNROLL
  for (int i = 0; i < Rows; ++i) {
    if (i >= in.tap_rows) break;
    T* to = in.sums + ((in.tap_row + i) * g.kernel_w + in.tap_column) * n;
    DSCONV_UNROLL
    for (int j = 0; j < Cols; ++j) vstore(to + j * n, vload(to + j * n) + acc[i][j]);
  }
}

// All rows of the kernel for Cols of its columns.
template <int Cols, typename S, typename T>
static void correlate_columns(Correlation<S, T>& in, const PixelBlock& block) {
  const Geometry& g = *in.g;
  constexpr int rows = taps_rows(Cols);
  const bool dense = g.dilation_w == 1 && in.left == Vec<T>::n;
  for (in.tap_row = 0; in.tap_row < g.kernel_h; in.tap_row += rows) {
    in.tap_rows = g.kernel_h - in.tap_row < rows ? g.kernel_h - in.tap_row : rows;
    if (in.left < Vec<T>::n) {
      correlate_taps_block<Cols, 0, true>(in, block);
    } else if (Cols >= 3 && dense && g.stride_w == 1) {
      correlate_taps_block<Cols, Cols >= 3 ? 1 : 0, false>(in, block);
    } else if ((Cols == 3 || Cols == 5) && dense && g.stride_w == 2) {
      correlate_taps_block<Cols, Cols == 3 || Cols == 5 ? 2 : 0, false>(in, block);
    } else {
      correlate_taps_block<Cols, 0, false>(in, block);
    }
  }
}

// All taps: in.sums += the correlation over the block's pixels.
template <typename S, typename T>
static void correlate_vector(Correlation<S, T>& in, PixelBlock block) {
  if constexpr (DSCONV_ISA == DSCONV_ISA_AVX512) {
    const int64_t paired = (block.row_end - block.row) / 2 * 2;
    if (paired > 0 && in.left == Vec<T>::n && correlates_pairs(*in.g)) {
      correlate_row_pairs(in, {block.row, block.row + paired, block.column, block.column_end});
      block.row += paired;
      if (block.row == block.row_end) return;
    }
  }
  const int64_t taps = in.g->kernel_w;
  for (in.tap_column = 0; in.tap_column < taps;) {
    const int64_t left = taps - in.tap_column;
    if (left >= 8) {
      correlate_columns<8>(in, block);
      in.tap_column += 8;
    } else if (left == 7) {
      correlate_columns<7>(in, block);
      in.tap_column += 7;
    } else if (left >= 5) {
      correlate_columns<5>(in, block);
      in.tap_column += 5;
    } else if (left >= 3) {
      correlate_columns<3>(in, block);
      in.tap_column += 3;
    } else {
      correlate_columns<1>(in, block);
      in.tap_column += 1;
    }
  }
}
