// A row of grad_x where the stride is 2, vectors along the channels, and the kernel's columns have no dilation:
//
//   grad_x[iw] = sum over rows (du row, weight row) and columns j with 2 * ow + j - pad_left == iw of
//                weight[row][j] * du[row][ow]
//
//   du       d-1  d  d+1 ...          kGradOutputs sums in registers: du column d meets them at q = 2 * d + j, so each
//   of sums   0 1 2 3 4 5 ...            its values is loaded once for all columns of the kernel
//
// At the ends of a row, columns of du outside of it are loads of a vector of zeros, and sums outside are not stored.
// All channels of a group of pixels come before the next group: grad_x is written from front to back, in whole pixels.
#ifndef DSCONV_ISA
#error "grad_row.inl belongs inside an ISA region"
#endif

constexpr int kGradKernelRows = 15;  // kernel_d * kernel_h of what goes this way, such as 3 x 5 x 5

// Sums at a time: widths of images are multiples of 7.
constexpr int kGradOutputs = DSCONV_ISA == DSCONV_ISA_AVX512 ? 14 : 8;

// The rows of du that reach a row of grad_x, and the kernel's rows that connect them.
template <typename T>
struct GradRow {
  int64_t rows;
  const T* du[kGradKernelRows];
  const T* weight[kGradKernelRows];
  int64_t du_column, weight_column;
  int64_t du_panel;       // from one panel of du_column channels to the next
  int64_t planes, plane;  // z channels for each channel of x
  int64_t w_in, w_out, pad;
  Stores stores;
};

template <int Taps, Columns Where, typename T>
DSCONV_INLINE void grad_group(const GradRow<T>& row, int64_t c, int64_t du_offset, int64_t base, int left, T* grad,
                              int64_t step) {
  typedef typename Vec<T>::type V;
  constexpr int kColumns = kGradOutputs / 2, kBefore = (Taps - 1) / 2;
  const ColumnRange range = {base, row.w_out, left};
  T* to = grad + (base * 2 - row.pad) * step + c;
  if (row.stores == Stores::ahead) ask_for_next<kGradOutputs>(to - c, c / Vec<T>::n, row.plane, step);
  V acc[kGradOutputs];
  DSCONV_UNROLL
  for (int q = 0; q < kGradOutputs; ++q) acc[q] = vset(T(0));
  for (int64_t plane = 0; plane < row.planes; ++plane) {
    const int64_t k = plane * row.plane + c;
    for (int64_t i = 0; i < row.rows; ++i) {
      const T* weight = row.weight[i] + k;
      const T* du = row.du[i] + k + du_offset + (base - kBefore) * row.du_column;
      V w[Taps];
      DSCONV_UNROLL
      for (int j = 0; j < Taps; ++j) {
        w[j] = load_lanes<Where == Columns::rest>(weight, left);
        advance(weight, row.weight_column);
      }
      DSCONV_UNROLL
      for (int d = -kBefore; d < kColumns; ++d) {
        const V v = load_column<Where>(du, range, d);
        advance(du, row.du_column);
        DSCONV_UNROLL
        for (int j = 0; j < Taps; ++j) {
          const int q = 2 * d + j;
          if (q >= 0 && q < kGradOutputs) acc[q] = vfma(w[j], v, acc[q]);
        }
      }
    }
  }
  const int64_t first = base * 2 - row.pad;
  DSCONV_UNROLL
  for (int q = 0; q < kGradOutputs; ++q) {
    if (Where == Columns::inside || (first + q >= 0 && first + q < row.w_in)) {
      if constexpr (Where == Columns::rest) {
        vstore(to, acc[q], left);
      } else {
        vstore_as(row.stores, to, acc[q]);
      }
    }
    advance(to, step);
  }
}

template <int Taps, typename T>
static void grad_row_taps(const GradRow<T>& row, int64_t channels, T* grad, int64_t step) {
  constexpr int n = Vec<T>::n;
  constexpr int kColumns = kGradOutputs / 2, kBefore = (Taps - 1) / 2;
  for (int64_t base = row.pad / 2; base * 2 - row.pad < row.w_in; base += kColumns) {
    const int64_t first = base * 2 - row.pad;
    const bool inside =
        first >= 0 && first + kGradOutputs <= row.w_in && base >= kBefore && base + kColumns <= row.w_out;
    for (int64_t c = 0, panel = 0; c < channels; ++panel) {
      const int64_t end = channels - c < row.du_column ? channels : c + row.du_column;
      const int64_t du_offset = panel * (row.du_panel - row.du_column);
      for (; inside && c + n <= end; c += n) grad_group<Taps, Columns::inside>(row, c, du_offset, base, n, grad, step);
      for (; c + n <= end; c += n) grad_group<Taps, Columns::edge>(row, c, du_offset, base, n, grad, step);
      if (c < end) {
        grad_group<Taps, Columns::rest>(row, c, du_offset, base, static_cast<int>(end - c), grad, step);
        c = end;
      }
    }
  }
}

DSCONV_INLINE bool has_grad_row(const Geometry& g) {
  return g.stride_w == 2 && g.dilation_w == 1 && g.kernel_d * g.kernel_h <= kGradKernelRows &&
         (g.kernel_w == 3 || g.kernel_w == 5);
}

// Channels from the row's pointers on.
template <typename T>
static void grad_row(const Geometry& g, const GradRow<T>& row, int64_t channels, T* grad, int64_t step) {
  if (g.kernel_w == 3) {
    grad_row_taps<3>(row, channels, grad, step);
  } else {
    grad_row_taps<5>(row, channels, grad, step);
  }
}
