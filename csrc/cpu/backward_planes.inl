// Backward by groups of tiles where x and grad_x are nchw and steps are 2: their planes are read and written where they
// lie, lanes are pixels. What turns is z, and du back, a quarter of what x and grad_x are; stage P between them is the
// same (backward_pointwise.inl).
//
//   stage P   x --depthwise_planes.inl--> strips [channel][pixels of the tile] --turned--> z [pixels][channels]
//             du [pixels][channels] --turned--> du [n][c_mid][h_out][w_out]
//   stage D   grad_dw_weight[k][tap]: vectors of the products of du and the tap's x, summed over a tile in registers,
//             then added to the group's in memory: dw_partial [c_mid][taps][lanes]
//             grad_x: columns of one residue meet the taps of the other parity, a vector of each, which interleave:
//
//                       du       d-1  d  d+1  ...     3 x 3, pad 1:  grad_x[2u]     = w1 du[u]
//                       grad_x   . 2u 2u+1 . . ...                   grad_x[2u + 1] = w0 du[u+1] + w2 du[u]
//
// Bytes moved: x twice, of which the tile's is in L2 the second time, grad_x once; du once there and back, in cache.
// For 3 x 3 where planes_pay_for_backward() (cpu_plan.h).
#ifndef DSCONV_ISA
#error "backward_planes.inl belongs inside an ISA region"
#endif

// x of a group of tiles, for the functions that take one as channels that are neighbours elsewhere (turned.inl).
// strips: [z_channels][strip_ld], behind them the memory of depthwise_planes(), strips_elements() in all (cpu_plan.h).
template <typename T>
struct PlanesOfX {
  T* strips;

  const PlanesOfX& of_tile(const BackwardContext&, const Range&) const { return *this; }
  void ask_for(const BackwardContext& ctx, Ahead& ahead, const Range& next) const {
    const BackwardParams& p = ctx.p;
    add_rows(ahead, static_cast<const T*>(p.x), p.x_strides, p.x_layout, p.geom, next, false);
  }
};

// The channels first .. first + width of z, or of zhat, of a stretch of an image into x.strips.
template <typename T>
static void strips_of_z(const BackwardContext& ctx, const PlanesOfX<T>& x, const PixelRun& run, int64_t first,
                        int64_t width) {
  const BackwardParams& p = ctx.p;
  Geometry g = p.geom;
  g.c_in = g.c_mid = width;
  const DepthwiseInput<T> in = {&g,
                                &ctx.plan,
                                static_cast<const T*>(p.x) + first * p.x_strides.c,
                                p.x_strides,
                                p.x_layout,
                                z_weight<T>(ctx) + first,
                                static_cast<const T*>(ctx.packed.dw_bias) + first};
  depthwise_planes(in, run.slice, run.ow, run.ow + run.length, clamp_of<T>(Activation::identity), x.strips,
                   ctx.plan.strip_ld, x.strips + ctx.plan.z_channels * ctx.plan.strip_ld);
}

// As of channels that are neighbours (backward_pointwise.inl).
template <typename T>
static void recompute_z(const BackwardContext& ctx, const PlanesOfX<T>& x, int64_t, int64_t pixel, int64_t count,
                        int64_t first, int64_t width, T* z, int64_t ld, Ahead* = nullptr) {
  const CpuPlan& plan = ctx.plan;
  for (int64_t done = 0; done < count;) {
    const PixelRun run = run_at(pixel + done, count - done, 1, plan.image_pixels, true);
    strips_of_z(ctx, x, run, first, width);
    const Strides strips = {0, plan.strip_ld, run.length, 1, 0};
    load_tile(x.strips, strips, Layout::nchw, 1, 1, run.length, width, 0, run.length, z + done * ld, ld);
    done += run.length;
  }
}

// du of a channel of an image: a plane.
template <typename T>
DSCONV_INLINE T* du_plane(const BackwardContext& ctx, int64_t image, int64_t k) {
  return static_cast<T*>(ctx.du) + (image * ctx.p.geom.c_mid + k) * ctx.plan.image_pixels;
}

