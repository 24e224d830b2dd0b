// Vectors of the generic kernels: 16 bytes in the compiler's own vector types, which every target has or lowers.
//
// The API every vec_*.h offers (T is float or double, S any storage type, V = Vec<T>::type with Vec<T>::n lanes):
//   vset(x)                    all lanes x
//   vload(p), vload(p, n)      from S, converted to its compute type; with n, lanes >= n are zero and not read
//   vstore(p, v), (p, v, n)    to S, round to nearest even; with n, only the first n lanes
//   vstream(p, v)              vstore to a p aligned to the vector, past the caches; vstream_fence() ends a run of them
//   vfma(a, b, c)              a * b + c
//   vmax(a, b), vmin(a, b)     b where either is NaN
//   vround(v), vpow2(v)        floats: nearest integer; 2^v for integral v in [-126, 127]
//   vsum(a)                    the sum of the lanes, in double
//   veven(a, b)                lanes 0, 2, 4, ... of a, then of b
//   vtranspose(r[n])           n x n lanes
//   kHalfVectors               whether two halves can share a vector: vload_twice(p), half a vector in both halves,
//                              vhalves(a, b), the lower half of a and the upper of b, and vlower(v), vupper(v), either
//                              half with zeros behind; Vec<T>::half, half a vector: vset_half(x), vhalf(v), the lower
//                              one, vwhole(h), with zeros behind, and vfma
//   kMicroRows, kMicroVecs     register block of the GEMM micro-kernel
//   kWidestByPlanes<S>         the widest kernel that goes by planes (depthwise_planes.inl), which need more than this:
//                              vodd(a, b), vinterleave_low(a, b) and _high, vbehind(a, b), vahead(a, b), Vec<T>::mask,
//                              lanes_between<T>(from, to), vload_lanes(p, mask)
#if DSCONV_ISA != DSCONV_ISA_GENERIC
#error "vec_generic.h belongs inside the region of cpu_generic.cpp"
#endif

typedef float v4f __attribute__((vector_size(16)));
typedef double v2d __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));

template <typename T>
struct Vec;
template <>
struct Vec<float> {
  typedef v4f type;
  static constexpr int n = 4;
};
template <>
struct Vec<double> {
  typedef v2d type;
  static constexpr int n = 2;
};
constexpr int kMicroRows = 4;
constexpr int kMicroVecs = 2;
constexpr bool kHalfVectors = false;
template <typename S>
constexpr int kWidestByPlanes = 0;

DSCONV_INLINE float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
DSCONV_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

DSCONV_INLINE float widen(float x) { return x; }
DSCONV_INLINE double widen(double x) { return x; }
DSCONV_INLINE float widen(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
DSCONV_INLINE float widen(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = (x.bits >> 10) & 31, mantissa = x.bits & 0x3ff;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in float
    return bits_to_float(sign | float_to_bits(static_cast<float>(mantissa) * 0x1p-24f));
  }
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0));
  return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

DSCONV_INLINE void narrow(float x, float* p) { *p = x; }
DSCONV_INLINE void narrow(double x, double* p) { *p = x; }
DSCONV_INLINE void narrow(float x, bf16* p) {
  const uint32_t u = float_to_bits(x);
  const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
  p->bits = static_cast<uint16_t>((is_nan ? (u | 0x400000u) : (u + 0x7fffu + ((u >> 16) & 1))) >> 16);
}
DSCONV_INLINE void narrow(float x, f16* p) {
  const uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  } else if (magnitude >= 0x47800000u) {  // 2^16 and more
    half = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the mantissa rounded at 2^-24
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | half);
}

DSCONV_INLINE v4f vset(float x) { return v4f{x, x, x, x}; }
DSCONV_INLINE v2d vset(double x) { return v2d{x, x}; }

DSCONV_INLINE v4f vload(const float* p) {
  v4f v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
DSCONV_INLINE v2d vload(const double* p) {
  v2d v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
DSCONV_INLINE v4f vload(const f16* p) { return v4f{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
DSCONV_INLINE v4f vload(const bf16* p) { return v4f{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
DSCONV_INLINE v2d vload(const double* p, int n) { return v2d{n > 0 ? p[0] : 0., n > 1 ? p[1] : 0.}; }
template <typename S>
DSCONV_INLINE v4f vload(const S* p, int n) {
  return v4f{n > 0 ? widen(p[0]) : 0.f, n > 1 ? widen(p[1]) : 0.f, n > 2 ? widen(p[2]) : 0.f,
             n > 3 ? widen(p[3]) : 0.f};
}

DSCONV_INLINE void vstore(float* p, v4f v) { __builtin_memcpy(p, &v, sizeof v); }
DSCONV_INLINE void vstore(double* p, v2d v) { __builtin_memcpy(p, &v, sizeof v); }
template <typename S, typename V>
DSCONV_INLINE void vstore(S* p, V v, int n) {
  for (int i = 0; i < n; ++i) narrow(v[i], p + i);
}
DSCONV_INLINE void vstore(f16* p, v4f v) { vstore(p, v, 4); }
DSCONV_INLINE void vstore(bf16* p, v4f v) { vstore(p, v, 4); }
// The baseline has no such stores for every type.
template <typename S, typename V>
DSCONV_INLINE void vstream(S* p, V v) {
  vstore(p, v);
}
DSCONV_INLINE void vstream_fence() {}

template <typename V>
DSCONV_INLINE V vfma(V a, V b, V c) {
  return a * b + c;
}
template <typename V>
DSCONV_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}
template <typename V>
DSCONV_INLINE V vmin(V a, V b) {
  return a < b ? a : b;
}

DSCONV_INLINE v4f vround(v4f a) {
  const v4f magic = vset(0x1.8p23f);  // |a| < 2^22 here: adding it leaves no fraction bits
  return (a + magic) - magic;
}
DSCONV_INLINE v4f vpow2(v4f n) {
  const v4i e = (__builtin_convertvector(n, v4i) + 127) << 23;
  v4f r;
  __builtin_memcpy(&r, &e, sizeof r);
  return r;
}

DSCONV_INLINE double vsum(v2d a) { return a[0] + a[1]; }
DSCONV_INLINE double vsum(v4f a) {
  return static_cast<double>(a[0]) + static_cast<double>(a[1]) +
         (static_cast<double>(a[2]) + static_cast<double>(a[3]));
}
DSCONV_INLINE v4f veven(v4f a, v4f b) { return v4f{a[0], a[2], b[0], b[2]}; }
DSCONV_INLINE v2d veven(v2d a, v2d b) { return v2d{a[0], b[0]}; }

template <typename V, int N>
DSCONV_INLINE void vtranspose(V (&r)[N]) {
  for (int i = 0; i < N; ++i) {
    for (int j = i + 1; j < N; ++j) {
      const auto t = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = t;
    }
  }
}
