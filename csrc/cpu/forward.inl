// Forward of one tile of output pixels.
//
// nchw x and y of some shapes go by planes (forward_planes.inl). All else:
//
//   x --depthwise, act--> z [pixels][c_mid] in L2 --GEMM with a packed panel, bias, out_act in registers--> y
//                                                 --GEMM--> out [pixels][columns] in L1 --> y (and pre)
//
// The second way is for nchw, for activations that are no clamp, and where pre is asked for. z is of type M: the
// compute type, or bf16 where the GEMM multiplies pairs of bf16.
//
// A panel of the pointwise weights is walked once per tile and meets every block of kMicroRows pixels while it is in
// cache. x is read once (its halo rows once more per tile), y written once; z never leaves the cache.
#ifndef DSCONV_ISA
#error "forward.inl belongs inside an ISA region"
#endif

template <typename T>
static void add_bias(const T* bias, int64_t rows, T* out) {
  typedef typename Vec<T>::type V;
  constexpr int n = Vec<T>::n, columns = kMicroVecs * n;
  V b[kMicroVecs];
  for (int j = 0; j < kMicroVecs; ++j) b[j] = vload(bias + j * n);
  for (int64_t i = 0; i < rows; ++i, out += columns) {
    for (int j = 0; j < kMicroVecs; ++j) vstore(out + j * n, vload(out + j * n) + b[j]);
  }
}

// One panel of output channels by way of `out`: for what the micro-kernel cannot write itself.
template <typename S, typename F, typename T>
static void outputs_by_tile(const ForwardContext& ctx, int64_t pixel, int64_t count, int64_t channel, int64_t width,
                            int64_t k, Operand<F> z, Operand<F> panel, T* out, Ahead& ahead) {
  constexpr int64_t columns = kMicroVecs * Vec<T>::n;
  const ForwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  const CpuPlan& plan = ctx.plan;
  gemm_panel(count, width, k, z, panel, out, columns, ahead);
  add_bias(static_cast<const T*>(ctx.packed.pw_bias) + channel, count, out);
  if (p.pre != nullptr) {
    store_tile(out, columns, channel, width, pixel, count, static_cast<S*>(p.pre), p.y_layout, g.c_out,
               plan.image_pixels);
  }
  if (p.out_act != Activation::identity) {
    activation_pass<ActivateInPlace, T>(p.out_act, count * columns, out, nullptr);
  }
  store_tile(out, columns, channel, width, pixel, count, static_cast<S*>(p.y), p.y_layout, g.c_out, plan.image_pixels);
}

// Behind z: [tile_pixels][columns].
template <typename T, typename M>
DSCONV_INLINE T* output_tile(const CpuPlan& plan, void* scratch) {
  const int64_t z_bytes = plan.tile_pixels * plan.mid_ld * static_cast<int64_t>(sizeof(M));
  return reinterpret_cast<T*>(static_cast<char*>(scratch) + round_up(z_bytes, kCacheLine));
}

// The output channels of part `part` of a tile.
template <typename S, typename T, typename M>
static void forward_tile(const ForwardContext& ctx, int64_t tile, int64_t part, TurnedRing& ring, void* scratch) {
  const ForwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  const CpuPlan& plan = ctx.plan;
#if DSCONV_ISA != DSCONV_ISA_GENERIC
  if constexpr (kWidestByPlanes<S> > 0) {
    if (plan.by_planes) return forward_planes<S, T, M>(ctx, tile, scratch);
  }
#endif
  typedef typename Factor<M>::type F;
  constexpr int64_t columns = kMicroVecs * Vec<T>::n, per_factor = kNumbersOf<F>;
  const Range pixels = tile_range(plan.order, tile);
  const int64_t pixel = pixels.begin, count = pixels.end - pixel;
  const int64_t k = ceil_div(g.c_mid, per_factor);
  M* z = static_cast<M*>(scratch);
  T* out = output_tile<T, M>(plan, scratch);
  T* memory = out + plan.tile_pixels * columns;

  const DepthwiseInput<S> in = {&g,
                                &plan,
                                static_cast<const S*>(p.x),
                                p.x_strides,
                                p.x_layout,
                                static_cast<const T*>(ctx.packed.dw_weight),
                                static_cast<const T*>(ctx.packed.dw_bias),
                                ctx.in_norm,
                                end_of_channels(g, static_cast<const S*>(p.x), p.x_strides, g.c_in),
                                &ring};
  depthwise_tile(in, pixel, count, clamp_of<T>(p.act), z, memory);
  if (!is_clamp(p.act)) {
    for (int64_t i = 0; i < count; ++i) {
      activation_pass<ActivateInPlace, M>(p.act, g.c_mid, z + i * plan.mid_ld, nullptr);
    }
  }
  if (ctx.gate != nullptr) multiply_by_gate<T>(ctx, pixel, count, z);

  const int64_t panels = plan.out_columns / columns;
  const int64_t begin = panels * part / plan.parts * columns, last = panels * (part + 1) / plan.parts * columns;
  const int64_t end = last < g.c_out ? last : g.c_out;
  const bool direct = p.y_layout == Layout::nhwc && p.pre == nullptr && is_clamp(p.out_act);
  // nchw outputs that turn faster as bf16 than as sums (tile_io_bf16.inl).
  const bool by_planes = sizeof(M) < sizeof(T) && p.y_layout == Layout::nchw && p.pre == nullptr && is_clamp(p.out_act);
  const uint64_t misaligned = reinterpret_cast<uint64_t>(p.y) | static_cast<uint64_t>(g.c_out) * sizeof(S);
  const bool stream = direct && plan.beyond_cache && ctx.partial == nullptr && misaligned % kCacheLine == 0;
  Ahead ahead = {};
  const int64_t chains = chains_of(k), calls = full_blocks(count) * ceil_div(end - begin, columns) * chains;
  if (tile + 1 < plan.tiles) {
    add_rows(ahead, static_cast<const S*>(p.x), p.x_strides, p.x_layout, g, tile_range(plan.order, tile + 1),
             walks_depth(plan.order));
  }
  share_out(ahead, calls);
  const bool much = ahead.bytes * chains > kMostAtOnce * k && !walks_depth(plan.order);
  if (!plan.beyond_cache && (p.x_layout == Layout::nchw || much)) ahead.count = 0;
  for (int64_t channel = begin; channel < end; channel += columns) {
    const int64_t width = end - channel < columns ? end - channel : columns;
    const Operand<F> tile_z = {reinterpret_cast<const F*>(z), plan.mid_ld / per_factor};
    const Operand<F> panel = {static_cast<const F*>(ctx.packed.pw_forward) + channel * k, columns};
    OutputTarget<S, T> target = {};
    target.bias = static_cast<const T*>(ctx.packed.pw_bias) + channel;
    target.clamp = clamp_of<T>(p.out_act);
    target.columns = width;
    if (direct) {
      target.y = static_cast<S*>(p.y) + pixel * g.c_out + channel;
      target.ld = g.c_out;
      target.stream = stream && width == columns;
      gemm_panel_outputs(count, width, k, tile_z, panel, out, target, ahead);
    } else if (by_planes) {
      // Rows of S at the beginnings of the rows of sums, which a row's outputs replace.
      target.y = reinterpret_cast<S*>(out);
      target.ld = columns * static_cast<int64_t>(sizeof(T) / sizeof(S));
      gemm_panel_outputs(count, width, k, tile_z, panel, out, target, ahead);
      if constexpr (sizeof(M) < sizeof(T)) {
        store_planes(target.y, target.ld, channel, width, pixel, count, static_cast<S*>(p.y), g.c_out,
                     plan.image_pixels);
      }
    } else {
      outputs_by_tile<S>(ctx, pixel, count, channel, width, k, tile_z, panel, out, ahead);
    }
  }
  if (stream) vstream_fence();
}

