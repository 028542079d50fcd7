// What libsafnet_ops, the shared library of the CPU kernels, offers beside the operators that loading it registers.
#pragma once

#define SAFNET_EXPORT __attribute__((visibility("default")))

namespace safnet {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

// The best one of this processor; SAFNET_OPS_ISA=baseline|avx2|avx512 in the environment lowers it.
SAFNET_EXPORT InstructionSet instruction_set();

// Tests force 64-bit offsets on tensors that do not need them.
SAFNET_EXPORT bool force_64bit_offsets();
SAFNET_EXPORT void force_64bit_offsets(bool on);

}  // namespace safnet
