// x as a norm and an activation leave it, u = act(gamma * xhat + beta), xhat = (x - mean) * invstd, made where x is
// read: the block before kept x and wrote no u. Outside the image the depthwise reads zeros, not act(beta).
//
// Some rows of an image, one vector of channels: its four values a channel stay in registers.
#ifndef DSCONV_ISA
#error "input_norm.inl belongs inside an ISA region"
#endif

template <typename S>
struct LaneRows {
  typedef typename ComputeOf<S>::type T;
  const S* from;
  int64_t row_step, column_step, rows, columns;
  int left;  // channels
  T* to;     // [rows][columns][lanes]
  const T* norm;
  int64_t ld;  // from one row of `norm` to the next
};

template <bool Tail>
struct NormLanes {
  template <Activation A, typename S>
  static void run(const LaneRows<S>& r) {
    typedef typename LaneRows<S>::T T;
    typedef typename Vec<T>::type V;
    const V mean = vload(r.norm), invstd = vload(r.norm + r.ld);
    const V gamma = vload(r.norm + 2 * r.ld), beta = vload(r.norm + 3 * r.ld);
    T* to = r.to;
    for (int64_t row = 0; row < r.rows; ++row) {
      const S* from = r.from + row * r.row_step;
      for (int64_t i = 0; i < r.columns; ++i, from += r.column_step, to += Vec<T>::n) {
        const V hat = (load_lanes<Tail>(from, r.left) - mean) * invstd;
        vstore(to, act_value<A, T>(vfma(gamma, hat, beta)));
      }
    }
  }
};

// The channels c .. c + channels, a vector of them at most.
template <typename S, typename T>
static void norm_lanes(const InputNorm& norm, int64_t c, int channels, const S* from, int64_t row_step,
                       int64_t column_step, int64_t rows, int64_t columns, T* to) {
  const LaneRows<S> r = {
      from, row_step, column_step, rows, columns, channels, to, static_cast<const T*>(norm.rows) + c, norm.ld};
  if (channels == Vec<T>::n) {
    for_activation<NormLanes<false>>(norm.act, r);
  } else {
    for_activation<NormLanes<true>>(norm.act, r);
  }
}

// The same norm for channels from k on, as if they were all.
template <typename T>
DSCONV_INLINE InputNorm norm_from(const InputNorm& norm, int64_t k) {
  if (norm.rows == nullptr) return norm;
  return {static_cast<const T*>(norm.rows) + k, norm.ld, norm.act};
}
