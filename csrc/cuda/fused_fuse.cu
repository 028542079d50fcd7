// fused_fuse on CUDA. The formulas are in math/fusion.h and math/bilinear.h; the Python function documents shapes and
// borders.
#include "cuda/fusion_host.h"
#include "cuda/scatter_host.h"
#include "math/gradients.h"

namespace safnet::cuda {

template <class T, class Index>
struct FuseInputs {
  FuseImages<T, Index> images;
  GeometryView<Index> flow_short, flow_long, mask_short, mask_long;
  bool mask_logits;
};

template <class T, class Index>
struct FuseArguments : FuseInputs<T, Index> {
  View<T, Index> out;
};

// A thread fuses kPixels adjacent pixels: it reads their flows and masks once, then every channel.
template <class T, class Index, int kPixels>
__global__ void __launch_bounds__(kThreads) fuse(const __grid_constant__ FuseArguments<T, Index> a) {
  using R = Real<T>;
  const FuseImages<T, Index>& images = a.images;
  const Index item = thread_item<Index>();
  if (item >= images.items) return;
  const PixelRun<Index> pixel = pixel_run<kPixels>(item, images.height, images.width);
  const auto read = [&](const GeometryView<Index>& view, int c, R* values) {
    load_geometry<T, kPixels>(view, view.at(pixel.n, pixel.y, pixel.x) + c * view.c, values);
  };
  Alignment<R, Index, kPixels> alignment;
  R flow_x[kPixels], flow_y[kPixels];
  read(a.flow_short, 0, flow_x);
  read(a.flow_short, 1, flow_y);
#pragma unroll
  for (int k = 0; k < kPixels; ++k)
    alignment.cell_short[k] = locate(images.short_, pixel, Index(k), flow_x[k], flow_y[k], images.height, images.width);
  read(a.flow_long, 0, flow_x);
  read(a.flow_long, 1, flow_y);
#pragma unroll
  for (int k = 0; k < kPixels; ++k)
    alignment.cell_long[k] = locate(images.long_, pixel, Index(k), flow_x[k], flow_y[k], images.height, images.width);
  read(a.mask_short, 0, alignment.mask_short);
  read(a.mask_long, 0, alignment.mask_long);
  if (a.mask_logits) {
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      alignment.mask_short[k] = sigmoid(alignment.mask_short[k]);
      alignment.mask_long[k] = sigmoid(alignment.mask_long[k]);
    }
  }
  fuse_channels<kPixels>(images, pixel, alignment, a.out);
}

constexpr int kFuseInputs = static_cast<int>(FuseInput::kWeightLong) + 1;

template <class T, class Index>
struct FuseBackwardArguments : FuseInputs<T, Index> {
  View<T, Index> grad_out;
  View<T, Index> grad_short, grad_long;  // for their strides: the sums have these layouts
  ScatterArguments scatter_short, scatter_long;
  View<T, Index> grad_reference, grad_reference_ldr, grad_weight_short, grad_weight_reference, grad_weight_long;
  GeometryView<Index> grad_flow_short, grad_flow_long, grad_mask_short, grad_mask_long;
  uint32_t needs;
  bool measuring;  // find the scale of the scattered gradients only

  __device__ __forceinline__ bool need(FuseInput input) const { return is_needed(needs, input); }
};

// One warped exposure of one pixel in the backward.
template <class R, class Index>
struct Exposure {
  Cell<R, Index> cell, sum_cell;
  CellSteps<Index> steps, sum_steps;
  Handover handover;
  bool inside_x, inside_y;
  bool known;  // neither flow nor mask is NaN
  R mask, sum_mask = 0, sum_x = 0, sum_y = 0;

