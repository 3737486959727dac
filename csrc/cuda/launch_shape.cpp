#include "cuda/launch_shape.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fusedclip::cuda {
namespace {

const LaunchShape& ShapeFor(int compute_capability) {
  const LaunchShape* shape = kLaunchShapes;
  for (const LaunchShape& row : kLaunchShapes) {
    if (row.compute_capability <= compute_capability) shape = &row;
  }
  return *shape;
}

Layout ByHand(const char* text) {
  Layout layout;
  char rest;
  const int fields = std::sscanf(text, "%d,%d,%ld,%d%c", &layout.threads, &layout.max_blocks,
                                 &layout.chunk_bytes, &layout.resident_chunks, &rest);
  const bool sound = fields == 4 && layout.threads > 0 && layout.threads <= kMaxThreads &&
                     layout.threads % kWarp == 0 && layout.max_blocks > 0 &&
                     layout.chunk_bytes > 0 && layout.chunk_bytes % 16 == 0 &&
                     layout.chunk_bytes < (int64_t{1} << 30) && layout.resident_chunks >= 0;
  if (!sound) {
    throw std::invalid_argument(
        "FUSEDCLIP_CUDA_LAYOUT: expected threads,blocks,chunk_bytes,resident_chunks with threads "
        "a multiple of 32 up to " +
        std::to_string(kMaxThreads) + " and chunk_bytes a multiple of 16, got '" +
        std::string(text) + "'");
  }
  return layout;
}

}  // namespace

Layout LayoutFor(const Device& device, int64_t total_bytes) {
  const char* by_hand = std::getenv("FUSEDCLIP_CUDA_LAYOUT");
  if (by_hand != nullptr && *by_hand != '\0') return ByHand(by_hand);
  const LaunchShape& shape = ShapeFor(device.compute_capability);
  Layout layout;
  layout.threads = shape.threads;
  layout.max_blocks =
      std::max(1, device.multiprocessors - device.multiprocessors / kMultiprocessorsPerSpare);
  layout.chunk_bytes = kMinChunkBytes;
  while (layout.chunk_bytes < kMaxChunkBytes &&
         2 * layout.chunk_bytes * layout.max_blocks * kRounds <= total_bytes) {
    layout.chunk_bytes *= 2;
  }
  layout.resident_chunks = static_cast<int>(shape.resident_kib() * 1024 / layout.chunk_bytes);
  return layout;
}

}  // namespace fusedclip::cuda
