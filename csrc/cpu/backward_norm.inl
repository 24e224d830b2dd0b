// Backward through a norm between z and the activation, u = gamma * zhat + beta, zhat = (z - mean) * invstd:
//
//   stage P   makes zhat where it would make z; du = da * act'(u), and per channel sum du and sum du * zhat
//   stage D   begins with dz = scale * du + along * zhat + across, in place; zhat is made once more
//             scale = gamma * invstd, along = -scale * (sum du * zhat) / count, across = -scale * (sum du) / count
//
// zhat and not u is made by the depthwise weights, which is right for gamma = 0 too.
#ifndef DSCONV_ISA
#error "backward_norm.inl belongs inside an ISA region"
#endif

// du becomes dz by so many pixels, with a part of what is wanted next after each.
constexpr int64_t kRowsAtOnce = 16;

// The packed weights that make z, or zhat where there is a norm.
template <typename T>
DSCONV_INLINE const T* z_weight(const BackwardContext& ctx) {
  return static_cast<const T*>(ctx.norm != nullptr ? ctx.zhat_weight : ctx.packed.dw_weight);
}

template <typename T>
DSCONV_INLINE NormTile<T> norm_tile(const BackwardContext& ctx, int64_t rows, int64_t channels, int64_t k) {
  NormTile<T> t = {};
  t.rows = rows;
  t.channels = channels;
  t.of = norm_vectors<T>(static_cast<T*>(ctx.norm) + k, ctx.plan.mid_columns);
  return t;
}

// a = act(gamma * zhat + beta) of the channels from k on.
template <typename T>
static void activate_zhat(const BackwardContext& ctx, int64_t rows, int64_t channels, const T* zhat, T* a, int64_t ld,
                          int64_t k) {
  NormTile<T> t = norm_tile<T>(ctx, rows, channels, k);
  t.v = zhat, t.v_ld = ld;
  t.out = a, t.out_ld = ld;
  for_activation<NormForward>(ctx.p.act, t);
}

// da -> du = da * act'(gamma * zhat + beta) of a panel from k on, and its sums added to sums[2][c_mid].
template <typename T>
static void du_and_its_sums(const BackwardContext& ctx, int64_t rows, int64_t channels, int64_t k, const T* zhat,
                            int64_t ld, T* du, double* sums) {
  constexpr int64_t columns = kMicroVecs * Vec<T>::n;
  NormTile<T> t = norm_tile<T>(ctx, rows, channels, k);
  t.v = zhat, t.v_ld = ld;
  t.grad = du, t.grad_ld = columns;
  t.out = du, t.out_ld = columns;
  t.sums = sums + k;
  t.paired = t.sums + ctx.p.geom.c_mid;
  for_activation<NormSums<true>>(ctx.p.act, t);
}

// du -> dz of `rows` pixels, `channels` channels from k on.
template <typename T>
static void du_to_dz(const BackwardContext& ctx, int64_t rows, int64_t channels, int64_t k, const T* zhat,
                     int64_t zhat_ld, T* du, int64_t du_ld, Ahead& ahead) {
  for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
    const int64_t count = rows - row < kRowsAtOnce ? rows - row : kRowsAtOnce;
    NormTile<T> t = norm_tile<T>(ctx, count, channels, k);
    t.v = zhat + row * zhat_ld, t.v_ld = zhat_ld;
    t.grad = t.out = du + row * du_ld;
    t.grad_ld = t.out_ld = du_ld;
    t.grad_ahead = rows * du_ld;
    NormBackward::run<Activation::identity>(t);
    prefetch_some(ahead);
  }
}

// The rows along and across of the channels k .. k + channels, from their sums over all pixels.
template <typename T>
static void finish_norm(const BackwardContext& ctx, int64_t k, int64_t channels) {
  const int64_t ld = ctx.plan.mid_columns;
  const double* sums = ctx.norm_partial + k;
  const double* paired = sums + ctx.p.geom.c_mid;
  T* scale = static_cast<T*>(ctx.norm) + 4 * ld + k;
  for (int64_t i = 0; i < channels; ++i) {
    scale[ld + i] = static_cast<T>(-static_cast<double>(scale[i]) * paired[i] / ctx.norm_count);
    scale[2 * ld + i] = static_cast<T>(-static_cast<double>(scale[i]) * sums[i] / ctx.norm_count);
  }
}

// The gradient of `count` pixels behind out_act and the norm before it -> that of y, the value before the norm.
template <typename S, typename T>
DSCONV_INLINE void through_output_norm(const BackwardContext& ctx, int64_t count, const S* y, int64_t y_ld,
                                       const S* grad, int64_t grad_ld, T* out) {
  NormTile<T, S, T> t = {};
  t.rows = count, t.channels = ctx.p.geom.c_out;
  t.of = norm_vectors<T>(ctx.out_norm, ctx.plan.out_columns);
  t.v = y, t.v_ld = y_ld;
  t.grad = grad, t.grad_ld = grad_ld;
  t.out = out, t.out_ld = ctx.plan.out_ld;
  for_activation<NormBackward>(ctx.p.out_act, t);
}

// dy of `count` pixels -> the gradient of y = p.saved, through out_act and the norm before it, into g[pixel][out_ld].
template <typename S, typename T>
static void output_norm_gradient(const BackwardContext& ctx, int64_t pixel, int64_t count, T* g_tile, T* saved_tile) {
  const BackwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  const PixelTensor of = {g.n, g.c_out, g.d_out, g.h_out, g.w_out, ctx.plan.out_ld};
  const ImageTensor y = {p.saved, p.saved_strides, p.saved_layout}, dy = {p.dy, p.dy_strides, p.dy_layout};
  if constexpr (!SameType<S, T>::value) {
    if (in_vectors<T>(of, y) && in_vectors<T>(of, dy)) {
      const int64_t y_ld = y.strides.w, dy_ld = dy.strides.w;
      return through_output_norm(ctx, count, static_cast<const S*>(y.data) + pixel * y_ld, y_ld,
                                 static_cast<const S*>(dy.data) + pixel * dy_ld, dy_ld, g_tile);
    }
  }
  int64_t y_ld = 0, dy_ld = 0;
  const T* y_tile = tile_of<S>(of, y, pixel, count, saved_tile, y_ld);
  const T* dy_tile = tile_of<S>(of, dy, pixel, count, g_tile, dy_ld);
  through_output_norm(ctx, count, y_tile, y_ld, dy_tile, dy_ld, g_tile);
}
