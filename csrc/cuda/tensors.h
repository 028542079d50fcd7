// Host side of the CUDA kernels: tensors of the stable ABI to views, allocation by the library's layout rule,
// launching.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <mutex>
#include <optional>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/device.cuh"
#include "cuda/plans.h"

// Where kernels run on the CPU (simulated_gpu/), the operators are registered for CPU tensors, under a namespace of
// their own.
#if defined(SAFNET_OPS_SIMULATED)
#define SAFNET_REGISTER(library) STABLE_TORCH_LIBRARY_IMPL(safnet_ops_simulated, CPU, library)
extern "C" void simulated_allocation(void* data, size_t bytes);
#else
#define SAFNET_REGISTER(library) STABLE_TORCH_LIBRARY_IMPL(safnet_ops, CUDA, library)
#endif

namespace safnet::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

// Makes a tensor's device current while it lives, and gives the stream that its work belongs to.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor) {
    const int32_t device = tensor.get_device_index();
    if (tensor.is_cuda()) guard_.emplace(device);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    this->stream = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream;

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

template <class T>
struct Identity {
  using type = T;
};

// Lets a kernel have all the shared memory that a block may take; beyond 48 KiB it has to ask. The limit belongs to the
// kernel, not to a launch: set to what each needs, one thread could lower it before another's launch.
inline void allow_most_shared_memory(const void* kernel, const char* name) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;  // kernels by device
  int device = 0, most = 0;
  check(cudaGetDevice(&device), name);
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) != 0) return;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name);
  allowed.insert({kernel, device});
}

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), const Plan& plan, cudaStream_t stream,
            typename Identity<Parameters>::type... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (plan.shared_bytes > 48 * 1024) allow_most_shared_memory(function, name);
  void* pointers[] = {&arguments...};
  const dim3 grid(plan.grid[0], plan.grid[1], plan.grid[2]), block(plan.block[0], plan.block[1], plan.block[2]);
  check(cudaLaunchKernel(function, grid, block, pointers, plan.shared_bytes, stream), name);
}

inline void zero(const Tensor& tensor, cudaStream_t stream) {
  if (tensor.numel() == 0) return;
  check(cudaMemsetAsync(tensor.data_ptr(), 0, static_cast<size_t>(tensor.numel()) * tensor.element_size(), stream),
        "memset");
}

inline Tensor allocate(const std::vector<int64_t>& size, ScalarType type, const Tensor& model,
                       bool channels_last = false) {
  using torch::headeronly::MemoryFormat;
  Tensor tensor = torch::stable::empty(size, type, std::nullopt, model.device(), std::nullopt,
                                       channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
#if defined(SAFNET_OPS_SIMULATED)
  simulated_allocation(tensor.data_ptr(), static_cast<size_t>(tensor.numel()) * tensor.element_size());
#endif
  return tensor;
}

// The rule of safnet_ops.checks.is_channels_last.
inline bool is_channels_last(const Tensor& tensor) {
  return tensor.size(1) > 1 && tensor.stride(1) == 1 && tensor.stride(3) >= tensor.size(1);
}

// Uninitialised, of the model's shape, in the layout that results take.
inline Tensor empty_image(const Tensor& model, ScalarType type) {
  const auto size = model.sizes();
  return allocate({size.begin(), size.end()}, type, model, is_channels_last(model));
}

inline Tensor empty_image(const Tensor& model) { return empty_image(model, model.scalar_type()); }

inline Tensor no_gradient(const Tensor& model) { return allocate({0}, model.scalar_type(), model); }

// What a backward operator returns for one input: a tensor of no elements where no gradient is needed.
inline Tensor empty_gradient(const Tensor& model, bool needed) {
  return needed ? empty_image(model) : no_gradient(model);
}

inline ScalarType real_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline int64_t largest_offset(const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) == 0) return 0;
    last += (tensor.size(i) - 1) * tensor.stride(i);
  }
  return last;
}

// Whether any of the tensors has an offset that 32 bits do not hold, or a test asks for the 64-bit path.
inline bool needs_64bit_offsets(std::initializer_list<const Tensor*> tensors) {
  const char* forced = std::getenv("SAFNET_OPS_FORCE_64BIT_OFFSETS");
  if (forced != nullptr && forced[0] == '1') return true;
  for (const Tensor* tensor : tensors)
    // Threads beyond the last pixel still form an offset, hence the margin.
    if (tensor != nullptr && largest_offset(*tensor) > std::numeric_limits<int32_t>::max() - (1 << 20)) return true;
  return false;
}

template <class T, class Index>
View<T, Index> view(const Tensor& tensor) {
  using Element = std::remove_const_t<T>;
  return {static_cast<Element*>(tensor.data_ptr()), static_cast<Index>(tensor.stride(0)),
          static_cast<Index>(tensor.stride(1)), static_cast<Index>(tensor.stride(2)),
          static_cast<Index>(tensor.stride(3))};
}

template <class T, class Index>
View<T, Index> view(const std::optional<Tensor>& tensor) {
  return tensor ? view<T, Index>(*tensor) : View<T, Index>{};
}

template <class Index>
GeometryView<Index> geometry_view(const Tensor& tensor) {
  return {tensor.data_ptr(),
          static_cast<Index>(tensor.stride(0)),
          static_cast<Index>(tensor.stride(1)),
          static_cast<Index>(tensor.stride(2)),
          static_cast<Index>(tensor.stride(3)),
          tensor.scalar_type() == ScalarType::Float};
}

// Whether runs of `count` pixels of every row of every channel start at multiples of the run's access size.
inline bool allows_vectors(const Tensor& tensor, int count) {
  const int64_t bytes = std::min<int64_t>(16, count * static_cast<int64_t>(tensor.element_size()));
  if (tensor.stride(3) != 1 || tensor.size(3) % count != 0) return false;
  if (reinterpret_cast<uintptr_t>(tensor.data_ptr()) % bytes != 0) return false;
  for (int i = 0; i < 3; ++i)
    if (tensor.size(i) > 1 && tensor.stride(i) % count != 0) return false;
  return true;
}

template <class T>
struct Tag {
  using type = T;
};

// Calls function(Tag<T>()) with the element type of a floating-point tensor.
template <class Function>
void for_type(const Tensor& tensor, Function function) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return function(Tag<float>());
    case ScalarType::Double: return function(Tag<double>());
    case ScalarType::Half: return function(Tag<Half>());
    case ScalarType::BFloat16: return function(Tag<BFloat16>());
    default: STD_TORCH_CHECK(false, "safnet_ops: tensors must be float32, float64, float16 or bfloat16");
  }
}

template <class Function>
void for_index(bool wide, Function function) {
  return wide ? function(Tag<int64_t>()) : function(Tag<int32_t>());
}

}  // namespace safnet::cuda
