// Turning the sums of a scattered gradient into the gradient's type.
#include "cuda/scatter_host.h"

namespace safnet::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads) convert_sums(const Real<T>* sums, T* gradient, int64_t count) {
  const int64_t i = thread_item<int64_t>();
  if (i < count) gradient[i] = from_real<T>(sums[i]);
}

template <class T>
__global__ void __launch_bounds__(kThreads) convert_fixed_sums(ScatterArguments arguments, T* gradient, int64_t count) {
  using R = Real<T>;
  const int64_t i = thread_item<int64_t>();
  if (i >= count) return;
  const long long* words = static_cast<const long long*>(arguments.sums) + i * kFixedWords<R>;
  const auto flags = static_cast<unsigned long long>(words[0]) & ((1 << kFlagBits) - 1);
  R value;
  if (flags == 0) {
    const FixedScale<R> scale(*arguments.largest, arguments.headroom);
    value = static_cast<R>(words[0] >> kFlagBits);
    if constexpr (kFixedWords<R> == 2) value += static_cast<R>(words[1]) * scale.inverse_low;
    value = value * scale.inverse_first * scale.inverse_second;
  } else if (flags == kFlagInfinity || flags == kFlagMinusInfinity) {
    value = flags == kFlagInfinity ? R(INFINITY) : R(-INFINITY);
  } else {
    value = R(NAN);
  }
  gradient[i] = from_real<T>(value);
}

ScatteredGradient::ScatteredGradient(const Tensor& image, bool needed, bool deterministic, cudaStream_t stream)
    : gradient(empty_gradient(image, needed)), needed_(needed), deterministic_(deterministic) {
  if (!needed) return;
  const ScalarType real = real_type(image);
  if (deterministic) {
    const int words = real == ScalarType::Double ? kFixedWords<double> : kFixedWords<float>;
    sums_ = allocate({gradient.numel() * words}, ScalarType::Long, image);
    largest_ = allocate({1}, ScalarType::Long, image);
    zero(*largest_, stream);
    // All pixels may point at one place, and one pixel's four samples fall together where a side is one pixel long.
    while ((int64_t{1} << headroom_) < 4 * image.size(2) * image.size(3)) ++headroom_;
  } else if (real != image.scalar_type()) {
    sums_ = allocate({gradient.numel()}, real, image);
  }
  zero(sums_ ? *sums_ : gradient, stream);
}

void ScatteredGradient::finish(cudaStream_t stream) const {
  if (!sums_ || gradient.numel() == 0) return;
  const int64_t count = gradient.numel();
  const Plan plan = elementwise_plan(count);
  for_type(gradient, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* target = static_cast<T*>(gradient.data_ptr());
    if (deterministic_) {
      launch("convert_fixed_sums", &convert_fixed_sums<T>, plan, stream, arguments(), target, count);
    } else {
      launch("convert_sums", &convert_sums<T>, plan, stream, static_cast<const Real<T>*>(sums_->data_ptr()), target,
             count);
    }
  });
}

}  // namespace safnet::cuda