// A column of tiles.
template <typename S, typename T, typename M>
static void forward(const ForwardContext& ctx, int64_t task, void* scratch) {
  const int64_t column = task / ctx.plan.parts, last = first_tile(ctx.plan.order, column + 1);
  TurnedRing ring = {};
  for (int64_t tile = first_tile(ctx.plan.order, column); tile < last; ++tile) {
    forward_tile<S, T, M>(ctx, tile, task % ctx.plan.parts, ring, scratch);
  }
}

// The moments of a tile's y, while it is in cache; `before` pixels have been merged into mean and m2 already.
template <typename S, typename T>
static void merge_output_moments(const ForwardContext& ctx, int64_t pixel, int64_t count, int64_t before, T* out,
                                 double* mean, double* m2) {
  constexpr int64_t columns = kMicroVecs * Vec<T>::n;
  const ForwardParams& p = ctx.p;
  const Geometry& g = p.geom;
#if DSCONV_ISA != DSCONV_ISA_GENERIC
  if (ctx.plan.by_planes) return merge_plane_moments<S>(ctx, pixel, count, before, mean, m2);
#endif
  const S* const outputs = static_cast<const S*>(p.y);
  // Channels that are whole vectors are read where they are.
  const int64_t whole = p.y_layout == Layout::nhwc ? g.c_out / Vec<T>::n * Vec<T>::n : 0;
  if (whole > 0) {
    Ahead nothing = {};
    merge_tile_moments(outputs + pixel * g.c_out, g.c_out, count, whole, before, mean, m2, nothing);
  }
  for (int64_t channel = whole; channel < g.c_out; channel += columns) {
    const int64_t width = g.c_out - channel < columns ? g.c_out - channel : columns;
    const S* y = outputs + channel * p.y_strides.c;
    Ahead nothing = {};
    load_tile(y, p.y_strides, p.y_layout, g.d_out, g.h_out, g.w_out, width, pixel, count, out, columns);
    merge_tile_moments(out, columns, count, width, before, mean + channel, m2 + channel, nothing);
  }
}

// A range of tiles, and the moments of its y.
template <typename S, typename T, typename M>
static void forward_moments(const ForwardContext& ctx, int64_t group, void* scratch) {
  const CpuPlan& plan = ctx.plan;
  const int64_t c_out = ctx.p.geom.c_out, first_tile = plan.tiles * group / ctx.groups;
  double* mean = ctx.partial + group * 2 * c_out;
  double* m2 = mean + c_out;
  for (int64_t i = 0; i < 2 * c_out; ++i) mean[i] = 0;
  int64_t before = 0;
  TurnedRing ring = {};
  for (int64_t tile = first_tile; tile < plan.tiles * (group + 1) / ctx.groups; ++tile) {
    forward_tile<S, T, M>(ctx, tile, 0, ring, scratch);
    const Range pixels = tile_range(plan.order, tile);
    const int64_t count = pixels.end - pixels.begin;
    merge_output_moments<S>(ctx, pixels.begin, count, before, output_tile<T, M>(plan, scratch), mean, m2);
    before += count;
  }
}
