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

const GridShape& GridFor(int64_t bytes_per_multiprocessor) {
  const GridShape* shape = kGridShapes;
  for (const GridShape& row : kGridShapes) {
    if (row.bytes_per_multiprocessor <= bytes_per_multiprocessor) shape = &row;
  }
  return *shape;
}

Layout ByHand(const char* text) {
  Layout layout;
  int launches;
  char rest;
  const int fields = std::sscanf(text, "%d,%d,%ld,%ld,%d%c", &layout.threads, &layout.max_blocks,
                                 &layout.chunk_bytes, &layout.resident_bytes, &launches, &rest);
  const bool sound = fields == 5 && layout.threads > 0 && layout.threads <= kMaxThreads &&
                     layout.threads % kWarp == 0 && layout.max_blocks > 0 &&
                     layout.chunk_bytes > 0 && layout.chunk_bytes % 16 == 0 &&
                     layout.chunk_bytes < (int64_t{1} << 30) && layout.resident_bytes >= 0 &&
                     layout.resident_bytes < (int64_t{1} << 30) &&
                     (launches == 1 || (launches == 2 && layout.resident_bytes == 0));
  if (!sound) {
    throw std::invalid_argument(
        "FUSEDCLIP_CUDA_LAYOUT: expected threads,blocks,chunk_bytes,resident_bytes,launches with "
        "threads a multiple of 32 up to " +
        std::to_string(kMaxThreads) +
        ", chunk_bytes a multiple of 16, and launches 1 or, with nothing resident, 2, got '" +
        std::string(text) + "'");
  }
  layout.cooperative = launches == 1;
  return layout;
}

}  // namespace

Layout LayoutFor(const Device& device, int64_t total_bytes) {
  const char* by_hand = std::getenv("FUSEDCLIP_CUDA_LAYOUT");
  if (by_hand != nullptr && *by_hand != '\0') return ByHand(by_hand);
  const LaunchShape& shape = ShapeFor(device.compute_capability);
  const int multiprocessors =
      std::max(1, device.multiprocessors - device.multiprocessors / kMultiprocessorsPerSpare);
  const GridShape& grid = GridFor(total_bytes / multiprocessors);
  Layout layout;
  layout.threads = shape.threads;
  layout.max_blocks = grid.blocks_per_multiprocessor * multiprocessors;
  layout.cooperative = grid.cooperative;
  const int64_t warps = shape.threads / kWarp;
  layout.chunk_bytes = kMinChunkBytes;
  while (layout.chunk_bytes < kMaxChunkBytes &&
         2 * layout.chunk_bytes * warps * layout.max_blocks * kRounds <= total_bytes) {
    layout.chunk_bytes *= 2;
  }
  const int64_t tiles = grid.resident ? shape.resident_kib() * 1024 / (kTileBytes * warps) : 0;
  layout.resident_bytes = tiles * kTileBytes * warps;
  return layout;
}

}  // namespace fusedclip::cuda