// du -> dz of a tile's pixels: scale * du + along * zhat + across (backward_norm.inl).
template <typename T>
static void tile_du_to_dz(const BackwardContext& ctx, const PlanesOfX<T>& x, int64_t pixel, int64_t count, T*, Ahead&) {
  typedef typename Vec<T>::type V;
  constexpr int n = Vec<T>::n;
  const CpuPlan& plan = ctx.plan;
  const int64_t c_mid = ctx.p.geom.c_mid;
  const NormVectors<T> of = norm_vectors<T>(static_cast<T*>(ctx.norm), plan.mid_columns);
  for (int64_t done = 0; done < count;) {
    const PixelRun run = run_at(pixel + done, count - done, 1, plan.image_pixels, true);
    for (int64_t block = 0; block < c_mid; block += plan.z_channels) {
      const int64_t channels = c_mid - block < plan.z_channels ? c_mid - block : plan.z_channels;
      strips_of_z(ctx, x, run, block, channels);
      for (int64_t k = block; k < block + channels; ++k) {
        const V scale = vset(of.scale[k]), along = vset(of.along[k]), across = vset(of.across[k]);
        const T* zhat = x.strips + (k - block) * plan.strip_ld;
        T* du = du_plane<T>(ctx, run.slice, k) + run.ow;
        for (int64_t i = 0; i < run.length; i += n) {
          const int lanes = lanes_left(run.length - i, n);
          const V value = vfma(scale, vload(du + i, lanes), vfma(along, vload(zhat + i, lanes), across));
          vstore(du + i, value, lanes);
        }
      }
    }
    done += run.length;
  }
}
template <typename T>
DSCONV_INLINE Ahead tile_of_x(const BackwardContext&, const PlanesOfX<T>&, int64_t, int64_t) {
  return {};
}

constexpr int kPlaneTaps = 3;  // of a row, and rows
// Vectors of outputs, or of pairs of columns of grad_x, in a row: rows of z fit a tile (cpu_plan.h).
template <typename T>
constexpr int kPlaneVectors = 256 / Vec<T>::n + 2;

// Some rows of outputs of one channel: x and du there, and a vector of sums for each tap.
template <typename T>
struct PlaneCorrelation {
  const T *x, *du;                                           // the plane of x; the first row of du
  int64_t x_row, in_h;                                       // x_row: from row to row
  int64_t top, left;                                         // input position of the first tap of the first output
  int64_t rows, columns;                                     // of du
  T* sums;                                                   // [tap][lanes]
  ColumnMasks<kPlaneTaps, 2, 1, T> masks[kPlaneVectors<T>];  // of each vector of outputs
};

// U rows of one vector of outputs: each row of x meets those of them that read it.
template <int U, typename T, typename V>
DSCONV_INLINE void correlate_plane_rows(const PlaneCorrelation<T>& p, int64_t row, int64_t column, int lanes,
                                        const ColumnMasks<kPlaneTaps, 2, 1, T>& masks,
                                        V (&acc)[kPlaneTaps][kPlaneTaps]) {
  V du[U];
  DSCONV_UNROLL
  for (int u = 0; u < U; ++u) du[u] = vload(p.du + (row + u) * p.columns + column, lanes);
  const int64_t first = p.top + 2 * row;
  DSCONV_UNROLL
  for (int i = 0; i < 2 * (U - 1) + kPlaneTaps; ++i) {
    const int64_t ih = first + i;
    if (ih < 0 || ih >= p.in_h) continue;
    V x[kPlaneTaps][1];
    load_taps<kPlaneTaps, 2, 1, true>(p.x + ih * p.x_row + p.left + 2 * column, masks, x);
    DSCONV_UNROLL
    for (int j = 0; j < kPlaneTaps; ++j) {
      DSCONV_UNROLL
      for (int u = 0; u < U; ++u) {
        const int tap = i - 2 * u;
        if (tap >= 0 && tap < kPlaneTaps) acc[tap][j] = vfma(x[j][0], du[u], acc[tap][j]);
      }
    }
  }
}

template <typename T>
static void correlate_plane(const PlaneCorrelation<T>& p) {
  typedef typename Vec<T>::type V;
  constexpr int n = Vec<T>::n, kTaps = kPlaneTaps * kPlaneTaps, kRows = 2;
  V acc[kPlaneTaps][kPlaneTaps];
  DSCONV_UNROLL
  for (int t = 0; t < kTaps; ++t) acc[t / kPlaneTaps][t % kPlaneTaps] = vset(T(0));
  for (int64_t column = 0, vector = 0; column < p.columns; column += n, ++vector) {
    const int lanes = lanes_left(p.columns - column, n);
    const ColumnMasks<kPlaneTaps, 2, 1, T> masks = p.masks[vector];
    int64_t row = 0;
    for (; row + kRows <= p.rows; row += kRows) correlate_plane_rows<kRows>(p, row, column, lanes, masks, acc);
    for (; row < p.rows; ++row) correlate_plane_rows<1>(p, row, column, lanes, masks, acc);
  }
  DSCONV_UNROLL
  for (int t = 0; t < kTaps; ++t) {
    vstore(p.sums + t * n, vload(p.sums + t * n) + acc[t / kPlaneTaps][t % kPlaneTaps]);
  }
}

