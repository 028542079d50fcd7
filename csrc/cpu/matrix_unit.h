// The convolution of one tile with bfloat16 products by the processor's matrix unit, AMX: by definition, summed in
// float32. Included by kernels only: see kernel.h.
//
// One instruction adds the products of 16 pixels by 32 channels with 32 channels by 16 outputs. A tile's input is
// packed as [row][column][channel], so that the 32 channels of a pixel are one line of cache and all that depends on
// stride, dilation and tap is where the 16 lines begin. The unit does 16 times the work of vectors of float32: what is
// left to save is the packing and what is made of the sums, not multiplications.
//
// Subnormal numbers count as zero, as the unit takes them.
#pragma once

#include "cpu/convolution.h"
#include "cpu/finish.h"

namespace safnet {

constexpr int64_t kUnitChannels = 32, kUnitOutputs = 16, kUnitPixels = 16;
constexpr int64_t kWeightsAtOnce = 480;  // taps times channels: 30 KB for 32 outputs

// Numbers of a group's weights as they are packed.
inline int64_t unit_weights(int64_t taps, int64_t channels_in, int64_t channels_out) {
  const int64_t steps = (channels_in + kUnitChannels - 1) / kUnitChannels;
  return (channels_out + kUnitOutputs - 1) / kUnitOutputs * taps * steps * kUnitChannels * kUnitOutputs;
}

}  // namespace safnet

#if SAFNET_KNOWS_AMX && defined(__AVX512BW__)
#define SAFNET_HAS_UNIT 1

// GCC 12 takes what its own intrinsics leave undefined on purpose for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#define SAFNET_BY_UNIT __attribute__((target("amx-tile,amx-bf16"), noinline))

