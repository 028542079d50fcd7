// census_loss on CUDA: the grey values of a tile and its surroundings lie in shared memory; no patch is ever stored.
//
// Two pixels' normalised difference changes sign when they swap roles, and its square does not: the forward evaluates
// each pair of pixels once, and counts it for those of the two whose window lies inside the picture.
#include "cuda/tensors.h"

namespace safnet::cuda {

constexpr int kTileWidth = 32, kTileHeight = 32, kRowsPerThread = 4;
constexpr int kLargestRadius = 7;

// The tile's pixels, and `above` rows before, `radius` rows after, `radius` columns on both sides; zero outside the
// picture.
struct CensusPlan {
  Plan plan;
  int64_t blocks;
};

static CensusPlan census_plan(int64_t n, int64_t height, int64_t width, int radius, size_t bytes_of_real) {
  CensusPlan result;
  Plan& plan = result.plan;
  plan.grid[0] = static_cast<uint32_t>(divide_up(width, kTileWidth));
  plan.grid[1] = static_cast<uint32_t>(std::min<int64_t>(divide_up(height, kTileHeight), 65535));
  plan.grid[2] = static_cast<uint32_t>(std::min<int64_t>(n, 65535));
  plan.block[0] = kTileWidth;
  plan.block[1] = kTileHeight / kRowsPerThread;
  plan.shared_bytes = static_cast<uint32_t>(2 * (kTileWidth + 2 * radius) * (kTileHeight + 2 * radius) * bytes_of_real);
  result.blocks = int64_t{plan.grid[0]} * plan.grid[1] * plan.grid[2];
  return result;
}

template <class T, class Index>
struct CensusArguments {
  View<T, Index> prediction, target;
  View<T, Index> grad_prediction;
  const Real<T>* grad_out;  // of the loss
  Real<T>* partial;         // one sum a block
  int32_t batch, channels, height, width, radius;
  double scale;  // of the gradient: one over the number of summands
};

constexpr float kSoftness = 0.81f, kKnee = 0.1f;  // CENSUS_SOFTNESS, CENSUS_KNEE of safnet_ops.reference

__device__ __forceinline__ float reciprocal_root(float x) { return rsqrtf(x); }
__device__ __forceinline__ double reciprocal_root(double x) { return rsqrt(x); }
// To two units in the last place; the denominators here lie between 0.1 and 4.1.
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double quotient(double a, double b) { return a / b; }

template <class R>
struct Pair {
  R difference, root;  // n_k of prediction minus that of target; 1 / sqrt(softness + d^2) of the prediction

  __device__ __forceinline__ Pair(R d_prediction, R d_target) {
    const R softness = std::is_same_v<R, double> ? R(0.81) : R(kSoftness);
    root = reciprocal_root(softness + d_prediction * d_prediction);
    difference = d_prediction * root - d_target * reciprocal_root(softness + d_target * d_target);
  }
  __device__ __forceinline__ static R knee() { return std::is_same_v<R, double> ? R(0.1) : R(kKnee); }

  __device__ __forceinline__ R distance() const {
    const R squared = difference * difference;
    return quotient(squared, knee() + squared);
  }
  // d distance / d grey value of the neighbour in the prediction.
  __device__ __forceinline__ R derivative() const {
    const R softness = std::is_same_v<R, double> ? R(0.81) : R(kSoftness);
    const R denominator = knee() + difference * difference;
    return quotient(2 * knee() * difference, denominator * denominator) * (softness * root * root * root);
  }
};

template <class T, class Index>
__device__ __forceinline__ Real<T> grey(const View<T, Index>& picture, Index n, int32_t y, int32_t x,
                                        int32_t channels) {
  const T* pixel = picture.data + picture.at(n, static_cast<Index>(y), static_cast<Index>(x));
  Real<T> sum = 0;
  for (int32_t c = 0; c < channels; ++c) sum += to_real(read_only(pixel + c * picture.c));
  return sum / static_cast<Real<T>>(channels);
}

// A tile of both pictures in shared memory. kRadius 0: known at run time only.
template <class T, class Index, int kRadius>
struct CensusTile {
  using R = Real<T>;
  R *prediction, *target;
  int radius, pitch, above;
  int32_t top, left;  // the tile's first pixel

