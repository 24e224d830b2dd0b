// Stage P of backward for a tile of pixels:
//
//   g = dy * out_act'(saved)                                 [pixels][c_out]
//   and for each panel of micro.columns channels of z:
//     z recomputed, a = act(z)                               [pixels][columns]
//     grad_pw_weight += g^T . a                              k = pixels
//     du              = (g . pw_weight) * act'(z)            k = c_out; where there is a gate, through that first
//     bias gradients += column sums of g and du
//
// backward_groups.inl and backward_panels.inl walk tiles and panels, each in its order, into partial sums of their own.
// Only what the gradients that were asked for need is computed.
//
// Both products take their factors as type F: the compute type, or pairs of bf16 (backward_bf16.inl), two numbers that
// follow one another along k: two pixels for the weight gradient, two output channels for du.
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

// Some vectors at a time, four where there are, hide the latency of the chain of four additions.
template <typename T>
static void add_columns_exactly(const T* tile, int64_t ld, int64_t rows, int64_t columns, T* sums, T* lost) {
  constexpr int n = Vec<T>::n;
  int64_t c = 0;
  for (; c + 3 * n < columns; c += 4 * n) add_column_sums_exactly<4>(tile + c, ld, rows, sums + c, lost + c);
  const int64_t left = ceil_div(columns - c, n);
  if (left == 3) add_column_sums_exactly<3>(tile + c, ld, rows, sums + c, lost + c);
  if (left == 2) add_column_sums_exactly<2>(tile + c, ld, rows, sums + c, lost + c);
  if (left == 1) add_column_sums_exactly<1>(tile + c, ld, rows, sums + c, lost + c);
}

// g of `count` pixels into g[pixel][out_ld]: dy through out_act, and through the norm before it where there is one.
template <typename S, typename T>
static void load_output_gradient(const BackwardContext& ctx, int64_t pixel, int64_t count, T* g_tile, T* saved_tile) {
  const BackwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  const int64_t ld = ctx.plan.out_ld;
  if (ctx.out_norm != nullptr) return output_norm_gradient<S>(ctx, pixel, count, g_tile, saved_tile);
  load_tile(static_cast<const S*>(p.dy), p.dy_strides, p.dy_layout, g.d_out, g.h_out, g.w_out, g.c_out, pixel, count,
            g_tile, ld);
  if (p.saved == nullptr) return;
  load_tile(static_cast<const S*>(p.saved), p.saved_strides, p.saved_layout, g.d_out, g.h_out, g.w_out, g.c_out, pixel,
            count, saved_tile, ld);
  for (int64_t i = 0; i < count; ++i) {
    activation_pass<ScaleByOutDerivative, T>(p.out_act, g.c_out, g_tile + i * ld, saved_tile + i * ld);
  }
}

// g from `pixel` on where dy itself is that, in short rows of whole vectors; else null. Long rows, whose columns meet
// in few sets of a cache, are better copied.
template <typename S, typename T>
static const T* gradient_in_place(const BackwardContext& ctx, int64_t pixel, int64_t& ld) {
  constexpr int64_t kShort = 512;
  const BackwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  const Strides& s = p.dy_strides;
  if constexpr (sizeof(S) == sizeof(T)) {
    const bool joined =
        s.h == g.w_out * s.w && (g.d_out == 1 || s.d == g.h_out * s.h) && (g.n == 1 || s.n == g.d_out * g.h_out * s.h);
    const bool plain = ctx.out_norm == nullptr && p.saved == nullptr && p.dy_layout == Layout::nhwc;
    if (plain && joined && g.c_out % Vec<T>::n == 0 && s.w * static_cast<int64_t>(sizeof(T)) <= kShort) {
      ld = s.w;
      return static_cast<const T*>(p.dy) + pixel * s.w;
    }
  }
  return nullptr;
}

// g of a tile as the two GEMMs read it. Output channels for the weight gradient: block number b of kMicroRows of them
// is rows + b * rows_block, `rows_ld` from pixel to pixel. Pixels for du: block b is at pixels + b * pixels_block,
// [kMicroRows][pixels_ld] where along_k, else turned, [c_out][pixels_ld].
template <typename F>
struct GradTile {
  const F* rows;
  int64_t rows_block, rows_ld;
  const F* pixels;
  int64_t pixels_block, pixels_ld;
  bool along_k;
};

// A panel of channels k .. k + width of z.
template <typename T, typename F = T>
struct ChannelPanel {
  int64_t k, width;
  const F* weight;  // [c_out][columns] of pw_weight; null where du is not needed
  T* sums;          // [c_out][sums_ld], its gradient; null where it is not needed
  int64_t sums_ld;
  bool add_to_sums;  // else they are written
  T* bias_sums;      // [columns]
  T* a;              // [pixels][ld], act(z); then the factors of type F in the same place
  T* derivative;     // [pixels][ld], act'(z), or zhat where there is a norm
  int64_t ld;
  double* norm_sums;  // [2][c_mid], null where there is no norm
};

