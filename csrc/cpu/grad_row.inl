// A row of grad_x, nhwc, vectors along the channels, where the kernel's columns have no dilation:
//
//   grad_x[iw] = sum over rows (du row, weight row) and columns j with Step * ow + j - pad_left == iw of
//                weight[row][j] * du[row][ow]
//
//   du       d-1  d  d+1 ...          kOutputs sums in registers: du column d meets them at q = Step * d + j, so each
//   of sums   0 1 2 3 4 5 ...            its values is loaded once for all columns of the kernel
//
// At the ends of a row, columns of du and sums outside of it cost a comparison each. All channels of a group of pixels
// come before the next group: grad_x is written from front to back, in whole pixels.
#ifndef DSCONV_ISA
#error "grad_row.inl belongs inside an ISA region"
#endif

constexpr int kGradKernelRows = 8;  // the tallest kernel that goes this way

// Sums at a time: widths of images are multiples of 7.
constexpr int grad_outputs(int step) { return DSCONV_ISA == DSCONV_ISA_AVX512 || step == 1 ? 7 * step : 4 * step; }

// The rows of du that reach a row of grad_x, and the kernel's rows that connect them.
template <typename T>
struct GradRow {
  int64_t rows;
  const T* du[kGradKernelRows];
  const T* weight[kGradKernelRows];
  int64_t du_column, du_panel, weight_column;  // du_panel: from one panel of du_column channels to the next
  int64_t planes, du_plane, weight_plane;      // z channels for each channel of x
  int64_t w_in, w_out, pad;
};

template <int Taps, int Step, bool Edge, bool Tail, typename S, typename T>
DSCONV_INLINE void grad_group(const GradRow<T>& row, int64_t c, int64_t base, int left, S* grad, int64_t grad_step) {
  const int64_t du_offset = c / row.du_column * row.du_panel + c % row.du_column + base * row.du_column;
  typedef typename Vec<T>::type V;
  constexpr int kOutputs = grad_outputs(Step), kColumns = kOutputs / Step, kBefore = (Taps - 1) / Step;
  V acc[kOutputs];
  DSCONV_UNROLL
  for (int q = 0; q < kOutputs; ++q) acc[q] = vset(T(0));
  for (int64_t plane = 0; plane < row.planes; ++plane) {
    for (int64_t i = 0; i < row.rows; ++i) {
      const T* weight = row.weight[i] + plane * row.weight_plane + c;
      const T* du = row.du[i] + plane * row.du_plane + du_offset;
      V w[Taps];
      DSCONV_UNROLL
      for (int j = 0; j < Taps; ++j) w[j] = load_lanes<Tail>(weight + j * row.weight_column, left);
      DSCONV_UNROLL
      for (int d = -kBefore; d < kColumns; ++d) {
        if (Edge && (base + d < 0 || base + d >= row.w_out)) continue;
        const V v = load_lanes<Tail>(du + d * row.du_column, left);
        DSCONV_UNROLL
        for (int j = 0; j < Taps; ++j) {
          const int q = Step * d + j;
          if (q >= 0 && q < kOutputs) acc[q] = vfma(w[j], v, acc[q]);
        }
      }
    }
  }
  const int64_t first = base * Step - row.pad;
  DSCONV_UNROLL
  for (int q = 0; q < kOutputs; ++q) {
    if (Edge && (first + q < 0 || first + q >= row.w_in)) continue;
    S* to = grad + (first + q) * grad_step + c;
    if constexpr (Tail) {
      vstore(to, acc[q], left);
    } else {
      vstore(to, acc[q]);
    }
  }
}

template <int Taps, int Step, typename S, typename T>
static void grad_row_taps(const GradRow<T>& row, int64_t channels, S* grad, int64_t grad_step) {
  constexpr int n = Vec<T>::n;
  constexpr int kColumns = grad_outputs(Step) / Step, kBefore = (Taps - 1) / Step;
  for (int64_t base = row.pad / Step; base * Step - row.pad < row.w_in; base += kColumns) {
    const int64_t first = base * Step - row.pad;
    const bool inside =
        first >= 0 && first + kColumns * Step <= row.w_in && base >= kBefore && base + kColumns <= row.w_out;
    int64_t c = 0;
    for (; inside && c + n <= channels; c += n) {
      grad_group<Taps, Step, false, false>(row, c, base, n, grad, grad_step);
    }
    for (; c + n <= channels; c += n) grad_group<Taps, Step, true, false>(row, c, base, n, grad, grad_step);
    if (c < channels) {
      grad_group<Taps, Step, true, true>(row, c, base, static_cast<int>(channels - c), grad, grad_step);
    }
  }
}

DSCONV_INLINE bool has_grad_row(const Geometry& g) {
  const int64_t taps = g.kernel_w, step = g.stride_w;
  return g.dilation_w == 1 && g.kernel_h <= kGradKernelRows &&
         (step == 1 ? taps == 3 || taps == 5 || taps == 7 : step == 2 && (taps == 3 || taps == 5));
}

// Channels from the row's pointers on.
template <typename S, typename T>
static void grad_row(const Geometry& g, const GradRow<T>& row, int64_t channels, S* grad, int64_t grad_step) {
  if (g.stride_w == 1 && g.kernel_w == 3) {
    grad_row_taps<3, 1>(row, channels, grad, grad_step);
  } else if (g.stride_w == 1 && g.kernel_w == 5) {
    grad_row_taps<5, 1>(row, channels, grad, grad_step);
  } else if (g.stride_w == 1) {
    grad_row_taps<7, 1>(row, channels, grad, grad_step);
  } else if (g.kernel_w == 3) {
    grad_row_taps<3, 2>(row, channels, grad, grad_step);
  } else {
    grad_row_taps<5, 2>(row, channels, grad, grad_step);
  }
}
