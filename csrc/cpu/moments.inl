// Per-channel sums over pixels in the two numbers that normalisation needs, without cancellation:
//
//   moments     mean and M2 = sum (v - mean)^2 of a tile's channels, in two passes over the first tile while it is in
//               cache, in one pass about the mean of those before over the others; tiles merge by Chan's formula (Chan,
//               Golub, LeVeque: Algorithms for computing the sample variance, Am. Stat. 37(3), 1983) in double:
//                   delta = mean_b - mean_a,  mean += delta * n_b / n,  M2 += M2_b + delta^2 * n_a * n_b / n
//   paired sums sum g and sum g * xhat of a gradient and the normalised value that it belongs to
//
// The first tile's values are taken relative to its first pixel: what is summed then has the size of the deviations,
// whatever the mean is. Sums go by short blocks of rows, and the blocks are added with compensation (Kahan), so what
// reaches the doubles has the error of a block.
//
// Tasks are groups of tiles that follow from the shape alone; groups are merged in order (merge_moments on the host).
#ifndef DSCONV_ISA
#error "moments.inl belongs inside an ISA region"
#endif

constexpr int64_t kSumBlock = 8;  // rows of a block
constexpr int kSumVectors = 4;    // vectors of channels at a time: their chains of additions overlap

// sum - lost += block
template <typename V>
DSCONV_INLINE void add_compensated(V& sum, V& lost, V block) {
  const V term = block - lost, next = sum + term;
  lost = (next - sum) - term;
  sum = next;
}

template <typename T>
struct TileMoments {
  static constexpr int size = kSumVectors * Vec<T>::n;
  T shift[size], sum[size], sum_lost[size], squares[size], squares_lost[size];
};

template <int U, typename S, typename T>
DSCONV_INLINE void tile_moments(const S* tile, int64_t ld, int64_t rows, TileMoments<T>& m, Ahead& ahead) {
  typedef typename Vec<T>::type V;
  constexpr int n = Vec<T>::n;
  V shift[U], sum[U], lost[U], mean[U];
  DSCONV_UNROLL
  for (int u = 0; u < U; ++u) {
    shift[u] = vload(tile + u * n);
    sum[u] = lost[u] = vset(T(0));
  }
  for (int64_t first = 0; first < rows; first += kSumBlock) {
    const int64_t last = first + kSumBlock < rows ? first + kSumBlock : rows;
    V block[U];
    DSCONV_UNROLL
    for (int u = 0; u < U; ++u) block[u] = vset(T(0));
    for (int64_t i = first; i < last; ++i) {
      DSCONV_UNROLL
      for (int u = 0; u < U; ++u) block[u] = block[u] + (vload(tile + i * ld + u * n) - shift[u]);
    }
    DSCONV_UNROLL
    for (int u = 0; u < U; ++u) add_compensated(sum[u], lost[u], block[u]);
    prefetch_some(ahead);
  }
  const V share = vset(T(1) / static_cast<T>(rows));
  DSCONV_UNROLL
  for (int u = 0; u < U; ++u) {
    vstore(m.shift + u * n, shift[u]);
    vstore(m.sum + u * n, sum[u]);
    vstore(m.sum_lost + u * n, lost[u]);
    mean[u] = (sum[u] - lost[u]) * share;
    sum[u] = lost[u] = vset(T(0));
  }
  for (int64_t first = 0; first < rows; first += kSumBlock) {
    const int64_t last = first + kSumBlock < rows ? first + kSumBlock : rows;
    V block[U];
    DSCONV_UNROLL
    for (int u = 0; u < U; ++u) block[u] = vset(T(0));
    for (int64_t i = first; i < last; ++i) {
      DSCONV_UNROLL
      for (int u = 0; u < U; ++u) {
        const V d = (vload(tile + i * ld + u * n) - shift[u]) - mean[u];
        block[u] = vfma(d, d, block[u]);
      }
    }
    DSCONV_UNROLL
    for (int u = 0; u < U; ++u) add_compensated(sum[u], lost[u], block[u]);
    prefetch_some(ahead);
  }
  DSCONV_UNROLL
  for (int u = 0; u < U; ++u) {
    vstore(m.squares + u * n, sum[u]);
    vstore(m.squares_lost + u * n, lost[u]);
  }
}

