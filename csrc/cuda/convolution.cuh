// The 3x3 convolution of one tile (see plans.h): loading of the stages, products on tensor cores or in plain
// arithmetic, and the store with bias, residual, PReLU and shuffle.
//
// In shared memory every pixel of the patch, and every (tap, output channel) of the weights, is a row of two 16-byte
// pieces: channels 0-7 and 8-15 of the chunk (of 16 bit; half as many of 32). Rows 4-7 of eight have their pieces
// swapped, so that any eight rows that follow each other lie in different banks. Columns of the patch are dealt by
// their remainder modulo the stride: pixels that follow each other in the result read rows that do so. A product takes
// 32 bytes: the two pieces of one tap (dy, dx), or, where the last chunk has channels for one piece only, that piece at
// two taps dx.
#pragma once

#include "cuda/plans.h"
#include "cuda/tensor_core.cuh"

namespace safnet::cuda {

template <class T, class Index>
struct ConvArguments {
  View<T, Index> input, residual, out, preactivation;  // no data: absent. preactivation: of out's layout, not shuffled
  const unsigned char* weights;                        // packed, see pack_weights
  const T *bias, *prelu;
  int32_t bias_step, prelu_step;
  int32_t in_height, in_width, upsample;  // sizes after inserting upsample - 1 zeros between pixels
  int32_t out_height, out_width, tiles_x, tiles_y;
  int32_t channels_in, channels_out;  // of one group
  int32_t blocks, stride, dilation, chunks, stages, patch_height, patch_width;
  int32_t shuffle_groups;
  bool copies_pieces;  // 16 bytes of the input's channels lie together and aligned
  bool stores_pieces;  // 16 bytes of the output, along its dense direction, lie aligned
};

// Byte offset of a piece of a row.
__device__ __forceinline__ int piece_offset(int row, int piece) {
  static_assert(kChunkBytes == 32 && kPieceBytes == 16);
  return (row * 32 + piece * 16) ^ (row * 4 & 16);
}

// Which tap dx and which piece of the chunk is half `which` of product `step`. kNoTap: its weights are zero, and so
// must the pixels be, or infinities would become NaN; the unused second piece of the patch's first pixel holds zeros
// for that.
constexpr int kNoTap = 3;
struct ProductHalf {
  int dx, piece;
};
__device__ __forceinline__ ProductHalf product_half(bool one_piece, int step, int which) {
  return one_piece ? ProductHalf{2 * step + which, 0} : ProductHalf{step, which};
}

// A patch of one chunk of channels of a picture: what a tile reads, or (with no halo and a stride of one) the tile
// itself.
struct Patch {
  int32_t top, left, height, width;  // width: of shared memory, in rows of 32 bytes
  int32_t stride;                    // modulo which columns are dealt
  int32_t in_height, in_width, upsample;
};

// Which column of the patch a row of shared memory holds, and the other way round.
__device__ __forceinline__ int column_of(int slot, int width, int stride) {
  if (stride == 1) return slot;
  const int each = width / stride, remainder = slot / each;
  return (slot - remainder * each) * stride + remainder;
}
__device__ __forceinline__ int slot_of(int column, int width, int stride) {
  return stride == 1 ? column : column % stride * (width / stride) + column / stride;
}

// Calls load(source, target, valid) for one column of the patch in the rows of this warp, which are as far apart as
// there are warps.
template <class T, class Index, class Load>
__device__ __forceinline__ void each_row(const Patch& p, Index row_pitch, const T* column, bool inside,
                                         unsigned char* target, Load load) {
  const int pitch = p.width * kChunkBytes, warp = threadIdx.x / 32, warps = blockDim.x / 32, step = warps * pitch;
  const unsigned char* end = target + p.height * pitch;
  int y = p.top + warp;
  target += warp * pitch;
  if (p.upsample > 1) {
    for (; target < end; target += step, y += warps)
      load(column + static_cast<Index>(y / p.upsample) * row_pitch, target,
           inside && y >= 0 && y < p.in_height && y % p.upsample == 0);
    return;
  }
  const T* source = column + static_cast<Index>(y) * row_pitch;
  const Index source_step = warps * row_pitch;
#pragma unroll 1
  for (; target < end; target += step, y += warps, source += source_step)
    load(source, target, inside && static_cast<unsigned>(y) < static_cast<unsigned>(p.in_height));
}

// Loads one or two pieces of every pixel of a patch; lanes keep to their column, so that only steps from row to row are
// left to compute. `picture`: first channel of the chunk; `channels`: how many there are from it on, beyond which zeros
// are written.
template <class T, class Index>
__device__ __forceinline__ void load_patch(const Patch& p, const View<T, Index>& view, const T* picture, int channels,
                                           bool two, bool copies_pieces, unsigned char* shared) {
  constexpr int kPiece = kPieceBytes / sizeof(T);
  const int lane = threadIdx.x % 32, count = p.width << two;
  for (int i = lane; i < count; i += 32) {
    // Pieces of a pixel side by side where they lie so in memory; else all pixels' first pieces, so that lanes read
    // neighbours.
    int slot = i, piece = 0;
    if (copies_pieces) slot = i >> two, piece = i & two;
    else if (i >= p.width) slot = i - p.width, piece = 1;
    int x = p.left + column_of(slot, p.width, p.stride);
    const int left = channels - piece * kPiece;
    bool inside = static_cast<unsigned>(x) < static_cast<unsigned>(p.in_width) && left > 0;
    if (p.upsample > 1) inside = inside && x % p.upsample == 0, x /= p.upsample;
    const T* column = picture + static_cast<Index>(x) * view.x + static_cast<Index>(piece * kPiece) * view.c;
    unsigned char* target = shared + piece_offset(slot, piece);
    if (copies_pieces) {
      each_row(p, view.y, column, inside, target,
               [](const T* source, unsigned char* to, bool valid) { copy_async(to, source, valid); });
      continue;
    }
    each_row(p, view.y, column, inside, target, [&](const T* source, unsigned char* to, bool valid) {
      Pack<T, kPiece> values;
#pragma unroll
      for (int k = 0; k < kPiece; ++k, source += view.c)
        values.value[k] = valid && k < left ? read_only(source) : from_real<T>(0);
      *reinterpret_cast<Pack<T, kPiece>*>(to) = values;
    });
  }
}

// Finishes one value: `channel` is the convolution's own number of it.
template <class T, class Index>
__device__ __forceinline__ void store_result(const ConvArguments<T, Index>& a, Index n, int y, int x, int group,
                                             int channel, Real<T> value) {
  const Index own = static_cast<Index>(group) * a.channels_out + channel;
  const Index place = a.out.at(n, Index(y), Index(x));
  if (a.bias != nullptr) value += to_real(read_only(a.bias + own * a.bias_step));
  if (a.residual.data != nullptr)
    value += to_real(read_only(a.residual.data + a.residual.at(n, Index(y), Index(x)) + own * a.residual.c));
  if (a.preactivation.data != nullptr) a.preactivation.data[place + own * a.out.c] = from_real<T>(value);
  if (a.prelu != nullptr && !(value > 0)) value *= to_real(read_only(a.prelu + own * a.prelu_step));
  // Channel group * k + j of a group's k goes to j * groups + group.
  const Index shuffled = a.shuffle_groups > 1 ? static_cast<Index>(channel) * a.shuffle_groups + group : own;
  a.out.data[place + shuffled * a.out.c] = from_real<T>(value);
}

// Which part of the result a thread block computes.
template <class Index>
struct Tile {
  Index n;
  int top, left, group, first_channel;
};

// Products on tensor cores: pixels are the rows of a product, output channels its columns. A warp computes
// kConvWarpRows rows of 16 pixels; a lane's sums are [row][block of 8 channels][element], elements 0 and 1 of pixel
// lane / 4, 2 and 3 of pixel lane / 4 + 8, for channels lane % 4 * 2 and the next.
template <class T, int kN, bool kSharesRows>
struct TensorSums {
  static constexpr int kChannels = kN * 8, kPixels = kConvWarpRows * 16;
  float value[kConvWarpRows][kN][4] = {};
  int first_row, row_step;  // of this warp in the tile

