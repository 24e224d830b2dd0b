// One pass over a tensor that stands before a normalisation and an activation, v -> act(gamma * vhat + beta) with
// vhat = (v - mean) * invstd per channel:
//
//   norm_moments   its moments (moments.inl)
//   norm_forward   out = act(gamma * vhat + beta)
//   norm_sums      sum g and sum g * vhat, g = grad * act'(gamma * vhat + beta)
//   norm_backward  out = scale * g + along * vhat + across
//
// Tiles of some pixels, pixel-major. A tile is the tensor itself where it lies that way in whole vectors, else a copy
// in the compute type. nchw tensors whose planes are dense need no tiles: norm_planes.inl.
#ifndef DSCONV_ISA
#error "norm.inl belongs inside an ISA region"
#endif

// Per-channel values, whole vectors of channels each: the rows of what cpu_kernels.h calls vectors.
template <typename T>
struct NormVectors {
  const T *mean, *invstd, *gamma, *beta, *scale, *along, *across;
};
template <typename T>
DSCONV_INLINE NormVectors<T> norm_vectors(const void* vectors, int64_t ld) {
  const T* rows = static_cast<const T*>(vectors);
  const NormVectors<T> v = {rows, rows + ld, rows + 2 * ld, rows + 3 * ld, rows + 4 * ld, rows + 5 * ld, rows + 6 * ld};
  return v;
}

// Those of one vector of values: of as many channels, or one channel's in every lane.
template <typename T>
struct NormOf {
  typename Vec<T>::type mean, invstd, gamma, beta, scale, along, across;
};
template <typename T>
DSCONV_INLINE NormOf<T> channels_at(const NormVectors<T>& of, int64_t c) {
  const NormOf<T> v = {vload(of.mean + c),  vload(of.invstd + c), vload(of.gamma + c), vload(of.beta + c),
                       vload(of.scale + c), vload(of.along + c),  vload(of.across + c)};
  return v;
}
template <typename T>
DSCONV_INLINE NormOf<T> channel_at(const NormVectors<T>& of, int64_t c) {
  const NormOf<T> v = {vset(of.mean[c]),  vset(of.invstd[c]), vset(of.gamma[c]), vset(of.beta[c]),
                       vset(of.scale[c]), vset(of.along[c]),  vset(of.across[c])};
  return v;
}

// A vector of a tile, and a wish for the same of the next tile.
template <typename S>
DSCONV_INLINE auto load_and_ask(const S* p, int64_t ahead) {
  __builtin_prefetch(p + ahead, 0, 2);
  return vload(p);
}

// Computed in T; S and Out are what is read and written.
template <typename T, typename S = T, typename Out = S>
struct NormTile {
  int64_t rows, channels;
  const S* v;
  int64_t v_ld;
  const S* grad;
  int64_t grad_ld;
  Out* out;
  int64_t out_ld;
  Stores stores;
  // Elements from a value to that of the next tile, asked for as this one is read; 0: the next tile is no further
  // memory.
  int64_t v_ahead, grad_ahead;
  NormVectors<T> of;
  double *sums, *paired;  // [channels] each
};

// Some rows at a time, so that the vectors of a channel are loaded once for them all.
constexpr int kNormRows = 4;

struct NormForward {
  template <Activation A, typename T, typename V>
  DSCONV_INLINE V value(const NormOf<T>& of, V v) {
    return act_value<A, T>(vfma(of.gamma, (v - of.mean) * of.invstd, of.beta));
  }
  template <Activation A, int R, typename T, typename S, typename Out>
  DSCONV_INLINE void rows(const NormTile<T, S, Out>& t, int64_t row) {
    const S* v = t.v + row * t.v_ld;
    Out* out = t.out + row * t.out_ld;
    for (int64_t c = 0; c < t.channels; c += Vec<T>::n) {
      const NormOf<T> of = channels_at(t.of, c);
      DSCONV_UNROLL
      for (int i = 0; i < R; ++i) {
        vstore_as(t.stores, out + i * t.out_ld + c, value<A>(of, load_and_ask(v + i * t.v_ld + c, t.v_ahead)));
      }
    }
  }
  template <Activation A, typename T, typename S, typename Out>
  static void run(const NormTile<T, S, Out>& t) {
    int64_t row = 0;
    for (; row + kNormRows <= t.rows; row += kNormRows) rows<A, kNormRows>(t, row);
    for (; row < t.rows; ++row) rows<A, 1>(t, row);
  }
};

