// backward_warp on the CPU: forward, and its gradients with respect to flow (a gather) and image (a scatter by bands).

#include "cpu/kernel.h"
#include "cpu/sampling.h"
#include "cpu/scatter.h"

namespace safnet {

struct WarpArguments {
  View image, flow, out;  // `grad` takes the place of `out` in the backward
  View grad_flow, grad_image;
  int32_t* reach;  // (N * H, 2)
  int32_t bands;   // into which each picture's rows are cut
  Type image_type, flow_type;
};

SAFNET_DECLARE(warp_rows, const WarpArguments&, int64_t, int64_t)
SAFNET_DECLARE(warp_flow_gradient_rows, const WarpArguments&, int64_t, int64_t)
SAFNET_DECLARE(warp_reach_rows, const WarpArguments&, int64_t, int64_t)
SAFNET_DECLARE(warp_image_gradient_bands, const WarpArguments&, int64_t, int64_t)

}  // namespace safnet

namespace safnet::SAFNET_ISA {
namespace {

template <class T, class G, class Offset>
void warp_row(const WarpArguments& a, int64_t n, int32_t y) {
  using R = Real<T>;
  const Grid<Offset> grid(a.image);
  const int64_t channels = a.image.size[1];
  const bool channels_inside = a.image.stride[1] == 1 && a.out.stride[1] == 1 && channels > 1;
  Cells<R, Offset> cells;
  for (int32_t x = 0; x < grid.width; x += kChunk) {
    const int count = grid.width - x < kChunk ? grid.width - x : kChunk;
    locate_row<G>(grid, a.flow, n, y, x, count, cells);
    if (channels_inside) {
      for (int i = 0; i < count; ++i) {
        const T* at = row<T>(a.image, n, 0, 0) + cells.offset[i];
        const T *upper_right = at + grid.right, *lower_left = at + grid.down, *lower_right = lower_left + grid.right;
        T* __restrict out = row<T>(a.out, n, 0, y) + (x + i) * a.out.stride[3];
        const R fraction_x = cells.fraction_x[i], fraction_y = cells.fraction_y[i];
        for (int64_t c = 0; c < channels; ++c)
          store(bilinear(load(at[c]), load(upper_right[c]), load(lower_left[c]), load(lower_right[c]), fraction_x, fraction_y),
                out[c]);
      }
    } else {
      R values[kChunk];
      for (int64_t c = 0; c < channels; ++c) {
        sample(row<T>(a.image, n, c, 0), grid, cells, count, values);
        store_row(values, count, row<T>(a.out, n, c, y) + x * a.out.stride[3], a.out.stride[3]);
      }
    }
  }
}

template <class T, class G>
void warp(const WarpArguments& a, int64_t begin, int64_t end) {
  const int64_t height = a.image.size[2];
  const bool wide = needs_64bit_offsets(a.image);
  for (int64_t r = begin; r < end; ++r) {
    if (wide) warp_row<T, G, int64_t>(a, r / height, static_cast<int32_t>(r % height));
    else warp_row<T, G, int32_t>(a, r / height, static_cast<int32_t>(r % height));
  }
}

template <class T, class G, class Offset>
void flow_gradient_row(const WarpArguments& a, int64_t n, int32_t y) {
  using R = Real<T>;
  const Grid<Offset> grid(a.image);
  Cells<R, Offset> cells;
  for (int32_t x = 0; x < grid.width; x += kChunk) {
    const int count = grid.width - x < kChunk ? grid.width - x : kChunk;
    locate_row<G>(grid, a.flow, n, y, x, count, cells);
    R sum_x[kChunk] = {}, sum_y[kChunk] = {}, value[kChunk], slope_x[kChunk], slope_y[kChunk], grad[kChunk];
    for (int64_t c = 0; c < a.image.size[1]; ++c) {
      load_row(row<T>(a.out, n, c, y) + x * a.out.stride[3], a.out.stride[3], count, grad);
      sample_with_slopes(row<T>(a.image, n, c, 0), grid, cells, count, value, slope_x, slope_y);
      for (int i = 0; i < count; ++i) sum_x[i] += grad[i] * slope_x[i];
      for (int i = 0; i < count; ++i) sum_y[i] += grad[i] * slope_y[i];
    }
    const int64_t stride = a.grad_flow.stride[3];
    store_row(sum_x, count, row<G>(a.grad_flow, n, 0, y) + x * stride, stride);
    store_row(sum_y, count, row<G>(a.grad_flow, n, 1, y) + x * stride, stride);
  }
}

template <class T, class G>
void flow_gradient(const WarpArguments& a, int64_t begin, int64_t end) {
  const int64_t height = a.image.size[2];
  const bool wide = needs_64bit_offsets(a.image);
  for (int64_t r = begin; r < end; ++r) {
    if (wide) flow_gradient_row<T, G, int64_t>(a, r / height, static_cast<int32_t>(r % height));
    else flow_gradient_row<T, G, int32_t>(a, r / height, static_cast<int32_t>(r % height));
  }
}

template <class T, class G>
void reach_rows(const WarpArguments& a, int64_t begin, int64_t end) {
  const Grid<int64_t> grid(a.image);
  for (int64_t r = begin; r < end; ++r)
    reinterpret_cast<Reach*>(a.reach)[r] =
        reach_of_row<G, Real<T>>(grid, a.flow, r / grid.height, static_cast<int32_t>(r % grid.height));
}

template <class T, class G>
void image_gradient(const WarpArguments& a, int64_t begin, int64_t end) {
  using R = Real<T>;
  const int64_t channels = a.image.size[1], height = a.image.size[2];
  R* values = static_cast<R*>(std::malloc(static_cast<size_t>(channels) * kChunk * sizeof(R)));
  if (values == nullptr) std::abort();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / a.bands, band = task % a.bands;
    const auto first = static_cast<int32_t>(height * band / a.bands), last = static_cast<int32_t>(height * (band + 1) / a.bands);
    scatter_band<T, G>(a.grad_image, a.flow, reinterpret_cast<const Reach*>(a.reach) + n * height, n, first, last, values,
                       [&](int32_t y, int32_t x, int count, R* out) {
                         for (int64_t c = 0; c < channels; ++c)
                           load_row(row<T>(a.out, n, c, y) + x * a.out.stride[3], a.out.stride[3], count, out + c * kChunk);
                       });
  }
  std::free(values);
}

}  // namespace

