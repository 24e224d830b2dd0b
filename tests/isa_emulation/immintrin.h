// The AVX-512 intrinsics that csrc/cpu/vec_avx512.h and vec_avx512_bf16.h use, in plain C++ on the compiler's vector
// types, so that the shipped cpu_avx512.cpp and cpu_avx512_bf16.cpp run on a machine without AVX-512. First on the
// include path of the test build (build.py); everything else comes from the compiler's own header, whose types these
// functions share.
//
// What is short is always inlined: such functions have the baseline's calling convention, their callers that of AVX2.
// What goes lane by lane is called, as a function for AVX2: inlined everywhere it would take minutes to compile.
#pragma once

#include_next <immintrin.h>

#include <cstdint>

namespace dsconv_emulation {

#define DSCONV_EMULATED static inline __attribute__((always_inline))
#define DSCONV_CALLED static __attribute__((noinline, target("avx2,fma,f16c")))

typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t ManyHalves __attribute__((vector_size(64)));

template <typename V, typename T>
DSCONV_CALLED V load(const T* p, int lanes, uint32_t mask) {
  V v = {};
  for (int i = 0; i < lanes; ++i) {
    if (mask >> i & 1) v[i] = p[i];
  }
  return v;
}
template <typename V, typename T>
DSCONV_CALLED void store(T* p, V v, int lanes, uint32_t mask) {
  for (int i = 0; i < lanes; ++i) {
    if (mask >> i & 1) p[i] = v[i];
  }
}
template <typename V>
DSCONV_EMULATED V load_all(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <typename V>
DSCONV_EMULATED void store_all(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// A vector half as wide, in both halves.
template <typename V, typename H>
DSCONV_EMULATED V twice(H h) {
  V v = {};
  for (int i = 0; i < 2; ++i) __builtin_memcpy(reinterpret_cast<char*>(&v) + i * sizeof h, &h, sizeof h);
  return v;
}
// Its lower half, and the way back with zeros above.
template <typename H, typename V>
DSCONV_EMULATED H lower_half(V v) {
  H h;
  __builtin_memcpy(&h, &v, sizeof h);
  return h;
}
template <typename V, typename H>
DSCONV_EMULATED V with_zeros(H h) {
  V v = {};
  __builtin_memcpy(&v, &h, sizeof h);
  return v;
}
template <typename V>
DSCONV_CALLED V blend_lanes(uint16_t mask, V a, V b, int lanes) {
  for (int i = 0; i < lanes; ++i) a[i] = mask >> i & 1 ? b[i] : a[i];
  return a;
}

// The part of a vector from lane `first` on.
template <typename H, typename V>
DSCONV_EMULATED H part(V v, int first) {
  H h;
  __builtin_memcpy(&h, reinterpret_cast<const char*>(&v) + first * sizeof h[0], sizeof h);
  return h;
}
DSCONV_CALLED __m512d widen(__m256 h) {
  __m512d v = {};
  for (int i = 0; i < 8; ++i) v[i] = h[i];
  return v;
}
DSCONV_CALLED double sum(__m512d v) {
  double total = 0;
  for (int i = 0; i < 8; ++i) total += v[i];
  return total;
}

// The second operand where either is NaN or both are zero, as the instructions have it.
template <typename V>
DSCONV_EMULATED V max_of(V a, V b) {
  return a > b ? a : b;
}
template <typename V>
DSCONV_EMULATED V min_of(V a, V b) {
  return a < b ? a : b;
}

DSCONV_EMULATED float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 0x3ff;
  const float sign = h & 0x8000 ? -1.f : 1.f;
  if (exponent == 31) return mantissa ? __builtin_nanf("") : sign * __builtin_inff();
  if (exponent == 0) return sign * static_cast<float>(mantissa) * 0x1p-24f;
  return sign * __builtin_ldexpf(static_cast<float>(mantissa + 1024), exponent - 25);
}
DSCONV_EMULATED uint16_t float_to_half(float f) {
  const uint16_t sign = __builtin_signbit(f) ? 0x8000 : 0;
  const float magnitude = __builtin_fabsf(f);
  if (f != f) return sign | 0x7e00;
  if (magnitude >= 65520.f) return sign | 0x7c00;  // rounds beyond the largest half, 65504
  int exponent = -24;                              // zero: any that leaves the smallest unit
  if (magnitude > 0) __builtin_frexpf(magnitude, &exponent);
  const int unit = exponent - 11 > -24 ? exponent - 11 : -24;  // exponent of the last mantissa bit
  const int mantissa = static_cast<int>(__builtin_rintf(__builtin_ldexpf(magnitude, -unit)));
  return static_cast<uint16_t>(sign | (mantissa + (unit + 24) * 1024));
}
DSCONV_CALLED __m512 widen_halves(__m256i h) {
  const Halves bits = reinterpret_cast<Halves>(h);
  __m512 v = {};
  for (int i = 0; i < 16; ++i) v[i] = half_to_float(bits[i]);
  return v;
}
DSCONV_CALLED __m256i narrow_halves(__m512 v) {
  Halves bits = {};
  for (int i = 0; i < 16; ++i) bits[i] = float_to_half(v[i]);
  return reinterpret_cast<__m256i>(bits);
}
DSCONV_EMULATED __m512i widen_words(__m256i h) {
  return reinterpret_cast<__m512i>(__builtin_convertvector(reinterpret_cast<Halves>(h), Words));
}
DSCONV_EMULATED __m256i narrow_words(__m512i v) {
  return reinterpret_cast<__m256i>(__builtin_convertvector(reinterpret_cast<Words>(v), Halves));
}

DSCONV_CALLED __m512 round_nearest(__m512 v) {
  for (int i = 0; i < 16; ++i) v[i] = __builtin_rintf(v[i]);
  return v;
}
DSCONV_CALLED __m512i to_ints(__m512 v) {
  Ints r = {};
  for (int i = 0; i < 16; ++i) {
    const bool fits = v[i] >= -0x1p31f && v[i] < 0x1p31f;
    r[i] = fits ? static_cast<int32_t>(__builtin_rintf(v[i])) : INT32_MIN;
  }
  return reinterpret_cast<__m512i>(r);
}
DSCONV_CALLED uint16_t unordered(__m512 a, __m512 b) {
  uint16_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<uint16_t>((a[i] != a[i] || b[i] != b[i]) << i);
  return mask;
}
DSCONV_CALLED __m512i blend(uint16_t mask, __m512i a, __m512i b) {
  Ints r = reinterpret_cast<Ints>(a);
  const Ints other = reinterpret_cast<Ints>(b);
  for (int i = 0; i < 16; ++i) r[i] = mask >> i & 1 ? other[i] : r[i];
  return reinterpret_cast<__m512i>(r);
}

// Pairs of lanes from each 128-bit block of a (low half of the block) and b (high half).
DSCONV_CALLED __m512 shuffle_in_blocks(__m512 a, __m512 b, int order) {
  __m512 r = {};
  for (int i = 0; i < 16; ++i) {
    const int lane = order >> i % 4 * 2 & 3;
    r[i] = i % 4 < 2 ? a[i / 4 * 4 + lane] : b[i / 4 * 4 + lane];
  }
  return r;
}
DSCONV_CALLED __m512 shuffle_blocks(__m512 a, __m512 b, int order) {
  __m512 r = {};
  for (int i = 0; i < 16; ++i) {
    const int block = order >> i / 4 * 2 & 3;
    r[i] = i < 8 ? a[block * 4 + i % 4] : b[block * 4 + i % 4];
  }
  return r;
}
template <typename V>
DSCONV_CALLED V interleave(V a, V b, int lanes, int block, int first) {
  V r = {};
  for (int i = 0; i < lanes; ++i) {
    const int lane = i / block * block + first + i % block / 2;
    r[i] = i % 2 ? b[lane] : a[lane];
  }
  return r;
}

// AVX512-BF16: denormals count as zero, and give zero.
DSCONV_EMULATED float flushed(float f) { return __builtin_fabsf(f) < 0x1p-126f ? __builtin_copysignf(0.f, f) : f; }
DSCONV_EMULATED float bf16_to_float(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float f;
  __builtin_memcpy(&f, &word, sizeof f);
  return flushed(f);
}
DSCONV_EMULATED uint16_t float_to_bf16(float f) {
  uint32_t word;
  f = flushed(f);
  __builtin_memcpy(&word, &f, sizeof word);
  return static_cast<uint16_t>((f != f ? word | 0x400000 : word + 0x7fff + (word >> 16 & 1)) >> 16);
}
DSCONV_CALLED __m512 dot_of_pairs(__m512 sums, __m512bh a, __m512bh b) {
  const ManyHalves x = reinterpret_cast<ManyHalves>(a), y = reinterpret_cast<ManyHalves>(b);
  for (int i = 0; i < 16; ++i) {
    const float upper = flushed(bf16_to_float(x[2 * i + 1]) * bf16_to_float(y[2 * i + 1]) + sums[i]);
    sums[i] = flushed(bf16_to_float(x[2 * i]) * bf16_to_float(y[2 * i]) + upper);
  }
  return sums;
}
DSCONV_CALLED __m256i narrow_bf16s(__m512 v) {
  Halves bits = {};
  for (int i = 0; i < 16; ++i) bits[i] = float_to_bf16(v[i]);
  return reinterpret_cast<__m256i>(bits);
}
DSCONV_CALLED __m512i narrow_two_bf16s(__m512 upper, __m512 lower) {
  ManyHalves bits = {};
  for (int i = 0; i < 16; ++i) bits[i] = float_to_bf16(lower[i]), bits[16 + i] = float_to_bf16(upper[i]);
  return reinterpret_cast<__m512i>(bits);
}

template <typename V, typename Index>
DSCONV_CALLED V permute_two(V a, Index index, V b, int lanes) {
  V r = {};
  for (int i = 0; i < lanes; ++i) {
    const int lane = static_cast<int>(index[i]) & (2 * lanes - 1);
    r[i] = lane < lanes ? a[lane] : b[lane - lanes];
  }
  return r;
}

template <typename V>
DSCONV_CALLED __m512i align(__m512i high, __m512i low, int count, int lanes) {
  const V a = reinterpret_cast<V>(low), b = reinterpret_cast<V>(high);
  V r = {};
  for (int i = 0; i < lanes; ++i) r[i] = i + count < lanes ? a[i + count] : b[i + count - lanes];
  return reinterpret_cast<__m512i>(r);
}

}  // namespace dsconv_emulation

// Names of the intrinsics. The compiler's header has some of them as macros when it does not optimise.
#undef _mm512_set1_ps
#define _mm512_set1_ps(x) (__m512{} + static_cast<float>(x))
#undef _mm512_set1_pd
#define _mm512_set1_pd(x) (__m512d{} + static_cast<double>(x))
#undef _mm512_set1_epi32
#define _mm512_set1_epi32(x) reinterpret_cast<__m512i>(::dsconv_emulation::Ints{} + static_cast<int>(x))
#undef _mm512_loadu_ps
#define _mm512_loadu_ps(p) ::dsconv_emulation::load_all<__m512>(p)
#undef _mm512_loadu_pd
#define _mm512_loadu_pd(p) ::dsconv_emulation::load_all<__m512d>(p)
#undef _mm512_storeu_ps
#define _mm512_storeu_ps(p, v) ::dsconv_emulation::store_all<__m512>(p, v)
#undef _mm512_storeu_pd
#define _mm512_storeu_pd(p, v) ::dsconv_emulation::store_all<__m512d>(p, v)
#undef _mm512_stream_ps
#define _mm512_stream_ps(p, v) ::dsconv_emulation::store_all<__m512>(p, v)
#undef _mm512_stream_pd
#define _mm512_stream_pd(p, v) ::dsconv_emulation::store_all<__m512d>(p, v)
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps(m, p) ::dsconv_emulation::load<__m512>(p, 16, m)
#undef _mm512_maskz_loadu_pd
#define _mm512_maskz_loadu_pd(m, p) ::dsconv_emulation::load<__m512d>(p, 8, m)
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps(p, m, v) ::dsconv_emulation::store<__m512>(p, v, 16, m)
#undef _mm512_mask_storeu_pd
#define _mm512_mask_storeu_pd(p, m, v) ::dsconv_emulation::store<__m512d>(p, v, 8, m)
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16(m, p) \
  reinterpret_cast<__m256i>(           \
      ::dsconv_emulation::load<::dsconv_emulation::Halves>(static_cast<const uint16_t*>(p), 16, m))
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16(p, m, v) \
  ::dsconv_emulation::store(static_cast<uint16_t*>(p), reinterpret_cast<::dsconv_emulation::Halves>(v), 16, m)
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps(a, b, c) ((a) * (b) + (c))
#undef _mm512_fmadd_pd
#define _mm512_fmadd_pd(a, b, c) ((a) * (b) + (c))
#undef _mm512_max_ps
#define _mm512_max_ps(a, b) ::dsconv_emulation::max_of<__m512>(a, b)
#undef _mm512_max_pd
#define _mm512_max_pd(a, b) ::dsconv_emulation::max_of<__m512d>(a, b)
#undef _mm512_min_ps
#define _mm512_min_ps(a, b) ::dsconv_emulation::min_of<__m512>(a, b)
#undef _mm512_min_pd
#define _mm512_min_pd(a, b) ::dsconv_emulation::min_of<__m512d>(a, b)
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps(v, mode) ::dsconv_emulation::round_nearest(v)
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32(v) ::dsconv_emulation::to_ints(v)
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps(h) ::dsconv_emulation::widen_halves(h)
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(v, mode) ::dsconv_emulation::narrow_halves(v)
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32(h) ::dsconv_emulation::widen_words(h)
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16(v) ::dsconv_emulation::narrow_words(v)
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps(v) reinterpret_cast<__m512>(v)
#undef _mm512_castps_si512
#define _mm512_castps_si512(v) reinterpret_cast<__m512i>(v)
#undef _mm512_castpd_ps
#define _mm512_castpd_ps(v) reinterpret_cast<__m512>(v)
#undef _mm512_broadcast_f32x8
#define _mm512_broadcast_f32x8(v) ::dsconv_emulation::twice<__m512>(v)
#undef _mm512_broadcast_f64x4
#define _mm512_broadcast_f64x4(v) ::dsconv_emulation::twice<__m512d>(v)
#undef _mm512_broadcast_i64x4
#define _mm512_broadcast_i64x4(v) ::dsconv_emulation::twice<__m512i>(v)
#undef _mm512_castps512_ps256
#define _mm512_castps512_ps256(v) ::dsconv_emulation::lower_half<__m256>(v)
#undef _mm512_castpd512_pd256
#define _mm512_castpd512_pd256(v) ::dsconv_emulation::lower_half<__m256d>(v)
#undef _mm512_castsi512_si256
#define _mm512_castsi512_si256(v) ::dsconv_emulation::lower_half<__m256i>(v)
#undef _mm512_zextps256_ps512
#define _mm512_zextps256_ps512(h) ::dsconv_emulation::with_zeros<__m512>(h)
#undef _mm512_zextpd256_pd512
#define _mm512_zextpd256_pd512(h) ::dsconv_emulation::with_zeros<__m512d>(h)
#undef _mm512_mask_blend_ps
#define _mm512_mask_blend_ps(m, a, b) ::dsconv_emulation::blend_lanes<__m512>(m, a, b, 16)
#undef _mm512_mask_blend_pd
#define _mm512_mask_blend_pd(m, a, b) ::dsconv_emulation::blend_lanes<__m512d>(m, a, b, 8)
#undef _mm512_castps_pd
#define _mm512_castps_pd(v) reinterpret_cast<__m512d>(v)
#undef _mm512_slli_epi32
#define _mm512_slli_epi32(v, n) reinterpret_cast<__m512i>(reinterpret_cast<::dsconv_emulation::Words>(v) << (n))
#undef _mm512_srli_epi32
#define _mm512_srli_epi32(v, n) reinterpret_cast<__m512i>(reinterpret_cast<::dsconv_emulation::Words>(v) >> (n))
#undef _mm512_add_epi32
#define _mm512_add_epi32(a, b)                                               \
  reinterpret_cast<__m512i>(reinterpret_cast<::dsconv_emulation::Words>(a) + \
                            reinterpret_cast<::dsconv_emulation::Words>(b))
#undef _mm512_and_si512
#define _mm512_and_si512(a, b) ((a) & (b))
#undef _mm512_or_si512
#define _mm512_or_si512(a, b) ((a) | (b))
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, predicate) ::dsconv_emulation::unordered(a, b)
#undef _mm512_mask_blend_epi32
#define _mm512_mask_blend_epi32(m, a, b) ::dsconv_emulation::blend(m, a, b)
#undef _mm512_shuffle_ps
#define _mm512_shuffle_ps(a, b, order) ::dsconv_emulation::shuffle_in_blocks(a, b, order)
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4(a, b, order) ::dsconv_emulation::shuffle_blocks(a, b, order)
#undef _mm512_unpacklo_ps
#define _mm512_unpacklo_ps(a, b) ::dsconv_emulation::interleave<__m512>(a, b, 16, 4, 0)
#undef _mm512_unpackhi_ps
#define _mm512_unpackhi_ps(a, b) ::dsconv_emulation::interleave<__m512>(a, b, 16, 4, 2)
#undef _mm512_unpacklo_pd
#define _mm512_unpacklo_pd(a, b) ::dsconv_emulation::interleave<__m512d>(a, b, 8, 2, 0)
#undef _mm512_unpackhi_pd
#define _mm512_unpackhi_pd(a, b) ::dsconv_emulation::interleave<__m512d>(a, b, 8, 2, 1)
#undef _mm512_setr_epi32
#define _mm512_setr_epi32(...) (::dsconv_emulation::Ints{__VA_ARGS__})
#undef _mm512_setr_epi64
#define _mm512_setr_epi64(...) (__m512i{__VA_ARGS__})
#undef _mm512_castps512_ps256
#define _mm512_castps512_ps256(v) ::dsconv_emulation::part<__m256>(v, 0)
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps(v, half) ::dsconv_emulation::part<__m256>(v, 8 * (half))
#undef _mm512_cvtps_pd
#define _mm512_cvtps_pd(h) ::dsconv_emulation::widen(h)
#undef _mm512_reduce_add_pd
#define _mm512_reduce_add_pd(v) ::dsconv_emulation::sum(v)
#undef _mm512_permutex2var_ps
#define _mm512_permutex2var_ps(a, index, b) ::dsconv_emulation::permute_two<__m512>(a, index, b, 16)
#undef _mm512_permutex2var_pd
#define _mm512_permutex2var_pd(a, index, b) ::dsconv_emulation::permute_two<__m512d>(a, index, b, 8)
#undef _mm512_alignr_epi32
#define _mm512_alignr_epi32(high, low, count) ::dsconv_emulation::align<__m512>(high, low, count, 16)
#undef _mm512_alignr_epi64
#define _mm512_alignr_epi64(high, low, count) ::dsconv_emulation::align<__m512d>(high, low, count, 8)
#undef _mm512_castsi512_pd
#define _mm512_castsi512_pd(v) reinterpret_cast<__m512d>(v)
#undef _mm512_castpd_si512
#define _mm512_castpd_si512(v) reinterpret_cast<__m512i>(v)
#undef _mm512_loadu_si512
#define _mm512_loadu_si512(p) ::dsconv_emulation::load_all<__m512i>(p)
#undef _mm512_storeu_si512
#define _mm512_storeu_si512(p, v) ::dsconv_emulation::store_all<__m512i>(p, v)
#undef _mm512_stream_si512
#define _mm512_stream_si512(p, v) ::dsconv_emulation::store_all<__m512i>(p, v)
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16(m, p) \
  reinterpret_cast<__m512i>(           \
      ::dsconv_emulation::load<::dsconv_emulation::ManyHalves>(reinterpret_cast<const uint16_t*>(p), 32, m))
