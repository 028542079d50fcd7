// fused_fuse on the CPU. The forward keeps a run of pixels in the first-level cache and touches memory once for every
// input and output; the backward recomputes what it needs from the inputs, and writes only the gradients asked for.

#include "cpu/fusion.h"
#include "cpu/kernel.h"
#include "cpu/scatter.h"
#include "math/gradients.h"

namespace safnet {

struct FuseBackwardArguments : FuseInputs {
  View grad_out;
  // Gradients of the pixelwise inputs; no data where not needed.
  View grad_reference, grad_flow_short, grad_flow_long, grad_mask_short, grad_mask_long;
  View grad_reference_ldr, grad_weight_short, grad_weight_reference, grad_weight_long;
  // The gradient of one warped image at a time, by scatter.h.
  View grad_image;
  bool of_short;  // which one
  void* reach;    // see scatter.h
  int32_t bands;
};

SAFNET_DECLARE(fuse_rows, const FuseArguments&, int64_t, int64_t)
SAFNET_DECLARE(fuse_gradient_rows, const FuseBackwardArguments&, int64_t, int64_t)
SAFNET_DECLARE(fuse_reach_rows, const FuseBackwardArguments&, int64_t, int64_t)
SAFNET_DECLARE(fuse_image_gradient_bands, const FuseBackwardArguments&, int64_t, int64_t)

}  // namespace safnet

namespace safnet::SAFNET_ISA {
namespace {

template <class R>
void fuse(const FuseArguments& a, int64_t begin, int64_t end) {
  fuse_rows_after<R>(a, begin, end, [](const Run&) {});
}

// Derivatives of the loss with respect to the re-weighted weights of one channel of a run.
template <class R>
struct WeightGradients {
  R by_short[kChunk], by_reference[kChunk], by_long[kChunk];
};

// Sums over channels of what flows and masks receive.
template <class R>
struct GeometryGradients {
  R short_x[kChunk], short_y[kChunk], long_x[kChunk], long_y[kChunk], mask_short[kChunk], mask_long[kChunk];
};

template <class R>
void store_if_needed(const R* values, const View& gradient, const Run& run, int64_t c) {
  if (gradient.data != nullptr) store_run(values, gradient, run, c);
}

template <class R>
void store_base_weight_gradients(const FuseBackwardArguments& a, const Run& run, int64_t c, const R* z,
                                 const R* mask_short, const R* mask_long, const WeightGradients<R>& w) {
  if (z == nullptr && a.grad_weight_short.data == nullptr && a.grad_weight_reference.data == nullptr &&
      a.grad_weight_long.data == nullptr)
    return;
  R base_short[kChunk], base_long[kChunk], grad_z[kChunk];
  for (int i = 0; i < run.count; ++i) {
    base_short[i] = lerp(w.by_reference[i], w.by_short[i], mask_short[i]);
    base_long[i] = lerp(w.by_reference[i], w.by_long[i], mask_long[i]);
  }
  if (z != nullptr) {
    for (int i = 0; i < run.count; ++i)
      grad_z[i] = triangle_weights_backward(z[i], Weights<R>{base_short[i], w.by_reference[i], base_long[i]});
    store_run(grad_z, a.grad_reference_ldr, run, c);
  }
  store_if_needed(base_short, a.grad_weight_short, run, c);
  store_if_needed(w.by_reference, a.grad_weight_reference, run, c);
  store_if_needed(base_long, a.grad_weight_long, run, c);
}

template <class R>
void store_mask_gradient(const View& gradient, const Run& run, R* values, const R* mask, bool logits) {
  if (logits)
    for (int i = 0; i < run.count; ++i) values[i] *= mask[i] * (1 - mask[i]);
  store_if_needed(values, gradient, run, 0);
}

// Samples of one warped image and their derivatives with respect to the position.
template <class R>
struct Samples {
  R value[kChunk], x[kChunk], y[kChunk];
};

// Pixels of a run where a flow or a mask is NaN: the result is NaN there whatever the inputs, and passes no gradient
// on.
struct Lost {
  int32_t at[kChunk];
  bool any;

