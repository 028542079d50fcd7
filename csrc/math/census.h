// The soft census distance between one pixel's relation to a neighbour in two pictures, and its derivative.
// Formulas: the ternary census transform (Stein 2004) as softened in UnFlow (Meister et al. 2018).
#pragma once

#include <cmath>

#include "math/portable.h"

namespace safnet {

constexpr double kCensusSoftness =
    0.81;                            // added to d^2 before the root: how small a difference still counts as "equal"
constexpr double kCensusKnee = 0.1;  // dn^2 at which the distance reaches one half

// n(a) - n(b) for n(d) = d / sqrt(softness + d^2), with one division for both. 1 / root_a is root_b * inverse.
template <class Real>
struct CensusDifference {
  Real root_b, inverse, value;
};

template <class Real>
SAFNET_INLINE CensusDifference<Real> census_difference(Real a, Real b) {
  const Real root_a = std::sqrt(static_cast<Real>(kCensusSoftness) + a * a);
  const Real root_b = std::sqrt(static_cast<Real>(kCensusSoftness) + b * b);
  const Real inverse = 1 / (root_a * root_b);
  return {root_b, inverse, (a * root_b - b * root_a) * inverse};
}

// dn^2 / (knee + dn^2), where a and b are neighbour minus pixel in the two pictures. The same for -a and -b.
template <class Real>
SAFNET_INLINE Real census_distance(Real a, Real b) {
  const Real difference = census_difference(a, b).value;
  const Real squared = difference * difference;
  return squared / (static_cast<Real>(kCensusKnee) + squared);
}

// Derivative of census_distance with respect to a.
template <class Real>
SAFNET_INLINE Real census_distance_slope(Real a, Real b) {
  const CensusDifference<Real> difference = census_difference(a, b);
  const Real weight = 1 / (static_cast<Real>(kCensusKnee) + difference.value * difference.value);
  const Real inverse_root = difference.root_b * difference.inverse;
  const Real transform_slope = static_cast<Real>(kCensusSoftness) * inverse_root * inverse_root * inverse_root;
  return static_cast<Real>(2 * kCensusKnee) * difference.value * weight * weight * transform_slope;
}

}  // namespace safnet
