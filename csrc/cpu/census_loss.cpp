// census_loss on the CPU: forward, and its gradient with respect to the prediction.
//
// A pixel's relation to a neighbour is minus the neighbour's relation to it, and their distances are equal: every pair
// of pixels is computed once and counted for those of its two that are centres of whole windows. Blocks of rows are
// computed on their own, from grey values held only for the block; the number of rows of a block is fixed, so that sums
// do not depend on the threads.

#include "cpu/channels.h"
#include "cpu/kernel.h"
#include "math/census.h"

namespace safnet {

constexpr int64_t kCensusRows = 32;  // of a block

struct CensusArguments {
  View prediction, target;
  View grad_prediction;    // backward only
  double* sums;            // forward only, one per block
  double scale;            // backward only: of all gradients of grey values
  int64_t radius, blocks;  // blocks of one picture
};

SAFNET_DECLARE(census_sum_blocks, const CensusArguments&, int64_t, int64_t)
SAFNET_DECLARE(census_gradient_blocks, const CensusArguments&, int64_t, int64_t)

}  // namespace safnet

namespace safnet::SAFNET_ISA {
namespace {

// Grey values of rows [first, last) of both pictures.
template <class R>
struct GreyRows {
  R *prediction, *target;
  int64_t first, width;

  const R* of_prediction(int64_t y) const { return prediction + (y - first) * width; }
  const R* of_target(int64_t y) const { return target + (y - first) * width; }
};

template <class R>
void load_grey(const View& picture, int64_t n, int64_t first, int64_t last, R* channels, R* grey) {
  constexpr int64_t kPixels = 256;
  const int64_t width = picture.size[3], count = picture.size[1];
  for (int64_t y = first; y < last; ++y)
    for (int64_t x = 0; x < width; x += kPixels) {
      const Span span{n, y, x, 1, smaller(kPixels, width - x)};
      load_channels(picture, span, 0, count, channels, kPixels);
      R* __restrict out = grey + (y - first) * width + x;
      for (int64_t i = 0; i < span.pixels; ++i) out[i] = channels[i];
      for (int64_t c = 1; c < count; ++c)
        for (int64_t i = 0; i < span.pixels; ++i) out[i] += channels[c * kPixels + i];
      for (int64_t i = 0; i < span.pixels; ++i) out[i] /= static_cast<R>(count);
    }
}

// Calls visit(neighbour_y, offset_x, begin, end, weights) for the pairs of row y's pixels with pixels after them in
// raster order: pixel x in [begin, end) and (neighbour_y, x + offset_x). weights[x] is how many of the two are centres
// of whole windows; pairs with no centre are left out.
template <class R, class Visit>
SAFNET_INLINE void for_pairs(int64_t y, int64_t height, int64_t width, int64_t radius, R* weights, const Visit& visit) {
  const auto whole = [&](int64_t row) { return row >= radius && row < height - radius; };
  const int64_t left = radius, right = width - radius;  // columns of centres
  for (int64_t dy = 0; dy <= radius && y + dy < height; ++dy)
    for (int64_t dx = dy == 0 ? 1 : -radius; dx <= radius; ++dx) {
      const bool first = whole(y), second = whole(y + dy);
      const auto visit_once = [&](int64_t begin, int64_t end) {
        for (int64_t x = begin; x < end; ++x) weights[x] = 1;
        visit(y + dy, dx, begin, end, weights);
      };
      const int64_t begin = larger(left, left - dx), end = smaller(right, right - dx);  // both are centres
      if (first && second && begin < end) {
        const int64_t from = smaller(left, left - dx), to = larger(right, right - dx);
        for (int64_t x = from; x < to; ++x) weights[x] = x >= begin && x < end ? R(2) : R(1);
        visit(y + dy, dx, from, to, weights);
      } else {
        if (first) visit_once(left, right);
        if (second) visit_once(left - dx, right - dx);
      }
    }
}

template <class R>
void sum_blocks(const CensusArguments& a, int64_t begin, int64_t end) {
  const int64_t height = a.prediction.size[2], width = a.prediction.size[3], held = kCensusRows + a.radius;
  const Scratch<R> prediction(held * width), target(held * width), channels(a.prediction.size[1] * 256);
  const Scratch<R> weights(width), sums(width);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t n = block / a.blocks, first = block % a.blocks * kCensusRows,
                  last = smaller(height, first + kCensusRows);
    const GreyRows<R> grey{prediction.data(), target.data(), first, width};
    load_grey(a.prediction, n, first, smaller(height, last + a.radius), channels.data(), grey.prediction);
    load_grey(a.target, n, first, smaller(height, last + a.radius), channels.data(), grey.target);
    double lanes[8] = {};
    for (int64_t y = first; y < last; ++y) {
      R* const __restrict sum = sums.data();
      for (int64_t x = 0; x < width; ++x) sum[x] = 0;
      for_pairs(y, height, width, a.radius, weights.data(),
                [&](int64_t neighbour_y, int64_t dx, int64_t from, int64_t to, const R* __restrict weight) {
                  const R *pixel_a = grey.of_prediction(y), *neighbour_a = grey.of_prediction(neighbour_y) + dx;
                  const R *pixel_b = grey.of_target(y), *neighbour_b = grey.of_target(neighbour_y) + dx;
                  for (int64_t x = from; x < to; ++x)
                    sum[x] += weight[x] * census_distance(neighbour_a[x] - pixel_a[x], neighbour_b[x] - pixel_b[x]);
                });
      int64_t x = 0;
      for (; x + 8 <= width; x += 8)
        for (int lane = 0; lane < 8; ++lane) lanes[lane] += static_cast<double>(sum[x + lane]);
      for (; x < width; ++x) lanes[0] += static_cast<double>(sum[x]);
    }
    double total = 0;
    for (const double lane : lanes) total += lane;
    a.sums[block] = total;
  }
}

template <class R>
void gradient_blocks(const CensusArguments& a, int64_t begin, int64_t end) {
  const int64_t height = a.prediction.size[2], width = a.prediction.size[3], held = kCensusRows + 2 * a.radius;
  const int64_t count = a.prediction.size[1];
  const Scratch<R> prediction(held * width), target(held * width), channels(count * 256);
  const Scratch<R> weights(width), slopes(width), grads(held * width);
  const Scratch<const R*> rows(count);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t n = block / a.blocks, first = block % a.blocks * kCensusRows,
                  last = smaller(height, first + kCensusRows);
    // Pairs reach over both ends of the block; what they add to rows outside is dropped.
    const int64_t above = larger(0, first - a.radius), below = smaller(height, last + a.radius);
    const GreyRows<R> grey{prediction.data(), target.data(), above, width};
    load_grey(a.prediction, n, above, below, channels.data(), grey.prediction);
    load_grey(a.target, n, above, below, channels.data(), grey.target);
    for (int64_t i = 0; i < (below - above) * width; ++i) grads[i] = 0;
    for (int64_t y = above; y < last; ++y) {
      for_pairs(y, height, width, a.radius, weights.data(),
                [&](int64_t neighbour_y, int64_t dx, int64_t from, int64_t to, const R* __restrict weight) {
                  if (neighbour_y < first) return;
                  const R *pixel_a = grey.of_prediction(y), *neighbour_a = grey.of_prediction(neighbour_y) + dx;
                  const R *pixel_b = grey.of_target(y), *neighbour_b = grey.of_target(neighbour_y) + dx;
                  R* const __restrict slope = slopes.data();
                  for (int64_t x = from; x < to; ++x)
                    slope[x] =
                        weight[x] * census_distance_slope(neighbour_a[x] - pixel_a[x], neighbour_b[x] - pixel_b[x]);
                  R* const pixel = grads.data() + (y - above) * width;
                  for (int64_t x = from; x < to; ++x) pixel[x] -= slope[x];
                  R* const neighbour = grads.data() + (neighbour_y - above) * width + dx;
                  for (int64_t x = from; x < to; ++x) neighbour[x] += slope[x];
                });
    }
    for (int64_t y = first; y < last; ++y) {
      R* const grad = grads.data() + (y - above) * width;
      for (int64_t x = 0; x < width; ++x) grad[x] *= static_cast<R>(a.scale);
      for (int64_t c = 0; c < count; ++c) rows[c] = grad;  // the grey value is the mean: all channels get the same
      store_channels(rows.data(), count, a.grad_prediction, {n, y, 0, 1, width}, 0, 1);
    }
  }
}

}  // namespace

