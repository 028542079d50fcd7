// The gradient of a warp with respect to its image: every pixel adds to the four pixels it was sampled from.
//
// Threads own bands of the image's rows. Each goes through all pixels that may reach its band, in raster order, and
// adds only what falls into it. So no two threads write the same pixel, and every sum has the same order whatever the
// number of threads: the result is repeatable to the bit. A table of the image rows that each flow row reaches lets a
// band skip the others. Included by kernels only: see kernel.h.
#pragma once

#include <cstdlib>

#include "cpu/sampling.h"

namespace safnet::SAFNET_ISA {
namespace {

// First and last image row that a row of the flow reads.
struct Reach {
  int32_t first, last;
};

// Notes the reach of the flow's rows [begin, end), those of all pictures counted on.
template <class R>
void note_reach(const View& flow, int64_t begin, int64_t end, Reach* reach) {
  const auto height = static_cast<int32_t>(flow.size[2]);
  for (int64_t row = begin; row < end; ++row) reach[row] = {height, 0};
  R buffer[kChunk];
  each_run(flow, begin, end, [&](const Run& run) {
    const R* flow_y = read_run(flow, run, 1, buffer);
    int32_t first = height, last = 0;
    for (int i = 0; i < run.count; ++i) {
      const int32_t top = sample_axis(static_cast<R>(run.y) + flow_y[i], height).index;
      first = top < first ? top : first;
      last = top > last ? top : last;
    }
    Reach& of_row = reach[run.n * height + run.y];
    of_row.first = first < of_row.first ? first : of_row.first;
    of_row.last = last > of_row.last ? last : of_row.last;
  });
  for (int64_t row = begin; row < end; ++row) reach[row].last += axis_step(height);
}

// The rows [first, last) of one picture's gradient, as sums of type R: the gradient itself, or for half types a buffer,
// because their sums must not be rounded at every addition.
template <class R>
struct Band {
  const View& gradient;
  int64_t n;
  int32_t first, last;
  bool buffered;
  R* data;
  int64_t stride_c, stride_y, stride_x;

  Band(const View& gradient_, int64_t n_, int32_t first_, int32_t last_)
      : gradient(gradient_),
        n(n_),
        first(first_),
        last(last_),
        buffered(gradient.type == Type::kFloat16 || gradient.type == Type::kBFloat16) {
    if (buffered) {
      stride_x = gradient.size[1], stride_y = stride_x * gradient.size[3], stride_c = 1;
      data = static_cast<R*>(std::calloc(static_cast<size_t>(stride_y * (last - first)), sizeof(R)));
      if (data == nullptr) std::abort();  // not reached where the system overcommits; no exception may leave a kernel
    } else {
      stride_c = gradient.stride[1], stride_y = gradient.stride[2], stride_x = gradient.stride[3];
      data = row<R>(gradient, n, 0, first);
    }
  }
  Band(const Band&) = delete;

  ~Band() {
    if (!buffered) return;
    R values[kChunk];
    for (int32_t y = first; y < last; ++y)
      each_run_of_row(gradient, n, y, [&](const Run& run) {
        for (int64_t c = 0; c < gradient.size[1]; ++c) {
          const R* sums = data + c * stride_c + (y - first) * stride_y + run.x * stride_x;
          for (int i = 0; i < run.count; ++i) values[i] = sums[i * stride_x];
          store_run(values, gradient, run, c);
        }
      });
    std::free(data);
  }
};

// Adds what a run gives to a band: nothing where its flow is NaN. `values` holds the gradients of the samples, kChunk
// apart for each channel.
template <class R>
void add_run(Band<R>& band, const View& flow, const Run& run, const R* values) {
  const int64_t channels = band.gradient.size[1];
  const auto height = static_cast<int32_t>(flow.size[2]), width = static_cast<int32_t>(flow.size[3]);
  R flow_x[kChunk], flow_y[kChunk];
  load_run(flow, run, 0, flow_x);
  load_run(flow, run, 1, flow_y);
  for (int i = 0; i < run.count; ++i) {
    const auto sample_x = sample_axis(static_cast<R>(run.x + i) + flow_x[i], width);
    const auto sample_y = sample_axis(static_cast<R>(run.y) + flow_y[i], height);
    if (is_nan(flow_x[i]) || is_nan(flow_y[i])) continue;
    for (int32_t lower = 0; lower < 2; ++lower) {
      const int32_t y = sample_y.index + lower * axis_step(height);
      if (y < band.first || y >= band.last) continue;
      const R weight = lower ? sample_y.fraction : 1 - sample_y.fraction;
      R* left = band.data + (y - band.first) * band.stride_y + sample_x.index * band.stride_x;
      R* right = left + axis_step(width) * band.stride_x;
      for (int64_t c = 0; c < channels; ++c) {
        const R value = values[c * kChunk + i] * weight;
        left[c * band.stride_c] += value * (1 - sample_x.fraction);
        right[c * band.stride_c] += value * sample_x.fraction;
      }
    }
  }
}

// Fills bands [begin, end) of all pictures' gradients, `bands` a picture. `sample_gradients(run, values)` gives the
// gradients of the samples of a run.
template <class R, class SampleGradients>
void scatter_bands(const View& gradient, const View& flow, const Reach* reach, int32_t bands, int64_t begin,
                   int64_t end, SampleGradients sample_gradients) {
  const int64_t channels = gradient.size[1], height = gradient.size[2];
  auto* values = static_cast<R*>(std::malloc(static_cast<size_t>(channels) * kChunk * sizeof(R)));
  if (values == nullptr) std::abort();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / bands, number = task % bands;
    Band<R> band(gradient, n, static_cast<int32_t>(height * number / bands),
                 static_cast<int32_t>(height * (number + 1) / bands));
    for (int32_t y = 0; y < height; ++y) {
      const Reach rows = reach[n * height + y];
      if (rows.last < band.first || rows.first >= band.last) continue;
      each_run_of_row(gradient, n, y, [&](const Run& run) {
        sample_gradients(run, values);
        add_run(band, flow, run, values);
      });
    }
  }
  std::free(values);
}

}  // namespace
}  // namespace safnet::SAFNET_ISA
