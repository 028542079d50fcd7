// Reading, writing and bilinear sampling of runs of pixels, shared by the kernels that warp.
//
// A run is at most kChunk pixels of one row. Its values are converted to the computing type R when they are loaded, so that
// everything behind works on small packed arrays of float or double, which compilers vectorise, and only loading, storing and
// sampling exist for every element type. Included by kernels only: see kernel.h.
#pragma once

#include "cpu/kernel.h"
#include "math/bilinear.h"

namespace safnet::SAFNET_ISA {
namespace {

constexpr int kChunk = 512;  // long enough for the prefetchers to follow many streams, short enough for the caches

struct Run {
  int64_t n;
  int32_t y, x;
  int count;
};

template <class T>
T* at(const View& view, const Run& run, int64_t c) {
  return row<T>(view, run.n, c, run.y) + run.x * view.stride[3];
}

template <class T, class R>
void load_elements(const T* __restrict source, int64_t stride, int count, R* __restrict out) {
  if (stride == 1)
    for (int i = 0; i < count; ++i) out[i] = load(source[i]);
  else
    for (int i = 0; i < count; ++i) out[i] = load(source[i * stride]);
}

template <class T, class R>
void store_elements(const R* __restrict values, int count, T* __restrict out, int64_t stride) {
  if (stride == 1)
    for (int i = 0; i < count; ++i) store(values[i], out[i]);
  else
    for (int i = 0; i < count; ++i) store(values[i], out[i * stride]);
}

void load_run(const View& view, const Run& run, int64_t c, double* out) {
  load_elements(at<double>(view, run, c), view.stride[3], run.count, out);
}

void load_run(const View& view, const Run& run, int64_t c, float* out) {
  const int64_t stride = view.stride[3];
  if (view.type == Type::kFloat32) load_elements(at<float>(view, run, c), stride, run.count, out);
  else if (view.type == Type::kFloat16) load_elements(at<Half>(view, run, c), stride, run.count, out);
  else load_elements(at<BFloat16>(view, run, c), stride, run.count, out);
}

void store_run(const double* values, const View& view, const Run& run, int64_t c) {
  store_elements(values, run.count, at<double>(view, run, c), view.stride[3]);
}

void store_run(const float* values, const View& view, const Run& run, int64_t c) {
  const int64_t stride = view.stride[3];
  if (view.type == Type::kFloat32) store_elements(values, run.count, at<float>(view, run, c), stride);
  else if (view.type == Type::kFloat16) store_elements(values, run.count, at<Half>(view, run, c), stride);
  else store_elements(values, run.count, at<BFloat16>(view, run, c), stride);
}

// What stays the same for all samples of one picture. `right` and `down` are 0 where the picture is one pixel wide or high.
template <class Offset>
struct Grid {
  int32_t height, width;
  Offset stride_y, stride_x, right, down;

