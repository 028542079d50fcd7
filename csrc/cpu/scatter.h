// The gradient of a warp with respect to its image: every pixel adds to the four pixels it was sampled from.
//
// Threads own bands of the image's rows. Each goes through all pixels that may reach its band, in raster order, and adds only
// what falls into it. So no two threads write the same pixel, and every sum has the same order whatever the number of threads:
// the result is repeatable to the bit. A table of the rows that each flow row reaches lets a band skip the others.
// Included by kernels only: see kernel.h.
#pragma once

#include <cstdlib>

#include "cpu/sampling.h"

namespace safnet::SAFNET_ISA {

// First and last image row that a row of the flow reads.
struct Reach {
  int32_t first, last;
};

template <class G, class R, class Offset>
SAFNET_INLINE Reach reach_of_row(const Grid<Offset>& grid, const View& flow, int64_t n, int32_t y) {
  Reach reach{grid.height, 0};
  for (int32_t x = 0; x < grid.width; ++x) {
    const auto sample = sample_axis(static_cast<R>(y) + static_cast<R>(load(row<G>(flow, n, 1, y)[x * flow.stride[3]])), grid.height);
    reach.first = sample.index < reach.first ? sample.index : reach.first;
    reach.last = sample.index > reach.last ? sample.index : reach.last;
  }
  reach.last += axis_step(grid.height);
  return reach;
}

// The part of an image gradient that one band owns: the gradient itself, or a float buffer for half types, whose sums must not
// be rounded at every addition.
template <class T, class R>
struct Band {
  const View& gradient;
  int64_t n;
  int32_t first, last;  // rows [first, last)
  R* data;
  int64_t stride_c, stride_y, stride_x;

  SAFNET_INLINE Band(const View& gradient, int64_t n, int32_t first, int32_t last)
      : gradient(gradient), n(n), first(first), last(last) {
    if constexpr (sizeof(T) == sizeof(R)) {
      data = reinterpret_cast<R*>(row<T>(gradient, n, 0, first));
      stride_c = gradient.stride[1], stride_y = gradient.stride[2], stride_x = gradient.stride[3];
    } else {
      stride_x = gradient.size[1], stride_y = stride_x * gradient.size[3], stride_c = 1;
      data = static_cast<R*>(std::calloc(static_cast<size_t>(stride_y * (last - first)), sizeof(R)));
      if (data == nullptr) std::abort();
    }
  }

  SAFNET_INLINE void finish() {
    if constexpr (sizeof(T) != sizeof(R)) {
      for (int32_t y = first; y < last; ++y)
        for (int64_t c = 0; c < gradient.size[1]; ++c)
          for (int64_t x = 0; x < gradient.size[3]; ++x)
            store(data[c * stride_c + (y - first) * stride_y + x * stride_x],
                  row<T>(gradient, n, c, y)[x * gradient.stride[3]]);
      std::free(data);
    }
  }
};

// Adds what a run of pixels gives to a band. `values` holds the gradients of the samples, kChunk apart for each channel.
template <class T, class R>
SAFNET_INLINE void add_to_band(Band<T, R>& band, const int32_t* left, const int32_t* top, const R* fraction_x,
                               const R* fraction_y, int32_t right, int32_t down, int count, const R* values) {
  const int64_t channels = band.gradient.size[1];
  for (int i = 0; i < count; ++i) {
    const R fx = fraction_x[i], fy = fraction_y[i];
    for (int32_t step = 0; step < 2; ++step) {
      const int32_t y = top[i] + step * down;
      if (y < band.first || y >= band.last) continue;
      const R weight_y = step == 0 ? 1 - fy : fy;
      R* at_left = band.data + (y - band.first) * band.stride_y + left[i] * band.stride_x;
      R* at_right = at_left + right * band.stride_x;
      for (int64_t c = 0; c < channels; ++c) {
        const R value = values[c * kChunk + i] * weight_y;
        at_left[c * band.stride_c] += value * (1 - fx);
        at_right[c * band.stride_c] += value * fx;
      }
    }
  }
}

// Fills one band. `sample_gradients(y, x, count, values)` gives the gradients of the samples of a run of pixels.
template <class T, class G, class SampleGradients>
SAFNET_INLINE void scatter_band(const View& gradient, const View& flow, const Reach* reach, int64_t n, int32_t first,
                                int32_t last, Real<T>* values, SampleGradients sample_gradients) {
  using R = Real<T>;
  const int32_t height = static_cast<int32_t>(gradient.size[2]), width = static_cast<int32_t>(gradient.size[3]);
  Band<T, R> band(gradient, n, first, last);
  for (int32_t y = 0; y < height; ++y) {
    if (reach[y].last < first || reach[y].first >= last) continue;
    for (int32_t x = 0; x < width; x += kChunk) {
      const int count = width - x < kChunk ? width - x : kChunk;
      int32_t left[kChunk], top[kChunk];
      R fraction_x[kChunk], fraction_y[kChunk];
      const G *flow_x = row<G>(flow, n, 0, y) + x * flow.stride[3], *flow_y = row<G>(flow, n, 1, y) + x * flow.stride[3];
      for (int i = 0; i < count; ++i) {
        const auto sample_x = sample_axis(static_cast<R>(x + i) + static_cast<R>(load(flow_x[i * flow.stride[3]])), width);
        const auto sample_y = sample_axis(static_cast<R>(y) + static_cast<R>(load(flow_y[i * flow.stride[3]])), height);
        left[i] = sample_x.index, top[i] = sample_y.index;
        fraction_x[i] = sample_x.fraction, fraction_y[i] = sample_y.fraction;
      }
      sample_gradients(y, x, count, values);
      add_to_band(band, left, top, fraction_x, fraction_y, axis_step(width), axis_step(height), count, values);
    }
  }
  band.finish();
}

}  // namespace safnet::SAFNET_ISA