// As of channels that are neighbours (backward_depthwise.inl).
template <typename T>
static void correlate_run(const BackwardContext& ctx, const PlanesOfX<T>&, const Range& pixels, T* partial) {
  constexpr int n = Vec<T>::n;
  const BackwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  PlaneCorrelation<T> of = {};
  of.x_row = p.x_strides.h, of.in_h = g.h_in;
  of.left = -g.pad_left, of.columns = g.w_out;
  for (int64_t column = 0; column < g.w_out; column += n) {
    // What only outputs past the last one would read is not read.
    const int64_t at = of.left + 2 * column, reach = at + 2 * lanes_left(g.w_out - column, n) + kPlaneTaps - 2;
    fill_masks(at, reach < g.w_in ? reach : g.w_in, of.masks[column / n]);
  }
  for (int64_t pixel = pixels.begin; pixel < pixels.end;) {
    const PixelRun run = run_at(pixel, pixels.end - pixel, 1, ctx.plan.image_pixels, true);
    of.top = run.ow / g.w_out * 2 - g.pad_top, of.rows = run.length / g.w_out;
    for (int64_t k = 0; k < g.c_mid; ++k) {
      of.x = static_cast<const T*>(p.x) + run.slice * p.x_strides.n + k * p.x_strides.c;
      of.du = du_plane<T>(ctx, run.slice, k) + run.ow;
      of.sums = partial + k * ctx.plan.taps * n;
      correlate_plane(of);
    }
    pixel += run.length;
  }
}

// grad_dw_weight of the vector of channels v from the groups' vectors of sums.
template <typename T>
static void reduce_depthwise_planes(const BackwardContext& ctx, int64_t v) {
  constexpr int n = Vec<T>::n;
  const int64_t c_mid = ctx.p.geom.c_mid, taps = ctx.plan.taps, group = c_mid * taps * n;
  const int64_t first = v * n, last = first + n < c_mid ? first + n : c_mid;
  T* grad = static_cast<T*>(ctx.p.grad_dw_weight);
  for (int64_t i = first * taps; i < last * taps; ++i) {
    const T* sums = static_cast<const T*>(ctx.dw_partial) + i * n;
    typename Vec<T>::type sum = vset(T(0));
    for (int64_t of = 0; of < ctx.plan.pointwise_groups; ++of) sum = sum + vload(sums + of * group);
    grad[i] = static_cast<T>(vsum(sum));
  }
}

// Some pairs of rows of grad_x of one channel.
template <typename T>
struct PlaneGrad {
  const T* du;  // the plane
  T* grad;      // the plane
  int64_t w_in, w_out, h_out, grad_row;
  int64_t shift_h, shift_w;  // pad / 2
  int64_t first, last;       // rows of grad_x
  int64_t to_next;           // plane of grad_x, whose lines are asked for
  bool stream;
};

