// The bits of `needs`, by which a backward operator is told the gradients to compute: one for each differentiable
// input, in the order of safnet_ops/operators.py.
#pragma once

#include <cstdint>

#include "math/portable.h"

namespace safnet {

template <class Bits, class Input>
SAFNET_INLINE constexpr bool is_needed(Bits needs, Input input) {
  return (needs >> static_cast<int>(input) & 1) != 0;
}

enum class WarpInput { kImage, kFlow };

enum class FuseInput {
  kShort,
  kReference,
  kLong,
  kFlowShort,
  kFlowLong,
  kMaskShort,
  kMaskLong,
  kReferenceLdr,
  kWeightShort,
  kWeightReference,
  kWeightLong,
};

enum class ConvInput { kInput, kWeight, kBias, kPreluWeight, kResidual };

}  // namespace safnet
