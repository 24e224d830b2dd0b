// The activations and their derivatives, on vectors. Kinks follow PyTorch: which side a kink belongs to, and what a NaN
// gives (relu and relu6 pass gradients of a NaN on, hard functions count it as the upper side).
//
// identity, relu and relu6 are a clamp, which depthwise and epilogue apply in registers; the others run as a second
// pass over a tile in L1.
#ifndef DSCONV_ISA
#error "activation.inl belongs inside an ISA region"
#endif

template <typename T>
struct Clamp {
  T lo, hi;
};

// The clamp an activation begins with; what is_clamp() says no to still needs its pass.
template <typename T>
DSCONV_INLINE Clamp<T> clamp_of(Activation a) {
  const T inf = static_cast<T>(__builtin_inf());
  Clamp<T> c = {-inf, inf};
  if (a == Activation::relu || a == Activation::relu6) c.lo = 0;
  if (a == Activation::relu6) c.hi = 6;
  return c;
}

// (1 + tanh u) / 2 is sigmoid(2 u), which loses no digits where tanh u is near -1: e^(-2 u) of gelu_tanh.
template <typename T, typename V>
DSCONV_INLINE V gelu_tanh_exponential(V z) {
  return vexp(-z * vfma(vset(T(0.07135481627260024878)), z * z, vset(T(1.59576912160573071176))));
}

template <Activation A, typename T, typename V>
DSCONV_INLINE V act_value(V z) {
  const V zero = vset(T(0)), one = vset(T(1)), half = vset(T(0.5));
  if constexpr (A == Activation::relu) return vmax(zero, z);
  if constexpr (A == Activation::relu6) return vmin(vset(T(6)), vmax(zero, z));
  if constexpr (A == Activation::leaky_relu) return z > zero ? z : z * vset(T(0.01));
  if constexpr (A == Activation::silu) return z / (one + vexp(-z));
  if constexpr (A == Activation::hardswish) return z * vmin(vset(T(6)), vmax(zero, z + vset(T(3)))) * vset(T(1. / 6));
  if constexpr (A == Activation::gelu) return half * z * (one + verf(z * vset(T(0.70710678118654752440))));
  if constexpr (A == Activation::gelu_tanh) return z / (one + gelu_tanh_exponential<T>(z));
  if constexpr (A == Activation::sigmoid) return one / (one + vexp(-z));
  if constexpr (A == Activation::tanh) return vtanh(z);
  if constexpr (A == Activation::hardsigmoid) return vmin(vset(T(6)), vmax(zero, z + vset(T(3)))) * vset(T(1. / 6));
  return z;
}

template <Activation A, typename T, typename V>
DSCONV_INLINE V act_derivative(V z) {
  const V zero = vset(T(0)), one = vset(T(1)), half = vset(T(0.5)), three = vset(T(3));
  if constexpr (A == Activation::relu) return z <= zero ? zero : one;
  if constexpr (A == Activation::relu6) return z <= zero ? zero : (z >= vset(T(6)) ? zero : one);
  if constexpr (A == Activation::leaky_relu) return z > zero ? one : vset(T(0.01));
  if constexpr (A == Activation::silu) {
    const V s = one / (one + vexp(-z));
    return s * (one + z * (one - s));
  }
  if constexpr (A == Activation::hardswish) {
    return z <= -three ? zero : (z < three ? z * vset(T(1. / 3)) + half : one);
  }
  if constexpr (A == Activation::gelu) {
    const V cdf = half * (one + verf(z * vset(T(0.70710678118654752440))));
    return cdf + z * vset(T(0.39894228040143267794)) * vexp(-half * z * z);
  }
  if constexpr (A == Activation::gelu_tanh) {
    // 1 - s == e * s, without cancellation; e stays finite.
    const V e = vmin(vset(T(1e30)), gelu_tanh_exponential<T>(z)), s = one / (one + e);
    const V slope = vfma(vset(T(3 * 0.07135481627260024878)), z * z, vset(T(1.59576912160573071176)));
    return vfma(z * s * slope, e * s, s);
  }
  if constexpr (A == Activation::sigmoid) {
    const V s = one / (one + vexp(-z));
    return s * (one - s);
  }
  if constexpr (A == Activation::tanh) return vtanh_derivative(z);
  if constexpr (A == Activation::hardsigmoid) return z > -three ? (z < three ? vset(T(1. / 6)) : zero) : zero;
  return one;
}

// The derivative from what forward kept: the output where derivative_from_output(A), else the value before.
template <Activation A, typename T, typename V>
DSCONV_INLINE V out_derivative(V saved) {
  const V one = vset(T(1));
  if constexpr (A == Activation::sigmoid) return saved * (one - saved);
  if constexpr (A == Activation::tanh) return one - saved * saved;
  return act_derivative<A, T>(saved);
}

// v <- act(v) over n elements. Reads and writes whole vectors: n rounded up to them must be in the buffer.
struct ActivateInPlace {
  template <Activation A, typename M>
  DSCONV_INLINE void run(int64_t n, M* v, M*) {
    typedef typename ComputeOf<M>::type T;
    for (int64_t i = 0; i < n; i += Vec<T>::n) vstore(v + i, act_value<A, T>(vload(v + i)));
  }
};
// z -> a = act(z), z <- act'(z)
struct ActivateAndDerive {
  template <Activation A, typename T>
  DSCONV_INLINE void run(int64_t n, T* z, T* a) {
    for (int64_t i = 0; i < n; i += Vec<T>::n) {
      const typename Vec<T>::type v = vload(z + i);
      vstore(a + i, act_value<A, T>(v));
      vstore(z + i, act_derivative<A, T>(v));
    }
  }
};
// g <- g * out_act'(saved)
struct ScaleByOutDerivative {
  template <Activation A, typename T>
  DSCONV_INLINE void run(int64_t n, T* g, T* saved) {
    for (int64_t i = 0; i < n; i += Vec<T>::n) vstore(g + i, vload(g + i) * out_derivative<A, T>(vload(saved + i)));
  }
};

template <typename Pass, typename Tile>
static void for_activation(Activation a, const Tile& tile) {
  switch (a) {
#define DSCONV_CASE(name) \
  case Activation::name:  \
    return Pass::template run<Activation::name>(tile);
    DSCONV_CASE(identity)
    DSCONV_CASE(relu)
    DSCONV_CASE(relu6)
    DSCONV_CASE(leaky_relu)
    DSCONV_CASE(silu)
    DSCONV_CASE(hardswish)
    DSCONV_CASE(gelu)
    DSCONV_CASE(gelu_tanh)
    DSCONV_CASE(sigmoid)
    DSCONV_CASE(tanh)
    DSCONV_CASE(hardsigmoid)
#undef DSCONV_CASE
  }
}

template <typename Pass, typename T>
struct OverBuffers {
  int64_t n;
  T *first, *second;
  template <Activation A>
  DSCONV_INLINE void run(const OverBuffers& buffers) {
    Pass::template run<A>(buffers.n, buffers.first, buffers.second);
  }
};
template <typename Pass, typename T>
static void activation_pass(Activation a, int64_t n, T* first, T* second) {
  const OverBuffers<Pass, T> buffers = {n, first, second};
  for_activation<OverBuffers<Pass, T>>(a, buffers);
}
