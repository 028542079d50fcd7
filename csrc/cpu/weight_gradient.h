// The gradient of a convolution's weights: packed tiles of the input, correlated with those of the gradient. Included
// by kernels only: see kernel.h.
//
// Sums over pixels are cut into a number of parts that depends on the shapes alone and are added in order, so that
// results do not depend on the number of threads.
#pragma once

#include "cpu/convolution.h"
#include "cpu/kernel.h"
#include "cpu/winograd.h"

namespace safnet {

struct WeightGradientArguments {
  TapGrid grid;
  View input, grad;  // grad: before the activation, in the convolution's channel order
  void* partial;     // (parts, weights)
  void* out;         // contiguous
  int64_t groups, channels_in, channels_out, tiles, parts;
  bool winograd;  // instead of by definition
};

}  // namespace safnet

namespace safnet::SAFNET_ISA {
namespace {

// The tile of a gradient that a tile of inputs is correlated with: [channel][row][column].
template <class R>
struct GradientTile {
  const R* data;
  int64_t channel, row;
};

// out[m][weight of tap t] += sum over rows j and columns x of grad[m][j][x] * in[offset[j][t] + x], for M channels and
// N taps.
template <class R, int M, int N>
__attribute__((noinline)) void correlate(const TapGrid& grid, const TileLayout& tile, const Place& place, const R* in,
                                         int first_tap, const GradientTile<R>& grad, R* out, int64_t out_channel) {
  const int64_t whole = place.columns / kLanes<R> * kLanes<R>;
  R lane_numbers[kLanes<R>];
  for (int lane = 0; lane < kLanes<R>; ++lane) lane_numbers[lane] = static_cast<R>(lane);
  const auto exists = vector_at(lane_numbers) < static_cast<R>(place.columns - whole);
  Vector<R> sum[M][N] = {};
  for (int64_t j = 0; j < place.rows; ++j) {
    const R* pixels[N];
    for (int t = 0; t < N; ++t) pixels[t] = in + tile.offset[j][first_tap + t];
    const R* grads = grad.data + j * grad.row;
    const auto add = [&](int64_t x, const Vector<R>* p) {
      for (int m = 0; m < M; ++m) {
        const Vector<R> g = vector_at(grads + m * grad.channel + x);
        for (int t = 0; t < N; ++t) sum[m][t] += g * p[t];
      }
    };
    Vector<R> p[N];
    for (int64_t x = 0; x < whole; x += kLanes<R>) {
      for (int t = 0; t < N; ++t) p[t] = vector_at(pixels[t] + x);
      add(x, p);
    }
    if (whole == place.columns) continue;
    // Beyond the last column the gradient is packed as 0; the pixels must be 0 too, for 0 times infinity is not.
    for (int t = 0; t < N; ++t) p[t] = exists ? vector_at(pixels[t] + whole) : Vector<R>{};
    add(whole, p);
  }
  alignas(64) R sums[M][N][kLanes<R>];
  for (int m = 0; m < M; ++m)
    for (int t = 0; t < N; ++t) *reinterpret_cast<Vector<R>*>(sums[m][t]) = sum[m][t];
  for (int m = 0; m < M; ++m)
    for (int t = 0; t < N; ++t) out[m * out_channel + grid.tap[first_tap + t].weight] += sum_of_lanes(sums[m][t]);
}

template <class R, int M>
SAFNET_INLINE void correlate_taps(const TapGrid& grid, const TileLayout& tile, const Place& place, const R* in,
                                  const GradientTile<R>& grad, R* out, int64_t out_channel) {
  int t = 0;
  for (; t + 3 <= grid.taps; t += 3) correlate<R, M, 3>(grid, tile, place, in, t, grad, out, out_channel);
  for (; t < grid.taps; ++t) correlate<R, M, 1>(grid, tile, place, in, t, grad, out, out_channel);
}

// Correlates every input channel with every output channel of one group over one tile.
template <class R>
SAFNET_INLINE void correlate_tile(const WeightGradientArguments& a, const TileLayout& tile, const Place& place,
                                  const R* packed, GradientTile<R> grad, R* out) {
  const int64_t out_channel = a.channels_in * 9, distance = grad.channel;
  for (int64_t o = 0, block; o < a.channels_out; o += block, grad.data += block * distance) {
    const int64_t left = a.channels_out - o;
    block = left >= 4 ? 4 : left;
    for (int64_t c = 0; c < a.channels_in; ++c) {
      const R* in = packed + c * tile.channel_pitch;
      R* to = out + o * out_channel + c * 9;
      switch (block) {
        case 1: correlate_taps<R, 1>(a.grid, tile, place, in, grad, to, out_channel); break;
        case 2: correlate_taps<R, 2>(a.grid, tile, place, in, grad, to, out_channel); break;
        case 3: correlate_taps<R, 3>(a.grid, tile, place, in, grad, to, out_channel); break;
        default: correlate_taps<R, 4>(a.grid, tile, place, in, grad, to, out_channel);
      }
    }
  }
}

// Calls act(place) for the tiles of one part.
template <class Act>
SAFNET_INLINE void for_tiles(const WeightGradientArguments& a, int64_t part, const Act& act) {
  for (int64_t index = a.tiles * part / a.parts; index < a.tiles * (part + 1) / a.parts; ++index) {
    const Place place = place_of(a.grid, index);
    if (place.rows > 0) act(place);
  }
}

template <class R>
void weight_gradient_by_winograd(const WeightGradientArguments& a, int64_t begin, int64_t end) {
  const WinogradCorrelation<R> correlation(a.grid, a.channels_in, a.channels_out);
  const int64_t group_weights = a.channels_out * a.channels_in * 9, group_sums = correlation.sums();
  const Scratch<R> sums(a.groups * group_sums);
  for (int64_t part = begin; part < end; ++part) {
    for (int64_t i = 0; i < a.groups * group_sums; ++i) sums[i] = 0;
    for_tiles(a, part, [&](const Place& place) {
      for (int64_t g = 0; g < a.groups; ++g) correlation.add(a.input, a.grad, place, g, sums.data() + g * group_sums);
    });
    R* out = static_cast<R*>(a.partial) + part * a.groups * group_weights;
    for (int64_t g = 0; g < a.groups; ++g) correlation.finish(sums.data() + g * group_sums, out + g * group_weights);
  }
}

template <class R>
void weight_gradient(const WeightGradientArguments& a, int64_t begin, int64_t end) {
  if (a.winograd) return weight_gradient_by_winograd<R>(a, begin, end);
  const TileLayout tile = lay_out<R>(a.grid);
  const int64_t pitch = round_up(a.grid.tile_columns, kLanes<R>), channel = a.grid.tile_rows * pitch;
  const int64_t group_weights = a.channels_out * a.channels_in * 9, weights = a.groups * group_weights;
  const Scratch<R> packed(a.channels_in * tile.channel_pitch), grads(a.channels_out * channel);
  for (int64_t part = begin; part < end; ++part) {
    R* out = static_cast<R*>(a.partial) + part * weights;
    for (int64_t i = 0; i < weights; ++i) out[i] = 0;
    for_tiles(a, part, [&](const Place& place) {
      for (int64_t g = 0; g < a.groups; ++g) {
        pack_tile(a.input, a.grid, tile, place, g * a.channels_in, a.channels_in, packed.data());
        for (int64_t j = 0; j < place.rows; ++j) {
          const Span span{place.n, place.y + j * a.grid.row_step, place.x, 1, place.columns};
          load_channels(a.grad, span, g * a.channels_out, a.channels_out, grads.data() + j * pitch, channel);
          for (int64_t o = 0; o < a.channels_out; ++o)
            for (int64_t i = place.columns; i < pitch; ++i) grads.data()[o * channel + j * pitch + i] = 0;
        }
        correlate_tile<R>(a, tile, place, packed.data(), {grads.data(), channel, pitch}, out + g * group_weights);
      }
    });
  }
}

// Adds the parts of weights [begin, end), in order.
template <class R>
void reduce_weight_gradient(const WeightGradientArguments& a, int64_t begin, int64_t end) {
  const R* partial = static_cast<const R*>(a.partial);
  const int64_t weights = a.groups * a.channels_out * a.channels_in * 9;
  for (int64_t i = begin; i < end; ++i) {
    double sum = 0;
    for (int64_t part = 0; part < a.parts; ++part) sum += static_cast<double>(partial[part * weights + i]);
    set_element(a.out, i, a.input.type, sum);
  }
}

}  // namespace
}  // namespace safnet::SAFNET_ISA
