// upsample_fuse on CUDA: flows and masks are resized in registers, written once, and used for the fusion on the way.
#include "cuda/fusion_host.h"

namespace safnet::cuda {

template <class T, class Index>
struct UpsampleArguments {
  FuseImages<T, Index> images;
  View<T, Index> out;
  GeometryView<Index> flow_short, flow_long, mask_short, mask_long;         // of the low resolution
  Real<T>*out_flow_short, *out_flow_long, *out_mask_short, *out_mask_long;  // contiguous
  int32_t low_height, low_width;
  Real<T> scale_y, scale_x;  // low by full side
  Real<T> ratio_y, ratio_x;  // full by low side
};

// Resizes one channel at kPixels adjacent pixels.
template <int kPixels, class T, class Index>
__device__ __forceinline__ void resize(const GeometryView<Index>& low, Index plane, const ResizeSample<Real<T>>& row,
                                       const ResizeSample<Real<T>>* columns, Real<T>* out) {
  using R = Real<T>;
  const auto read = [&](int32_t y, int32_t x) {
    R value;
    load_geometry<T, 1>(low, plane + y * low.y + x * low.x, &value);
    return value;
  };
#pragma unroll
  for (int k = 0; k < kPixels; ++k) {
    const ResizeSample<R>& column = columns[k];
    out[k] = bilinear(read(row.index, column.index), read(row.index, column.next), read(row.next, column.index),
                      read(row.next, column.next), column.fraction, row.fraction);
  }
}

template <class T, class Index, int kPixels>
__global__ void __launch_bounds__(kThreads) upsample_fuse(const __grid_constant__ UpsampleArguments<T, Index> a) {
  using R = Real<T>;
  const FuseImages<T, Index>& images = a.images;
  const Index item = thread_item<Index>();
  if (item >= images.items) return;
  const PixelRun<Index> pixel = pixel_run<kPixels>(item, images.height, images.width);
  const ResizeSample<R> row = resize_axis(static_cast<int32_t>(pixel.y), a.scale_y, a.low_height);
  ResizeSample<R> columns[kPixels];
#pragma unroll
  for (int k = 0; k < kPixels; ++k) columns[k] = resize_axis(static_cast<int32_t>(pixel.x) + k, a.scale_x, a.low_width);

  const Index size = static_cast<Index>(images.height) * images.width;
  const Index place = pixel.y * images.width + pixel.x;
  Alignment<R, Index, kPixels> alignment;
  const auto take_flow = [&](const GeometryView<Index>& low, R* target, const View<T, Index>& image,
                             Cell<R, Index>* cells) {
    R x[kPixels], y[kPixels];
    resize<kPixels, T>(low, pixel.n * low.n, row, columns, x);
    resize<kPixels, T>(low, pixel.n * low.n + low.c, row, columns, y);
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      x[k] *= a.ratio_x, y[k] *= a.ratio_y;
      cells[k] = locate(image, pixel, Index(k), x[k], y[k], images.height, images.width);
    }
    store<kPixels>(target + pixel.n * 2 * size + place, x);
    store<kPixels>(target + (pixel.n * 2 + 1) * size + place, y);
  };
  const auto take_mask = [&](const GeometryView<Index>& low, R* target, R* mask) {
    resize<kPixels, T>(low, pixel.n * low.n, row, columns, mask);
#pragma unroll
    for (int k = 0; k < kPixels; ++k) mask[k] = sigmoid(mask[k]);
    store<kPixels>(target + pixel.n * size + place, mask);
  };
  take_flow(a.flow_short, a.out_flow_short, images.short_, alignment.cell_short);
  take_flow(a.flow_long, a.out_flow_long, images.long_, alignment.cell_long);
  take_mask(a.mask_short, a.out_mask_short, alignment.mask_short);
  take_mask(a.mask_long, a.out_mask_long, alignment.mask_long);
  if (images.channels > 0) fuse_channels<kPixels>(images, pixel, alignment, a.out);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> upsample_fuse_host(const Tensor& short_, const Tensor& reference,
                                                                      const Tensor& long_, const Tensor& flow_short,
                                                                      const Tensor& flow_long, const Tensor& mask_short,
                                                                      const Tensor& mask_long,
                                                                      const Tensor& reference_ldr) {
  const ScalarType real = real_type(short_);
  const int64_t n = short_.size(0), height = short_.size(2), width = short_.size(3);
  Tensor out = empty_image(short_);
  Tensor flows[2] = {allocate({n, 2, height, width}, real, short_), allocate({n, 2, height, width}, real, short_)};
  Tensor masks[2] = {allocate({n, 1, height, width}, real, short_), allocate({n, 1, height, width}, real, short_)};
  const auto result = [&]() { return std::make_tuple(out, flows[0], flows[1], masks[0], masks[1]); };
  if (n * height * width == 0) return result();
  const DeviceScope scope(short_);
  const std::optional<Tensor> ldr = reference_ldr, none;
  const FuseTensors tensors{short_, reference, long_, ldr, none, none, none};
  const bool wide = needs_64bit_offsets(
      {&short_, &reference, &long_, &flow_short, &flow_long, &mask_short, &mask_long, &reference_ldr, &out, &flows[0]});
  const bool vectors = allow_vectors(tensors, out) && allows_vectors(flows[0], kVectorPixels);
  const double low_height = flow_short.size(2), low_width = flow_short.size(3);
  for_type(short_, [&](auto type) {
    using T = typename decltype(type)::type;
    using R = Real<T>;
    for_index(wide, [&](auto index) {
      using Index = typename decltype(index)::type;
      UpsampleArguments<T, Index> arguments{fuse_images<T, Index>(tensors),
                                            view<T, Index>(out),
                                            geometry_view<Index>(flow_short),
                                            geometry_view<Index>(flow_long),
                                            geometry_view<Index>(mask_short),
                                            geometry_view<Index>(mask_long),
                                            static_cast<R*>(flows[0].data_ptr()),
                                            static_cast<R*>(flows[1].data_ptr()),
                                            static_cast<R*>(masks[0].data_ptr()),
                                            static_cast<R*>(masks[1].data_ptr()),
                                            static_cast<int32_t>(low_height),
                                            static_cast<int32_t>(low_width),
                                            static_cast<R>(low_height) / static_cast<R>(height),
                                            static_cast<R>(low_width) / static_cast<R>(width),
                                            static_cast<R>(static_cast<double>(height) / low_height),
                                            static_cast<R>(static_cast<double>(width) / low_width)};
      if (vectors) arguments.images.items /= kVectorPixels;
      const auto kernel = vectors ? &upsample_fuse<T, Index, kVectorPixels> : &upsample_fuse<T, Index, 1>;
      launch("upsample_fuse", kernel, elementwise_plan(arguments.images.items), scope.stream, arguments);
    });
  });
  return result();
}

SAFNET_REGISTER(library) { library.impl("upsample_fuse", TORCH_BOX(&upsample_fuse_host)); }

}  // namespace safnet::cuda