DSCONV_INLINE bool needs_du(const BackwardContext& ctx) {
  const BackwardParams& p = ctx.p;
  return ctx.norm != nullptr || p.grad_x != nullptr || p.grad_dw_weight != nullptr || p.grad_dw_bias != nullptr;
}
DSCONV_INLINE bool needs_z(const BackwardContext& ctx) {
  const BackwardParams& p = ctx.p;
  return ctx.norm != nullptr || p.grad_pw_weight != nullptr || (needs_du(ctx) && p.act != Activation::identity);
}

// z, or zhat where there is a norm, of `count` pixels of x, whose channels begin with number x_channel: the channels
// first .. first + width of z into z[pixel][ld].
template <typename X, typename T>
static void recompute_z(const BackwardContext& ctx, const ChannelsLast<const X>& x, int64_t x_channel, int64_t pixel,
                        int64_t count, int64_t first, int64_t width, T* z, int64_t ld, Ahead* ahead = nullptr) {
  const int64_t c_in = ctx.p.geom.c_in;
  CpuPlan plan = ctx.plan;
  plan.mid_ld = ld;
  Geometry g = ctx.p.geom;
  g.multiplier = 1;
  for (int64_t j = 0; j < width; j += g.c_in) {
    const int64_t k = first + j, c = k % c_in;
    g.c_in = width - j < c_in - c ? width - j : c_in - c;
    const DepthwiseInput<X> in = {&g,
                                  &plan,
                                  x.data + (c - x_channel),
                                  x.strides(),
                                  Layout::nhwc,
                                  z_weight<T>(ctx) + k,
                                  static_cast<const T*>(ctx.packed.dw_bias) + k,
                                  {},
                                  x.end,
                                  nullptr,
                                  ahead};
    depthwise_nhwc(in, pixel, count, clamp_of<T>(Activation::identity), z + j);
  }
}

// And what follows from it.
template <typename X, typename T, typename F>
static void recompute_panel(const BackwardContext& ctx, const X& x, int64_t x_channel, int64_t pixel, int64_t count,
                            const ChannelPanel<T, F>& t) {
  const BackwardParams& p = ctx.p;
  const bool linear = p.act == Activation::identity && ctx.norm == nullptr, derives = !linear && needs_du(ctx);
  recompute_z(ctx, x, x_channel, pixel, count, t.k, t.width, derives ? t.derivative : t.a, t.ld);
  if (ctx.norm != nullptr) {
    if (p.grad_pw_weight != nullptr) activate_zhat(ctx, count, t.width, t.derivative, t.a, t.ld, t.k);
  } else if (derives) {
    activation_pass<ActivateAndDerive, T>(p.act, count * t.ld, t.derivative, t.a);
  } else if (!linear) {
    activation_pass<ActivateInPlace, T>(p.act, count * t.ld, t.a, nullptr);
  }
  if constexpr (!SameType<T, F>::value) {
    if (p.grad_pw_weight != nullptr) zip_pixels(t.a, t.ld, count, t.width, reinterpret_cast<F*>(t.a), 2 * t.ld);
  }
}

// What the tile after `tile`, of `count` pixels, will read of dy, of what was saved, and of x, in parts for the calls
// of this one's panels. Equal parts, so that the long calls for the weights, whose operands come from L2 meanwhile, are
// not in their own way; but where the short ones could not take theirs, equal for every step.
template <typename S, typename F, typename Source>
DSCONV_INLINE Ahead next_tile(const BackwardContext& ctx, const Source& x, int64_t tile, int64_t count) {
  const BackwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  const int64_t panels = ceil_div(g.c_mid, kMicroVecs * Vec<typename ComputeOf<S>::type>::n);
  const int64_t k = ceil_div(g.c_out, kNumbersOf<F>), chains = chains_of(k);
  const int64_t of_weights = g.c_out / kMicroRows, of_du = count / kMicroRows;
  Ahead ahead = {};
  if (tile + 1 == ctx.plan.tiles) return ahead;
  const Range next = tile_range(ctx.plan.order, tile + 1);
  add_pixels(ahead, static_cast<const S*>(p.dy), p.dy_strides, p.dy_layout, g, next);
  add_pixels(ahead, static_cast<const S*>(p.saved), p.saved_strides, p.saved_layout, g, next);
  if (needs_z(ctx)) x.ask_for(ctx, ahead, next);
  share_out(ahead, (of_weights + of_du * chains) * panels);
  if (ahead.bytes * chains > kMostAtOnce / 2 * k) {
    const int64_t steps = (of_weights * ceil_div(count, kNumbersOf<F>) + of_du * k) * panels;
    ahead.step = ceil_div(all_bytes(ahead), steps > 0 ? steps : 1);
  }
  return ahead;
}