  template <class Index>
  __device__ __forceinline__ explicit TensorSums(const ConvArguments<T, Index>& a) {
    const int warp = threadIdx.x / 32;
    row_step = kSharesRows ? a.dilation : 1;
    first_row = kSharesRows ? warp / a.dilation * kConvWarpRows * a.dilation + warp % a.dilation : warp * kConvWarpRows;
  }

  template <class Index>
  __device__ __forceinline__ void add(const ConvArguments<T, Index>& a, const unsigned char* stage, bool one_piece) {
    const int lane = threadIdx.x % 32, which = lane / 16, pitch = a.patch_width * kChunkBytes;
    unsigned weights = shared_address(stage) + which * 8 * kChunkBytes + piece_offset(lane % 8, lane / 8 % 2);
    const unsigned patch = shared_address(stage) + kTaps * kChannels * kChunkBytes;
    const ProductHalf first = product_half(one_piece, 0, which);
    const int steps = one_piece ? 2 : 3, dx_step = one_piece ? 2 : 1;
    int dx = first.dx;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, dx += dx_step, weights += 3 * kChannels * kChunkBytes) {
      const int slot = slot_of(dx * a.dilation, a.patch_width, a.stride) + lane % 16;
      unsigned source = patch + first_row * a.stride * pitch + piece_offset(slot, first.piece);
      int tap_step = a.dilation * pitch, pixel_step = a.stride * pitch;
      if (dx == kNoTap) source = patch + piece_offset(0, 1), tap_step = pixel_step = 0;
      if constexpr (kSharesRows) {
        unsigned taps[3][kN][2];
#pragma unroll
        for (int dy = 0; dy < 3; ++dy) load_weights(weights + dy * kChannels * kChunkBytes, taps[dy]);
#pragma unroll
        for (int r = 0; r < kConvWarpRows + 2; ++r, source += tap_step) {
          unsigned pixels[4];
          load_pixels(source, pixels);
#pragma unroll
          for (int dy = 0; dy < 3; ++dy) {
            if (r - dy >= 0 && r - dy < kConvWarpRows) products(value[r - dy], pixels, taps[dy]);
          }
        }
      } else {
#pragma unroll
        for (int dy = 0; dy < 3; ++dy, source += tap_step) {
          unsigned taps[kN][2];
          load_weights(weights + dy * kChannels * kChunkBytes, taps);
#pragma unroll
          for (int r = 0; r < kConvWarpRows; ++r) {
            unsigned pixels[4];
            load_pixels(source + r * pixel_step, pixels);
            products(value[r], pixels, taps);
          }
        }
      }
    }
  }

