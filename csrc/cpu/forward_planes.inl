// Forward of one tile of output pixels where x and y are nchw and z is kept as they are: nothing turns.
//
//   x --depthwise_planes.inl, act--> z [c_mid][pixels] in L2 --GEMM, bias and out_act in registers--> y
//
//             z   c_mid rows, a panel of kMicroVecs vectors of pixels
//             |
//   pw_weight --> y   kMicroRows output channels, the same pixels      (gemm.inl: A is pw_weight as it lies, B is z)
//
// Of 16-bit tensors z and the weights are what the GEMM multiplies: the compute type, or pairs of bf16, which are of
// neighbouring channels; the weights are packed to rows of that.
//
// A block of kMicroRows output channels goes over all panels of the tile, so that y is written in stretches of a tile.
// Where the blocks are many, of 6 rows, it goes over as many as stay in L1 while all blocks meet them; where outputs
// are streamed, over a line of them.
// Bytes moved: x once and K - step rows of each tile again, y once; z once a block of output channels, out of L2 (L1).
// For what depthwise_planes.inl is for, and an out_act that is a clamp.
#ifndef DSCONV_ISA
#error "forward_planes.inl belongs inside an ISA region"
#endif

// Pixels of a tile that meet all output channels before the next: all, or a multiple of `columns`. Measured with AVX2,
// of all at once: 16 images of 112 x 112 past the caches 0.83 of the time, one image 0.97.
template <typename S, typename F>
DSCONV_INLINE int64_t pixels_of_stretch(int64_t count, int64_t depth, int64_t columns, bool stream) {
  constexpr int64_t kNearBytes = 16 << 10;  // of z: half of an L1
  if (!kSixRows) return count;
  const int64_t pixels = stream ? kCacheLine / static_cast<int64_t>(sizeof(S))
                                : kNearBytes / (depth * static_cast<int64_t>(sizeof(F))) / columns * columns;
  return pixels > columns ? pixels : columns;
}

// M: of act(z), as in forward_tile().
template <typename S, typename T, typename M>
static void forward_planes(const ForwardContext& ctx, int64_t tile, void* scratch) {
  typedef typename Factor<M>::type F;
  const ForwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  const CpuPlan& plan = ctx.plan;
  constexpr int64_t columns = kMicroVecs * Vec<T>::n, per_factor = kNumbersOf<F>;
  const int64_t depth = ceil_div(g.c_mid, per_factor);        // of the products
  F* z = static_cast<F*>(scratch);                            // [depth][strip_ld]
  T* sums = reinterpret_cast<T*>(z + depth * plan.strip_ld);  // of chains: [kMicroRows][columns]
  T* memory = sums + kMicroRows * columns;
  const F* const weight = static_cast<const F*>(SameType<S, T>::value ? p.pw_weight : ctx.packed.pw_forward);
  const DepthwiseInput<S> in = {&g,
                                &plan,
                                static_cast<const S*>(p.x),
                                p.x_strides,
                                p.x_layout,
                                static_cast<const T*>(ctx.packed.dw_weight),
                                static_cast<const T*>(ctx.packed.dw_bias),
                                ctx.in_norm};
  const Range pixels = tile_range(plan.order, tile);
  const uint64_t misaligned = reinterpret_cast<uint64_t>(p.y) | static_cast<uint64_t>(plan.image_pixels) * sizeof(S);
  for (int64_t pixel = pixels.begin; pixel < pixels.end;) {
    const PixelRun run = run_at(pixel, pixels.end - pixel, 1, plan.slice_pixels, true);
    const int64_t count = run.length, image = run.slice / g.d_out;
    const int64_t begin = run.slice % g.d_out * plan.slice_pixels + run.ow;  // of the image
    pixel += count;
    depthwise_planes(in, run.slice, run.ow, run.ow + count, clamp_of<T>(p.act), z, plan.strip_ld, memory);
    for (int64_t k = 0; k < depth && !is_clamp(p.act); ++k) {
      activation_pass<ActivateInPlace, M>(p.act, per_factor * count, reinterpret_cast<M*>(z + k * plan.strip_ld),
                                          nullptr);
    }
    if (ctx.gate != nullptr) {
      multiply_planes_by_gate<T>(ctx, image, count, per_factor, reinterpret_cast<M*>(z), plan.strip_ld * per_factor);
    }
    const bool stream = plan.beyond_cache && ctx.partial == nullptr &&
                        (misaligned | static_cast<uint64_t>(begin) * sizeof(S)) % kCacheLine == 0;
    Ahead ahead = {};
    if (plan.beyond_cache && pixel == pixels.end && tile + 1 < plan.tiles) {
      const Range next = tile_range(plan.order, tile + 1);
      add_rows(ahead, static_cast<const S*>(p.x), p.x_strides, p.x_layout, g, next, walks_depth(plan.order));
    }
    share_out(ahead, full_blocks(g.c_out) * ceil_div(count, columns) * chains_of(depth));
    const int64_t stretch = pixels_of_stretch<S, F>(count, depth, columns, stream);
    for (int64_t first = 0; first < count; first += stretch) {
      const int64_t last = first + stretch < count ? first + stretch : count;
      for (int64_t c = 0, rows; c < g.c_out; c += rows) {
        rows = rows_at_once(g.c_out - c);
        for (int64_t i = first; i < last; i += columns) {
          OutputTarget<S, T, BiasOf::row> target = {};
          target.bias = static_cast<const T*>(ctx.packed.pw_bias) + c;
          target.clamp = clamp_of<T>(p.out_act);
          target.columns = count - i < columns ? count - i : columns;
          target.y = static_cast<S*>(p.y) + (image * g.c_out + c) * plan.image_pixels + begin + i;
          target.ld = plan.image_pixels;
          target.stream = stream && target.columns == columns;
          const Operand<F> weights = {weight + c * depth, depth}, panel = {z + i, plan.strip_ld};
          gemm_panel_outputs(rows, target.columns, depth, weights, panel, sums, target, ahead);
        }
      }
    }
    if (stream) vstream_fence();
  }
}

// The moments of a tile's y (forward.inl), a channel's stretch of pixels at a time.
template <typename S>
static void merge_plane_moments(const ForwardContext& ctx, int64_t pixel, int64_t count, int64_t before, double* mean,
                                double* m2) {
  const ForwardParams& p = ctx.p;
  const CpuPlan& plan = ctx.plan;
  for (const int64_t last = pixel + count; pixel < last;) {
    const PixelRun run = run_at(pixel, last - pixel, 1, plan.image_pixels, true);
    const S* y = static_cast<const S*>(p.y) + run.slice * p.y_strides.n + run.ow;
    for (int64_t c = 0; c < p.geom.c_out; ++c, y += p.y_strides.c) {
      // In L2 since the tile was made; the channels lie too far apart for a prefetcher to follow.
      const S* const next = y + (c + 1 < p.geom.c_out ? p.y_strides.c : 0);
      for (int64_t i = 0; i < run.length; i += kCacheLine / static_cast<int64_t>(sizeof(S))) {
        __builtin_prefetch(next + i, 0, 3);
      }
      merge_row_moments(y, run.length, before, mean[c], m2[c]);
    }
    before += run.length;
    pixel += run.length;
  }
}
