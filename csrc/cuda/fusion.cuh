// The explicit fusion of a run of adjacent pixels, shared by fused_fuse and upsample_fuse.
#pragma once

#include "cuda/sampling.cuh"
#include "math/fusion.h"

namespace safnet::cuda {

template <class T, class Index>
struct FuseImages {
  View<T, Index> short_, reference, long_;
  View<T, Index> reference_ldr, weight_short, weight_reference, weight_long;  // either the first, or the other three
  int64_t items;
  int32_t channels, height, width;
};

// What all channels of a run share.
template <class R, class Index, int kPixels>
struct Alignment {
  Cell<R, Index> cell_short[kPixels], cell_long[kPixels];
  R mask_short[kPixels], mask_long[kPixels];
};

template <int kPixels, class T, class Index>
__device__ __forceinline__ void load_base_weights(const FuseImages<T, Index>& a, const PixelRun<Index>& pixel,
                                                  int32_t c, Weights<Real<T>>* base) {
  using R = Real<T>;
  const auto read = [&](const View<T, Index>& view, R* values) {
    load<kPixels>(view.data + view.at(pixel.n, pixel.y, pixel.x) + c * view.c, values);
  };
  R first[kPixels], second[kPixels], third[kPixels];
  if (a.reference_ldr.data != nullptr) {  // the same for all threads
    read(a.reference_ldr, first);
#pragma unroll
    for (int k = 0; k < kPixels; ++k) base[k] = triangle_weights(first[k]);
  } else {
    read(a.weight_short, first);
    read(a.weight_reference, second);
    read(a.weight_long, third);
#pragma unroll
    for (int k = 0; k < kPixels; ++k) base[k] = {first[k], second[k], third[k]};
  }
}

template <int kPixels, class T, class Index>
__device__ __forceinline__ void fuse_channels(const FuseImages<T, Index>& a, const PixelRun<Index>& pixel,
                                              const Alignment<Real<T>, Index, kPixels>& alignment,
                                              const View<T, Index>& out) {
  using R = Real<T>;
  const CellSteps<Index> steps_short = cell_steps(a.short_, a.height, a.width);
  const CellSteps<Index> steps_long = cell_steps(a.long_, a.height, a.width);
  for (int32_t c = 0; c < a.channels; ++c) {
    Weights<R> base[kPixels];
    R reference[kPixels], fused[kPixels];
    load_base_weights<kPixels>(a, pixel, c, base);
    load<kPixels>(a.reference.data + a.reference.at(pixel.n, pixel.y, pixel.x) + c * a.reference.c, reference);
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      const Cell<R, Index>&cell_short = alignment.cell_short[k], &cell_long = alignment.cell_long[k];
      const R v_short = corners(a.short_.data + c * a.short_.c, cell_short.offset, steps_short)
                            .sample(cell_short.fraction_x, cell_short.fraction_y);
      const R v_long = corners(a.long_.data + c * a.long_.c, cell_long.offset, steps_long)
                           .sample(cell_long.fraction_x, cell_long.fraction_y);
      fused[k] = weighted_mean(reweight(base[k], alignment.mask_short[k], alignment.mask_long[k]), v_short,
                               reference[k], v_long);
    }
    store<kPixels>(out.data + out.at(pixel.n, pixel.y, pixel.x) + c * out.c, fused);
  }
}

}  // namespace safnet::cuda
