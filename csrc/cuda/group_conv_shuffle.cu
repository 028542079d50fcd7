// group_conv_shuffle on CUDA: implicit GEMM (convolution.cuh), its backward, and the preparation of the weights.
#include "cuda/convolution.cuh"
#include "cuda/tensors.h"
#include "cuda/torch_settings.h"
#include "cuda/weight_gradient.cuh"
#include "math/gradients.h"

namespace safnet::cuda {

template <class T, class Index, int kN, bool kSharesRows>
__global__ void __launch_bounds__(kConvWarps * 32, 2)
    convolve_tensor(const __grid_constant__ ConvArguments<T, Index> a) {
  convolve_tile<TensorSums<T, kN, kSharesRows>, kN>(a);
}

template <class T, class Index, int kN>
__global__ void __launch_bounds__(kConvWarps * 32, 2)
    convolve_plain(const __grid_constant__ ConvArguments<T, Index> a) {
  convolve_tile<PlainSums<T, kN>, kN>(a);
}

// The weights of a launch, as stages want them: [group][block][chunk][step][dy][output channel][piece][channel],
// rounded to TF32 where that is what multiplies. `transposed`: for the gradient of the input, which convolves with
// swapped channels and mirrored taps.
template <class T>
struct PackArguments {
  const T* weight;
  int64_t out, in, y, x;                                           // strides
  int32_t channels_in, channels_out, chunks, rows, blocks, parts;  // rows: output channels of a block
  bool transposed, tf32;
};

template <class T>
__device__ __forceinline__ Real<T> weight_at(const PackArguments<T>& a, int group, int out, int in, int dy, int dx) {
  if (out >= a.channels_out || in >= a.channels_in || dx >= kNoTap) return 0;
  const int64_t first = a.transposed ? int64_t{group} * a.channels_in + in : int64_t{group} * a.channels_out + out;
  const int64_t second = a.transposed ? out : in;
  if (a.transposed) dy = 2 - dy, dx = 2 - dx;
  return to_real(read_only(a.weight + first * a.out + second * a.in + dy * a.y + dx * a.x));
}

template <class T>
__global__ void __launch_bounds__(kThreads) pack_weights(const __grid_constant__ PackArguments<T> a, T* packed) {
  constexpr unsigned kPiece = kPieceBytes / sizeof(T);
  const unsigned rows = a.rows, count = kTaps * rows * 2 * kPiece;
  const unsigned piece = blockIdx.x / a.parts, i = blockIdx.x % a.parts * kThreads + threadIdx.x;
  if (i >= count) return;
  const int chunk = piece % a.chunks, block = piece / a.chunks % a.blocks, group = piece / a.chunks / a.blocks;
  const unsigned k = i % kPiece, slot = i / kPiece % 2, row = i / (2 * kPiece), tap = row / rows,
                 out = row - tap * rows;
  const int which = slot ^ (row >> 2 & 1), dy = tap % 3, step = tap / 3;
  const bool one_piece = a.channels_in - chunk * 2 * static_cast<int>(kPiece) <= static_cast<int>(kPiece);
  const ProductHalf half = product_half(one_piece, step, which);
  const int in = (chunk * 2 + half.piece) * kPiece + k;
  const auto value = weight_at(a, group, block * a.rows + out, in, dy, half.dx);
  T& target = packed[int64_t{piece} * count + i];
  if constexpr (std::is_same_v<T, float>) {
    target = a.tf32 ? __uint_as_float(round_to_tf32(__float_as_uint(value))) : value;
  } else {
    target = from_real<T>(value);
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

// Four blocks an SM: left to itself, ptxas saves registers on sm_90 until it spills.
template <class T, class Index>
__global__ void __launch_bounds__(kThreads, 4) convolve_direct(const __grid_constant__ DirectArguments<T, Index> d) {
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
      int64_t in_y = int64_t{y} * a.stride + (int64_t{dy} - 1) * a.dilation,
              in_x = int64_t{x} * a.stride + (int64_t{dx} - 1) * a.dilation;
      if (in_y < 0 || in_y >= a.in_height || in_x < 0 || in_x >= a.in_width) continue;
      if (in_y % a.upsample != 0 || in_x % a.upsample != 0) continue;
      const T* source = a.input.data +
                        a.input.at(n, static_cast<Index>(in_y / a.upsample), static_cast<Index>(in_x / a.upsample)) +
                        static_cast<Index>(group) * a.channels_in * a.input.c;
      for (int in = 0; in < a.channels_in; ++in)
        sum = fma(to_real(read_only(source + in * a.input.c)), weight_at(d.weights, group, out, in, dy, dx), sum);
    }
  }
  store_result(a, n, y, x, group, out, sum);
}

// Backward of shuffle and PReLU: the gradient before them, and one slice's sums for bias and slope of one channel.
// Lanes are pixels, or channels where those lie together.
template <class T, class Index>
struct ActivationArguments {
  View<T, Index> grad_out, preactivation;  // no preactivation: no PReLU
  View<T, Index> grad_before;              // the result; no data: only the sums
  const T* prelu;
  int32_t prelu_step;
  Real<T>* partial;  // [slice][bias, slope][channel]; may be absent
  int32_t channels, groups, height, width;
  int64_t pixels;
};

template <class T, class Index, bool kChannelLanes>
__global__ void __launch_bounds__(kThreads)
    activation_backward(const __grid_constant__ ActivationArguments<T, Index> a) {
  using R = Real<T>;
  __shared__ R sums[2][kThreads];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int channel = kChannelLanes ? blockIdx.x * 32 + lane : blockIdx.x;
  const int per_group = a.channels / a.groups, group = channel / per_group;
  const Index shuffled = a.groups > 1 ? (channel - group * per_group) * a.groups + group : channel;
  const bool active = channel < a.channels;
  const R slope = active && a.prelu != nullptr ? to_real(read_only(a.prelu + channel * a.prelu_step)) : R(1);
  const int64_t slice = (a.pixels + gridDim.y - 1) / gridDim.y;
  const int64_t begin = slice * blockIdx.y, end = min(begin + slice, a.pixels);
  R sum_bias = 0, sum_slope = 0;
  for (int64_t i = begin + (kChannelLanes ? warp : threadIdx.x); active && i < end;
       i += kChannelLanes ? kThreads / 32 : kThreads) {
    const PixelRun<Index> pixel = pixel_run<1>(static_cast<Index>(i), a.height, a.width);
    R grad = to_real(read_only(a.grad_out.data + a.grad_out.at(pixel.n, pixel.y, pixel.x) + shuffled * a.grad_out.c));
    if (a.preactivation.data != nullptr) {
      const R before = to_real(read_only(a.preactivation.data + a.preactivation.at(pixel.n, pixel.y, pixel.x) +
                                         channel * a.preactivation.c));
      if (!(before > 0)) sum_slope += grad * before, grad *= slope;
    }
    sum_bias += grad;
    if (a.grad_before.data != nullptr)
      a.grad_before.data[a.grad_before.at(pixel.n, pixel.y, pixel.x) + channel * a.grad_before.c] = from_real<T>(grad);
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
__global__ void __launch_bounds__(kThreads)
    sum_slices(const Real<T>* partial, int64_t pitch, int32_t slices, T* out, int64_t count) {
  const int64_t i = thread_item<int64_t>();
  if (i >= count) return;
  Real<T> sum = 0;
  for (int slice = 0; slice < slices; ++slice) sum += partial[slice * pitch + i];
  out[i] = from_real<T>(sum);
}

// ---- host ----

struct DeviceLimits {
  int capability, shared_bytes, multiprocessors;
};

DeviceLimits device_limits() {
  int device = 0, major = 0, minor = 0, shared = 0, multiprocessors = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return {major * 10 + minor, shared, multiprocessors};
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
  if (c.prelu)
    a.prelu = static_cast<const T*>(c.prelu->data_ptr()), a.prelu_step = static_cast<int32_t>(c.prelu->stride(0));
  a.in_height = static_cast<int32_t>(g.in_height), a.in_width = static_cast<int32_t>(g.in_width),
  a.upsample = c.upsample;
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
  a.channels_in = static_cast<int32_t>(c.geometry.channels_in),
  a.channels_out = static_cast<int32_t>(c.geometry.channels_out);
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

// Whether the output is dense in runs of 16 bytes: of channels, or of pixels of a row.
bool stores_in_pieces(const Tensor& out, int64_t channels_of_group) {
  const auto run = out.stride(1) == 1 ? channels_of_group : out.size(3);
  return run * static_cast<int64_t>(out.element_size()) % kPieceBytes == 0;
}

// The size of block where there is one variant only: for 64-bit offsets and for double, whose sums take two registers
// each.
template <class T>
constexpr int kOnlyN = sizeof(T) == 8 ? 2 : 5;

template <class T, class Index, int kN>
auto tensor_kernel(bool shares_rows) {
  return shares_rows ? &convolve_tensor<T, Index, kN, true> : &convolve_tensor<T, Index, kN, false>;
}

template <class T, class Index>
auto tensor_kernel(int n, bool shares_rows) {
  if constexpr (sizeof(Index) == 8) return &convolve_tensor<T, Index, kOnlyN<T>, false>;
  else if (n == 1) return tensor_kernel<T, Index, 1>(shares_rows);
  else if (n == 2) return tensor_kernel<T, Index, 2>(shares_rows);
  else return n == 4 ? tensor_kernel<T, Index, 4>(shares_rows) : tensor_kernel<T, Index, 5>(shares_rows);
}

template <class T, class Index>
auto plain_kernel(int n) {
  if constexpr (sizeof(T) == 4 && sizeof(Index) == 4) {
    if (n <= 2) return n == 1 ? &convolve_plain<T, Index, 1> : &convolve_plain<T, Index, 2>;
    return n == 4 ? &convolve_plain<T, Index, 4> : &convolve_plain<T, Index, 5>;
  } else {
    return &convolve_plain<T, Index, kOnlyN<T>>;
  }
}

template <class T, class Index>
auto weight_gradient_kernel(int n) {
  if constexpr (sizeof(Index) == 8) return &weight_gradient_tensor<T, Index, kOnlyN<T>>;
  else if (n <= 2) return n == 1 ? &weight_gradient_tensor<T, Index, 1> : &weight_gradient_tensor<T, Index, 2>;
  else return n == 4 ? &weight_gradient_tensor<T, Index, 4> : &weight_gradient_tensor<T, Index, 5>;
}

template <class T, class Index>
void launch_tiles(const Convolution& c, const ConvPlan& plan, bool tensor, bool tf32, cudaStream_t stream) {
  PackArguments<T> pack = pack_arguments<T>(c);
  const PackPlan packing = pack_plan(plan, c.geometry.groups, sizeof(T));
  pack.chunks = static_cast<int32_t>(plan.chunks), pack.rows = plan.n * 8,
  pack.blocks = static_cast<int32_t>(plan.blocks);
  pack.parts = packing.parts, pack.tf32 = tf32;
  const Tensor packed = allocate({packing.bytes}, ScalarType::Byte, c.input);
  launch(c.name, &pack_weights<T>, packing.plan, stream, pack, static_cast<T*>(packed.data_ptr()));
  ConvArguments<T, Index> a = conv_arguments<T, Index>(c);
  a.weights = static_cast<const unsigned char*>(packed.data_ptr());
  a.blocks = static_cast<int32_t>(plan.blocks), a.chunks = static_cast<int32_t>(plan.chunks), a.stages = plan.stages;
  a.patch_height = plan.patch_height, a.patch_width = plan.patch_width;
  a.copies_pieces = comes_in_pieces(c.input, c.geometry.channels_in);
  a.stores_pieces = stores_in_pieces(c.out, c.geometry.channels_out);
  if constexpr (sizeof(T) == 2) {
    launch(c.name, tensor_kernel<T, Index>(plan.n, plan.shares_rows), plan.plan, stream, a);
  } else {
    auto kernel = plain_kernel<T, Index>(plan.n);
    if constexpr (std::is_same_v<T, float>) {
      if (tensor) kernel = tensor_kernel<T, Index>(plan.n, plan.shares_rows);
    }
    launch(c.name, kernel, plan.plan, stream, a);
  }
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
    const bool tf32 = std::is_same_v<T, float> && limits.capability >= 80 && torch_allows_tf32();
    const bool tensor = std::is_same_v<T, Half> || (std::is_same_v<T, BFloat16> && limits.capability >= 80) || tf32;
    for_index(wide, [&](auto index) {
      using Index = typename decltype(index)::type;
      const int n = wide || sizeof(T) == 8 ? kOnlyN<T> : channel_blocks(c.geometry.channels_out);
      const ConvPlan plan = conv_plan(c.geometry, n, tensor, sizeof(T), limits.shared_bytes);
      // Halves without the tensor cores for them (bfloat16 before sm_80) have no kernel of their own.
      if (plan.stages == 0 || (sizeof(T) == 2 && !tensor)) launch_direct<T, Index>(c, stream);
      else launch_tiles<T, Index>(c, plan, tensor, tf32, stream);
    });
  });
}

int64_t out_side(int64_t side, int64_t stride) { return (side + stride - 1) / stride; }

std::tuple<Tensor, Tensor> group_conv_shuffle(const Tensor& input, const Tensor& weight,
                                              const std::optional<Tensor>& bias,
                                              const std::optional<Tensor>& prelu_weight,
                                              const std::optional<Tensor>& residual, int64_t groups, int64_t stride,
                                              int64_t dilation, bool save_preactivation) {
  const DeviceScope scope(input);
  const ConvGeometry geometry{input.size(0),
                              input.size(2),
                              input.size(3),
                              out_side(input.size(2), stride),
                              out_side(input.size(3), stride),
                              weight.size(1),
                              weight.size(0) / groups,
                              groups,
                              stride,
                              dilation};
  const std::vector<int64_t> size{geometry.batch, weight.size(0), geometry.out_height, geometry.out_width};
  const Tensor out = allocate(size, input.scalar_type(), input, is_channels_last(input));
  const Tensor preactivation =
      save_preactivation ? allocate(size, input.scalar_type(), input, is_channels_last(input)) : no_gradient(input);
  convolve({"group_conv_shuffle", input, weight, out, bias, prelu_weight, residual,
            save_preactivation ? &preactivation : nullptr, geometry, 1, static_cast<int>(groups), false},
           scope.stream);
  return {out, preactivation};
}

// The shape of a backward.
struct Backward {
  int64_t channels, groups, stride, dilation;  // channels: of the output, of all groups
  bool wide;                                   // offsets need 64 bits
  cudaStream_t stream;

  ConvGeometry geometry(const Tensor& input, const Tensor& weight, const Tensor& grad_before) const {
    return {input.size(0),
            input.size(2),
            input.size(3),
            grad_before.size(2),
            grad_before.size(3),
            weight.size(1),
            channels / groups,
            groups,
            stride,
            dilation};
  }
};

constexpr const char* kBackwardName = "group_conv_shuffle_backward";

// Adds up `partial` [slice][pitch] from `first` on into all of `target`, which may be empty.
template <class T>
void finish_sums(const Tensor& partial, int64_t first, int64_t pitch, int64_t slices, const Tensor& target,
                 cudaStream_t stream) {
  if (target.numel() == 0) return;
  launch(kBackwardName, &sum_slices<T>, elementwise_plan(target.numel()), stream,
         static_cast<const Real<T>*>(partial.data_ptr()) + first, pitch, static_cast<int32_t>(slices),
         static_cast<T*>(target.data_ptr()), target.numel());
}

// Undoes shuffle and PReLU: fills those of grad_before, grad_bias and grad_prelu that have elements.
void launch_activation_gradient(const Backward& b, const Tensor& grad_out, const Tensor& preactivation,
                                const std::optional<Tensor>& prelu_weight, const Tensor& grad_before,
                                const Tensor& grad_bias, const Tensor& grad_prelu) {
  const bool writes = grad_before.numel() > 0, sums = grad_bias.numel() > 0 || grad_prelu.numel() > 0;
  const bool together = (writes ? grad_before : grad_out).stride(1) == 1 && b.channels > 1;
  const int64_t pixels = grad_out.size(0) * grad_out.size(2) * grad_out.size(3);
  const Plan plan = activation_plan(pixels, b.channels, together);
  const int64_t slices = plan.grid[1];
  const Tensor partial = allocate({sums ? slices * 2 * b.channels : 0}, real_type(grad_out), grad_out);
  for_type(grad_out, [&](auto type) {
    using T = typename decltype(type)::type;
    for_index(b.wide, [&](auto index) {
      using Index = typename decltype(index)::type;
      ActivationArguments<T, Index> a{};
      a.grad_out = view<T, Index>(grad_out);
      if (writes) a.grad_before = view<T, Index>(grad_before);
      if (prelu_weight) {
        a.preactivation = view<T, Index>(preactivation);
        a.prelu = static_cast<const T*>(prelu_weight->data_ptr());
        a.prelu_step = static_cast<int32_t>(prelu_weight->stride(0));
      }
      if (sums) a.partial = static_cast<Real<T>*>(partial.data_ptr());
      a.channels = static_cast<int32_t>(b.channels), a.groups = static_cast<int32_t>(b.groups);
      a.height = static_cast<int32_t>(grad_out.size(2)), a.width = static_cast<int32_t>(grad_out.size(3));
      a.pixels = pixels;
      const auto kernel = together ? &activation_backward<T, Index, true> : &activation_backward<T, Index, false>;
      launch(kBackwardName, kernel, plan, b.stream, a);
    });
    finish_sums<T>(partial, 0, 2 * b.channels, slices, grad_bias, b.stream);
    finish_sums<T>(partial, b.channels, 2 * b.channels, slices, grad_prelu, b.stream);
  });
}

// The gradient of the input is a convolution of that of the output: in the latter's own resolution the input's pixels
// are `stride` apart, with zeros between them.
void launch_input_gradient(const Backward& b, const Tensor& grad_before, const Tensor& weight,
                           const Tensor& grad_input) {
  const ConvGeometry geometry{grad_input.size(0),
                              (grad_before.size(2) - 1) * b.stride + 1,
                              (grad_before.size(3) - 1) * b.stride + 1,
                              grad_input.size(2),
                              grad_input.size(3),
                              b.channels / b.groups,
                              weight.size(1),
                              b.groups,
                              1,
                              b.dilation};
  const std::optional<Tensor> none;
  convolve({kBackwardName, grad_before, weight, grad_input, none, none, none, nullptr, geometry,
            static_cast<int>(b.stride), 1, true},
           b.stream);
}

template <class T, class Index>
WeightGradientArguments<T, Index> weight_gradient_arguments(const ConvGeometry& g, const WeightGradientPlan& plan,
                                                            const Tensor& input, const Tensor& grad_before) {
  WeightGradientArguments<T, Index> a{};
  a.input = view<T, Index>(input), a.grad = view<T, Index>(grad_before);
  a.in_height = static_cast<int32_t>(g.in_height), a.in_width = static_cast<int32_t>(g.in_width);
  a.out_height = static_cast<int32_t>(g.out_height), a.out_width = static_cast<int32_t>(g.out_width);
  a.tiles_x = static_cast<int32_t>(divide_up(g.out_width, kGradColumns));
  a.tiles_y = static_cast<int32_t>(divide_up(g.out_height, plan.rows));
  a.tiles = int64_t{a.tiles_x} * a.tiles_y * g.batch;
  a.channels_in = static_cast<int32_t>(g.channels_in), a.channels_out = static_cast<int32_t>(g.channels_out);
  a.groups = static_cast<int32_t>(g.groups);
  a.stride = static_cast<int32_t>(g.stride), a.dilation = static_cast<int32_t>(g.dilation);
  a.patch_height = plan.patch_height, a.patch_width = plan.patch_width, a.rows = plan.rows, a.stages = plan.stages;
  a.copies_input_pieces = comes_in_pieces(input, g.channels_in);
  a.copies_grad_pieces = comes_in_pieces(grad_before, g.channels_out);
  return a;
}

void launch_weight_gradient(const Backward& b, const Tensor& input, const Tensor& grad_before, const Tensor& weight,
                            const Tensor& grad_weight) {
  const ConvGeometry geometry = b.geometry(input, weight, grad_before);
  const DeviceLimits limits = device_limits();
  for_type(input, [&](auto type) {
    using T = typename decltype(type)::type;
    using R = Real<T>;
    for_index(b.wide, [&](auto index) {
      using Index = typename decltype(index)::type;
      // Ampere's tensor cores, for halves; float32 stays exact here even where TF32 is allowed.
      const int n = b.wide ? kOnlyN<T> : channel_blocks(geometry.channels_out);
      WeightGradientPlan plan =
          weight_gradient_tensor_plan(geometry, n, sizeof(T), limits.shared_bytes, limits.multiprocessors);
      const bool tensor = plan.stages > 0 && limits.capability >= 80;
      if (!tensor) plan = weight_gradient_plan(geometry, sizeof(R), limits.shared_bytes);
      const Tensor partial = allocate({plan.slices * grad_weight.numel()}, real_type(input), input);
      auto a = weight_gradient_arguments<T, Index>(geometry, plan, input, grad_before);
      a.partial = static_cast<R*>(partial.data_ptr());
      a.blocks_in = static_cast<int32_t>(divide_up(a.channels_in, tensor ? 16 : kPairs));
      auto kernel = &weight_gradient<T, Index>;
      if constexpr (sizeof(T) == 2) {
        if (tensor) kernel = weight_gradient_kernel<T, Index>(plan.n);
      }
      launch(kBackwardName, kernel, plan.plan, b.stream, a);
      finish_sums<T>(partial, 0, grad_weight.numel(), plan.slices, grad_weight, b.stream);
    });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> group_conv_shuffle_backward(
    const Tensor& grad_out, const Tensor& preactivation, const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& prelu_weight, int64_t groups, int64_t stride, int64_t dilation, int64_t needs, bool) {
  const DeviceScope scope(input);
  const bool need_input = is_needed(needs, ConvInput::kInput), need_weight = is_needed(needs, ConvInput::kWeight);
  const bool need_bias = is_needed(needs, ConvInput::kBias), need_residual = is_needed(needs, ConvInput::kResidual);
  const bool need_prelu = is_needed(needs, ConvInput::kPreluWeight) && prelu_weight.has_value();
  const int64_t channels = weight.size(0);
  const auto gradient_of = [&](const Tensor& model, bool needed, bool channels_last = false) {
    const auto size = model.sizes();
    return needed ? allocate({size.begin(), size.end()}, input.scalar_type(), input, channels_last)
                  : no_gradient(input);
  };
  const auto vector_gradient = [&](bool needed) {
    return allocate({needed ? channels : 0}, input.scalar_type(), input);
  };
  const Tensor grad_input = empty_gradient(input, need_input), grad_weight = gradient_of(weight, need_weight);
  const Tensor grad_bias = vector_gradient(need_bias), grad_prelu = vector_gradient(need_prelu);
  // Before PReLU and shuffle the gradient is that of the residual; with neither it is the one that came.
  const bool as_it_came = !prelu_weight && groups == 1;
  const bool writes = need_residual || (!as_it_came && (need_input || need_weight));
  const Tensor written = gradient_of(grad_out, writes, is_channels_last(input));
  const auto result =
      std::make_tuple(grad_input, grad_weight, grad_bias, grad_prelu, need_residual ? written : no_gradient(input));
  if (grad_out.numel() == 0) {
    for (const Tensor* tensor : {&grad_input, &grad_weight, &grad_bias, &grad_prelu}) zero(*tensor, scope.stream);
    return result;
  }
  const bool wide = needs_64bit_offsets({&grad_out, &input, &written, &grad_input, &preactivation});
  const Backward b{channels, groups, stride, dilation, wide, scope.stream};
  if (writes || need_bias || need_prelu)
    launch_activation_gradient(b, grad_out, preactivation, prelu_weight, written, grad_bias, grad_prelu);
  const Tensor& grad_before = writes ? written : grad_out;
  if (need_input) launch_input_gradient(b, grad_before, weight, grad_input);
  if (grad_weight.numel() > 0) launch_weight_gradient(b, input, grad_before, weight, grad_weight);
  return result;
}

SAFNET_REGISTER(library) {
  library.impl("group_conv_shuffle", TORCH_BOX(&group_conv_shuffle));
  library.impl("group_conv_shuffle_backward", TORCH_BOX(&group_conv_shuffle_backward));
}

}  // namespace safnet::cuda
