// The Python module safnet_ops._C: how libsafnet_ops was built and what it runs, for reports and tests.

#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <cstdint>
#include <memory>
#include <utility>

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

// Memory of a workspace that somebody else's tensor lies in.
class Memory {
 public:
  Memory(std::shared_ptr<safnet::Workspace> workspace, const safnet::Workspace::Part& part)
      : workspace_(std::move(workspace)), part_(part) {}
  Memory(const Memory&) = delete;
  ~Memory() { workspace_->give_back(part_); }

  pybind11::buffer_info info() const {
    return {static_cast<uint8_t*>(part_.memory), static_cast<pybind11::ssize_t>(part_.bytes)};
  }

 private:
  std::shared_ptr<safnet::Workspace> workspace_;
  safnet::Workspace::Part part_;
};

// Null where the calling thread has no workspace, or `bytes` are better taken elsewhere.
std::unique_ptr<Memory> take_memory(size_t bytes) {
  std::shared_ptr<safnet::Workspace> workspace = bytes < safnet::kFresh ? nullptr : safnet::current_workspace();
  if (workspace == nullptr) return nullptr;
  const safnet::Workspace::Part part = workspace->take(bytes);
  if (part.memory == nullptr) return nullptr;
  return std::make_unique<Memory>(std::move(workspace), part);
}

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
  pybind11::class_<Memory>(m, "Memory", pybind11::buffer_protocol(), "Memory of a workspace, as a buffer of bytes.")
      .def_buffer(&Memory::info);
  m.def("take_memory", &take_memory, pybind11::arg("bytes"),
        "At least so many bytes of the thread's workspace; None where it has none, or they are few.");
}
