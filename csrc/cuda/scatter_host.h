// Host side of scattered gradients: buffers, and the conversion of sums to the gradient's type.
#pragma once

#include <algorithm>

#include "cuda/scatter.cuh"
#include "cuda/tensors.h"

namespace safnet::cuda {

// One gradient that a kernel scatters into. Not needed: nothing is allocated, and finish() does nothing.
class ScatteredGradient {
 public:
  ScatteredGradient(const Tensor& image, bool needed, bool deterministic, cudaStream_t stream);

  ScatterArguments arguments() const {
    return {sums_     ? sums_->data_ptr()
            : needed_ ? gradient.data_ptr()
                      : nullptr,
            largest_ ? static_cast<unsigned long long*>(largest_->data_ptr()) : nullptr, headroom_};
  }

  // Turns the sums into the gradient.
  void finish(cudaStream_t stream) const;

  Tensor gradient;

 private:
  bool needed_, deterministic_;
  int headroom_ = 0;
  std::optional<Tensor> sums_, largest_;
};

}  // namespace safnet::cuda
