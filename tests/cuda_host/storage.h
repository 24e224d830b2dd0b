// The element types of the kernels as bytes in memory, by arithmetic alone, so that the driver's view of a half does
// not share a line with the kernels' own conversions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../../csrc/params.h"

namespace storage {

using dsconv::DType;

// An IEEE format: `fraction` bits after the leading one, normal exponents from min_exponent to max_exponent.
struct Format {
  int bytes, fraction, min_exponent, max_exponent;
  double eps() const { return std::ldexp(1.0, -fraction); }
};

inline Format format_of(DType type) {
  switch (type) {
    case DType::f64:
      return {8, 52, -1022, 1023};
    case DType::f32:
      return {4, 23, -126, 127};
    case DType::f16:
      return {2, 10, -14, 15};
    case DType::bf16:
      return {2, 7, -126, 127};
  }
  return {};
}

// To the nearest value of the format, ties to even, beyond the largest to infinity.
template <typename R>
R round_to(Format f, R value) {
  if (value == 0 || !std::isfinite(value)) return value;
  int exponent = 0;
  std::frexp(value, &exponent);  // value = m * 2^exponent, 1/2 <= |m| < 1
  const int last_bit = (exponent - 1 < f.min_exponent ? f.min_exponent : exponent - 1) - f.fraction;
  const R rounded = std::ldexp(std::nearbyint(std::ldexp(value, -last_bit)), last_bit);
  const R largest = std::ldexp(R(2) - std::ldexp(R(1), -f.fraction), f.max_exponent);
  return std::abs(rounded) > largest ? std::copysign(std::numeric_limits<R>::infinity(), value) : rounded;
}

// The bits of a value that round_to leaves as it is.
template <typename R>
uint64_t encode(Format f, R value) {
  const int bits = 8 * f.bytes;
  const uint64_t sign = static_cast<uint64_t>(std::signbit(value)) << (bits - 1);
  const uint64_t exponents = (uint64_t{1} << (bits - 1 - f.fraction)) - 1;
  if (std::isnan(value)) return sign | exponents << f.fraction | uint64_t{1} << (f.fraction - 1);
  if (std::isinf(value)) return sign | exponents << f.fraction;
  if (value == 0) return sign;
  int exponent = 0;
  const R mantissa = std::frexp(std::abs(value), &exponent);
  exponent -= 1;
  if (exponent < f.min_exponent) {
    return sign | static_cast<uint64_t>(std::ldexp(std::abs(value), f.fraction - f.min_exponent));
  }
  const auto significand = static_cast<uint64_t>(std::ldexp(mantissa, f.fraction + 1));
  const uint64_t biased = static_cast<uint64_t>(exponent - f.min_exponent + 1);
  return sign | biased << f.fraction | (significand ^ uint64_t{1} << f.fraction);
}

template <typename R>
R decode(Format f, uint64_t bits) {
  const uint64_t exponents = (uint64_t{1} << (8 * f.bytes - 1 - f.fraction)) - 1;
  const uint64_t exponent = bits >> f.fraction & exponents, fraction = bits & ((uint64_t{1} << f.fraction) - 1);
  const R sign = bits >> (8 * f.bytes - 1) & 1 ? R(-1) : R(1);
  if (exponent == exponents) {
    return fraction != 0 ? std::numeric_limits<R>::quiet_NaN() : sign * std::numeric_limits<R>::infinity();
  }
  const uint64_t significand = exponent == 0 ? fraction : fraction | uint64_t{1} << f.fraction;
  const int scale = f.min_exponent - f.fraction + (exponent == 0 ? 0 : static_cast<int>(exponent) - 1);
  return sign * std::ldexp(static_cast<R>(significand), scale);
}

inline void store(DType type, void* base, int64_t index, long double value) {
  const Format f = format_of(type);
  const uint64_t bits = encode(f, round_to(f, value));
  std::memcpy(static_cast<char*>(base) + index * f.bytes, &bits, static_cast<std::size_t>(f.bytes));
}

inline long double load(DType type, const void* base, int64_t index) {
  const Format f = format_of(type);
  uint64_t bits = 0;
  std::memcpy(&bits, static_cast<const char*>(base) + index * f.bytes, static_cast<std::size_t>(f.bytes));
  return decode<long double>(f, bits);
}

}  // namespace storage
