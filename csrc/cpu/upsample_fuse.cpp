// upsample_fuse on the CPU: a run of flows and masks is resized into the outputs and fused while it is still in the
// cache.

#include "cpu/fusion.h"
#include "cpu/kernel.h"

namespace safnet {

struct UpsampleArguments : FuseArguments {  // whose flows and masks are the full-size outputs
  View low_flow_short, low_flow_long, low_mask_short, low_mask_long;
};

SAFNET_DECLARE(upsample_fuse_rows, const UpsampleArguments&, int64_t, int64_t)

}  // namespace safnet

namespace safnet::SAFNET_ISA {
namespace {

// Resizes a run of one channel; `factor` rescales flows.
template <class T, class R>
void resize_elements(const View& low, const View& out, const Run& run, int64_t c, R factor, R* __restrict target) {
  const auto low_height = static_cast<int32_t>(low.size[2]), low_width = static_cast<int32_t>(low.size[3]);
  const R scale_y = static_cast<R>(low.size[2]) / static_cast<R>(out.size[2]);
  const R scale_x = static_cast<R>(low.size[3]) / static_cast<R>(out.size[3]);
  const auto vertical = resize_axis(run.y, scale_y, low_height);
  const T *upper = row<T>(low, run.n, c, vertical.index), *lower = row<T>(low, run.n, c, vertical.next);
  const auto stride = static_cast<int32_t>(low.stride[3]);
  for (int i = 0; i < run.count; ++i) {
    const auto horizontal = resize_axis(run.x + i, scale_x, low_width);
    const int32_t left = horizontal.index * stride, right = horizontal.next * stride;
    target[i] = factor * bilinear(load(upper[left]), load(upper[right]), load(lower[left]), load(lower[right]),
                                  horizontal.fraction, vertical.fraction);
  }
}

template <class R>
void resize_run(const View& low, const View& out, const Run& run, int64_t c, R factor) {
  R* target = at<R>(out, run, c);
  if constexpr (sizeof(R) == sizeof(double)) {
    resize_elements<double>(low, out, run, c, factor, target);
  } else {
    if (low.type == Type::kFloat32) resize_elements<float>(low, out, run, c, factor, target);
    else if (low.type == Type::kFloat16) resize_elements<Half>(low, out, run, c, factor, target);
    else resize_elements<BFloat16>(low, out, run, c, factor, target);
  }
}

template <class R>
void resize_mask_run(const View& low, const View& out, const Run& run) {
  resize_run(low, out, run, 0, R(1));
  R* mask = at<R>(out, run, 0);
  for (int i = 0; i < run.count; ++i) mask[i] = sigmoid(mask[i]);
}

template <class R>
void resize_flow_run(const View& low, const View& out, const Run& run) {
  resize_run(low, out, run, 0, static_cast<R>(out.size[3]) / static_cast<R>(low.size[3]));
  resize_run(low, out, run, 1, static_cast<R>(out.size[2]) / static_cast<R>(low.size[2]));
}

template <class R>
void upsample_fuse(const UpsampleArguments& a, int64_t begin, int64_t end) {
  fuse_rows_after<R>(a, begin, end, [&](const Run& run) {
    resize_flow_run<R>(a.low_flow_short, a.flow_short, run);
    resize_flow_run<R>(a.low_flow_long, a.flow_long, run);
    resize_mask_run<R>(a.low_mask_short, a.mask_short, run);
    resize_mask_run<R>(a.low_mask_long, a.mask_long, run);
  });
}

}  // namespace

void upsample_fuse_rows(const UpsampleArguments& a, int64_t begin, int64_t end) {
  SAFNET_DISPATCH(a.short_, upsample_fuse, a, begin, end);
}

}  // namespace safnet::SAFNET_ISA

#if SAFNET_HOST

#include "cpu/tensors.h"

namespace safnet {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> upsample_fuse(Tensor short_, Tensor reference, Tensor long_,
                                                                 Tensor flow_short, Tensor flow_long, Tensor mask_short,
                                                                 Tensor mask_long, Tensor reference_ldr) {
  const auto type = short_.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto full = [&](int64_t channels) {
    return empty({short_.size(0), channels, short_.size(2), short_.size(3)}, type);
  };
  Tensor out = empty_image(short_);
  Tensor out_flow_short = full(2), out_flow_long = full(2), out_mask_short = full(1), out_mask_long = full(1);
  UpsampleArguments a{};
  a.short_ = view(short_), a.reference = view(reference), a.long_ = view(long_), a.reference_ldr = view(reference_ldr),
  a.out = view(out);
  a.low_flow_short = view(flow_short), a.low_flow_long = view(flow_long);
  a.low_mask_short = view(mask_short), a.low_mask_long = view(mask_long);
  a.flow_short = view(out_flow_short), a.flow_long = view(out_flow_long);
  a.mask_short = view(out_mask_short), a.mask_long = view(out_mask_long);
  for_rows(a.out, SAFNET_KERNEL(upsample_fuse_rows), a);
  return {out, out_flow_short, out_flow_long, out_mask_short, out_mask_long};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safnet_ops, CPU, m) { m.impl("upsample_fuse", TORCH_BOX(&upsample_fuse)); }

}  // namespace safnet

#endif  // SAFNET_HOST
