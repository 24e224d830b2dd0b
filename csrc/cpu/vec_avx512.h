// Vectors of the AVX-512 kernels: 16 floats or 8 doubles. vec_generic.h documents the functions.
// tests/isa_emulation/immintrin.h implements the _mm512 intrinsics named here; a new one has to be added there too.
#if DSCONV_ISA != DSCONV_ISA_AVX512
#error "vec_avx512.h belongs inside the region of cpu_avx512.cpp"
#endif

template <typename T>
struct Vec;
template <>
struct Vec<float> {
  typedef __m512 type;
  typedef __m256 half;
  typedef __mmask16 mask;
  static constexpr int n = 16;
};
template <>
struct Vec<double> {
  typedef __m512d type;
  typedef __m256d half;
  typedef __mmask8 mask;
  static constexpr int n = 8;
};
constexpr int kMicroRows = 14;
constexpr int kMicroVecs = 2;
constexpr bool kHalfVectors = true;
template <typename S>
constexpr int kWidestByPlanes = 5;

DSCONV_INLINE __mmask16 first16(int n) { return static_cast<__mmask16>((1u << n) - 1); }
DSCONV_INLINE __mmask8 first8(int n) { return static_cast<__mmask8>((1u << n) - 1); }

template <typename T>
DSCONV_INLINE typename Vec<T>::mask lanes_between(int from, int to) {
  return static_cast<typename Vec<T>::mask>(first16(to) & ~first16(from));
}

DSCONV_INLINE __m512 vset(float x) { return _mm512_set1_ps(x); }
DSCONV_INLINE __m512d vset(double x) { return _mm512_set1_pd(x); }

DSCONV_INLINE __m512 vload(const float* p) { return _mm512_loadu_ps(p); }
DSCONV_INLINE __m512d vload(const double* p) { return _mm512_loadu_pd(p); }
DSCONV_INLINE __m512 vload(const float* p, int n) { return _mm512_maskz_loadu_ps(first16(n), p); }
DSCONV_INLINE __m512d vload(const double* p, int n) { return _mm512_maskz_loadu_pd(first8(n), p); }
// Lanes that are not in the mask are zeros, and what they stand for is not read.
DSCONV_INLINE __m512 vload_lanes(const float* p, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, p); }
DSCONV_INLINE __m512d vload_lanes(const double* p, __mmask8 lanes) { return _mm512_maskz_loadu_pd(lanes, p); }
DSCONV_INLINE void vstore(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
DSCONV_INLINE void vstore(double* p, __m512d v) { _mm512_storeu_pd(p, v); }
DSCONV_INLINE void vstore(float* p, __m512 v, int n) { _mm512_mask_storeu_ps(p, first16(n), v); }
DSCONV_INLINE void vstore(double* p, __m512d v, int n) { _mm512_mask_storeu_pd(p, first8(n), v); }
// Past the caches; aligned.
DSCONV_INLINE void vstream_fence() { _mm_sfence(); }
DSCONV_INLINE void vstream(float* p, __m512 v) { _mm512_stream_ps(p, v); }
DSCONV_INLINE void vstream(double* p, __m512d v) { _mm512_stream_pd(p, v); }

DSCONV_INLINE __m256i load_halves(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
DSCONV_INLINE __m256i load_halves(const void* p, __mmask16 lanes) { return _mm256_maskz_loadu_epi16(lanes, p); }
DSCONV_INLINE __m256i load_halves(const void* p, int n) { return load_halves(p, first16(n)); }
DSCONV_INLINE void store_halves(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
DSCONV_INLINE void store_halves(void* p, __m256i v, int n) { _mm256_mask_storeu_epi16(p, first16(n), v); }
DSCONV_INLINE __m512 widen_bf16(__m256i h) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
#if defined(DSCONV_BF16_DOT)
DSCONV_INLINE __m256i narrow_bf16(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
#else
// Round to nearest even; a NaN stays one (quiet bit set).
DSCONV_INLINE __m256i narrow_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, rounded, quiet), 16));
}
#endif
DSCONV_INLINE __m256i narrow_f16(__m512 v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
DSCONV_INLINE __m512 vload(const f16* p) { return _mm512_cvtph_ps(load_halves(p)); }
DSCONV_INLINE __m512 vload(const f16* p, int n) { return _mm512_cvtph_ps(load_halves(p, n)); }
DSCONV_INLINE __m512 vload_lanes(const f16* p, __mmask16 lanes) { return _mm512_cvtph_ps(load_halves(p, lanes)); }
DSCONV_INLINE void vstore(f16* p, __m512 v) { store_halves(p, narrow_f16(v)); }
DSCONV_INLINE void vstream(f16* p, __m512 v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_f16(v)); }
DSCONV_INLINE void vstore(f16* p, __m512 v, int n) { store_halves(p, narrow_f16(v), n); }
DSCONV_INLINE __m512 vload(const bf16* p) { return widen_bf16(load_halves(p)); }
DSCONV_INLINE __m512 vload(const bf16* p, int n) { return widen_bf16(load_halves(p, n)); }
DSCONV_INLINE __m512 vload_lanes(const bf16* p, __mmask16 lanes) { return widen_bf16(load_halves(p, lanes)); }
DSCONV_INLINE void vstore(bf16* p, __m512 v) { store_halves(p, narrow_bf16(v)); }
DSCONV_INLINE void vstream(bf16* p, __m512 v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v)); }
DSCONV_INLINE void vstore(bf16* p, __m512 v, int n) { store_halves(p, narrow_bf16(v), n); }

