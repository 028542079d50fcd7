// The gradient of the convolution's weights. A block takes some output and input channels of one group and walks over
// the tiles of one slice of the pixels; the slices' sums are added in order afterwards, so that no result depends on
// the order of blocks.
#pragma once

#include "cuda/convolution.cuh"

namespace safnet::cuda {

template <class T, class Index>
struct WeightGradientArguments {
  View<T, Index> input, grad;  // grad: before PReLU and shuffle
  Real<T>* partial;            // [slice][weight]
  int32_t in_height, in_width, out_height, out_width, tiles_x, tiles_y;
  int64_t tiles;  // of all pictures
  int32_t groups, channels_in, channels_out, blocks_in, stride, dilation, patch_height, patch_width;
  int32_t rows, stages;                          // of a tile, on tensor cores
  bool copies_input_pieces, copies_grad_pieces;  // 16 bytes of channels lie together and aligned
};

// In plain arithmetic: a block holds 8 x 8 pairs of output and input channels; a thread sums all nine taps of one pair
// over a quarter of a tile's rows.

template <class T, class Index>
__global__ void __launch_bounds__(kThreads, 2)
    weight_gradient(const __grid_constant__ WeightGradientArguments<T, Index> a) {
  using R = Real<T>;
  extern __shared__ __align__(128) unsigned char shared[];
  const int patch_size = a.patch_height * a.patch_width;
  const int pitch_patch = patch_size | 1,
            pitch_grad = kGradRows * kGradColumns + 1;  // odd: channels in different banks
  R *grads = reinterpret_cast<R*>(shared), *patch = grads + kPairs * pitch_grad;
  const int blocks = gridDim.x / a.groups, group = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const int first_out = block / a.blocks_in * kPairs, first_in = block % a.blocks_in * kPairs;
  const int out = threadIdx.x % kPairs, in = threadIdx.x / kPairs % kPairs, quarter = threadIdx.x / (kPairs * kPairs);
  R sums[kTaps] = {};
  for (int64_t t = blockIdx.y; t < a.tiles; t += gridDim.y) {
    const int tile = static_cast<int>(t % (a.tiles_x * a.tiles_y));
    const Index n = static_cast<Index>(t / (a.tiles_x * a.tiles_y));
    const int top = tile / a.tiles_x * kGradRows, left = tile % a.tiles_x * kGradColumns;
    for (int i = threadIdx.x; i < kPairs * kGradRows * kGradColumns; i += kThreads) {
      const int c = i / (kGradRows * kGradColumns), pixel = i % (kGradRows * kGradColumns);
      const int y = top + pixel / kGradColumns, x = left + pixel % kGradColumns, channel = first_out + c;
      const bool valid = y < a.out_height && x < a.out_width && channel < a.channels_out;
      grads[c * pitch_grad + pixel] =
          valid ? to_real(read_only(a.grad.data + a.grad.at(n, Index(y), Index(x)) +
                                    (static_cast<Index>(group) * a.channels_out + channel) * a.grad.c))
                : R(0);
    }
    const auto input_at = [&](int channel, int64_t y, int64_t x) {
      const bool valid = y >= 0 && y < a.in_height && x >= 0 && x < a.in_width && channel < a.channels_in;
      return valid ? to_real(read_only(a.input.data + a.input.at(n, static_cast<Index>(y), static_cast<Index>(x)) +
                                       (static_cast<Index>(group) * a.channels_in + channel) * a.input.c))
                   : R(0);
    };
    const int64_t in_top = int64_t{top} * a.stride - a.dilation, in_left = int64_t{left} * a.stride - a.dilation;
    for (int i = threadIdx.x; i < kPairs * patch_size; i += kThreads) {
      const int c = i / patch_size, position = i - c * patch_size, row = position / a.patch_width;
      patch[c * pitch_patch + position] =
          input_at(first_in + c, in_top + row, in_left + position - row * a.patch_width);
    }
    __syncthreads();
    constexpr int kRows = kGradRows / kQuarters;
    for (int pixel = 0; pixel < kRows * kGradColumns; ++pixel) {
      const int y = quarter * kRows + pixel / kGradColumns, x = pixel % kGradColumns;
      const R grad = grads[out * pitch_grad + y * kGradColumns + x];
      if (patch_size == 0) {  // it does not fit into shared memory
        for (int tap = 0; tap < kTaps; ++tap) {
          const int64_t shift_y = int64_t{tap / 3} * a.dilation, shift_x = int64_t{tap % 3} * a.dilation;
          sums[tap] =
              fma(grad, input_at(first_in + in, in_top + y * a.stride + shift_y, in_left + x * a.stride + shift_x),
                  sums[tap]);
        }
        continue;
      }
      const R* corner = patch + in * pitch_patch + y * a.stride * a.patch_width + x * a.stride;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap)
        sums[tap] = fma(grad, corner[(tap / 3 * a.patch_width + tap % 3) * a.dilation], sums[tap]);
    }
    __syncthreads();
  }
  // The quarters meet in shared memory, one after the other.
  R* meeting = reinterpret_cast<R*>(shared);
  const int pair = threadIdx.x % (kPairs * kPairs);
  for (int turn = 1; turn < kQuarters; ++turn) {
    if (quarter == turn) {
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) meeting[tap * kPairs * kPairs + pair] = sums[tap];
    }
    __syncthreads();
    if (quarter == 0) {
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) sums[tap] += meeting[tap * kPairs * kPairs + pair];
    }
    __syncthreads();
  }
  if (quarter != 0 || first_out + out >= a.channels_out || first_in + in >= a.channels_in) return;
  const int64_t weights = int64_t{a.groups} * a.channels_out * a.channels_in * kTaps;
  const int64_t place = ((int64_t{group} * a.channels_out + first_out + out) * a.channels_in + first_in + in) * kTaps;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) a.partial[blockIdx.y * weights + place + tap] = sums[tap];
}

