// group_conv_shuffle on the CPU: 3x3 grouped convolution + bias + residual + PReLU + channel shuffle, and its
// gradients.
//
// The gradient of the input is the same convolution with transposed weights, one for each phase of the stride. The
// gradient of the weights is a correlation of the same packed tiles. Sums over pixels are cut into a number of parts
// that depends on the shapes alone and are added in order, so that results do not depend on the number of threads.

#include "cpu/convolution.h"
#include "cpu/kernel.h"
#include "cpu/matrix_unit.h"
#include "cpu/weight_gradient.h"
#include "cpu/winograd.h"
#include "cpu/winograd_4x4.h"
#include "math/gradients.h"

namespace safnet {

// How sums are made: by definition, by Winograd's F(2x2, 3x3) or F(4x4, 3x3), or by definition with the processor's
// matrix unit.
enum class Method { kDefinition, kWinograd2x2, kWinograd4x4, kMatrixUnit };

struct ConvolutionArguments {
  TapGrid grid;
  View input, weight, out;
  View residual, preactivation;  // of the output's shape; no data where absent
  const void *bias, *slope;      // one per output channel; null where absent
  int64_t bias_stride, slope_stride;
  void* packed;    // weights in the order in which the loop reads them
  int64_t groups;  // of channels_in input and channels_out output channels each
  int64_t channels_in, channels_out;
  bool transposed;  // exchange the weight's two channel dimensions
  bool shuffled;    // write output channels in shuffled order
  Method method;
  int64_t out_stride, out_y, out_x;  // grid position (y, x) is written to out_stride * (y, x) + (out_y, out_x)
};

// The gradient before the activation, in the convolution's channel order, and its sums.
struct ActivationGradientArguments {
  View grad_out, preactivation;  // no preactivation: no activation
  View grad_before;              // the result; no data where only the sums are wanted
  const void* slope;
  int64_t slope_stride;
  double* sums;  // (parts, channels, 2): for bias and slope
  int64_t groups, rows_per_part;
};

SAFNET_DECLARE(conv_pack_weights, const ConvolutionArguments&, int64_t, int64_t)
SAFNET_DECLARE(conv_tiles, const ConvolutionArguments&, int64_t, int64_t)
SAFNET_DECLARE(conv_activation_gradient, const ActivationGradientArguments&, int64_t, int64_t)
SAFNET_DECLARE(conv_weight_gradient, const WeightGradientArguments&, int64_t, int64_t)
SAFNET_DECLARE(conv_reduce_weight_gradient, const WeightGradientArguments&, int64_t, int64_t)

}  // namespace safnet

