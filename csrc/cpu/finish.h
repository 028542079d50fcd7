// What becomes of a tile's sums of one channel while they are in registers: they are kept, or made results of. Included
// by kernels only: see kernel.h.
#pragma once

#include "cpu/channels.h"
#include "cpu/convolution.h"
#include "cpu/simd.h"

namespace safnet::SAFNET_ISA {
namespace {

// A vector of float32 from and to tensors.
typedef uint32_t FloatBits __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfVector __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

SAFNET_INLINE Vector<float> load_vector(const float* from) { return vector_at(from); }
SAFNET_INLINE Vector<float> load_vector(const BFloat16* from) {
  const HalfVector bits = *reinterpret_cast<const HalfVector*>(from);
  return (Vector<float>)(__builtin_convertvector(bits, FloatBits) << 16);
}

SAFNET_INLINE void store_numbers(const Vector<float>& values, float* to) { store_vector(values, to); }
SAFNET_INLINE void store_numbers(const Vector<float>& values, BFloat16* to) {  // as store() in scalar.h
  const FloatBits bits = (FloatBits)values, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const FloatBits nan = FloatBits{} + 0x7fc0u;
  *reinterpret_cast<HalfVector*>(to) = __builtin_convertvector(values == values ? rounded : nan, HalfVector);
}

// Copies the first `count` of a vector's numbers, by halves.
template <class T>
SAFNET_INLINE void copy_part(const T* from, int64_t count, T* to) {
  for (int64_t half = kLanes<float> / 2; half > 0; half /= 2) {
    if ((count & half) == 0) continue;
    __builtin_memcpy(to, from, static_cast<size_t>(half) * sizeof(T));
    from += half, to += half;
  }
}

SAFNET_INLINE Vector<float> activate(const Vector<float>& sum, const Vector<float>& slope) {
  return sum > 0 ? sum : sum * slope;
}

// to[0 .. count) = activate(sum + added[0 .. count)), of a vector's numbers at most; `added` may be null.
template <class T>
SAFNET_INLINE void finish_vector(Vector<float> sum, const T* added, const Vector<float>& slope, int64_t count, T* to) {
  if (count >= kLanes<float>) {
    if (added != nullptr) sum += load_vector(added);
    store_numbers(activate(sum, slope), to);
  } else if (count > 0) {
    T part[kLanes<float>] = {};
    if (added != nullptr) copy_part(added, count, part);
    store_numbers(activate(sum + load_vector(part), slope), part);
    copy_part(part, count, to);
  }
}

// Keeps sums as they are made, for what makes results of them: [channel][row][column].
struct KeepSums {
  Sums<float> sums;

  template <int N>
  SAFNET_INLINE void operator()(int64_t c, int64_t row, int64_t column, const Vector<float> (&values)[N]) const {
    float* const to = sums.data + c * sums.channel + row * sums.row + column;
    for (int v = 0; v < N; ++v) store_vector(values[v], to + v * kLanes<float>);
  }
};

// Rows in a tensor: of a tile's first channel, row and column, and the distances of others.
template <class T>
struct Rows {
  T* data;
  int64_t channel, row;

  SAFNET_INLINE T* at(int64_t c, int64_t j, int64_t x) const { return data + c * channel + j * row + x; }
};

// Makes results of the sums of a channel's neighbouring columns: adds the residual, applies the activation and writes
// what lies in the picture. Where a tensor is absent it has no data.
template <class T>
struct FinishRows {
  Rows<T> out, residual;
  const float* slopes;
  int64_t rows, columns;

  template <int N>
  SAFNET_INLINE void operator()(int64_t c, int64_t row, int64_t column, const Vector<float> (&values)[N]) const {
    constexpr int64_t L = kLanes<float>;
    if (row >= rows) return;
    T* const to = out.at(c, row, column);
    const T* const added = residual.data == nullptr ? nullptr : residual.at(c, row, column);
    const Vector<float> slope = Vector<float>{} + (slopes == nullptr ? 1.0f : slopes[c]);
    for (int v = 0; v < N; ++v) {
      finish_vector(values[v], added == nullptr ? nullptr : added + v * L, slope, columns - column - v * L, to + v * L);
      __builtin_prefetch(to + v * L + out.channel, 1);
    }
  }
};

}  // namespace
}  // namespace safnet::SAFNET_ISA