// The same about m.shift in one pass, of which squares is the sum about m.shift itself.
template <int U, typename S, typename T>
DSCONV_INLINE void tile_moments_about(const S* tile, int64_t ld, int64_t rows, TileMoments<T>& m, Ahead& ahead) {
  typedef typename Vec<T>::type V;
  constexpr int n = Vec<T>::n;
  V shift[U], sum[U], lost[U], squares[U], squares_lost[U];
  DSCONV_UNROLL
  for (int u = 0; u < U; ++u) {
    shift[u] = vload(m.shift + u * n);
    sum[u] = lost[u] = squares[u] = squares_lost[u] = vset(T(0));
  }
  for (int64_t first = 0; first < rows; first += kSumBlock) {
    const int64_t last = first + kSumBlock < rows ? first + kSumBlock : rows;
    V block[U], block_squares[U];
    DSCONV_UNROLL
    for (int u = 0; u < U; ++u) block[u] = block_squares[u] = vset(T(0));
    for (int64_t i = first; i < last; ++i) {
      DSCONV_UNROLL
      for (int u = 0; u < U; ++u) {
        const V d = vload(tile + i * ld + u * n) - shift[u];
        block[u] = block[u] + d;
        block_squares[u] = vfma(d, d, block_squares[u]);
      }
    }
    DSCONV_UNROLL
    for (int u = 0; u < U; ++u) {
      add_compensated(sum[u], lost[u], block[u]);
      add_compensated(squares[u], squares_lost[u], block_squares[u]);
    }
    prefetch_some(ahead);
  }
  DSCONV_UNROLL
  for (int u = 0; u < U; ++u) {
    vstore(m.sum + u * n, sum[u]), vstore(m.sum_lost + u * n, lost[u]);
    vstore(m.squares + u * n, squares[u]), vstore(m.squares_lost + u * n, squares_lost[u]);
  }
}

// How often merge_tile_moments asks for a part of what is wanted next.
template <typename T>
DSCONV_INLINE int64_t moments_calls(int64_t rows, int64_t channels) {
  return ceil_div(rows, kSumBlock) * ceil_div(channels, kSumVectors * Vec<T>::n);
}

// `before` pixels have been merged into mean and m2 already. Reads whole vectors of the tile.
//
// Where there are some, one pass about their mean is enough: what the squares lose to rounding is small beside
// rows * delta^2, and at least half of that, the distance of the tile's mean, goes into m2 as well.
template <typename S>
static void merge_tile_moments(const S* tile, int64_t ld, int64_t rows, int64_t channels, int64_t before, double* mean,
                               double* m2, Ahead& ahead) {
  typedef typename ComputeOf<S>::type T;
  constexpr int n = Vec<T>::n;
  const double count = static_cast<double>(rows), total = static_cast<double>(before + rows);
  const double share = count / total, spread = static_cast<double>(before) * share, one = 1 / count;
  const double about = before >= rows ? one : 0;  // of the squared sum, which squares about another value hold too
  TileMoments<T> m;
  for (int64_t c = 0; c < channels;) {
    const int64_t left = channels - c, most = kSumVectors * n;
    int64_t width = left > most - n ? most : n;
    if (before >= rows) {
      for (int64_t i = 0; i < width; ++i) m.shift[i] = i < left ? static_cast<T>(mean[c + i]) : T(0);
      if (width == most) {
        tile_moments_about<kSumVectors>(tile + c, ld, rows, m, ahead);
      } else {
        tile_moments_about<1>(tile + c, ld, rows, m, ahead);
      }
    } else if (width == most) {
      tile_moments<kSumVectors>(tile + c, ld, rows, m, ahead);
    } else {
      tile_moments<1>(tile + c, ld, rows, m, ahead);
    }
    if (width > left) width = left;
    for (int64_t i = 0; i < width; ++i) {
      const double sum = static_cast<double>(m.sum[i]) - static_cast<double>(m.sum_lost[i]);
      const double delta = static_cast<double>(m.shift[i]) + sum * one - mean[c + i];
      mean[c + i] += delta * share;
      const double squares = static_cast<double>(m.squares[i]) - static_cast<double>(m.squares_lost[i]);
      m2[c + i] += squares - sum * sum * about + delta * delta * spread;
    }
    c += width;
  }
}

// The sum over U vectors, which have lost what `lost` says, and over their lanes.
template <int U, typename V>
DSCONV_INLINE double lanes_total(const V (&sum)[U], const V (&lost)[U]) {
  V total = sum[0], total_lost = lost[0];
  DSCONV_UNROLL
  for (int u = 1; u < U; ++u) total = total + sum[u], total_lost = total_lost + lost[u];
  return vsum(total - total_lost);
}

