// Opens and closes the part of a translation unit that is compiled for more than the baseline instruction set.
//
// Every #include of a cpu_<isa>.cpp comes before DSCONV_REGION_BEGIN: a standard template instantiated inside would be
// an AVX copy that the linker may keep for the whole program. Inside there are no lambdas, no virtual functions, no
// objects with dynamic initialisers, and __AVX2__ and the like are not defined: DSCONV_ISA says which ISA this is.
#pragma once

#define DSCONV_STRINGIFY_(x) #x
#define DSCONV_PRAGMA_(x) _Pragma(DSCONV_STRINGIFY_(x))

#if defined(__clang__)
#define DSCONV_REGION_BEGIN(target_list) \
  DSCONV_PRAGMA_(clang attribute push(__attribute__((target(target_list))), apply_to = function))
#define DSCONV_REGION_END DSCONV_PRAGMA_(clang attribute pop)
#else
#define DSCONV_REGION_BEGIN(target_list) \
  DSCONV_PRAGMA_(GCC push_options)       \
  DSCONV_PRAGMA_(GCC target(target_list))
#define DSCONV_REGION_END DSCONV_PRAGMA_(GCC pop_options)
#endif

// Whether the compiler knows AVX512-BF16 (and the library to detect it); without it bf16 is computed in fp32.
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 10 : __GNUC__ >= 11)
#define DSCONV_BUILDS_BF16 1
#else
#define DSCONV_BUILDS_BF16 0
#endif

#define DSCONV_INLINE static inline __attribute__((always_inline))
#define DSCONV_UNROLL DSCONV_PRAGMA_(GCC unroll 32)

// Values of DSCONV_ISA, those of enum Isa.
#define DSCONV_ISA_GENERIC 0
#define DSCONV_ISA_AVX2 1
#define DSCONV_ISA_AVX512 2