namespace safnet::SAFNET_ISA {
namespace {

// Where the 3x3 weights between output channel o and input channel c of a group begin.
SAFNET_INLINE int64_t weights_between(const ConvolutionArguments& a, int64_t group, int64_t o, int64_t c) {
  const int64_t first = a.transposed ? group * a.channels_in + c : group * a.channels_out + o;
  return first * a.weight.stride[0] + (a.transposed ? o : c) * a.weight.stride[1];
}

// Where one of 3x3 weights lies among them.
SAFNET_INLINE int64_t weight_offset(const ConvolutionArguments& a, int64_t at) {
  return at / 3 * a.weight.stride[2] + at % 3 * a.weight.stride[3];
}

// [group][place][block of output channels][input channel][in block], for input channels [begin, end) of every group.
template <int Places, class R>
void pack_winograd_weights(const ConvolutionArguments& a, int64_t begin, int64_t end) {
  constexpr int L = kLanes<double>;
  const int64_t place_pitch = a.channels_out * a.channels_in;
  int64_t offset[9];  // of the weight that meets the input this far down and right of the output
  for (int t = 0; t < a.grid.taps; ++t) {
    const Tap& tap = a.grid.tap[t];
    offset[(tap.dy / a.grid.row_step + 1) * 3 + tap.dx / a.grid.row_step + 1] = weight_offset(a, tap.weight);
  }
  const int64_t next = weights_between(a, 0, 1, 0);  // of the next output channel
  for (int64_t g = 0; g < a.groups; ++g)
    for (int64_t o = 0, block; o < a.channels_out; o += block) {
      block = block_channels(a.channels_out - o);
      for (int64_t c = begin; c < end; ++c)
        for (int64_t m = 0; m < block; m += L) {
          const int lanes = static_cast<int>(smaller(L, block - m));
          const int64_t from = weights_between(a, g, o + m, c);
          double values[9][L] = {};  // all are written before they are read as vectors, which waits for the last
          for (int t = 0; t < 9; ++t)
            for (int lane = 0; lane < lanes; ++lane)
              values[t][lane] = element<R>(a.weight.data, from + offset[t] + lane * next, a.weight.type);
          Vector<double> weights[3][3], places[Places];
          for (int t = 0; t < 9; ++t) weights[t / 3][t % 3] = vector_at(values[t]);
          transform_weights(weights, places);
          R* to = static_cast<R*>(a.packed) + g * Places * place_pitch + o * a.channels_in + c * block + m;
          for (int place = 0; place < Places; ++place, to += place_pitch)
            for (int lane = 0; lane < lanes; ++lane) to[lane] = static_cast<R>(places[place][lane]);
        }
    }
}

// By definition: [group][block of output channels][channel][tap][in block].
template <class R>
void pack_plain_weights(const ConvolutionArguments& a, int64_t begin, int64_t end, R* packed) {
  const int64_t taps = a.grid.taps;
  for (int64_t g = 0; g < a.groups; ++g)
    for (int64_t o = 0, block; o < a.channels_out; o += block) {
      block = block_channels(a.channels_out - o);
      for (int64_t c = begin; c < end; ++c) {
        R* to = packed + ((g * a.channels_out + o) * a.channels_in + c * block) * taps;
        for (int64_t t = 0; t < taps; ++t)
          for (int64_t m = 0; m < block; ++m)
            to[t * block + m] = element<R>(
                a.weight.data, weights_between(a, g, o + m, c) + weight_offset(a, a.grid.tap[t].weight), a.weight.type);
      }
    }
}

// For the matrix unit, as UnitProduct has them: [group][block of outputs][tap][step of 32 channels][pair of
// channels][output][in pair]; zeros for channels and outputs that there are not, from the last ones' packing.
void pack_unit_weights(const ConvolutionArguments& a, int64_t begin, int64_t end) {
  const int64_t taps = a.grid.taps, steps = round_up(a.channels_in, kUnitChannels) / kUnitChannels;
  const int64_t group = unit_weights(taps, a.channels_in, a.channels_out);
  if (end == a.channels_in) end = steps * kUnitChannels;
  for (int64_t g = 0; g < a.groups; ++g)
    for (int64_t c = begin; c < end; ++c)
      for (int64_t o = 0; o < round_up(a.channels_out, kUnitOutputs); ++o) {
        const bool real = c < a.channels_in && o < a.channels_out;
        const int64_t from = real ? weights_between(a, g, o, c) : 0;
        BFloat16* to = static_cast<BFloat16*>(a.packed) + g * group + o % kUnitOutputs * 2 + c % 2;
        to += ((o / kUnitOutputs * taps * steps + c / kUnitChannels) * kUnitChannels + c % kUnitChannels / 2 * 2) *
              kUnitOutputs;
        for (int64_t t = 0; t < taps; ++t, to += steps * kUnitChannels * kUnitOutputs)
          *to = real ? static_cast<const BFloat16*>(a.weight.data)[from + weight_offset(a, a.grid.tap[t].weight)]
                     : BFloat16{0};
      }
}

// Packs the weights of input channels [begin, end) of every group in the order in which the method reads them.
template <class R>
void pack_weights(const ConvolutionArguments& a, int64_t begin, int64_t end) {
  switch (a.method) {
    case Method::kMatrixUnit: return pack_unit_weights(a, begin, end);
    case Method::kWinograd4x4: return pack_winograd_weights<kPlaces4x4, R>(a, begin, end);
    case Method::kWinograd2x2: return pack_winograd_weights<kPlaces, R>(a, begin, end);
    case Method::kDefinition: return pack_plain_weights<R>(a, begin, end, static_cast<R*>(a.packed));
  }
}

// Memory of one thread for the sums of one tile, and for what is stored from them.
template <class R>
struct Workspace {
  Sums<R> sums;
  R* extra;            // one row of every channel
  const R** rows;      // rows of sums in the order of the output's channels
  const R** in_order;  // rows of sums in the convolution's order
};

// Adds the residual, applies the activation and writes channels [first, first + channels) of one tile.
template <class R>
void finish_tile(const ConvolutionArguments& a, const Place& place, const Workspace<R>& work, int64_t first,
                 int64_t channels) {
  const int64_t pitch = work.sums.row;
  const bool one_group = channels == a.channels_out;
  for (int64_t j = 0; j < place.rows; ++j) {
    const Span span{place.n, (place.y + j * a.grid.row_step) * a.out_stride + a.out_y, place.x * a.out_stride + a.out_x,
                    a.out_stride, place.columns};
    R* const values = work.sums.data + j * pitch;
    for (int64_t c = 0; c < channels; ++c) {
      // In shuffled order channel c of the output is channel c / groups of group c % groups.
      const int64_t source = a.shuffled && !one_group ? c % a.groups * a.channels_out + c / a.groups : c;
      work.rows[c] = values + source * work.sums.channel;
      work.in_order[c] = values + c * work.sums.channel;
    }
    if (a.residual.data != nullptr) {
      load_channels(a.residual, span, first, channels, work.extra, pitch);
      for (int64_t c = 0; c < channels; ++c) {
        R* sum = values + c * work.sums.channel;
        for (int64_t i = 0; i < place.columns; ++i) sum[i] += work.extra[c * pitch + i];
      }
    }
    if (a.preactivation.data != nullptr) store_channels(work.in_order, channels, a.preactivation, span, first, 1);
    if (a.slope != nullptr)
      for (int64_t c = 0; c < channels; ++c) {
        const R slope = element<R>(a.slope, (first + c) * a.slope_stride, a.out.type);
        R* sum = values + c * work.sums.channel;
        for (int64_t i = 0; i < place.columns; ++i) sum[i] = sum[i] > 0 ? sum[i] : sum[i] * slope;
      }
    if (a.shuffled && one_group) store_channels(work.rows, channels, a.out, span, first / channels, a.groups);
    else store_channels(work.rows, channels, a.out, span, first, 1);
  }
}

// What makes a tile by definition again where Winograd's method met numbers that are not finite. It is made when it is
// first needed, which is seldom.
template <class R>
class Remedy {
 public:
  explicit Remedy(const ConvolutionArguments& a) : a_(a) {}
  ~Remedy() { delete made_; }
  Remedy(const Remedy&) = delete;
  Remedy& operator=(const Remedy&) = delete;