  __device__ __forceinline__ static void load_pixels(unsigned address, unsigned (&pixels)[4]) {
    load_matrices(pixels, address);
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) pixels[i] = round_to_tf32(pixels[i]);
    }
  }

  // All channels of one tap: pairs of blocks, and a last one.
  __device__ __forceinline__ static void load_weights(unsigned address, unsigned (&taps)[kN][2]) {
#pragma unroll
    for (int n = 0; n + 1 < kN; n += 2) {
      unsigned four[4];
      load_matrices(four, address + n * 8 * kChunkBytes);
      taps[n][0] = four[0], taps[n][1] = four[1], taps[n + 1][0] = four[2], taps[n + 1][1] = four[3];
    }
    if constexpr (kN % 2 == 1) load_two_matrices(taps[kN - 1], address + (kN - 1) * 8 * kChunkBytes);
  }

  __device__ __forceinline__ static void products(float (&sums)[kN][4], const unsigned (&pixels)[4],
                                                  const unsigned (&taps)[kN][2]) {
#pragma unroll
    for (int n = 0; n < kN; ++n) multiply<T>(sums[n], pixels, taps[n][0], taps[n][1]);
  }

  template <class Index>
  __device__ __forceinline__ void store(const ConvArguments<T, Index>& a, unsigned char* shared,
                                        const Tile<Index>& tile) {
    if (a.bias != nullptr) {
      each_channel(a, tile, [&](int n, int e, Index own) {
        const float bias = to_real(read_only(a.bias + own * a.bias_step));
        each_pixel([&](int r, int h) { value[r][n][h * 2 + e] += bias; });
      });
    }
    if (a.residual.data != nullptr) {
      each_pixel([&](int r, int h) {
        const int y = tile.top + first_row + r * row_step, x = tile.left + h * 8 + threadIdx.x % 32 / 4;
        if (y >= a.out_height || x >= a.out_width) return;
        const T* pixel = a.residual.data + a.residual.at(tile.n, Index(y), Index(x));
        each_channel(a, tile, [&](int n, int e, Index own) {
          value[r][n][h * 2 + e] += to_real(read_only(pixel + own * a.residual.c));
        });
      });
    }
    T* mine = reinterpret_cast<T*>(shared) + threadIdx.x / 32 * kStagedElements;
#pragma unroll 1
    for (int pass = a.preactivation.data != nullptr ? 0 : 1; pass < 2; ++pass) {
      if (pass == 1 && a.prelu != nullptr) {
        each_channel(a, tile, [&](int n, int e, Index own) {
          const float slope = to_real(read_only(a.prelu + own * a.prelu_step));
          each_pixel([&](int r, int h) {
            float& sum = value[r][n][h * 2 + e];
            if (!(sum > 0)) sum *= slope;
          });
        });
      }
      View<T, Index> target = pass == 0 ? a.preactivation : a.out;
      target.data += tile.n * target.n;
      // Channel group * k + j of a group's k goes to j * groups + group.
      const bool shuffles = pass == 1 && a.shuffle_groups > 1;
      target.data += (shuffles ? Index(tile.group) : static_cast<Index>(tile.group) * a.channels_out) * target.c;
      if (shuffles) target.c *= a.shuffle_groups;
      __syncwarp();
      if (a.out.c == 1) {
        stage_pixels(mine);
        __syncwarp();
        if (a.stores_pieces && !shuffles) write_pixels<kPiece>(a, target, tile, mine);
        else write_pixels<1>(a, target, tile, mine);
      } else {
        stage_planes(mine);
        __syncwarp();
        if (a.stores_pieces) write_planes<kPiece>(a, target, tile, mine);
        else write_planes<1>(a, target, tile, mine);
      }
    }
  }

 private:
  // The results pass through shared memory, so that lanes write neighbours: [pixel][channel] or [channel][pixel].
  static constexpr int kPiece = kPieceBytes / sizeof(T), kPlanePitch = kPixels + kPiece;
  static constexpr int kStagedElements = kChannels * kPlanePitch;

  // Calls function(block, element, channel) for this lane's channels.
  template <class Index, class Function>
  __device__ __forceinline__ static void each_channel(const ConvArguments<T, Index>& a, const Tile<Index>& tile,
                                                      Function function) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int channel = tile.first_channel + n * 8 + threadIdx.x % 4 * 2 + e;
        if (channel < a.channels_out) function(n, e, static_cast<Index>(tile.group) * a.channels_out + channel);
      }
    }
  }

  // Calls function(row, half of the columns) for this lane's pixels.
  template <class Function>
  __device__ __forceinline__ static void each_pixel(Function function) {
#pragma unroll
    for (int r = 0; r < kConvWarpRows; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) function(r, h);
    }
  }

  // Place of a channel of a pixel, such that pixels' writes of 8 channels do not meet in a bank.
  __device__ __forceinline__ static int staged(int pixel, int channel) {
    constexpr int kBlocksOfBanks = 128 / (8 * sizeof(T));
    if constexpr (kN % 2 == 1) return pixel * kChannels + channel;
    return pixel * kChannels + (channel ^ (pixel * kN / kBlocksOfBanks & (kN - 1)) * 8);
  }

  __device__ __forceinline__ void stage_pixels(T* mine) const {
    const int lane = threadIdx.x % 32;
    each_pixel([&](int r, int h) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        Pack<T, 2> pair;
        pair.value[0] = from_real<T>(value[r][n][h * 2]), pair.value[1] = from_real<T>(value[r][n][h * 2 + 1]);
        const int place = staged(lane / 4, n * 8 + lane % 4 * 2) + (r * 16 + h * 8) * kChannels;
        *reinterpret_cast<Pack<T, 2>*>(mine + place) = pair;
      }
    });
  }

  __device__ __forceinline__ void stage_planes(T* mine) const {
    const int lane = threadIdx.x % 32;
    T* corner = mine + lane % 4 * 2 * kPlanePitch + lane / 4;
#pragma unroll
    for (int r = 0; r < kConvWarpRows; ++r) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          corner[(n * 8 + i % 2) * kPlanePitch + r * 16 + i / 2 * 8] = from_real<T>(value[r][n][i]);
      }
    }
  }

  // kN accesses of kCount channels by all lanes cover 4 kCount pixels: after them every lane is back at its channels.
  template <int kCount, class Index>
  __device__ __forceinline__ void write_pixels(const ConvArguments<T, Index>& a, const View<T, Index>& target,
                                               const Tile<Index>& tile, const T* mine) const {
    using Piece = Pack<T, kCount>;
    constexpr int kAtOnce = 4 * kCount, kRows = kAtOnce > 16 ? kAtOnce / 16 : 1, kColumns = kAtOnce / kRows;
    // In bytes: the compiler would scale elements anew for every access.
    const int64_t row_pitch = kRows * static_cast<int64_t>(row_step * target.y) * static_cast<int64_t>(sizeof(T));
    const int64_t column_pitch = kColumns * static_cast<int64_t>(target.x) * static_cast<int64_t>(sizeof(T));
#pragma unroll 1
    for (int j = 0; j < kN; ++j) {
      const int item = (threadIdx.x % 32 + 32 * j) * kCount, pixel = item / kChannels, channel = item % kChannels;
      if (tile.first_channel + channel >= a.channels_out) continue;
      const int x = tile.left + pixel % 16, columns = a.out_width - x;
      int y = tile.top + first_row + pixel / 16 * row_step;
      char* row = reinterpret_cast<char*>(target.data + static_cast<Index>(tile.first_channel + channel) * target.c +
                                          static_cast<Index>(x) * target.x + static_cast<Index>(y) * target.y);
#pragma unroll
      for (int r = 0; r < kConvWarpRows; r += kRows, y += kRows * row_step, row += row_pitch) {
        if (y >= a.out_height) break;
        char* place = row;
#pragma unroll
        for (int p = 0; p < 16; p += kColumns, place += column_pitch) {
          const T* source = mine + staged(r * 16 + p + pixel, channel);
          if (p < columns) *reinterpret_cast<Piece*>(place) = *reinterpret_cast<const Piece*>(source);
        }
      }
    }
  }

  // A lane keeps to its pixels and walks over the channels.
  template <int kCount, class Index>
  __device__ __forceinline__ void write_planes(const ConvArguments<T, Index>& a, const View<T, Index>& target,
                                               const Tile<Index>& tile, const T* mine) const {
    using Piece = Pack<T, kCount>;
    constexpr int kLanes = kPixels / kCount < 32 ? kPixels / kCount : 32,
                  kAtOnce = 32 / kLanes;  // lanes and number of channels
    const int lane = threadIdx.x % 32, first = lane / kLanes, count = a.channels_out - tile.first_channel - first;
    const int64_t step = kAtOnce * static_cast<int64_t>(target.c);
#pragma unroll 1
    for (int pixel = lane % kLanes * kCount; pixel < kPixels; pixel += kLanes * kCount) {
      const int y = tile.top + first_row + pixel / 16 * row_step, x = tile.left + pixel % 16;
      if (y >= a.out_height || x >= a.out_width) continue;
      T* place = target.data + static_cast<Index>(y) * target.y + static_cast<Index>(x) * target.x +
                 static_cast<Index>(tile.first_channel + first) * target.c;
#pragma unroll
      for (int channel = 0; channel < kChannels; channel += kAtOnce, place += step) {
        if (channel < count)
          *reinterpret_cast<Piece*>(place) =
              *reinterpret_cast<const Piece*>(mine + (channel + first) * kPlanePitch + pixel);
      }
    }
  }
};

