// backward_warp on the CPU: forward, and its gradients with respect to flow (a gather) and image (a scatter by bands).

#include "cpu/kernel.h"
#include "cpu/sampling.h"
#include "cpu/scatter.h"
#include "math/gradients.h"

namespace safnet {

struct WarpArguments {
  View image, flow, out;
};

struct WarpBackwardArguments {
  View image, flow, grad_out;
  View grad_flow, grad_image;
  void* reach;    // see scatter.h
  int32_t bands;  // into which each picture's rows are cut
};

SAFNET_DECLARE(warp_rows, const WarpArguments&, int64_t, int64_t)
SAFNET_DECLARE(warp_flow_gradient_rows, const WarpBackwardArguments&, int64_t, int64_t)
SAFNET_DECLARE(warp_reach_rows, const WarpBackwardArguments&, int64_t, int64_t)
SAFNET_DECLARE(warp_image_gradient_bands, const WarpBackwardArguments&, int64_t, int64_t)

}  // namespace safnet

namespace safnet::SAFNET_ISA {
namespace {

// One pixel's channels lie together: they are the vector.
template <class T, class R, class Offset>
void warp_pixels(const WarpArguments& a, const Run& run, const Grid<Offset>& grid, const Cells<R, Offset>& cells) {
  const int64_t channels = a.image.size[1];
  for (int i = 0; i < run.count; ++i) {
    const T* upper_left = row<T>(a.image, run.n, 0, 0) + cells.offset[i];
    const T *upper_right = upper_left + grid.right, *lower_left = upper_left + grid.down,
            *lower_right = lower_left + grid.right;
    T* __restrict out = at<T>(a.out, run, 0) + i * a.out.stride[3];
    const R fraction_x = cells.fraction_x[i], fraction_y = cells.fraction_y[i];
    for (int64_t c = 0; c < channels; ++c)
      store(bilinear(load(upper_left[c]), load(upper_right[c]), load(lower_left[c]), load(lower_right[c]), fraction_x,
                     fraction_y),
            out[c]);
  }
}

template <class R, class Offset>
void warp_channels_inside(const WarpArguments& a, const Run& run, const Grid<Offset>& grid,
                          const Cells<R, Offset>& cells) {
  if constexpr (sizeof(R) == sizeof(double)) {
    warp_pixels<double>(a, run, grid, cells);
  } else {
    if (a.image.type == Type::kFloat32) warp_pixels<float>(a, run, grid, cells);
    else if (a.image.type == Type::kFloat16) warp_pixels<Half>(a, run, grid, cells);
    else warp_pixels<BFloat16>(a, run, grid, cells);
  }
}

template <class R, class Offset>
void warp_runs(const WarpArguments& a, int64_t begin, int64_t end) {
  const Grid<Offset> grid(a.image);
  const int64_t channels = a.image.size[1];
  const bool channels_inside = a.image.stride[1] == 1 && a.out.stride[1] == 1 && channels > 1;
  Cells<R, Offset> cells;
  R buffer[kChunk];
  each_run(a.image, begin, end, [&](const Run& run) {
    locate(grid, a.flow, run, cells);
    if (channels_inside) return warp_channels_inside(a, run, grid, cells);
    for (int64_t c = 0; c < channels; ++c)
      write_run(a.out, run, c, buffer, [&](R* out) { sample(a.image, run.n, c, grid, cells, run.count, out); });
  });
}

template <class R>
void warp(const WarpArguments& a, int64_t begin, int64_t end) {
  (needs_64bit_offsets(a.image) ? warp_runs<R, int64_t> : warp_runs<R, int32_t>)(a, begin, end);
}

template <class R, class Offset>
void flow_gradient_runs(const WarpBackwardArguments& a, int64_t begin, int64_t end) {
  const Grid<Offset> grid(a.image);
  Cells<R, Offset> cells;
  R value[kChunk], slope_x[kChunk], slope_y[kChunk], buffer[kChunk];
  each_run(a.image, begin, end, [&](const Run& run) {
    locate(grid, a.flow, run, cells);
    R sum_x[kChunk] = {}, sum_y[kChunk] = {};
    for (int64_t c = 0; c < a.image.size[1]; ++c) {
      const R* grad = read_run(a.grad_out, run, c, buffer);
      sample_with_slopes(a.image, run.n, c, grid, cells, run.count, value, slope_x, slope_y);
      for (int i = 0; i < run.count; ++i) {
        sum_x[i] += grad[i] * slope_x[i];
        sum_y[i] += grad[i] * slope_y[i];
      }
    }
    store_flow_gradient(a.image, a.flow, a.grad_flow, run, sum_x, sum_y);
  });
}

template <class R>
void flow_gradient(const WarpBackwardArguments& a, int64_t begin, int64_t end) {
  (needs_64bit_offsets(a.image) ? flow_gradient_runs<R, int64_t> : flow_gradient_runs<R, int32_t>)(a, begin, end);
}

template <class R>
void reach_rows(const WarpBackwardArguments& a, int64_t begin, int64_t end) {
  note_reach<R>(a.flow, begin, end, static_cast<Reach*>(a.reach));
}

template <class R>
void image_gradient(const WarpBackwardArguments& a, int64_t begin, int64_t end) {
  scatter_bands<R>(a.grad_image, a.flow, static_cast<const Reach*>(a.reach), a.bands, begin, end,
                   [&](const Run& run, R* samples) {
                     for (int64_t c = 0; c < a.image.size[1]; ++c) load_run(a.grad_out, run, c, samples + c * kChunk);
                   });
}

}  // namespace

void warp_rows(const WarpArguments& a, int64_t begin, int64_t end) { SAFNET_DISPATCH(a.image, warp, a, begin, end); }
void warp_flow_gradient_rows(const WarpBackwardArguments& a, int64_t begin, int64_t end) {
  SAFNET_DISPATCH(a.image, flow_gradient, a, begin, end);
}
void warp_reach_rows(const WarpBackwardArguments& a, int64_t begin, int64_t end) {
  SAFNET_DISPATCH(a.image, reach_rows, a, begin, end);
}
void warp_image_gradient_bands(const WarpBackwardArguments& a, int64_t begin, int64_t end) {
  SAFNET_DISPATCH(a.image, image_gradient, a, begin, end);
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
  for_rows(a.out, SAFNET_KERNEL(warp_rows), a);
  return out;
}

// The gradient's type is the same on all backends, so `deterministic` needs no other kernel here: this one always is.
std::tuple<Tensor, Tensor> backward_warp_backward(Tensor grad_out, Tensor image, Tensor flow, int64_t needs,
                                                  bool /*deterministic*/) {
  const bool need_image = is_needed(needs, WarpInput::kImage), need_flow = is_needed(needs, WarpInput::kFlow);
  Tensor grad_image = zero_gradient(image, need_image);
  Tensor grad_flow = empty_gradient(flow, need_flow);
  WarpBackwardArguments a{};
  a.image = view(image), a.flow = view(flow), a.grad_out = view(grad_out);
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
