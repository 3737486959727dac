// Which gradients of a list share memory.

#ifndef FUSEDCLIP_ALIASING_H_
#define FUSEDCLIP_ALIASING_H_

#include <cstdint>
#include <vector>

#include "clip.h"

namespace fusedclip {

struct SharedMemory {
  std::vector<int64_t> duplicates;  // positions of spans equal to an earlier one, ascending
  // The first pair found that overlaps but is not equal: no factor for it would be right.
  int64_t overlap[2] = {-1, -1};
  int64_t overlap_bytes = 0;
};

SharedMemory FindSharedMemory(const std::vector<GradSpan>& spans);

}  // namespace fusedclip

#endif  // FUSEDCLIP_ALIASING_H_
