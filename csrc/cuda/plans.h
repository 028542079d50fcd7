// Launch plans: grid, block, shared memory and the choice of kernel variant, from sizes alone. Plain C++, no CUDA
// types.
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

// backward_warp forward over planes: the channels are split over blockIdx.y until the device has enough threads, but
// not so far that reading the flow again (from cache) weighs.
inline Plan warp_forward_plan(int64_t items, int64_t channels) {
  constexpr int64_t kEnoughThreads = 1 << 18, kLeastChannels = 8;
  const int64_t wanted = divide_up(kEnoughThreads, std::max<int64_t>(items, 1));
  Plan plan = elementwise_plan(items);
  plan.grid[1] = static_cast<uint32_t>(std::clamp<int64_t>(std::min(wanted, channels / kLeastChannels), 1, 65535));
  return plan;
}

// backward_warp backward: a block holds kThreads / slices pixels; each slice of threads takes every slices-th channel,
// and the slices' sums for the flow meet in shared memory.
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

// group_conv_shuffle. A block computes 32 rows x 16 columns of the result for 8 n output channels of a group, and walks
// over the input channels in chunks of 32 bytes a pixel: the chunk's patch of the input and all its weights lie in
// shared memory, in `stages` buffers, so that copies of the next chunks overlap the products of this one.
constexpr int kConvRows = 32, kConvColumns = 16, kConvWarps = 4, kConvWarpRows = 8;
constexpr int kChunkBytes = 32, kPieceBytes = 16;  // channels of one pixel: of a stage, and of one 16-byte access
constexpr int kTaps = 9;

struct ConvGeometry {
  int64_t batch, in_height, in_width, out_height, out_width;  // in: after upsampling
  int64_t channels_in, channels_out, groups;                  // channels of one group
  int64_t stride, dilation;
};

struct ConvPlan {
  Plan plan;
  int n = 0;           // 8-channel blocks of a thread block
  int64_t blocks = 0;  // thread blocks over the output channels of a group
  int64_t chunks = 0;
  int stages = 0;  // 0: a stage does not fit into shared memory; the direct kernel has to do it
  int patch_height = 0, patch_width = 0;
  bool shares_rows = false;  // rows of a warp lie `dilation` apart, so that three taps read each row of the patch
};

// Sizes of a patch for a tile of the result; columns are dealt by their remainder modulo the stride.
inline int64_t patch_height(const ConvGeometry& g, int64_t rows) { return (rows - 1) * g.stride + 2 * g.dilation + 1; }
inline int64_t patch_width(const ConvGeometry& g, int64_t columns) {
  return divide_up((columns - 1) * g.stride + 2 * g.dilation + 1, g.stride) * g.stride;
}

inline int64_t conv_weight_bytes(int n) { return int64_t{kTaps} * n * 8 * kChunkBytes; }

// How many 8-channel blocks a thread block takes: of the sizes there are, the one that wastes least. 40 = 5 blocks, 80
// = 2 x 5.
inline int channel_blocks(int64_t channels_out) {
  constexpr int kLargest = 5;
  const int64_t blocks = divide_up(channels_out, 8 * kLargest), each = divide_up(divide_up(channels_out, 8), blocks);
  return each <= 2 ? static_cast<int>(each) : each <= 4 ? 4 : kLargest;
}

// `staged`: results pass through shared memory on their way out.
inline ConvPlan conv_plan(const ConvGeometry& g, int n, bool staged, size_t element_bytes, int64_t shared_limit) {
  ConvPlan p;
  p.n = n;
  p.blocks = divide_up(g.channels_out, 8 * n);
  p.chunks = divide_up(g.channels_in, kChunkBytes / static_cast<int64_t>(element_bytes));
  p.shares_rows = g.stride == 1 && (g.dilation == 1 || g.dilation == 2 || g.dilation == 4);
  const int64_t height = patch_height(g, kConvRows), width = patch_width(g, kConvColumns);
  const int64_t tiles = divide_up(g.out_height, kConvRows) * divide_up(g.out_width, kConvColumns) * g.batch;
  const int64_t stage = height * width * kChunkBytes + conv_weight_bytes(n);
  if (height > shared_limit || stage > shared_limit || tiles * p.blocks > 0x7fffffff || g.groups > 65535) return p;
  p.patch_height = static_cast<int>(height), p.patch_width = static_cast<int>(width);
  // Two blocks on an SM hide each other's latency, if each still overlaps copies and products.
  const int64_t limit = shared_limit / 2 >= 2 * stage ? shared_limit / 2 : shared_limit;
  p.stages = static_cast<int>(std::min<int64_t>({3, limit / stage, p.chunks}));
  const int64_t warp_pixels = int64_t{kConvWarpRows} * 16, pieces = kPieceBytes / static_cast<int64_t>(element_bytes);
  const int64_t results = kConvWarps * 8 * n * (warp_pixels + pieces) * static_cast<int64_t>(element_bytes);
  p.plan.grid[0] = static_cast<uint32_t>(tiles * p.blocks);
  p.plan.grid[1] = static_cast<uint32_t>(g.groups);
  p.plan.block[0] = kConvWarps * 32;
  p.plan.shared_bytes = static_cast<uint32_t>(std::max(p.stages * stage, staged ? results : 0));
  return p;
}

// Weights of a launch: blocks of `parts` cover one chunk of one thread block's weights.
struct PackPlan {
  Plan plan;
  int64_t bytes;
  int parts;
};

