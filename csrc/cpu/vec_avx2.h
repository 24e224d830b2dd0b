// Vectors of the AVX2 + FMA + F16C kernels: 8 floats or 4 doubles. vec_generic.h documents the functions.
// Arithmetic, comparison and selection are the operators of the compiler's vector types.
#if DSCONV_ISA != DSCONV_ISA_AVX2
#error "vec_avx2.h belongs inside the region of cpu_avx2.cpp"
#endif

template <typename T>
struct Vec;
template <>
struct Vec<float> {
  typedef __m256 type;
  typedef __m256i mask;
  static constexpr int n = 8;
};
template <>
struct Vec<double> {
  typedef __m256d type;
  typedef __m256i mask;
  static constexpr int n = 4;
};
constexpr int kMicroRows = 6;
constexpr int kMicroVecs = 2;
constexpr bool kHalfVectors = false;
// 5 x 5 takes 1.1 of the time of turning x: its taps do not fit the registers. Numbers of 16 bits, of which no
// instruction loads some lanes, take 1.5 to 4.5.
template <typename S>
constexpr int kWidestByPlanes = sizeof(S) > 2 ? 3 : 0;

DSCONV_INLINE __m256i mask_of(float, int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
DSCONV_INLINE __m256i mask_of(double, int n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
template <typename T>
DSCONV_INLINE __m256i lanes_between(int from, int to) {
  return _mm256_andnot_si256(mask_of(T(0), from), mask_of(T(0), to));
}

DSCONV_INLINE __m256 vset(float x) { return _mm256_set1_ps(x); }
DSCONV_INLINE __m256d vset(double x) { return _mm256_set1_pd(x); }

DSCONV_INLINE __m256 vload(const float* p) { return _mm256_loadu_ps(p); }
DSCONV_INLINE __m256d vload(const double* p) { return _mm256_loadu_pd(p); }
DSCONV_INLINE __m256 vload(const float* p, int n) { return _mm256_maskload_ps(p, mask_of(0.f, n)); }
DSCONV_INLINE __m256d vload(const double* p, int n) { return _mm256_maskload_pd(p, mask_of(0., n)); }
// Lanes that are not in the mask are zeros, and what they stand for is not read.
DSCONV_INLINE __m256 vload_lanes(const float* p, __m256i lanes) { return _mm256_maskload_ps(p, lanes); }
DSCONV_INLINE __m256d vload_lanes(const double* p, __m256i lanes) { return _mm256_maskload_pd(p, lanes); }
DSCONV_INLINE void vstore(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
DSCONV_INLINE void vstore(double* p, __m256d v) { _mm256_storeu_pd(p, v); }
DSCONV_INLINE void vstore(float* p, __m256 v, int n) { _mm256_maskstore_ps(p, mask_of(0.f, n), v); }
DSCONV_INLINE void vstore(double* p, __m256d v, int n) { _mm256_maskstore_pd(p, mask_of(0., n), v); }
// Past the caches; aligned.
DSCONV_INLINE void vstream_fence() { _mm_sfence(); }
DSCONV_INLINE void vstream(float* p, __m256 v) { _mm256_stream_ps(p, v); }
DSCONV_INLINE void vstream(double* p, __m256d v) { _mm256_stream_pd(p, v); }

DSCONV_INLINE __m128i load_halves(const void* p, int n) {
  uint16_t part[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int i = 0; i < n; ++i) part[i] = static_cast<const uint16_t*>(p)[i];
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(part));
}
DSCONV_INLINE void store_halves(void* p, __m128i v, int n) {
  uint16_t part[8];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(part), v);
  for (int i = 0; i < n; ++i) static_cast<uint16_t*>(p)[i] = part[i];
}
DSCONV_INLINE __m256 widen_bf16(__m128i h) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
// Round to nearest even; a NaN stays one (quiet bit set).
DSCONV_INLINE __m128i narrow_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i top = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
}
DSCONV_INLINE __m256 vload(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
DSCONV_INLINE __m256 vload(const f16* p, int n) { return _mm256_cvtph_ps(load_halves(p, n)); }
DSCONV_INLINE void vstore(f16* p, __m256 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
DSCONV_INLINE void vstream(f16* p, __m256 v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
DSCONV_INLINE void vstore(f16* p, __m256 v, int n) {
  store_halves(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT), n);
}
DSCONV_INLINE __m256 vload(const bf16* p) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
DSCONV_INLINE __m256 vload(const bf16* p, int n) { return widen_bf16(load_halves(p, n)); }
DSCONV_INLINE void vstore(bf16* p, __m256 v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v)); }
DSCONV_INLINE void vstream(bf16* p, __m256 v) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v)); }
DSCONV_INLINE void vstore(bf16* p, __m256 v, int n) { store_halves(p, narrow_bf16(v), n); }