  void convolve(const Place& place, int64_t group, const R* bias, Sums<R> sums) {
    if (made_ == nullptr) made_ = new Made(a_);
    const int64_t weights = group * a_.channels_out * a_.channels_in * a_.grid.taps;
    made_->method.convolve(a_.input, place, group * a_.channels_in, made_->weights.data() + weights, bias, sums);
  }

 private:
  struct Made {
    explicit Made(const ConvolutionArguments& a)
        : method(a.grid, a.channels_in, a.channels_out),
          weights(a.groups * a.channels_out * a.channels_in * a.grid.taps) {
      pack_plain_weights<R>(a, 0, a.channels_in, weights.data());
    }
    ByDefinition<R> method;
    Scratch<R> weights;
  };
  const ConvolutionArguments& a_;
  Made* made_ = nullptr;
};

// Whether a method may finish and write results as it makes them: no sums are to be kept, and tensors are rows of the
// type T.
template <class T>
constexpr Type kTypeOf = sizeof(T) == sizeof(float) ? Type::kFloat32 : Type::kBFloat16;
template <class T>
bool has_rows(const View& view) {
  return view.data == nullptr || (view.type == kTypeOf<T> && view.stride[3] == 1 && !channels_inside(view));
}
bool can_finish(const ConvolutionArguments& a) { return a.preactivation.data == nullptr && a.out_stride == 1; }

// The rows of a tile's outputs of one group in a tensor of the output's shape.
template <class T>
Rows<T> rows_of(const ConvolutionArguments& a, const View& view, const Place& place, int64_t group, bool shuffled) {
  if (view.data == nullptr) return {};
  const int64_t first = shuffled ? group : group * a.channels_out, step = shuffled ? a.groups : 1;
  T* const start = row<T>(view, place.n, first, place.y + a.out_y) + place.x + a.out_x;
  return {start, step * view.stride[1], a.grid.row_step * view.stride[2]};
}

template <class T>
FinishRows<T> finish_rows(const ConvolutionArguments& a, const Place& place, int64_t group, const float* slopes) {
  return {rows_of<T>(a, a.out, place, group, a.shuffled), rows_of<T>(a, a.residual, place, group, false),
          a.slope == nullptr ? nullptr : slopes, place.rows, place.columns};
}

template <class Way>
bool convolve_and_finish(const Way&, const ConvolutionArguments&, const Place&, int64_t, const typename Way::Weight*,
                         const void*, const void*) {
  return false;  // only what follows does
}

bool convolve_and_finish(const ByWinograd4x4& method, const ConvolutionArguments& a, const Place& place, int64_t group,
                         const float* weights, const float* bias, const float* slopes) {
  if (!has_rows<float>(a.out) || !has_rows<float>(a.residual)) return false;
  return method.convolve(a.input, place, group * a.channels_in, weights, bias,
                         finish_rows<float>(a, place, group, slopes));
}

#if defined(SAFNET_HAS_UNIT)
bool has_pixels(const View& view) {
  return view.data == nullptr || (view.type == Type::kBFloat16 && channels_inside(view));
}

// The pixels of a tile's outputs from channel `first` on in a tensor of the output's shape.
Pixels pixels_of(const ConvolutionArguments& a, const View& view, const Place& place, int64_t first) {
  if (view.data == nullptr) return {};
  BFloat16* const start = row<BFloat16>(view, place.n, first, place.y + a.out_y) + (place.x + a.out_x) * view.stride[3];
  return {start, a.grid.row_step * view.stride[2], view.stride[3]};
}

// Whether results are too many to be in a cache when they are read again, and lie in whole vectors: written past the
// caches, their memory is not read before.
bool goes_past_caches(const ConvolutionArguments& a) {
  constexpr int64_t kMuch = int64_t{32} << 20, kVector = 32;  // bytes
  const View& out = a.out;
  const auto is_whole = [](int64_t numbers) { return numbers * static_cast<int64_t>(sizeof(BFloat16)) % kVector == 0; };
  return a.groups == 1 && out.size[0] * out.size[1] * out.size[2] * out.size[3] >= kMuch / 2 && is_whole(out.size[1]) &&
         is_whole(out.stride[0]) && is_whole(out.stride[2]) && is_whole(out.stride[3]) &&
         reinterpret_cast<uintptr_t>(out.data) % kVector == 0;
}

bool convolve_and_finish(const ByMatrixUnit& method, const ConvolutionArguments& a, const Place& place, int64_t group,
                         const BFloat16* weights, const float* bias, const float* slopes) {
  const int64_t first = group * a.channels_in;
  if (has_rows<BFloat16>(a.out) && has_rows<BFloat16>(a.residual))
    return method.convolve(a.input, place, first, weights, bias, finish_rows<BFloat16>(a, place, group, slopes));
  if (!has_pixels(a.out) || !has_pixels(a.residual)) return false;
  const FinishPixels finish{pixels_of(a, a.out, place, a.shuffled ? group : group * a.channels_out),
                            pixels_of(a, a.residual, place, group * a.channels_out),
                            a.slope == nullptr ? nullptr : slopes,
                            place.rows,
                            place.columns,
                            a.channels_out,
                            a.shuffled ? a.groups : 1,
                            goes_past_caches(a)};
  return method.convolve(a.input, place, first, weights, bias, finish);
}
#endif

template <class R, class Way>
void convolve_by(const ConvolutionArguments& a, int64_t begin, int64_t end) {
  const Way way(a.grid, a.channels_in, a.channels_out);
  const int64_t all_channels = a.groups * a.channels_out;
  // Channels inside: the groups of a pixel are written together, or every line of memory would be written once a group.
  const bool together = channels_inside(a.out);
  const int64_t held = together ? all_channels : a.channels_out;
  const int64_t pitch = way.columns();
  const int64_t vectors = all_channels + kLanes<R>;  // room to read whole ones
  const Scratch<R> sums(held * way.rows() * pitch), extra(held * pitch), bias(vectors), slopes(vectors);
  const Scratch<const R*> rows(2 * held);
  for (int64_t c = 0; c < all_channels; ++c)
    bias[c] = a.bias == nullptr ? R(0) : element<R>(a.bias, c * a.bias_stride, a.out.type);
  for (int64_t c = 0; c < all_channels && a.slope != nullptr; ++c)
    slopes[c] = element<R>(a.slope, c * a.slope_stride, a.out.type);
  const bool finishes = can_finish(a);
  Workspace<R> work{{sums.data(), way.rows() * pitch, pitch}, extra.data(), rows.data(), rows.data() + held};
  Remedy<R> remedy(a);
  for (int64_t index = begin; index < end; ++index) {
    const Place place = place_of(a.grid, index);
    if (place.rows <= 0) continue;
    bool finished = false;
    for (int64_t g = 0; g < a.groups; ++g) {
      const auto* const weights = static_cast<const typename Way::Weight*>(a.packed) + g * way.weights_a_group();
      const R* const addends = bias.data() + g * a.channels_out;
      finished =
          finishes && convolve_and_finish(way, a, place, g, weights, addends, slopes.data() + g * a.channels_out);
      if (finished) continue;
      Sums<R> part = work.sums;
      if (together) part.data += g * a.channels_out * part.channel;
      if (!way.convolve(a.input, place, g * a.channels_in, weights, addends, part))
        remedy.convolve(place, g, addends, part);
      if (!together) finish_tile(a, place, work, g * a.channels_out, a.channels_out);
    }
    if (together && !finished) finish_tile(a, place, work, 0, all_channels);
  }
}

void convolve(const ConvolutionArguments& a, float, int64_t begin, int64_t end) {
  switch (a.method) {
#if defined(SAFNET_HAS_UNIT)
    case Method::kMatrixUnit: return convolve_by<float, ByMatrixUnit>(a, begin, end);
#endif
    case Method::kWinograd4x4: return convolve_by<float, ByWinograd4x4>(a, begin, end);
    case Method::kWinograd2x2: return convolve_by<float, ByWinograd<float>>(a, begin, end);
    default: return convolve_by<float, ByDefinition<float>>(a, begin, end);
  }
}

void convolve(const ConvolutionArguments& a, double, int64_t begin, int64_t end) {
  if (a.method == Method::kWinograd2x2) convolve_by<double, ByWinograd<double>>(a, begin, end);
  else convolve_by<double, ByDefinition<double>>(a, begin, end);
}

template <class R>
void convolve(const ConvolutionArguments& a, int64_t begin, int64_t end) {
  convolve(a, R(), begin, end);
}

// Sum of a run of numbers: vectors first, so that the order is fixed.
template <class R>
SAFNET_INLINE double sum_of(const R* values, int64_t count) {
  Vector<R> lanes{};
  int64_t i = 0;
  for (; i + kLanes<R> <= count; i += kLanes<R>) lanes += vector_at(values + i);
  double sum = 0;
  for (int lane = 0; lane < kLanes<R>; ++lane) sum += static_cast<double>(lanes[lane]);
  for (; i < count; ++i) sum += static_cast<double>(values[i]);
  return sum;
}

template <class R>
void activation_gradient(const ActivationGradientArguments& a, int64_t begin, int64_t end) {
  constexpr int64_t kPixels = 64;
  const int64_t channels = a.grad_out.size[1], height = a.grad_out.size[2], width = a.grad_out.size[3];
  const int64_t parts = (height + a.rows_per_part - 1) / a.rows_per_part, group = channels / a.groups;
  const Scratch<R> grads(channels * kPixels), values(channels * kPixels), products(kPixels);
  const Scratch<const R*> rows(channels);
  for (int64_t c = 0; c < channels;
       ++c)  // channel c of the convolution was written to channel c % group * groups + c / group
    rows.data()[c] = grads.data() + (c % group * a.groups + c / group) * kPixels;
  for (int64_t part = begin; part < end; ++part) {
    double* sums = a.sums + part * channels * 2;
    for (int64_t i = 0; i < 2 * channels; ++i) sums[i] = 0;
    const int64_t n = part / parts, first = part % parts * a.rows_per_part;
    for (int64_t y = first; y < smaller(first + a.rows_per_part, height); ++y)
      for (int64_t x = 0; x < width; x += kPixels) {
        const Span span{n, y, x, 1, smaller(kPixels, width - x)};
        load_channels(a.grad_out, span, 0, channels, grads.data(), kPixels);
        if (a.preactivation.data != nullptr) load_channels(a.preactivation, span, 0, channels, values.data(), kPixels);
        for (int64_t c = 0; c < channels; ++c) {
          R* grad = const_cast<R*>(rows.data()[c]);
          if (a.preactivation.data != nullptr) {
            const R slope = element<R>(a.slope, c * a.slope_stride, a.grad_out.type);
            const R* value = values.data() + c * kPixels;
            for (int64_t i = 0; i < span.pixels; ++i) products.data()[i] = value[i] > 0 ? R(0) : grad[i] * value[i];
            for (int64_t i = 0; i < span.pixels; ++i) grad[i] = value[i] > 0 ? grad[i] : grad[i] * slope;
            sums[2 * c + 1] += sum_of(products.data(), span.pixels);
          }
          sums[2 * c] += sum_of(grad, span.pixels);
        }
        if (a.grad_before.data != nullptr) store_channels(rows.data(), channels, a.grad_before, span, 0, 1);
      }
  }
}

}  // namespace

void conv_pack_weights(const ConvolutionArguments& a, int64_t begin, int64_t end) {
  SAFNET_DISPATCH(a.input, pack_weights, a, begin, end);
}
void conv_tiles(const ConvolutionArguments& a, int64_t begin, int64_t end) {
  SAFNET_DISPATCH(a.input, convolve, a, begin, end);
}
void conv_activation_gradient(const ActivationGradientArguments& a, int64_t begin, int64_t end) {
  SAFNET_DISPATCH(a.grad_out, activation_gradient, a, begin, end);
}
void conv_weight_gradient(const WeightGradientArguments& a, int64_t begin, int64_t end) {
  SAFNET_DISPATCH(a.input, weight_gradient, a, begin, end);
}
void conv_reduce_weight_gradient(const WeightGradientArguments& a, int64_t begin, int64_t end) {
  SAFNET_DISPATCH(a.input, reduce_weight_gradient, a, begin, end);
}

}  // namespace safnet::SAFNET_ISA