// g, and vhat to `hat`.
template <Activation A, typename T, typename V>
DSCONV_INLINE V through_activation(const NormOf<T>& of, V v, V grad, V& hat) {
  hat = (v - of.mean) * of.invstd;
  return grad * act_derivative<A, T>(vfma(of.gamma, hat, of.beta));
}

struct NormBackward {
  template <Activation A, typename T, typename V>
  DSCONV_INLINE V value(const NormOf<T>& of, V v, V grad) {
    V hat;
    const V g = through_activation<A>(of, v, grad, hat);
    return vfma(of.scale, g, vfma(of.along, hat, of.across));
  }
  template <Activation A, int R, typename T, typename S, typename Out>
  DSCONV_INLINE void rows(const NormTile<T, S, Out>& t, int64_t row) {
    const S* v = t.v + row * t.v_ld;
    const S* grad = t.grad + row * t.grad_ld;
    Out* out = t.out + row * t.out_ld;
    for (int64_t c = 0; c < t.channels; c += Vec<T>::n) {
      const NormOf<T> of = channels_at(t.of, c);
      DSCONV_UNROLL
      for (int i = 0; i < R; ++i) {
        vstore_as(t.stores, out + i * t.out_ld + c,
                  value<A>(of, load_and_ask(v + i * t.v_ld + c, t.v_ahead),
                           load_and_ask(grad + i * t.grad_ld + c, t.grad_ahead)));
      }
    }
  }
  template <Activation A, typename T, typename S, typename Out>
  static void run(const NormTile<T, S, Out>& t) {
    int64_t row = 0;
    for (; row + kNormRows <= t.rows; row += kNormRows) rows<A, kNormRows>(t, row);
    for (; row < t.rows; ++row) rows<A, 1>(t, row);
  }
};

template <typename T>
DSCONV_INLINE void add_difference(int64_t count, const T* sum, const T* lost, double* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += static_cast<double>(sum[i]) - static_cast<double>(lost[i]);
}

// With Keep, g goes to out.
template <bool Keep>
struct NormSums {
  template <Activation A, int U, typename T, typename S, typename Out>
  DSCONV_INLINE void vectors(const NormTile<T, S, Out>& t, int64_t c) {
    typedef typename Vec<T>::type V;
    constexpr int n = Vec<T>::n;
    V sum[U], lost[U], paired[U], paired_lost[U];
    NormOf<T> of[U];
    DSCONV_UNROLL
    for (int u = 0; u < U; ++u) {
      sum[u] = lost[u] = paired[u] = paired_lost[u] = vset(T(0));
      of[u] = channels_at(t.of, c + u * n);
    }
    for (int64_t first = 0; first < t.rows; first += kSumBlock) {
      const int64_t last = first + kSumBlock < t.rows ? first + kSumBlock : t.rows;
      V block[U], block_paired[U];
      DSCONV_UNROLL
      for (int u = 0; u < U; ++u) block[u] = block_paired[u] = vset(T(0));
      for (int64_t i = first; i < last; ++i) {
        DSCONV_UNROLL
        for (int u = 0; u < U; ++u) {
          const int64_t k = c + u * n;
          V hat;
          const V g = through_activation<A>(of[u], load_and_ask(t.v + i * t.v_ld + k, t.v_ahead),
                                            load_and_ask(t.grad + i * t.grad_ld + k, t.grad_ahead), hat);
          if constexpr (Keep) vstore(t.out + i * t.out_ld + k, g);
          block[u] = block[u] + g;
          block_paired[u] = vfma(g, hat, block_paired[u]);
        }
      }
      DSCONV_UNROLL
      for (int u = 0; u < U; ++u) {
        add_compensated(sum[u], lost[u], block[u]);
        add_compensated(paired[u], paired_lost[u], block_paired[u]);
      }
    }
    T out[4][U * n];
    DSCONV_UNROLL
    for (int u = 0; u < U; ++u) {
      vstore(out[0] + u * n, sum[u]), vstore(out[1] + u * n, lost[u]);
      vstore(out[2] + u * n, paired[u]), vstore(out[3] + u * n, paired_lost[u]);
    }
    if (t.channels - c >= U * n) {  // a loop of known length goes by vectors
      add_difference(U * n, out[0], out[1], t.sums + c);
      add_difference(U * n, out[2], out[3], t.paired + c);
    } else {
      add_difference(t.channels - c, out[0], out[1], t.sums + c);
      add_difference(t.channels - c, out[2], out[3], t.paired + c);
    }
  }
  template <Activation A, typename T, typename S, typename Out>
  static void run(const NormTile<T, S, Out>& t) {
    constexpr int n = Vec<T>::n;
    int64_t c = 0;
    for (; c + n < t.channels; c += 2 * n) vectors<A, 2>(t, c);
    for (; c < t.channels; c += n) vectors<A, 1>(t, c);
  }
};

