// backward_warp on CUDA. The formulas are in math/bilinear.h; the Python function documents shapes and borders.
#include "cuda/sampling.cuh"
#include "cuda/scatter_host.h"
#include "cuda/tensors.h"
#include "math/gradients.h"

namespace safnet::cuda {

template <class T, class Index>
struct WarpInputs {
  View<T, Index> image;
  GeometryView<Index> flow;
  int64_t items;
  int32_t channels, height, width;
};

template <class T, class Index>
struct WarpArguments : WarpInputs<T, Index> {
  View<T, Index> out;
};

// Planes: a thread samples kPixels adjacent pixels of every channel of its slice (blockIdx.y). The flow is read once.
template <class T, class Index, int kPixels>
__global__ void __launch_bounds__(kThreads, 2) warp_planes(const __grid_constant__ WarpArguments<T, Index> a) {
  using R = Real<T>;
  const Index item = thread_item<Index>();
  if (item >= a.items) return;
  const PixelRun<Index> pixel = pixel_run<kPixels>(item, a.height, a.width);
  R flow_x[kPixels], flow_y[kPixels];
  const Index flow_offset = a.flow.at(pixel.n, pixel.y, pixel.x);
  load_geometry<T, kPixels>(a.flow, flow_offset, flow_x);
  load_geometry<T, kPixels>(a.flow, flow_offset + a.flow.c, flow_y);
  Cell<R, Index> cells[kPixels];
#pragma unroll
  for (int k = 0; k < kPixels; ++k)
    cells[k] = locate(a.image, pixel, Index(k), flow_x[k], flow_y[k], a.height, a.width);
  const CellSteps<Index> steps = cell_steps(a.image, a.height, a.width);
  const int32_t per_slice = (a.channels + gridDim.y - 1) / gridDim.y;
  const int32_t first = per_slice * blockIdx.y, last = min(first + per_slice, a.channels);
  const T* channel = a.image.data + first * a.image.c;
  T* out = a.out.data + a.out.at(pixel.n, pixel.y, pixel.x) + first * a.out.c;
#pragma unroll 2
  for (int32_t c = first; c < last; ++c, channel += a.image.c, out += a.out.c) {
    R values[kPixels];
#pragma unroll
    for (int k = 0; k < kPixels; ++k)
      values[k] = corners(channel, cells[k].offset, steps).sample(cells[k].fraction_x, cells[k].fraction_y);
    store<kPixels>(out, values);
  }
}

// channels_last: a thread samples 16 bytes of one pixel's channels.
template <class T>
constexpr int kPackChannels = 16 / sizeof(T);

template <class T, class Index>
__global__ void __launch_bounds__(kThreads, 2) warp_channels_last(const __grid_constant__ WarpArguments<T, Index> a) {
  using R = Real<T>;
  constexpr int kPack = kPackChannels<T>;
  const Index item = thread_item<Index>();
  if (item >= a.items) return;
  const Index packs = a.channels / kPack;
  const Index pixel_item = static_cast<Index>(static_cast<std::make_unsigned_t<Index>>(item) / packs);
  const Index c = (item - pixel_item * packs) * kPack;
  const PixelRun<Index> pixel = pixel_run<1>(pixel_item, a.height, a.width);
  R flow_x, flow_y;
  const Index flow_offset = a.flow.at(pixel.n, pixel.y, pixel.x);
  load_geometry<T, 1>(a.flow, flow_offset, &flow_x);
  load_geometry<T, 1>(a.flow, flow_offset + a.flow.c, &flow_y);
  const Cell<R, Index> cell = locate(a.image, pixel, Index(0), flow_x, flow_y, a.height, a.width);
  const CellSteps<Index> steps = cell_steps(a.image, a.height, a.width);
  const T* corner = a.image.data + cell.offset + c;
  R v00[kPack], v01[kPack], v10[kPack], v11[kPack];
  load<kPack>(corner, v00);
  load<kPack>(corner + steps.x, v01);
  load<kPack>(corner + steps.y, v10);
  load<kPack>(corner + steps.y + steps.x, v11);
#pragma unroll
  for (int k = 0; k < kPack; ++k) v00[k] = bilinear(v00[k], v01[k], v10[k], v11[k], cell.fraction_x, cell.fraction_y);
  store<kPack>(a.out.data + a.out.at(pixel.n, pixel.y, pixel.x) + c, v00);
}

template <class T, class Index>
struct WarpBackwardArguments : WarpInputs<T, Index> {
  View<T, Index> grad_out;
  View<T, Index> grad_image;  // for its strides: the sums have this layout
  GeometryView<Index> grad_flow;
  ScatterArguments scatter;
  bool need_image, need_flow, measuring;
};

// Lanes hold neighbouring pixels (kLanes 1), so that atomics of a warp fall into few sectors; threadIdx.y takes a share
// of the channels. Or, for channels_last, groups of kLanes lanes share a pixel and take neighbouring channels.
template <class T, class Index, bool kDeterministic, int kLanes>
__global__ void __launch_bounds__(kThreads, 2)
    warp_backward(const __grid_constant__ WarpBackwardArguments<T, Index> b) {
  using R = Real<T>;
  const WarpInputs<T, Index>& a = b;
  const Index item = thread_item<Index>() / kLanes;
  const bool active = item < a.items;
  const PixelRun<Index> pixel = pixel_run<1>(active ? item : Index(0), a.height, a.width);
  R flow_x, flow_y;
  const Index flow_offset = a.flow.at(pixel.n, pixel.y, pixel.x);
  load_geometry<T, 1>(a.flow, flow_offset, &flow_x);
  load_geometry<T, 1>(a.flow, flow_offset + a.flow.c, &flow_y);
  bool inside_x, inside_y;
  const Cell<R, Index> cell = locate(a.image, pixel, Index(0), flow_x, flow_y, a.height, a.width, &inside_x, &inside_y);
  const CellSteps<Index> steps = cell_steps(a.image, a.height, a.width);
  // The sums' layout is not the image's: the same cell once more.
  const Cell<R, Index> sum_cell = locate(b.grad_image, pixel, Index(0), flow_x, flow_y, a.height, a.width);
  const CellSteps<Index> sum_steps = cell_steps(b.grad_image, a.height, a.width);
  Scatter<R, kDeterministic> scatter(b.scatter, b.measuring);
  // Where the flow is NaN, so is the result whatever the image, and passes no gradient on.
  const bool counts = active && !is_nan(flow_x) && !is_nan(flow_y);
  const Handover handover =
      kLanes == 1 && b.need_image ? plan_handover(counts, sum_cell.offset, sum_steps.x) : Handover{};

  const int32_t share = kLanes == 1 ? blockDim.y : kLanes;
  const T* grad = b.grad_out.data + b.grad_out.at(pixel.n, pixel.y, pixel.x);
  R sum_x = 0, sum_y = 0;
  for (int32_t first = 0; first < a.channels; first += share) {  // the same number of rounds for all lanes of a warp
    const int32_t c = first + (kLanes == 1 ? threadIdx.y : threadIdx.x % kLanes);
    const bool busy = counts && c < a.channels;
    const R g = busy ? to_real(read_only(grad + c * b.grad_out.c)) : R(0);
    if (b.need_flow && busy) {
      const Corners<R> v = corners(a.image.data + c * a.image.c, cell.offset, steps);
      sum_x += g * bilinear_dx(v.v00, v.v01, v.v10, v.v11, cell.fraction_y);
      sum_y += g * bilinear_dy(v.v00, v.v01, v.v10, v.v11, cell.fraction_x);
    }
    if (b.need_image)
      scatter_cell(scatter, busy, handover, sum_cell.offset + c * b.grad_image.c, sum_steps, cell.fraction_x,
                   cell.fraction_y, g);
  }
  if (b.need_image) scatter.finish();
  if (!b.need_flow) return;

  bool writes = active;
  if constexpr (kLanes > 1) {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      sum_x += __shfl_xor_sync(0xffffffffu, sum_x, distance);
      sum_y += __shfl_xor_sync(0xffffffffu, sum_y, distance);
    }
    writes = writes && threadIdx.x % kLanes == 0;
  } else if (blockDim.y > 1) {
    extern __shared__ __align__(16) unsigned char shared[];
    R* sums = reinterpret_cast<R*>(shared);
    const int here = threadIdx.y * blockDim.x + threadIdx.x;
    sums[here] = sum_x, sums[kThreads + here] = sum_y;
    __syncthreads();
    writes = writes && threadIdx.y == 0;
    if (writes) {
      for (int slice = 1; slice < blockDim.y; ++slice) {
        sum_x += sums[slice * blockDim.x + threadIdx.x];
        sum_y += sums[kThreads + slice * blockDim.x + threadIdx.x];
      }
    }
  }
  if (!writes) return;
  const Index offset = b.grad_flow.at(pixel.n, pixel.y, pixel.x);
  store_geometry<T>(b.grad_flow, offset, inside_x ? sum_x : R(0));
  store_geometry<T>(b.grad_flow, offset + b.grad_flow.c, inside_y ? sum_y : R(0));
}

