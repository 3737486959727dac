// The threads of OpenMP's team, borrowed while they spin.
//
// For some milliseconds after each operation that torch ran on several threads, the others of the
// calling thread's team spin, in the hope of the next one: GOMP_SPINCOUNT iterations in GCC's
// runtime, KMP_BLOCKTIME in LLVM's. They hold the cores that a clip right after a backward needs; a
// thread of our own would get half of one and be interrupted in the middle of a share. So we do as
// torch does and open a parallel region, which starts in a microsecond. At the end of a region
// everybody waits for everybody: it is opened only when each of them has a core at this moment.

#ifndef FUSEDCLIP_CPU_SPINNING_TEAM_H_
#define FUSEDCLIP_CPU_SPINNING_TEAM_H_

#include "cpu/job.h"

namespace fusedclip::cpu {

// Works on the whole job with the calling thread's team of `threads` if it spins now; else false.
bool RunOnSpinningTeam(Job* job, int threads);

}  // namespace fusedclip::cpu

#endif  // FUSEDCLIP_CPU_SPINNING_TEAM_H_