  __device__ __forceinline__ CensusTile(const CensusArguments<T, Index>& a, R* shared, bool with_rows_above)
      : prediction(shared),
        radius(kRadius != 0 ? kRadius : a.radius),
        pitch(kTileWidth + 2 * radius),
        above(with_rows_above ? radius : 0) {
    target = prediction + pitch * (kTileHeight + radius + above);
  }

  __device__ __forceinline__ void load(const CensusArguments<T, Index>& a, Index n, int32_t tile_y) {
    top = tile_y * kTileHeight, left = blockIdx.x * kTileWidth;
    const int count = pitch * (kTileHeight + radius + above);
    for (int i = threadIdx.y * kTileWidth + threadIdx.x; i < count; i += kTileWidth * blockDim.y) {
      const int row = i / pitch;
      const int32_t y = top - above + row, x = left - radius + (i - row * pitch);
      const bool inside = y >= 0 && y < a.height && x >= 0 && x < a.width;
      prediction[i] = inside ? grey(a.prediction, n, y, x, a.channels) : R(0);
      target[i] = inside ? grey(a.target, n, y, x, a.channels) : R(0);
    }
  }

  // Place of a pixel of the tile in its arrays.
  __device__ __forceinline__ int at(int y, int x) const { return (y + above) * pitch + x + radius; }
};

// Whether a coordinate's window lies inside the picture.
__device__ __forceinline__ int fits(int32_t position, int radius, int32_t size) {
  return position >= radius && position < size - radius ? 1 : 0;
}

template <class R>
__device__ __forceinline__ R block_sum(R value, R* shared) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, warps = blockDim.x * blockDim.y / 32;
  if (thread % 32 == 0) shared[thread / 32] = value;
  __syncthreads();
  value = 0;
  for (int warp = 0; warp < warps; ++warp) value += shared[warp];
  return value;
}

