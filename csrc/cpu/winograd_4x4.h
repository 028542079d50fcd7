// The convolution of one tile by F(4x4, 3x3): 36 multiplications for 4x4 outputs, 2.25 for each where the definition
// takes 9 and F(2x2, 3x3) of winograd.h takes 4. Included by kernels only: see kernel.h.
//
// The transforms evaluate polynomials at 0, infinity, +-kNear and +-kFar. These points are among those of the least
// error, and all constants but G's are exact in float32. An error is relative to the largest of the 6x6 inputs of a
// square, not to those that an output reads by definition; and an input enters all 4x4 outputs, so that one that is not
// finite spoils them: `convolve` says so, and the tile is made again by definition.
//
// Rows are transformed as they come, whole vectors of columns, before their columns are split by the place in the 4x4:
// so nothing is packed where a row lies in the picture and is of the computing type.
#pragma once

#include <utility>

#include "cpu/finish.h"
#include "cpu/winograd.h"

namespace safnet {

constexpr int kPlaces4x4 = 36;
constexpr double kNear = 5.0 / 8, kFar = 11.0 / 8;
constexpr int64_t kChannelsAtOnce = 40;  // output channels whose products are held: whole blocks of them

}  // namespace safnet

namespace safnet::SAFNET_ISA {
namespace {

// Two vectors are runs of D columns that belong to one and to the other of two sequences, by turns. Where lane `lane`
// of a result comes from among the 2L lanes:
template <int D, int L>
struct FirstOfSplit {
  static constexpr int at(int lane) { return lane / D * 2 * D + lane % D; }
};
template <int D, int L>
struct SecondOfSplit {
  static constexpr int at(int lane) { return FirstOfSplit<D, L>::at(lane) + D; }
};
template <int D, int L>
struct FirstOfJoined {
  static constexpr int at(int lane) { return lane / D % 2 * L + lane / D / 2 * D + lane % D; }
};
template <int D, int L>
struct SecondOfJoined {
  static constexpr int at(int lane) { return FirstOfJoined<D, L>::at(lane + L); }
};
template <int D, int L>
struct Shifted {
  static constexpr int at(int lane) { return lane + D; }
};

template <template <int, int> class Index, int D, int... Lane>
SAFNET_INLINE Vector<float> shuffled(const Vector<float>& a, const Vector<float>& b,
                                     std::integer_sequence<int, Lane...>) {
  return SAFNET_SHUFFLE(kVectorBytes, a, b, Index<D, kLanes<float>>::at(Lane)...);
}

template <template <int, int> class Index, int D>
SAFNET_INLINE Vector<float> shuffled(const Vector<float>& a, const Vector<float>& b) {
  return shuffled<Index, D>(a, b, std::make_integer_sequence<int, kLanes<float>>{});
}

// Splits 4 vectors of columns at `from` into the first, second, third and fourth columns of the outputs' 4x4.
template <int D>
SAFNET_INLINE void split_four(const float* from, Vector<float> (&to)[6]) {
  constexpr int L = kLanes<float>;
  const Vector<float> a = vector_at(from), b = vector_at(from + L), c = vector_at(from + 2 * L),
                      d = vector_at(from + 3 * L);
  const Vector<float> even_low = shuffled<FirstOfSplit, D>(a, b), odd_low = shuffled<SecondOfSplit, D>(a, b);
  const Vector<float> even_high = shuffled<FirstOfSplit, D>(c, d), odd_high = shuffled<SecondOfSplit, D>(c, d);
  to[0] = shuffled<FirstOfSplit, D>(even_low, even_high), to[2] = shuffled<SecondOfSplit, D>(even_low, even_high);
  to[1] = shuffled<FirstOfSplit, D>(odd_low, odd_high), to[3] = shuffled<SecondOfSplit, D>(odd_low, odd_high);
}

// The inverse.
template <int D>
SAFNET_INLINE void join_four(const Vector<float> (&from)[4], Vector<float> (&to)[4]) {
  const Vector<float> even_low = shuffled<FirstOfJoined, D>(from[0], from[2]),
                      even_high = shuffled<SecondOfJoined, D>(from[0], from[2]);
  const Vector<float> odd_low = shuffled<FirstOfJoined, D>(from[1], from[3]),
                      odd_high = shuffled<SecondOfJoined, D>(from[1], from[3]);
  to[0] = shuffled<FirstOfJoined, D>(even_low, odd_low), to[1] = shuffled<SecondOfJoined, D>(even_low, odd_low);
  to[2] = shuffled<FirstOfJoined, D>(even_high, odd_high), to[3] = shuffled<SecondOfJoined, D>(even_high, odd_high);
}

// B' d along one direction: the columns are the coefficients of the products of all (x - point) but one.
template <class V>
SAFNET_INLINE void transform_six(const V (&d)[6], V (&to)[6]) {
  constexpr float near2 = kNear * kNear, far2 = kFar * kFar;
  constexpr float sum = near2 + far2, product = near2 * far2, near = kNear, far = kFar;
  const V near_even = d[4] - far2 * d[2], near_odd = d[3] - far2 * d[1];
  const V far_even = d[4] - near2 * d[2], far_odd = d[3] - near2 * d[1];
  to[0] = product * d[0] - sum * d[2] + d[4];
  to[1] = near_even + near * near_odd, to[2] = near_even - near * near_odd;
  to[3] = far_even + far * far_odd, to[4] = far_even - far * far_odd;
  to[5] = product * d[1] - sum * d[3] + d[5];
}

// A' m along one direction: the columns are powers of the points.
template <class V>
SAFNET_INLINE void transform_back_six(const V (&m)[6], V (&to)[4]) {
  constexpr float near = kNear, far = kFar, near2 = kNear * kNear, far2 = kFar * kFar;
  constexpr float near3 = kNear * kNear * kNear, far3 = kFar * kFar * kFar;
  const V near_sum = m[1] + m[2], near_difference = m[1] - m[2];
  const V far_sum = m[3] + m[4], far_difference = m[3] - m[4];
  to[0] = m[0] + near_sum + far_sum;
  to[1] = near * near_difference + far * far_difference;
  to[2] = near2 * near_sum + far2 * far_sum;
  to[3] = near3 * near_difference + far3 * far_difference + m[5];
}

// G g along one direction: powers of the points, over the products of a point's distances from the others.
template <class V>
SAFNET_INLINE void transform_three(const V& a, const V& b, const V& c, V (&to)[6]) {
  constexpr double near2 = kNear * kNear, far2 = kFar * kFar;
  constexpr double near_scale = 1 / (2 * near2 * (near2 - far2)), far_scale = 1 / (2 * far2 * (far2 - near2));
  const V near_even = (a + near2 * c) * near_scale, near_odd = b * (kNear * near_scale);
  const V far_even = (a + far2 * c) * far_scale, far_odd = b * (kFar * far_scale);
  to[0] = a * (1 / (near2 * far2));
  to[1] = near_even + near_odd, to[2] = near_even - near_odd;
  to[3] = far_even + far_odd, to[4] = far_even - far_odd;
  to[5] = c;
}

// to[6 * row + column] = G g G'.
template <class V>
SAFNET_INLINE void transform_weights(const V (&g)[3][3], V (&to)[kPlaces4x4]) {
  V rows[3][6];
  for (int k = 0; k < 3; ++k) transform_three(g[k][0], g[k][1], g[k][2], rows[k]);
  for (int column = 0; column < 6; ++column) {
    V places[6];
    transform_three(rows[0][column], rows[1][column], rows[2][column], places);
    for (int row = 0; row < 6; ++row) to[6 * row + column] = places[row];
  }
}

// A tile's positions, each the first of 4x4 outputs. Outputs in a row come in fours of runs of `dilation`: first
// columns of their 4x4, second ones, third and fourth. Positions are numbered by four rows, then along the row.
struct WinogradTile4x4 {
  int64_t dilation, row_fours, run;  // positions in four rows
  int64_t count;                     // positions, rounded up to vectors
  int64_t pitch;                     // room for them, if whole vectors are written from the start of every run
  int64_t columns;                   // outputs in a row, if whole vectors are written
  int64_t slots, width;              // input rows, `dilation` apart, and columns that are read of each
};

inline WinogradTile4x4 lay_out_winograd_4x4(const TapGrid& grid) {
  constexpr int64_t L = kLanes<float>;
  WinogradTile4x4 tile;
  tile.dilation = grid.row_step;
  tile.row_fours = (grid.tile_rows + 3) / 4;
  tile.run = round_up(grid.tile_columns, 4 * tile.dilation) / 4;
  const int64_t whole_run = round_up(tile.run, L);
  tile.count = round_up(tile.row_fours * tile.run, L);
  tile.pitch = larger(tile.count, round_up((tile.row_fours - 1) * tile.run + whole_run, L));
  tile.columns = 4 * whole_run;
  tile.slots = 4 * tile.row_fours + 2;
  tile.width = tile.columns + 2 * L;
  return tile;
}

// Six input rows of one channel, `dilation` apart: null where one is outside of the picture. Column 0 of the tile's
// input is column `x` of them; they have `width` columns. Rows to be transformed soon lie `next` further on.
struct SixRows {
  const float* const* start;
  int64_t x, width, next;
};

// Lane i of the result is lane from[i] of a vector, zero where it has none.
SAFNET_INLINE Vector<float> moved(const Vector<float>& values, const Vector<int32_t>& from) {
#if defined(__clang__)
  Vector<float> result;
  for (int lane = 0; lane < kLanes<float>; ++lane)
    result[lane] = from[lane] >= 0 && from[lane] < kLanes<float> ? values[from[lane]] : 0.0f;
  return result;
#else
  constexpr int L = kLanes<float>;
  const Vector<float> zeros{};
  return __builtin_shuffle(values, zeros, (from >= 0) & (from < L) ? from : Vector<int32_t>{} + L);
#endif
}

// Vectors of the rows at column x, where some of them, or some columns, lie outside of the picture: zeros there.
SAFNET_INLINE void load_edge(const SixRows& rows, int64_t x, Vector<float> (&values)[6]) {
  constexpr int64_t L = kLanes<float>;
  const int64_t inside = smaller(larger(x, 0), larger(rows.width - L, 0));
  const int32_t shift = static_cast<int32_t>(smaller(larger(x - inside, -L), L));
  Vector<int32_t> from;
  for (int lane = 0; lane < L; ++lane) from[lane] = lane + shift;
  for (int s = 0; s < 6; ++s) {
    values[s] = Vector<float>{};
    if (rows.start[s] == nullptr) continue;
    const float* const row = rows.start[s] + inside;
    if (rows.width >= L) values[s] = vector_at(row);
    else
      for (int64_t lane = 0; lane < rows.width; ++lane) values[s][lane] = row[lane];
    if (shift != 0) values[s] = moved(values[s], from);
  }
}

// out[place] = B' d B of the positions of four rows; `lines`: room for six rows.
template <int D>
__attribute__((noinline)) void transform_rows(const WinogradTile4x4& tile, const SixRows& rows, float* lines,
                                              float* out, int64_t place) {
  constexpr int64_t L = kLanes<float>;
  bool whole = true;
  for (int s = 0; s < 6; ++s) whole = whole && rows.start[s] != nullptr;
  const int64_t width = tile.width;
  Vector<float> values[6], transformed[6];
  for (int64_t column = 0; column < tile.columns + 2 * D; column += L) {
    const int64_t x = rows.x + column;
    if (whole && x >= 0 && x + L <= rows.width) {
      // Channels lie far apart, and no prefetcher of the processor sees the pattern. The first two rows were asked for
      // as the last two of the four rows above.
      for (int s = 2; s < 6; ++s) __builtin_prefetch(rows.start[s] + rows.next + x);
      for (int s = 0; s < 6; ++s) values[s] = vector_at(rows.start[s] + x);
    } else {
      load_edge(rows, x, values);
    }
    transform_six(values, transformed);
    for (int s = 0; s < 6; ++s) store_vector(transformed[s], lines + s * width + column);
  }
  for (int64_t i = 0; i < tile.run; i += L)
    for (int s = 0; s < 6; ++s) {
      const float* const line = lines + s * width + 4 * i;
      split_four<D>(line, values);
      // The fifth and sixth columns are the first and second of the next 4x4.
      values[4] = shuffled<Shifted, D>(values[0], vector_at(line + 4 * L));
      values[5] = shuffled<Shifted, D>(values[1], vector_at(line + 4 * L + D));
      transform_six(values, transformed);
      for (int k = 0; k < 6; ++k) store_vector(transformed[k], out + (6 * s + k) * place + i);
    }
}

// Gives A' products A + bias of channels [first, first + channels) to `take`. Returns whether all of them are finite.
template <int D, class Take>
__attribute__((noinline)) bool transform_products(const WinogradTile4x4& tile, const float* products, int64_t place,
                                                  const float* bias, int64_t first, int64_t channels,
                                                  const Take& take) {
  Vector<float> zero_or_nan{};
  for (int64_t c = first; c < first + channels; ++c, products += tile.pitch)
    for (int64_t j = 0; j < tile.row_fours; ++j)
      for (int64_t i = 0; i < tile.run; i += kLanes<float>) {
        alignas(kVectorBytes) Vector<float> columns[6][4];  // more than there are registers
        for (int k = 0; k < 6; ++k) {
          const float* at = products + k * place + j * tile.run + i;
          Vector<float> values[6];
          for (int s = 0; s < 6; ++s) values[s] = vector_at(at + 6 * s * place);
          transform_back_six(values, columns[k]);
        }
        for (int row = 0; row < 4; ++row) {
          const Vector<float> values[6] = {columns[0][row], columns[1][row], columns[2][row],
                                           columns[3][row], columns[4][row], columns[5][row]};
          Vector<float> outputs[4], joined[4];
          transform_back_six(values, outputs);
          for (int k = 0; k < 4; ++k) outputs[k] += bias[c], zero_or_nan += outputs[k] * 0.0f;
          join_four<D>(outputs, joined);
          take(c, 4 * j + row, 4 * i, joined);
        }
      }
  return are_zero<float>(zero_or_nan);
}

// The convolution as a method of group_conv_shuffle.cpp, beside ByDefinition in convolution.h and ByWinograd.
class ByWinograd4x4 {
 public:
  using Weight = float;

