// Reading, writing and bilinear sampling of runs of pixels, shared by the kernels that warp.
//
// A run is at most kChunk pixels of one row. Its values are converted to the computing type R when they are loaded,
// unless they lie side by side in that type already, so that everything behind works on packed arrays of float or
// double, which compilers vectorise, and only loading, storing and sampling exist for every element type. Included by
// kernels only: see kernel.h.
#pragma once

#include <type_traits>

#include "cpu/kernel.h"
#include "cpu/simd.h"
#include "math/bilinear.h"

namespace safnet::SAFNET_ISA {
namespace {

constexpr int kChunk = 512;  // long enough for the prefetchers to follow many streams, short enough for the caches

// Where a flow slopes, a run reads from many rows of the image, and no prefetcher of the processor sees a pattern in
// that. So what is read here is asked for so many rows ahead: the flow will hardly differ there.
constexpr int kRowsAhead = 8;

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

template <class R>
bool is_packed(const View& view) {
  return view.stride[3] == 1 && (sizeof(R) == sizeof(double) || view.type == Type::kFloat32);
}

// The values of a run: where they lie if they are packed, else converted into `buffer`.
template <class R>
const R* read_run(const View& view, const Run& run, int64_t c, R* buffer) {
  if (is_packed<R>(view)) return at<R>(view, run, c);
  load_run(view, run, c, buffer);
  return buffer;
}

// Calls fill(out) with the place of a run's results if they are packed, else with `buffer`, which is stored then.
template <class R, class Fill>
void write_run(const View& view, const Run& run, int64_t c, R* buffer, Fill fill) {
  if (is_packed<R>(view)) return fill(at<R>(view, run, c));
  fill(buffer);
  store_run(buffer, view, run, c);
}

// What stays the same for all samples of one picture. `right` and `down` are 0 where the picture is one pixel wide or
// high.
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
};

// One axis of a run: positions are start + i * step + flow[i].
template <class R>
void locate_axis(R start, R step, const R* __restrict flow, int32_t size, int count, int32_t* __restrict index,
                 R* __restrict fraction) {
  for (int i = 0; i < count; ++i) {
    const AxisSample<R> sample = sample_axis(start + static_cast<R>(i) * step + flow[i], size);
    index[i] = sample.index;
    fraction[i] = sample.fraction;
  }
}

// Reads the flow of a run and locates its samples.
template <class R, class Offset>
void locate(const Grid<Offset>& grid, const View& flow, const Run& run, Cells<R, Offset>& cells) {
  R buffer[kChunk];
  int32_t left[kChunk], top[kChunk];
  const R* flow_x = read_run(flow, run, 0, buffer);
  locate_axis(static_cast<R>(run.x), R(1), flow_x, grid.width, run.count, left, cells.fraction_x);
  const R* flow_y = read_run(flow, run, 1, buffer);
  locate_axis(static_cast<R>(run.y), R(0), flow_y, grid.height, run.count, top, cells.fraction_y);
  const Offset stride_x = grid.stride_x, stride_y = grid.stride_y;
  for (int i = 0; i < run.count; ++i) cells.offset[i] = top[i] * stride_y + left[i] * stride_x;
}

// The four neighbours of a sample.
template <class R>
struct Corners {
  R v00, v01, v10, v11;
};

// Corners of samples [i, i + kGroup) of floats that lie side by side: both neighbours in a row come with one load of
// eight bytes. That beats the processors' gather instructions, which fetch number by number.
constexpr int kGroupBytes = kVectorBytes < 32 ? 16 : 32;
constexpr int kGroup = kGroupBytes / static_cast<int>(sizeof(float));
using Group = Simd<float, kGroupBytes>::Type;
struct GroupCorners {
  Group v00, v01, v10, v11;
};

SAFNET_INLINE double pair_at(const float* source) {
  typedef double Pair __attribute__((aligned(sizeof(float)), may_alias));  // floats lie at any multiple of four bytes
  return *reinterpret_cast<const Pair*>(source);
}

template <class Offset, int Lanes = kGroup>
SAFNET_INLINE void load_pairs(const float* row, const Offset* at, Group& left, Group& right) {
  using Pairs = typename Simd<double, 4 * Lanes>::Type;
  if constexpr (Lanes == 8) {
    const auto a = (Group)Pairs{pair_at(row + at[0]), pair_at(row + at[1]), pair_at(row + at[4]), pair_at(row + at[5])};
    const auto b = (Group)Pairs{pair_at(row + at[2]), pair_at(row + at[3]), pair_at(row + at[6]), pair_at(row + at[7])};
    left = SAFNET_SHUFFLE(4 * Lanes, a, b, 0, 2, 8, 10, 4, 6, 12, 14);
    right = SAFNET_SHUFFLE(4 * Lanes, a, b, 1, 3, 9, 11, 5, 7, 13, 15);
  } else {
    const auto a = (Group)Pairs{pair_at(row + at[0]), pair_at(row + at[1])};
    const auto b = (Group)Pairs{pair_at(row + at[2]), pair_at(row + at[3])};
    left = SAFNET_SHUFFLE(4 * Lanes, a, b, 0, 2, 4, 6);
    right = SAFNET_SHUFFLE(4 * Lanes, a, b, 1, 3, 5, 7);
  }
}

// Calls use(i, corners, fraction x, fraction y) for all samples of a run: for groups of them while that is possible.
template <class T, class R, class Offset, class Use>
SAFNET_INLINE void each_sample(const T* plane, const Grid<Offset>& grid, const Cells<R, Offset>& cells, int count,
                               Use use) {
  const T *upper_right = plane + grid.right, *lower_left = plane + grid.down, *lower_right = lower_left + grid.right;
  int i = 0;
  if constexpr (std::is_same_v<T, float>) {
    if (grid.right == 1)
      for (; i + kGroup <= count; i += kGroup) {
        GroupCorners v;
        for (int j = 0; j < kGroup; j += 4)
          __builtin_prefetch(plane + (cells.offset[i + j] + kRowsAhead * grid.down), 0, 2);
        load_pairs(plane, cells.offset + i, v.v00, v.v01);
        load_pairs(lower_left, cells.offset + i, v.v10, v.v11);
        use(i, v, vector_at<float, kGroupBytes>(cells.fraction_x + i),
            vector_at<float, kGroupBytes>(cells.fraction_y + i));
      }
  }
  for (; i < count; ++i) {
    const Offset at = cells.offset[i];
    use(i, Corners<R>{load(plane[at]), load(upper_right[at]), load(lower_left[at]), load(lower_right[at])},
        cells.fraction_x[i], cells.fraction_y[i]);
  }
}

SAFNET_INLINE void put(float value, float* out) { *out = value; }
SAFNET_INLINE void put(double value, double* out) { *out = value; }
SAFNET_INLINE void put(Group values, float* out) { store_vector<float, kGroupBytes>(values, out); }

template <class T, class R, class Offset>
void sample_elements(const T* __restrict plane, const Grid<Offset>& grid, const Cells<R, Offset>& cells, int count,
                     R* __restrict out) {
  each_sample(plane, grid, cells, count,
              [&](int i, const auto& v, auto x, auto y) { put(bilinear(v.v00, v.v01, v.v10, v.v11, x, y), out + i); });
}

// The sample and its derivatives with respect to the position.
template <class T, class R, class Offset>
void sample_elements_with_slopes(const T* __restrict plane, const Grid<Offset>& grid, const Cells<R, Offset>& cells,
                                 int count, R* __restrict out, R* __restrict slope_x, R* __restrict slope_y) {
  each_sample(plane, grid, cells, count, [&](int i, const auto& v, auto x, auto y) {
    put(bilinear(v.v00, v.v01, v.v10, v.v11, x, y), out + i);
    put(bilinear_dx(v.v00, v.v01, v.v10, v.v11, y), slope_x + i);
    put(bilinear_dy(v.v00, v.v01, v.v10, v.v11, x), slope_y + i);
  });
}

// Calls use(plane) with channel `c` of an image as its elements' type.
template <class R, class Use>
void with_plane(const View& image, int64_t n, int64_t c, Use use) {
  if constexpr (sizeof(R) == sizeof(double)) {
    use(row<double>(image, n, c, 0));
  } else {
    if (image.type == Type::kFloat32) use(row<float>(image, n, c, 0));
    else if (image.type == Type::kFloat16) use(row<Half>(image, n, c, 0));
    else use(row<BFloat16>(image, n, c, 0));
  }
}

// Samples channel `c` of an image for a run.
template <class R, class Offset>
void sample(const View& image, int64_t n, int64_t c, const Grid<Offset>& grid, const Cells<R, Offset>& cells, int count,
            R* out) {
  with_plane<R>(image, n, c, [&](auto* plane) { sample_elements(plane, grid, cells, count, out); });
}

template <class R, class Offset>
void sample_with_slopes(const View& image, int64_t n, int64_t c, const Grid<Offset>& grid,
                        const Cells<R, Offset>& cells, int count, R* out, R* slope_x, R* slope_y) {
  with_plane<R>(image, n, c,
                [&](auto* plane) { sample_elements_with_slopes(plane, grid, cells, count, out, slope_x, slope_y); });
}

// Stores the gradients of a run's flow: zero where it points out of the picture and where it is NaN, which the result
// then is whatever the rest. They are selected, not multiplied by zero: they may be NaN.
template <class R>
void store_flow_gradient(const View& image, const View& flow, const View& gradient, const Run& run, R* sum_x,
                         R* sum_y) {
  if (gradient.data == nullptr) return;
  const auto height = static_cast<int32_t>(image.size[2]), width = static_cast<int32_t>(image.size[3]);
  R buffer_x[kChunk], buffer_y[kChunk];
  const R *flow_x = read_run(flow, run, 0, buffer_x), *flow_y = read_run(flow, run, 1, buffer_y);
  for (int i = 0; i < run.count; ++i) {
    const auto x = sample_axis(static_cast<R>(run.x) + static_cast<R>(i) + flow_x[i], width);
    const auto y = sample_axis(static_cast<R>(run.y) + flow_y[i], height);
    sum_x[i] = x.inside != 0 && !is_nan(flow_y[i]) ? sum_x[i] : R(0);
    sum_y[i] = y.inside != 0 && !is_nan(flow_x[i]) ? sum_y[i] : R(0);
  }
  store_run(sum_x, gradient, run, 0);
  store_run(sum_y, gradient, run, 1);
}

bool needs_64bit_offsets(const View& image) {
  const int64_t reach = (image.size[2] - 1) * image.stride[2] + (image.size[3] - 1) * image.stride[3];
  return reach > INT32_MAX || force_64bit_offsets();
}

// Calls run_kernel(run) for the runs of rows [begin, end), those of all pictures counted on.
template <class RunKernel>
void each_run(const View& picture, int64_t begin, int64_t end, RunKernel run_kernel) {
  const auto width = static_cast<int32_t>(picture.size[3]);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / picture.size[2], y = row % picture.size[2];
    for (int32_t x = 0; x < width; x += kChunk)
      run_kernel(Run{n, static_cast<int32_t>(y), x, width - x < kChunk ? width - x : kChunk});
  }
}

// The same for one row.
template <class RunKernel>
void each_run_of_row(const View& picture, int64_t n, int32_t y, RunKernel run_kernel) {
  const int64_t row = n * picture.size[2] + y;
  each_run(picture, row, row + 1, run_kernel);
}

}  // namespace
}  // namespace safnet::SAFNET_ISA
