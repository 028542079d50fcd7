// The Python module safnet_ops._C: how libsafnet_ops was built and what it runs, for reports and tests.

#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <memory>

#include "library.h"
#include "workspace.h"

namespace {

using safnet::InstructionSet;

const char* name(InstructionSet set) {
  switch (set) {
    case InstructionSet::kAmx: return "amx";
    case InstructionSet::kAvx512: return "avx512";
    case InstructionSet::kAvx2: return "avx2";
    default: return "baseline";
  }
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

struct Owner {
  std::shared_ptr<safnet::Workspace> workspace = std::make_shared<safnet::Workspace>();

  Owner() = default;
  Owner(const Owner&) = delete;
  ~Owner() { workspace->end(); }
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How the CPU kernels of safnet_ops were built.";
  m.def("build_info", &build_info, "How these kernels were built: compiler, torch version, instruction sets, flags.");
  m.def(
      "instruction_set", [] { return name(safnet::instruction_set()); },
      "The instruction set whose kernels run on this processor.");
  m.def(
      "force_64bit_offsets", [](bool on) { safnet::force_64bit_offsets(on); }, pybind11::arg("on"),
      "For tests: use 64-bit offsets even where 32 bits would do.");
  pybind11::class_<Owner>(m, "Workspace", "Memory that results hand on to each other, while this owner lives.")
      .def(pybind11::init<>())
      .def("enter", [](const Owner& owner) { safnet::enter(owner.workspace); })
      .def("bytes", [](const Owner& owner) { return owner.workspace->bytes(); });
  m.def("leave_workspace", &safnet::leave);
}
