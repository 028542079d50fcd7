// The convolution of one tile by Winograd's minimal filtering F(2x2, 3x3): 16 multiplications for 2x2 outputs where the
// definition takes 36. Included by kernels only: see kernel.h.
//
// Y = A'[(G g G') . (B' d B)]A for 4x4 inputs d, 3x3 weights g and 2x2 outputs Y (Lavin and Gray, "Fast Algorithms for
// Convolutional Neural Networks", 2016, section 4.1). The products, summed over the channels, are one matrix product
// for each of the 16 places, by register-blocked loops. An input enters the outputs that read it by definition and no
// others, so that errors are as small as by definition. With dilation, outputs `dilation` apart form the 2x2.
#pragma once

#include "cpu/convolution.h"

namespace safnet {

constexpr int kPlaces = 16;

}  // namespace safnet

namespace safnet::SAFNET_ISA {
namespace {

// A tile's positions, each the first of 2x2 outputs. Outputs in a row alternate: `dilation` of them are first columns
// of their 2x2, the next ones second columns. Positions are numbered by pair of rows, then along the row.
//
// Its input is packed as [channel][slot][half][position]. A slot is an input row, `dilation` below the one before; its
// halves are the columns that first and second outputs lie on, from one dilation left of the tile to two right of it.
struct WinogradTile {
  int64_t dilation, row_pairs, run;    // positions in a pair of rows
  int64_t count;                       // positions, rounded up to vectors
  int64_t pitch;                       // room for them, if whole vectors are written from the start of every run
  int64_t columns;                     // outputs in a row, if whole vectors are written
  int64_t slots, half, channel_pitch;  // of the packed input
};

template <class R>
WinogradTile lay_out_winograd(const TapGrid& grid) {
  WinogradTile tile;
  tile.dilation = grid.row_step;
  tile.row_pairs = (grid.tile_rows + 1) / 2;
  tile.run = round_up(grid.tile_columns, 2 * tile.dilation) / 2;
  const int64_t whole_run = round_up(tile.run, kLanes<R>);
  tile.count = round_up(tile.row_pairs * tile.run, kLanes<R>);
  tile.pitch = round_up((tile.row_pairs - 1) * tile.run + whole_run, kLanes<R>);
  tile.columns = 2 * whole_run;
  tile.slots = 2 * tile.row_pairs + 2;
  tile.half = whole_run + tile.dilation;
  tile.channel_pitch = spread_channels<R>(tile.slots * 2 * tile.half);
  return tile;
}

// Where element `index` of a row of first (or second) columns lies among all columns.
template <int D>
SAFNET_INLINE constexpr int64_t column_of(int64_t index) {
  return index / D * 2 * D + index % D;
}

// Splits a row of 2 * half columns into those of first and of second outputs.
template <int D, class R>
SAFNET_INLINE void split_row(const R* __restrict row, int64_t half, R* __restrict first) {
  R* __restrict second = first + half;
  for (int64_t i = 0; i < half; i += D)
    for (int k = 0; k < D; ++k) first[i + k] = row[2 * i + k], second[i + k] = row[2 * i + D + k];
}

// Packs channels [first, first + channels) of one tile's input, zeros where it leaves the picture. `rows`: room for one
// slot of every channel.
template <int D, class R>
void pack_winograd(const View& input, const WinogradTile& tile, const Place& place, int64_t first, int64_t channels,
                   R* rows, R* packed) {
  const int64_t columns = 2 * tile.half, x0 = place.x - D;
  const int64_t begin = x0 >= 0 ? 0 : smaller(-x0, columns);
  for (int64_t slot = 0; slot < tile.slots; ++slot) {
    const int64_t y = place.y + (slot - 1) * D;
    const bool inside = y >= 0 && y < input.size[2];
    const int64_t end = inside ? larger(begin, smaller(input.size[3] - x0, columns)) : begin;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = 0; i < begin; ++i) rows[c * columns + i] = 0;
      for (int64_t i = end; i < columns; ++i) rows[c * columns + i] = 0;
    }
    if (begin < end)
      load_channels(input, Span{place.n, y, x0 + begin, 1, end - begin}, first, channels, rows + begin, columns);
    for (int64_t c = 0; c < channels; ++c)
      split_row<D>(rows + c * columns, tile.half, packed + c * tile.channel_pitch + slot * columns);
  }
}

