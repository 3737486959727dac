// How a list is laid out on a device: the tuning values, and the reason for each.

#ifndef FUSEDCLIP_CUDA_LAUNCH_SHAPE_H_
#define FUSEDCLIP_CUDA_LAUNCH_SHAPE_H_

#include <cstdint>

namespace fusedclip::cuda {

inline constexpr int kWarp = 32;

// 256 threads with 8 loads of 16 bytes in flight ask for 32 KiB at a time of each multiprocessor;
// memory that answers 3 TB/s after 700 ns needs 18 KiB from each of 116. The rest of a thread's
// share of registers is for the values: with 512 threads the compiler spills them.
inline constexpr int kMaxThreads = 256;
inline constexpr int kInFlight = 8;

// What a warp asks for at a time: 4 KiB.
inline constexpr int kTileVectors = kInFlight * kWarp;
inline constexpr int64_t kTileBytes = 16 * kTileVectors;

// A block of a grid with a barrier inside waits for the last of its grid to be resident, and holds
// its place until then. A clip must not wait like that for a communication kernel, which waits for
// other ranks, whose clips may wait likewise. So its grid finds its places beside such kernels:
//  - one block a multiprocessor is launched, and two fit: 256 of 1,024 to 2,048 threads, 256 × 128
//    of 65,536 registers, and less than half of the shared memory. On an H100, 116 blocks need 58
//    multiprocessors that nobody else holds; communication kernels would have to take 75 of 132
//    whole ones to keep a block out, and NCCL's have 32 blocks at most.
//  - two fit only where the multiprocessor's memory is set aside as shared memory in full, which
//    the driver does not do unasked: see AllowSharedMemory in launch.cuh.
// A grid that is resident ends by itself, so whoever waits for it waits for no longer than a clip.
// A communication kernel need not even do that while there is room: every eighth multiprocessor is
// left free, where seven eighths can still saturate memory (see above), and what fits into half a
// multiprocessor runs beside a block (of registers: 512 threads with 64, but not 640 with 96).
inline constexpr int kMultiprocessorsPerSpare = 8;

struct LaunchShape {
  int compute_capability;  // the lowest that the row is for: 10 · major + minor
  int threads;
  int shared_kib;  // of a multiprocessor

  // Half of it, less what the system and the block's totals take.
  int resident_kib() const { return shared_kib / 2 - 2; }
};

inline constexpr LaunchShape kLaunchShapes[] = {
    {75, 256, 64},    // T4
    {80, 256, 164},   // A100
    {86, 256, 100},   // RTX 30
    {87, 256, 164},   // Orin
    {89, 256, 100},   // L4, L40S, RTX 40
    {90, 256, 228},   // H100, H200
    {100, 256, 228},  // B200
    {120, 256, 100},  // RTX 50
};

// How a list is launched, by its bytes for each multiprocessor.
//  - Short: one cooperative launch. A second launch would cost about 4 µs, and what is kept in
//    shared memory counts: 96 KiB of each block on Hopper.
//  - Long: one launch for each phase, which waits for nobody, so that two blocks may take the
//    registers of a multiprocessor: 64 KiB in flight, and one loads while the other adds up. From
//    2 MiB on a multiprocessor reads for 80 µs or more, and 96 KiB are at most 1.5 % of 3N.
struct GridShape {
  int64_t bytes_per_multiprocessor;  // the fewest that the row is for
  int blocks_per_multiprocessor;
  bool resident;     // whether chunks are kept in shared memory
  bool cooperative;  // one launch with barriers, or one for each phase
};

inline constexpr GridShape kGridShapes[] = {
    {0, 1, true, true},
    {2 << 20, 2, false, false},
};

// A chunk is one warp's: from one tile to 16. To find a chunk costs a warp about 0.2 µs, a tile
// takes 1.3 µs of its time at 3 TB/s over 116 multiprocessors.
inline constexpr int64_t kMinChunkBytes = kTileBytes;
inline constexpr int64_t kMaxChunkBytes = 64 << 10;

// Chunks are dealt in turn, so the last round is uneven: with 16 rounds by at most a sixteenth.
inline constexpr int64_t kRounds = 16;

struct Device {
  int compute_capability;
  int multiprocessors;
};

struct Layout {
  int threads;
  int max_blocks;
  int64_t chunk_bytes;
  int64_t resident_bytes;  // of a block
  bool cooperative;
};

// The layout for a list of `total_bytes`. The environment variable FUSEDCLIP_CUDA_LAYOUT =
// "threads,blocks,chunk_bytes,resident_bytes,launches" sets it by hand, to measure others (launches
// is 1, cooperative, or 2, one for each phase); throws std::invalid_argument when it makes no
// sense.
Layout LayoutFor(const Device& device, int64_t total_bytes);

}  // namespace fusedclip::cuda

#endif  // FUSEDCLIP_CUDA_LAUNCH_SHAPE_H_