// On tensor cores: a product's rows are 16 input channels, its columns 8 output channels, and it sums over 16 pixels of
// a row. Both factors lie in shared memory with channels innermost, and ldmatrix turns them round. A warp takes every
// eighth row of a tile and keeps all nine taps' sums: nine shifted reads of the input share one read of the gradient.
template <class T, class Index, int kN>
struct WeightGradientTile {
  static constexpr int kOut = kN * 8, kIn = 16, kGradChunks = (kN + 1) / 2;
  static constexpr int kOutPitch = kIn * kTaps + 4;  // floats; the rest keeps lanes' writes off each other's banks
  static constexpr int kSums = kTaps * kN * 4;       // of a lane

  const WeightGradientArguments<T, Index>& a;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_out = blockIdx.x / a.blocks_in * kOut, first_in = blockIdx.x % a.blocks_in * kIn;
  const int patch_bytes = a.patch_height * a.patch_width * kChunkBytes,
            grad_bytes = a.rows * kGradColumns * kChunkBytes;
  float sums[kTaps][kN][4] = {};

  __device__ __forceinline__ void load_stage(unsigned tile, unsigned char* stage) const {
    const unsigned tiles = a.tiles_x * a.tiles_y, n = tile / tiles, in_picture = tile - n * tiles,
                   tile_y = in_picture / a.tiles_x;
    const int top = tile_y * a.rows, left = (in_picture - tile_y * a.tiles_x) * kGradColumns, group = blockIdx.z;
    const Patch patch{top * a.stride - a.dilation,
                      left * a.stride - a.dilation,
                      a.patch_height,
                      a.patch_width,
                      a.stride,
                      a.in_height,
                      a.in_width,
                      1};
    const T* input = a.input.data + static_cast<Index>(n) * a.input.n +
                     (static_cast<Index>(group) * a.channels_in + first_in) * a.input.c;
    load_patch(patch, a.input, input, a.channels_in - first_in, true, a.copies_input_pieces, stage);
    const Patch own{top, left, a.rows, kGradColumns, 1, a.out_height, a.out_width, 1};
    const T* grad = a.grad.data + static_cast<Index>(n) * a.grad.n +
                    (static_cast<Index>(group) * a.channels_out + first_out) * a.grad.c;
    for (int chunk = 0; chunk < kGradChunks; ++chunk)
      load_patch(own, a.grad, grad + static_cast<Index>(chunk * 16) * a.grad.c, a.channels_out - first_out - chunk * 16,
                 true, a.copies_grad_pieces, stage + patch_bytes + chunk * grad_bytes);
  }