// to[4 * row + column] = G g G'.
template <class V>
SAFNET_INLINE void transform_weights(const V (&g)[3][3], V (&to)[kPlaces]) {
  V rows[4][3];
  for (int k = 0; k < 3; ++k) {
    rows[0][k] = g[0][k];
    rows[1][k] = (g[0][k] + g[1][k] + g[2][k]) / 2;
    rows[2][k] = (g[0][k] - g[1][k] + g[2][k]) / 2;
    rows[3][k] = g[2][k];
  }
  for (int row = 0; row < 4; ++row) {
    const V* r = rows[row];
    V* out = to + 4 * row;
    out[0] = r[0], out[1] = (r[0] + r[1] + r[2]) / 2, out[2] = (r[0] - r[1] + r[2]) / 2, out[3] = r[2];
  }
}

// B' d along one direction.
template <class V>
SAFNET_INLINE void transform_four(const V& a, const V& b, const V& c, const V& d, V (&to)[4]) {
  to[0] = a - c, to[1] = b + c, to[2] = c - b, to[3] = b - d;
}

// out[place][channel][position] = B' d B.
template <int D, class R>
__attribute__((noinline)) void transform_input(const WinogradTile& tile, const R* packed, int64_t channels, R* out) {
  const int64_t place = channels * tile.pitch, half = tile.half, slot = 2 * half;
  for (int64_t c = 0; c < channels; ++c, packed += tile.channel_pitch, out += tile.pitch)
    for (int64_t j = 0; j < tile.row_pairs; ++j)
      for (int64_t i = 0; i < tile.run; i += kLanes<R>) {
        Vector<R> t[4][4];
        for (int s = 0; s < 4; ++s) {
          const R* at = packed + (2 * j + s) * slot + i;
          const R* next = at + D;
          transform_four(vector_at(at), vector_at(at + half), vector_at(next), vector_at(next + half), t[s]);
        }
        R* to = out + j * tile.run + i;
        for (int k = 0; k < 4; ++k) {
          Vector<R> values[4];
          transform_four(t[0][k], t[1][k], t[2][k], t[3][k], values);
          for (int s = 0; s < 4; ++s) store_vector(values[s], to + (4 * s + k) * place);
        }
      }
}

// Whether all lanes are zero. Sums of numbers times zero are, unless one of the numbers was not finite.
template <class R>
SAFNET_INLINE bool are_zero(const Vector<R>& values) {
  bool zero = true;
  for (int lane = 0; lane < kLanes<R>; ++lane) zero = zero && values[lane] == 0;
  return zero;
}

// sums = A' products A + bias: [channel][row][column]. Returns whether all of them are finite.
template <int D, class R>
__attribute__((noinline)) bool transform_output(const WinogradTile& tile, const R* products, const R* bias,
                                                int64_t channels, Sums<R> sums) {
  const int64_t place = channels * tile.pitch;
  Vector<R> zero_or_nan{};
  for (int64_t c = 0; c < channels; ++c, products += tile.pitch, sums.data += sums.channel)
    for (int64_t j = 0; j < tile.row_pairs; ++j)
      for (int64_t i = 0; i < tile.run; i += kLanes<R>) {
        Vector<R> rows[2][4];
        for (int k = 0; k < 4; ++k) {
          const R* at = products + k * place + j * tile.run + i;
          const Vector<R> second = vector_at(at + 4 * place), third = vector_at(at + 8 * place);
          rows[0][k] = vector_at(at) + second + third;
          rows[1][k] = second - third - vector_at(at + 12 * place);
        }
        for (int row = 0; row < 2; ++row) {
          const auto& r = rows[row];
          const Vector<R> first = r[0] + r[1] + r[2] + bias[c], second = r[1] - r[2] - r[3] + bias[c];
          zero_or_nan += first * R(0), zero_or_nan += second * R(0);
          R* to = sums.data + (2 * j + row) * sums.row + column_of<D>(i);
          for (int lane = 0; lane < kLanes<R>; ++lane) {
            to[column_of<D>(lane)] = first[lane];
            to[column_of<D>(lane) + D] = second[lane];
          }
        }
      }
  return are_zero<R>(zero_or_nan);
}

// Zeros the positions from `first` on of every place and channel: those that no run reaches.
template <class R>
void clear_positions(R* values, int64_t channels, int64_t first, int64_t pitch) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = first; i < pitch; ++i) values[c * pitch + i] = 0;
}