  template <class T>
  __device__ __forceinline__ Exposure(const FuseInputs<T, Index>& a, const PixelRun<Index>& pixel,
                                      const View<T, Index>& image, const View<T, Index>& sums,
                                      const GeometryView<Index>& flow, const GeometryView<Index>& mask_view) {
    const int32_t height = a.images.height, width = a.images.width;
    R flow_x, flow_y;
    const Index flow_offset = flow.at(pixel.n, pixel.y, pixel.x);
    load_geometry<T, 1>(flow, flow_offset, &flow_x);
    load_geometry<T, 1>(flow, flow_offset + flow.c, &flow_y);
    load_geometry<T, 1>(mask_view, mask_view.at(pixel.n, pixel.y, pixel.x), &mask);
    known = !is_nan(flow_x) && !is_nan(flow_y) && !is_nan(mask);
    if (a.mask_logits) mask = sigmoid(mask);
    cell = locate(image, pixel, Index(0), flow_x, flow_y, height, width, &inside_x, &inside_y);
    steps = cell_steps(image, height, width);
    sum_cell = locate(sums, pixel, Index(0), flow_x, flow_y, height, width);
    sum_steps = cell_steps(sums, height, width);
  }

  // Where `counts` is false, the gradients of this pixel become zero with the incoming one. All threads of a warp call
  // this together.
  __device__ __forceinline__ void begin(bool counts, bool scatters) {
    if (!counts) cell.fraction_x = cell.fraction_y = mask = 0;
    handover = scatters ? plan_handover(counts, sum_cell.offset, sum_steps.x) : Handover{};
  }

  __device__ __forceinline__ void add_flow(const Corners<R>& v, R grad) {
    sum_x += grad * bilinear_dx(v.v00, v.v01, v.v10, v.v11, cell.fraction_y);
    sum_y += grad * bilinear_dy(v.v00, v.v01, v.v10, v.v11, cell.fraction_x);
  }

  template <class T>
  __device__ __forceinline__ void store_geometry_gradients(const PixelRun<Index>& pixel,
                                                           const GeometryView<Index>& flow, bool need_flow,
                                                           const GeometryView<Index>& mask_view, bool need_mask,
                                                           bool logits) const {
    if (need_flow) {
      const Index offset = flow.at(pixel.n, pixel.y, pixel.x);
      store_geometry<T>(flow, offset, inside_x ? sum_x : R(0));
      store_geometry<T>(flow, offset + flow.c, inside_y ? sum_y : R(0));
    }
    if (need_mask)
      store_geometry<T>(mask_view, mask_view.at(pixel.n, pixel.y, pixel.x),
                        logits ? sum_mask * mask * (1 - mask) : sum_mask);
  }
};

