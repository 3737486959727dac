// Which instruction set to use: the best one that both this build and this processor have.

#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fusedclip::cpu {
namespace {

bool ProcessorHasAvx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

bool ProcessorHasAvx512() {
#if defined(__x86_64__)
  return ProcessorHasAvx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

Isa Pick() {
  const Isa candidates[] = {
      {"avx512", ProcessorHasAvx512() ? Avx512Kernels() : nullptr},
      {"avx2", ProcessorHasAvx2() ? Avx2Kernels() : nullptr},
      {"baseline", BaselineKernels()},
  };
  const char* wanted = std::getenv("FUSEDCLIP_CPU_ISA");
  if (wanted != nullptr && *wanted == '\0') wanted = nullptr;
  std::string available;
  for (const Isa& isa : candidates) {
    if (isa.kernels == nullptr) continue;
    if (wanted == nullptr || wanted == std::string(isa.name)) return isa;
    available += (available.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("FUSEDCLIP_CPU_ISA: expected one of " + available +
                              " (what this build and this processor have), got " + wanted);
}

}  // namespace

const Isa& CurrentIsa() {
  static const Isa isa = Pick();
  return isa;
}

const char* InstructionSet() { return CurrentIsa().name; }

}  // namespace fusedclip::cpu