DSCONV_INLINE __m512 vfma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
DSCONV_INLINE __m512d vfma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
DSCONV_INLINE __m256 vfma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
DSCONV_INLINE __m256d vfma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
DSCONV_INLINE __m256 vset_half(float x) { return _mm256_set1_ps(x); }
DSCONV_INLINE __m256d vset_half(double x) { return _mm256_set1_pd(x); }
DSCONV_INLINE __m256 vhalf(__m512 v) { return _mm512_castps512_ps256(v); }
DSCONV_INLINE __m256d vhalf(__m512d v) { return _mm512_castpd512_pd256(v); }
DSCONV_INLINE __m512 vwhole(__m256 half) { return _mm512_zextps256_ps512(half); }
DSCONV_INLINE __m512d vwhole(__m256d half) { return _mm512_zextpd256_pd512(half); }
DSCONV_INLINE __m512 vload_twice(const float* p) { return _mm512_broadcast_f32x8(_mm256_loadu_ps(p)); }
DSCONV_INLINE __m512d vload_twice(const double* p) { return _mm512_broadcast_f64x4(_mm256_loadu_pd(p)); }
DSCONV_INLINE __m512 vhalves(__m512 a, __m512 b) { return _mm512_mask_blend_ps(0xff00, a, b); }
DSCONV_INLINE __m512d vhalves(__m512d a, __m512d b) { return _mm512_mask_blend_pd(0xf0, a, b); }
DSCONV_INLINE __m512 vlower(__m512 v) { return _mm512_shuffle_f32x4(v, vset(0.f), 0x04); }
DSCONV_INLINE __m512 vupper(__m512 v) { return _mm512_shuffle_f32x4(v, vset(0.f), 0x0e); }
DSCONV_INLINE __m512d vlower(__m512d v) { return _mm512_castps_pd(vlower(_mm512_castpd_ps(v))); }
DSCONV_INLINE __m512d vupper(__m512d v) { return _mm512_castps_pd(vupper(_mm512_castpd_ps(v))); }
DSCONV_INLINE __m512 vmax(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
DSCONV_INLINE __m512d vmax(__m512d a, __m512d b) { return _mm512_max_pd(a, b); }
DSCONV_INLINE __m512 vmin(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }
DSCONV_INLINE __m512d vmin(__m512d a, __m512d b) { return _mm512_min_pd(a, b); }

DSCONV_INLINE __m512 vround(__m512 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
DSCONV_INLINE __m512 vpow2(__m512 n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}

DSCONV_INLINE double vsum(__m512d a) { return _mm512_reduce_add_pd(a); }
DSCONV_INLINE double vsum(__m512 a) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1));
  return vsum(low + high);
}

// Lanes 0, 2, 4, ... of a, then of b.
DSCONV_INLINE __m512d veven(__m512d a, __m512d b) {
  return _mm512_permutex2var_pd(a, _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), b);
}
DSCONV_INLINE __m512 veven(__m512 a, __m512 b) {
  return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), b);
}

// Lanes 1, 3, 5, ... of a, then of b.
DSCONV_INLINE __m512d vodd(__m512d a, __m512d b) {
  return _mm512_permutex2var_pd(a, _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15), b);
}
DSCONV_INLINE __m512 vodd(__m512 a, __m512 b) {
  return _mm512_permutex2var_ps(a, _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31), b);
}