// A thread takes one pixel, so that lanes hold neighbours (see scatter.cuh). Only what the needed gradients depend on
// is read.
template <class T, class Index, bool kDeterministic>
__global__ void __launch_bounds__(kThreads) fuse_backward(const __grid_constant__ FuseBackwardArguments<T, Index> b) {
  using R = Real<T>;
  const FuseInputs<T, Index>& a = b;
  const FuseImages<T, Index>& images = a.images;
  const Index item = thread_item<Index>();
  const bool active = item < images.items;
  const PixelRun<Index> pixel = pixel_run<1>(active ? item : Index(0), images.height, images.width);
  Exposure<R, Index> exposure_short(a, pixel, images.short_, b.grad_short, a.flow_short, a.mask_short);
  Exposure<R, Index> exposure_long(a, pixel, images.long_, b.grad_long, a.flow_long, a.mask_long);
  // Where a flow or a mask is NaN, the result is NaN whatever the inputs, and passes no gradient on.
  const bool counts = active && exposure_short.known && exposure_long.known;
  exposure_short.begin(counts, b.need(FuseInput::kShort));
  exposure_long.begin(counts, b.need(FuseInput::kLong));
  Scatter<R, kDeterministic> scatter_short(b.scatter_short, b.measuring && b.need(FuseInput::kShort));
  Scatter<R, kDeterministic> scatter_long(b.scatter_long, b.measuring && b.need(FuseInput::kLong));

  const bool need_base = b.need(FuseInput::kReferenceLdr) || b.need(FuseInput::kWeightShort) ||
                         b.need(FuseInput::kWeightReference) || b.need(FuseInput::kWeightLong);
  const bool read_short =
      counts && !b.measuring && (need_base || b.need(FuseInput::kFlowShort) || b.need(FuseInput::kMaskShort));
  const bool read_long =
      counts && !b.measuring && (need_base || b.need(FuseInput::kFlowLong) || b.need(FuseInput::kMaskLong));
  const bool read_reference =
      counts && !b.measuring && (need_base || b.need(FuseInput::kMaskShort) || b.need(FuseInput::kMaskLong));
  const auto here = [&](const View<T, Index>& view, int32_t c) {
    return view.data + view.at(pixel.n, pixel.y, pixel.x) + c * view.c;
  };
  for (int32_t c = 0; c < images.channels; ++c) {
    Weights<R> base;
    load_base_weights<1>(images, pixel, c, &base);
    const Weights<R> w = reweight(base, exposure_short.mask, exposure_long.mask);
    // Of the weighted sum of values, which the mean divides by the sum of weights.
    const R grad = counts ? to_real(read_only(here(b.grad_out, c))) * inverse_sum(w) : R(0);
    Corners<R> corners_short{}, corners_long{};
    if (read_short)
      corners_short =
          corners(images.short_.data + c * images.short_.c, exposure_short.cell.offset, exposure_short.steps);
    if (read_long)
      corners_long = corners(images.long_.data + c * images.long_.c, exposure_long.cell.offset, exposure_long.steps);
    const R v_reference = read_reference ? to_real(read_only(here(images.reference, c))) : R(0);
    const R v_short = corners_short.sample(exposure_short.cell.fraction_x, exposure_short.cell.fraction_y);
    const R v_long = corners_long.sample(exposure_long.cell.fraction_x, exposure_long.cell.fraction_y);

    exposure_short.add_flow(corners_short, grad * w.short_);
    exposure_long.add_flow(corners_long, grad * w.long_);
    exposure_short.sum_mask += grad * base.short_ * (v_short - v_reference);
    exposure_long.sum_mask += grad * base.long_ * (v_long - v_reference);
    if (b.need(FuseInput::kShort))
      scatter_cell(scatter_short, counts, exposure_short.handover, exposure_short.sum_cell.offset + c * b.grad_short.c,
                   exposure_short.sum_steps, exposure_short.cell.fraction_x, exposure_short.cell.fraction_y,
                   grad * w.short_);
    if (b.need(FuseInput::kLong))
      scatter_cell(scatter_long, counts, exposure_long.handover, exposure_long.sum_cell.offset + c * b.grad_long.c,
                   exposure_long.sum_steps, exposure_long.cell.fraction_x, exposure_long.cell.fraction_y,
                   grad * w.long_);
    if (!active || b.measuring) continue;
    if (b.need(FuseInput::kReference)) *here(b.grad_reference, c) = from_real<T>(grad * w.reference);
    if (!need_base) continue;
    const R mean = weighted_mean(w, v_short, v_reference, v_long);
    const R by_reference = grad * (v_reference - mean);
    const R by_short = grad * (v_short - mean) * exposure_short.mask + by_reference * (1 - exposure_short.mask);
    const R by_long = grad * (v_long - mean) * exposure_long.mask + by_reference * (1 - exposure_long.mask);
    if (b.need(FuseInput::kReferenceLdr)) {
      const R z = to_real(read_only(here(images.reference_ldr, c)));
      *here(b.grad_reference_ldr, c) = from_real<T>(triangle_weights_backward(z, {by_short, by_reference, by_long}));
    }
    if (b.need(FuseInput::kWeightShort)) *here(b.grad_weight_short, c) = from_real<T>(by_short);
    if (b.need(FuseInput::kWeightReference)) *here(b.grad_weight_reference, c) = from_real<T>(by_reference);
    if (b.need(FuseInput::kWeightLong)) *here(b.grad_weight_long, c) = from_real<T>(by_long);
  }
  scatter_short.finish();
  scatter_long.finish();
  if (!active || b.measuring) return;
  exposure_short.template store_geometry_gradients<T>(pixel, b.grad_flow_short, b.need(FuseInput::kFlowShort),
                                                      b.grad_mask_short, b.need(FuseInput::kMaskShort), a.mask_logits);
  exposure_long.template store_geometry_gradients<T>(pixel, b.grad_flow_long, b.need(FuseInput::kFlowLong),
                                                     b.grad_mask_long, b.need(FuseInput::kMaskLong), a.mask_logits);
}

