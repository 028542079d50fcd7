// The convolution of one tile: packing, and a register-blocked multiply-add loop. Included by kernels only: see
// kernel.h.
//
// A tile is a rectangle of the output of one picture. Its input is packed as the computing type, one plane a channel
// with the zero padding in place; then the loop runs over input channels and taps with a block of output channels times
// a strip of pixels in registers. All that depends on stride, dilation or transposition is in the table of offsets that
// the loop reads.
#pragma once

#include "cpu/channels.h"
#include "cpu/kernel.h"
#include "cpu/simd.h"

namespace safnet {

constexpr int kMostTaps = 9;
constexpr int kMostTileRows = 32;

// Input position that a weight is multiplied with, minus in_stride times the output position; and which of the 3x3
// weights it is.
struct Tap {
  int64_t dy, dx;
  int64_t weight;
};

// What is multiplied: the taps, the output grid they are applied on, and its division into tiles. A tile has
// `tile_rows` rows, `row_step` apart so that dilated taps share input rows, times `tile_columns` columns.
struct TapGrid {
  int32_t taps;
  Tap tap[kMostTaps];
  int64_t in_stride;
  int64_t height, width;
  int64_t row_step, tile_rows, tile_columns, row_tiles, column_tiles;
};

}  // namespace safnet

namespace safnet::SAFNET_ISA {
namespace {

// Accumulators are kBlock channels times kStrip vectors: with 16 registers 12 of them, with 32 registers 24.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlock = 8;
#else
constexpr int kBlock = 4;
#endif
constexpr int kStrip = 3;

// Sum of the Bytes / sizeof(R) numbers at `values`, which it overwrites: by halves while they are vectors.
template <class R, int Bytes = kVectorBytes>
SAFNET_INLINE R sum_of_lanes(R* values) {
  constexpr int half = Bytes / 2 / static_cast<int>(sizeof(R));
  if constexpr (Bytes > 16) {
    *reinterpret_cast<typename Simd<R, Bytes / 2>::Type*>(values) =
        vector_at<R, Bytes / 2>(values) + vector_at<R, Bytes / 2>(values + half);
    return sum_of_lanes<R, Bytes / 2>(values);
  } else if constexpr (half == 2) {
    return (values[0] + values[2]) + (values[1] + values[3]);
  } else {
    return values[0] + values[1];
  }
}

SAFNET_INLINE int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
SAFNET_INLINE int64_t floor_divide(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Channels of the next block when `left` remain.
SAFNET_INLINE int64_t block_channels(int64_t left) { return left >= kBlock ? kBlock : left >= 4 ? 4 : left; }

// Vectors of the next strip when `left` remain: 3, but two strips of 2 for 4, since a strip of 1 waits for its
// additions.
SAFNET_INLINE int strip_vectors(int64_t left) {
  return left == 4 ? 2 : left < kStrip ? static_cast<int>(left) : kStrip;
}

// Channels whose input strip and weights stay in the first-level cache together.
SAFNET_INLINE int64_t channels_at_once(int64_t channels) {
  const int64_t parts = larger(1, (channels + 47) / 48);
  return (channels + parts - 1) / parts;
}

// What the multiply-add loop reads and writes.
template <class R>
struct Strip {
  const R* in;
  int64_t in_channel;
  const int32_t* offset;  // of each tap
  int taps;
  int64_t channels;
  const R* weights;  // [channel][tap][output channel of the block]
  const R* start;    // first addend of every output channel, or null: continue the sums in `out`
  R* out;
  int64_t out_channel;
};

// out[m][x] = start[m] + sum over channels c and taps t of weights[c][t][m] * in[c][offset[t] + x].
template <class R, int M, int N>
SAFNET_INLINE void multiply_add(const Strip<R>& s) {
  Vector<R> sum[M][N];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < N; ++v)
      sum[m][v] = s.start != nullptr ? Vector<R>{} + s.start[m] : vector_at(s.out + m * s.out_channel + v * kLanes<R>);
  const R* in = s.in;
  const R* weights = s.weights;
  const int taps = s.taps;
  for (int64_t c = 0; c < s.channels; ++c) {
    for (int t = 0; t < taps; ++t) {
      const R* at = in + s.offset[t];
      Vector<R> pixels[N];
      for (int v = 0; v < N; ++v) pixels[v] = vector_at(at + v * kLanes<R>);
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < N; ++v) sum[m][v] += pixels[v] * weights[m];
      weights += M;
    }
    in += s.in_channel;
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < N; ++v) *reinterpret_cast<Vector<R>*>(s.out + m * s.out_channel + v * kLanes<R>) = sum[m][v];
}

// Not inlined, so that its sums get all registers.
template <class R, int M>
__attribute__((noinline)) void multiply_add(const Strip<R>& s, int vectors) {
  if (vectors == 3) multiply_add<R, M, 3>(s);
  else if (vectors == 2) multiply_add<R, M, 2>(s);
  else multiply_add<R, M, 1>(s);
}

// Calls act(size) with the size of a block as a constant: a number that is part of its type.
template <int Number>
struct Constant {
  static constexpr int value = Number;
};

template <class Act>
SAFNET_INLINE void with_block(int64_t block, const Act& act) {
  switch (block) {
    case 1: return act(Constant<1>{});
    case 2: return act(Constant<2>{});
    case 3: return act(Constant<3>{});
    case 4: return act(Constant<4>{});
    default: return act(Constant<kBlock>{});
  }
}

// How the packed input of a tile lies in memory: [channel][slot][phase][column]. A slot is an input row; a phase holds
// every in_stride-th column, so that neighbouring outputs read neighbouring numbers.
struct TileLayout {
  int64_t slots, phases;
  int64_t row_pitch, channel_pitch;          // of one phase of a slot; of one channel
  int64_t first_column[kMostTaps];           // of a phase, minus in_stride times the tile's first column
  int64_t slot_row[3 * kMostTileRows];       // input row of a slot, minus in_stride times the tile's first row
  int32_t offset[kMostTileRows][kMostTaps];  // of a tap, for every row of the tile
};

// Distance of channels of `count` numbers: an odd number of cache lines spreads them over the cache's sets.
template <class R>
SAFNET_INLINE int64_t spread_channels(int64_t count) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(R));
  return (round_up(count, line) / line | 1) * line;
}

