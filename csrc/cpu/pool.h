// Threads of our own, asleep between jobs.

#ifndef FUSEDCLIP_CPU_POOL_H_
#define FUSEDCLIP_CPU_POOL_H_

#include <memory>

#include "cpu/job.h"

namespace fusedclip::cpu {

// Works on the job, with as many of the pool's threads as come in time, and returns when it is
// done.
void RunOnPool(const std::shared_ptr<Job>& job);

}  // namespace fusedclip::cpu

#endif  // FUSEDCLIP_CPU_POOL_H_
