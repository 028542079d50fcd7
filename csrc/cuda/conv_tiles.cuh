// The 3x3 convolution of one tile (see plans.h): loading of the stages, products on tensor cores or in plain arithmetic, and the
// store with bias, residual, PReLU and shuffle.
//
// In shared memory every pixel of the patch, and every (tap, output channel) of the weights, is a row of two 16-byte pieces:
// channels 0-7 and 8-15 of the chunk (of 16 bit; half as many of 32). Rows 4-7 of eight have their pieces swapped, so that any
// eight rows that follow each other lie in different banks. A product takes 32 bytes: the two pieces of one tap (dy, dx), or,
// where the last chunk has channels for one piece only, that piece at two taps dx.
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
  int32_t first_out, stride, dilation, chunks, stages, patch_height, patch_width;
  int32_t shuffle_groups;
  bool copies_pieces;  // 16 bytes of channels lie together and aligned
};

// Byte offset of a piece of a row.
__device__ __forceinline__ int piece_offset(int row, int piece) { return row * kChunkBytes + ((piece ^ (row >> 2 & 1)) * kPieceBytes); }

// Which tap dx and which piece of the chunk is half `which` of product `step`.
struct ProductHalf {
  int dx, piece;
};
__device__ __forceinline__ ProductHalf product_half(bool one_piece, int step, int which) {
  return one_piece ? ProductHalf{2 * step + which, 0} : ProductHalf{step, which};
}

template <class T, class Index>
__device__ __forceinline__ void load_patch(const ConvArguments<T, Index>& a, unsigned char* patch, Index n, int group, int chunk,
                                           int top, int left) {
  constexpr int kPiece = kPieceBytes / sizeof(T);
  const int first_channel = chunk * 2 * kPiece, pieces = a.channels_in - first_channel > kPiece ? 2 : 1;
  const int positions = a.patch_height * a.patch_width, count = positions * pieces;
  for (int i = threadIdx.x; i < count; i += kConvWarps * 32) {
    // Pieces of a pixel side by side where they lie so in memory; else all pixels' first pieces, so that lanes read neighbours.
    const int position = a.copies_pieces ? i >> (pieces - 1) : i < positions ? i : i - positions;
    const int piece = a.copies_pieces ? i & (pieces - 1) : i < positions ? 0 : 1;
    const int row = position / a.patch_width;
    int y = top + row, x = left + (position - row * a.patch_width);
    bool valid = y >= 0 && y < a.in_height && x >= 0 && x < a.in_width;
    if (a.upsample > 1) {
      valid = valid && y % a.upsample == 0 && x % a.upsample == 0;
      y /= a.upsample, x /= a.upsample;
    }
    const int channel = first_channel + piece * kPiece;
    const T* source = a.input.data;
    if (valid) source += a.input.at(n, Index(y), Index(x)) + (static_cast<Index>(group) * a.channels_in + channel) * a.input.c;
    unsigned char* target = patch + piece_offset(position, piece);
    if (a.copies_pieces) {
      copy_async(target, source, valid);
      continue;
    }
    Pack<T, kPiece> values;
#pragma unroll
    for (int k = 0; k < kPiece; ++k) {
      T value = from_real<T>(0);
      if (valid && channel + k < a.channels_in) value = __ldg(source + k * a.input.c);
      values.value[k] = value;
    }
    *reinterpret_cast<Pack<T, kPiece>*>(target) = values;
  }
}

template <int kM, class T, class Index>
__device__ __forceinline__ void load_stage(const ConvArguments<T, Index>& a, unsigned char* stage, Index n, int group, int chunk,
                                           int top, int left) {
  constexpr int kWeightBytes = kTaps * kM * 16 * kChunkBytes;
  const unsigned char* weights = a.weights + ((int64_t{group} * gridDim.y + blockIdx.y) * a.chunks + chunk) * kWeightBytes;
  for (int i = threadIdx.x * 16; i < kWeightBytes; i += kConvWarps * 32 * 16) copy_async(stage + i, weights + i, true);
  load_patch(a, stage + kWeightBytes, n, group, chunk, top, left);
}

// Finishes one value: `channel` is the convolution's own number of it.
template <class T, class Index>
__device__ __forceinline__ void store_result(const ConvArguments<T, Index>& a, Index n, int y, int x, int group, int channel,
                                             Real<T> value) {
  const Index own = static_cast<Index>(group) * a.channels_out + channel;
  const Index place = a.out.at(n, Index(y), Index(x));
  if (a.bias != nullptr) value += to_real(__ldg(a.bias + own * a.bias_step));
  if (a.residual.data != nullptr)
    value += to_real(__ldg(a.residual.data + a.residual.at(n, Index(y), Index(x)) + own * a.residual.c));
  if (a.preactivation.data != nullptr) a.preactivation.data[place + own * a.out.c] = from_real<T>(value);
  if (a.prelu != nullptr && !(value > 0)) value *= to_real(__ldg(a.prelu + own * a.prelu_step));
  // Channel group * k + j of a group's k goes to j * groups + group.
  const Index shuffled = a.shuffle_groups > 1 ? static_cast<Index>(channel) * a.shuffle_groups + group : own;
  a.out.data[place + shuffled * a.out.c] = from_real<T>(value);
}