#undef _mm512_mask_storeu_epi16
#define _mm512_mask_storeu_epi16(p, m, v) \
  ::dsconv_emulation::store(reinterpret_cast<uint16_t*>(p), reinterpret_cast<::dsconv_emulation::ManyHalves>(v), 32, m)
#undef _mm512_unpacklo_epi16
#define _mm512_unpacklo_epi16(a, b)                                                                                    \
  reinterpret_cast<__m512i>(::dsconv_emulation::interleave(reinterpret_cast<::dsconv_emulation::ManyHalves>(a),        \
                                                           reinterpret_cast<::dsconv_emulation::ManyHalves>(b), 32, 8, \
                                                           0))
#undef _mm512_unpackhi_epi16
#define _mm512_unpackhi_epi16(a, b)                                                                                    \
  reinterpret_cast<__m512i>(::dsconv_emulation::interleave(reinterpret_cast<::dsconv_emulation::ManyHalves>(a),        \
                                                           reinterpret_cast<::dsconv_emulation::ManyHalves>(b), 32, 8, \
                                                           4))
#undef _mm512_permutexvar_epi64
#define _mm512_permutexvar_epi64(index, v) ::dsconv_emulation::permute_two<__m512i>(v, index, v, 8)
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps(c, a, b) ::dsconv_emulation::dot_of_pairs(c, a, b)
#undef _mm256_dpbf16_ps
#define _mm256_dpbf16_ps(c, a, b)                                                             \
  ::dsconv_emulation::lower_half<__m256>(::dsconv_emulation::dot_of_pairs(                    \
      ::dsconv_emulation::with_zeros<__m512>(c), ::dsconv_emulation::with_zeros<__m512bh>(a), \
      ::dsconv_emulation::with_zeros<__m512bh>(b)))
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh(v) ::dsconv_emulation::narrow_bf16s(v)
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh(a, b) ::dsconv_emulation::narrow_two_bf16s(a, b)
