// A gate between the activation and the pointwise part, as of squeeze-excite: a number for each image and channel,
// which follows from the means of a = act(z) over the image's pixels.
//
//   a'[p][k] = gate[n(p)][k] * a[p][k]                      the pointwise part reads a'
//   mean[n][k] = (sum over the pixels p of n  a[p][k]) / pixels
//
// Backward, with g = dy and one image's own gradient of the weights G_n = sum over its pixels  g[p] a[p]^T:
//
//   grad_pw_weight[o][k] = sum over n  gate[n][k] G_n[o][k]
//   grad_gate[n][k]      = sum over o  pw_weight[o][k] G_n[o][k]
//   da[p][k]             = gate[n][k] * (g . pw_weight)[p][k] + push[n][k]    push: the gradient of the mean / pixels
//
// a' and da exist in cache only. The gate costs a multiplication an element of a tile that is in L1 or L2. An a that
// the caches hold is cheaper to keep from the means to y than to make again: then the first pass writes it, in nhwc,
// and the second one reads it through a depthwise kernel of one tap.
#ifndef DSCONV_ISA
#error "gate.inl belongs inside an ISA region"
#endif

// ---- forward ----

// a of `count` pixels -> a', [pixel][plan.mid_ld], whole vectors of channels.
template <typename T, typename M>
static void multiply_by_gate(const ForwardContext& ctx, int64_t pixel, int64_t count, M* a) {
  const CpuPlan& plan = ctx.plan;
  for (int64_t i = 0; i < count; ++i, a += plan.mid_ld) {
    const T* gate = static_cast<const T*>(ctx.gate) + (pixel + i) / plan.image_pixels * plan.mid_columns;
    for (int64_t k = 0; k < ctx.p.geom.c_mid; k += Vec<T>::n) vstore(a + k, vload(a + k) * vload(gate + k));
  }
}

// The same of `count` pixels of one image, [c_mid / per_factor][ld] with per_factor channels of a pixel side by side.
template <typename T, typename M>
static void multiply_planes_by_gate(const ForwardContext& ctx, int64_t image, int64_t count, int64_t per_factor, M* a,
                                    int64_t ld) {
  constexpr int n = Vec<T>::n;
  const T* gate = static_cast<const T*>(ctx.gate) + image * ctx.plan.mid_columns;
  for (int64_t k = 0; k < ctx.p.geom.c_mid; k += per_factor, a += ld) {
    T lanes[n];
    for (int i = 0; i < n; ++i) lanes[i] = gate[k + i % per_factor];
    const typename Vec<T>::type factor = vload(lanes);
    for (int64_t i = 0; i < per_factor * count; i += n) vstore(a + i, vload(a + i) * factor);
  }
}

// ---- the means ----

// Sums of act(z) over `rows` pixels, added to those of `channels` channels; and act(z), where there is a place for it.
template <typename T, typename S = T>
struct ActivatedTile {
  const T* z;
  int64_t ld, rows, channels;
  double* sums;
  S* a;
  int64_t a_ld;
};
struct SumActivated {
  template <Activation A, typename T, typename S>
  DSCONV_INLINE void run(const ActivatedTile<T, S>& t) {
    typedef typename Vec<T>::type V;
    constexpr int n = Vec<T>::n;
    for (int64_t k = 0; k < t.channels; k += n) {
      const int left = lanes_left(t.channels - k, n);
      V sum = vset(T(0));
      for (int64_t first = 0; first < t.rows; first += kSumBlock) {
        const int64_t last = first + kSumBlock < t.rows ? first + kSumBlock : t.rows;
        V block = vset(T(0));
        for (int64_t i = first; i < last; ++i) {
          const V a = act_value<A, T>(vload(t.z + i * t.ld + k));
          block = block + a;
          if (t.a != nullptr && left == n) vstore(t.a + i * t.a_ld + k, a);
          if (t.a != nullptr && left < n) vstore(t.a + i * t.a_ld + k, a, left);
        }
        sum = sum + block;
      }
      T lanes[n];
      vstore(lanes, sum);
      for (int i = 0; i < left; ++i) t.sums[k + i] += static_cast<double>(lanes[i]);
    }
  }
};

