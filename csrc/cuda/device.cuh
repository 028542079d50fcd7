// What all kernels share on the device: number types, vector accesses, tensors seen through strides.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace safnet::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

// Coordinates and sums are float, whatever the storage type; double stays double.
template <class T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float to_real(float value) { return value; }
__device__ __forceinline__ double to_real(double value) { return value; }
__device__ __forceinline__ float to_real(Half value) { return __half2float(value); }
__device__ __forceinline__ float to_real(BFloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T from_real(Real<T> value) {
  if constexpr (std::is_same_v<T, Half>) return __float2half_rn(value);
  if constexpr (std::is_same_v<T, BFloat16>) return __float2bfloat16_rn(value);
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) return value;
}

// kCount adjacent elements, moved in accesses of up to 16 bytes. The address is a multiple of that access.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T value[kCount];
};

// A load of what no kernel writes meanwhile. The toolkit's __ldg of halves is assembly that the compiler may execute
// even where a condition forbids it: theirs goes through the integer of that size.
template <class T>
__device__ __forceinline__ T read_only(const T* source) {
  if constexpr (sizeof(T) == 2) {
    const unsigned short bits = __ldg(reinterpret_cast<const unsigned short*>(source));
    T value;
    memcpy(&value, &bits, sizeof(T));
    return value;
  } else {
    return __ldg(source);
  }
}

template <int kCount, class T>
__device__ __forceinline__ void load(const T* source, Real<T>* out) {
  if constexpr (kCount == 1) {
    out[0] = to_real(read_only(source));
  } else {
    constexpr int kBytes = sizeof(T) * kCount;
    static_assert(kBytes == 8 || kBytes % 16 == 0);
    using Word = std::conditional_t<kBytes == 8, uint2, uint4>;
    union {
      Word words[kBytes / sizeof(Word)];
      Pack<T, kCount> pack;
    } data{};
#pragma unroll
    for (int i = 0; i < kBytes / static_cast<int>(sizeof(Word)); ++i)
      data.words[i] = __ldg(reinterpret_cast<const Word*>(source) + i);
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = to_real(data.pack.value[i]);
  }
}

template <int kCount, class T>
__device__ __forceinline__ void store(T* target, const Real<T>* values) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.value[i] = from_real<T>(values[i]);
  *reinterpret_cast<Pack<T, kCount>*>(target) = pack;
}

// A tensor (N, C, H, W); strides in elements. Index is int32_t where every offset of every tensor of the launch fits.
template <class T, class Index>
struct View {
  T* data;
  Index n, c, y, x;

  __device__ __forceinline__ Index at(Index batch, Index row, Index column) const {
    return batch * n + row * y + column * x;
  }
};

// A flow or a mask: of the images' type or of float.
template <class Index>
struct GeometryView {
  const void* data;
  Index n, c, y, x;
  bool is_float;

  __device__ __forceinline__ Index at(Index batch, Index row, Index column) const {
    return batch * n + row * y + column * x;
  }
};

template <class T, int kCount, class Index>
__device__ __forceinline__ void load_geometry(const GeometryView<Index>& view, Index offset, Real<T>* out) {
  if constexpr (sizeof(T) == 2) {
    if (view.is_float) {  // the same for all threads
      load<kCount>(static_cast<const float*>(view.data) + offset, out);
      return;
    }
  }
  load<kCount>(static_cast<const T*>(view.data) + offset, out);
}

template <class T, class Index>
__device__ __forceinline__ void store_geometry(const GeometryView<Index>& view, Index offset, Real<T> value) {
  void* data = const_cast<void*>(view.data);
  if constexpr (sizeof(T) == 2) {
    if (view.is_float) {
      static_cast<float*>(data)[offset] = value;
      return;
    }
  }
  static_cast<T*>(data)[offset] = from_real<T>(value);
}

// Which pixel(s) a thread works on: runs of kCount pixels of all rows of all pictures, numbered in order.
template <class Index>
struct PixelRun {
  Index n, y, x;
};

template <int kCount, class Index>
__device__ __forceinline__ PixelRun<Index> pixel_run(Index item, int32_t height, int32_t width) {
  using Unsigned = std::make_unsigned_t<Index>;  // unsigned divisions are shorter
  const Unsigned runs = static_cast<Unsigned>(width / kCount);
  const Unsigned row = static_cast<Unsigned>(item) / runs;
  const Unsigned n = row / static_cast<Unsigned>(height);
  return {static_cast<Index>(n), static_cast<Index>(row - n * height),
          static_cast<Index>((item - row * runs) * kCount)};
}

template <class Index>
__device__ __forceinline__ Index thread_item() {
  return static_cast<Index>(blockIdx.x) * static_cast<Index>(blockDim.x) + static_cast<Index>(threadIdx.x);
}

}  // namespace safnet::cuda
