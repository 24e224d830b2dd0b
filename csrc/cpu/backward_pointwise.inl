// Stage P of backward: one group of tiles, in order, into the group's own partial sums.
//
//   per tile of pixels:   g = dy * out_act'(saved)              [pixels][c_out]
//                         z recomputed, a = act(z)              [pixels][c_mid]
//   grad_pw_weight       += g^T . a                              k = pixels
//   du                    = (g . pw_weight) * act'(z)            k = c_out, by panels of channels
//   bias gradients       += column sums of g and du
//
// Which tiles form a group follows from the shape alone, and groups are added in order: the same bits for any number
// of threads. Only what the gradients that were asked for need is computed.
#ifndef DSCONV_ISA
#error "backward_pointwise.inl belongs inside an ISA region"
#endif

// In two levels: blocks of rows first, so that the error of a long sum stays near that of a short one.
template <typename T>
static void add_column_sums(const T* tile, int64_t ld, int64_t rows, int64_t columns, T* sums) {
  constexpr int n = Vec<T>::n;
  constexpr int64_t kBlock = 16;
  for (int64_t c = 0; c < columns; c += n) {
    typename Vec<T>::type sum = vset(T(0));
    for (int64_t first = 0; first < rows; first += kBlock) {
      const int64_t last = first + kBlock < rows ? first + kBlock : rows;
      typename Vec<T>::type block = vset(T(0));
      for (int64_t i = first; i < last; ++i) block = block + vload(tile + i * ld + c);
      sum = sum + block;
    }
    vstore(sums + c, vload(sums + c) + sum);
  }
}

// sums - lost += column sums, by Kahan's compensated summation (Comm. ACM 8(1), 1965). What dy sums to is often much
// smaller than what is summed, and then the order of a plain sum decides most digits.
template <int U, typename T>
DSCONV_INLINE void add_column_sums_exactly(const T* tile, int64_t ld, int64_t rows, T* sums, T* lost) {
  typedef typename Vec<T>::type V;
  constexpr int n = Vec<T>::n;
  V sum[U], error[U];
  DSCONV_UNROLL
  for (int u = 0; u < U; ++u) sum[u] = vload(sums + u * n), error[u] = vload(lost + u * n);
  for (int64_t i = 0; i < rows; ++i, tile += ld) {
    DSCONV_UNROLL
    for (int u = 0; u < U; ++u) {
      const V term = vload(tile + u * n) - error[u];
      const V next = sum[u] + term;
      error[u] = (next - sum[u]) - term;
      sum[u] = next;
    }
  }
  DSCONV_UNROLL
  for (int u = 0; u < U; ++u) vstore(sums + u * n, sum[u]), vstore(lost + u * n, error[u]);
}

// Four vectors at a time hide the latency of the chain of four additions.
template <typename T>
static void add_columns_exactly(const T* tile, int64_t ld, int64_t rows, int64_t columns, T* sums, T* lost) {
  constexpr int n = Vec<T>::n;
  int64_t c = 0;
  for (; c + 3 * n < columns; c += 4 * n) add_column_sums_exactly<4>(tile + c, ld, rows, sums + c, lost + c);
  for (; c < columns; c += n) add_column_sums_exactly<1>(tile + c, ld, rows, sums + c, lost + c);
}

template <typename T>
struct PointwiseTile {
  T* a;           // [pixels][mid_ld], act(z)
  T* derivative;  // [pixels][mid_ld], act'(z), or zhat where there is a norm
  T* g;           // [pixels][out_ld]
  T* saved;       // [pixels][out_ld]
  T* da;          // [pixels][columns], one panel of du
};

// g of `count` pixels: dy through out_act, and through the norm before it where there is one.
template <typename S, typename T>
static void load_output_gradient(const BackwardContext& ctx, int64_t pixel, int64_t count, T* g, T* saved) {
  const BackwardParams& p = ctx.p;
  const Geometry& of = p.geom;
  const int64_t ld = ctx.plan.out_ld;
  load_tile(static_cast<const S*>(p.dy), p.dy_strides, p.dy_layout, of.h_out, of.w_out, of.c_out, pixel, count, g, ld);
  if (p.saved == nullptr) return;
  load_tile(static_cast<const S*>(p.saved), p.saved_strides, p.saved_layout, of.h_out, of.w_out, of.c_out, pixel, count,
            saved, ld);
  if (ctx.out_norm != nullptr) return output_norm_gradient(ctx, count, g, saved);
  for (int64_t i = 0; i < count; ++i) {
    activation_pass<ScaleByOutDerivative, T>(p.out_act, of.c_out, g + i * ld, saved + i * ld);
  }
}

