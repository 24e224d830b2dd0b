// The passes of norm.inl over tensors of which every plane, the pixels of one channel of an image, is dense (nchw):
// lanes are pixels, and the values of the channel are the same in all of them. Nothing turns, and memory is walked as
// it lies.
//
//   v [n][c] | plane, pixels in a row ............ |   -> out the same, or two sums of each plane
//
// Bytes moved: v and grad once, out once. Sums are compensated in each lane (norm.inl's blocks), the lanes added in
// double; ctx.partial has [n][2][channels], and whoever adds up the images goes in their order.
#ifndef DSCONV_ISA
#error "norm_planes.inl belongs inside an ISA region"
#endif

template <typename S, typename T>
struct NormPlane {
  int64_t count;
  const S *v, *grad;
  S* out;
  bool stream;
  NormOf<T> of;
  double *sum, *paired;
};

// fn(i, lanes) for every vector of `count` elements; the last may have fewer lanes.
template <typename T, typename Fn>
DSCONV_INLINE void for_each_vector(int64_t count, const Fn& fn) {
  constexpr int n = Vec<T>::n;
  int64_t i = 0;
  for (; i + n <= count; i += n) fn(i, n);
  if (i < count) fn(i, static_cast<int>(count - i));
}

template <typename S>
DSCONV_INLINE auto load_left(const S* p, int lanes) {
  typedef typename ComputeOf<S>::type T;
  return lanes == Vec<T>::n ? vload(p) : vload(p, lanes);
}
template <typename S, typename V>
DSCONV_INLINE void store_left(const NormPlane<S, typename ComputeOf<S>::type>& plane, int64_t i, V v, int lanes) {
  if (lanes < Vec<typename ComputeOf<S>::type>::n) return vstore(plane.out + i, v, lanes);
  if (plane.stream) return vstream(plane.out + i, v);
  vstore(plane.out + i, v);
}

struct PlaneForward {
  template <Activation A, typename S, typename T>
  static void run(const NormPlane<S, T>& p) {
    for_each_vector<T>(p.count, [&](int64_t i, int lanes) {
      store_left(p, i, NormForward::value<A>(p.of, load_left(p.v + i, lanes)), lanes);
    });
  }
};

struct PlaneBackward {
  template <Activation A, typename S, typename T>
  static void run(const NormPlane<S, T>& p) {
    for_each_vector<T>(p.count, [&](int64_t i, int lanes) {
      store_left(p, i, NormBackward::value<A>(p.of, load_left(p.v + i, lanes), load_left(p.grad + i, lanes)), lanes);
    });
  }
};

struct PlaneSums {
  template <Activation A, typename S, typename T>
  static void run(const NormPlane<S, T>& p) {
    typedef typename Vec<T>::type V;
    constexpr int n = Vec<T>::n, U = 2;
    V sum[U], lost[U], paired[U], paired_lost[U];
    DSCONV_UNROLL
    for (int u = 0; u < U; ++u) sum[u] = lost[u] = paired[u] = paired_lost[u] = vset(T(0));
    const auto add = [&](int64_t i, int lanes, V& block, V& block_paired) {
      V hat;
      const V g = through_activation<A>(p.of, load_left(p.v + i, lanes), load_left(p.grad + i, lanes), hat);
      block = block + g;
      block_paired = vfma(g, hat, block_paired);
    };
    const auto close = [&](int u, V block, V block_paired) {
      add_compensated(sum[u], lost[u], block);
      add_compensated(paired[u], paired_lost[u], block_paired);
    };
    const int64_t whole = p.count - p.count % (U * n);
    for (int64_t first = 0; first < whole; first += kSumBlock * U * n) {
      const int64_t last = first + kSumBlock * U * n < whole ? first + kSumBlock * U * n : whole;
      V block[U], block_paired[U];
      DSCONV_UNROLL
      for (int u = 0; u < U; ++u) block[u] = block_paired[u] = vset(T(0));
      for (int64_t i = first; i < last; i += U * n) {
        DSCONV_UNROLL
        for (int u = 0; u < U; ++u) add(i + u * n, n, block[u], block_paired[u]);
      }
      DSCONV_UNROLL
      for (int u = 0; u < U; ++u) close(u, block[u], block_paired[u]);
    }
    V block = vset(T(0)), block_paired = block;
    for_each_vector<T>(p.count - whole, [&](int64_t i, int lanes) { add(whole + i, lanes, block, block_paired); });
    close(0, block, block_paired);
    *p.sum = lanes_of<U>(sum, lost);
    *p.paired = lanes_of<U>(paired, paired_lost);
  }

 private:
  // Pairwise: a chain of additions would be longer than the sums of a small plane.
  template <int U, typename V>
  static double lanes_of(const V (&sum)[U], const V (&lost)[U]) {
    constexpr int n = sizeof(V) / sizeof(sum[0][0]);
    double total[n];
    for (int i = 0; i < n; ++i) {
      total[i] = 0;
      DSCONV_UNROLL
      for (int u = 0; u < U; ++u) total[i] += static_cast<double>(sum[u][i]) - static_cast<double>(lost[u][i]);
    }
    DSCONV_UNROLL
    for (int half = n / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) total[i] += total[i + half];
    }
    return total[0];
  }
};

// The task's range of planes.
template <typename Pass, typename S, typename T>
static void plane_pass(const NormContext& ctx, int64_t group) {
  const int64_t planes = ctx.n * ctx.channels;
  const NormVectors<T> of = norm_vectors<T>(ctx.vectors, ctx.ld);
  NormPlane<S, T> p = {};
  p.count = ctx.d * ctx.h * ctx.w;
  S* const out = static_cast<S*>(ctx.out);
  const uint64_t misaligned = reinterpret_cast<uint64_t>(out) | static_cast<uint64_t>(p.count) * sizeof(S);
  p.stream = ctx.beyond_cache && out != nullptr && misaligned % kCacheLine == 0;
  const auto plane_of = [](const ImageTensor& t, int64_t n, int64_t c) {
    return static_cast<const S*>(t.data) + n * t.strides.n + c * t.strides.c;
  };
  for (int64_t plane = planes * group / ctx.groups; plane < planes * (group + 1) / ctx.groups; ++plane) {
    const int64_t n = plane / ctx.channels, c = plane % ctx.channels;
    p.v = plane_of(ctx.v, n, c);
    if (ctx.grad.data != nullptr) p.grad = plane_of(ctx.grad, n, c);
    if (out != nullptr) p.out = out + plane * p.count;
    if (ctx.partial != nullptr) {
      p.sum = ctx.partial + n * 2 * ctx.channels + c;
      p.paired = p.sum + ctx.channels;
    }
    p.of = channel_at(of, c);
    for_activation<Pass>(ctx.act, p);
  }
  if (p.stream) vstream_fence();
}

template <typename S, typename T>
static void norm_forward(const NormContext& ctx, int64_t group, void* scratch) {
  if (ctx.planes) return plane_pass<PlaneForward, S, T>(ctx, group);
  norm_pass<S, T>(ctx, group, scratch, OutputPass<NormForward>{});
}
template <typename S, typename T>
static void norm_sums(const NormContext& ctx, int64_t group, void* scratch) {
  if (ctx.planes) return plane_pass<PlaneSums, S, T>(ctx, group);
  norm_pass<S, T>(ctx, group, scratch, SumsPass{});
}
template <typename S, typename T>
static void norm_backward(const NormContext& ctx, int64_t group, void* scratch) {
  if (ctx.planes) return plane_pass<PlaneBackward, S, T>(ctx, group);
  norm_pass<S, T>(ctx, group, scratch, OutputPass<NormBackward>{});
}