DSCONV_INLINE __m256 vfma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
DSCONV_INLINE __m256d vfma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
DSCONV_INLINE __m256 vmax(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
DSCONV_INLINE __m256d vmax(__m256d a, __m256d b) { return _mm256_max_pd(a, b); }
DSCONV_INLINE __m256 vmin(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
DSCONV_INLINE __m256d vmin(__m256d a, __m256d b) { return _mm256_min_pd(a, b); }

DSCONV_INLINE __m256 vround(__m256 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
DSCONV_INLINE __m256 vpow2(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}

DSCONV_INLINE double vsum(__m256d a) {
  const __m128d half = _mm256_castpd256_pd128(a) + _mm256_extractf128_pd(a, 1);
  return half[0] + half[1];
}
DSCONV_INLINE double vsum(__m256 a) {
  return vsum(_mm256_cvtps_pd(_mm256_castps256_ps128(a)) + _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
}

// Lanes 0, 2, 4, ... of a, then of b.
DSCONV_INLINE __m256 veven(__m256 a, __m256 b) {
  const __m256d pairs = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
  return _mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xd8));
}
DSCONV_INLINE __m256d veven(__m256d a, __m256d b) { return _mm256_permute4x64_pd(_mm256_unpacklo_pd(a, b), 0xd8); }

// Lanes 1, 3, 5, ... of a, then of b.
DSCONV_INLINE __m256 vodd(__m256 a, __m256 b) {
  const __m256d pairs = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd));
  return _mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xd8));
}
DSCONV_INLINE __m256d vodd(__m256d a, __m256d b) { return _mm256_permute4x64_pd(_mm256_unpackhi_pd(a, b), 0xd8); }

// Lanes of a and b in turn: a0 b0 a1 b1 ..., of the first halves, and of the second.
DSCONV_INLINE __m256 vinterleave_low(__m256 a, __m256 b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}
DSCONV_INLINE __m256d vinterleave_low(__m256d a, __m256d b) {
  return _mm256_permute2f128_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b), 0x20);
}
DSCONV_INLINE __m256 vinterleave_high(__m256 a, __m256 b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}
DSCONV_INLINE __m256d vinterleave_high(__m256d a, __m256d b) {
  return _mm256_permute2f128_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b), 0x31);
}

// The last lane of a, then those of b but its last; those of a but its first, then the first lane of b.
DSCONV_INLINE __m256 vbehind(__m256 a, __m256 b) {
  const __m256 middle = _mm256_permute2f128_ps(a, b, 0x21);
  return _mm256_castsi256_ps(_mm256_alignr_epi8(_mm256_castps_si256(b), _mm256_castps_si256(middle), 12));
}
DSCONV_INLINE __m256d vbehind(__m256d a, __m256d b) {
  return _mm256_shuffle_pd(_mm256_permute2f128_pd(a, b, 0x21), b, 0x5);
}
DSCONV_INLINE __m256 vahead(__m256 a, __m256 b) {
  const __m256 middle = _mm256_permute2f128_ps(a, b, 0x21);
  return _mm256_castsi256_ps(_mm256_alignr_epi8(_mm256_castps_si256(middle), _mm256_castps_si256(a), 4));
}
DSCONV_INLINE __m256d vahead(__m256d a, __m256d b) {
  return _mm256_shuffle_pd(a, _mm256_permute2f128_pd(a, b, 0x21), 0x5);
}

DSCONV_INLINE void vtranspose(__m256 (&r)[8]) {
  const __m256 a0 = _mm256_unpacklo_ps(r[0], r[1]), a1 = _mm256_unpackhi_ps(r[0], r[1]);
  const __m256 a2 = _mm256_unpacklo_ps(r[2], r[3]), a3 = _mm256_unpackhi_ps(r[2], r[3]);
  const __m256 a4 = _mm256_unpacklo_ps(r[4], r[5]), a5 = _mm256_unpackhi_ps(r[4], r[5]);
  const __m256 a6 = _mm256_unpacklo_ps(r[6], r[7]), a7 = _mm256_unpackhi_ps(r[6], r[7]);
  const __m256 b0 = _mm256_shuffle_ps(a0, a2, 0x44), b1 = _mm256_shuffle_ps(a0, a2, 0xee);
  const __m256 b2 = _mm256_shuffle_ps(a1, a3, 0x44), b3 = _mm256_shuffle_ps(a1, a3, 0xee);
  const __m256 b4 = _mm256_shuffle_ps(a4, a6, 0x44), b5 = _mm256_shuffle_ps(a4, a6, 0xee);
  const __m256 b6 = _mm256_shuffle_ps(a5, a7, 0x44), b7 = _mm256_shuffle_ps(a5, a7, 0xee);
  r[0] = _mm256_permute2f128_ps(b0, b4, 0x20);
  r[1] = _mm256_permute2f128_ps(b1, b5, 0x20);
  r[2] = _mm256_permute2f128_ps(b2, b6, 0x20);
  r[3] = _mm256_permute2f128_ps(b3, b7, 0x20);
  r[4] = _mm256_permute2f128_ps(b0, b4, 0x31);
  r[5] = _mm256_permute2f128_ps(b1, b5, 0x31);
  r[6] = _mm256_permute2f128_ps(b2, b6, 0x31);
  r[7] = _mm256_permute2f128_ps(b3, b7, 0x31);
}
DSCONV_INLINE void vtranspose(__m256d (&r)[4]) {
  const __m256d a0 = _mm256_unpacklo_pd(r[0], r[1]), a1 = _mm256_unpackhi_pd(r[0], r[1]);
  const __m256d a2 = _mm256_unpacklo_pd(r[2], r[3]), a3 = _mm256_unpackhi_pd(r[2], r[3]);
  r[0] = _mm256_permute2f128_pd(a0, a2, 0x20);
  r[1] = _mm256_permute2f128_pd(a1, a3, 0x20);
  r[2] = _mm256_permute2f128_pd(a0, a2, 0x31);
  r[3] = _mm256_permute2f128_pd(a1, a3, 0x31);
}
