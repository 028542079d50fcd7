// Bilinear sampling of a run of pixels, shared by the kernels that warp. Included by kernels only: see kernel.h.
#pragma once

#include "cpu/kernel.h"
#include "math/bilinear.h"

namespace safnet::SAFNET_ISA {

constexpr int kChunk = 64;  // pixels handled at a time: their coordinates stay in the first-level cache

// Where `count` <= kChunk neighbouring pixels of a row are sampled: offset of the upper left neighbour, and the fractions.
template <class R, class Offset>
struct Cells {
  Offset offset[kChunk];
  R fraction_x[kChunk], fraction_y[kChunk];
  R inside_x[kChunk], inside_y[kChunk];  // 1 where the derivative with respect to the flow is not cut off, else 0
};

// What stays the same for all samples of one picture. `right` and `down` are 0 where the picture is one pixel wide or high.
template <class Offset>
struct Grid {
  int32_t height, width;
  Offset stride_y, stride_x, right, down;

  explicit SAFNET_INLINE Grid(const View& image)
      : height(static_cast<int32_t>(image.size[2])),
        width(static_cast<int32_t>(image.size[3])),
        stride_y(static_cast<Offset>(image.stride[2])),
        stride_x(static_cast<Offset>(image.stride[3])),
        right(stride_x * axis_step(width)),
        down(stride_y * axis_step(height)) {}
};

template <class R, class Offset>
SAFNET_INLINE void locate(const Grid<Offset>& grid, const R* __restrict flow_x, const R* __restrict flow_y, int32_t y,
                          int32_t x, int count, Cells<R, Offset>& cells) {
  const R base_y = static_cast<R>(y);
  for (int i = 0; i < count; ++i) {
    const auto sample_x = sample_axis(static_cast<R>(x + i) + flow_x[i], grid.width);
    const auto sample_y = sample_axis(base_y + flow_y[i], grid.height);
    cells.offset[i] = sample_y.index * grid.stride_y + sample_x.index * grid.stride_x;
    cells.fraction_x[i] = sample_x.fraction;
    cells.fraction_y[i] = sample_y.fraction;
    cells.inside_x[i] = static_cast<R>(sample_x.inside);
    cells.inside_y[i] = static_cast<R>(sample_y.inside);
  }
}

// Reads the flow of a run of pixels and locates its samples.
template <class G, class R, class Offset>
SAFNET_INLINE void locate_row(const Grid<Offset>& grid, const View& flow, int64_t n, int32_t y, int32_t x, int count,
                              Cells<R, Offset>& cells) {
  R flow_x[kChunk], flow_y[kChunk];
  load_row(row<G>(flow, n, 0, y) + x * flow.stride[3], flow.stride[3], count, flow_x);
  load_row(row<G>(flow, n, 1, y) + x * flow.stride[3], flow.stride[3], count, flow_y);
  locate(grid, flow_x, flow_y, y, x, count, cells);
}

template <class T, class R, class Offset>
SAFNET_INLINE void sample(const T* __restrict plane, const Grid<Offset>& grid, const Cells<R, Offset>& cells, int count,
                          R* __restrict out) {
  const T *upper_right = plane + grid.right, *lower_left = plane + grid.down, *lower_right = lower_left + grid.right;
  for (int i = 0; i < count; ++i) {
    const Offset at = cells.offset[i];
    out[i] = bilinear(load(plane[at]), load(upper_right[at]), load(lower_left[at]), load(lower_right[at]),
                      cells.fraction_x[i], cells.fraction_y[i]);
  }
}

// The sample and its derivatives with respect to the flow.
template <class T, class R, class Offset>
SAFNET_INLINE void sample_with_slopes(const T* __restrict plane, const Grid<Offset>& grid, const Cells<R, Offset>& cells,
                                      int count, R* __restrict out, R* __restrict slope_x, R* __restrict slope_y) {
  const T *upper_right = plane + grid.right, *lower_left = plane + grid.down, *lower_right = lower_left + grid.right;
  for (int i = 0; i < count; ++i) {
    const Offset at = cells.offset[i];
    const R v00 = load(plane[at]), v01 = load(upper_right[at]), v10 = load(lower_left[at]), v11 = load(lower_right[at]);
    out[i] = bilinear(v00, v01, v10, v11, cells.fraction_x[i], cells.fraction_y[i]);
    slope_x[i] = bilinear_dx(v00, v01, v10, v11, cells.fraction_y[i]) * cells.inside_x[i];
    slope_y[i] = bilinear_dy(v00, v01, v10, v11, cells.fraction_x[i]) * cells.inside_y[i];
  }
}

SAFNET_INLINE bool needs_64bit_offsets(const View& image) {
  const int64_t reach = (image.size[2] - 1) * image.stride[2] + (image.size[3] - 1) * image.stride[3];
  return reach > INT32_MAX || force_64bit_offsets();
}

}  // namespace safnet::SAFNET_ISA
