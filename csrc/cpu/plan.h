// How a list of gradients is cut: chunks, and shares of some chunks that follow each other.
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
#include "cpu/team.h"
#include "cpu/tuning.h"

namespace fusedclip::cpu {

class Plan {
 public:
  Plan(const GradSpan* spans, int64_t num_spans, int max_threads) : spans_(spans) {
    int64_t cost = 0;  // since the last border
    int64_t chunk = 0;
    borders_.push_back({0, 0, 0});
    for (int64_t i = 0; i < num_spans; ++i) {
      cost += kBytesPerSpan;
      for (int64_t begin = 0; begin < spans[i].numel; begin += kChunkElements, ++chunk) {
        if (cost >= kBytesPerShare) {
          borders_.push_back({i, begin, chunk});
          cost = 0;
        }
        cost += std::min(kChunkElements, spans[i].numel - begin) * ItemSize(spans[i].dtype);
      }
    }
    borders_.push_back({num_spans, 0, chunk});
    threads_ = static_cast<int>(std::min<int64_t>(max_threads, UsefulThreads(spans, num_spans)));
  }

  // How many threads pay.
  static int64_t UsefulThreads(const GradSpan* spans, int64_t num_spans) {
    int64_t total = 0;
    for (int64_t i = 0; i < num_spans; ++i) total += Cost(spans[i]);
    return total <= kBytesAlone ? 1 : total / kBytesPerThread;
  }

  Shares Dealt(Order order) const { return {num_shares(), threads_, order}; }
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
  int threads_;
  std::vector<Border> borders_;  // [num_shares + 1], ascending
};

}  // namespace fusedclip::cpu

#endif  // FUSEDCLIP_CPU_PLAN_H_