// Sums of v - shift and of its square, of one channel whose pixels are neighbours.
struct RowSums {
  double sum, squares;
};
template <typename S, typename T>
static RowSums row_sums_about(const S* v, int64_t count, T about) {
  typedef typename Vec<T>::type V;
  constexpr int n = Vec<T>::n, U = kSumVectors;
  const V shift = vset(about);
  V sum[U], lost[U], squares[U], squares_lost[U];
  DSCONV_UNROLL
  for (int u = 0; u < U; ++u) sum[u] = lost[u] = squares[u] = squares_lost[u] = vset(T(0));
  const int64_t whole = count - count % (U * n);
  for (int64_t first = 0; first < whole; first += kSumBlock * U * n) {
    const int64_t last = first + kSumBlock * U * n < whole ? first + kSumBlock * U * n : whole;
    V block[U], block_squares[U];
    DSCONV_UNROLL
    for (int u = 0; u < U; ++u) block[u] = block_squares[u] = vset(T(0));
    for (int64_t i = first; i < last; i += U * n) {
      DSCONV_UNROLL
      for (int u = 0; u < U; ++u) {
        const V d = vload(v + i + u * n) - shift;
        block[u] = block[u] + d;
        block_squares[u] = vfma(d, d, block_squares[u]);
      }
    }
    DSCONV_UNROLL
    for (int u = 0; u < U; ++u) {
      add_compensated(sum[u], lost[u], block[u]);
      add_compensated(squares[u], squares_lost[u], block_squares[u]);
    }
  }
  int64_t i = whole;
  DSCONV_UNROLL
  for (int u = 0; u < U - 1; ++u) {
    if (i + n > count) break;
    const V d = vload(v + i) - shift;
    add_compensated(sum[u], lost[u], d);
    add_compensated(squares[u], squares_lost[u], d * d);
    i += n;
  }
  RowSums total = {lanes_total<U>(sum, lost), lanes_total<U>(squares, squares_lost)};
  for (; i < count; ++i) {
    const double d = static_cast<double>(widen_one(v + i)) - static_cast<double>(about);
    total.sum += d;
    total.squares += d * d;
  }
  return total;
}

// merge_tile_moments of one channel whose pixels are neighbours. The first stretch is summed about the mean of its
// first vector: how far that is from the stretch's own mean is in the stretch's variance too, so squares about it are
// no more than count / lanes times those about the mean.
template <typename S>
DSCONV_INLINE void merge_row_moments(const S* v, int64_t count, int64_t before, double& mean, double& m2) {
  typedef typename ComputeOf<S>::type T;
  const double pixels = static_cast<double>(count), share = pixels / static_cast<double>(before + count);
  const int lanes = lanes_left(count, Vec<T>::n);
  const T about = static_cast<T>(before >= count ? mean : vsum(vload(v, lanes)) / lanes);
  const RowSums of = row_sums_about(v, count, about);
  const double tile_mean = of.sum / pixels, delta = static_cast<double>(about) + tile_mean - mean;
  mean += delta * share;
  m2 += of.squares - of.sum * tile_mean + delta * delta * static_cast<double>(before) * share;
}

// What sum_over_z() makes of z for its moments: of the channels from k on, partial sums with rows c_mid apart.
struct MomentsOfZ {
  static constexpr int kRows = 2;
  double *mean, *m2;
  MomentsOfZ(const MomentsContext& ctx, int64_t, int64_t, double* partial)
      : mean(partial), m2(partial + ctx.geom.c_mid) {}
  template <typename T>
  void add_tile(const T* z, int64_t ld, int64_t, int64_t count, int64_t channels, int64_t before, Ahead& ahead) {
    merge_tile_moments(z, ld, count, channels, before, mean, m2, ahead);
  }
  template <typename T>
  void add_row(const T* z, int64_t count, int64_t before, int64_t channel) {
    merge_row_moments(z, count, before, mean[channel], m2[channel]);
  }
};