// Rows 2v and 2v + 1, columns 2u .. of a vector of pairs. Down and Right: whether pad_top and pad_left are odd. Down to
// row 2v + r the taps i with i = 2d - Down + r come from du row v + shift_h - (d - Down), and so to the right. lanes:
// those of du that are there, by tap to the right.
template <int Down, int Right, typename T, typename V>
DSCONV_INLINE void grad_plane_block(const PlaneGrad<T>& p, int64_t v, int64_t u,
                                    const typename Vec<T>::mask (&lanes)[2],
                                    const V (&weight)[kPlaneTaps * kPlaneTaps]) {
  constexpr int n = Vec<T>::n;
  V acc[2][2] = {{vset(T(0)), vset(T(0))}, {vset(T(0)), vset(T(0))}};
  T* to = p.grad + 2 * v * p.grad_row + 2 * u;
  DSCONV_UNROLL
  for (int r = 0; r < 2; ++r) {
    __builtin_prefetch(to + r * p.grad_row + p.to_next, 1, 3);
    __builtin_prefetch(to + r * p.grad_row + p.to_next + n, 1, 3);
  }
  DSCONV_UNROLL
  for (int d = 0; d < 2; ++d) {
    const int64_t oh = v + p.shift_h - (d - Down);
    if (oh < 0 || oh >= p.h_out) continue;
    const T* const du = p.du + oh * p.w_out + u + p.shift_w;
    DSCONV_UNROLL
    for (int e = 0; e < 2; ++e) {
      const V x = vload_lanes(du - (e - Right), lanes[e]);
      DSCONV_UNROLL
      for (int of = 0; of < 4; ++of) {
        const int i = 2 * d - Down + of / 2, j = 2 * e - Right + of % 2;
        if (i < 0 || i >= kPlaneTaps || j < 0 || j >= kPlaneTaps) continue;
        acc[of / 2][of % 2] = vfma(weight[i * kPlaneTaps + j], x, acc[of / 2][of % 2]);
      }
    }
  }
  const int64_t left = p.w_in - 2 * u;
  DSCONV_UNROLL
  for (int r = 0; r < 2; ++r, to += p.grad_row) {
    if (2 * v + r < p.first || 2 * v + r >= p.last) continue;
    const V low = vinterleave_low(acc[r][0], acc[r][1]), high = vinterleave_high(acc[r][0], acc[r][1]);
    if (left < 2 * n) {
      vstore(to, low, lanes_left(left, n));
      if (left > n) vstore(to + n, high, lanes_left(left - n, n));
    } else if (p.stream) {
      vstream(to, low), vstream(to + n, high);
    } else {
      vstore(to, low), vstore(to + n, high);
    }
  }
}

template <int Down, int Right, typename T>
static void grad_planes(const BackwardContext& ctx, int64_t image, PlaneGrad<T> p) {
  constexpr int n = Vec<T>::n, kTaps = kPlaneTaps * kPlaneTaps;
  const BackwardParams& of = ctx.p;
  const Geometry& g = of.geom;
  typename Vec<T>::mask lanes[kPlaneVectors<T>][2];
  for (int64_t u = 0; 2 * u < p.w_in; u += n) {
    for (int e = 0; e < 2; ++e) lanes[u / n][e] = lanes_inside<T>(u + p.shift_w - (e - Right), p.w_out);
  }
  for (int64_t c = 0; c < g.c_in; ++c) {
    const T* const packed = static_cast<const T*>(ctx.packed.dw_weight) + c;
    typename Vec<T>::type weight[kTaps];
    for (int t = 0; t < kTaps; ++t) weight[t] = vset(packed[t * ctx.plan.mid_columns]);
    p.du = du_plane<T>(ctx, image, c);
    p.grad = static_cast<T*>(of.grad_x) + image * of.grad_x_strides.n + c * of.grad_x_strides.c;
    p.to_next = c + 1 < g.c_in ? of.grad_x_strides.c : 0;
    for (int64_t u = 0; 2 * u < p.w_in; u += n) {
      const typename Vec<T>::mask there[2] = {lanes[u / n][0], lanes[u / n][1]};
      for (int64_t v = p.first / 2; 2 * v < p.last; ++v) grad_plane_block<Down, Right>(p, v, u, there, weight);
    }
  }
}

// Rows [row, row_end) of grad_x, n * h_in of them, of one image, for all channels.
template <typename T>
static void backward_x_planes(const BackwardContext& ctx, int64_t row, int64_t row_end) {
  const BackwardParams& p = ctx.p;
  const Geometry& g = p.geom;
  const int64_t image = row / g.h_in, first = row % g.h_in, last = first + row_end - row;
  const Strides& s = p.grad_x_strides;
  const uint64_t misaligned = reinterpret_cast<uint64_t>(p.grad_x) | static_cast<uint64_t>(s.h | s.c | s.n) * sizeof(T);
  PlaneGrad<T> of = {};
  of.w_in = g.w_in, of.w_out = g.w_out, of.h_out = g.h_out;
  of.grad_row = s.h;
  of.shift_h = g.pad_top / 2, of.shift_w = g.pad_left / 2;
  of.first = first, of.last = last;
  of.stream = ctx.plan.beyond_cache && misaligned % kCacheLine == 0;
  if (g.pad_top % 2 != 0) {
    g.pad_left % 2 != 0 ? grad_planes<1, 1>(ctx, image, of) : grad_planes<1, 0>(ctx, image, of);
  } else {
    g.pad_left % 2 != 0 ? grad_planes<0, 1>(ctx, image, of) : grad_planes<0, 0>(ctx, image, of);
  }
  if (of.stream) vstream_fence();
}
