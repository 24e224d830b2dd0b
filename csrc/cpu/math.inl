// exp, tanh and erf on vectors. Floats go through polynomials, within about 2 ulp; doubles lane by lane through libm.
#ifndef DSCONV_ISA
#error "math.inl belongs inside an ISA region"
#endif

typedef Vec<float>::type FloatVec;

// c[0] + c[1] x + ... by Horner's rule.
template <int N>
DSCONV_INLINE FloatVec polynomial(FloatVec x, const float (&c)[N]) {
  FloatVec r = vset(c[N - 1]);
  DSCONV_UNROLL
  for (int i = N - 2; i >= 0; --i) r = vfma(r, x, vset(c[i]));
  return r;
}

// e^x - 1 = 2^n (e^r - 1) + (2^n - 1) with x = n ln 2 + r, |r| <= ln 2 / 2.
struct ExpParts {
  FloatVec n, expm1_r;
};
DSCONV_INLINE ExpParts exp_parts(FloatVec x) {
  constexpr float series[] = {1.f, 1.f / 2, 1.f / 6, 1.f / 24, 1.f / 120, 1.f / 720, 1.f / 5040};
  ExpParts p;
  p.n = vround(x * vset(1.44269504088896341f));
  // ln 2 in two parts; the first has few enough bits that its product with n is exact.
  const FloatVec r = vfma(p.n, vset(-1.42860682030941723e-6f), vfma(p.n, vset(-0.693145751953125f), x));
  p.expm1_r = polynomial(r, series) * r;
  return p;
}

DSCONV_INLINE FloatVec vexp(FloatVec x) {
  // Beyond these e^x is 0 or infinite in float, and 2^n is made of two factors that are not.
  const ExpParts p = exp_parts(vmax(vset(-104.f), vmin(vset(89.f), x)));
  const FloatVec half = vround(p.n * vset(0.5f));
  return (p.expm1_r + vset(1.f)) * vpow2(half) * vpow2(p.n - half);
}

DSCONV_INLINE FloatVec vabs(FloatVec x) { return vmax(x, -x); }

// t = e^(-2|x|) - 1 gives |tanh x| = -t / (2 + t) and tanh' x = 4 (1 + t) / (2 + t)^2, without cancellation.
DSCONV_INLINE FloatVec tanh_term(FloatVec x) {
  const ExpParts p = exp_parts(vmax(vset(-87.f), vset(-2.f) * vabs(x)));
  const FloatVec scale = vpow2(p.n);
  return vfma(scale, p.expm1_r, scale - vset(1.f));
}
DSCONV_INLINE FloatVec vtanh(FloatVec x) {
  const FloatVec t = tanh_term(x), r = t / (t + vset(2.f));
  return x > vset(0.f) ? -r : r;
}
DSCONV_INLINE FloatVec vtanh_derivative(FloatVec x) {
  const FloatVec t = tanh_term(x), d = t + vset(2.f);
  return (vset(4.f) * (t + vset(1.f))) / (d * d);
}

// Below 1 the power series; above, 1 - e^p with p a least-squares fit of log erfc on [1, 4].
DSCONV_INLINE FloatVec verf(FloatVec x) {
  constexpr float series[] = {1.1283791671e+0f, -3.7612638903e-1f, 1.1283791671e-1f, -2.6866170645e-2f,
                              5.2239776254e-3f, -8.5483270235e-4f, 1.2055332982e-4f, -1.4925650358e-5f,
                              1.6462114366e-6f, -1.6365844691e-7f, 1.4807192816e-8f};
  constexpr float log_erfc[] = {1.8803690823e-4f, -1.1295784077e+0f, -6.3321992776e-1f, -1.0841853795e-1f,
                                2.5208230501e-2f, -4.2045516211e-3f, 4.4133420121e-4f,  -2.1686656501e-5f};
  const FloatVec magnitude = vmin(vset(4.f), vabs(x));
  const FloatVec one = vset(1.f);
  const FloatVec outer = one - vexp(polynomial(magnitude, log_erfc));
  return magnitude < one ? x * polynomial(x * x, series) : (x < vset(0.f) ? -outer : outer);
}

#define DSCONV_LANE_BY_LANE(name, function)                         \
  DSCONV_INLINE Vec<double>::type name(Vec<double>::type x) {       \
    Vec<double>::type r = x;                                        \
    for (int i = 0; i < Vec<double>::n; ++i) r[i] = function(x[i]); \
    return r;                                                       \
  }
DSCONV_LANE_BY_LANE(vexp, __builtin_exp)
DSCONV_LANE_BY_LANE(vtanh, __builtin_tanh)
DSCONV_LANE_BY_LANE(verf, __builtin_erf)
#undef DSCONV_LANE_BY_LANE
DSCONV_INLINE Vec<double>::type vtanh_derivative(Vec<double>::type x) {
  const Vec<double>::type t = vtanh(x);
  return vset(1.) - t * t;
}