  explicit Grid(const View& image)
      : height(static_cast<int32_t>(image.size[2])),
        width(static_cast<int32_t>(image.size[3])),
        stride_y(static_cast<Offset>(image.stride[2])),
        stride_x(static_cast<Offset>(image.stride[3])),
        right(stride_x * axis_step(width)),
        down(stride_y * axis_step(height)) {}
};

// Where the pixels of a run are sampled: offset of the upper left neighbour, and the fractions.
template <class R, class Offset>
struct Cells {
  Offset offset[kChunk];
  R fraction_x[kChunk], fraction_y[kChunk];
  R inside_x[kChunk], inside_y[kChunk];  // 0 where the derivative with respect to the flow is cut off, else 1
};

// One axis of a run: positions are start + i * step + flow[i].
template <class R>
void locate_axis(R start, R step, const R* __restrict flow, int32_t size, int count, int32_t* __restrict index,
                 R* __restrict fraction, R* __restrict inside) {
  for (int i = 0; i < count; ++i) {
    const AxisSample<R> sample = sample_axis(start + static_cast<R>(i) * step + flow[i], size);
    index[i] = sample.index;
    fraction[i] = sample.fraction;
    inside[i] = sample.inside;
  }
}

// Reads the flow of a run and locates its samples.
template <class R, class Offset>
void locate(const Grid<Offset>& grid, const View& flow, const Run& run, Cells<R, Offset>& cells) {
  R flow_x[kChunk], flow_y[kChunk];
  int32_t left[kChunk], top[kChunk];
  load_run(flow, run, 0, flow_x);
  load_run(flow, run, 1, flow_y);
  locate_axis(static_cast<R>(run.x), R(1), flow_x, grid.width, run.count, left, cells.fraction_x, cells.inside_x);
  locate_axis(static_cast<R>(run.y), R(0), flow_y, grid.height, run.count, top, cells.fraction_y, cells.inside_y);
  const Offset stride_x = grid.stride_x, stride_y = grid.stride_y;
  for (int i = 0; i < run.count; ++i) cells.offset[i] = top[i] * stride_y + left[i] * stride_x;
}

template <class T, class R, class Offset>
void sample_elements(const T* __restrict plane, const Grid<Offset>& grid, const Cells<R, Offset>& cells, int count,
                     R* __restrict out) {
  const T *upper_right = plane + grid.right, *lower_left = plane + grid.down, *lower_right = lower_left + grid.right;
  for (int i = 0; i < count; ++i) {
    const Offset at = cells.offset[i];
    out[i] = bilinear(load(plane[at]), load(upper_right[at]), load(lower_left[at]), load(lower_right[at]),
                      cells.fraction_x[i], cells.fraction_y[i]);
  }
}

// The sample and its derivatives with respect to the position.
template <class T, class R, class Offset>
void sample_elements_with_slopes(const T* __restrict plane, const Grid<Offset>& grid, const Cells<R, Offset>& cells, int count,
                                 R* __restrict out, R* __restrict slope_x, R* __restrict slope_y) {
  const T *upper_right = plane + grid.right, *lower_left = plane + grid.down, *lower_right = lower_left + grid.right;
  for (int i = 0; i < count; ++i) {
    const Offset at = cells.offset[i];
    const R v00 = load(plane[at]), v01 = load(upper_right[at]), v10 = load(lower_left[at]), v11 = load(lower_right[at]);
    out[i] = bilinear(v00, v01, v10, v11, cells.fraction_x[i], cells.fraction_y[i]);
    slope_x[i] = bilinear_dx(v00, v01, v10, v11, cells.fraction_y[i]);
    slope_y[i] = bilinear_dy(v00, v01, v10, v11, cells.fraction_x[i]);
  }
}

// Samples channel `c` of an image for a run.
template <class R, class Offset>
void sample(const View& image, int64_t n, int64_t c, const Grid<Offset>& grid, const Cells<R, Offset>& cells, int count, R* out) {
  if constexpr (sizeof(R) == sizeof(double)) {
    sample_elements(row<double>(image, n, c, 0), grid, cells, count, out);
  } else {
    if (image.type == Type::kFloat32) sample_elements(row<float>(image, n, c, 0), grid, cells, count, out);
    else if (image.type == Type::kFloat16) sample_elements(row<Half>(image, n, c, 0), grid, cells, count, out);
    else sample_elements(row<BFloat16>(image, n, c, 0), grid, cells, count, out);
  }
}

template <class R, class Offset>
void sample_with_slopes(const View& image, int64_t n, int64_t c, const Grid<Offset>& grid, const Cells<R, Offset>& cells,
                        int count, R* out, R* slope_x, R* slope_y) {
  const auto of_type = [&](auto* plane) { sample_elements_with_slopes(plane, grid, cells, count, out, slope_x, slope_y); };
  if constexpr (sizeof(R) == sizeof(double)) {
    of_type(row<double>(image, n, c, 0));
  } else {
    if (image.type == Type::kFloat32) of_type(row<float>(image, n, c, 0));
    else if (image.type == Type::kFloat16) of_type(row<Half>(image, n, c, 0));
    else of_type(row<BFloat16>(image, n, c, 0));
  }
}

// Stores the gradients of a run's flow, zero where a flow points out of the picture. They are selected, not multiplied by zero:
// they may be NaN.
template <class R, class Offset>
void store_flow_gradient(const View& gradient, const Run& run, const Cells<R, Offset>& cells, R* sum_x, R* sum_y) {
  if (gradient.data == nullptr) return;
  for (int i = 0; i < run.count; ++i) {
    sum_x[i] = cells.inside_x[i] != 0 ? sum_x[i] : R(0);
    sum_y[i] = cells.inside_y[i] != 0 ? sum_y[i] : R(0);
  }
  store_run(sum_x, gradient, run, 0);
  store_run(sum_y, gradient, run, 1);
}

bool needs_64bit_offsets(const View& image) {
  const int64_t reach = (image.size[2] - 1) * image.stride[2] + (image.size[3] - 1) * image.stride[3];
  return reach > INT32_MAX || force_64bit_offsets();
}

// Calls row_kernel(n, y) for the rows [begin, end) of all pictures.
template <class RowKernel>
void each_row(const View& picture, int64_t begin, int64_t end, RowKernel row_kernel) {
  for (int64_t r = begin; r < end; ++r) row_kernel(r / picture.size[2], static_cast<int32_t>(r % picture.size[2]));
}

// Calls run_kernel(run) for the runs of one row.
template <class RunKernel>
void each_run(const View& picture, int64_t n, int32_t y, RunKernel run_kernel) {
  const auto width = static_cast<int32_t>(picture.size[3]);
  for (int32_t x = 0; x < width; x += kChunk) run_kernel(Run{n, y, x, width - x < kChunk ? width - x : kChunk});
}

}  // namespace
}  // namespace safnet::SAFNET_ISA
