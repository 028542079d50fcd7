// Vectors of the widest registers that an instruction set has, through the compilers' vector types: no intrinsics, one
// source. Included by kernels only: see kernel.h.
#pragma once

#include "cpu/kernel.h"

namespace safnet::SAFNET_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class R, int Bytes = kVectorBytes>
struct Simd {
  typedef R Type __attribute__((vector_size(Bytes), aligned(sizeof(R)), may_alias));
};
template <class R>
using Vector = typename Simd<R>::Type;
template <class R>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(R));

template <class R, int Bytes = kVectorBytes>
SAFNET_INLINE typename Simd<R, Bytes>::Type vector_at(const R* source) {
  return *reinterpret_cast<const typename Simd<R, Bytes>::Type*>(source);
}

template <class R, int Bytes = kVectorBytes>
SAFNET_INLINE void store_vector(typename Simd<R, Bytes>::Type values, R* out) {
  *reinterpret_cast<typename Simd<R, Bytes>::Type*>(out) = values;
}

#if defined(__clang__)
#define SAFNET_SHUFFLE(Bytes, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SAFNET_SHUFFLE(Bytes, a, b, ...) __builtin_shuffle(a, b, (typename Simd<int32_t, Bytes>::Type){__VA_ARGS__})
#endif

}  // namespace
}  // namespace safnet::SAFNET_ISA