void census_sum_blocks(const CensusArguments& a, int64_t begin, int64_t end) {
  SAFNET_DISPATCH(a.prediction, sum_blocks, a, begin, end);
}
void census_gradient_blocks(const CensusArguments& a, int64_t begin, int64_t end) {
  SAFNET_DISPATCH(a.prediction, gradient_blocks, a, begin, end);
}

}  // namespace safnet::SAFNET_ISA

#if SAFNET_HOST

#include "cpu/tensors.h"

namespace safnet {
namespace {

CensusArguments arguments_of(const Tensor& prediction, const Tensor& target, int64_t patch_size) {
  CensusArguments a{};
  a.prediction = view(prediction), a.target = view(target);
  a.radius = patch_size / 2;
  a.blocks = (prediction.size(2) + kCensusRows - 1) / kCensusRows;
  return a;
}

// By how much the sum over pixels and neighbours exceeds the loss, the mean over both.
double loss_divisor(const Tensor& prediction, int64_t patch_size) {
  return static_cast<double>(prediction.size(0) * prediction.size(2) * prediction.size(3)) *
         static_cast<double>(patch_size * patch_size);
}

Tensor census_loss(Tensor prediction, Tensor target, int64_t patch_size, bool /*deterministic: it always is*/) {
  CensusArguments a = arguments_of(prediction, target, patch_size);
  std::vector<double> sums(static_cast<size_t>(prediction.size(0) * a.blocks));
  a.sums = sums.data();
  torch::stable::parallel_for(0, static_cast<int64_t>(sums.size()), 1,
                              [&](int64_t begin, int64_t end) { SAFNET_KERNEL(census_sum_blocks)(a, begin, end); });
  double sum = 0;
  for (const double block : sums) sum += block;
  const bool exact = prediction.scalar_type() == ScalarType::Double;
  Tensor loss = empty({}, exact ? ScalarType::Double : ScalarType::Float);
  SAFNET_ISA::set_element(loss.data_ptr(), 0, type_of(loss), sum / loss_divisor(prediction, patch_size));
  return loss;
}

Tensor census_loss_backward(Tensor grad_out, Tensor prediction, Tensor target, int64_t patch_size,
                            bool /*deterministic*/) {
  Tensor grad_prediction = empty_image(prediction);
  CensusArguments a = arguments_of(prediction, target, patch_size);
  a.grad_prediction = view(grad_prediction);
  a.scale = SAFNET_ISA::element<double>(grad_out.data_ptr(), 0, type_of(grad_out)) /
            (loss_divisor(prediction, patch_size) * static_cast<double>(prediction.size(1)));
  torch::stable::parallel_for(0, prediction.size(0) * a.blocks, 1, [&](int64_t begin, int64_t end) {
    SAFNET_KERNEL(census_gradient_blocks)(a, begin, end);
  });
  return grad_prediction;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safnet_ops, CPU, m) {
  m.impl("census_loss", TORCH_BOX(&census_loss));
  m.impl("census_loss_backward", TORCH_BOX(&census_loss_backward));
}

}  // namespace safnet

#endif  // SAFNET_HOST