template <typename X, typename T>
static void recompute_z(const BackwardContext& ctx, const ChannelsLast<const X>& x, int64_t pixel, int64_t count,
                        const PointwiseTile<T>& t) {
  const BackwardParams& p = ctx.p;
  const CpuPlan& plan = ctx.plan;
  const DepthwiseInput<X> in = {&p.geom,
                                &plan,
                                x.data,
                                {x.image, 1, x.row, x.column},
                                Layout::nhwc,
                                z_weight<T>(ctx),
                                static_cast<const T*>(ctx.packed.dw_bias)};
  const bool linear = p.act == Activation::identity && ctx.norm == nullptr;
  depthwise_nhwc(in, pixel, count, clamp_of<T>(Activation::identity), linear ? t.a : t.derivative);
  if (linear) return;
  if (ctx.norm != nullptr) return activate_zhat(ctx, count, p.geom.c_mid, t.derivative, t.a, plan.mid_ld, 0);
  for (int64_t i = 0; i < count; ++i) {
    activation_pass<ActivateAndDerive, T>(p.act, p.geom.c_mid, t.derivative + i * plan.mid_ld, t.a + i * plan.mid_ld);
  }
}

template <typename T>
static void pointwise_weight_gradient(const Geometry& g, const CpuPlan& plan, int64_t count, const PointwiseTile<T>& t,
                                      T* partial) {
  constexpr int64_t columns = kMicroVecs * Vec<T>::n;
  for (int64_t k = 0; k < g.c_mid; k += columns) {
    const int64_t width = g.c_mid - k < columns ? g.c_mid - k : columns;
    for (int64_t c = 0; c < g.c_out; c += kMicroRows) {
      add_gemm_block<T>(lanes_left(g.c_out - c, kMicroRows), width, count, {t.g + c, plan.out_ld},
                        {t.a + k, plan.mid_ld}, partial + c * plan.mid_columns + k, plan.mid_columns);
    }
  }
}

// du of the tile, a panel of channels at a time: into the panel of the workspace itself where it has these, else by
// t.da.
template <typename T>
static void pointwise_input_gradient(const BackwardContext& ctx, int64_t pixel, int64_t count,
                                     const PointwiseTile<T>& t, T* bias_sums, double* norm_sums) {
  constexpr int n = Vec<T>::n;
  constexpr int64_t columns = kMicroVecs * n;
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  const T* packed = static_cast<const T*>(ctx.packed.pw_backward);
  T* du = static_cast<T*>(ctx.du);
  const bool panels = du != nullptr && plan.du_width == columns;
  for (int64_t k = 0; k < g.c_mid; k += columns) {
    const int64_t width = g.c_mid - k < columns ? g.c_mid - k : columns;
    T* out = panels ? du + k * plan.pixels + pixel * columns : t.da;
    gemm_panel<T>(count, width, g.c_out, {t.g, plan.out_ld}, {packed + k * g.c_out, columns}, out, columns);
    if (ctx.norm != nullptr) {
      du_and_its_sums(ctx, count, width, k, t.derivative + k, plan.mid_ld, out, norm_sums);
    }
    for (int64_t i = 0; ctx.norm == nullptr && ctx.p.act != Activation::identity && i < count; ++i) {
      for (int64_t j = 0; j < width; j += n) {
        vstore(out + i * columns + j, vload(out + i * columns + j) * vload(t.derivative + i * plan.mid_ld + k + j));
      }
    }
    if (ctx.p.grad_dw_bias != nullptr) add_column_sums(out, columns, count, width, bias_sums + k);
    if (du != nullptr && !panels) {
      store_tile(out, columns, k, width, pixel, count, du, Layout::nhwc, g.c_mid, plan.image_pixels);
    }
  }
}

template <typename S, typename T>
static void backward_pointwise_tile(const BackwardContext& ctx, int64_t tile, const PointwiseTile<T>& t, T* pw_partial,
                                    T* bias_partial, double* norm_sums) {
  const BackwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  const CpuPlan& plan = ctx.plan;
  const int64_t pixel = tile_begin(plan, tile), count = tile_begin(plan, tile + 1) - pixel;
  const bool linear = p.act == Activation::identity && ctx.norm == nullptr;
  const bool need_du = ctx.du != nullptr || p.grad_dw_bias != nullptr;

  load_output_gradient<S>(ctx, pixel, count, t.g, t.saved);
  T* lost = bias_partial + plan.out_columns;
  if (p.grad_pw_bias != nullptr) add_columns_exactly(t.g, plan.out_ld, count, g.c_out, bias_partial, lost);
  if (pw_partial != nullptr || (need_du && !linear)) {
    if (ctx.x_turned != nullptr) {
      recompute_z(ctx, x_turned<T>(ctx), pixel, count, t);
    } else {
      recompute_z(ctx, x_as_given<S>(ctx), pixel, count, t);
    }
  }
  if (pw_partial != nullptr) pointwise_weight_gradient(g, plan, count, t, pw_partial);
  if (!need_du) return;
  pointwise_input_gradient(ctx, pixel, count, t, lost + plan.out_columns, norm_sums);
}

