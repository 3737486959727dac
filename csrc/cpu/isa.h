// The instruction set that was picked, once per process.

#ifndef FUSEDCLIP_CPU_ISA_H_
#define FUSEDCLIP_CPU_ISA_H_

#include "cpu/kernel_table.h"

namespace fusedclip::cpu {

struct Isa {
  const char* name;
  const KernelTable* kernels;
};

// Throws std::invalid_argument when FUSEDCLIP_CPU_ISA names one that cannot be had.
const Isa& CurrentIsa();

}  // namespace fusedclip::cpu

#endif  // FUSEDCLIP_CPU_ISA_H_