// Over t.rows neighbouring pixels of one channel.
struct SumActivatedRow {
  template <Activation A, typename T>
  DSCONV_INLINE void run(const ActivatedTile<T>& t) {
    typedef typename Vec<T>::type V;
    constexpr int n = Vec<T>::n;
    const int64_t whole = t.rows - t.rows % n;
    V sum = vset(T(0));
    for (int64_t first = 0; first < whole; first += kSumBlock * n) {
      const int64_t last = first + kSumBlock * n < whole ? first + kSumBlock * n : whole;
      V block = vset(T(0));
      for (int64_t i = first; i < last; i += n) block = block + act_value<A, T>(vload(t.z + i));
      sum = sum + block;
    }
    double total = vsum(sum);
    if (whole < t.rows) {
      T lanes[n];
      vstore(lanes, act_value<A, T>(vload(t.z + whole, static_cast<int>(t.rows - whole))));
      for (int64_t i = 0; i < t.rows - whole; ++i) total += static_cast<double>(lanes[i]);
    }
    *t.sums += total;
  }
};

// What sum_over_z() makes of z for them.
template <typename S>
struct SumsOfActivated {
  static constexpr int kRows = 1;
  Activation act;
  double* sums;
  S* a;  // of the image, from channel k on; or null
  int64_t a_ld;
  SumsOfActivated(const MomentsContext& ctx, int64_t image, int64_t k, double* partial)
      : act(ctx.act), sums(partial), a(static_cast<S*>(ctx.kept)), a_ld(ctx.geom.c_mid) {
    if (a != nullptr) a += image * ctx.plan.image_pixels * a_ld + k;
  }
  template <typename T>
  void add_tile(const T* z, int64_t ld, int64_t pixel, int64_t count, int64_t channels, int64_t, Ahead&) {
    S* const to = a != nullptr ? a + pixel * a_ld : nullptr;
    const ActivatedTile<T, S> tile = {z, ld, count, channels, sums, to, a_ld};
    for_activation<SumActivated>(act, tile);
  }
  template <typename T>
  void add_row(const T* z, int64_t count, int64_t, int64_t channel) {
    const ActivatedTile<T> row = {z, 0, count, 1, sums + channel, nullptr, 0};
    for_activation<SumActivatedRow>(act, row);
  }
};

template <typename S, typename T>
static void depthwise_sums_of_images(const MomentsContext& ctx, int64_t task, void* scratch) {
  sum_over_z<S, T, SumsOfActivated<S>>(ctx, task, scratch);
}

// ---- backward ----

// g . pw_weight of the panel from k on -> da, `count` pixels of [columns].
template <typename T>
static void through_gate(const BackwardContext& ctx, int64_t pixel, int64_t count, int64_t k, T* da) {
  constexpr int n = Vec<T>::n;
  constexpr int64_t columns = kMicroVecs * n;
  const CpuPlan& plan = ctx.plan;
  for (int64_t i = 0; i < count; ++i, da += columns) {
    const int64_t at = (pixel + i) / plan.image_pixels * plan.mid_columns + k;
    const T *gate = static_cast<const T*>(ctx.gate) + at, *push = static_cast<const T*>(ctx.push) + at;
    for (int64_t j = 0; j < columns; j += n) vstore(da + j, vfma(vload(gate + j), vload(da + j), vload(push + j)));
  }
}

// One image's G_n -> what it adds to grad_pw_weight, and its row of grad_gate; the channels of one task.
template <typename S, typename T>
static void gate_gradients(const GateContext& ctx, int64_t task) {
  typedef typename Vec<T>::type V;
  constexpr int n = Vec<T>::n;
  const int64_t k = task * n, c_mid = ctx.c_mid;
  const int lanes = lanes_left(c_mid - k, n);
  const S *own = static_cast<const S*>(ctx.own) + k, *weight = static_cast<const S*>(ctx.weight) + k;
  const V gate = vload(static_cast<const T*>(ctx.gate) + k, lanes);
  T* sums = static_cast<T*>(ctx.sums) + k;
  V of_gate = vset(T(0));
  for (int64_t o = 0; o < ctx.c_out; ++o, own += c_mid, weight += c_mid, sums += c_mid) {
    const V g = vload(own, lanes);
    of_gate = vfma(vload(weight, lanes), g, of_gate);
    vstore(sums, ctx.first ? gate * g : vfma(gate, g, vload(sums, lanes)), lanes);
  }
  vstore(static_cast<T*>(ctx.grad_gate) + k, of_gate, lanes);
}