#if SAFNET_HOST

#include "cpu/tensors.h"

namespace safnet {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t greatest_common_divisor(int64_t a, int64_t b) { return b == 0 ? a : greatest_common_divisor(b, a % b); }

int64_t tile_count(const TapGrid& grid, int64_t pictures) {
  return pictures * grid.row_step * grid.row_tiles * grid.column_tiles;
}

// Of a tile's packed input and sums: they stay in the second-level cache. A correlation reads its tile slowly enough
// for the third level, and adds up its lanes once a tile: larger tiles are faster.
constexpr int64_t kConvolvedBytes = 288 << 10, kCorrelatedBytes = 768 << 10;
// Of a tile's transformed input and products.
constexpr int64_t kWinogradBytes = 288 << 10, kWinograd4x4Bytes = 1200 << 10;

// Limits a tile's rows, which its memory suggests, to a multiple of `unit` that occupies several threads and divides
// the picture evenly.
void cut_rows(TapGrid& grid, int64_t pictures, int64_t unit) {
  constexpr int64_t kEnoughTiles = 16;
  const int64_t units = divide_up(divide_up(grid.height, grid.row_step), unit);
  int64_t most = std::clamp<int64_t>(grid.tile_rows / unit, 1, std::min<int64_t>(kMostTileRows / unit, units));
  while (most * unit > 2 && pictures * grid.row_step * grid.column_tiles * divide_up(units, most) < kEnoughTiles)
    most = divide_up(most, 2);
  grid.row_tiles = divide_up(units, most);
  grid.tile_rows = divide_up(units, grid.row_tiles) * unit;
}

// Cuts the grid into tiles whose packed input and sums fit `bytes` of cache, from the shapes alone.
// `channels_in` and `channels_held` are the channels of a tile's input and of its sums.
void cut_into_tiles(TapGrid& grid, int64_t pictures, int64_t channels_in, int64_t channels_held, Type type,
                    int64_t bytes) {
  const int64_t numbers = bytes / (type == Type::kFloat64 ? 8 : 4);
  for (const int64_t widest : {96, 48}) {  // multiples of the strip widths of all instruction sets
    grid.column_tiles = divide_up(grid.width, widest);
    grid.tile_columns = divide_up(divide_up(grid.width, grid.column_tiles), 24) * 24;
    const int64_t halo = 2 * channels_in * grid.in_stride;
    grid.tile_rows =
        (numbers / grid.tile_columns - halo) / (channels_in * grid.in_stride * grid.in_stride + channels_held);
    if (grid.tile_rows >= 4) break;
  }
  cut_rows(grid, pictures, 1);
}

// The same for Winograd's method by F(2x2, 3x3), in whole squares. `channels`: of input and output together.
void cut_into_winograd_tiles(TapGrid& grid, int64_t pictures, int64_t channels, Type type) {
  constexpr int64_t kWidest = 48;
  const int64_t positions = kWinogradBytes / (type == Type::kFloat64 ? 8 : 4) / (kPlaces * channels);
  grid.column_tiles = divide_up(grid.width, kWidest * grid.row_step);
  grid.tile_columns = divide_up(divide_up(grid.width, grid.column_tiles), 2 * grid.row_step) * 2 * grid.row_step;
  grid.tile_rows = 2 * positions / (grid.tile_columns / 2);
  cut_rows(grid, pictures, 2);
}

// By F(4x4, 3x3): so many squares that transformed inputs and products fit the cache, in the shape that leaves the
// fewest lanes of vectors unused.
void cut_into_winograd_4x4_tiles(TapGrid& grid, int64_t channels_in, int64_t channels_out) {
  constexpr int64_t kVector = 16;    // numbers, of the widest instruction set
  constexpr int64_t kShortest = 12;  // squares in a row, unless the picture is as narrow: rows overlap at their ends
  const int64_t channels = channels_in + std::min(channels_out, kChannelsAtOnce);
  const int64_t fitting = kWinograd4x4Bytes / 4 / (kPlaces4x4 * channels);
  const int64_t most = std::clamp<int64_t>(fitting / kVector, 1, 8) * kVector;
  const int64_t unit = 4 * grid.row_step, squares_down = divide_up(divide_up(grid.height, grid.row_step), 4);
  TapGrid best = grid;
  int64_t least = INT64_MAX;
  for (int64_t column_tiles = 1;; ++column_tiles) {
    const int64_t run = divide_up(divide_up(grid.width, column_tiles), unit) * grid.row_step;
    if (column_tiles > 1 && run < kShortest) break;
    for (int64_t rows = 1; rows <= std::min<int64_t>(kMostTileRows / 4, squares_down); ++rows) {
      if (rows * run > most && rows * run > grid.row_step) break;
      const int64_t row_tiles = divide_up(squares_down, rows), vectors = divide_up(rows * run, kVector);
      // As measured: two parts of a vector's time are products, which pass over the ends of rows and are slower in
      // large tiles; one is transformations, slower where rows begin in the middle of a line of cache; and each row
      // takes some.
      const int64_t multiplied = vectors * (vectors <= 4 ? 8 : 10);
      const int64_t transformed = divide_up(run, kVector) * (rows == 1 || run % kVector == 0 ? 4 : 7) + 5;
      const int64_t cost = column_tiles * row_tiles * (multiplied + rows * transformed + 1);
      if (cost >= least) continue;
      least = cost;
      best.column_tiles = column_tiles, best.tile_columns = 4 * run;
      best.row_tiles = row_tiles, best.tile_rows = 4 * divide_up(squares_down, row_tiles);
    }
  }
  grid = best;
}

// For the matrix unit: the packed input stays in the second-level cache beside the weights, and rows of a tile are long
// enough for what reads and writes them.
void cut_into_unit_tiles(TapGrid& grid, int64_t pictures, int64_t channels_in) {
  constexpr int64_t kWidest = 128, kBytes = 640 << 10;
  grid.column_tiles = divide_up(grid.width, kWidest);
  grid.tile_columns = divide_up(divide_up(grid.width, grid.column_tiles), kUnitPixels) * kUnitPixels;
  const int64_t row = 2 * divide_up(channels_in, kUnitChannels) * kUnitChannels * grid.tile_columns * grid.in_stride;
  grid.tile_rows = std::max<int64_t>(1, kBytes / row - 2) / grid.in_stride;
  cut_rows(grid, pictures, 1);
}

// Adds a tap unless it reads outside the picture wherever the output lies.
void add_tap(TapGrid& grid, int64_t in_height, int64_t in_width, Tap tap) {
  const auto reaches = [&](int64_t distance, int64_t outputs, int64_t inputs) {
    return distance < inputs && distance + (outputs - 1) * grid.in_stride >= 0;
  };
  if (reaches(tap.dy, grid.height, in_height) && reaches(tap.dx, grid.width, in_width)) grid.tap[grid.taps++] = tap;
}

TapGrid forward_grid(const View& input, const View& out, int64_t stride, int64_t dilation) {
  TapGrid grid{};
  grid.in_stride = stride;
  grid.height = out.size[2], grid.width = out.size[3];
  grid.row_step = dilation / greatest_common_divisor(dilation, stride);
  grid.row_step = std::min(grid.row_step, grid.height);
  for (int64_t i = 0; i < 9; ++i)
    add_tap(grid, input.size[2], input.size[3], {(i / 3 - 1) * dilation, (i % 3 - 1) * dilation, i});
  return grid;
}

// Winograd's transformations cost as much as they save where a channel meets few others (fewer than `fewest`, as the
// harmonic mean of two numbers of channels, halved), and transforming the weights where the picture is small. Half of a
// vector of float32 is the largest dilation whose columns are split by whole vectors. `least`: outputs of each phase of
// the dilation.
bool winograd_serves(const TapGrid& grid, int64_t pictures, int64_t channels_in, int64_t channels_out, int64_t least,
                     int64_t fewest) {
  const int64_t step = grid.row_step;
  return grid.in_stride == 1 && grid.taps == kMostTaps && (step == 1 || step == 2 || step == 4) &&
         channels_in * channels_out >= fewest * (channels_in + channels_out) &&
         pictures * grid.height * grid.width >= least * step * step;
}

constexpr int64_t kLeastFor2x2 = 64, kLeastFor4x4 = 256, kLeastOfFew = 4096;  // outputs
constexpr int64_t kManyChannels = 4, kFewChannels = 1;
constexpr int64_t kLeastForUnit = 48;  // pairs of channels: of fewer its registers stay nearly empty

// Double is for those who want its precision: F(4x4, 3x3) loses some of it.
Method method_of(const ConvolutionArguments& a) {
  if (a.input.type == Type::kBFloat16 && instruction_set() == InstructionSet::kAmx &&
      a.channels_in * a.channels_out >= kLeastForUnit)
    return Method::kMatrixUnit;
  const auto serves = [&](int64_t least, int64_t fewest) {
    return a.out_stride == 1 && winograd_serves(a.grid, a.input.size[0], a.channels_in, a.channels_out, least, fewest);
  };
  if (a.input.type != Type::kFloat64 && (serves(kLeastFor4x4, kManyChannels) || serves(kLeastOfFew, kFewChannels)))
    return Method::kWinograd4x4;
  return serves(kLeastFor2x2, kManyChannels) ? Method::kWinograd2x2 : Method::kDefinition;
}

// Bytes of the packed weights.
int64_t weight_bytes(const ConvolutionArguments& a) {
  if (a.method == Method::kMatrixUnit) return 2 * a.groups * unit_weights(a.grid.taps, a.channels_in, a.channels_out);
  const int64_t a_pair = a.method == Method::kWinograd4x4   ? kPlaces4x4
                         : a.method == Method::kWinograd2x2 ? kPlaces
                                                            : a.grid.taps;
  return (a.input.type == Type::kFloat64 ? 8 : 4) * a.groups * a.channels_out * a.channels_in * a_pair;
}

void cut_into_tiles(ConvolutionArguments& a) {
  const bool together = a.out.stride[1] == 1 && a.out.size[1] > 1;
  const int64_t pictures = a.input.size[0];
  switch (a.method) {
    case Method::kMatrixUnit: return cut_into_unit_tiles(a.grid, pictures, a.channels_in);
    case Method::kWinograd4x4: return cut_into_winograd_4x4_tiles(a.grid, a.channels_in, a.channels_out);
    case Method::kWinograd2x2:
      return cut_into_winograd_tiles(a.grid, pictures, a.channels_in + a.channels_out, a.input.type);
    case Method::kDefinition:
      return cut_into_tiles(a.grid, pictures, a.channels_in, together ? a.groups * a.channels_out : a.channels_out,
                            a.input.type, kConvolvedBytes);
  }
}

// Runs a convolution whose arguments are complete but for the method, the tiles and the packed weights.
void run(ConvolutionArguments& a) {
  a.method = method_of(a);
  cut_into_tiles(a);
  const int64_t bytes = weight_bytes(a);
  const Tensor packed = empty({divide_up(bytes, 8)}, ScalarType::Double);
  a.packed = packed.data_ptr();
  const auto split = [&](auto* kernel, int64_t count, int64_t grain) {
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  };
  split(SAFNET_KERNEL(conv_pack_weights), a.channels_in,
        std::max<int64_t>(1, 4 * kPixelsPerTask * a.channels_in / (bytes + 1)));
  split(SAFNET_KERNEL(conv_tiles), tile_count(a.grid, a.input.size[0]), 1);
}

bool is_empty(const View& view) { return view.size[0] * view.size[1] * view.size[2] * view.size[3] == 0; }

std::tuple<Tensor, Tensor> group_conv_shuffle(Tensor input, Tensor weight, std::optional<Tensor> bias,
                                              std::optional<Tensor> prelu_weight, std::optional<Tensor> residual,
                                              int64_t groups, int64_t stride, int64_t dilation,
                                              bool save_preactivation) {
  const std::vector<int64_t> size{input.size(0), weight.size(0), divide_up(input.size(2), stride),
                                  divide_up(input.size(3), stride)};
  const ScalarType type = input.scalar_type();
  Tensor out = empty(size, type, is_channels_last(input));
  Tensor preactivation = save_preactivation ? empty(size, type, is_channels_last(input)) : empty({0}, type);
  ConvolutionArguments a{};
  a.input = view(input), a.weight = view(weight), a.out = view(out), a.residual = view(residual);
  if (save_preactivation) a.preactivation = view(preactivation);
  if (bias) a.bias = bias->data_ptr(), a.bias_stride = bias->stride(0);
  if (prelu_weight) a.slope = prelu_weight->data_ptr(), a.slope_stride = prelu_weight->stride(0);
  a.groups = groups, a.channels_in = input.size(1) / groups, a.channels_out = weight.size(0) / groups;
  a.shuffled = groups > 1;
  a.out_stride = 1;
  if (!is_empty(a.out)) {
    a.grid = forward_grid(a.input, a.out, stride, dilation);
    run(a);
  }
  return {out, preactivation};
}

// The gradient of the input: for every phase of the stride a convolution of the gradient with some of the weights.
void input_gradient(const View& grad, const Tensor& weight, Tensor& grad_input, int64_t groups, int64_t stride,
                    int64_t dilation) {
  ConvolutionArguments a{};
  a.input = grad, a.weight = view(weight), a.out = view(grad_input);
  a.groups = groups, a.channels_in = grad.size[1] / groups, a.channels_out = a.out.size[1] / groups;
  a.transposed = true;
  a.out_stride = stride;
  if (stride > 1) torch::stable::zero_(grad_input);  // phases may be reached by no tap
  for (a.out_y = 0; a.out_y < std::min(stride, a.out.size[2]); ++a.out_y)
    for (a.out_x = 0; a.out_x < std::min(stride, a.out.size[3]); ++a.out_x) {
      TapGrid grid{};
      grid.in_stride = 1;
      grid.height = divide_up(a.out.size[2] - a.out_y, stride), grid.width = divide_up(a.out.size[3] - a.out_x, stride);
      grid.row_step = std::min(dilation / greatest_common_divisor(dilation, stride), grid.height);
      for (int64_t i = 0; i < 9; ++i) {
        const int64_t y = a.out_y - (i / 3 - 1) * dilation, x = a.out_x - (i % 3 - 1) * dilation;
        if (y % stride == 0 && x % stride == 0) add_tap(grid, grad.size[2], grad.size[3], {y / stride, x / stride, i});
      }
      a.grid = grid;
      if (grid.taps > 0) run(a);
    }
}

void weight_gradient(const View& input, const View& grad, const Tensor& grad_weight, int64_t groups, int64_t stride,
                     int64_t dilation) {
  WeightGradientArguments a{};
  a.input = input, a.grad = grad;
  a.groups = groups, a.channels_in = input.size[1] / groups, a.channels_out = grad.size[1] / groups;
  a.out = grad_weight.data_ptr();
  a.grid = forward_grid(input, grad, stride, dilation);
  a.winograd = winograd_serves(a.grid, input.size[0], a.channels_in, a.channels_out, kLeastFor2x2, kManyChannels);
  if (a.winograd) cut_into_winograd_tiles(a.grid, input.size[0], a.channels_in + a.channels_out, a.input.type);
  else cut_into_tiles(a.grid, input.size[0], a.channels_in, a.channels_out, a.input.type, kCorrelatedBytes);
  a.tiles = tile_count(a.grid, input.size[0]);
  const int64_t weights = grad_weight.numel();
  // Enough parts for many threads, in at most 4 million numbers.
  a.parts = std::clamp<int64_t>((4 << 20) / weights, 1, std::min<int64_t>(a.tiles, 64));
  const Tensor partial =
      empty({a.parts, weights}, a.input.type == Type::kFloat64 ? ScalarType::Double : ScalarType::Float);
  a.partial = partial.data_ptr();
  torch::stable::parallel_for(0, a.parts, 1,
                              [&](int64_t begin, int64_t end) { SAFNET_KERNEL(conv_weight_gradient)(a, begin, end); });
  torch::stable::parallel_for(0, weights, kPixelsPerTask, [&](int64_t begin, int64_t end) {
    SAFNET_KERNEL(conv_reduce_weight_gradient)(a, begin, end);
  });
}

// Fills `grad_before` (if it has elements) with the gradient before the activation, and the gradients of bias and slope
// with its sums.
void activation_gradient(const Tensor& grad_out, const Tensor& preactivation, const std::optional<Tensor>& slope,
                         const Tensor& grad_before, const Tensor& grad_bias, const Tensor& grad_slope, int64_t groups) {
  ActivationGradientArguments a{};
  a.grad_out = view(grad_out);
  if (slope) a.preactivation = view(preactivation), a.slope = slope->data_ptr(), a.slope_stride = slope->stride(0);
  if (grad_before.dim() == 4) a.grad_before = view(grad_before);
  a.groups = groups;
  const int64_t channels = grad_out.size(1);
  a.rows_per_part = std::max<int64_t>(1, kPixelsPerTask / grad_out.size(3));
  const int64_t parts = grad_out.size(0) * divide_up(grad_out.size(2), a.rows_per_part);
  std::vector<double> sums(static_cast<size_t>(parts * channels * 2));
  a.sums = sums.data();
  torch::stable::parallel_for(
      0, parts, 1, [&](int64_t begin, int64_t end) { SAFNET_KERNEL(conv_activation_gradient)(a, begin, end); });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < channels * 2; ++i) sums[i] += sums[part * channels * 2 + i];
  const auto write = [&](const Tensor& to, int64_t which) {
    for (int64_t c = 0; c < to.numel(); ++c)
      SAFNET_ISA::set_element(to.data_ptr(), c, type_of(to), sums[2 * c + which]);
  };
  write(grad_bias, 0);
  write(grad_slope, 1);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> group_conv_shuffle_backward(
    Tensor grad_out, Tensor preactivation, Tensor input, Tensor weight, std::optional<Tensor> prelu_weight,
    int64_t groups, int64_t stride, int64_t dilation, int64_t needs, bool /*deterministic: these kernels always are*/) {
  const bool need_input = is_needed(needs, ConvInput::kInput), need_weight = is_needed(needs, ConvInput::kWeight);
  const bool need_bias = is_needed(needs, ConvInput::kBias), need_residual = is_needed(needs, ConvInput::kResidual);
  const bool need_slope = is_needed(needs, ConvInput::kPreluWeight) && prelu_weight.has_value();
  const ScalarType type = input.scalar_type();
  const int64_t channels = weight.size(0);
  const auto vector_gradient = [&](bool wanted) { return empty({wanted ? channels : 0}, type); };
  const std::vector<int64_t> out_size{grad_out.size(0), grad_out.size(1), grad_out.size(2), grad_out.size(3)};
  const std::vector<int64_t> weight_size{weight.size(0), weight.size(1), 3, 3};
  Tensor grad_input = empty_gradient(input, need_input);
  Tensor grad_weight = need_weight ? empty(weight_size, type) : empty({0}, type);
  Tensor grad_bias = vector_gradient(need_bias), grad_slope = vector_gradient(need_slope);
  Tensor grad_residual = need_residual ? empty(out_size, type, is_channels_last(input)) : empty({0}, type);
  if (grad_out.numel() == 0 || input.numel() == 0 || weight.numel() == 0) {
    for (Tensor* result : {&grad_input, &grad_weight, &grad_bias, &grad_slope, &grad_residual})
      torch::stable::zero_(*result);
    return {grad_input, grad_weight, grad_bias, grad_slope, grad_residual};
  }
  // Before activation and shuffle the gradient is that of the residual; with neither it is the one that came.
  const bool as_it_came = !prelu_weight && groups == 1;
  Tensor before = grad_residual;
  if (!need_residual && !as_it_came && (need_input || need_weight))
    before = empty(out_size, type, is_channels_last(input));
  if (before.dim() == 4 || need_bias || need_slope)
    activation_gradient(grad_out, preactivation, prelu_weight, before, grad_bias, grad_slope, groups);
  const View grad_before = as_it_came ? view(grad_out) : before.dim() == 4 ? view(before) : View{};
  if (need_input) input_gradient(grad_before, weight, grad_input, groups, stride, dilation);
  if (need_weight) weight_gradient(view(input), grad_before, grad_weight, groups, stride, dilation);
  return {grad_input, grad_weight, grad_bias, grad_slope, grad_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safnet_ops, CPU, m) {
  m.impl("group_conv_shuffle", TORCH_BOX(&group_conv_shuffle));
  m.impl("group_conv_shuffle_backward", TORCH_BOX(&group_conv_shuffle_backward));
}

}  // namespace safnet

#endif  // SAFNET_HOST