  ByWinograd4x4(const TapGrid& grid, int64_t channels_in, int64_t channels_out)
      : tile_(lay_out_winograd_4x4(grid)),
        channels_in_(channels_in),
        channels_out_(channels_out),
        place_in_(spread_channels<float>(channels_in * tile_.pitch)),
        place_out_(spread_channels<float>(smaller(channels_out, kChannelsAtOnce) * tile_.pitch)),
        packed_(kSide * tile_.slots * tile_.width),
        lines_(6 * tile_.width),
        transformed_(kPlaces4x4 * place_in_),
        products_(kPlaces4x4 * place_out_) {
    for (int64_t place = 0; place < kPlaces4x4; ++place) {
      clear_positions(transformed_.data() + place * place_in_, channels_in, tile_.row_fours * tile_.run, tile_.pitch);
      clear_positions(products_.data() + place * place_out_, smaller(channels_out, kChannelsAtOnce), tile_.count,
                      tile_.pitch);
    }
  }

  int64_t rows() const { return 4 * tile_.row_fours; }
  int64_t columns() const { return tile_.columns; }
  int64_t weights_a_group() const { return channels_out_ * channels_in_ * kPlaces4x4; }

  // `weights`: [place][block of output channels][input channel][in block]. Returns whether the results stand: not where
  // one is not finite.
  bool convolve(const View& input, const Place& place, int64_t first, const float* weights, const float* bias,
                Sums<float> sums) const {
    return convolve(input, place, first, weights, bias, KeepSums{sums});
  }