// Products in Real arithmetic. A warp takes a quarter of the channels; lanes are the columns of two rows, and walk
// down.
template <class T, int kN>
struct PlainSums {
  using R = Real<T>;
  static constexpr int kRows = kConvRows / 2, kChannels = kN * 2;
  R value[kChannels][kRows] = {};

  template <class Index>
  __device__ __forceinline__ explicit PlainSums(const ConvArguments<T, Index>&) {}

  template <class Index>
  __device__ __forceinline__ void add(const ConvArguments<T, Index>& a, const unsigned char* stage, bool one_piece) {
    using Piece = Pack<R, kPieceBytes / sizeof(R)>;
    const unsigned char* patch = stage + kTaps * kN * 8 * kChunkBytes;
    const int steps = one_piece ? 2 : 3, pitch = a.patch_width * kChunkBytes;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
#pragma unroll 1
      for (int dy = 0; dy < 3; ++dy) {
#pragma unroll 1
        for (int which = 0; which < 2; ++which) {
          const ProductHalf half = product_half(one_piece, step, which);
          if (half.dx == kNoTap) continue;
          const int slot = slot_of(half.dx * a.dilation, a.patch_width, a.stride) + column();
          const unsigned char* source =
              patch + (first_row() * a.stride + dy * a.dilation) * pitch + piece_offset(slot, half.piece);
          Piece left[kChannels];
#pragma unroll
          for (int c = 0; c < kChannels; ++c)
            left[c] = *reinterpret_cast<const Piece*>(
                stage + piece_offset((step * 3 + dy) * kN * 8 + first_channel() + c, which));
#pragma unroll
          for (int r = 0; r < kRows; ++r, source += 2 * a.stride * pitch) {
            const Piece right = *reinterpret_cast<const Piece*>(source);
#pragma unroll
            for (int c = 0; c < kChannels; ++c) {
#pragma unroll
              for (int k = 0; k < static_cast<int>(kPieceBytes / sizeof(R)); ++k)
                value[c][r] = fma(left[c].value[k], right.value[k], value[c][r]);
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ static int column() { return threadIdx.x % 16; }
  __device__ __forceinline__ static int first_row() { return threadIdx.x / 16 % 2; }
  __device__ __forceinline__ static int first_channel() { return threadIdx.x / 32 * kChannels; }

  template <class Index>
  __device__ __forceinline__ void store(const ConvArguments<T, Index>& a, unsigned char*, const Tile<Index>& tile) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int channel = tile.first_channel + first_channel() + c;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int y = tile.top + first_row() + 2 * r, x = tile.left + column();
        if (channel < a.channels_out && y < a.out_height && x < a.out_width)
          store_result(a, tile.n, y, x, tile.group, channel, value[c][r]);
      }
    }
  }
};

template <class Sums, int kN, class T, class Index>
__device__ __forceinline__ void convolve_tile(const ConvArguments<T, Index>& a) {
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr int kPiece = kPieceBytes / sizeof(T), kWeightBytes = kTaps * kN * 8 * kChunkBytes;
  // Blocks of one tile follow each other: they read the same patch, from L2.
  const int block = blockIdx.x % a.blocks, place = blockIdx.x / a.blocks, group = blockIdx.y;
  const int tiles = a.tiles_x * a.tiles_y, n = place / tiles, in_picture = place - n * tiles,
            tile_y = in_picture / a.tiles_x;
  const Tile<Index> tile{static_cast<Index>(n), tile_y * kConvRows, (in_picture - tile_y * a.tiles_x) * kConvColumns,
                         group, block * kN * 8};
  const Patch patch{tile.top * a.stride - a.dilation,
                    tile.left * a.stride - a.dilation,
                    a.patch_height,
                    a.patch_width,
                    a.stride,
                    a.in_height,
                    a.in_width,
                    a.upsample};
  const T* channels = a.input.data + tile.n * a.input.n + static_cast<Index>(group) * a.channels_in * a.input.c;
  const unsigned char* weights = a.weights + (int64_t{group} * a.blocks + block) * a.chunks * kWeightBytes;
  const int stage_bytes = kWeightBytes + a.patch_height * a.patch_width * kChunkBytes;
  Sums sums(a);
  int filled = 0, used = 0;  // the next buffer to fill, and to use
  int left = a.channels_in;  // channels not loaded yet
  const auto following = [&](int buffer) { return buffer + 1 == a.stages ? 0 : buffer + 1; };
  for (int chunk = 1 - a.stages; chunk < a.chunks; ++chunk) {  // the first rounds only fill the pipeline
    if (a.stages == 3) wait_for_copies<1>();
    else wait_for_copies<0>();
    __syncthreads();  // this chunk is there for all, and the buffer of the one before is free
    if (left > 0) {
      unsigned char* stage = shared + filled * stage_bytes;
      for (int i = threadIdx.x * kPieceBytes; i < kWeightBytes; i += kConvWarps * 32 * kPieceBytes)
        copy_async(stage + i, weights + i, true);
      load_patch(patch, a.input, channels, left, left > kPiece, a.copies_pieces, stage + kWeightBytes);
      if (left <= kPiece && threadIdx.x == 0)  // see kNoTap
        *reinterpret_cast<uint4*>(stage + kWeightBytes + piece_offset(0, 1)) = uint4{};
      filled = following(filled), left -= 2 * kPiece;
      weights += kWeightBytes, channels += 2 * kPiece * a.input.c;
    }
    commit_copies();      // an empty group at the end: their number stays that of the chunks
    if (a.stages == 1) {  // shared memory holds one chunk only
      wait_for_copies<0>();
      __syncthreads();
    }
    if (chunk < 0) continue;
    sums.add(a, shared + used * stage_bytes, a.channels_in - chunk * 2 * kPiece <= kPiece);
    used = following(used);
  }
  __syncthreads();
  sums.store(a, shared, tile);
}

}  // namespace safnet::cuda
