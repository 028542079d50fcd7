// Host side of the CPU kernels: tensors of the stable ABI to views, output allocation by the library's layout rule,
// threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/kernel.h"
#include "workspace.h"

namespace safnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::kFloat32;
    case ScalarType::Double: return Type::kFloat64;
    case ScalarType::Half: return Type::kFloat16;
    case ScalarType::BFloat16: return Type::kBFloat16;
    default: STD_TORCH_CHECK(false, "safnet_ops: tensors must be float32, float64, float16 or bfloat16");
  }
}

inline View view(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 4, "safnet_ops: tensors must have 4 dimensions, got ", tensor.dim());
  View result;
  result.data = tensor.data_ptr();
  result.type = type_of(tensor);
  for (int i = 0; i < 4; ++i) {
    result.size[i] = tensor.size(i);
    result.stride[i] = tensor.stride(i);
  }
  return result;
}

inline View view(const std::optional<Tensor>& tensor) { return tensor ? view(*tensor) : View{}; }

// The rule of safnet_ops.checks.is_channels_last.
inline bool is_channels_last(const Tensor& tensor) {
  return tensor.size(1) > 1 && tensor.stride(1) == 1 && tensor.stride(3) >= tensor.size(1);
}

// Memory of this size comes from the system anew every time: it is the largest that glibc's allocator keeps. Advice
// only: nothing changes where huge pages are not offered.
inline void ask_for_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  if (bytes < size_t{32} << 20) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(first), bytes - kPage, MADV_HUGEPAGE);
#endif
}

inline size_t bytes_of(ScalarType type) { return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2; }

// In the memory of the calling thread's workspace, which gets it back with the tensor's end. Nothing where it has none.
inline std::optional<Tensor> empty_in_workspace(const std::vector<int64_t>& size, ScalarType type, bool channels_last) {
  size_t bytes = bytes_of(type);
  for (const int64_t length : size) bytes *= static_cast<size_t>(length);
  const std::shared_ptr<Workspace> workspace = bytes < kFresh ? nullptr : current_workspace();
  if (workspace == nullptr) return std::nullopt;
  const Workspace::Part part = workspace->take(bytes);
  if (part.memory == nullptr) return std::nullopt;
  std::vector<int64_t> stride(size.size(), 1);
  for (size_t axis = size.size(); axis-- > 1;) stride[axis - 1] = stride[axis] * size[axis];
  if (channels_last) stride = {stride[0], 1, size[3] * size[1], size[1]};
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(part.memory, size, stride, cpu, type,
                                  [workspace, part](void*) { workspace->give_back(part); });
}

inline Tensor empty(const std::vector<int64_t>& size, ScalarType type, bool channels_last = false) {
  using torch::headeronly::MemoryFormat;
  if (std::optional<Tensor> result = empty_in_workspace(size, type, channels_last)) return *result;
  Tensor result = torch::stable::empty(size, type, std::nullopt, std::nullopt, std::nullopt,
                                       channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  ask_for_huge_pages(result.data_ptr(), static_cast<size_t>(result.numel()) * result.element_size());
  return result;
}

// Uninitialised, of the model's shape and type, in the layout that results take.
inline Tensor empty_image(const Tensor& model) {
  const auto size = model.sizes();
  return empty({size.begin(), size.end()}, model.scalar_type(), is_channels_last(model));
}

// What a backward operator returns for one input: a tensor of no elements where no gradient is needed.
inline Tensor empty_gradient(const Tensor& model, bool needed) {
  return needed ? empty_image(model) : empty({0}, model.scalar_type());
}

inline Tensor zero_gradient(const Tensor& model, bool needed) {
  Tensor gradient = empty_gradient(model, needed);
  if (needed) torch::stable::zero_(gradient);
  return gradient;
}

constexpr int64_t kPixelsPerTask = 8192;  // below this, starting a thread costs more than it saves

// Calls kernel(arguments, begin, end) for ranges of the rows of all pictures, in torch's own threads.
template <class Arguments>
void for_rows(const View& picture, void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& arguments) {
  const int64_t rows = picture.size[0] * picture.size[2];
  if (rows == 0 || picture.size[3] == 0) return;
  const int64_t grain = std::max<int64_t>(1, kPixelsPerTask / picture.size[3]);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

// Fills an image gradient: `reach_kernel` notes which image rows each flow row reads, `band_kernel` fills bands of the
// image (see scatter.h). `arguments` has members `reach` and `bands` for it.
template <class Arguments>
void scatter(const View& image, void (*reach_kernel)(const Arguments&, int64_t, int64_t),
             void (*band_kernel)(const Arguments&, int64_t, int64_t), Arguments& arguments) {
  if (image.size[0] * image.size[1] * image.size[2] * image.size[3] == 0) return;
  std::vector<int32_t> reach(static_cast<size_t>(image.size[0] * image.size[2] * 2));  // first and last row of each
  arguments.reach = reach.data();
  for_rows(image, reach_kernel, arguments);
  const int64_t useful = std::max<int64_t>(1, image.size[2] * image.size[3] / kPixelsPerTask);
  arguments.bands = static_cast<int32_t>(std::min<int64_t>(useful, 4 * torch::stable::get_num_threads()));
  torch::stable::parallel_for(0, image.size[0] * arguments.bands, 1,
                              [&](int64_t begin, int64_t end) { band_kernel(arguments, begin, end); });
}

}  // namespace safnet