  template <class Take>
  bool convolve(const View& input, const Place& place, int64_t first, const float* weights, const float* bias,
                const Take& take) const {
    return with_dilation(tile_.dilation, [&](auto dilation) {
      return convolve_dilated<decltype(dilation)::value>(input, place, first, weights, bias, take);
    });
  }

 private:
  template <int D, class Take>
  bool convolve_dilated(const View& input, const Place& place, int64_t first, const float* weights, const float* bias,
                        const Take& take) const {
    if (input.type == Type::kFloat32 && input.stride[3] == 1) transform_input<D>(input, place, first);
    else transform_packed_input<D>(input, place, first);
    bool finite = true;
    for (int64_t o = 0, count; o < channels_out_; o += count) {
      count = smaller(kChannelsAtOnce, channels_out_ - o);
      multiply_places<kPlaces4x4, float>(
          {transformed_.data(), weights + o * channels_in_, products_.data(), tile_.pitch, channels_in_},
          {place_in_, channels_out_ * channels_in_, place_out_}, count, tile_.count);
      finite = transform_products<D>(tile_, products_.data(), place_out_, bias, o, count, take) && finite;
    }
    return finite;
  }

  // Input row of a slot.
  SAFNET_INLINE int64_t row_of(const Place& place, int64_t slot) const { return place.y + (slot - 1) * tile_.dilation; }