// A block of output channels at one place: out[m][x] = sum over channels c of weights[c][m] * in[c][x].
template <class R>
struct Product {
  const R* in;
  const R* weights;
  R* out;
  int64_t pitch;  // of channels, in and out
  int64_t channels;
};

template <class R, int M, int N>
SAFNET_INLINE void multiply_strip(const Product<R>& p, int64_t x) {
  Vector<R> sum[M][N] = {};
  const R* in = p.in + x;
  const R* const end = in + p.channels * p.pitch;
  for (const R* weights = p.weights; in != end; in += p.pitch, weights += M) {
    Vector<R> values[N];
    for (int v = 0; v < N; ++v) values[v] = vector_at(in + v * kLanes<R>);
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < N; ++v) sum[m][v] += values[v] * weights[m];
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < N; ++v) store_vector(sum[m][v], p.out + x + m * p.pitch + v * kLanes<R>);
}

// Not inlined, so that its sums get all registers.
template <class R, int M>
__attribute__((noinline)) void multiply(const Product<R>& p, int64_t vectors) {
  int64_t x = 0;
  for (int strip; vectors > 0; vectors -= strip, x += strip * kLanes<R>) {
    strip = strip_vectors(vectors);
    if (strip == 3) multiply_strip<R, M, 3>(p, x);
    else if (strip == 2) multiply_strip<R, M, 2>(p, x);
    else multiply_strip<R, M, 1>(p, x);
  }
}

// The products of all places: of `channels_out` output channels, from those of the first place. Distances of places in
// what is read, in the weights and in what is written are `in`, `weights` and `out`.
struct PlacePitch {
  int64_t in, weights, out;
};

template <int Places, class R>
void multiply_places(const Product<R>& first, const PlacePitch& pitch, int64_t channels_out, int64_t positions) {
  const int64_t vectors = positions / kLanes<R>;
  for (int64_t place = 0; place < Places; ++place)
    for (int64_t o = 0, block; o < channels_out; o += block) {
      block = block_channels(channels_out - o);
      const Product<R> product{first.in + place * pitch.in, first.weights + place * pitch.weights + o * first.channels,
                               first.out + place * pitch.out + o * first.pitch, first.pitch, first.channels};
      with_block(block, [&](auto size) { multiply<R, decltype(size)::value>(product, vectors); });
    }
}

// Calls act(dilation) with the dilation as a constant: one of those that Winograd's method serves.
template <class Act>
SAFNET_INLINE auto with_dilation(int64_t dilation, const Act& act) {
  switch (dilation) {
    case 1: return act(Constant<1>{});
    case 2: return act(Constant<2>{});
    default: return act(Constant<4>{});
  }
}

// The convolution as a method of group_conv_shuffle.cpp, beside ByDefinition in convolution.h.
template <class R>
class ByWinograd {
 public:
  using Weight = R;

  ByWinograd(const TapGrid& grid, int64_t channels_in, int64_t channels_out)
      : tile_(lay_out_winograd<R>(grid)),
        channels_in_(channels_in),
        channels_out_(channels_out),
        rows_(channels_in * 2 * tile_.half),
        packed_(channels_in * tile_.channel_pitch),
        transformed_(kPlaces * channels_in * tile_.pitch),
        products_(kPlaces * channels_out * tile_.pitch) {
    // Positions that no run reaches take part in products, and those without products in what is checked.
    clear_positions(transformed_.data(), kPlaces * channels_in, tile_.row_pairs * tile_.run, tile_.pitch);
    clear_positions(products_.data(), kPlaces * channels_out, tile_.count, tile_.pitch);
  }

  int64_t rows() const { return 2 * tile_.row_pairs; }
  int64_t columns() const { return tile_.columns; }
  int64_t weights_a_group() const { return channels_out_ * channels_in_ * kPlaces; }

  // `weights`: [place][block of output channels][input channel][in block]. Returns whether the results stand: not where
  // one is not finite.
  bool convolve(const View& input, const Place& place, int64_t first, const R* weights, const R* bias,
                Sums<R> sums) const {
    return with_dilation(tile_.dilation, [&](auto dilation) {
      constexpr int D = decltype(dilation)::value;
      pack_winograd<D>(input, tile_, place, first, channels_in_, rows_.data(), packed_.data());
      transform_input<D>(tile_, packed_.data(), channels_in_, transformed_.data());
      multiply_places<kPlaces, R>(
          {transformed_.data(), weights, products_.data(), tile_.pitch, channels_in_},
          {channels_in_ * tile_.pitch, channels_out_ * channels_in_, channels_out_ * tile_.pitch}, channels_out_,
          tile_.count);
      return transform_output<D>(tile_, products_.data(), bias, channels_out_, sums);
    });
  }