// The size of a tensor that is read in tiles, and the row stride of a copy.
struct PixelTensor {
  int64_t n, channels, d, h, w, copy_ld;
};

// Whether the tensor's pixels are a matrix in whole vectors.
template <typename T>
DSCONV_INLINE bool in_vectors(const PixelTensor& of, const ImageTensor& t) {
  return is_matrix(t, of.n, of.d, of.h, of.w) && of.channels % Vec<T>::n == 0;
}

template <typename S, typename T>
DSCONV_INLINE const T* tile_of(const PixelTensor& of, const ImageTensor& t, int64_t pixel, int64_t count, T* copy,
                               int64_t& ld) {
  if constexpr (sizeof(S) == sizeof(T)) {
    if (in_vectors<T>(of, t)) {
      ld = t.strides.w;
      return static_cast<const T*>(t.data) + pixel * t.strides.w;
    }
  }
  ld = of.copy_ld;
  load_tile(static_cast<const S*>(t.data), t.strides, t.layout, of.d, of.h, of.w, of.channels, pixel, count, copy, ld);
  return copy;
}

// Tiles of tensors that are matrices in whole vectors, from `begin` to `end`.
template <typename T, typename S, typename Pass>
static void norm_pass_in_place(const NormContext& ctx, int64_t group, Range pixels, const Pass& pass) {
  const uint64_t misaligned = reinterpret_cast<uint64_t>(ctx.out) | static_cast<uint64_t>(ctx.channels) * sizeof(S);
  for (int64_t pixel = pixels.begin; pixel < pixels.end; pixel += ctx.tile_pixels) {
    NormTile<T, S> t = {};
    t.rows = pixels.end - pixel < ctx.tile_pixels ? pixels.end - pixel : ctx.tile_pixels;
    t.channels = ctx.channels;
    t.v_ld = ctx.v.strides.w, t.grad_ld = ctx.grad.strides.w, t.out_ld = ctx.channels;
    t.v = static_cast<const S*>(ctx.v.data) + pixel * t.v_ld;
    t.v_ahead = t.rows * t.v_ld;
    if (ctx.grad.data != nullptr) {
      t.grad = static_cast<const S*>(ctx.grad.data) + pixel * t.grad_ld;
      t.grad_ahead = t.rows * t.grad_ld;
    }
    if (ctx.out != nullptr) t.out = static_cast<S*>(ctx.out) + pixel * t.out_ld;
    if (ctx.out != nullptr && ctx.beyond_cache && misaligned % kCacheLine == 0) t.stores = Stores::stream;
    t.of = norm_vectors<T>(ctx.vectors, ctx.ld);
    pass.run(ctx, t, group, pixel - pixels.begin);
    if (t.stores == Stores::stream) vstream_fence();
  }
}