// `count` pixels of the panel from `pixel` on; du[pixel][columns].
template <typename T, typename F>
static void backward_pointwise(const BackwardContext& ctx, int64_t pixel, int64_t count, const GradTile<F>& grad,
                               const ChannelPanel<T, F>& t, T* du, Ahead& ahead) {
  constexpr int n = Vec<T>::n;
  constexpr int64_t columns = kMicroVecs * n, numbers = kNumbersOf<F>;
  const BackwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  const bool linear = p.act == Activation::identity && ctx.norm == nullptr;
  for (int64_t c = 0; t.sums != nullptr && c < g.c_out; c += kMicroRows) {
    const Operand<F> rows = {grad.rows + c / kMicroRows * grad.rows_block, grad.rows_ld};
    const Operand<F> a = {reinterpret_cast<const F*>(t.a), numbers * t.ld};
    add_gemm_block<F>(lanes_left(g.c_out - c, kMicroRows), t.width, ceil_div(count, numbers), rows, a,
                      t.sums + c * t.sums_ld, t.sums_ld, t.add_to_sums, ahead);
  }
  if (t.weight == nullptr) return;
  const int64_t k = ceil_div(g.c_out, numbers), chains = chains_of(k);
  for (int64_t chain = 0; chain < chains; ++chain) {
    for (int64_t i = 0; i < count; i += kMicroRows) {
      const Operand<F> a = {grad.pixels + i / kMicroRows * grad.pixels_block, grad.pixels_ld}, b = {t.weight, columns};
      const SumTarget<T> target = {du + i * columns, columns, chain > 0};
      const int rows = lanes_left(count - i, kMicroRows);
      if (grad.along_k) {
        gemm_chain<F, true>(chain, chains, rows, t.width, k, a, b, target, ahead);
      } else {
        gemm_chain<F, false>(chain, chains, rows, t.width, k, a, b, target, ahead);
      }
    }
  }
  if (ctx.gate != nullptr) through_gate(ctx, pixel, count, t.k, du);
  if (ctx.norm != nullptr) {
    du_and_its_sums(ctx, count, t.width, t.k, t.derivative, t.ld, du, t.norm_sums);
  } else if (!linear) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < columns; j += n) {
        vstore(du + i * columns + j, vload(du + i * columns + j) * vload(t.derivative + i * t.ld + j));
      }
    }
  }
  if (p.grad_dw_bias != nullptr) add_column_sums(du, columns, count, t.width, t.bias_sums);
}

template <typename T>
DSCONV_INLINE T sum_groups(const T* first, int64_t step, int64_t groups) {
  T sum = 0;
  for (int64_t i = 0; i < groups; ++i) sum += first[i * step];
  return sum;
}

// U vectors of some partial sums, `step` apart: groups are far from one another, and of each some lines come together.
template <int U, typename S, typename T>
DSCONV_INLINE void reduce_vectors(const T* partial, int64_t step, int64_t groups, S* to) {
  constexpr int n = Vec<T>::n;
  typename Vec<T>::type sum[U];
  DSCONV_UNROLL
  for (int u = 0; u < U; ++u) sum[u] = vset(T(0));
  for (int64_t i = 0; i < groups; ++i, partial += step) {
    DSCONV_UNROLL
    for (int u = 0; u < U; ++u) sum[u] = sum[u] + vload(partial + u * n);
  }
  DSCONV_UNROLL
  for (int u = 0; u < U; ++u) vstore(to + u * n, sum[u]);
}

template <typename S, typename T>
static void reduce_pointwise(const BackwardContext& ctx, int64_t out_channel) {
  constexpr int n = Vec<T>::n;
  const Geometry& g = ctx.p.geom;
  const CpuPlan& plan = ctx.plan;
  const int64_t step = g.c_out * plan.mid_columns;
  const T* partial = static_cast<const T*>(ctx.pw_partial) + out_channel * plan.mid_columns;
  S* grad = static_cast<S*>(ctx.p.grad_pw_weight) + out_channel * g.c_mid;
  for (int64_t k = 0; k < g.c_mid;) {
    const int64_t left = g.c_mid - k;
    if (g.multiplier == 1 && left >= 4 * n) {
      reduce_vectors<4>(partial + k, step, plan.pointwise_groups, grad + k);
      k += 4 * n;
    } else if (g.multiplier == 1 && left >= n) {
      reduce_vectors<1>(partial + k, step, plan.pointwise_groups, grad + k);
      k += n;
    } else {
      T sums[n];
      reduce_vectors<1>(partial + k, step, plan.pointwise_groups, sums);
      const int count = lanes_left(left, n);
      for (int i = 0; i < count; ++i) store_one(sums[i], grad + tensor_channel(g, k + i));
      k += n;
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
