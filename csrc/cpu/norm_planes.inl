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

// A vector of the plane, the last one shorter.
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
    for (int64_t i = 0; i < p.count; i += Vec<T>::n) {
      const int lanes = lanes_left(p.count - i, Vec<T>::n);
      store_left(p, i, NormForward::value<A>(p.of, load_left(p.v + i, lanes)), lanes);
    }
  }
};

struct PlaneBackward {
  template <Activation A, typename S, typename T>
  static void run(const NormPlane<S, T>& p) {
    for (int64_t i = 0; i < p.count; i += Vec<T>::n) {
      const int lanes = lanes_left(p.count - i, Vec<T>::n);
      store_left(p, i, NormBackward::value<A>(p.of, load_left(p.v + i, lanes), load_left(p.grad + i, lanes)), lanes);
    }
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
    for (int64_t first = 0; first < p.count; first += kSumBlock * U * n) {
      V block[U], block_paired[U];
      DSCONV_UNROLL
      for (int u = 0; u < U; ++u) block[u] = block_paired[u] = vset(T(0));
      const int64_t last = first + kSumBlock * U * n < p.count ? first + kSumBlock * U * n : p.count;
      int64_t i = first;
      for (; i + U * n <= last; i += U * n) {
        DSCONV_UNROLL
        for (int u = 0; u < U; ++u) add<A>(p, i + u * n, n, block[u], block_paired[u]);
      }
      for (; i < last; i += n) add<A>(p, i, lanes_left(last - i, n), block[0], block_paired[0]);
      DSCONV_UNROLL
      for (int u = 0; u < U; ++u) {
        add_compensated(sum[u], lost[u], block[u]);
        add_compensated(paired[u], paired_lost[u], block_paired[u]);
      }
    }
    *p.sum = lanes_total<U>(sum, lost);
    *p.paired = lanes_total<U>(paired, paired_lost);
  }

 private:
  template <Activation A, typename S, typename T, typename V>
  DSCONV_INLINE void add(const NormPlane<S, T>& p, int64_t i, int lanes, V& block, V& block_paired) {
    V hat;
    const V g = through_activation<A>(p.of, load_left(p.v + i, lanes), load_left(p.grad + i, lanes), hat);
    block = block + g;
    block_paired = vfma(g, hat, block_paired);
  }
};

template <typename S>
DSCONV_INLINE const S* plane_at(const ImageTensor& t, int64_t n, int64_t c) {
  return static_cast<const S*>(t.data) + n * t.strides.n + c * t.strides.c;
}

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
  for (int64_t plane = planes * group / ctx.groups; plane < planes * (group + 1) / ctx.groups; ++plane) {
    const int64_t n = plane / ctx.channels, c = plane % ctx.channels;
    p.v = plane_at<S>(ctx.v, n, c);
    if (ctx.grad.data != nullptr) p.grad = plane_at<S>(ctx.grad, n, c);
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