// The task's range of pixels, tile by tile.
template <typename S, typename T, typename Pass>
static void norm_pass(const NormContext& ctx, int64_t group, void* scratch, const Pass& pass) {
  const PixelTensor of = {ctx.n, ctx.channels, ctx.d, ctx.h, ctx.w, ctx.ld};
  const Range pixels = {ctx.pixels * group / ctx.groups, ctx.pixels * (group + 1) / ctx.groups};
  const bool out = ctx.out == nullptr || ctx.out_layout == Layout::nhwc;
  if (out && in_vectors<T>(of, ctx.v) && (ctx.grad.data == nullptr || in_vectors<T>(of, ctx.grad))) {
    return norm_pass_in_place<T, S>(ctx, group, pixels, pass);
  }
  T* v_copy = static_cast<T*>(scratch);
  T* grad_copy = v_copy + ctx.tile_pixels * ctx.ld;
  T* out_copy = grad_copy + ctx.tile_pixels * ctx.ld;
  for (int64_t pixel = pixels.begin; pixel < pixels.end; pixel += ctx.tile_pixels) {
    NormTile<T> t = {};
    t.rows = pixels.end - pixel < ctx.tile_pixels ? pixels.end - pixel : ctx.tile_pixels;
    t.channels = ctx.channels;
    t.v = tile_of<S>(of, ctx.v, pixel, t.rows, v_copy, t.v_ld);
    if (ctx.grad.data != nullptr) t.grad = tile_of<S>(of, ctx.grad, pixel, t.rows, grad_copy, t.grad_ld);
    t.v_ahead = t.v != v_copy ? t.rows * t.v_ld : 0;
    t.grad_ahead = t.grad != grad_copy ? t.rows * t.grad_ld : 0;
    t.of = norm_vectors<T>(ctx.vectors, ctx.ld);
    t.out = out_copy, t.out_ld = ctx.ld;
    pass.run(ctx, t, group, pixel - pixels.begin);
    if (ctx.out != nullptr) {
      store_tile(out_copy, ctx.ld, 0, ctx.channels, pixel, t.rows, static_cast<S*>(ctx.out), ctx.out_layout,
                 ctx.channels, ctx.d * ctx.h * ctx.w);
    }
  }
}

struct MomentsPass {
  template <typename T, typename S>
  DSCONV_INLINE void run(const NormContext& ctx, const NormTile<T, S>& t, int64_t group, int64_t before) {
    double* mean = ctx.partial + group * 2 * ctx.channels;
    double* m2 = mean + ctx.channels;
    for (int64_t i = 0; before == 0 && i < 2 * ctx.channels; ++i) mean[i] = 0;
    Ahead ahead = {};
    if (t.v_ahead > 0) add_stretch(ahead, t.v + t.v_ahead, t.v + 2 * t.v_ahead);
    share_out(ahead, moments_calls<T>(t.rows, t.channels));
    merge_tile_moments(t.v, t.v_ld, t.rows, t.channels, before, mean, m2, ahead);
  }
};
struct SumsPass {
  template <typename T, typename S>
  DSCONV_INLINE void run(const NormContext& ctx, NormTile<T, S>& t, int64_t group, int64_t before) {
    t.sums = ctx.partial + group * 2 * ctx.channels;
    t.paired = t.sums + ctx.channels;
    for (int64_t i = 0; before == 0 && i < 2 * ctx.channels; ++i) t.sums[i] = 0;
    for_activation<NormSums<false>>(ctx.act, t);
  }
};
template <typename Pass>
struct OutputPass {
  template <typename T, typename S>
  DSCONV_INLINE void run(const NormContext& ctx, const NormTile<T, S>& t, int64_t, int64_t) {
    for_activation<Pass>(ctx.act, t);
  }
};

template <typename S, typename T>
static void norm_moments(const NormContext& ctx, int64_t group, void* scratch) {
  norm_pass<S, T>(ctx, group, scratch, MomentsPass{});
}
