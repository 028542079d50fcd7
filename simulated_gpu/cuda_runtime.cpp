// Stands in for the CUDA runtime where the kernels run on the CPU: kernels register themselves here by name, and a
// launch calls back into Python, which executes the kernel's PTX. Memory is host memory; there is one stream.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>

struct Dim3 {
  unsigned x, y, z;
};

using LaunchCallback = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, size_t shared,
                               void** arguments);
using AllocationCallback = void (*)(void* data, size_t bytes);
using SharedLimitCallback = void (*)(const char* kernel, int bytes);

namespace {
std::unordered_map<const void*, std::string> kernels;
std::map<std::pair<const void*, int>, int> shared_limit;  // of a kernel on a device
LaunchCallback on_launch = nullptr;
AllocationCallback on_allocation = nullptr;
SharedLimitCallback on_shared_limit = nullptr;
int compute_capability = 90;
constexpr int kInvalidValue = 1, kLaunchFailure = 719;
constexpr int kMaxDynamicSharedMemorySize = 8;               // cudaFuncAttribute
constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76;  // cudaDeviceAttr
constexpr int kMultiProcessorCount = 16, kSharedMemoryPerBlockOptin = 97;

int largest_shared() { return compute_capability < 80 ? 64 * 1024 : compute_capability < 90 ? 99 * 1024 : 227 * 1024; }
}  // namespace

extern "C" {

void simulated_callbacks(LaunchCallback launch, AllocationCallback allocation, SharedLimitCallback limit) {
  on_launch = launch, on_allocation = allocation, on_shared_limit = limit;
}
void simulated_capability(int capability) { compute_capability = capability; }
void simulated_allocation(void* data, size_t bytes) {
  if (on_allocation != nullptr && bytes > 0) on_allocation(data, bytes);
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernels[host] = name;
}

// cudaLaunchKernel is all that the library calls; the compiler's own launch stubs are never run.
int __cudaGetKernel(void**, const void*) { return kInvalidValue; }
int __cudaLaunchKernel(void*, Dim3, Dim3, void**, size_t, void*) { return kInvalidValue; }
int __cudaPopCallConfiguration(Dim3*, Dim3*, size_t*, void*) { return kInvalidValue; }

int cudaLaunchKernel(const void* function, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  const auto found = kernels.find(function);
  if (found == kernels.end() || on_launch == nullptr) return kInvalidValue;
  const auto limit = shared_limit.find({function, compute_capability});
  const size_t allowed = limit == shared_limit.end() ? 48 * 1024 : static_cast<size_t>(limit->second);
  if (shared > allowed || shared > static_cast<size_t>(largest_shared()) || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.y > 65535 || grid.z > 65535)
    return kInvalidValue;
  if (size_t{block.x} * block.y * block.z > 1024 || block.x * block.y * block.z == 0) return kInvalidValue;
  return on_launch(found->second.c_str(), &grid.x, &block.x, shared, arguments) == 0 ? 0 : kLaunchFailure;
}

int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  if (attribute != kMaxDynamicSharedMemorySize || value > largest_shared()) return kInvalidValue;
  shared_limit[{function, compute_capability}] = value;
  if (on_shared_limit != nullptr) on_shared_limit(kernels[function].c_str(), value);
  return 0;
}

int cudaMemsetAsync(void* data, int value, size_t bytes, void*) {
  std::memset(data, value, bytes);
  return 0;
}

int cudaDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case kCapabilityMajor: *value = compute_capability / 10; return 0;
    case kCapabilityMinor: *value = compute_capability % 10; return 0;
    case kMultiProcessorCount:
      *value = compute_capability < 90 ? 1 : 132;
      return 0;  // 1: blocks have more than one tile each
    case kSharedMemoryPerBlockOptin: *value = largest_shared(); return 0;
    default: return kInvalidValue;
  }
}

// Every capability is a device of its own: what host code keeps of a device must not serve another.
int cudaGetDevice(int* device) {
  *device = compute_capability;
  return 0;
}

const char* cudaGetErrorName(int error) {
  return error == kLaunchFailure ? "cudaErrorLaunchFailure" : "cudaErrorInvalidValue";
}
const char* cudaGetErrorString(int) { return "the simulated launch failed"; }

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
}