  template <class R>
  void find(const FuseInputs& a, const Run& run) {
    R buffers[6][kChunk];
    const R *short_x = read_run(a.flow_short, run, 0, buffers[0]),
            *short_y = read_run(a.flow_short, run, 1, buffers[1]);
    const R *long_x = read_run(a.flow_long, run, 0, buffers[2]), *long_y = read_run(a.flow_long, run, 1, buffers[3]);
    const R* mask_short = read_run(a.mask_short, run, 0, buffers[4]);
    const R* mask_long = read_run(a.mask_long, run, 0, buffers[5]);
    int32_t found = 0;
    for (int i = 0; i < run.count; ++i) {
      at[i] = is_nan(short_x[i]) | is_nan(short_y[i]) | is_nan(long_x[i]) | is_nan(long_y[i]) | is_nan(mask_short[i]) |
              is_nan(mask_long[i]);
      found |= at[i];
    }
    any = found != 0;
  }

  template <class R>
  void clear(R* values, int count) const {
    for (int i = 0; i < count; ++i) values[i] = at[i] ? R(0) : values[i];
  }

  // The values, copied into `buffer` if any of them is lost.
  template <class R>
  const R* cleared(const R* values, R* buffer, int count) const {
    if (!any) return values;
    for (int i = 0; i < count; ++i) buffer[i] = at[i] ? R(0) : values[i];
    return buffer;
  }

