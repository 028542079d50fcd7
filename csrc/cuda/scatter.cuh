// Adding bilinear samples' gradients to the four pixels they came from.
//
// By default with atomic additions in Real. Deterministic: in 64-bit fixed point, whose additions are associative, so
// that no order of blocks or warps changes a bit. A first launch of the same kernel ("measuring") finds the largest
// value, which sets the scale; the three lowest bits of a sum are flags that note NaN, +inf and -inf.
#pragma once

#include "cuda/sampling.cuh"

namespace safnet::cuda {

constexpr int kFlagBits = 3;
constexpr unsigned long long kFlagNan = 1, kFlagInfinity = 2, kFlagMinusInfinity = 4;
constexpr int kUsableBits = 63 - kFlagBits - 1;

template <class R>
constexpr R kLargestFinite = std::is_same_v<R, double> ? R(1.7976931348623157e308) : R(3.402823466e38f);

// double has more bits than one word keeps: a second word holds what the first one rounds off.
template <class R>
constexpr int kFixedWords = std::is_same_v<R, double> ? 2 : 1;

// What a kernel needs to know about one scattered gradient. `sums` has the layout of the gradient tensor.
struct ScatterArguments {
  void* sums;                   // Real, or kFixedWords<Real> integers an element
  unsigned long long* largest;  // bits of the largest finite magnitude; null: not deterministic, or not needed
  int headroom;                 // log2 of how many values may meet in one sum
};

// Scale 2^shift, in two factors that neither overflow nor vanish.
template <class R>
struct FixedScale {
  R first, second, inverse_first, inverse_second, low, inverse_low;

  __device__ __forceinline__ FixedScale(unsigned long long largest_bits, int headroom) {
    R largest;
    if constexpr (std::is_same_v<R, double>) largest = __longlong_as_double(static_cast<long long>(largest_bits));
    else largest = __uint_as_float(static_cast<unsigned>(largest_bits));
    const int shift = kUsableBits - headroom - (largest > 0 ? ilogb(largest) + 1 : 0);
    const int half = shift / 2;
    first = power(half), second = power(shift - half);
    inverse_first = power(-half), inverse_second = power(half - shift);
    low = power(kUsableBits - headroom), inverse_low = power(headroom - kUsableBits);
  }

  __device__ __forceinline__ static R power(int exponent) {
    if constexpr (std::is_same_v<R, double>) return __hiloint2double((exponent + 1023) << 20, 0);
    else return __int_as_float((exponent + 127) << 23);
  }
};

template <class R, bool kDeterministic>
class Scatter;

template <class R>
class Scatter<R, false> {
 public:
  __device__ __forceinline__ Scatter(const ScatterArguments& arguments, bool)
      : sums_(static_cast<R*>(arguments.sums)) {}

  template <class Index>
  __device__ __forceinline__ void add(Index offset, R value) {
    atomicAdd(sums_ + offset, value);
  }
  __device__ __forceinline__ bool measures(R) { return false; }
  __device__ __forceinline__ void finish() {}

 private:
  R* sums_;
};

template <class R>
class Scatter<R, true> {
 public:
  __device__ __forceinline__ Scatter(const ScatterArguments& arguments, bool measuring)
      : sums_(static_cast<unsigned long long*>(arguments.sums)),
        largest_(arguments.largest),
        measuring_(measuring),
        scale_(measuring || arguments.largest == nullptr ? 0 : *arguments.largest, arguments.headroom) {}

  template <class Index>
  __device__ __forceinline__ void add(Index offset, R value) {
    unsigned long long* sum = sums_ + static_cast<int64_t>(offset) * kFixedWords<R>;
    if (!(fabs(value) <= kLargestFinite<R>)) {  // NaN compares false
      atomicOr(sum, isnan(value) ? kFlagNan : value > 0 ? kFlagInfinity : kFlagMinusInfinity);
      return;
    }
    const R scaled = value * scale_.first * scale_.second;
    const long long high = llrint(scaled);
    atomicAdd(sum, static_cast<unsigned long long>(high) << kFlagBits);
    if constexpr (kFixedWords<R> == 2)
      atomicAdd(sum + 1, static_cast<unsigned long long>(llrint((scaled - static_cast<R>(high)) * scale_.low)));
  }

  // In the measuring launch, takes note of a value and returns true: nothing is to be added then.
  __device__ __forceinline__ bool measures(R value) {
    if (!measuring_) return false;
    value = fabs(value);
    if (value <= kLargestFinite<R> && value > seen_) seen_ = value;
    return true;
  }

  // All threads of a warp call this together.
  __device__ __forceinline__ void finish() {
    if (!measuring_) return;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      const R other = __shfl_xor_sync(0xffffffffu, seen_, distance);
      if (other > seen_) seen_ = other;
    }
    if ((threadIdx.y * blockDim.x + threadIdx.x) % 32 != 0) return;
    // Bits of numbers >= 0 are in the order of the numbers.
    if constexpr (std::is_same_v<R, double>)
      atomicMax(largest_, static_cast<unsigned long long>(__double_as_longlong(seen_)));
    else atomicMax(largest_, static_cast<unsigned long long>(__float_as_uint(seen_)));
  }

 private:
  unsigned long long* sums_;
  unsigned long long* largest_;
  bool measuring_;
  FixedScale<R> scale_;
  R seen_ = 0;
};

// Neighbouring lanes hold neighbouring pixels, and where the flow is smooth, a pixel's right samples are the next
// pixel's left ones. Handing them over before they are added halves the atomics.
struct Handover {
  bool gives, takes;
};

// All threads of a warp call this together.
template <class Index>
__device__ __forceinline__ Handover plan_handover(bool active, Index offset, Index step) {
  const unsigned lane = (threadIdx.y * blockDim.x + threadIdx.x) % 32;
  const Index next = __shfl_down_sync(0xffffffffu, active ? offset : static_cast<Index>(-1), 1);
  const bool gives = active && lane < 31 && step != 0 && next == offset + step;
  const bool before = __shfl_up_sync(0xffffffffu, static_cast<int>(gives), 1) != 0;
  return {gives, before && lane > 0};
}

// Adds one channel's value to the cell's four pixels. All threads of a warp call this together.
template <class R, class Index, bool kDeterministic>
__device__ __forceinline__ void scatter_cell(Scatter<R, kDeterministic>& scatter, bool active, Handover handover,
                                             Index offset, CellSteps<Index> steps, R fraction_x, R fraction_y,
                                             R value) {
  if (scatter.measures(active ? value : R(0))) return;
  const R right = value * fraction_x, left = value * (1 - fraction_x);
  const R upper_right = right * (1 - fraction_y), lower_right = right * fraction_y;
  R upper_left = left * (1 - fraction_y), lower_left = left * fraction_y;
  const R upper_before = __shfl_up_sync(0xffffffffu, upper_right, 1),
          lower_before = __shfl_up_sync(0xffffffffu, lower_right, 1);
  if (handover.takes) upper_left += upper_before, lower_left += lower_before;
  if (!active) return;
  scatter.add(offset, upper_left);
  scatter.add(offset + steps.y, lower_left);
  if (handover.gives) return;
  scatter.add(offset + steps.x, upper_right);
  scatter.add(offset + steps.x + steps.y, lower_right);
}

}  // namespace safnet::cuda
