// How a list of gradients is dealt to threads: chunks, and contiguous shares of them.
//
// Chunks never cross a tensor and their borders do not depend on the number of threads, so neither
// does any partial sum.

#ifndef FUSEDCLIP_CPU_PLAN_H_
#define FUSEDCLIP_CPU_PLAN_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "clip.h"
#include "cpu/kernel_table.h"

namespace fusedclip::cpu {

// Below this a second thread costs more than it saves. Measured on 2 cores of an AMD EPYC (Zen 4).
inline constexpr int64_t kBytesPerThread = 256 << 10;

// What a tensor costs beside its bytes, in bytes: keeps lists of tiny tensors evenly dealt.
inline constexpr int64_t kBytesPerSpan = 256;

class Plan {
 public:
  Plan(const GradSpan* spans, int64_t num_spans, int max_threads) : spans_(spans) {
    const int64_t total = TotalCost(spans, num_spans);
    const int64_t num_shares = std::min<int64_t>(max_threads, ThreadsFor(total));
    borders_.reserve(num_shares + 1);
    borders_.push_back({0, 0, 0});
    int64_t cost = 0;
    int64_t chunk = 0;
    for (int64_t i = 0; i < num_spans; ++i) {
      const int64_t num_chunks = NumChunks(spans[i]);
      while (static_cast<int64_t>(borders_.size()) < num_shares) {
        const int64_t wanted = total / num_shares * static_cast<int64_t>(borders_.size()) - cost;
        if (wanted >= Cost(spans[i])) break;
        // At most the whole chunks: the cost per span may carry `wanted` past the last element.
        const int64_t before = std::min(wanted / (kChunkElements * ItemSize(spans[i].dtype)),
                                        spans[i].numel / kChunkElements);
        borders_.push_back({i, before * kChunkElements, chunk + before});
      }
      cost += Cost(spans[i]);
      chunk += num_chunks;
    }
    borders_.push_back({num_spans, 0, chunk});
  }

  int num_shares() const { return static_cast<int>(borders_.size()) - 1; }
  int64_t num_chunks() const { return borders_.back().chunk; }

  // Calls visit(span, offset, n, chunk) for the chunks of a share, first to last; `chunk` counts
  // them through the whole list.
  template <typename Visit>
  void Forward(int share, Visit visit) const {
    int64_t chunk = borders_[share].chunk;
    const int64_t last = LastSpan(share);
    for (int64_t i = borders_[share].span; i <= last; ++i) {
      const int64_t stop = Stop(share, i);
      for (int64_t offset = Start(share, i); offset < stop; offset += kChunkElements) {
        visit(spans_[i], offset, std::min(kChunkElements, stop - offset), chunk++);
      }
    }
  }

  // Calls visit(span, offset, n) for the same chunks, last to first.
  template <typename Visit>
  void Backward(int share, Visit visit) const {
    const int64_t first = borders_[share].span;
    for (int64_t i = LastSpan(share); i >= first; --i) {
      const int64_t start = Start(share, i);
      int64_t stop = Stop(share, i);
      while (stop > start) {
        const int64_t offset = (stop - 1) / kChunkElements * kChunkElements;
        visit(spans_[i], offset, stop - offset);
        stop = offset;
      }
    }
  }

  // How many threads pay.
  static int64_t UsefulThreads(const GradSpan* spans, int64_t num_spans) {
    return ThreadsFor(TotalCost(spans, num_spans));
  }

  static int64_t NumChunks(const GradSpan& span) {
    return (span.numel + kChunkElements - 1) / kChunkElements;
  }

 private:
  // Where a share begins: at the element `offset` of a span, with `chunk` chunks before it.
  struct Border {
    int64_t span;
    int64_t offset;
    int64_t chunk;
  };

  static int64_t ThreadsFor(int64_t cost) { return std::max<int64_t>(1, cost / kBytesPerThread); }
  static int64_t TotalCost(const GradSpan* spans, int64_t num_spans) {
    int64_t total = 0;
    for (int64_t i = 0; i < num_spans; ++i) total += Cost(spans[i]);
    return total;
  }
  static int64_t Cost(const GradSpan& span) {
    return kBytesPerSpan + span.numel * ItemSize(span.dtype);
  }
  int64_t LastSpan(int share) const {
    const Border& end = borders_[share + 1];
    return end.offset > 0 ? end.span : end.span - 1;
  }
  int64_t Start(int share, int64_t span) const {
    return span == borders_[share].span ? borders_[share].offset : 0;
  }
  int64_t Stop(int share, int64_t span) const {
    return span == borders_[share + 1].span ? borders_[share + 1].offset : spans_[span].numel;
  }

  const GradSpan* spans_;
  std::vector<Border> borders_;  // [num_shares + 1], ascending
};

}  // namespace fusedclip::cpu

#endif  // FUSEDCLIP_CPU_PLAN_H_
