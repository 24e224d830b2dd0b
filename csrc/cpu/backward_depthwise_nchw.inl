// Stage D of backward where x is nchw: backward_depthwise.inl says what it computes. Here vectors run along w, through
// the windows of plane.inl, and a task has plan.plane_block channels, so the weight gradient needs no partial sums.
//
// grad_x: the positions of one residue class modulo the stride are a plain convolution of du with the taps that reach
// them. A class is summed in a strip, which is then spread over the rows of grad_x.
#ifndef DSCONV_ISA
#error "backward_depthwise_nchw.inl belongs inside an ISA region"
#endif

// Positions first, first + stride, ... of an axis, those with (position + pad) % stride == residue.
struct ResidueClass {
  int64_t first, count;
};
DSCONV_INLINE ResidueClass residue_class(int64_t residue, int64_t pad, int64_t stride, int64_t extent) {
  ResidueClass c;
  c.first = (residue - pad % stride + stride) % stride;
  c.count = c.first < extent ? ceil_div(extent - c.first, stride) : 0;
  return c;
}

static void class_taps(const Geometry& g, int64_t row_residue, int64_t column_residue, const ResidueClass& rows,
                       const ResidueClass& columns, PlaneTaps& taps) {
  taps.count = 0;
  for (int64_t i = 0; i < g.kernel_h; ++i) {
    if (i * g.dilation_h % g.stride_h != row_residue) continue;
    for (int64_t j = 0; j < g.kernel_w; ++j) {
      if (j * g.dilation_w % g.stride_w != column_residue) continue;
      taps.row[taps.count] = (rows.first + g.pad_top - i * g.dilation_h) / g.stride_h;
      taps.column[taps.count] = (columns.first + g.pad_left - j * g.dilation_w) / g.stride_w;
      taps.which[taps.count++] = i * g.kernel_w + j;
    }
  }
}

// One class of channel c's plane: grad_x at (rows.first + u * stride_h, columns.first + v * stride_w).
template <typename S, typename T>
static void store_class(const BackwardContext& ctx, const ResidueClass& rows, const ResidueClass& columns,
                        int64_t begin, int64_t end, const T* strip, S* plane) {
  const Strides& stride = ctx.p.grad_x_strides;
  const Geometry& g = ctx.p.geom;
  for (int64_t i = begin; i < end;) {
    const int64_t u = i / columns.count, v = i % columns.count;
    const int64_t width = columns.count - v < end - i ? columns.count - v : end - i;
    S* to = plane + (rows.first + u * g.stride_h) * stride.h + (columns.first + v * g.stride_w) * stride.w;
    const int64_t step = g.stride_w * stride.w;
    if (step == 1) {
      store_row(strip + i - begin, to, width);
    } else {
      for (int64_t j = 0; j < width; ++j) store_one(strip[i - begin + j], to + j * step);
    }
    i += width;
  }
}

template <typename S, typename T>
static void backward_x_class(const BackwardContext& ctx, int64_t image, int64_t channel, int64_t channels,
                             const ResidueClass& rows, const ResidueClass& columns, const PlaneTaps& taps, Window<T>& w,
                             T* strip) {
  constexpr int n = Vec<T>::n;
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  const PlaneShape shape = {g.h_out, g.w_out, columns.count, 1, 1};
  const T* weight = static_cast<const T*>(ctx.packed.dw_weight);
  const Clamp<T> open = clamp_of<T>(Activation::identity);
  const int64_t size = rows.count * columns.count;
  w.begin = -1;
  for (int64_t begin = 0, end = 0; begin < size; begin = end) {
    end = piece_end<n>(plan, shape, taps, begin, size);
    for (int64_t c = channel; c < channel + channels; ++c) {
      if (taps.count == 0) zero_fill(strip, end - begin);
      for (int64_t first = 0, last = 0; first < taps.count; first = last) {
        last = chunk_end<n>(plan, shape, taps, first, end - begin < shape.out_w ? end - begin : shape.out_w);
        prepare_window(shape, taps, first, last, begin, end, w);
        for (int64_t k = c; k < g.c_mid; k += g.c_in) {
          for (int64_t t = first; t < last; ++t) w.weight[t - first] = weight[taps.which[t] * plan.mid_columns + k];
          fill_window(shape, static_cast<const T*>(ctx.du) + (image * g.c_mid + k) * plan.image_pixels, g.w_out, w);
          convolve_window(w, last - first, T(0), first > 0 || k > c, open, strip);
        }
      }
      store_class(ctx, rows, columns, begin, end, strip,
                  static_cast<S*>(ctx.p.grad_x) + image * ctx.p.grad_x_strides.n + c * ctx.p.grad_x_strides.c);
    }
  }
}

