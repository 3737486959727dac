#ifndef FUSEDCLIP_EMULATOR_COOPERATIVE_GROUPS_H_
#define FUSEDCLIP_EMULATOR_COOPERATIVE_GROUPS_H_

#include "cuda_runtime.h"

namespace cooperative_groups {

struct grid_group {
  void sync() const { emulator::SyncGrid(); }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups

#endif  // FUSEDCLIP_EMULATOR_COOPERATIVE_GROUPS_H_