template <typename S, typename T>
static void backward_pointwise(const BackwardContext& ctx, int64_t group, void* scratch) {
  const CpuPlan& plan = ctx.plan;
  PointwiseTile<T> t;
  t.a = static_cast<T*>(scratch);
  t.derivative = t.a + plan.tile_pixels * plan.mid_ld;
  t.g = t.derivative + plan.tile_pixels * plan.mid_ld;
  t.saved = t.g + plan.tile_pixels * plan.out_ld;
  t.da = t.saved + plan.tile_pixels * plan.out_ld;

  const int64_t pw_size = ctx.p.geom.c_out * plan.mid_columns, bias_size = 2 * plan.out_columns + plan.mid_columns;
  T* pw_partial = ctx.pw_partial != nullptr ? static_cast<T*>(ctx.pw_partial) + group * pw_size : nullptr;
  T* bias_partial = static_cast<T*>(ctx.bias_partial) + group * bias_size;
  if (pw_partial != nullptr) zero_fill(pw_partial, pw_size);
  zero_fill(bias_partial, bias_size);
  const int64_t first = plan.tiles * group / plan.pointwise_groups;
  const int64_t last = plan.tiles * (group + 1) / plan.pointwise_groups;
  double* norm_sums = ctx.norm != nullptr ? ctx.norm_partial + group * 2 * ctx.p.geom.c_mid : nullptr;
  for (int64_t i = 0; norm_sums != nullptr && i < 2 * ctx.p.geom.c_mid; ++i) norm_sums[i] = 0;
  for (int64_t tile = first; tile < last; ++tile) {
    backward_pointwise_tile<S>(ctx, tile, t, pw_partial, bias_partial, norm_sums);
  }
}

template <typename T>
DSCONV_INLINE T sum_groups(const T* first, int64_t step, int64_t groups) {
  T sum = 0;
  for (int64_t i = 0; i < groups; ++i) sum += first[i * step];
  return sum;
}

template <typename S, typename T>
static void reduce_pointwise(const BackwardContext& ctx, int64_t out_channel) {
  constexpr int n = Vec<T>::n;
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  const int64_t step = g.c_out * plan.mid_columns;
  const T* partial = static_cast<const T*>(ctx.pw_partial) + out_channel * plan.mid_columns;
  S* grad = static_cast<S*>(ctx.p.grad_pw_weight) + out_channel * g.c_mid;
  for (int64_t k = 0; k < g.c_mid; k += n) {
    typename Vec<T>::type sum = vset(T(0));
    for (int64_t i = 0; i < plan.pointwise_groups; ++i) sum = sum + vload(partial + i * step + k);
    const int left = lanes_left(g.c_mid - k, n);
    if (g.multiplier == 1 && left == n) {
      vstore(grad + k, sum);
    } else {
      for (int i = 0; i < left; ++i) store_one(sum[i], grad + tensor_channel(g, k + i));
    }
  }
}

// The same of compensated sums, whose lost parts lie `lost` behind them.
template <typename T>
DSCONV_INLINE T sum_groups_exactly(const T* first, int64_t step, int64_t groups, int64_t lost) {
  T sum = 0, error = 0;
  for (int64_t i = 0; i < 2 * groups; ++i) {
    const T term = (i % 2 == 0 ? first[i / 2 * step] : -first[i / 2 * step + lost]) - error;
    const T next = sum + term;
    error = (next - sum) - term;
    sum = next;
  }
  return sum;
}

template <typename S, typename T>
static void reduce_biases(const BackwardContext& ctx) {
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  const T* partial = static_cast<const T*>(ctx.bias_partial);
  const int64_t step = 2 * plan.out_columns + plan.mid_columns;
  if (S* grad = static_cast<S*>(ctx.p.grad_pw_bias)) {
    for (int64_t c = 0; c < g.c_out; ++c) {
      store_one(sum_groups_exactly(partial + c, step, plan.pointwise_groups, plan.out_columns), grad + c);
    }
  }
  S* grad = static_cast<S*>(ctx.p.grad_dw_bias);
  if (grad != nullptr && plan.panels == 0) {
    for (int64_t k = 0; k < g.c_mid; ++k) {
      store_one(sum_groups(partial + 2 * plan.out_columns + k, step, plan.pointwise_groups),
                grad + tensor_channel(g, k));
    }
  }
}
