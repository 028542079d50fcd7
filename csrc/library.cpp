// libsafnet_ops: loading it defines the operators and registers their CPU kernels, in a program with Python or without.

#include "library.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>
#include <string>

namespace safnet {
namespace {

std::atomic<bool> forced_64bit{false};

InstructionSet detect() {
#if defined(SAFNET_X86_VARIANTS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const char* wish = std::getenv("SAFNET_OPS_ISA");
  const std::string limit = wish == nullptr ? "avx512" : wish;
  if (avx512 && limit == "avx512") return InstructionSet::kAvx512;
  if (avx2 && limit != "baseline") return InstructionSet::kAvx2;
#endif
  return InstructionSet::kBaseline;
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet set = detect();
  return set;
}

bool force_64bit_offsets() { return forced_64bit.load(std::memory_order_relaxed); }

void force_64bit_offsets(bool on) { forced_64bit = on; }

}  // namespace safnet

// The build takes the signatures from safnet_ops/schemas.txt.
STABLE_TORCH_LIBRARY(safnet_ops, m) {
  for (const char* schema : {SAFNET_SCHEMAS}) m.def(schema);
}
