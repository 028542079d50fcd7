// What libsafnet_ops, the shared library of the CPU kernels, offers beside the operators that loading it registers.
#pragma once

#define SAFNET_EXPORT __attribute__((visibility("default")))

// Whether the compiler has the matrix unit's instructions, and the system a way to ask for its registers.
#if defined(SAFNET_X86_VARIANTS) && defined(__linux__) && defined(__clang__)
#define SAFNET_KNOWS_AMX (__clang_major__ >= 12)
#elif defined(SAFNET_X86_VARIANTS) && defined(__linux__)
#define SAFNET_KNOWS_AMX (__GNUC__ >= 11)
#else
#define SAFNET_KNOWS_AMX 0
#endif

namespace safnet {

// kAmx: the kernels of kAvx512, of which some use the matrix unit, too.
enum class InstructionSet { kBaseline, kAvx2, kAvx512, kAmx };

// The best one of this processor; SAFNET_OPS_ISA=baseline|avx2|avx512|amx in the environment lowers it.
SAFNET_EXPORT InstructionSet instruction_set();

// Tests force 64-bit offsets on tensors that do not need them.
SAFNET_EXPORT bool force_64bit_offsets();
SAFNET_EXPORT void force_64bit_offsets(bool on);

}  // namespace safnet
