// How a CPU kernel is written once and compiled for several instruction sets.
//
// The build compiles every csrc/cpu/*.cpp once per instruction set, with SAFNET_ISA naming it. A file's kernels lie in
// namespace safnet::SAFNET_ISA and take plain structs of pointers and strides; its host part, between #if SAFNET_HOST
// and #endif, exists once, in the baseline object: it registers the operator, allocates, splits the work into rows, and
// calls the best kernels that this processor runs. Kernels must not call inline functions of the standard library that
// may end up out of line: the linker would keep one copy of them for all instruction sets.
#pragma once

#include <cstdint>

#include "cpu/scalar.h"
#include "library.h"

namespace safnet {

// A tensor (N, C, H, W) as kernels see it; strides in elements. No data: an absent argument.
struct View {
  void* data = nullptr;
  Type type = Type::kFloat32;
  int64_t size[4] = {};
  int64_t stride[4] = {};
};

// Start of one row of one channel.
template <class T>
SAFNET_INLINE T* row(const View& view, int64_t n, int64_t c, int64_t y) {
  return static_cast<T*>(view.data) + n * view.stride[0] + c * view.stride[1] + y * view.stride[2];
}

// Calls kernel<R>(arguments...) for the type R that an image is computed in.
#define SAFNET_DISPATCH(image, kernel, ...)                          \
  do {                                                               \
    if ((image).type == Type::kFloat64) kernel<double>(__VA_ARGS__); \
    else kernel<float>(__VA_ARGS__);                                 \
  } while (0)

// Declares a kernel in the namespace of every instruction set, and SAFNET_KERNEL(name) picks the one to call.
// clang-format off
#if defined(SAFNET_X86_VARIANTS)
#define SAFNET_DECLARE(name, ...)                \
  namespace baseline { void name(__VA_ARGS__); } \
  namespace avx2 { void name(__VA_ARGS__); }     \
  namespace avx512 { void name(__VA_ARGS__); }
#define SAFNET_KERNEL(name)                                                                   \
  (::safnet::instruction_set() >= ::safnet::InstructionSet::kAvx512 ? &::safnet::avx512::name \
   : ::safnet::instruction_set() == ::safnet::InstructionSet::kAvx2 ? &::safnet::avx2::name   \
                                                                    : &::safnet::baseline::name)
#else
#define SAFNET_DECLARE(name, ...) \
  namespace baseline { void name(__VA_ARGS__); }
#define SAFNET_KERNEL(name) (&::safnet::baseline::name)
#endif
// clang-format on

}  // namespace safnet
