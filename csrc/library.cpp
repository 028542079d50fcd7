// libsafnet_ops: loading it defines the operators and registers their CPU kernels, in a program with Python or without.

#include "library.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>
#include <string>

#if SAFNET_KNOWS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace safnet {
namespace {

std::atomic<bool> forced_64bit{false};

// Whether there is a matrix unit for bfloat16, and the system lets this process use its registers.
bool has_matrix_unit() {
#if SAFNET_KNOWS_AMX
  constexpr unsigned kAmxBFloat16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr int kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM and its number in Linux
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kAmxBFloat16) != 0 && (d & kAmxTile) != 0 &&
         syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

InstructionSet detect() {
#if defined(SAFNET_X86_VARIANTS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const char* wish = std::getenv("SAFNET_OPS_ISA");
  const std::string limit = wish == nullptr ? "amx" : wish;
  if (avx512 && limit == "amx" && has_matrix_unit()) return InstructionSet::kAmx;
  if (avx512 && (limit == "amx" || limit == "avx512")) return InstructionSet::kAvx512;
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