void warp_rows(const WarpArguments& a, int64_t begin, int64_t end) {
  SAFNET_DISPATCH(a.image_type, a.flow_type, warp, a, begin, end);
}
void warp_flow_gradient_rows(const WarpArguments& a, int64_t begin, int64_t end) {
  SAFNET_DISPATCH(a.image_type, a.flow_type, flow_gradient, a, begin, end);
}
void warp_reach_rows(const WarpArguments& a, int64_t begin, int64_t end) {
  SAFNET_DISPATCH(a.image_type, a.flow_type, reach_rows, a, begin, end);
}
void warp_image_gradient_bands(const WarpArguments& a, int64_t begin, int64_t end) {
  SAFNET_DISPATCH(a.image_type, a.flow_type, image_gradient, a, begin, end);
}

}  // namespace safnet::SAFNET_ISA

#if SAFNET_HOST

#include "cpu/tensors.h"

namespace safnet {
namespace {

Tensor backward_warp(Tensor image, Tensor flow) {
  Tensor out = empty_image(image);
  WarpArguments a{};
  a.image = view(image), a.flow = view(flow), a.out = view(out);
  a.image_type = type_of(image), a.flow_type = type_of(flow);
  for_rows(a.out, SAFNET_KERNEL(warp_rows), a);
  return out;
}

// The gradient's type is the same on all backends, so `deterministic` needs no other kernel here: this one always is.
std::tuple<Tensor, Tensor> backward_warp_backward(Tensor grad, Tensor image, Tensor flow, bool need_image, bool need_flow,
                                                  bool /*deterministic*/) {
  Tensor grad_image = zero_gradient(image, need_image);
  Tensor grad_flow = empty_gradient(flow, need_flow);
  WarpArguments a{};
  a.image = view(image), a.flow = view(flow), a.out = view(grad);
  a.image_type = type_of(image), a.flow_type = type_of(flow);
  if (need_flow) {
    a.grad_flow = view(grad_flow);
    for_rows(a.image, SAFNET_KERNEL(warp_flow_gradient_rows), a);
  }
  if (need_image) {
    a.grad_image = view(grad_image);
    scatter(a.image, SAFNET_KERNEL(warp_reach_rows), SAFNET_KERNEL(warp_image_gradient_bands), a);
  }
  return {grad_image, grad_flow};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safnet_ops, CPU, m) {
  m.impl("backward_warp", TORCH_BOX(&backward_warp));
  m.impl("backward_warp_backward", TORCH_BOX(&backward_warp_backward));
}

}  // namespace safnet

#endif  // SAFNET_HOST
