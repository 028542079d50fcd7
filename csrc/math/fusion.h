// The explicit fusion of one colour value: triangle weights, mask re-weighting, weighted mean, and their derivatives.
// Formulas: SAFNet (arXiv 2407.16308), equations 3 to 5.
#pragma once

#include <cmath>
#include <cstring>

#include "math/portable.h"

namespace safnet {

template <class Real>
struct Weights {
  Real short_, reference, long_;
};

template <class Real>
SAFNET_INLINE Weights<Real> triangle_weights(Real z) {
  const Real above = z - Real(0.5), below = Real(0.5) - z;
  // "not smaller" lets a NaN through, as clamp does.
  return {above < 0 ? Real(0) : above * 2, 1 - (2 * z - 1 < 0 ? 1 - 2 * z : 2 * z - 1),
          below < 0 ? Real(0) : below * 2};
}

// d loss / d z from the derivatives with respect to the three weights; one-sided at the kinks as autograd takes them.
template <class Real>
SAFNET_INLINE Real triangle_weights_backward(Real z, Weights<Real> grad) {
  const Real short_slope = z >= Real(0.5) ? Real(2) : Real(0);
  const Real long_slope = z <= Real(0.5) ? Real(-2) : Real(0);
  const Real reference_slope = z > Real(0.5) ? Real(-2) : z < Real(0.5) ? Real(2) : Real(0);
  return grad.short_ * short_slope + grad.reference * reference_slope + grad.long_ * long_slope;
}

template <class Real>
SAFNET_INLINE Weights<Real> reweight(Weights<Real> base, Real mask_short, Real mask_long) {
  const Real weight_short = base.short_ * mask_short, weight_long = base.long_ * mask_long;
  return {weight_short, base.reference + (base.short_ - weight_short) + (base.long_ - weight_long), weight_long};
}

constexpr double kFusionEpsilon = 1e-9;  // keeps the mean finite where explicit weights sum to zero

template <class Real>
SAFNET_INLINE Real inverse_sum(Weights<Real> w) {
  return 1 / (w.short_ + w.reference + w.long_ + static_cast<Real>(kFusionEpsilon));
}

template <class Real>
SAFNET_INLINE Real weighted_mean(Weights<Real> w, Real v_short, Real v_reference, Real v_long) {
  return (w.short_ * v_short + w.reference * v_reference + w.long_ * v_long) * inverse_sum(w);
}

// e^x for float, to about one unit in the last place, in operations that every compiler vectorises: x = k ln 2 + r with
// |r| <= ln 2 / 2, a polynomial for e^r (Cephes' coefficients), and 2^k put into the exponent bits.
SAFNET_INLINE float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  // The limits keep 2^k a normal number; NaN fails both comparisons and passes.
  x = x > 87.0f ? 87.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float rounding = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const float shifted = x * 1.44269504f + rounding;
  const float k = shifted - rounding;
  const float r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const uint32_t exponent = (bits << 23) + 0x3f800000u;  // the low bits of `shifted` are k
  float scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return p * scale;
#endif
}

SAFNET_INLINE double exponential(double x) {
#if defined(__CUDA_ARCH__)
  return exp(x);
#else
  return std::exp(x);
#endif
}

template <class Real>
SAFNET_INLINE Real sigmoid(Real x) {
  return 1 / (1 + exponential(-x));
}

}  // namespace safnet
