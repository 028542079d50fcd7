// group_conv_shuffle on CUDA: implicit GEMM (conv_tiles.cuh), its backward, and the preparation of the weights.
#include "cuda/conv_tiles.cuh"
#include "cuda/host.h"

namespace safnet::cuda {

template <class T, class Index, int kM, bool kSharesRows>
__global__ void __launch_bounds__(kConvWarps * 32, 1) convolve_tensor(const __grid_constant__ ConvArguments<T, Index> a) {
  convolve_tile<TensorSums<T, kM, kSharesRows>, kM>(a);
}

template <class T, class Index, int kM>
__global__ void __launch_bounds__(kConvWarps * 32, 1) convolve_plain(const __grid_constant__ ConvArguments<T, Index> a) {
  convolve_tile<PlainSums<T, kM>, kM>(a);
}

// The weights of a launch, as stages want them: [group][block][chunk][step][dy][output channel][piece][channel], rounded to
// TF32 where that is what multiplies. `transposed`: for the gradient of the input, which convolves with swapped channels and
// mirrored taps.
template <class T>
struct PackArguments {
  const T* weight;
  int64_t out, in, y, x;  // strides
  int32_t channels_in, channels_out, chunks, rows, first_out, blocks_m;  // rows: output channels of a block
  bool transposed, tf32;
};

template <class T>
__device__ __forceinline__ Real<T> weight_at(const PackArguments<T>& a, int group, int out, int in, int dy, int dx) {
  if (out >= a.channels_out || in >= a.channels_in || dx > 2) return 0;
  const int64_t first = a.transposed ? int64_t{group} * a.channels_in + in : int64_t{group} * a.channels_out + out;
  const int64_t second = a.transposed ? out : in;
  if (a.transposed) dy = 2 - dy, dx = 2 - dx;
  return to_real(__ldg(a.weight + first * a.out + second * a.in + dy * a.y + dx * a.x));
}

template <class T>
__global__ void __launch_bounds__(kThreads) pack_weights(const __grid_constant__ PackArguments<T> a, T* packed, int64_t count) {
  constexpr int kPiece = kPieceBytes / sizeof(T);
  const int64_t i = thread_item<int64_t>();
  if (i >= count) return;
  const int k = static_cast<int>(i % kPiece), slot = static_cast<int>(i / kPiece % 2);
  const auto row = static_cast<int>(i / (2 * kPiece) % (kTaps * a.rows));
  int64_t rest = i / (2 * kPiece) / (kTaps * a.rows);
  const int chunk = static_cast<int>(rest % a.chunks);
  rest /= a.chunks;
  const int block = static_cast<int>(rest % a.blocks_m), group = static_cast<int>(rest / a.blocks_m);
  const int which = slot ^ (row >> 2 & 1), out = row % a.rows, dy = row / a.rows % 3, step = row / a.rows / 3;
  const bool one_piece = a.channels_in - chunk * 2 * kPiece <= kPiece;
  const ProductHalf half = product_half(one_piece, step, which);
  const int in = chunk * 2 * kPiece + half.piece * kPiece + k;
  const auto value = weight_at(a, group, a.first_out + block * a.rows + out, in, dy, half.dx);
  if constexpr (std::is_same_v<T, float>) {
    packed[i] = a.tf32 ? __uint_as_float(round_to_tf32(__float_as_uint(value))) : value;
  } else {
    packed[i] = from_real<T>(value);
  }
}

// Any geometry, without shared memory: for dilations and strides whose patch does not fit. A thread computes one value.
template <class T, class Index>
struct DirectArguments {
  ConvArguments<T, Index> conv;
  PackArguments<T> weights;
  int32_t groups;
  int64_t items;
};

template <class T, class Index>
__global__ void __launch_bounds__(kThreads) convolve_direct(const __grid_constant__ DirectArguments<T, Index> d) {
  using R = Real<T>;
  const ConvArguments<T, Index>& a = d.conv;
  const int64_t item = thread_item<int64_t>();
  if (item >= d.items) return;
  const int32_t channels = a.channels_out * d.groups;
  const int x = static_cast<int>(item % a.out_width), y = static_cast<int>(item / a.out_width % a.out_height);
  const int64_t rest = item / a.out_width / a.out_height;
  const int channel = static_cast<int>(rest % channels);
  const Index n = static_cast<Index>(rest / channels);
  const int group = channel / a.channels_out, out = channel - group * a.channels_out;
  R sum = 0;
  for (int dy = 0; dy < 3; ++dy) {
    for (int dx = 0; dx < 3; ++dx) {
      int64_t in_y = int64_t{y} * a.stride + (int64_t{dy} - 1) * a.dilation, in_x = int64_t{x} * a.stride + (int64_t{dx} - 1) * a.dilation;
      if (in_y < 0 || in_y >= a.in_height || in_x < 0 || in_x >= a.in_width) continue;
      if (in_y % a.upsample != 0 || in_x % a.upsample != 0) continue;
      const T* source = a.input.data + a.input.at(n, static_cast<Index>(in_y / a.upsample), static_cast<Index>(in_x / a.upsample)) +
                        static_cast<Index>(group) * a.channels_in * a.input.c;
      for (int in = 0; in < a.channels_in; ++in)
        sum = fma(to_real(__ldg(source + in * a.input.c)), weight_at(d.weights, group, out, in, dy, dx), sum);
    }
  }
  store_result(a, n, y, x, group, out, sum);
}

// Backward of shuffle and PReLU: the gradient before them, and one slice's sums for bias and slope of one channel. Lanes are
// pixels, or channels where those lie together.
template <class T, class Index>
struct ActivationArguments {
  View<T, Index> grad, preactivation, out;  // no preactivation: no PReLU; no out: only the sums
  const T* prelu;
  int32_t prelu_step;
  Real<T>* partial;  // [slice][bias, slope][channel]; may be absent
  int32_t channels, groups, height, width;
  int64_t pixels;
};

template <class T, class Index, bool kChannelLanes>
__global__ void __launch_bounds__(kThreads) activation_backward(const __grid_constant__ ActivationArguments<T, Index> a) {
  using R = Real<T>;
  __shared__ R sums[2][kThreads];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int channel = kChannelLanes ? blockIdx.x * 32 + lane : blockIdx.x;
  const int per_group = a.channels / a.groups, group = channel / per_group;
  const Index shuffled = a.groups > 1 ? (channel - group * per_group) * a.groups + group : channel;
  const bool active = channel < a.channels;
  const R slope = active && a.prelu != nullptr ? to_real(__ldg(a.prelu + channel * a.prelu_step)) : R(1);
  const int64_t slice = (a.pixels + gridDim.y - 1) / gridDim.y;
  const int64_t begin = slice * blockIdx.y, end = min(begin + slice, a.pixels);
  R sum_bias = 0, sum_slope = 0;
  for (int64_t i = begin + (kChannelLanes ? warp : threadIdx.x); active && i < end; i += kChannelLanes ? kThreads / 32 : kThreads) {
    const PixelRun<Index> pixel = pixel_run<1>(static_cast<Index>(i), a.height, a.width);
    R grad = to_real(__ldg(a.grad.data + a.grad.at(pixel.n, pixel.y, pixel.x) + shuffled * a.grad.c));
    if (a.preactivation.data != nullptr) {
      const R before =
          to_real(__ldg(a.preactivation.data + a.preactivation.at(pixel.n, pixel.y, pixel.x) + channel * a.preactivation.c));
      if (!(before > 0)) sum_slope += grad * before, grad *= slope;
    }
    sum_bias += grad;
    if (a.out.data != nullptr) a.out.data[a.out.at(pixel.n, pixel.y, pixel.x) + channel * a.out.c] = from_real<T>(grad);
  }
  if (a.partial == nullptr) return;
  sums[0][threadIdx.x] = sum_bias, sums[1][threadIdx.x] = sum_slope;
  __syncthreads();
  // Channel lanes: the eight warps of each lane; else all threads, by halves.
  for (int distance = kThreads / 2; distance >= (kChannelLanes ? 32 : 1); distance /= 2) {
    if (threadIdx.x < distance) {
      sums[0][threadIdx.x] += sums[0][threadIdx.x + distance];
      sums[1][threadIdx.x] += sums[1][threadIdx.x + distance];
    }
    __syncthreads();
  }
  if (active && threadIdx.x < (kChannelLanes ? 32 : 1)) {
    a.partial[(int64_t{blockIdx.y} * 2) * a.channels + channel] = sums[0][threadIdx.x];
    a.partial[(int64_t{blockIdx.y} * 2 + 1) * a.channels + channel] = sums[1][threadIdx.x];
  }
}

// Adds the slices' sums in order. Item: one of `count` results, each of which has `slices` parts `pitch` apart.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_slices(const Real<T>* partial, int64_t pitch, int32_t slices, T* out, int64_t count) {
  const int64_t i = thread_item<int64_t>();
  if (i >= count) return;
  Real<T> sum = 0;
  for (int slice = 0; slice < slices; ++slice) sum += partial[slice * pitch + i];
  out[i] = from_real<T>(sum);
}