inline PackPlan pack_plan(const ConvPlan& conv, int64_t groups, size_t element_bytes) {
  PackPlan p;
  const int64_t pieces = groups * conv.blocks * conv.chunks;
  p.bytes = pieces * conv_weight_bytes(conv.n);
  p.parts = static_cast<int>(divide_up(conv_weight_bytes(conv.n) / static_cast<int64_t>(element_bytes), kThreads));
  p.plan.grid[0] = static_cast<uint32_t>(pieces * p.parts);
  p.plan.block[0] = kThreads;
  return p;
}

// Backward of shuffle and PReLU: blockIdx.x is a channel, or 32 of them where channels lie together; blockIdx.y a slice
// of pixels.
constexpr int64_t kBusyBlocks = 1024;

inline Plan activation_plan(int64_t pixels, int64_t channels, bool channels_together) {
  Plan plan;
  const int64_t blocks = channels_together ? divide_up(channels, 32) : channels;
  plan.grid[0] = static_cast<uint32_t>(blocks);
  plan.grid[1] = static_cast<uint32_t>(
      std::clamp<int64_t>(std::min(divide_up(kBusyBlocks, blocks), divide_up(pixels, 2048)), 1, 1024));
  plan.block[0] = kThreads;
  return plan;
}

// Gradient of the weights: blockIdx.x is a block of output and input channels, blockIdx.y a slice of the tiles. In
// plain arithmetic kPairs x kPairs channels and tiles of kGradRows rows; on tensor cores 8 n x 16 channels.
constexpr int kPairs = 8, kGradRows = 8, kGradColumns = 32, kQuarters = 4, kGradWarps = 8;

struct WeightGradientPlan {
  Plan plan;
  int64_t slices;
  int patch_height = 0, patch_width = 0;    // 0: the patch does not fit into shared memory
  int n = 0, rows = kGradRows, stages = 0;  // on tensor cores; no stages: impossible
};

inline WeightGradientPlan weight_gradient_tensor_plan(const ConvGeometry& g, int n, size_t element_bytes,
                                                      int64_t shared_limit, int64_t multiprocessors) {
  constexpr int64_t kIn = 16;
  WeightGradientPlan p;
  p.n = n;
  const int64_t blocks = divide_up(g.channels_out, 8 * n) * divide_up(g.channels_in, kIn);
  const int64_t width = patch_width(g, kGradColumns), chunks = divide_up(n, 2);
  const auto stage = [&](int64_t rows) {
    return (patch_height(g, rows) * width + chunks * rows * kGradColumns) * kChunkBytes;
  };
  // 16 rows amortise the halo better; 8, where only so two stages fit.
  p.rows = 2 * stage(16) <= shared_limit ? 16 : 8;
  const int64_t meeting = int64_t{kGradWarps / 2} * kTaps * n * 4 * 32 * 4;
  const int64_t tiles = divide_up(g.out_height, p.rows) * divide_up(g.out_width, kGradColumns) * g.batch;
  if (element_bytes != 2 || width > shared_limit || stage(p.rows) > shared_limit || meeting > shared_limit) return p;
  if (tiles > 0x7fffffff - 65535 || blocks > 0x7fffffff || g.groups > 65535) return p;
  p.stages = static_cast<int>(std::min<int64_t>(3, shared_limit / stage(p.rows)));
  // One block fits on an SM: two waves of them.
  p.slices = std::clamp<int64_t>(std::min(2 * multiprocessors / (blocks * g.groups), tiles), 1, 65535);
  p.patch_height = static_cast<int>(patch_height(g, p.rows)), p.patch_width = static_cast<int>(width);
  p.plan.grid[0] = static_cast<uint32_t>(blocks);
  p.plan.grid[1] = static_cast<uint32_t>(p.slices);
  p.plan.grid[2] = static_cast<uint32_t>(g.groups);
  p.plan.block[0] = kGradWarps * 32;
  p.plan.shared_bytes = static_cast<uint32_t>(std::max(p.stages * stage(p.rows), meeting));
  return p;
}

inline WeightGradientPlan weight_gradient_plan(const ConvGeometry& g, size_t bytes_of_real, int64_t shared_limit) {
  WeightGradientPlan p;
  const int64_t blocks = divide_up(g.channels_out, kPairs) * divide_up(g.channels_in, kPairs);
  const int64_t tiles = divide_up(g.out_height, kGradRows) * divide_up(g.out_width, kGradColumns) * g.batch;
  p.slices = std::clamp<int64_t>(std::min(divide_up(kBusyBlocks, blocks * g.groups), tiles), 1, 65535);
  const int64_t height = (kGradRows - 1) * g.stride + 2 * g.dilation + 1,
                width = (kGradColumns - 1) * g.stride + 2 * g.dilation + 1;
  const int64_t grads = kPairs * (kGradRows * kGradColumns + 1), meeting = int64_t{kTaps} * kPairs * kPairs;
  int64_t patch = kPairs * ((height * width) | 1);
  if ((grads + patch) * static_cast<int64_t>(bytes_of_real) <= shared_limit) {
    p.patch_height = static_cast<int>(height), p.patch_width = static_cast<int>(width);
  } else {
    patch = kPairs;
  }
  p.plan.grid[0] = static_cast<uint32_t>(blocks * g.groups);  // z has room for 65535 groups only
  p.plan.grid[1] = static_cast<uint32_t>(p.slices);
  p.plan.block[0] = kThreads;
  p.plan.shared_bytes = static_cast<uint32_t>(std::max(grads + patch, meeting) * static_cast<int64_t>(bytes_of_real));
  return p;
}

}  // namespace safnet::cuda
