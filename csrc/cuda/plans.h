// Launch plans: grid, block, shared memory and the choice of kernel variant, from sizes alone. Plain C++, no CUDA types.
#pragma once

#include <algorithm>
#include <cstdint>

namespace safnet::cuda {

struct Plan {
  uint32_t grid[3] = {1, 1, 1};
  uint32_t block[3] = {1, 1, 1};
  uint32_t shared_bytes = 0;
};

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kThreads = 256;     // of the elementwise kernels
constexpr int kVectorPixels = 4;  // adjacent pixels of a thread where the layout allows vector accesses

// One thread for each of `items`.
inline Plan elementwise_plan(int64_t items) {
  Plan plan;
  plan.grid[0] = static_cast<uint32_t>(divide_up(items, kThreads));
  plan.block[0] = kThreads;
  return plan;
}

// backward_warp forward over planes: the channels are split over blockIdx.y until the device has enough threads, but not so far
// that reading the flow again (from cache) weighs.
inline Plan warp_forward_plan(int64_t items, int64_t channels) {
  constexpr int64_t kEnoughThreads = 1 << 18, kLeastChannels = 8;
  const int64_t wanted = divide_up(kEnoughThreads, std::max<int64_t>(items, 1));
  Plan plan = elementwise_plan(items);
  plan.grid[1] = static_cast<uint32_t>(std::clamp<int64_t>(std::min(wanted, channels / kLeastChannels), 1, 65535));
  return plan;
}

// backward_warp backward: a block holds kThreads / slices pixels; each slice of threads takes every slices-th channel, and the
// slices' sums for the flow meet in shared memory.
struct WarpBackwardPlan {
  Plan plan;
  int slices;
};

inline WarpBackwardPlan warp_backward_plan(int64_t pixels, int64_t channels, size_t bytes_of_real) {
  int slices = 1;
  while (slices < 8 && slices * 8 <= channels) slices *= 2;
  WarpBackwardPlan result{{}, slices};
  result.plan.grid[0] = static_cast<uint32_t>(divide_up(pixels, kThreads / slices));
  result.plan.block[0] = static_cast<uint32_t>(kThreads / slices);
  result.plan.block[1] = static_cast<uint32_t>(slices);
  result.plan.shared_bytes = static_cast<uint32_t>(slices == 1 ? 0 : 2 * kThreads * bytes_of_real);
  return result;
}

// The same for channels_last: kLaneGroup neighbouring lanes share a pixel, and read and add its channels side by side.
constexpr int kLaneGroup = 8;

// group_conv_shuffle. A block computes 16 rows x 32 columns of the result for 16 kM output channels of a group, and walks over the
// input channels in chunks of 32 bytes a pixel: the chunk's patch of the input and all its weights lie in shared memory, in
// `stages` buffers, so that copies of the next chunks overlap the products of this one.
constexpr int kConvRows = 16, kConvColumns = 32, kConvWarps = 8, kConvWarpRows = 4;
constexpr int kChunkBytes = 32, kPieceBytes = 16;  // channels of one pixel: of a stage, and of one 16-byte access
constexpr int kTaps = 9, kLargestM = 3;

struct ConvGeometry {
  int64_t batch, in_height, in_width, out_height, out_width;  // in: after upsampling
  int64_t channels_in, channels_out, groups;                  // channels of one group
  int64_t stride, dilation;
};

struct ConvPlan {
  Plan plan;
  int m = 0;              // 16-channel blocks of a thread block; 0: nothing to do
  int64_t blocks_m = 0;   // thread blocks over the output channels of a group
  int64_t first_out = 0;  // the first output channel of these blocks in its group
  int64_t chunks = 0;
  int stages = 0;  // 0: a stage does not fit into shared memory; the direct kernel has to do it
  int patch_height = 0, patch_width = 0;
  bool shares_rows = false;  // rows of a warp lie `dilation` apart, so that three taps read each row of the patch
};

// Bytes of one stage: patch and weights.
inline int64_t conv_patch_bytes(const ConvPlan& p) { return int64_t{p.patch_height} * p.patch_width * kChunkBytes; }
inline int64_t conv_weight_bytes(const ConvPlan& p) { return int64_t{kTaps} * p.m * 16 * kChunkBytes; }

inline ConvPlan conv_part(const ConvGeometry& g, int m, int64_t blocks_m, int64_t first_out, size_t element_bytes,
                          int64_t shared_limit) {
  ConvPlan p;
  p.m = m, p.blocks_m = blocks_m, p.first_out = first_out;
  const int64_t chunk_channels = kChunkBytes / static_cast<int64_t>(element_bytes);
  p.chunks = divide_up(g.channels_in, chunk_channels);
  const int64_t height = (kConvRows - 1) * g.stride + 2 * g.dilation + 1, width = (kConvColumns - 1) * g.stride + 2 * g.dilation + 1;
  p.shares_rows = g.stride == 1 && (g.dilation == 1 || g.dilation == 2 || g.dilation == 4);
  const int64_t tiles = divide_up(g.out_height, kConvRows) * divide_up(g.out_width, kConvColumns) * g.batch;
  if (height * width * kChunkBytes > shared_limit || tiles > 0x7fffffff || g.groups > 65535 || blocks_m > 65535) return p;
  p.patch_height = static_cast<int>(height), p.patch_width = static_cast<int>(width);
  const int64_t stage = conv_patch_bytes(p) + conv_weight_bytes(p);
  p.stages = static_cast<int>(std::min<int64_t>({3, shared_limit / stage, p.chunks}));
  // The results pass through shared memory on their way out.
  const int64_t epilogue = int64_t{kConvWarps} * 16 * 72 * 4;
  p.plan.grid[0] = static_cast<uint32_t>(tiles);
  p.plan.grid[1] = static_cast<uint32_t>(blocks_m);
  p.plan.grid[2] = static_cast<uint32_t>(g.groups);
  p.plan.block[0] = kConvWarps * 32;
  p.plan.shared_bytes = static_cast<uint32_t>(std::max(p.stages * stage, epilogue));
  return p;
}

// The output channels of a group in blocks of 48, and what remains in one block as small as possible: 80 = 48 + 32.
struct ConvParts {
  ConvPlan parts[2];
};

inline ConvParts conv_plan(const ConvGeometry& g, size_t element_bytes, int64_t shared_limit) {
  const int64_t full = g.channels_out / (16 * kLargestM), rest = g.channels_out % (16 * kLargestM);
  const int rest_m = static_cast<int>(divide_up(rest, 16));
  ConvParts result;
  if (full + (rest_m == kLargestM ? 1 : 0) > 0)
    result.parts[0] = conv_part(g, kLargestM, full + (rest_m == kLargestM ? 1 : 0), 0, element_bytes, shared_limit);
  if (rest_m > 0 && rest_m < kLargestM)
    result.parts[1] = conv_part(g, rest_m, 1, full * 16 * kLargestM, element_bytes, shared_limit);
  return result;
}

// Backward of shuffle and PReLU: blockIdx.x is a channel, or 32 of them where channels lie together; blockIdx.y a slice of pixels.
constexpr int64_t kBusyBlocks = 1024;

inline Plan activation_plan(int64_t pixels, int64_t channels, bool channels_together) {
  Plan plan;
  const int64_t blocks = channels_together ? divide_up(channels, 32) : channels;
  plan.grid[0] = static_cast<uint32_t>(blocks);
  plan.grid[1] = static_cast<uint32_t>(std::clamp<int64_t>(std::min(divide_up(kBusyBlocks, blocks), divide_up(pixels, 2048)), 1, 1024));
  plan.block[0] = kThreads;
  return plan;
}

// Gradient of the weights: blockIdx.x is a block of kPairs x kPairs output and input channels, blockIdx.y a slice of the tiles.
constexpr int kPairs = 8, kGradRows = 8, kGradColumns = 32, kQuarters = 4;

struct WeightGradPlan {
  Plan plan;
  int64_t slices;
  int patch_height = 0, patch_width = 0;  // 0: the patch does not fit into shared memory
};

inline WeightGradPlan weight_grad_plan(const ConvGeometry& g, size_t bytes_of_real, int64_t shared_limit) {
  WeightGradPlan p;
  const int64_t blocks = divide_up(g.channels_out, kPairs) * divide_up(g.channels_in, kPairs);
  const int64_t tiles = divide_up(g.out_height, kGradRows) * divide_up(g.out_width, kGradColumns) * g.batch;
  p.slices = std::clamp<int64_t>(std::min(divide_up(kBusyBlocks, blocks * g.groups), tiles), 1, 65535);
  const int64_t height = (kGradRows - 1) * g.stride + 2 * g.dilation + 1, width = (kGradColumns - 1) * g.stride + 2 * g.dilation + 1;
  const int64_t grads = kPairs * (kGradRows * kGradColumns + 1), meeting = int64_t{kTaps} * kPairs * kPairs;
  int64_t patch = kPairs * ((height * width) | 1);
  if ((grads + patch) * static_cast<int64_t>(bytes_of_real) <= shared_limit) {
    p.patch_height = static_cast<int>(height), p.patch_width = static_cast<int>(width);
  } else {
    patch = kPairs;
  }
  p.plan.grid[0] = static_cast<uint32_t>(blocks);
  p.plan.grid[1] = static_cast<uint32_t>(p.slices);
  p.plan.grid[2] = static_cast<uint32_t>(g.groups);
  p.plan.block[0] = kThreads;
  p.plan.shared_bytes = static_cast<uint32_t>(std::max(grads + patch, meeting) * static_cast<int64_t>(bytes_of_real));
  return p;
}

}  // namespace safnet::cuda