  template <int D>
  void transform_channel(const float* const* slots, int64_t x, int64_t width, int64_t next, int64_t c) const {
    for (int64_t j = 0; j < tile_.row_fours; ++j)
      transform_rows<D>(tile_, {slots + 4 * j, x, width, next}, lines_.data(),
                        transformed_.data() + c * tile_.pitch + j * tile_.run, place_in_);
  }

  template <int D>
  void transform_input(const View& input, const Place& place, int64_t first) const {
    const float* slots[kMostTileRows + 2];
    for (int64_t c = 0; c < channels_in_; ++c) {
      for (int64_t slot = 0; slot < tile_.slots; ++slot) {
        const int64_t y = row_of(place, slot);
        slots[slot] = y >= 0 && y < input.size[2] ? row<float>(input, place.n, first + c, y) : nullptr;
      }
      transform_channel<D>(slots, place.x - D, input.size[3], c + 1 < channels_in_ ? input.stride[1] : 0, c);
    }
  }

  // Packs the input of some channels as [channel][slot][column], zeros where it leaves the picture.
  template <int D>
  void transform_packed_input(const View& input, const Place& place, int64_t first) const {
    const int64_t width = tile_.width, channel = tile_.slots * width, x0 = place.x - D;
    const int64_t begin = x0 >= 0 ? 0 : smaller(-x0, width);
    const int64_t end = larger(begin, smaller(input.size[3] - x0, width));
    const float* slots[kMostTileRows + 2];
    for (int64_t c = 0, count; c < channels_in_; c += count) {
      count = smaller(kSide, channels_in_ - c);
      for (int64_t slot = 0; slot < tile_.slots; ++slot) {
        const int64_t y = row_of(place, slot);
        slots[slot] = nullptr;
        if (y < 0 || y >= input.size[2]) continue;
        float* const to = packed_.data() + slot * width;
        slots[slot] = to;
        for (int64_t k = 0; k < count; ++k) {
          for (int64_t i = 0; i < begin; ++i) to[k * channel + i] = 0;
          for (int64_t i = end; i < width; ++i) to[k * channel + i] = 0;
        }
        if (begin < end)
          load_channels(input, Span{place.n, y, x0 + begin, 1, end - begin}, first + c, count, to + begin, channel);
      }
      for (int64_t k = 0; k < count; ++k) {
        transform_channel<D>(slots, 0, width, 0, c + k);
        for (int64_t slot = 0; slot < tile_.slots; ++slot)
          if (slots[slot] != nullptr) slots[slot] += channel;
      }
    }
  }

  WinogradTile4x4 tile_;
  int64_t channels_in_, channels_out_;
  int64_t place_in_, place_out_;  // distances of places, in `transformed_` and `products_`
  Scratch<float> packed_, lines_, transformed_, products_;
};

}  // namespace
}  // namespace safnet::SAFNET_ISA
