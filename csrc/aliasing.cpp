#include "aliasing.h"

#include <algorithm>

namespace fusedclip {
namespace {

uintptr_t Begin(const GradSpan& span) { return reinterpret_cast<uintptr_t>(span.data); }

uintptr_t End(const GradSpan& span) { return Begin(span) + span.numel * ItemSize(span.dtype); }

bool Equal(const GradSpan& a, const GradSpan& b) {
  return a.data == b.data && a.numel == b.numel && a.dtype == b.dtype;
}

// The common case, without a sort: each gradient lies above the one before, or each below.
bool IsMonotonic(const std::vector<GradSpan>& spans) {
  bool ascending = true;
  bool descending = true;
  uintptr_t highest = 0;
  uintptr_t lowest = UINTPTR_MAX;
  for (const GradSpan& span : spans) {
    if (span.numel == 0) continue;
    ascending &= Begin(span) >= highest;
    descending &= End(span) <= lowest;
    if (!ascending && !descending) return false;
    highest = End(span);
    lowest = Begin(span);
  }
  return true;
}

}  // namespace

SharedMemory FindSharedMemory(const std::vector<GradSpan>& spans) {
  SharedMemory result;
  if (IsMonotonic(spans)) return result;

  struct Range {
    uintptr_t begin;
    int64_t position;
  };
  std::vector<Range> ranges;
  ranges.reserve(spans.size());
  for (size_t i = 0; i < spans.size(); ++i) {
    if (spans[i].numel > 0) ranges.push_back({Begin(spans[i]), static_cast<int64_t>(i)});
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.position < b.position;
  });
  int64_t kept = -1;
  for (const Range& range : ranges) {
    const GradSpan& span = spans[range.position];
    if (kept >= 0 && range.begin < End(spans[kept])) {
      if (!Equal(spans[kept], span)) {
        result.overlap[0] = std::min(kept, range.position);
        result.overlap[1] = std::max(kept, range.position);
        result.overlap_bytes = std::min(End(spans[kept]), End(span)) - range.begin;
        return result;
      }
      result.duplicates.push_back(range.position);
    } else {
      kept = range.position;
    }
  }
  std::sort(result.duplicates.begin(), result.duplicates.end());
  return result;
}

}  // namespace fusedclip
