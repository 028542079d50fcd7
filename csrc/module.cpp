// The Python module safnet_ops._C: importing it registers the CPU kernels; its functions tell how it was built.

#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <atomic>
#include <cstdlib>
#include <string>

#include "cpu/kernel.h"

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

const char* name(InstructionSet set) {
  return set == InstructionSet::kAvx512 ? "avx512" : set == InstructionSet::kAvx2 ? "avx2" : "baseline";
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = SAFNET_COMPILER;
  info["built_with_torch"] = TORCH_VERSION;
  info["oldest_torch"] = SAFNET_OLDEST_TORCH;
  info["instruction_sets"] = SAFNET_INSTRUCTION_SETS;
  info["flags"] = SAFNET_FLAGS;
  return info;
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet set = detect();
  return set;
}

bool force_64bit_offsets() { return forced_64bit.load(std::memory_order_relaxed); }

}  // namespace safnet

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of safnet_ops.";
  m.def("build_info", &safnet::build_info,
        "How this module was built: compiler, torch version, instruction sets, flags.");
  m.def(
      "instruction_set", [] { return safnet::name(safnet::instruction_set()); },
      "The instruction set whose kernels run on this processor.");
  m.def(
      "force_64bit_offsets", [](bool on) { safnet::forced_64bit = on; }, pybind11::arg("on"),
      "For tests: use 64-bit offsets even where 32 bits would do.");
}
