// The numbers that decide how the work is cut, who takes part and how long anybody spins.
//
// Measured on two cores of an AMD EPYC (Zen 3, a virtual machine; each core has an L3 of its own,
// so that what one has written reaches the other at 13 GB/s, and its own L2 and L3 at 34 to 90
// GB/s; the memory gives one core 15 to 20 GB/s). docs/performance.md has the log.

#ifndef FUSEDCLIP_CPU_TUNING_H_
#define FUSEDCLIP_CPU_TUNING_H_

#include <cstdint>

namespace fusedclip::cpu {

// Lists up to this size are one thread's. To wake another costs the caller 3 to 5 µs, and it is at
// work 20 to 50 µs later; what it writes has then to come back from its cache. On a quiet machine
// two threads are ahead from 4 MB if nothing is written and from 8 MB if something is; where other
// processes run the second is late, and still costs 10 to 50 % at 8 MB and nothing at 16 MB.
inline constexpr int64_t kBytesAlone = 8 << 20;

// Above it, the bytes for each thread: at 15 GB/s the work of 70 µs, several times what it costs to
// wake one. Not measured on more than two cores.
inline constexpr int64_t kBytesPerThread = 1 << 20;

// The bytes of a share, of which a thread claims one at a time: 5 to 17 µs of work, for which the
// others have to wait should its thread lose its core. A claim costs 20 to 100 ns. With 64 KiB and
// with 512 KiB lists of 8 to 40 MB took as long or up to 7 % longer.
inline constexpr int64_t kBytesPerShare = 256 << 10;

// What a tensor costs beside its bytes, in bytes: 27 ns, at 15 to 20 GB/s.
inline constexpr int64_t kBytesPerSpan = 512;

// An owner that gets on keeps so many: what a thread has written comes to another's core at a third
// of the speed, and back again. 16 MB, clipped again and again: 370 µs with 8 and with all, 560
// with 0.
inline constexpr int kSharesLeftToOwner = 8;

// How long the caller spins for the last shares of others before it sleeps: about as long as a
// share takes. 8 MB: 64 µs with 20 µs of it, 72 with 5, 119 with none.
inline constexpr int64_t kSpinForSharesNs = 20000;

// How long a worker spins for the next job, as the second pass of a clip is, before it sleeps. 8
// MB, clipped: 118 µs with 5 µs of it and with 50, 140 with none.
inline constexpr int64_t kSpinForJobNs = 5000;

// A chunk is read at so many places in turn. Processors do not prefetch past the end of a page, so
// that a single stream waits for the memory at each. 400 MB of fp32, sum on one thread: 27 ms with
// one, 21 with two, 17 with four, 18 with eight.
inline constexpr int kStreams = 4;

}  // namespace fusedclip::cpu

#endif  // FUSEDCLIP_CPU_TUNING_H_