// Lanes of a and b in turn: a0 b0 a1 b1 ..., of the first halves, and of the second.
DSCONV_INLINE __m512d vinterleave_low(__m512d a, __m512d b) {
  return _mm512_permutex2var_pd(a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b);
}
DSCONV_INLINE __m512 vinterleave_low(__m512 a, __m512 b) {
  return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b);
}
DSCONV_INLINE __m512d vinterleave_high(__m512d a, __m512d b) {
  return _mm512_permutex2var_pd(a, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b);
}
DSCONV_INLINE __m512 vinterleave_high(__m512 a, __m512 b) {
  return _mm512_permutex2var_ps(a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b);
}

// The last lane of a, then those of b but its last; those of a but its first, then the first lane of b.
DSCONV_INLINE __m512 vbehind(__m512 a, __m512 b) {
  return _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(b), _mm512_castps_si512(a), 15));
}
DSCONV_INLINE __m512d vbehind(__m512d a, __m512d b) {
  return _mm512_castsi512_pd(_mm512_alignr_epi64(_mm512_castpd_si512(b), _mm512_castpd_si512(a), 7));
}
DSCONV_INLINE __m512 vahead(__m512 a, __m512 b) {
  return _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(b), _mm512_castps_si512(a), 1));
}
DSCONV_INLINE __m512d vahead(__m512d a, __m512d b) {
  return _mm512_castsi512_pd(_mm512_alignr_epi64(_mm512_castpd_si512(b), _mm512_castpd_si512(a), 1));
}

// Transposes 4 x 4 blocks of 128 bits, r[i] block j <-> r[j] block i, where r[i] stands for every `step`-th vector.
DSCONV_INLINE void transpose_blocks(__m512& r0, __m512& r1, __m512& r2, __m512& r3) {
  const __m512 a = _mm512_shuffle_f32x4(r0, r1, 0x44), b = _mm512_shuffle_f32x4(r2, r3, 0x44);
  const __m512 c = _mm512_shuffle_f32x4(r0, r1, 0xee), d = _mm512_shuffle_f32x4(r2, r3, 0xee);
  r0 = _mm512_shuffle_f32x4(a, b, 0x88);
  r1 = _mm512_shuffle_f32x4(a, b, 0xdd);
  r2 = _mm512_shuffle_f32x4(c, d, 0x88);
  r3 = _mm512_shuffle_f32x4(c, d, 0xdd);
}
// 4 x 4 floats within each 128-bit block.
DSCONV_INLINE void transpose_within(__m512& r0, __m512& r1, __m512& r2, __m512& r3) {
  const __m512 a = _mm512_unpacklo_ps(r0, r1), b = _mm512_unpackhi_ps(r0, r1);
  const __m512 c = _mm512_unpacklo_ps(r2, r3), d = _mm512_unpackhi_ps(r2, r3);
  r0 = _mm512_shuffle_ps(a, c, 0x44);
  r1 = _mm512_shuffle_ps(a, c, 0xee);
  r2 = _mm512_shuffle_ps(b, d, 0x44);
  r3 = _mm512_shuffle_ps(b, d, 0xee);
}
DSCONV_INLINE void vtranspose(__m512 (&r)[16]) {
  DSCONV_UNROLL
  for (int i = 0; i < 16; i += 4) transpose_within(r[i], r[i + 1], r[i + 2], r[i + 3]);
  DSCONV_UNROLL
  for (int i = 0; i < 4; ++i) transpose_blocks(r[i], r[i + 4], r[i + 8], r[i + 12]);
}
DSCONV_INLINE void vtranspose(__m512d (&r)[8]) {
  DSCONV_UNROLL
  for (int i = 0; i < 8; i += 2) {
    const __m512d low = _mm512_unpacklo_pd(r[i], r[i + 1]), high = _mm512_unpackhi_pd(r[i], r[i + 1]);
    r[i] = low;
    r[i + 1] = high;
  }
  DSCONV_UNROLL
  for (int i = 0; i < 2; ++i) {
    __m512 block[4];
    DSCONV_UNROLL
    for (int j = 0; j < 4; ++j) block[j] = _mm512_castpd_ps(r[i + 2 * j]);
    transpose_blocks(block[0], block[1], block[2], block[3]);
    DSCONV_UNROLL
    for (int j = 0; j < 4; ++j) r[i + 2 * j] = _mm512_castps_pd(block[j]);
  }
}