// A thread takes kRowsPerThread pixels of a column, which share the neighbours that it reads.
template <class T, class Index, int kRadius>
__global__ void __launch_bounds__(kTileWidth* kTileHeight / kRowsPerThread, 2)
    census_partial(const __grid_constant__ CensusArguments<T, Index> a) {
  using R = Real<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ R warp_sums[kTileWidth * kTileHeight / kRowsPerThread / 32];
  CensusTile<T, Index, kRadius> tile(a, reinterpret_cast<R*>(shared), false);
  const int radius = tile.radius;
  const int x = threadIdx.x, y = threadIdx.y * kRowsPerThread;
  const int tiles_y = (a.height + kTileHeight - 1) / kTileHeight;
  R sum = 0;
  for (int32_t n = blockIdx.z; n < a.batch; n += gridDim.z) {
    for (int32_t tile_y = blockIdx.y; tile_y < tiles_y; tile_y += gridDim.y) {
      tile.load(a, n, tile_y);
      __syncthreads();
      R here_prediction[kRowsPerThread], here_target[kRowsPerThread];
      int here_fits[kRowsPerThread];
#pragma unroll
      for (int k = 0; k < kRowsPerThread; ++k) {
        here_prediction[k] = tile.prediction[tile.at(y + k, x)];
        here_target[k] = tile.target[tile.at(y + k, x)];
        here_fits[k] = fits(tile.top + y + k, radius, a.height) & fits(tile.left + x, radius, a.width);
      }
#pragma unroll 1
      for (int dx = -radius; dx <= radius; ++dx) {
        const int column_fits = fits(tile.left + x + dx, radius, a.width);
        // Half of the window: below, or in the same row and to the right.
#pragma unroll
        for (int row = 0; row < kRowsPerThread + (kRadius != 0 ? kRadius : kLargestRadius); ++row) {
          if (kRadius == 0 && row >= kRowsPerThread + radius) break;
          const int place = tile.at(y + row, x + dx);
          const R there_prediction = tile.prediction[place], there_target = tile.target[place];
          const int there_fits = column_fits & fits(tile.top + y + row, radius, a.height);
#pragma unroll
          for (int k = 0; k < kRowsPerThread; ++k) {
            const int dy = row - k;
            if (dy < 0 || dy > radius || (dy == 0 && dx <= 0)) continue;
            const int count = here_fits[k] + there_fits;
            const Pair<R> pair(there_prediction - here_prediction[k], there_target - here_target[k]);
            sum += count == 0 ? R(0) : static_cast<R>(count) * pair.distance();
          }
        }
      }
      __syncthreads();
    }
  }
  sum = block_sum(sum, warp_sums);
  if (threadIdx.x + threadIdx.y == 0) a.partial[(blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = sum;
}

// One block adds the partial sums in a fixed order.
template <class R>
__global__ void __launch_bounds__(kThreads, 2) census_total(const R* partial, int64_t count, double scale, R* loss) {
  __shared__ double warp_sums[kThreads / 32];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = block_sum(sum, warp_sums);
  if (threadIdx.x == 0) *loss = static_cast<R>(sum * scale);
}

// The gradient at a pixel gathers over its whole window: no atomics.
template <class T, class Index, int kRadius>
__global__ void __launch_bounds__(kTileWidth* kTileHeight / kRowsPerThread, 2)
    census_backward(const __grid_constant__ CensusArguments<T, Index> a) {
  using R = Real<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  CensusTile<T, Index, kRadius> tile(a, reinterpret_cast<R*>(shared), true);
  const int radius = tile.radius;
  const int x = threadIdx.x, y = threadIdx.y * kRowsPerThread;
  const int tiles_y = (a.height + kTileHeight - 1) / kTileHeight;
  const R scale = *a.grad_out * static_cast<R>(a.scale);
  for (int32_t n = blockIdx.z; n < a.batch; n += gridDim.z) {
    for (int32_t tile_y = blockIdx.y; tile_y < tiles_y; tile_y += gridDim.y) {
      tile.load(a, n, tile_y);
      __syncthreads();
      R here_prediction[kRowsPerThread], here_target[kRowsPerThread], sums[kRowsPerThread] = {};
      int here_fits[kRowsPerThread];
#pragma unroll
      for (int k = 0; k < kRowsPerThread; ++k) {
        here_prediction[k] = tile.prediction[tile.at(y + k, x)];
        here_target[k] = tile.target[tile.at(y + k, x)];
        here_fits[k] = fits(tile.top + y + k, radius, a.height) & fits(tile.left + x, radius, a.width);
      }
#pragma unroll 1
      for (int dx = -radius; dx <= radius; ++dx) {
        const int column_fits = fits(tile.left + x + dx, radius, a.width);
#pragma unroll
        for (int step = 0; step < kRowsPerThread + 2 * (kRadius != 0 ? kRadius : kLargestRadius); ++step) {
          if (kRadius == 0 && step >= kRowsPerThread + 2 * radius) break;
          const int row = step - radius;
          const int place = tile.at(y + row, x + dx);
          const R there_prediction = tile.prediction[place], there_target = tile.target[place];
          const int there_fits = column_fits & fits(tile.top + y + row, radius, a.height);
#pragma unroll
          for (int k = 0; k < kRowsPerThread; ++k) {
            const int dy = row - k;
            if (dy < -radius || dy > radius) continue;
            // The pixel itself has difference zero, hence derivative zero.
            const int count = here_fits[k] + there_fits;
            const Pair<R> pair(there_prediction - here_prediction[k], there_target - here_target[k]);
            sums[k] -= count == 0 ? R(0) : static_cast<R>(count) * pair.derivative();
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kRowsPerThread; ++k) {
        const int32_t row = tile.top + y + k, column = tile.left + x;
        if (row >= a.height || column >= a.width) continue;
        const T value = from_real<T>(sums[k] * scale);
        T* pixel = a.grad_prediction.data + a.grad_prediction.at(n, row, column);
        for (int32_t c = 0; c < a.channels; ++c) pixel[c * a.grad_prediction.c] = value;
      }
      __syncthreads();
    }
  }
}

template <class T, class Index>
CensusArguments<T, Index> census_arguments(const Tensor& prediction, const Tensor& target, int64_t patch_size) {
  CensusArguments<T, Index> a{};
  a.prediction = view<T, Index>(prediction);
  a.target = view<T, Index>(target);
  a.batch = static_cast<int32_t>(prediction.size(0));
  a.channels = static_cast<int32_t>(prediction.size(1));
  a.height = static_cast<int32_t>(prediction.size(2));
  a.width = static_cast<int32_t>(prediction.size(3));
  a.radius = static_cast<int32_t>(patch_size / 2);
  return a;
}

// One over the number of summands of the mean.
double census_scale(const Tensor& picture, int64_t patch_size) {
  return 1.0 / (static_cast<double>(picture.size(0)) * picture.size(2) * picture.size(3) * patch_size * patch_size);
}

Tensor census_loss(const Tensor& prediction, const Tensor& target, int64_t patch_size, bool) {
  const DeviceScope scope(prediction);
  Tensor loss = allocate({}, real_type(prediction), prediction);
  const bool empty = prediction.numel() == 0;
  for_type(prediction, [&](auto type) {
    using T = typename decltype(type)::type;
    using R = Real<T>;
    const int radius = static_cast<int>(patch_size / 2);
    const CensusPlan plan = census_plan(prediction.size(0), prediction.size(2), prediction.size(3), radius, sizeof(R));
    const int64_t blocks = empty ? 0 : plan.blocks;
    Tensor partial = allocate({blocks}, real_type(prediction), prediction);
    if (!empty) {
      for_index(needs_64bit_offsets({&prediction, &target}), [&](auto index) {
        using Index = typename decltype(index)::type;
        CensusArguments<T, Index> arguments = census_arguments<T, Index>(prediction, target, patch_size);
        arguments.partial = static_cast<R*>(partial.data_ptr());
        const auto kernel = radius == 3 ? &census_partial<T, Index, 3> : &census_partial<T, Index, 0>;
        launch("census_loss", kernel, plan.plan, scope.stream, arguments);
      });
    }
    // An empty batch: no partial sums, and a scale of infinity; the mean of nothing is NaN.
    Plan total;
    total.block[0] = kThreads;
    launch("census_loss", &census_total<R>, total, scope.stream, static_cast<const R*>(partial.data_ptr()), blocks,
           census_scale(prediction, patch_size), static_cast<R*>(loss.data_ptr()));
  });
  return loss;
}

Tensor census_loss_backward(const Tensor& grad_out, const Tensor& prediction, const Tensor& target, int64_t patch_size,
                            bool) {
  const DeviceScope scope(prediction);
  Tensor grad_prediction = empty_image(prediction);
  if (prediction.numel() == 0) return grad_prediction;
  for_type(prediction, [&](auto type) {
    using T = typename decltype(type)::type;
    using R = Real<T>;
    for_index(needs_64bit_offsets({&prediction, &target, &grad_prediction}), [&](auto index) {
      using Index = typename decltype(index)::type;
      CensusArguments<T, Index> arguments = census_arguments<T, Index>(prediction, target, patch_size);
      arguments.grad_prediction = view<T, Index>(grad_prediction);
      arguments.grad_out = static_cast<const R*>(grad_out.data_ptr());
      arguments.scale = census_scale(prediction, patch_size) / static_cast<double>(prediction.size(1));
      const int radius = arguments.radius;
      const auto kernel = radius == 3 ? &census_backward<T, Index, 3> : &census_backward<T, Index, 0>;
      launch("census_loss_backward", kernel,
             census_plan(prediction.size(0), prediction.size(2), prediction.size(3), radius, sizeof(R)).plan,
             scope.stream, arguments);
    });
  });
  return grad_prediction;
}

SAFNET_REGISTER(library) {
  library.impl("census_loss", TORCH_BOX(&census_loss));
  library.impl("census_loss_backward", TORCH_BOX(&census_loss_backward));
}

}  // namespace safnet::cuda