 private:
  WinogradTile tile_;
  int64_t channels_in_, channels_out_;
  Scratch<R> rows_, packed_, transformed_, products_;
};

// A y along one direction.
template <class V>
SAFNET_INLINE void transform_two(const V& first, const V& second, V (&to)[4]) {
  to[0] = first, to[1] = first + second, to[2] = first - second, to[3] = -second;
}

// out[place][position][channel] = A y A' of the gradients y of 2x2 outputs, from [row][column][channel]; `pitch`
// channels, whole vectors of them.
template <int D, class R>
__attribute__((noinline)) void transform_gradient(const WinogradTile& tile, const R* grad, int64_t pitch, R* out) {
  const int64_t row = tile.columns * pitch, place = tile.row_pairs * tile.run * pitch;
  for (int64_t j = 0; j < tile.row_pairs; ++j)
    for (int64_t i = 0; i < tile.run; ++i)
      for (int64_t c = 0; c < pitch; c += kLanes<R>) {
        const R* at = grad + 2 * j * row + column_of<D>(i) * pitch + c;
        Vector<R> first[4], second[4], values[4];
        transform_two(vector_at(at), vector_at(at + row), first);
        transform_two(vector_at(at + D * pitch), vector_at(at + row + D * pitch), second);
        R* to = out + (j * tile.run + i) * pitch + c;
        for (int s = 0; s < 4; ++s) {
          transform_two(first[s], second[s], values);
          for (int k = 0; k < 4; ++k) store_vector(values[k], to + (4 * s + k) * place);
        }
      }
}

// A block of input channels at one place: out[m][x] += sum over positions q of in[m][q] * grad[q][x].
template <class R>
struct Correlation {
  const R* in;
  int64_t in_pitch;
  const R* grad;
  R* out;
  int64_t pitch;  // of rows of grad and out
  int64_t positions;
};

template <class R, int M, int N>
SAFNET_INLINE void correlate_strip(const Correlation<R>& a, int64_t x) {
  Vector<R> sum[M][N];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < N; ++v) sum[m][v] = vector_at(a.out + m * a.pitch + x + v * kLanes<R>);
  const R* grad = a.grad + x;
  for (int64_t q = 0; q < a.positions; ++q, grad += a.pitch) {
    Vector<R> values[N];
    for (int v = 0; v < N; ++v) values[v] = vector_at(grad + v * kLanes<R>);
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < N; ++v) sum[m][v] += values[v] * a.in[m * a.in_pitch + q];
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < N; ++v) store_vector(sum[m][v], a.out + m * a.pitch + x + v * kLanes<R>);
}

// Not inlined, so that its sums get all registers.
template <class R, int M>
__attribute__((noinline)) void correlate_block(const Correlation<R>& a) {
  int64_t x = 0, vectors = a.pitch / kLanes<R>;
  for (int strip; vectors > 0; vectors -= strip, x += strip * kLanes<R>) {
    strip = strip_vectors(vectors);
    if (strip == 3) correlate_strip<R, M, 3>(a, x);
    else if (strip == 2) correlate_strip<R, M, 2>(a, x);
    else correlate_strip<R, M, 1>(a, x);
  }
}

// The gradient of the weights by the same method, G'[(B' d B) . (A y A')]G summed over 2x2 outputs: products at the 16
// places are added up over all tiles of a part, and transformed back once.
template <class R>
class WinogradCorrelation {
 public:
  WinogradCorrelation(const TapGrid& grid, int64_t channels_in, int64_t channels_out)
      : tile_(lay_out_winograd<R>(grid)),
        channels_in_(channels_in),
        channels_out_(channels_out),
        pitch_(round_up(channels_out, kLanes<R>)),
        rows_(larger(channels_in * 2 * tile_.half, channels_out * tile_.columns)),
        packed_(larger(channels_in * tile_.channel_pitch, 2 * tile_.row_pairs * tile_.columns * pitch_)),
        transformed_(kPlaces * channels_in * tile_.pitch),
        grads_(kPlaces * tile_.row_pairs * tile_.run * pitch_),
        in_order_(channels_out) {
    for (int64_t c = 0; c < channels_out; ++c) in_order_[c] = rows_.data() + c * tile_.columns;
  }

