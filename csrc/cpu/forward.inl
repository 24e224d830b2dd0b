// Forward of one tile of output pixels.
//
//   x --depthwise, act--> z [pixels][c_mid] in L2 --GEMM with a packed panel--> out [pixels][columns] in L1
//     --bias, out_act--> y (and pre)
//
// A panel of the pointwise weights is walked once per tile and meets every block of kMicroRows pixels while it is in
// cache. x is read once (its halo rows once more per tile), y written once; z never leaves the cache.
#ifndef DSCONV_ISA
#error "forward.inl belongs inside an ISA region"
#endif

template <typename S, typename T>
static void add_bias(const T* bias, int64_t rows, T* out) {
  typedef typename Vec<T>::type V;
  constexpr int n = Vec<T>::n, columns = kMicroVecs * n;
  V b[kMicroVecs];
  for (int j = 0; j < kMicroVecs; ++j) b[j] = vload(bias + j * n);
  for (int64_t i = 0; i < rows; ++i, out += columns) {
    for (int j = 0; j < kMicroVecs; ++j) vstore(out + j * n, vload(out + j * n) + b[j]);
  }
}

template <typename S, typename T>
static void forward_tile(const ForwardContext& ctx, int64_t tile, void* scratch) {
  const ForwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  const CpuPlan& plan = ctx.plan;
  constexpr int64_t columns = kMicroVecs * Vec<T>::n;
  const int64_t pixel = tile_begin(plan, tile), count = tile_begin(plan, tile + 1) - pixel;
  T* z = static_cast<T*>(scratch);
  T* out = z + plan.tile_pixels * plan.mid_ld;
  T* strips = out + plan.tile_pixels * columns;
  void* memory = strips + plan.micro.lanes * plan.strip_ld;

  const DepthwiseInput<S> in = {&g,
                                &plan,
                                static_cast<const S*>(p.x),
                                p.x_strides,
                                p.x_layout,
                                static_cast<const T*>(ctx.packed.dw_weight),
                                static_cast<const T*>(ctx.packed.dw_bias)};
  depthwise_tile(in, pixel, count, clamp_of<T>(p.act), z, strips, memory);
  if (!is_clamp(p.act)) {
    for (int64_t i = 0; i < count; ++i) {
      activation_pass<ActivateInPlace, T>(p.act, g.c_mid, z + i * plan.mid_ld, nullptr);
    }
  }

  for (int64_t channel = 0; channel < g.c_out; channel += columns) {
    const int64_t width = g.c_out - channel < columns ? g.c_out - channel : columns;
    const Operand<T> panel = {static_cast<const T*>(ctx.packed.pw_forward) + channel * g.c_mid, columns};
    gemm_panel<T>(count, width, g.c_mid, {z, plan.mid_ld}, panel, out, columns);
    add_bias<S>(static_cast<const T*>(ctx.packed.pw_bias) + channel, count, out);
    if (p.pre != nullptr) {
      store_tile(out, columns, channel, width, pixel, count, static_cast<S*>(p.pre), p.y_layout, g.c_out,
                 plan.image_pixels);
    }
    if (p.out_act != Activation::identity) {
      activation_pass<ActivateInPlace, T>(p.out_act, count * columns, out, nullptr);
    }
    store_tile(out, columns, channel, width, pixel, count, static_cast<S*>(p.y), p.y_layout, g.c_out,
               plan.image_pixels);
  }
}
