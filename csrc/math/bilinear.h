// Bilinear sampling at pixel + flow, clamped to the border: coordinates, weights, and their derivatives.
#pragma once

#include "math/portable.h"

namespace safnet {

template <class Real>
SAFNET_INLINE bool is_nan(Real value) {
  return value != value;
}

// Where one axis is sampled: between `index` and `index + step`, at `fraction` of the way.
template <class Real>
struct AxisSample {
  int32_t index;
  Real fraction;  // NaN for a NaN position, so that the sample becomes NaN
  Real inside;    // 1, or 0 beyond the border, on it, and for NaN: there the derivative by the position is zero
};

// Distance between the two samples of an axis: zero only where there is a single pixel.
SAFNET_INLINE int32_t axis_step(int32_t size) { return size > 1 ? 1 : 0; }

// The index is clamped to size - 2, so that its right neighbour always exists; the last pixel is reached with fraction
// one. Every comparison is false for NaN: such a position reads pixel 0 and keeps its NaN in the fraction. The position
// is clamped before it becomes an integer, so infinite and huge values convert safely.
template <class Real>
SAFNET_INLINE AxisSample<Real> sample_axis(Real position, int32_t size) {
  const Real last = static_cast<Real>(size - 1);
  const Real inside = position > 0 ? position < last ? Real(1) : Real(0) : Real(0);
  position = position < 0 ? Real(0) : position;
  position = position > last ? last : position;
  int32_t index = static_cast<int32_t>(position >= 0 ? position : Real(0));
  const int32_t highest = size > 1 ? size - 2 : 0;
  index = index > highest ? highest : index;
  return {index, position - static_cast<Real>(index), inside};
}

template <class Real>
SAFNET_INLINE Real lerp(Real a, Real b, Real fraction) {
  return a * (1 - fraction) + b * fraction;
}

template <class Real>
SAFNET_INLINE Real bilinear(Real v00, Real v01, Real v10, Real v11, Real fraction_x, Real fraction_y) {
  return lerp(lerp(v00, v01, fraction_x), lerp(v10, v11, fraction_x), fraction_y);
}

// Derivatives of the above with respect to x and y.
template <class Real>
SAFNET_INLINE Real bilinear_dx(Real v00, Real v01, Real v10, Real v11, Real fraction_y) {
  return lerp(v01 - v00, v11 - v10, fraction_y);
}

template <class Real>
SAFNET_INLINE Real bilinear_dy(Real v00, Real v01, Real v10, Real v11, Real fraction_x) {
  return lerp(v10 - v00, v11 - v01, fraction_x);
}

// Position in the source of one output pixel of a resize with align_corners False, and the two neighbours it lies
// between.
template <class Real>
struct ResizeSample {
  int32_t index, next;
  Real fraction;
};

template <class Real>
SAFNET_INLINE ResizeSample<Real> resize_axis(int32_t out, Real scale, int32_t in_size) {
  Real position = (static_cast<Real>(out) + Real(0.5)) * scale - Real(0.5);
  position = position < 0 ? Real(0) : position;
  int32_t index = static_cast<int32_t>(position);
  index = index > in_size - 1 ? in_size - 1 : index;
  const int32_t next = index < in_size - 1 ? index + 1 : index;
  return {index, next, position - static_cast<Real>(index)};
}

}  // namespace safnet