template <class T, class Index>
FuseInputs<T, Index> fuse_inputs(const FuseTensors& tensors, const Tensor& flow_short, const Tensor& flow_long,
                                 const Tensor& mask_short, const Tensor& mask_long, bool mask_logits) {
  return {fuse_images<T, Index>(tensors),   geometry_view<Index>(flow_short), geometry_view<Index>(flow_long),
          geometry_view<Index>(mask_short), geometry_view<Index>(mask_long),  mask_logits};
}

Tensor fused_fuse(const Tensor& short_, const Tensor& reference, const Tensor& long_, const Tensor& flow_short,
                  const Tensor& flow_long, const Tensor& mask_short, const Tensor& mask_long,
                  const std::optional<Tensor>& reference_ldr, const std::optional<Tensor>& weight_short,
                  const std::optional<Tensor>& weight_reference, const std::optional<Tensor>& weight_long,
                  bool mask_logits) {
  Tensor out = empty_image(short_);
  if (out.numel() == 0) return out;
  const DeviceScope scope(short_);
  const FuseTensors tensors{short_, reference, long_, reference_ldr, weight_short, weight_reference, weight_long};
  const bool wide = needs_64bit_offsets({&short_, &reference, &long_, &flow_short, &flow_long, &mask_short, &mask_long,
                                         pointer(reference_ldr), pointer(weight_short), pointer(weight_reference),
                                         pointer(weight_long), &out});
  bool vectors = allow_vectors(tensors, out);
  for (const Tensor* tensor : {&flow_short, &flow_long, &mask_short, &mask_long})
    vectors = vectors && allows_vectors(*tensor, kVectorPixels);
  for_type(short_, [&](auto type) {
    using T = typename decltype(type)::type;
    for_index(wide, [&](auto index) {
      using Index = typename decltype(index)::type;
      FuseArguments<T, Index> arguments{
          fuse_inputs<T, Index>(tensors, flow_short, flow_long, mask_short, mask_long, mask_logits),
          view<T, Index>(out)};
      int64_t& items = arguments.images.items;
      if (vectors) items /= kVectorPixels;
      const auto kernel = vectors ? &fuse<T, Index, kVectorPixels> : &fuse<T, Index, 1>;
      launch("fused_fuse", kernel, elementwise_plan(items), scope.stream, arguments);
    });
  });
  return out;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients fused_fuse_backward(const Tensor& grad_out, const Tensor& short_, const Tensor& reference,
                              const Tensor& long_, const Tensor& flow_short, const Tensor& flow_long,
                              const Tensor& mask_short, const Tensor& mask_long,
                              const std::optional<Tensor>& reference_ldr, const std::optional<Tensor>& weight_short,
                              const std::optional<Tensor>& weight_reference, const std::optional<Tensor>& weight_long,
                              bool mask_logits, int64_t needs, bool deterministic) {
  const DeviceScope scope(short_);
  // In the order of FuseInput.
  const Tensor* inputs[kFuseInputs] = {&short_,
                                       &reference,
                                       &long_,
                                       &flow_short,
                                       &flow_long,
                                       &mask_short,
                                       &mask_long,
                                       pointer(reference_ldr),
                                       pointer(weight_short),
                                       pointer(weight_reference),
                                       pointer(weight_long)};
  for (int i = 0; i < kFuseInputs; ++i)
    if (inputs[i] == nullptr) needs &= ~(int64_t{1} << i);
  const auto need = [&](FuseInput input) { return is_needed(needs, input); };
  const ScatteredGradient grad_short(short_, need(FuseInput::kShort), deterministic, scope.stream);
  const ScatteredGradient grad_long(long_, need(FuseInput::kLong), deterministic, scope.stream);
  std::vector<Tensor> gradients;
  for (int i = 0; i < kFuseInputs; ++i) {
    const auto input = static_cast<FuseInput>(i);
    if (input == FuseInput::kShort) gradients.push_back(grad_short.gradient);
    else if (input == FuseInput::kLong) gradients.push_back(grad_long.gradient);
    else gradients.push_back(need(input) ? empty_gradient(*inputs[i], true) : no_gradient(grad_out));
  }
  const auto gradient = [&](FuseInput input) -> const Tensor& { return gradients[static_cast<size_t>(input)]; };
  const auto result = [&]() -> Gradients {
    return {gradients[0], gradients[1], gradients[2], gradients[3], gradients[4], gradients[5],
            gradients[6], gradients[7], gradients[8], gradients[9], gradients[10]};
  };
  if (short_.size(1) == 0)
    for (auto input : {FuseInput::kFlowShort, FuseInput::kFlowLong, FuseInput::kMaskShort, FuseInput::kMaskLong})
      zero(gradient(input), scope.stream);
  if (short_.numel() == 0 || needs == 0) return result();

  bool wide = needs_64bit_offsets({&grad_out});
  for (int i = 0; i < kFuseInputs; ++i) wide = wide || needs_64bit_offsets({inputs[i], &gradients[i]});
  for_type(short_, [&](auto type) {
    using T = typename decltype(type)::type;
    for_index(wide, [&](auto index) {
      using Index = typename decltype(index)::type;
      const auto image = [&](FuseInput input) {
        return need(input) ? view<T, Index>(gradient(input)) : View<T, Index>{};
      };
      const auto geometry = [&](FuseInput input) {
        return need(input) ? geometry_view<Index>(gradient(input)) : GeometryView<Index>{};
      };
      const FuseTensors tensors{short_, reference, long_, reference_ldr, weight_short, weight_reference, weight_long};
      FuseBackwardArguments<T, Index> arguments{
          fuse_inputs<T, Index>(tensors, flow_short, flow_long, mask_short, mask_long, mask_logits),
          view<T, Index>(grad_out),
          image(FuseInput::kShort),
          image(FuseInput::kLong),
          grad_short.arguments(),
          grad_long.arguments(),
          image(FuseInput::kReference),
          image(FuseInput::kReferenceLdr),
          image(FuseInput::kWeightShort),
          image(FuseInput::kWeightReference),
          image(FuseInput::kWeightLong),
          geometry(FuseInput::kFlowShort),
          geometry(FuseInput::kFlowLong),
          geometry(FuseInput::kMaskShort),
          geometry(FuseInput::kMaskLong),
          static_cast<uint32_t>(needs),
          false};
      const Plan plan = elementwise_plan(arguments.images.items);
      if (deterministic && (need(FuseInput::kShort) || need(FuseInput::kLong))) {
        arguments.measuring = true;
        launch("fused_fuse_backward", &fuse_backward<T, Index, true>, plan, scope.stream, arguments);
        arguments.measuring = false;
        launch("fused_fuse_backward", &fuse_backward<T, Index, true>, plan, scope.stream, arguments);
      } else {
        launch("fused_fuse_backward", &fuse_backward<T, Index, false>, plan, scope.stream, arguments);
      }
    });
  });
  grad_short.finish(scope.stream);
  grad_long.finish(scope.stream);
  return result();
}

SAFNET_REGISTER(library) {
  library.impl("fused_fuse", TORCH_BOX(&fused_fuse));
  library.impl("fused_fuse_backward", TORCH_BOX(&fused_fuse_backward));
}

}  // namespace safnet::cuda