namespace safnet::SAFNET_ISA {
namespace {

// The shapes of the unit's registers, from here to the end of its life in this thread: all 16 rows of 64 bytes.
class UnitRegisters {
 public:
  SAFNET_BY_UNIT UnitRegisters() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    // Not by its intrinsic, which does not tell GCC 12 that all of the memory is read.
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  SAFNET_BY_UNIT ~UnitRegisters() {
    _tile_release();
    _mm_sfence();  // what was written past the caches is there for others
  }
  UnitRegisters(const UnitRegisters&) = delete;
  UnitRegisters& operator=(const UnitRegisters&) = delete;
};

// A block of outputs for pixels of one row, of some taps.
struct UnitProduct {
  const char* in;         // packed input of the first pixel
  const int32_t* offset;  // of each tap, in bytes
  int taps;
  int64_t steps;            // of 32 channels
  int64_t pixel;            // bytes from a pixel to the next
  const BFloat16* weights;  // [block of outputs][tap][step][pair of channels][output][in pair]
  int64_t weights_block;
  bool first;   // begin the sums, rather than add to them
  float* sums;  // [pixel][output]
  int64_t sums_pitch;
};

// Of 16 M pixels and 16 N outputs.
template <int M, int N>
SAFNET_BY_UNIT void multiply_by_unit(const UnitProduct& p) {
  constexpr int64_t line = kUnitChannels * kUnitOutputs;
  const int64_t pitch = p.sums_pitch * static_cast<int64_t>(sizeof(float));
  float* const below = p.sums + kUnitPixels * p.sums_pitch;
  if (p.first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, p.sums, pitch);
    if constexpr (N == 2) _tile_loadd(1, p.sums + kUnitOutputs, pitch);
    if constexpr (M == 2) _tile_loadd(2, below, pitch);
    if constexpr (M == 2 && N == 2) _tile_loadd(3, below + kUnitOutputs, pitch);
  }
  const BFloat16* weights = p.weights;
  for (int t = 0; t < p.taps; ++t) {
    const char* in = p.in + p.offset[t];
    for (int64_t k = 0; k < p.steps; ++k, in += 2 * kUnitChannels, weights += line) {
      _tile_loadd(4, in, p.pixel);
      _tile_loadd(6, weights, 64);
      if constexpr (N == 2) _tile_loadd(7, weights + p.weights_block, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (N == 2) _tile_dpbf16ps(1, 4, 7);
      if constexpr (M == 2) {
        _tile_loadd(5, in + kUnitPixels * p.pixel, p.pixel);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (N == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, p.sums, pitch);
  if constexpr (N == 2) _tile_stored(1, p.sums + kUnitOutputs, pitch);
  if constexpr (M == 2) _tile_stored(2, below, pitch);
  if constexpr (M == 2 && N == 2) _tile_stored(3, below + kUnitOutputs, pitch);
}

// Exchanges rows and columns of 16 x 16 numbers of 32 bits.
SAFNET_INLINE void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2)
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; ++k) {
      r[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
      r[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
    }
  for (int j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88), t[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88), t[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// Pixels of channels_last tensors: of a group's first channel in a tile's first row and column, and the distances of
// others.
struct Pixels {
  BFloat16* data;
  int64_t row, pixel;

  SAFNET_INLINE BFloat16* at(int64_t j, int64_t x) const { return data + j * row + x * pixel; }
};

// As FinishRows of finish.h, of a group's channels of a pixel, which lie `step` apart in the output.
struct FinishPixels {
  Pixels out, residual;
  const float* slopes;
  int64_t rows, columns, channels, step;
  bool past_caches;  // write past the caches: rows of whole vectors, 32 bytes each
};

// Makes results of the sums of a block of pixels, [pixel][output]. `bias` and slopes are readable to whole vectors.
__attribute__((noinline)) void take_pixels(const FinishPixels& finish, const float* sums, int64_t pitch,
                                           const float* bias, int64_t row, int64_t column, int64_t pixels) {
  for (int64_t o = 0; o < finish.channels; o += kUnitOutputs) {
    const Vector<float> start = vector_at(bias + o);
    const Vector<float> slope = finish.slopes == nullptr ? Vector<float>{} + 1.0f : vector_at(finish.slopes + o);
    BFloat16* const to = finish.out.at(row, column) + o * finish.step;
    const BFloat16* const added = finish.residual.data == nullptr ? nullptr : finish.residual.at(row, column) + o;
    const auto finish_with = [&](const auto& put) {
      for (int64_t i = 0; i < pixels; ++i)
        put(vector_at(sums + i * pitch + o) + start, added == nullptr ? nullptr : added + i * finish.residual.pixel,
            to + i * finish.out.pixel);
    };
    const int64_t count = smaller(kUnitOutputs, finish.channels - o);
    if (finish.step > 1) {
      finish_with([&](const Vector<float>& sum, const BFloat16* more, BFloat16* out) {
        BFloat16 part[kUnitOutputs];
        finish_vector(sum, more, slope, count, part);
        for (int64_t m = 0; m < count; ++m) out[m * finish.step] = part[m];
      });
    } else if (count == kUnitOutputs) {
      finish_with([&](const Vector<float>& sum, const BFloat16* more, BFloat16* out) {
        finish_vector(sum, more, slope, kUnitOutputs, out);
      });
    } else {
      finish_with([&](const Vector<float>& sum, const BFloat16* more, BFloat16* out) {
        finish_vector(sum, more, slope, count, out);
      });
    }
  }
}

// The same of whole vectors, past the caches: pixel by pixel, as lines of memory have to be written at once.
__attribute__((noinline)) void stream_pixels(const FinishPixels& finish, const float* sums, int64_t pitch,
                                             const float* bias, int64_t row, int64_t column, int64_t pixels) {
  const Vector<float> one = Vector<float>{} + 1.0f;
  for (int64_t i = 0; i < pixels; ++i, sums += pitch) {
    BFloat16* const to = finish.out.at(row, column + i);
    const BFloat16* const added = finish.residual.data == nullptr ? nullptr : finish.residual.at(row, column + i);
    for (int64_t o = 0; o < finish.channels; o += kUnitOutputs) {
      alignas(32) BFloat16 part[kUnitOutputs];
      finish_vector(vector_at(sums + o) + vector_at(bias + o), added == nullptr ? nullptr : added + o,
                    finish.slopes == nullptr ? one : vector_at(finish.slopes + o), kUnitOutputs, part);
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + o), *reinterpret_cast<const __m256i*>(part));
    }
  }
}

// Gives them to `take` by channels.
template <class Take>
__attribute__((noinline)) void take_channels(const Take& take, const float* sums, int64_t pitch, const float* bias,
                                             int64_t row, int64_t column, int64_t channels) {
  for (int64_t o = 0; o < channels; o += kUnitOutputs, sums += kUnitOutputs) {
    __m512i blocks[2][16];
    for (int b = 0; b < 2; ++b) {
      for (int i = 0; i < 16; ++i) blocks[b][i] = _mm512_loadu_si512(sums + (16 * b + i) * pitch);
      transpose(blocks[b]);
    }
    for (int64_t m = 0; m < smaller(kUnitOutputs, channels - o); ++m) {
      const Vector<float> values[2] = {(Vector<float>)blocks[0][m] + bias[o + m],
                                       (Vector<float>)blocks[1][m] + bias[o + m]};
      take(o + m, row, column, values);
    }
  }
}

// How the packed input of a tile lies in memory: [slot][column][channel]. A slot is an input row.
struct UnitTile {
  int64_t pitch;                             // channels of a pixel, rounded up
  int64_t slots, columns, first_column;      // of the input; first_column minus in_stride times the tile's first
  int64_t slot_row[3 * kMostTileRows];       // input row of a slot, minus in_stride times the tile's first row
  int32_t offset[kMostTileRows][kMostTaps];  // of a tap in bytes, for every row of the tile
};

inline UnitTile lay_out_for_unit(const TapGrid& grid, int64_t channels) {
  UnitTile tile;
  tile.pitch = round_up(channels, kUnitChannels);
  int64_t smallest = INT64_MAX, largest = INT64_MIN;
  for (int t = 0; t < grid.taps; ++t)
    smallest = smaller(smallest, grid.tap[t].dx), largest = larger(largest, grid.tap[t].dx);
  tile.first_column = smallest;
  tile.columns = (round_up(grid.tile_columns, kUnitPixels) - 1) * grid.in_stride + largest - smallest + 1;
  int64_t slot_of[kMostTileRows][kMostTaps];
  tile.slots = find_slots(grid, tile.slot_row, slot_of);
  for (int64_t j = 0; j < grid.tile_rows; ++j)
    for (int t = 0; t < grid.taps; ++t)
      tile.offset[j][t] = static_cast<int32_t>((slot_of[j][t] * tile.columns + grid.tap[t].dx - smallest) * tile.pitch *
                                               static_cast<int64_t>(sizeof(BFloat16)));
  return tile;
}

// Packs rows of `count` channels, at most 32, as pixels of so many channels, zeros behind them.
template <bool Whole>
SAFNET_INLINE void pack_square(const BFloat16* source, int64_t channel, int64_t count, int64_t pixels, BFloat16* out,
                               int64_t pitch) {
  const __mmask32 inside = Whole ? ~__mmask32{0} : (__mmask32{1} << pixels) - 1;
  const auto load_row = [&](int64_t c) {
    return c < count ? _mm512_maskz_loadu_epi16(inside, source + c * channel) : _mm512_setzero_si512();
  };
  __m512i halves[2][16];  // of each eight pixels the first and the second four
  for (int i = 0; i < 16; ++i) {
    const __m512i even = load_row(2 * i), odd = load_row(2 * i + 1);
    halves[0][i] = _mm512_unpacklo_epi16(even, odd), halves[1][i] = _mm512_unpackhi_epi16(even, odd);
  }
  for (int half = 0; half < 2; ++half) {
    transpose(halves[half]);
    for (int i = 0; i < 16; ++i) {
      const int64_t pixel = i / 4 * 8 + half * 4 + i % 4;
      if (Whole || pixel < pixels) _mm512_store_si512(out + pixel * pitch, halves[half][i]);
    }
  }
}

// Packs `pixels` pixels of a row of `channels` channels.
__attribute__((noinline)) void pack_pixels(const View& input, const Span& span, int64_t first, int64_t channels,
                                           BFloat16* out, int64_t pitch) {
  const BFloat16* const source = row<BFloat16>(input, span.n, first, span.y) + span.x * input.stride[3];
  const int64_t channel = input.stride[1], pixel = input.stride[3];
  if (channel == 1) {
    const int64_t whole = channels / kUnitChannels * kUnitChannels;
    const __mmask32 rest = (__mmask32{1} << (channels - whole)) - 1;
    for (int64_t i = 0; i < span.pixels; ++i, out += pitch) {
      const BFloat16* const from = source + i * pixel;
      for (int64_t c = 0; c < whole; c += kUnitChannels) _mm512_store_si512(out + c, _mm512_loadu_si512(from + c));
      if (rest != 0) _mm512_store_si512(out + whole, _mm512_maskz_loadu_epi16(rest, from + whole));
    }
  } else if (pixel == 1) {
    for (int64_t c = 0; c < channels; c += kUnitChannels) {
      const int64_t count = smaller(kUnitChannels, channels - c);
      for (int64_t i = 0; i < span.pixels; i += 32) {
        // The last whole square begins where it ends with the row, and repeats some pixels.
        const int64_t at = span.pixels < 32 ? 0 : smaller(i, span.pixels - 32);
        const BFloat16* const from = source + c * channel + at;
        if (span.pixels < 32) pack_square<false>(from, channel, count, span.pixels, out + c, pitch);
        else pack_square<true>(from, channel, count, 32, out + at * pitch + c, pitch);
      }
    }
  } else {
    for (int64_t i = 0; i < span.pixels; ++i)
      for (int64_t c = 0; c < pitch; ++c)
        out[i * pitch + c] = c < channels ? source[i * pixel + c * channel] : BFloat16{0};
  }
}

// The convolution as a method of group_conv_shuffle.cpp, beside ByDefinition and Winograd's.
class ByMatrixUnit {
 public:
  using Weight = BFloat16;

  ByMatrixUnit(const TapGrid& grid, int64_t channels_in, int64_t channels_out)
      : grid_(grid),
        tile_(lay_out_for_unit(grid, channels_in)),
        channels_in_(channels_in),
        channels_out_(channels_out),
        pitch_(round_up(channels_out, kUnitOutputs)),
        taps_at_once_(static_cast<int>(larger(1, kWeightsAtOnce / tile_.pitch))),
        packed_(tile_.slots * tile_.columns * tile_.pitch),
        sums_(columns() * pitch_) {
    // Of a row's last pixels, which may not be computed, whatever is read is not used.
    for (int64_t i = 0; i < columns() * pitch_; ++i) sums_[i] = 0;
  }

  int64_t rows() const { return grid_.tile_rows; }
  int64_t columns() const { return round_up(grid_.tile_columns, 2 * kUnitPixels); }
  int64_t weights_a_group() const { return unit_weights(grid_.taps, channels_in_, channels_out_); }

  // `weights` as UnitProduct has them. Returns that the results stand.
  bool convolve(const View& input, const Place& place, int64_t first, const BFloat16* weights, const float* bias,
                Sums<float> sums) const {
    return convolve(input, place, first, weights, bias, KeepSums{sums});
  }

  template <class Take>
  bool convolve(const View& input, const Place& place, int64_t first, const BFloat16* weights, const float* bias,
                const Take& take) const {
    pack(input, place, first);
    for (int64_t j = 0; j < place.rows; ++j) {
      for (int64_t o = 0; o < channels_out_; o += 2 * kUnitOutputs)
        for (int t = 0; t < grid_.taps; t += taps_at_once_) multiply_row(place, j, o, t, weights);
      for (int64_t x = 0; x < place.columns; x += 2 * kUnitPixels) give(take, sums_.data() + x * pitch_, bias, j, x);
    }
    return true;
  }

 private:
  // Adds some taps, whose weights stay in the first-level cache, to a row of up to 32 outputs.
  SAFNET_INLINE void multiply_row(const Place& place, int64_t j, int64_t o, int tap, const BFloat16* weights) const {
    const int64_t steps = tile_.pitch / kUnitChannels, a_tap = steps * kUnitChannels * kUnitOutputs;
    UnitProduct p;
    p.offset = tile_.offset[j] + tap;
    p.taps = tap + taps_at_once_ < grid_.taps ? taps_at_once_ : grid_.taps - tap;
    p.steps = steps;
    p.pixel = grid_.in_stride * tile_.pitch * static_cast<int64_t>(sizeof(BFloat16));
    p.weights_block = grid_.taps * a_tap;
    p.weights = weights + o / kUnitOutputs * p.weights_block + tap * a_tap;
    p.first = tap == 0;
    p.sums_pitch = pitch_;
    const bool two = o + kUnitOutputs < channels_out_;
    for (int64_t x = 0; x < place.columns; x += 2 * kUnitPixels) {
      p.in = reinterpret_cast<const char*>(packed_.data()) + x * p.pixel;
      p.sums = sums_.data() + x * pitch_ + o;
      if (x + kUnitPixels < place.columns) two ? multiply_by_unit<2, 2>(p) : multiply_by_unit<2, 1>(p);
      else two ? multiply_by_unit<1, 2>(p) : multiply_by_unit<1, 1>(p);
    }
  }

  template <class Take>
  void give(const Take& take, const float* sums, const float* bias, int64_t row, int64_t column) const {
    take_channels(take, sums, pitch_, bias, row, column, channels_out_);
  }
  void give(const FinishPixels& take, const float* sums, const float* bias, int64_t row, int64_t column) const {
    const int64_t pixels = smaller(2 * kUnitPixels, take.columns - column);
    (take.past_caches ? stream_pixels : take_pixels)(take, sums, pitch_, bias, row, column, pixels);
  }

  // Packs the input of one tile, zeros where it leaves the picture.
  void pack(const View& input, const Place& place, int64_t first) const {
    const int64_t x = place.x * grid_.in_stride + tile_.first_column, pitch = tile_.pitch;
    const int64_t begin = smaller(larger(-x, 0), tile_.columns);
    for (int64_t slot = 0; slot < tile_.slots; ++slot) {
      const int64_t y = place.y * grid_.in_stride + tile_.slot_row[slot];
      const bool inside = y >= 0 && y < input.size[2];
      const int64_t end = inside ? larger(begin, smaller(input.size[3] - x, tile_.columns)) : begin;
      BFloat16* const out = packed_.data() + slot * tile_.columns * pitch;
      clear(out, begin * pitch);
      if (begin < end)
        pack_pixels(input, {place.n, y, x + begin, 1, end - begin}, first, channels_in_, out + begin * pitch, pitch);
      clear(out + end * pitch, (tile_.columns - end) * pitch);
    }
  }

  static void clear(BFloat16* out, int64_t count) {
    __builtin_memset(out, 0, static_cast<size_t>(count) * sizeof(BFloat16));
  }

  TapGrid grid_;
  UnitTile tile_;
  int64_t channels_in_, channels_out_, pitch_;
  int taps_at_once_;
  UnitRegisters registers_;
  Scratch<BFloat16> packed_;
  Scratch<float> sums_;
};

}  // namespace
}  // namespace safnet::SAFNET_ISA

#endif