// `channels` planes of grad_x.
template <typename S, typename T>
static void backward_x_planes(const BackwardContext& ctx, int64_t image, int64_t channel, int64_t channels,
                              void* scratch) {
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  T* strip = static_cast<T*>(scratch);
  PlaneTaps taps;
  Window<T> w;
  plane_memory(plan, strip + plan.window + Vec<T>::n, taps, w);
  for (int64_t i = 0; i < g.stride_h; ++i) {
    const ResidueClass rows = residue_class(i, g.pad_top, g.stride_h, g.h_in);
    for (int64_t j = 0; j < g.stride_w; ++j) {
      const ResidueClass columns = residue_class(j, g.pad_left, g.stride_w, g.w_in);
      if (rows.count == 0 || columns.count == 0) continue;
      class_taps(g, i, j, rows, columns, taps);
      backward_x_class<S>(ctx, image, channel, channels, rows, columns, taps, w, strip);
    }
  }
}

template <typename S, typename T>
static void backward_x_nchw(const BackwardContext& ctx, int64_t task, void* scratch) {
  const Geometry& g = ctx.p.geom;
  const int64_t block = ctx.plan.plane_block, blocks = ceil_div(g.c_in, block), channel = task % blocks * block;
  backward_x_planes<S, T>(ctx, task / blocks, channel, lanes_left(g.c_in - channel, static_cast<int>(block)), scratch);
}

// The channels k0 .. k0 + channels, plan.plane_block of them at most.
template <typename S, typename T>
static void backward_dw_planes(const BackwardContext& ctx, int64_t k0, int64_t channels, void* scratch) {
  constexpr int n = Vec<T>::n;
  const BackwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  const CpuPlan& plan = ctx.plan;
  const PlaneShape shape = {g.h_in, g.w_in, g.w_out, g.stride_h, g.stride_w};
  T* sums = static_cast<T*>(scratch);  // [channels][taps][n]
  T* d = sums + plan.plane_block * plan.taps * n;
  PlaneTaps taps;
  Window<T> w;
  plane_memory(plan, d + plan.window, taps, w);
  forward_taps(g, taps);
  zero_fill(sums, channels * plan.taps * n);
  for (int64_t image = 0; image < g.n; ++image) {
    for (int64_t begin = 0, end = 0; begin < plan.image_pixels; begin = end) {
      end = piece_end<n>(plan, shape, taps, begin, plan.image_pixels);
      for (int64_t first = 0, last = 0; first < taps.count; first = last) {
        last = chunk_end<n>(plan, shape, taps, first, end - begin < g.w_out ? end - begin : g.w_out);
        prepare_window(shape, taps, first, last, begin, end, w);
        for (int64_t i = 0; i < channels; ++i) {
          const int64_t k = k0 + i;
          fill_window(shape, static_cast<const S*>(p.x) + image * p.x_strides.n + k % g.c_in * p.x_strides.c,
                      p.x_strides.h, w);
          gather_positions(w, static_cast<const T*>(ctx.du) + (image * g.c_mid + k) * plan.image_pixels + begin, d);
          correlate_window(w, d, last - first, w.offset, sums + (i * plan.taps + first) * n);
        }
      }
    }
  }
  for (int64_t i = 0; i < channels; ++i) {
    S* grad = static_cast<S*>(p.grad_dw_weight) + tensor_channel(g, k0 + i) * plan.taps;
    for (int64_t t = 0; t < plan.taps; ++t) store_one(sum_groups(sums + (i * plan.taps + t) * n, 1, n), grad + t);
  }
}

template <typename S, typename T>
static void backward_dw_nchw(const BackwardContext& ctx, int64_t task, void* scratch) {
  const int64_t block = ctx.plan.plane_block, k = task * block;
  backward_dw_planes<S, T>(ctx, k, lanes_left(ctx.p.geom.c_mid - k, static_cast<int>(block)), scratch);
}
