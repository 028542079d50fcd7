// Bilinear sampling of an image where a flow points.
#pragma once

#include "cuda/device.cuh"
#include "math/bilinear.h"

namespace safnet::cuda {

// Where a flow points in one picture of a batch: offset of the upper left of four neighbours, and the way to the
// others.
template <class R, class Index>
struct Cell {
  Index offset;
  R fraction_x, fraction_y;
};

template <class R, class T, class Index>
__device__ __forceinline__ Cell<R, Index> locate(const View<T, Index>& image, const PixelRun<Index>& pixel, Index shift,
                                                 R flow_x, R flow_y, int32_t height, int32_t width,
                                                 bool* inside_x = nullptr, bool* inside_y = nullptr) {
  const auto sample_x = sample_axis(static_cast<R>(pixel.x + shift) + flow_x, width);
  const auto sample_y = sample_axis(static_cast<R>(pixel.y) + flow_y, height);
  if (inside_x != nullptr) *inside_x = sample_x.inside;
  if (inside_y != nullptr) *inside_y = sample_y.inside;
  return {image.at(pixel.n, sample_y.index, sample_x.index), sample_x.fraction, sample_y.fraction};
}

// The four neighbours of one channel.
template <class R>
struct Corners {
  R v00, v01, v10, v11;

  __device__ __forceinline__ R sample(R fraction_x, R fraction_y) const {
    return bilinear(v00, v01, v10, v11, fraction_x, fraction_y);
  }
};

// Offsets from a cell's upper left pixel to its right and its lower neighbour; zero where the picture is one pixel wide
// or high.
template <class Index>
struct CellSteps {
  Index x, y;
};

template <class T, class Index>
__device__ __forceinline__ CellSteps<Index> cell_steps(const View<T, Index>& image, int32_t height, int32_t width) {
  return {image.x * axis_step(width), image.y * axis_step(height)};
}

template <class T, class Index>
__device__ __forceinline__ Corners<Real<T>> corners(const T* channel, Index offset, CellSteps<Index> steps) {
  const T* corner = channel + offset;
  return {to_real(read_only(corner)), to_real(read_only(corner + steps.x)), to_real(read_only(corner + steps.y)),
          to_real(read_only(corner + steps.y + steps.x))};
}

}  // namespace safnet::cuda