template <class T, class Index>
WarpInputs<T, Index> warp_inputs(const Tensor& image, const Tensor& flow) {
  return {view<T, Index>(image),
          geometry_view<Index>(flow),
          image.size(0) * image.size(2) * image.size(3),
          static_cast<int32_t>(image.size(1)),
          static_cast<int32_t>(image.size(2)),
          static_cast<int32_t>(image.size(3))};
}

// Whether a thread may take 16 bytes of every pixel's channels.
bool allows_channel_packs(const Tensor& tensor) {
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  if (tensor.stride(1) != 1 || tensor.size(1) * bytes % 16 != 0) return false;
  if (reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 != 0) return false;
  for (int i : {0, 2, 3})
    if (tensor.size(i) > 1 && tensor.stride(i) * bytes % 16 != 0) return false;
  return true;
}

Tensor backward_warp(const Tensor& image, const Tensor& flow) {
  Tensor out = empty_image(image);
  if (out.numel() == 0) return out;
  const DeviceScope scope(image);
  for_type(image, [&](auto type) {
    using T = typename decltype(type)::type;
    for_index(needs_64bit_offsets({&image, &flow, &out}), [&](auto index) {
      using Index = typename decltype(index)::type;
      WarpArguments<T, Index> arguments{warp_inputs<T, Index>(image, flow), view<T, Index>(out)};
      if (allows_channel_packs(image) && allows_channel_packs(out)) {
        arguments.items *= image.size(1) / kPackChannels<T>;
        launch("backward_warp", &warp_channels_last<T, Index>, elementwise_plan(arguments.items), scope.stream,
               arguments);
        return;
      }
      const bool vectors = allows_vectors(flow, kVectorPixels) && allows_vectors(out, kVectorPixels);
      if (vectors) arguments.items /= kVectorPixels;
      const Plan plan = warp_forward_plan(arguments.items, image.size(1));
      const auto kernel = vectors ? &warp_planes<T, Index, kVectorPixels> : &warp_planes<T, Index, 1>;
      launch("backward_warp", kernel, plan, scope.stream, arguments);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> backward_warp_backward(const Tensor& grad_out, const Tensor& image, const Tensor& flow,
                                                  int64_t needs, bool deterministic) {
  const bool need_image = is_needed(needs, WarpInput::kImage), need_flow = is_needed(needs, WarpInput::kFlow);
  const DeviceScope scope(image);
  const ScatteredGradient grad_image(image, need_image, deterministic, scope.stream);
  const Tensor grad_flow = empty_gradient(flow, need_flow);
  if (image.size(1) == 0) zero(grad_flow, scope.stream);
  if (image.numel() == 0 || !(need_image || need_flow)) return {grad_image.gradient, grad_flow};
  const Tensor& sums = need_image ? grad_image.gradient : image;  // for the strides
  for_type(image, [&](auto type) {
    using T = typename decltype(type)::type;
    for_index(needs_64bit_offsets({&image, &flow, &grad_out, &sums, &grad_flow}), [&](auto index) {
      using Index = typename decltype(index)::type;
      WarpBackwardArguments<T, Index> arguments{warp_inputs<T, Index>(image, flow),
                                                view<T, Index>(grad_out),
                                                view<T, Index>(sums),
                                                need_flow ? geometry_view<Index>(grad_flow) : GeometryView<Index>{},
                                                grad_image.arguments(),
                                                need_image,
                                                need_flow,
                                                false};
      const int64_t pixels = arguments.items, channels = image.size(1);
      const bool grouped = is_channels_last(image) && channels >= kLaneGroup;
      const Plan plan =
          grouped ? elementwise_plan(pixels * kLaneGroup) : warp_backward_plan(pixels, channels, sizeof(Real<T>)).plan;
      const auto add = grouped ? &warp_backward<T, Index, false, kLaneGroup> : &warp_backward<T, Index, false, 1>;
      const auto add_fixed = grouped ? &warp_backward<T, Index, true, kLaneGroup> : &warp_backward<T, Index, true, 1>;
      if (need_image && deterministic) {
        arguments.measuring = true;
        arguments.need_flow = false;
        launch("backward_warp_backward", add_fixed, plan, scope.stream, arguments);
        arguments.measuring = false;
        arguments.need_flow = need_flow;
        launch("backward_warp_backward", add_fixed, plan, scope.stream, arguments);
      } else {
        launch("backward_warp_backward", add, plan, scope.stream, arguments);
      }
    });
  });
  grad_image.finish(scope.stream);
  return {grad_image.gradient, grad_flow};
}

SAFNET_REGISTER(library) {
  library.impl("backward_warp", TORCH_BOX(&backward_warp));
  library.impl("backward_warp_backward", TORCH_BOX(&backward_warp_backward));
}

}  // namespace safnet::cuda
