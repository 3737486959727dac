#include "cpu/team.h"

#include <memory>

#include "cpu/job.h"
#include "cpu/pool.h"

namespace fusedclip::cpu {

void RunOnTeam(const Shares& shares, RunShare run, const void* context) {
  if (shares.threads == 1) {
    const bool forward = shares.order == Order::kForward;
    for (int i = 0; i < shares.count; ++i) run(context, forward ? i : shares.count - 1 - i);
    return;
  }
  RunOnPool(std::make_shared<Job>(shares, run, context));
}

}  // namespace fusedclip::cpu
