// Moving pixels between tensors and packed rows of the computing type, one row a channel. Included by kernels only: see
// kernel.h.
//
// Everything behind works on packed float or double, so that only the functions here exist for every element type and
// layout.
#pragma once

#include <cstdlib>

#include "cpu/kernel.h"

namespace safnet::SAFNET_ISA {
namespace {

SAFNET_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
SAFNET_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Memory of one thread, aligned to a cache line.
template <class R>
class Scratch {
 public:
  explicit Scratch(int64_t count) : memory_(std::malloc(static_cast<size_t>(count) * sizeof(R) + 64)) {
    if (memory_ == nullptr) std::abort();
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  R* data() const { return reinterpret_cast<R*>((reinterpret_cast<uintptr_t>(memory_) + 63) & ~uintptr_t{63}); }
  R& operator[](int64_t index) const { return data()[index]; }

 private:
  void* memory_;
};

// Pixels of one row, `step` apart.
struct Span {
  int64_t n, y, x, step, pixels;
};

SAFNET_INLINE bool channels_inside(const View& view) { return view.stride[1] == 1 && view.size[1] > 1; }

constexpr int kSide = 8;  // of the squares that transposition goes by

// Rows of neighbouring channels lie far apart, and no prefetcher of the processor sees the pattern: while one is moved,
// that of a channel further on is asked for.
constexpr int64_t kChannelsAhead = 4;

template <bool ForWriting, class T>
SAFNET_INLINE void ask_for(const T* row, int64_t pixels) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < pixels + line - 1; i += line) __builtin_prefetch(row + i, ForWriting, 3);
}

template <class T, class R>
void load_channels_of(const View& view, const Span& span, int64_t first, int64_t channels, R* __restrict out,
                      int64_t pitch) {
  const T* source = row<T>(view, span.n, first, span.y) + span.x * view.stride[3];
  const int64_t stride = span.step * view.stride[3];
  if (!channels_inside(view)) {
    for (int64_t c = 0; c < channels; ++c, source += view.stride[1], out += pitch) {
      if (stride == 1 && c + kChannelsAhead < channels)
        ask_for<false>(source + kChannelsAhead * view.stride[1], span.pixels);
      if (stride == 1)
        for (int64_t i = 0; i < span.pixels; ++i) out[i] = load(source[i]);
      else if (stride == 2)  // spelt out, it vectorises
        for (int64_t i = 0; i < span.pixels; ++i) out[i] = load(source[2 * i]);
      else
        for (int64_t i = 0; i < span.pixels; ++i) out[i] = load(source[i * stride]);
    }
    return;
  }
  int64_t x = 0;
  for (; x + kSide <= span.pixels; x += kSide) {
    int64_t c = 0;
    for (; c + kSide <= channels; c += kSide) {
      R square[kSide][kSide];
      for (int i = 0; i < kSide; ++i)
        for (int j = 0; j < kSide; ++j) square[i][j] = load(source[(x + i) * stride + c + j]);
      for (int j = 0; j < kSide; ++j)
        for (int i = 0; i < kSide; ++i) out[(c + j) * pitch + x + i] = square[i][j];
    }
    for (; c < channels; ++c)
      for (int i = 0; i < kSide; ++i) out[c * pitch + x + i] = load(source[(x + i) * stride + c]);
  }
  for (; x < span.pixels; ++x)
    for (int64_t c = 0; c < channels; ++c) out[c * pitch + x] = load(source[x * stride + c]);
}

template <class T, class R>
void store_channels_of(const R* const* rows, int64_t channels, const View& view, const Span& span, int64_t first,
                       int64_t channel_step) {
  T* __restrict out = row<T>(view, span.n, first, span.y) + span.x * view.stride[3];
  const int64_t stride = span.step * view.stride[3];
  if (!channels_inside(view) || channel_step != 1) {
    for (int64_t c = 0; c < channels; ++c, out += channel_step * view.stride[1]) {
      const R* values = rows[c];
      if (stride == 1 && c + kChannelsAhead < channels)
        ask_for<true>(out + kChannelsAhead * channel_step * view.stride[1], span.pixels);
      if (stride == 1)
        for (int64_t i = 0; i < span.pixels; ++i) store(values[i], out[i]);
      else
        for (int64_t i = 0; i < span.pixels; ++i) store(values[i], out[i * stride]);
    }
    return;
  }
  int64_t x = 0;
  for (; x + kSide <= span.pixels; x += kSide) {
    int64_t c = 0;
    for (; c + kSide <= channels; c += kSide) {
      R square[kSide][kSide];
      for (int j = 0; j < kSide; ++j)
        for (int i = 0; i < kSide; ++i) square[i][j] = rows[c + j][x + i];
      for (int i = 0; i < kSide; ++i)
        for (int j = 0; j < kSide; ++j) store(square[i][j], out[(x + i) * stride + c + j]);
    }
    for (; c < channels; ++c)
      for (int i = 0; i < kSide; ++i) store(rows[c][x + i], out[(x + i) * stride + c]);
  }
  for (; x < span.pixels; ++x)
    for (int64_t c = 0; c < channels; ++c) store(rows[c][x], out[x * stride + c]);
}

// Reads channels [first, first + channels) of a span into rows that begin `pitch` apart.
void load_channels(const View& view, const Span& span, int64_t first, int64_t channels, double* out, int64_t pitch) {
  load_channels_of<double>(view, span, first, channels, out, pitch);
}

void load_channels(const View& view, const Span& span, int64_t first, int64_t channels, float* out, int64_t pitch) {
  if (view.type == Type::kFloat32) load_channels_of<float>(view, span, first, channels, out, pitch);
  else if (view.type == Type::kFloat16) load_channels_of<Half>(view, span, first, channels, out, pitch);
  else load_channels_of<BFloat16>(view, span, first, channels, out, pitch);
}

// Writes rows[c] to channel first + c * channel_step of a span.
void store_channels(const double* const* rows, int64_t channels, const View& view, const Span& span, int64_t first,
                    int64_t channel_step) {
  store_channels_of<double>(rows, channels, view, span, first, channel_step);
}

void store_channels(const float* const* rows, int64_t channels, const View& view, const Span& span, int64_t first,
                    int64_t channel_step) {
  if (view.type == Type::kFloat32) store_channels_of<float>(rows, channels, view, span, first, channel_step);
  else if (view.type == Type::kFloat16) store_channels_of<Half>(rows, channels, view, span, first, channel_step);
  else store_channels_of<BFloat16>(rows, channels, view, span, first, channel_step);
}

// One element of a tensor, `index` from its first.
template <class R>
R element(const void* data, int64_t index, Type type) {
  switch (type) {
    case Type::kFloat32: return static_cast<R>(load(static_cast<const float*>(data)[index]));
    case Type::kFloat64: return static_cast<R>(load(static_cast<const double*>(data)[index]));
    case Type::kFloat16: return static_cast<R>(load(static_cast<const Half*>(data)[index]));
    default: return static_cast<R>(load(static_cast<const BFloat16*>(data)[index]));
  }
}

SAFNET_INLINE void set_element(void* data, int64_t index, Type type, double value) {
  switch (type) {
    case Type::kFloat32: return store(static_cast<float>(value), static_cast<float*>(data)[index]);
    case Type::kFloat64: return store(value, static_cast<double*>(data)[index]);
    case Type::kFloat16: return store(static_cast<float>(value), static_cast<Half*>(data)[index]);
    default: return store(static_cast<float>(value), static_cast<BFloat16*>(data)[index]);
  }
}

}  // namespace
}  // namespace safnet::SAFNET_ISA
