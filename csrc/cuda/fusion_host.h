// Host side shared by fused_fuse and upsample_fuse.
#pragma once

#include "cuda/fusion.cuh"
#include "cuda/tensors.h"

namespace safnet::cuda {

struct FuseTensors {
  const Tensor &short_, &reference, &long_;
  const std::optional<Tensor>&reference_ldr, &weight_short, &weight_reference, &weight_long;
};

template <class T, class Index>
FuseImages<T, Index> fuse_images(const FuseTensors& tensors) {
  const Tensor& model = tensors.short_;
  return {view<T, Index>(tensors.short_),       view<T, Index>(tensors.reference),
          view<T, Index>(tensors.long_),        view<T, Index>(tensors.reference_ldr),
          view<T, Index>(tensors.weight_short), view<T, Index>(tensors.weight_reference),
          view<T, Index>(tensors.weight_long),  model.size(0) * model.size(2) * model.size(3),
          static_cast<int32_t>(model.size(1)),  static_cast<int32_t>(model.size(2)),
          static_cast<int32_t>(model.size(3))};
}

inline const Tensor* pointer(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

// The images that are read and written at the pixel itself, not where a flow points.
inline bool allow_vectors(const FuseTensors& tensors, const Tensor& out) {
  for (const Tensor* tensor : {&tensors.reference, pointer(tensors.reference_ldr), pointer(tensors.weight_short),
                               pointer(tensors.weight_reference), pointer(tensors.weight_long), &out})
    if (tensor != nullptr && !allows_vectors(*tensor, kVectorPixels)) return false;
  return true;
}

}  // namespace safnet::cuda