  template <class R>
  void clear(Samples<R>& samples, int count) const {
    if (!any) return;
    clear(samples.value, count);
    clear(samples.x, count);
    clear(samples.y, count);
  }
};

template <class R, class Base>
void fuse_value_gradients(int count, Base base, const R* __restrict mask_short, const R* __restrict mask_long,
                          const R* __restrict grad, const R* __restrict v_reference,
                          const Samples<R>& __restrict of_short, const Samples<R>& __restrict of_long,
                          WeightGradients<R>& __restrict w, GeometryGradients<R>& __restrict sums,
                          R* __restrict grad_reference) {
  for (int i = 0; i < count; ++i) {
    const R v_short = of_short.value[i], v_long = of_long.value[i];
    const Weights<R> given = base[i], weights = reweight(given, mask_short[i], mask_long[i]);
    const R scaled = grad[i] * inverse_sum(weights);
    const R fused = weighted_mean(weights, v_short, v_reference[i], v_long);
    const R by_short = scaled * (v_short - fused), by_long = scaled * (v_long - fused);
    const R by_reference = scaled * (v_reference[i] - fused);
    w.by_short[i] = by_short, w.by_reference[i] = by_reference, w.by_long[i] = by_long;
    sums.mask_short[i] += given.short_ * (by_short - by_reference);
    sums.mask_long[i] += given.long_ * (by_long - by_reference);
    sums.short_x[i] += scaled * weights.short_ * of_short.x[i];
    sums.short_y[i] += scaled * weights.short_ * of_short.y[i];
    sums.long_x[i] += scaled * weights.long_ * of_long.x[i];
    sums.long_y[i] += scaled * weights.long_ * of_long.y[i];
    grad_reference[i] = scaled * weights.reference;
  }
}

template <class R, class Offset>
void fuse_gradient_runs(const FuseBackwardArguments& a, int64_t begin, int64_t end) {
  const Grid<Offset> grid_short(a.short_), grid_long(a.long_);
  Aligned<R, Offset> aligned;
  WeightGradients<R> w;
  Samples<R> of_short, of_long;
  Lost lost;
  R reference[kChunk], incoming[kChunk], grad_reference[kChunk], z[kChunk];
  each_run(a.short_, begin, end, [&](const Run& run) {
    align(a, grid_short, grid_long, run, aligned);
    lost.find<R>(a, run);
    aligned.mask_short = lost.cleared(aligned.mask_short, aligned.buffer_short, run.count);
    aligned.mask_long = lost.cleared(aligned.mask_long, aligned.buffer_long, run.count);
    GeometryGradients<R> sums{};
    for (int64_t c = 0; c < a.short_.size[1]; ++c) {
      sample_with_slopes(a.short_, run.n, c, grid_short, aligned.cells_short, run.count, of_short.value, of_short.x,
                         of_short.y);
      sample_with_slopes(a.long_, run.n, c, grid_long, aligned.cells_long, run.count, of_long.value, of_long.x,
                         of_long.y);
      lost.clear(of_short, run.count);
      lost.clear(of_long, run.count);
      const R* v_reference = read_run(a.reference, run, c, reference);
      const R* grad = lost.cleared(read_run(a.grad_out, run, c, incoming), incoming, run.count);
      with_base<R>(a, run, c, [&](auto base) {
        fuse_value_gradients(run.count, base, aligned.mask_short, aligned.mask_long, grad, v_reference, of_short,
                             of_long, w, sums, grad_reference);
      });
      store_if_needed(grad_reference, a.grad_reference, run, c);
      const R* ldr = a.grad_reference_ldr.data != nullptr ? read_run(a.reference_ldr, run, c, z) : nullptr;
      store_base_weight_gradients(a, run, c, ldr, aligned.mask_short, aligned.mask_long, w);
    }
    store_flow_gradient(a.short_, a.flow_short, a.grad_flow_short, run, sums.short_x, sums.short_y);
    store_flow_gradient(a.long_, a.flow_long, a.grad_flow_long, run, sums.long_x, sums.long_y);
    store_mask_gradient(a.grad_mask_short, run, sums.mask_short, aligned.mask_short, a.mask_logits);
    store_mask_gradient(a.grad_mask_long, run, sums.mask_long, aligned.mask_long, a.mask_logits);
  });
}

template <class R>
void fuse_gradient(const FuseBackwardArguments& a, int64_t begin, int64_t end) {
  (needs_64bit_offsets(a) ? fuse_gradient_runs<R, int64_t> : fuse_gradient_runs<R, int32_t>)(a, begin, end);
}

const View& scattered_flow(const FuseBackwardArguments& a) { return a.of_short ? a.flow_short : a.flow_long; }

template <class R>
void reach_rows(const FuseBackwardArguments& a, int64_t begin, int64_t end) {
  note_reach<R>(scattered_flow(a), begin, end, static_cast<Reach*>(a.reach));
}

// Gradients of the samples of one warped image: the incoming gradient times that image's share of the mean.
template <class R>
void sample_gradients(const FuseBackwardArguments& a, const Run& run, R* samples) {
  R buffer_short[kChunk], buffer_long[kChunk], buffer[kChunk];
  const R* mask_short = read_mask(a.mask_short, run, a.mask_logits, buffer_short);
  const R* mask_long = read_mask(a.mask_long, run, a.mask_logits, buffer_long);
  Lost lost;
  lost.find<R>(a, run);
  for (int64_t c = 0; c < a.short_.size[1]; ++c, samples += kChunk) {
    const R* grad = read_run(a.grad_out, run, c, buffer);
    with_base<R>(a, run, c, [&](auto base) {
      for (int i = 0; i < run.count; ++i) {
        const Weights<R> w = reweight(base[i], mask_short[i], mask_long[i]);
        samples[i] = grad[i] * inverse_sum(w) * (a.of_short ? w.short_ : w.long_);
      }
    });
    if (lost.any) lost.clear(samples, run.count);
  }
}

template <class R>
void image_gradient(const FuseBackwardArguments& a, int64_t begin, int64_t end) {
  scatter_bands<R>(a.grad_image, scattered_flow(a), static_cast<const Reach*>(a.reach), a.bands, begin, end,
                   [&](const Run& run, R* samples) { sample_gradients(a, run, samples); });
}

}  // namespace

void fuse_rows(const FuseArguments& a, int64_t begin, int64_t end) { SAFNET_DISPATCH(a.short_, fuse, a, begin, end); }
void fuse_gradient_rows(const FuseBackwardArguments& a, int64_t begin, int64_t end) {
  SAFNET_DISPATCH(a.short_, fuse_gradient, a, begin, end);
}
void fuse_reach_rows(const FuseBackwardArguments& a, int64_t begin, int64_t end) {
  SAFNET_DISPATCH(a.short_, reach_rows, a, begin, end);
}
void fuse_image_gradient_bands(const FuseBackwardArguments& a, int64_t begin, int64_t end) {
  SAFNET_DISPATCH(a.short_, image_gradient, a, begin, end);
}

}  // namespace safnet::SAFNET_ISA

#if SAFNET_HOST

#include "cpu/tensors.h"