// Products on tensor cores. Warp w computes rows of 16 columns: lanes' sums are [row][half of columns][m block][element].
template <class T, int kM, bool kSharesRows>
struct TensorSums {
  float value[kConvWarpRows][2][kM][4] = {};

  template <class Index>
  __device__ __forceinline__ void add(const ConvArguments<T, Index>& a, const unsigned char* stage, bool one_piece) {
    const unsigned weights = shared_address(stage), patch = weights + kTaps * kM * 16 * kChunkBytes;
    const int lane = threadIdx.x % 32, column = lane % 8 + lane / 16 * 8 + first_column();
    const int a_row = lane % 16, a_which = lane / 16, b_which = lane / 8 % 2;
    const int steps = one_piece ? 2 : 3;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      unsigned left[3][kM][4];
#pragma unroll
      for (int dy = 0; dy < 3; ++dy) {
#pragma unroll
        for (int m = 0; m < kM; ++m)
          load_matrices(left[dy][m], weights + piece_offset(((step * 3 + dy) * kM + m) * 16 + a_row, a_which));
      }
      ProductHalf half = product_half(one_piece, step, b_which);
      const bool single = one_piece && step == 1;  // the second half has no tap: its weights are zero, and so must this be
      if (half.dx > 2) half.dx = 2;
      const int shift = column * a.stride + half.dx * a.dilation;
      const auto load_row = [&](int patch_row, unsigned(&right)[4]) {
        load_matrices(right, patch + piece_offset(patch_row * a.patch_width + shift, half.piece));
        if (single) right[1] = right[3] = 0;
        if constexpr (std::is_same_v<T, float>) {
#pragma unroll
          for (int i = 0; i < 4; ++i) right[i] = round_to_tf32(right[i]);
        }
      };
      if constexpr (kSharesRows) {
#pragma unroll
        for (int r = 0; r < kConvWarpRows + 2; ++r) {
          unsigned right[4];
          load_row(row(a, 0) + r * a.dilation, right);
#pragma unroll
          for (int dy = 0; dy < 3; ++dy) {
            if (r - dy >= 0 && r - dy < kConvWarpRows) products(r - dy, left[dy], right);
          }
        }
      } else {
#pragma unroll
        for (int dy = 0; dy < 3; ++dy) {
#pragma unroll
          for (int r = 0; r < kConvWarpRows; ++r) {
            unsigned right[4];
            load_row(row(a, r) * a.stride + dy * a.dilation, right);
            products(r, left[dy], right);
          }
        }
      }
    }
  }

  // The tile's row that is row r of this warp.
  template <class Index>
  __device__ __forceinline__ static int row(const ConvArguments<T, Index>& a, int r) {
    const int warp = threadIdx.x / 64;
    if constexpr (kSharesRows) return warp / a.dilation * kConvWarpRows * a.dilation + warp % a.dilation + r * a.dilation;
    return warp * kConvWarpRows + r;
  }

  __device__ __forceinline__ static int first_column() { return threadIdx.x / 32 % 2 * 16; }

  __device__ __forceinline__ void products(int r, const unsigned (&left)[kM][4], const unsigned (&right)[4]) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      multiply<T>(value[r][0][m], left[m], right[0], right[1]);
      multiply<T>(value[r][1][m], left[m], right[2], right[3]);
    }
  }

  // Through shared memory, so that lanes write neighbours: pixels, or channels where those lie together.
  template <class Index>
  __device__ __forceinline__ void store(const ConvArguments<T, Index>& a, unsigned char* shared, Index n, int group, int top,
                                        int left) {
    constexpr int kPitch = 72;  // floats of a channel: 64 pixels, and the rest keeps the writes off each other's banks
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* mine = reinterpret_cast<float*>(shared) + warp * 16 * kPitch;
    const bool channels_together = a.out.c == 1;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      __syncwarp();
#pragma unroll
      for (int r = 0; r < kConvWarpRows; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* sums = value[r][half][m];
          float* target = mine + lane / 4 * kPitch + r * 16 + half * 8 + lane % 4 * 2;
          *reinterpret_cast<float2*>(target) = make_float2(sums[0], sums[1]);
          *reinterpret_cast<float2*>(target + 8 * kPitch) = make_float2(sums[2], sums[3]);
        }
      }
      __syncwarp();
