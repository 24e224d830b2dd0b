// exp, tanh and erf on vectors. Doubles go lane by lane through libm.
#ifndef DSCONV_ISA
#error "math.inl belongs inside an ISA region"
#endif

#define DSCONV_LANE_BY_LANE(name, vec, lanes, function)    \
  DSCONV_INLINE vec name(vec x) {                          \
    vec r = x;                                             \
    for (int i = 0; i < lanes; ++i) r[i] = function(x[i]); \
    return r;                                              \
  }
DSCONV_LANE_BY_LANE(vexp, Vec<double>::type, Vec<double>::n, __builtin_exp)
DSCONV_LANE_BY_LANE(vtanh, Vec<double>::type, Vec<double>::n, __builtin_tanh)
DSCONV_LANE_BY_LANE(verf, Vec<double>::type, Vec<double>::n, __builtin_erf)
DSCONV_LANE_BY_LANE(vexp, Vec<float>::type, Vec<float>::n, __builtin_expf)
DSCONV_LANE_BY_LANE(vtanh, Vec<float>::type, Vec<float>::n, __builtin_tanhf)
DSCONV_LANE_BY_LANE(verf, Vec<float>::type, Vec<float>::n, __builtin_erff)
#undef DSCONV_LANE_BY_LANE