namespace safnet {
namespace {

using OptionalTensor = std::optional<Tensor>;

void set_inputs(FuseInputs& a, const Tensor& short_, const Tensor& reference, const Tensor& long_,
                const Tensor& flow_short, const Tensor& flow_long, const Tensor& mask_short, const Tensor& mask_long,
                const OptionalTensor& reference_ldr, const OptionalTensor& weight_short,
                const OptionalTensor& weight_reference, const OptionalTensor& weight_long, bool mask_logits) {
  a.short_ = view(short_), a.reference = view(reference), a.long_ = view(long_);
  a.flow_short = view(flow_short), a.flow_long = view(flow_long);
  a.mask_short = view(mask_short), a.mask_long = view(mask_long);
  a.reference_ldr = view(reference_ldr);
  a.weight_short = view(weight_short), a.weight_reference = view(weight_reference), a.weight_long = view(weight_long);
  a.mask_logits = mask_logits;
}

Tensor fused_fuse(Tensor short_, Tensor reference, Tensor long_, Tensor flow_short, Tensor flow_long, Tensor mask_short,
                  Tensor mask_long, OptionalTensor reference_ldr, OptionalTensor weight_short,
                  OptionalTensor weight_reference, OptionalTensor weight_long, bool mask_logits) {
  Tensor out = empty_image(short_);
  FuseArguments a{};
  set_inputs(a, short_, reference, long_, flow_short, flow_long, mask_short, mask_long, reference_ldr, weight_short,
             weight_reference, weight_long, mask_logits);
  a.out = view(out);
  for_rows(a.out, SAFNET_KERNEL(fuse_rows), a);
  return out;
}

// Gradients of the eleven tensors in the order of the arguments. Always deterministic: see scatter.h.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fused_fuse_backward(
    Tensor grad_out, Tensor short_, Tensor reference, Tensor long_, Tensor flow_short, Tensor flow_long,
    Tensor mask_short, Tensor mask_long, OptionalTensor reference_ldr, OptionalTensor weight_short,
    OptionalTensor weight_reference, OptionalTensor weight_long, bool mask_logits, int64_t needs,
    bool /*deterministic*/) {
  FuseBackwardArguments a{};
  set_inputs(a, short_, reference, long_, flow_short, flow_long, mask_short, mask_long, reference_ldr, weight_short,
             weight_reference, weight_long, mask_logits);
  a.grad_out = view(grad_out);

  bool any_pixelwise = false;
  const auto pixelwise = [&](FuseInput input, const OptionalTensor& model, View& target) {
    const bool needed = model && is_needed(needs, input);
    Tensor gradient = model ? empty_gradient(*model, needed) : empty({0}, grad_out.scalar_type());
    if (needed) target = view(gradient), any_pixelwise = true;
    return gradient;
  };
  Tensor grad_reference = pixelwise(FuseInput::kReference, reference, a.grad_reference);
  Tensor grad_flow_short = pixelwise(FuseInput::kFlowShort, flow_short, a.grad_flow_short);
  Tensor grad_flow_long = pixelwise(FuseInput::kFlowLong, flow_long, a.grad_flow_long);
  Tensor grad_mask_short = pixelwise(FuseInput::kMaskShort, mask_short, a.grad_mask_short);
  Tensor grad_mask_long = pixelwise(FuseInput::kMaskLong, mask_long, a.grad_mask_long);
  Tensor grad_reference_ldr = pixelwise(FuseInput::kReferenceLdr, reference_ldr, a.grad_reference_ldr);
  Tensor grad_weight_short = pixelwise(FuseInput::kWeightShort, weight_short, a.grad_weight_short);
  Tensor grad_weight_reference = pixelwise(FuseInput::kWeightReference, weight_reference, a.grad_weight_reference);
  Tensor grad_weight_long = pixelwise(FuseInput::kWeightLong, weight_long, a.grad_weight_long);
  if (any_pixelwise) for_rows(a.short_, SAFNET_KERNEL(fuse_gradient_rows), a);

  const auto scattered = [&](FuseInput input, const Tensor& image) {
    const bool needed = is_needed(needs, input);
    Tensor gradient = zero_gradient(image, needed);
    if (needed) {
      a.grad_image = view(gradient), a.of_short = input == FuseInput::kShort;
      scatter(a.short_, SAFNET_KERNEL(fuse_reach_rows), SAFNET_KERNEL(fuse_image_gradient_bands), a);
    }
    return gradient;
  };
  Tensor grad_short = scattered(FuseInput::kShort, short_), grad_long = scattered(FuseInput::kLong, long_);
  return {grad_short,        grad_reference,        grad_long,       grad_flow_short,
          grad_flow_long,    grad_mask_short,       grad_mask_long,  grad_reference_ldr,
          grad_weight_short, grad_weight_reference, grad_weight_long};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safnet_ops, CPU, m) {
  m.impl("fused_fuse", TORCH_BOX(&fused_fuse));
  m.impl("fused_fuse_backward", TORCH_BOX(&fused_fuse_backward));
}

}  // namespace safnet

#endif  // SAFNET_HOST