#pragma unroll 2
      for (int i = lane; i < 16 * 64; i += 32) {
        const int channel = channels_together ? i % 16 : i / 64, pixel = channels_together ? i / 16 : i % 64;
        const int out_channel = a.first_out + (blockIdx.y * kM + m) * 16 + channel;
        const int y = top + row(a, pixel / 16), x = left + first_column() + pixel % 16;
        if (out_channel < a.channels_out && y < a.out_height && x < a.out_width)
          store_result(a, n, y, x, group, out_channel, mine[channel * kPitch + pixel]);
      }
    }
  }
};

// Products in Real arithmetic. A warp takes a quarter of the channels and half of the rows; lanes are columns.
template <class T, int kM>
struct PlainSums {
  using R = Real<T>;
  static constexpr int kRows = kConvRows / 2, kChannels = kM * 4;
  R value[kChannels][kRows] = {};

  template <class Index>
  __device__ __forceinline__ void add(const ConvArguments<T, Index>& a, const unsigned char* stage, bool one_piece) {
    constexpr int kPiece = kPieceBytes / sizeof(R);
    using Piece = Pack<R, kPiece>;
    const unsigned char* patch = stage + kTaps * kM * 16 * kChunkBytes;
    const int steps = one_piece ? 2 : 3;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
#pragma unroll 1
      for (int dy = 0; dy < 3; ++dy) {
#pragma unroll 1
        for (int which = 0; which < 2; ++which) {
          const ProductHalf half = product_half(one_piece, step, which);
          if (half.dx > 2) continue;
          Piece right[kRows];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const int position =
                ((first_row() + r) * a.stride + dy * a.dilation) * a.patch_width + column() * a.stride + half.dx * a.dilation;
            right[r] = *reinterpret_cast<const Piece*>(patch + piece_offset(position, half.piece));
          }
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            const int row = (step * 3 + dy) * kM * 16 + first_channel() + c;
            const Piece left = *reinterpret_cast<const Piece*>(stage + piece_offset(row, which));
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
#pragma unroll
              for (int k = 0; k < kPiece; ++k) value[c][r] = fma(left.value[k], right[r].value[k], value[c][r]);
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ static int column() { return threadIdx.x % 32; }
  __device__ __forceinline__ static int first_row() { return threadIdx.x / 32 % 2 * kRows; }
  __device__ __forceinline__ static int first_channel() { return threadIdx.x / 64 * kChannels; }

  template <class Index>
  __device__ __forceinline__ void store(const ConvArguments<T, Index>& a, unsigned char*, Index n, int group, int top, int left) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int out_channel = a.first_out + blockIdx.y * kM * 16 + first_channel() + c;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int y = top + first_row() + r, x = left + column();
        if (out_channel < a.channels_out && y < a.out_height && x < a.out_width)
          store_result(a, n, y, x, group, out_channel, value[c][r]);
      }
    }
  }
};

template <class Sums, int kM, class T, class Index>
__device__ __forceinline__ void convolve_tile(const ConvArguments<T, Index>& a) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int tiles = a.tiles_x * a.tiles_y, n = blockIdx.x / tiles, tile = blockIdx.x - n * tiles;
  const int tile_y = tile / a.tiles_x, top = tile_y * kConvRows, left = (tile - tile_y * a.tiles_x) * kConvColumns;
  const int group = blockIdx.z, in_top = top * a.stride - a.dilation, in_left = left * a.stride - a.dilation;
  const int stage_bytes = (kTaps * kM * 16 + a.patch_height * a.patch_width) * kChunkBytes;
  Sums sums;
  for (int chunk = 1 - a.stages; chunk < a.chunks; ++chunk) {  // the first rounds only fill the pipeline
    if (a.stages == 3) wait_for_copies<1>();
    else wait_for_copies<0>();
    __syncthreads();  // this chunk is there for all, and the buffer of the one before is free
    const int next = chunk + a.stages - 1;
    if (next < a.chunks)
      load_stage<kM>(a, shared + next % a.stages * stage_bytes, static_cast<Index>(n), group, next, in_top, in_left);
    commit_copies();  // an empty group at the end: their number stays that of the chunks
    if (a.stages == 1) {  // shared memory holds one chunk only
      wait_for_copies<0>();
      __syncthreads();
    }
    constexpr int kPiece = kPieceBytes / sizeof(T);
    if (chunk >= 0) sums.add(a, shared + chunk % a.stages * stage_bytes, a.channels_in - chunk * 2 * kPiece <= kPiece);
  }
  __syncthreads();
  sums.store(a, shared, static_cast<Index>(n), group, top, left);
}

}  // namespace safnet::cuda