// Gradient of the weights: a block holds 8 x 8 pairs of output and input channels of one group, and walks over the tiles of one
// slice of the pixels; a thread sums all nine taps of one pair over a quarter of a tile's rows.
template <class T, class Index>
struct WeightGradArguments {
  View<T, Index> input, grad;  // grad: before PReLU and shuffle
  Real<T>* partial;            // [slice][weight]
  int32_t in_height, in_width, out_height, out_width, tiles_x, tiles_y;
  int64_t tiles;  // of all pictures
  int32_t channels_in, channels_out, blocks_in, stride, dilation, patch_height, patch_width;
};

template <class T, class Index>
__global__ void __launch_bounds__(kThreads, 2) weight_gradient(const __grid_constant__ WeightGradArguments<T, Index> a) {
  using R = Real<T>;
  extern __shared__ __align__(128) unsigned char shared[];
  const int patch_size = a.patch_height * a.patch_width;
  const int pitch_patch = patch_size | 1, pitch_grad = kGradRows * kGradColumns + 1;  // odd: channels in different banks
  R *grads = reinterpret_cast<R*>(shared), *patch = grads + kPairs * pitch_grad;
  const int group = blockIdx.z, first_out = blockIdx.x / a.blocks_in * kPairs, first_in = blockIdx.x % a.blocks_in * kPairs;
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
          valid ? to_real(__ldg(a.grad.data + a.grad.at(n, Index(y), Index(x)) +
                                (static_cast<Index>(group) * a.channels_out + channel) * a.grad.c))
                : R(0);
    }
    const auto input_at = [&](int channel, int64_t y, int64_t x) {
      const bool valid = y >= 0 && y < a.in_height && x >= 0 && x < a.in_width && channel < a.channels_in;
      return valid ? to_real(__ldg(a.input.data + a.input.at(n, static_cast<Index>(y), static_cast<Index>(x)) +
                                   (static_cast<Index>(group) * a.channels_in + channel) * a.input.c))
                   : R(0);
    };
    const int64_t in_top = int64_t{top} * a.stride - a.dilation, in_left = int64_t{left} * a.stride - a.dilation;
    for (int i = threadIdx.x; i < kPairs * patch_size; i += kThreads) {
      const int c = i / patch_size, position = i - c * patch_size, row = position / a.patch_width;
      patch[c * pitch_patch + position] = input_at(first_in + c, in_top + row, in_left + position - row * a.patch_width);
    }
    __syncthreads();
    constexpr int kRows = kGradRows / kQuarters;
    for (int pixel = 0; pixel < kRows * kGradColumns; ++pixel) {
      const int y = quarter * kRows + pixel / kGradColumns, x = pixel % kGradColumns;
      const R grad = grads[out * pitch_grad + y * kGradColumns + x];
      if (patch_size == 0) {  // it does not fit into shared memory
        for (int tap = 0; tap < kTaps; ++tap) {
          const int64_t shift_y = int64_t{tap / 3} * a.dilation, shift_x = int64_t{tap % 3} * a.dilation;
          sums[tap] = fma(grad, input_at(first_in + in, in_top + y * a.stride + shift_y, in_left + x * a.stride + shift_x), sums[tap]);
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
  const int64_t weights = int64_t{gridDim.z} * a.channels_out * a.channels_in * kTaps;
  const int64_t place = ((int64_t{group} * a.channels_out + first_out + out) * a.channels_in + first_in + in) * kTaps;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) a.partial[blockIdx.y * weights + place + tap] = sums[tap];
}

// ---- host ----

struct DeviceLimits {
  int capability, shared_bytes;
};

DeviceLimits device_limits() {
  int device = 0, major = 0, minor = 0, shared = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return {major * 10 + minor, shared};
}

// float32 is exact unless SAFNET_OPS_TF32=1 lets tensor cores round its factors to 10 bits.
bool tf32_allowed() {
  const char* wish = std::getenv("SAFNET_OPS_TF32");
  return wish != nullptr && wish[0] == '1';
}

// One convolution: forward, or the gradient of the input.
struct Convolution {
  const char* name;
  const Tensor &input, &weight, &out;
  const std::optional<Tensor>&bias, &prelu, &residual;
  const Tensor* preactivation;  // where to leave it
  ConvGeometry geometry;
  int upsample, shuffle_groups;
  bool transposed;
};

template <class T, class Index>
ConvArguments<T, Index> conv_arguments(const Convolution& c) {
  ConvArguments<T, Index> a{};
  const ConvGeometry& g = c.geometry;
  a.input = view<T, Index>(c.input);
  a.residual = view<T, Index>(c.residual);
  a.out = view<T, Index>(c.out);
  if (c.preactivation != nullptr) a.preactivation = view<T, Index>(*c.preactivation);
  if (c.bias) a.bias = static_cast<const T*>(c.bias->data_ptr()), a.bias_step = static_cast<int32_t>(c.bias->stride(0));
  if (c.prelu) a.prelu = static_cast<const T*>(c.prelu->data_ptr()), a.prelu_step = static_cast<int32_t>(c.prelu->stride(0));
  a.in_height = static_cast<int32_t>(g.in_height), a.in_width = static_cast<int32_t>(g.in_width), a.upsample = c.upsample;
  a.out_height = static_cast<int32_t>(g.out_height), a.out_width = static_cast<int32_t>(g.out_width);
  a.tiles_x = static_cast<int32_t>(divide_up(g.out_width, kConvColumns));
  a.tiles_y = static_cast<int32_t>(divide_up(g.out_height, kConvRows));
  a.channels_in = static_cast<int32_t>(g.channels_in), a.channels_out = static_cast<int32_t>(g.channels_out);
  a.stride = static_cast<int32_t>(g.stride), a.dilation = static_cast<int32_t>(g.dilation);
  a.shuffle_groups = c.shuffle_groups;
  return a;
}

template <class T>
PackArguments<T> pack_arguments(const Convolution& c) {
  PackArguments<T> a{};
  a.weight = static_cast<const T*>(c.weight.data_ptr());
  a.out = c.weight.stride(0), a.in = c.weight.stride(1), a.y = c.weight.stride(2), a.x = c.weight.stride(3);
  a.channels_in = static_cast<int32_t>(c.geometry.channels_in), a.channels_out = static_cast<int32_t>(c.geometry.channels_out);
  a.transposed = c.transposed;
  return a;
}

// Whether a group's channels of every pixel come in aligned pieces of 16 bytes.
bool comes_in_pieces(const Tensor& input, int64_t channels_of_group) {
  const auto bytes = static_cast<int64_t>(input.element_size());
  if (input.stride(1) != 1 || channels_of_group * bytes % kPieceBytes != 0) return false;
  if (reinterpret_cast<uintptr_t>(input.data_ptr()) % kPieceBytes != 0) return false;
  for (int i : {0, 2, 3})
    if (input.size(i) > 1 && input.stride(i) * bytes % kPieceBytes != 0) return false;
  return true;
}

// The size of block where there is one variant only: for 64-bit offsets and for double, whose sums take two registers each.
template <class T>
constexpr int kOnlyM = sizeof(T) == 8 ? 2 : kLargestM;

template <class T, class Index>
auto tensor_kernel(int m, bool shares_rows) {
  if constexpr (sizeof(Index) == 8) return &convolve_tensor<T, Index, kOnlyM<T>, false>;
  else if (shares_rows) return m == 1 ? &convolve_tensor<T, Index, 1, true> : m == 2 ? &convolve_tensor<T, Index, 2, true> : &convolve_tensor<T, Index, 3, true>;
  else return m == 1 ? &convolve_tensor<T, Index, 1, false> : m == 2 ? &convolve_tensor<T, Index, 2, false> : &convolve_tensor<T, Index, 3, false>;
}

template <class T, class Index>
auto plain_kernel(int m) {
  if constexpr (sizeof(T) == 4 && sizeof(Index) == 4)
    return m == 1 ? &convolve_plain<T, Index, 1> : m == 2 ? &convolve_plain<T, Index, 2> : &convolve_plain<T, Index, 3>;
  else return &convolve_plain<T, Index, kOnlyM<T>>;
}

template <class T, class Index, class Kernel>
void launch_part(const Convolution& c, const ConvPlan& part, Kernel kernel, bool tf32, cudaStream_t stream) {
  PackArguments<T> pack = pack_arguments<T>(c);
  pack.chunks = static_cast<int32_t>(part.chunks), pack.rows = part.m * 16, pack.first_out = static_cast<int32_t>(part.first_out);
  pack.blocks_m = static_cast<int32_t>(part.blocks_m), pack.tf32 = tf32;
  const int64_t bytes = c.geometry.groups * part.blocks_m * part.chunks * conv_weight_bytes(part);
  const Tensor packed = allocate({bytes}, ScalarType::Byte, c.input);
  const int64_t count = bytes / static_cast<int64_t>(sizeof(T));
  launch(c.name, &pack_weights<T>, elementwise_plan(count), stream, pack, static_cast<T*>(packed.data_ptr()), count);
  ConvArguments<T, Index> a = conv_arguments<T, Index>(c);
  a.weights = static_cast<const unsigned char*>(packed.data_ptr());
  a.first_out = static_cast<int32_t>(part.first_out), a.chunks = static_cast<int32_t>(part.chunks), a.stages = part.stages;
  a.patch_height = part.patch_height, a.patch_width = part.patch_width;
  a.copies_pieces = comes_in_pieces(c.input, c.geometry.channels_in);
  launch(c.name, kernel, part.plan, stream, a);
}

template <class T, class Index>
void launch_direct(const Convolution& c, cudaStream_t stream) {
  const ConvGeometry& g = c.geometry;
  DirectArguments<T, Index> a{conv_arguments<T, Index>(c), pack_arguments<T>(c), static_cast<int32_t>(g.groups),
                              g.batch * g.groups * g.channels_out * g.out_height * g.out_width};
  launch(c.name, &convolve_direct<T, Index>, elementwise_plan(a.items), stream, a);
}

void convolve(const Convolution& c, cudaStream_t stream) {
  if (c.out.numel() == 0) return;
  const DeviceLimits limits = device_limits();
  const bool wide = needs_64bit_offsets({&c.input, &c.out, c.residual ? &*c.residual : nullptr});
  for_type(c.input, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr bool kHalf = sizeof(T) == 2;
    const bool tf32 = std::is_same_v<T, float> && tf32_allowed() && limits.capability >= 80;
    const bool tensor = std::is_same_v<T, Half> || (std::is_same_v<T, BFloat16> && limits.capability >= 80) || tf32;
    for_index(wide, [&](auto index) {
      using Index = typename decltype(index)::type;
      ConvParts plan = conv_plan(c.geometry, sizeof(T), limits.shared_bytes);
      if (wide || sizeof(T) == 8) {
        constexpr int kM = kOnlyM<T>;
        plan.parts[0] = conv_part(c.geometry, kM, divide_up(c.geometry.channels_out, 16 * kM), 0, sizeof(T), limits.shared_bytes);
        plan.parts[1] = {};
      }
      const auto impossible = [](const ConvPlan& part) { return part.m > 0 && part.stages == 0; };
      // Halves without the tensor cores for them (bfloat16 before sm_80) have no kernel of their own.
      if (impossible(plan.parts[0]) || impossible(plan.parts[1]) || (kHalf && !tensor)) {
        launch_direct<T, Index>(c, stream);
        return;
      }
      for (const ConvPlan& part : plan.parts) {
        if (part.m == 0) continue;
        if constexpr (kHalf) {
          launch_part<T, Index>(c, part, tensor_kernel<T, Index>(part.m, part.shares_rows), false, stream);
        } else if constexpr (std::is_same_v<T, float>) {
          const auto kernel = tf32 ? tensor_kernel<T, Index>(part.m, part.shares_rows) : plain_kernel<T, Index>(part.m);
          launch_part<T, Index>(c, part, kernel, tf32, stream);
        } else {
          launch_part<T, Index>(c, part, plain_kernel<T, Index>(part.m), false, stream);
        }
      }
    });
  });
}