#if DSCONV_ISA != DSCONV_ISA_GENERIC
// A tile's z, made by planes into `z`, with the memory of depthwise_planes() behind it.
template <typename S, typename T, typename Sums>
static void add_z_planes(const DepthwiseInput<S>& in, int64_t pixel, int64_t count, int64_t before, T* z, Sums& sums) {
  const CpuPlan& plan = *in.plan;
  const int64_t channels = in.g->c_in;
  for (const int64_t last = pixel + count; pixel < last;) {
    const PixelRun run = run_at(pixel, last - pixel, 1, plan.slice_pixels, true);
    depthwise_planes(in, run.slice, run.ow, run.ow + run.length, clamp_of<T>(Activation::identity), z, plan.strip_ld,
                     z + plan.mid_ld * plan.strip_ld);
    for (int64_t c = 0; c < channels; ++c) sums.add_row(z + c * plan.strip_ld, run.length, before, c);
    before += run.length;
    pixel += run.length;
  }
}
#endif

// Sums over z, which is made a tile at a time and forgotten: where x is in cache, a panel of plan.mid_ld channels at a
// time, as if they were all there are, so that a tile has pixels enough. A multiplier takes all channels together.
template <typename S, typename T, typename Sums>
static void sum_over_z(const MomentsContext& ctx, int64_t task, void* scratch) {
  const CpuPlan& plan = ctx.plan;
  const int64_t part = task / ctx.panels, image = part / ctx.groups, group = part % ctx.groups;
  const int64_t k = task % ctx.panels * plan.mid_ld, c_mid = ctx.geom.c_mid;
  Geometry g = ctx.geom;
  if (ctx.panels > 1) g.c_in = g.c_mid = c_mid - k < plan.mid_ld ? c_mid - k : plan.mid_ld;
  T* z = static_cast<T*>(scratch);
  T* memory = z + plan.tile_pixels * plan.mid_ld;
  double* const partial = ctx.partial + part * Sums::kRows * c_mid + k;
  Sums sums(ctx, image, k, partial);
  // Who merged the last call's has these lines still; they come while the first z is made.
  constexpr int64_t kDoublesALine = kCacheLine / static_cast<int64_t>(sizeof(double));
  const int lines = static_cast<int>(ceil_div(g.c_mid, kDoublesALine));
  for (int row = 0; row < Sums::kRows; ++row) ask_for_lines(partial + row * c_mid, kDoublesALine, lines);
  TurnedRing ring = {};
  DepthwiseInput<S> in = {&g,
                          &plan,
                          static_cast<const S*>(ctx.x.data) + image * ctx.x.strides.n + k * ctx.x.strides.c,
                          ctx.x.strides,
                          ctx.x.layout,
                          static_cast<const T*>(ctx.packed.dw_weight) + k,
                          static_cast<const T*>(ctx.packed.dw_bias) + k,
                          norm_from<T>(ctx.in_norm, k),
                          end_of_channels(ctx.geom, static_cast<const S*>(ctx.x.data) + image * ctx.x.strides.n,
                                          ctx.x.strides, ctx.geom.c_in),
                          &ring};
  const int64_t first_tile = plan.tiles * group / ctx.groups;
  int64_t before = 0;
  for (int64_t tile = first_tile; tile < plan.tiles * (group + 1) / ctx.groups; ++tile) {
    const Range pixels = tile_range(plan.order, tile);
    const int64_t pixel = pixels.begin, count = pixels.end - pixel;
    for (int64_t i = 0; tile == first_tile && i < Sums::kRows * g.c_mid; ++i) {
      partial[i / g.c_mid * c_mid + i % g.c_mid] = 0;
    }
#if DSCONV_ISA != DSCONV_ISA_GENERIC
    if constexpr (kWidestByPlanes<S> > 0) {
      if (plan.by_planes) {
        add_z_planes(in, pixel, count, before, z, sums);
        before += count;
        continue;
      }
    }
#endif
    Ahead ahead = {};
    // Of a panel the rows hold the other channels too, whose turn is another time.
    if (plan.beyond_cache && ctx.panels == 1 && in.layout == Layout::nhwc) {
      const int64_t calls = depthwise_calls<T>(count, g.c_mid) + moments_calls<T>(count, g.c_mid);
      ahead = rows_of_tile(plan, in.x, in.stride, g, tile, calls);
      in.ahead = &ahead;
    }
    depthwise_tile(in, pixel, count, clamp_of<T>(Activation::identity), z, memory);
    sums.add_tile(z, plan.mid_ld, pixel, count, g.c_mid, before, ahead);
    before += count;
  }
}

template <typename S, typename T>
static void depthwise_moments(const MomentsContext& ctx, int64_t task, void* scratch) {
  sum_over_z<S, T, MomentsOfZ>(ctx, task, scratch);
}
