// Pairs of bf16 on AVX512-BF16, beside the vectors of vec_avx512.h: 16 pairs, and their dot product with 16 fp32 sums.
//
//   vfma(a, b, c)      c + a.lower * b.lower + a.upper * b.upper in each lane; denormals count as zero
//   vzip_low, vzip_high(a, b)   32 numbers of a and b as pairs (a, b): of the lower and the upper half of each 128 bits
//   vin_zip_order(v)   32 numbers, so that such zips of halves take them in their order
//   vunzip(low, high)  rounds the sums of such pairs: 32 numbers in their order in memory again
//   vzip_order(v0, v1) 32 floats in their order in memory, as sums of such pairs have them
//
// tests/isa_emulation/immintrin.h implements the intrinsics named here too.
#if DSCONV_ISA != DSCONV_ISA_AVX512
#error "vec_avx512_bf16.h belongs inside the region of cpu_avx512_bf16.cpp"
#endif

template <>
struct Vec<bf16x2> {
  typedef __m512i type;
  typedef __m256i half;
  static constexpr int n = 16;
};

DSCONV_INLINE __m512i vset(bf16x2 pair) { return _mm512_set1_epi32(static_cast<int>(pair.bits)); }
DSCONV_INLINE __m512i vload(const bf16x2* p) { return _mm512_loadu_si512(p); }
DSCONV_INLINE __m512i vload_twice(const bf16x2* p) { return _mm512_broadcast_i64x4(load_halves(p)); }
DSCONV_INLINE __m512i vhalves(__m512i a, __m512i b) { return _mm512_mask_blend_epi32(0xff00, a, b); }
DSCONV_INLINE void vstore(bf16x2* p, __m512i v) { _mm512_storeu_si512(p, v); }

DSCONV_INLINE __m512 vfma(__m512i a, __m512i b, __m512 c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
DSCONV_INLINE __m256i vset_half(bf16x2 pair) { return _mm256_set1_epi32(static_cast<int>(pair.bits)); }
DSCONV_INLINE __m256i vhalf(__m512i v) { return _mm512_castsi512_si256(v); }
DSCONV_INLINE __m256 vfma(__m256i a, __m256i b, __m256 c) { return _mm256_dpbf16_ps(c, (__m256bh)a, (__m256bh)b); }

// 32 numbers.
DSCONV_INLINE __m512i vload_two(const bf16* p) { return _mm512_loadu_si512(p); }
DSCONV_INLINE __m512i vload_two(const bf16* p, int n) {
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
}
DSCONV_INLINE __m512i vnarrow_two(__m512 v0, __m512 v1) { return (__m512i)_mm512_cvtne2ps_pbh(v1, v0); }
DSCONV_INLINE void vstore_two(bf16* p, __m512 v0, __m512 v1) { _mm512_storeu_si512(p, vnarrow_two(v0, v1)); }
DSCONV_INLINE void vstream_two(bf16* p, __m512 v0, __m512 v1) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), vnarrow_two(v0, v1));
}
DSCONV_INLINE void vstore_two(bf16* p, __m512i v, int n) {
  _mm512_mask_storeu_epi16(p, static_cast<__mmask32>((uint64_t{1} << n) - 1), v);
}
DSCONV_INLINE __m512i vzero_two() { return _mm512_set1_epi32(0); }

DSCONV_INLINE __m512i vzip_low(__m512i a, __m512i b) { return _mm512_unpacklo_epi16(a, b); }
DSCONV_INLINE __m512i vzip_high(__m512i a, __m512i b) { return _mm512_unpackhi_epi16(a, b); }
DSCONV_INLINE __m512i vin_zip_order(__m512i v) {
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), v);
}
DSCONV_INLINE __m512i vunzip(__m512 low, __m512 high) { return vin_zip_order(vnarrow_two(low, high)); }
DSCONV_INLINE void vzip_order(__m512 v0, __m512 v1, __m512& low, __m512& high) {
  low = _mm512_shuffle_f32x4(v0, v1, 0x88);
  high = _mm512_shuffle_f32x4(v0, v1, 0xdd);
}