  __device__ __forceinline__ void add(const unsigned char* stage) {
    const unsigned patch = shared_address(stage), grads = patch + patch_bytes;
    const int pitch = a.patch_width * kChunkBytes;
    for (int i = warp * 2; i < a.rows * 2; i += i % 2 == 0 ? 1 : 2 * kGradWarps - 1) {  // halves of this warp's rows
      const int row = i / 2, column = i % 2 * 16;
      unsigned right[kN][2];
      const unsigned grad = grads + piece_offset(row * kGradColumns + column + lane % 16, lane / 16);
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        unsigned four[4];
        load_matrices_transposed(four, grad + n / 2 * grad_bytes);
        right[n][0] = four[0], right[n][1] = four[1];
        if (n + 1 < kN) right[n + 1][0] = four[2], right[n + 1][1] = four[3];
      }
#pragma unroll
      for (int dx = 0; dx < 3; ++dx) {
        const int slot = slot_of(dx * a.dilation, a.patch_width, a.stride) + column + lane % 8 + lane / 16 * 8;
        unsigned source = patch + row * a.stride * pitch + piece_offset(slot, lane / 8 % 2);
#pragma unroll
        for (int dy = 0; dy < 3; ++dy, source += a.dilation * pitch) {
          unsigned left[4];
          load_matrices_transposed(left, source);
#pragma unroll
          for (int n = 0; n < kN; ++n) multiply<T>(sums[dy * 3 + dx][n], left, right[n][0], right[n][1]);
        }
      }
    }
  }

  // Warps meet in shared memory, by halves; the first one's sums go out by all threads, in the order of the weights.
  __device__ __forceinline__ void store(float* shared) {
    float* flat = &sums[0][0][0];
#pragma unroll 1
    for (int others = kGradWarps / 2; others > 0; others /= 2) {
      float* mine = shared + warp % others * kSums * 32 + lane;
      if (warp >= others && warp < 2 * others) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) mine[i * 32] = flat[i];
      }
      __syncthreads();
      if (warp < others) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) flat[i] += mine[i * 32];
      }
      __syncthreads();
    }
    if (warp == 0) {
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          float* corner = shared + (n * 8 + lane % 4 * 2) * kOutPitch + lane / 4 * kTaps + tap;
#pragma unroll
          for (int e = 0; e < 4; ++e) corner[e % 2 * kOutPitch + e / 2 * 8 * kTaps] = sums[tap][n][e];
        }
      }
    }
    __syncthreads();
    const int count = min(kIn, a.channels_in - first_in) * kTaps;
    const int64_t weights = int64_t{gridDim.z} * a.channels_out * a.channels_in * kTaps;
    float* target =
        a.partial + blockIdx.y * weights + (int64_t{blockIdx.z} * a.channels_out * a.channels_in + first_in) * kTaps;
    for (int i = threadIdx.x; i < kOut * kIn * kTaps; i += kGradWarps * 32) {
      const int out = i / (kIn * kTaps), rest = i % (kIn * kTaps);
      if (rest < count && first_out + out < a.channels_out)
        target[int64_t{first_out + out} * a.channels_in * kTaps + rest] = shared[out * kOutPitch + rest];
    }
  }
};

template <class T, class Index, int kN>
__global__ void __launch_bounds__(kGradWarps * 32, 1)
    weight_gradient_tensor(const __grid_constant__ WeightGradientArguments<T, Index> a) {
  extern __shared__ __align__(128) unsigned char shared[];
  WeightGradientTile<T, Index, kN> tile{a};
  const int stage_bytes = tile.patch_bytes + tile.kGradChunks * tile.grad_bytes;
  const auto tiles = static_cast<unsigned>(a.tiles);
  unsigned next = blockIdx.y;
  int filled = 0, used = 0;  // the next buffer to fill, and to use
  const auto following = [&](int buffer) { return buffer + 1 == a.stages ? 0 : buffer + 1; };
  // As in convolve_tile: the first rounds only fill the pipeline.
  for (int64_t t = int64_t{blockIdx.y} + int64_t{1 - a.stages} * gridDim.y; t < a.tiles; t += gridDim.y) {
    if (a.stages == 3) wait_for_copies<1>();
    else wait_for_copies<0>();
    __syncthreads();
    if (next < tiles) {
      tile.load_stage(next, shared + filled * stage_bytes);
      filled = following(filled), next += gridDim.y;
    }
    commit_copies();
    if (a.stages == 1) {
      wait_for_copies<0>();
      __syncthreads();
    }
    if (t < 0) continue;
    tile.add(shared + used * stage_bytes);
    used = following(used);
  }
  __syncthreads();
  tile.store(reinterpret_cast<float*>(shared));
}

}  // namespace safnet::cuda