// The input rows that a tile reads, minus in_stride times its first row, and for every row of the tile which of them a
// tap reads. Returns their number.
inline int64_t find_slots(const TapGrid& grid, int64_t* slot_row, int64_t (*slot_of)[kMostTaps]) {
  int64_t slots = 0;
  for (int64_t j = 0; j < grid.tile_rows; ++j)
    for (int t = 0; t < grid.taps; ++t) {
      const int64_t input_row = j * grid.row_step * grid.in_stride + grid.tap[t].dy;
      int64_t slot = 0;
      while (slot < slots && slot_row[slot] != input_row) ++slot;
      if (slot == slots) slot_row[slots++] = input_row;
      slot_of[j][t] = slot;
    }
  return slots;
}

template <class R>
TileLayout lay_out(const TapGrid& grid) {
  TileLayout tile;
  int64_t shift[kMostTaps], phase_of_tap[kMostTaps], remainder_of_phase[kMostTaps];
  int64_t smallest = INT64_MAX, largest = INT64_MIN;
  tile.phases = 0;
  for (int t = 0; t < grid.taps; ++t) {
    shift[t] = floor_divide(grid.tap[t].dx, grid.in_stride);
    smallest = smaller(smallest, shift[t]), largest = larger(largest, shift[t]);
    const int64_t remainder = grid.tap[t].dx - shift[t] * grid.in_stride;
    int64_t phase = 0;
    while (phase < tile.phases && remainder_of_phase[phase] != remainder) ++phase;
    if (phase == tile.phases) remainder_of_phase[tile.phases++] = remainder;
    phase_of_tap[t] = phase;
  }
  for (int64_t phase = 0; phase < tile.phases; ++phase)
    tile.first_column[phase] = remainder_of_phase[phase] + smallest * grid.in_stride;
  tile.row_pitch = round_up(grid.tile_columns, kLanes<R>) + largest - smallest;
  int64_t slot_of[kMostTileRows][kMostTaps];
  tile.slots = find_slots(grid, tile.slot_row, slot_of);
  for (int64_t j = 0; j < grid.tile_rows; ++j)
    for (int t = 0; t < grid.taps; ++t)
      tile.offset[j][t] =
          static_cast<int32_t>((slot_of[j][t] * tile.phases + phase_of_tap[t]) * tile.row_pitch + shift[t] - smallest);
  tile.channel_pitch = spread_channels<R>(tile.slots * tile.phases * tile.row_pitch);
  return tile;
}

// Where a tile lies in the output grid: its first row and column, and how much of it lies inside the grid.
struct Place {
  int64_t n, y, x;
  int64_t rows, columns;
};

