// The explicit fusion of a run of pixels, shared by fused_fuse and upsample_fuse.
#pragma once

#include "cpu/sampling.h"
#include "math/fusion.h"

namespace safnet {

struct FuseInputs {
  View short_, reference, long_, flow_short, flow_long, mask_short, mask_long;
  View reference_ldr, weight_short, weight_reference, weight_long;  // either the first, or the other three
  bool mask_logits = false;
};

struct FuseArguments : FuseInputs {
  View out;
};

}  // namespace safnet

namespace safnet::SAFNET_ISA {
namespace {

// What all channels of a run share.
template <class R, class Offset>
struct Aligned {
  Cells<R, Offset> cells_short, cells_long;
  const R *mask_short, *mask_long;
  R buffer_short[kChunk], buffer_long[kChunk];
};

template <class R>
const R* read_mask(const View& mask, const Run& run, bool logits, R* buffer) {
  const R* values = read_run(mask, run, 0, buffer);
  if (!logits) return values;
  for (int i = 0; i < run.count; ++i) buffer[i] = sigmoid(values[i]);
  return buffer;
}

template <class R, class Offset>
void align(const FuseInputs& a, const Grid<Offset>& grid_short, const Grid<Offset>& grid_long, const Run& run,
           Aligned<R, Offset>& aligned) {
  locate(grid_short, a.flow_short, run, aligned.cells_short);
  locate(grid_long, a.flow_long, run, aligned.cells_long);
  aligned.mask_short = read_mask(a.mask_short, run, a.mask_logits, aligned.buffer_short);
  aligned.mask_long = read_mask(a.mask_long, run, a.mask_logits, aligned.buffer_long);
}

// Base weights of one channel of a run: from the reference's LDR value, or given.
template <class R>
struct TriangleBase {
  const R* __restrict z;
  SAFNET_INLINE Weights<R> operator[](int i) const { return triangle_weights(z[i]); }
};
template <class R>
struct GivenBase {
  const R* __restrict short_;
  const R* __restrict reference;
  const R* __restrict long_;
  SAFNET_INLINE Weights<R> operator[](int i) const { return {short_[i], reference[i], long_[i]}; }
};

// Calls use(base) with the base weights of one channel of a run.
template <class R, class Use>
SAFNET_INLINE void with_base(const FuseInputs& a, const Run& run, int64_t c, Use use) {
  R first[kChunk];
  if (a.reference_ldr.data != nullptr) return use(TriangleBase<R>{read_run(a.reference_ldr, run, c, first)});
  R second[kChunk], third[kChunk];
  use(GivenBase<R>{read_run(a.weight_short, run, c, first), read_run(a.weight_reference, run, c, second),
                   read_run(a.weight_long, run, c, third)});
}

template <class R, class Base>
void fuse_values(int count, Base base, const R* __restrict mask_short, const R* __restrict mask_long,
                 const R* __restrict v_short, const R* __restrict v_reference, const R* __restrict v_long,
                 R* __restrict fused) {
  for (int i = 0; i < count; ++i)
    fused[i] = weighted_mean(reweight(base[i], mask_short[i], mask_long[i]), v_short[i], v_reference[i], v_long[i]);
}

// Calls prepare(run) for every run of rows [begin, end), then fuses it.
template <class R, class Offset, class Prepare>
void fuse_runs(const FuseArguments& a, int64_t begin, int64_t end, Prepare prepare) {
  const Grid<Offset> grid_short(a.short_), grid_long(a.long_);
  Aligned<R, Offset> aligned;
  R v_short[kChunk], v_long[kChunk], reference[kChunk], fused[kChunk];
  each_run(a.short_, begin, end, [&](const Run& run) {
    prepare(run);
    align(a, grid_short, grid_long, run, aligned);
    for (int64_t c = 0; c < a.short_.size[1]; ++c) {
      sample(a.short_, run.n, c, grid_short, aligned.cells_short, run.count, v_short);
      sample(a.long_, run.n, c, grid_long, aligned.cells_long, run.count, v_long);
      const R* v_reference = read_run(a.reference, run, c, reference);
      with_base<R>(a, run, c, [&](auto base) {
        write_run(a.out, run, c, fused, [&](R* out) {
          fuse_values(run.count, base, aligned.mask_short, aligned.mask_long, v_short, v_reference, v_long, out);
        });
      });
    }
  });
}

bool needs_64bit_offsets(const FuseInputs& a) { return needs_64bit_offsets(a.short_) || needs_64bit_offsets(a.long_); }

template <class R, class Prepare>
void fuse_rows_after(const FuseArguments& a, int64_t begin, int64_t end, Prepare prepare) {
  if (needs_64bit_offsets(a)) fuse_runs<R, int64_t>(a, begin, end, prepare);
  else fuse_runs<R, int32_t>(a, begin, end, prepare);
}

}  // namespace
}  // namespace safnet::SAFNET_ISA
