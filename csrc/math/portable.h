// What lets one header of per-pixel mathematics compile for CPU and GPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SAFNET_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Always inlined: the same header is compiled for several instruction sets, and no shared out-of-line copy may exist.
#define SAFNET_INLINE inline __attribute__((always_inline))
#else
#define SAFNET_INLINE inline
#endif