SAFNET_INLINE Place place_of(const TapGrid& grid, int64_t index) {
  Place p;
  p.x = index % grid.column_tiles * grid.tile_columns;
  index /= grid.column_tiles;
  const int64_t first = index % grid.row_tiles * grid.tile_rows;
  index /= grid.row_tiles;
  p.y = index % grid.row_step + first * grid.row_step;
  p.n = index / grid.row_step;
  p.rows = p.y < grid.height ? smaller(grid.tile_rows, (grid.height - p.y + grid.row_step - 1) / grid.row_step) : 0;
  p.columns = smaller(grid.tile_columns, grid.width - p.x);
  return p;
}

// Packs channels [first, first + channels) of one tile's input, zeros where it leaves the picture.
template <class R>
void pack_tile(const View& input, const TapGrid& grid, const TileLayout& tile, const Place& place, int64_t first,
               int64_t channels, R* packed) {
  const int64_t stride = grid.in_stride, width = input.size[3];
  for (int64_t slot = 0; slot < tile.slots; ++slot) {
    const int64_t y = place.y * stride + tile.slot_row[slot];
    for (int64_t phase = 0; phase < tile.phases; ++phase) {
      // Columns [begin, end) of the packed row lie in the picture: 0 <= x + column * stride < width.
      const int64_t x = place.x * stride + tile.first_column[phase];
      int64_t begin = x >= 0 ? 0 : (stride - 1 - x) / stride, end = x >= width ? 0 : (width - x + stride - 1) / stride;
      if (y < 0 || y >= input.size[2]) end = 0;
      begin = smaller(begin, tile.row_pitch), end = larger(begin, smaller(end, tile.row_pitch));
      R* out = packed + (slot * tile.phases + phase) * tile.row_pitch;
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t i = 0; i < begin; ++i) out[c * tile.channel_pitch + i] = 0;
        for (int64_t i = end; i < tile.row_pitch; ++i) out[c * tile.channel_pitch + i] = 0;
      }
      if (begin == end) continue;
      const Span span{place.n, y, x + begin * stride, stride, end - begin};
      load_channels(input, span, first, channels, out + begin, tile.channel_pitch);
    }
  }
}

// Sums of one tile: [channel][row][column].
template <class R>
struct Sums {
  R* data;
  int64_t channel, row;  // distances
};

// The convolution as a method of group_conv_shuffle.cpp: all output channels of one group for one tile.
template <class R>
class ByDefinition {
 public:
  using Weight = R;

  ByDefinition(const TapGrid& grid, int64_t channels_in, int64_t channels_out)
      : grid_(grid),
        tile_(lay_out<R>(grid)),
        channels_in_(channels_in),
        channels_out_(channels_out),
        packed_(channels_in * tile_.channel_pitch) {}

  int64_t rows() const { return grid_.tile_rows; }
  int64_t columns() const { return round_up(grid_.tile_columns, kLanes<R>); }
  int64_t weights_a_group() const { return channels_out_ * channels_in_ * grid_.taps; }

  // `weights`: [block of output channels][input channel][tap][in block]. Returns that the results stand.
  bool convolve(const View& input, const Place& place, int64_t first, const R* weights, const R* bias,
                Sums<R> sums) const {
    pack_tile(input, grid_, tile_, place, first, channels_in_, packed_.data());
    const int64_t part = channels_at_once(channels_in_);
    const int64_t vectors = round_up(place.columns, kLanes<R>) / kLanes<R>;
    Strip<R> s;
    s.in_channel = tile_.channel_pitch;
    s.taps = grid_.taps;
    s.out_channel = sums.channel;
    for (int64_t j = 0; j < place.rows; ++j) {
      s.offset = tile_.offset[j];
      for (int64_t v = 0; v < vectors; v += strip_vectors(vectors - v)) {
        for (int64_t c = 0; c < channels_in_; c += part) {
          s.in = packed_.data() + c * tile_.channel_pitch + v * kLanes<R>;
          s.channels = smaller(part, channels_in_ - c);
          for (int64_t o = 0; o < channels_out_; o += block_channels(channels_out_ - o)) {
            const int64_t block = block_channels(channels_out_ - o);
            s.weights = weights + (o * channels_in_ + c * block) * grid_.taps;
            s.start = c == 0 ? bias + o : nullptr;
            s.out = sums.data + o * sums.channel + j * sums.row + v * kLanes<R>;
            const int strip = strip_vectors(vectors - v);
            with_block(block, [&](auto size) { multiply_add<R, decltype(size)::value>(s, strip); });
          }
        }
      }
    }
    return true;
  }

 private:
  TapGrid grid_;
  TileLayout tile_;
  int64_t channels_in_, channels_out_;
  Scratch<R> packed_;
};

}  // namespace
}  // namespace safnet::SAFNET_ISA
