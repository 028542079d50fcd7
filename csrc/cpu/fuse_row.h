// The explicit fusion of a run of pixels, shared by fused_fuse and upsample_fuse.
#pragma once

#include "cpu/sampling.h"
#include "math/fusion.h"

namespace safnet {

struct FuseArguments {
  View short_, reference, long_, flow_short, flow_long, mask_short, mask_long;
  View ldr, weight_short, weight_reference, weight_long;  // either the first, or the other three
  View out;                                               // the backward reads the gradient of the result from here
  bool mask_logits = false;
};

}  // namespace safnet

namespace safnet::SAFNET_ISA {
namespace {

// What all channels of a run share.
template <class R, class Offset>
struct Aligned {
  Cells<R, Offset> cells_short, cells_long;
  R mask_short[kChunk], mask_long[kChunk];
};

template <class R>
void load_mask(const View& mask, const Run& run, bool logits, R* out) {
  load_run(mask, run, 0, out);
  if (logits)
    for (int i = 0; i < run.count; ++i) out[i] = sigmoid(out[i]);
}

template <class R, class Offset>
void align(const FuseArguments& a, const Grid<Offset>& grid_short, const Grid<Offset>& grid_long, const Run& run,
           Aligned<R, Offset>& aligned) {
  locate(grid_short, a.flow_short, run, aligned.cells_short);
  locate(grid_long, a.flow_long, run, aligned.cells_long);
  load_mask(a.mask_short, run, a.mask_logits, aligned.mask_short);
  load_mask(a.mask_long, run, a.mask_logits, aligned.mask_long);
}

// Base weights of one channel of a run.
template <class R>
struct BaseWeights {
  R a[kChunk], b[kChunk], c[kChunk];
  R z[kChunk];  // the reference's LDR value, where the weights come from it

  SAFNET_INLINE Weights<R> operator[](int i) const { return {a[i], b[i], c[i]}; }
};

template <class R>
void load_base_weights(const FuseArguments& arguments, const Run& run, int64_t c, BaseWeights<R>& base) {
  if (arguments.ldr.data != nullptr) {
    load_run(arguments.ldr, run, c, base.z);
    for (int i = 0; i < run.count; ++i) {
      const Weights<R> w = triangle_weights(base.z[i]);
      base.a[i] = w.a, base.b[i] = w.b, base.c[i] = w.c;
    }
  } else {
    load_run(arguments.weight_short, run, c, base.a);
    load_run(arguments.weight_reference, run, c, base.b);
    load_run(arguments.weight_long, run, c, base.c);
  }
}

template <class R, class Offset>
void fuse_row(const FuseArguments& a, int64_t n, int32_t y) {
  const Grid<Offset> grid_short(a.short_), grid_long(a.long_);
  Aligned<R, Offset> aligned;
  BaseWeights<R> base;
  R v_short[kChunk], v_reference[kChunk], v_long[kChunk], fused[kChunk];
  each_run(a.short_, n, y, [&](const Run& run) {
    align(a, grid_short, grid_long, run, aligned);
    for (int64_t c = 0; c < a.short_.size[1]; ++c) {
      load_base_weights(a, run, c, base);
      load_run(a.reference, run, c, v_reference);
      sample(a.short_, n, c, grid_short, aligned.cells_short, run.count, v_short);
      sample(a.long_, n, c, grid_long, aligned.cells_long, run.count, v_long);
      for (int i = 0; i < run.count; ++i) {
        const Weights<R> w = reweight(base[i], aligned.mask_short[i], aligned.mask_long[i]);
        fused[i] = weighted_mean(w, v_short[i], v_reference[i], v_long[i]);
      }
      store_run(fused, a.out, run, c);
    }
  });
}

bool needs_64bit_offsets(const FuseArguments& a) {
  return needs_64bit_offsets(a.short_) || needs_64bit_offsets(a.long_);
}

}  // namespace
}  // namespace safnet::SAFNET_ISA