  // Numbers in the sums of one group.
  int64_t sums() const { return kPlaces * channels_in_ * pitch_; }

  // sums[place][input channel][output channel] += those of one tile.
  void add(const View& input, const View& grad, const Place& place, int64_t group, R* sums) const {
    with_dilation(tile_.dilation,
                  [&](auto dilation) { add_dilated<decltype(dilation)::value>(input, grad, place, group, sums); });
  }

  // out[output channel][input channel][3x3] of one group.
  void finish(const R* sums, R* out) const {
    const int64_t row = 4 * channels_in_ * pitch_;
    for (int64_t c = 0; c < channels_in_; ++c)
      for (int64_t o = 0; o < channels_out_; o += kLanes<R>) {
        Vector<R> rows[3][4], weights[3][3];
        for (int k = 0; k < 4; ++k) {
          const R* at = sums + (k * channels_in_ + c) * pitch_ + o;
          Vector<R> places[4], back[3];
          for (int s = 0; s < 4; ++s) places[s] = vector_at(at + s * row);
          transform_back(places, back);
          for (int s = 0; s < 3; ++s) rows[s][k] = back[s];
        }
        for (int s = 0; s < 3; ++s) transform_back(rows[s], weights[s]);
        for (int64_t lane = 0; lane < smaller(kLanes<R>, channels_out_ - o); ++lane)
          for (int t = 0; t < 9; ++t) out[((o + lane) * channels_in_ + c) * 9 + t] = weights[t / 3][t % 3][lane];
      }
  }

 private:
  // G' m along one direction.
  static SAFNET_INLINE void transform_back(const Vector<R> (&m)[4], Vector<R> (&to)[3]) {
    const Vector<R> half = (m[1] + m[2]) / 2;
    to[0] = m[0] + half, to[1] = (m[1] - m[2]) / 2, to[2] = half + m[3];
  }

  template <int D>
  void add_dilated(const View& input, const View& grad, const Place& place, int64_t group, R* sums) const {
    pack_winograd<D>(input, tile_, place, group * channels_in_, channels_in_, rows_.data(), packed_.data());
    transform_input<D>(tile_, packed_.data(), channels_in_, transformed_.data());
    pack_gradient(grad, place, group * channels_out_);
    transform_gradient<D>(tile_, packed_.data(), pitch_, grads_.data());
    const int64_t positions = tile_.row_pairs * tile_.run;
    for (int64_t at = 0; at < kPlaces; ++at)
      for (int64_t c = 0, block; c < channels_in_; c += block) {
        block = block_channels(channels_in_ - c);
        const int64_t channel = at * channels_in_ + c;
        const Correlation<R> part{transformed_.data() + channel * tile_.pitch,
                                  tile_.pitch,
                                  grads_.data() + at * positions * pitch_,
                                  sums + channel * pitch_,
                                  pitch_,
                                  positions};
        with_block(block, [&](auto size) { correlate_block<R, decltype(size)::value>(part); });
      }
  }

  // The gradient of one tile as [row][column][channel], zeros beyond the picture and the channels.
  void pack_gradient(const View& grad, const Place& place, int64_t first) const {
    const int64_t row = tile_.columns * pitch_;
    R* const packed = packed_.data();
    for (int64_t i = 0; i < 2 * tile_.row_pairs * row; ++i) packed[i] = 0;
    View to;
    to.data = packed;
    to.type = sizeof(R) == 8 ? Type::kFloat64 : Type::kFloat32;
    to.size[1] = channels_out_;
    to.stride[1] = 1, to.stride[2] = row, to.stride[3] = pitch_;
    for (int64_t j = 0; j < place.rows; ++j) {
      const Span from{place.n, place.y + j * tile_.dilation, place.x, 1, place.columns};
      load_channels(grad, from, first, channels_out_, rows_.data(), tile_.columns);
      store_channels(in_order_.data(), channels_out_, to, Span{0, j, 0, 1, place.columns}, 0, 1);
    }
  }

  WinogradTile tile_;
  int64_t channels_in_, channels_out_, pitch_;
  Scratch<R> rows_, packed_, transformed_, grads_;
  Scratch<const R*> in_order_;
};

}  // namespace
}  // namespace safnet::SAFNET_ISA
