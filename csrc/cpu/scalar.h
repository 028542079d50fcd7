// Element types of tensors, and their conversion to and from the type that kernels compute in.
#pragma once

#include <cstdint>
#include <cstring>

#include "math/portable.h"

namespace safnet {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

enum class Type : int8_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

// The type that a kernel computes in: float, or double for double.
template <class T>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <class T>
using Real = typename RealOf<T>::type;

SAFNET_INLINE uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

SAFNET_INLINE float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

SAFNET_INLINE float load(float value) { return value; }
SAFNET_INLINE double load(double value) { return value; }
SAFNET_INLINE float load(BFloat16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }

// Branch-free, so that loops over it vectorise: the multiplication re-biases the exponent and makes subnormals exact.
SAFNET_INLINE float load(Half value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN keep an all-ones exponent
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  return bits_float(float_bits(bits_float(magnitude) * 0x1p112f) | special | sign);
}

SAFNET_INLINE void store(float value, float& out) { out = value; }
SAFNET_INLINE void store(double value, double& out) { out = value; }

// Round to nearest, ties to even; NaN stays NaN.
SAFNET_INLINE void store(float value, BFloat16& out) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

SAFNET_INLINE void store(float value, Half& out) {
  const uint32_t bits = float_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Normal numbers: re-bias, round to nearest even. Subnormal ones: adding 0.5 aligns the result's bits with the
  // mantissa.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds to or is infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
  out.bits = static_cast<uint16_t>(half | sign);
}

}  // namespace safnet