int64_t out_side(int64_t side, int64_t stride) { return (side + stride - 1) / stride; }

std::tuple<Tensor, Tensor> group_conv_shuffle(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                              const std::optional<Tensor>& prelu_weight, const std::optional<Tensor>& residual,
                                              int64_t groups, int64_t stride, int64_t dilation, bool save_preactivation) {
  const DeviceScope scope(input);
  const ConvGeometry geometry{input.size(0), input.size(2), input.size(3), out_side(input.size(2), stride),
                              out_side(input.size(3), stride), weight.size(1), weight.size(0) / groups, groups, stride, dilation};
  const std::vector<int64_t> size{geometry.batch, weight.size(0), geometry.out_height, geometry.out_width};
  const Tensor out = allocate(size, input.scalar_type(), input, is_channels_last(input));
  const Tensor preactivation = save_preactivation ? allocate(size, input.scalar_type(), input, is_channels_last(input)) : no_gradient(input);
  convolve({"group_conv_shuffle", input, weight, out, bias, prelu_weight, residual, save_preactivation ? &preactivation : nullptr,
            geometry, 1, static_cast<int>(groups), false},
           scope.stream);
  return {out, preactivation};
}

enum ConvInput { kConvImage, kConvWeight, kConvBias, kConvPrelu, kConvResidual };

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> group_conv_shuffle_backward(
    const Tensor& grad, const Tensor& preactivation, const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& prelu_weight, int64_t groups, int64_t stride, int64_t dilation, int64_t needs, bool) {
  const DeviceScope scope(input);
  const cudaStream_t stream = scope.stream;
  const auto need = [&](ConvInput i) { return (needs >> i & 1) != 0; };
  const ScalarType type = input.scalar_type(), real = real_type(input);
  const int64_t channels = weight.size(0);
  const auto maybe = [&](bool needed, const std::vector<int64_t>& size, bool channels_last = false) {
    return needed ? allocate(size, type, input, channels_last) : no_gradient(input);
  };
  const Tensor grad_input = empty_gradient(input, need(kConvImage));
  const auto weight_size = weight.sizes();
  const Tensor grad_weight = maybe(need(kConvWeight), {weight_size.begin(), weight_size.end()});
  const Tensor grad_bias = maybe(need(kConvBias), {channels});
  const Tensor grad_prelu = maybe(need(kConvPrelu) && prelu_weight.has_value(), {channels});
  const auto grad_size = grad.sizes();
  const bool convolves = need(kConvImage) || need(kConvWeight);
  Tensor before = grad;  // the gradient before PReLU and shuffle
  const bool rewrites = need(kConvResidual) || (convolves && (prelu_weight.has_value() || groups > 1));
  if (rewrites) before = allocate({grad_size.begin(), grad_size.end()}, type, input, is_channels_last(input));
  const Tensor grad_residual = need(kConvResidual) ? before : no_gradient(input);
  const auto result = std::make_tuple(grad_input, grad_weight, grad_bias, grad_prelu, grad_residual);
  if (grad.numel() == 0) {
    for (const Tensor* tensor : {&grad_input, &grad_weight, &grad_bias, &grad_prelu}) zero(*tensor, stream);
    return result;
  }
  const std::optional<Tensor> none;
  const bool wide = needs_64bit_offsets({&grad, &input, &before, &grad_input, &preactivation});

  if (rewrites || need(kConvBias) || need(kConvPrelu)) {
    for_type(input, [&](auto tag) {
      using T = typename decltype(tag)::type;
      using R = Real<T>;
      for_index(wide, [&](auto index) {
        using Index = typename decltype(index)::type;
        ActivationArguments<T, Index> a{};
        a.grad = view<T, Index>(grad);
        if (prelu_weight) a.preactivation = view<T, Index>(preactivation);
        if (rewrites) a.out = view<T, Index>(before);
        if (prelu_weight)
          a.prelu = static_cast<const T*>(prelu_weight->data_ptr()), a.prelu_step = static_cast<int32_t>(prelu_weight->stride(0));
        a.channels = static_cast<int32_t>(channels), a.groups = static_cast<int32_t>(groups);
        a.height = static_cast<int32_t>(grad.size(2)), a.width = static_cast<int32_t>(grad.size(3));
        a.pixels = grad.size(0) * grad.size(2) * grad.size(3);
        const bool together = rewrites ? before.stride(1) == 1 && channels > 1 : grad.stride(1) == 1 && channels > 1;
        const Plan plan = activation_plan(a.pixels, channels, together);
        const auto slices = static_cast<int32_t>(plan.grid[1]);
        const bool sums = need(kConvBias) || need(kConvPrelu);
        const Tensor partial = allocate({sums ? int64_t{slices} * 2 * channels : 0}, real, input);
        a.partial = sums ? static_cast<R*>(partial.data_ptr()) : nullptr;
        launch("group_conv_shuffle_backward", together ? &activation_backward<T, Index, true> : &activation_backward<T, Index, false>,
               plan, stream, a);
        const auto finish = [&](const Tensor& target, int64_t first) {
          if (target.numel() == 0) return;
          launch("group_conv_shuffle_backward", &sum_slices<T>, elementwise_plan(channels), stream,
                 static_cast<const R*>(partial.data_ptr()) + first, 2 * channels, slices, static_cast<T*>(target.data_ptr()), channels);
        };
        finish(grad_bias, 0);
        finish(grad_prelu, channels);
      });
    });
  }
  if (need(kConvImage)) {
    // In the gradient's own resolution the result's pixels are `stride` apart: zeros lie between them.
    const ConvGeometry geometry{input.size(0), (grad.size(2) - 1) * stride + 1, (grad.size(3) - 1) * stride + 1, input.size(2),
                                input.size(3), channels / groups, weight.size(1), groups, 1, dilation};
    convolve({"group_conv_shuffle_backward", before, weight, grad_input, none, none, none, nullptr, geometry,
              static_cast<int>(stride), 1, true},
             stream);
  }
  if (need(kConvWeight) && grad_weight.numel() > 0) {
    for_type(input, [&](auto tag) {
      using T = typename decltype(tag)::type;
      using R = Real<T>;
      for_index(wide, [&](auto index) {
        using Index = typename decltype(index)::type;
        WeightGradPlan plan = weight_grad_plan({input.size(0), input.size(2), input.size(3), grad.size(2), grad.size(3), weight.size(1),
                                                channels / groups, groups, stride, dilation},
                                               sizeof(R), device_limits().shared_bytes);
        const Tensor partial = allocate({plan.slices * grad_weight.numel()}, real, input);
        WeightGradArguments<T, Index> a{};
        a.input = view<T, Index>(input), a.grad = view<T, Index>(before), a.partial = static_cast<R*>(partial.data_ptr());
        a.in_height = static_cast<int32_t>(input.size(2)), a.in_width = static_cast<int32_t>(input.size(3));
        a.out_height = static_cast<int32_t>(grad.size(2)), a.out_width = static_cast<int32_t>(grad.size(3));
        a.tiles_x = static_cast<int32_t>(divide_up(a.out_width, kGradColumns));
        a.tiles_y = static_cast<int32_t>(divide_up(a.out_height, kGradRows));
        a.tiles = int64_t{a.tiles_x} * a.tiles_y * input.size(0);
        a.channels_in = static_cast<int32_t>(weight.size(1)), a.channels_out = static_cast<int32_t>(channels / groups);
        a.blocks_in = static_cast<int32_t>(divide_up(a.channels_in, kPairs));
        a.stride = static_cast<int32_t>(stride), a.dilation = static_cast<int32_t>(dilation);
        a.patch_height = plan.patch_height, a.patch_width = plan.patch_width;
        launch("group_conv_shuffle_backward", &weight_gradient<T, Index>, plan.plan, stream, a);
        launch("group_conv_shuffle_backward", &sum_slices<T>, elementwise_plan(grad_weight.numel()), stream,
               static_cast<const R*>(partial.data_ptr()), grad_weight.numel(), static_cast<int32_t>(plan.slices),
               static_cast<T*>(grad_weight.data_ptr()), grad_weight.numel());
      });
    });
  }
  return result;
}

SAFNET_REGISTER(library) {
  library.impl("group_conv_shuffle", TORCH_BOX(&group_conv_shuffle));
  library.impl("group_conv_shuffle_backward", TORCH_BOX(&group_conv_shuffle_backward));
}

}  // namespace safnet::cuda
