#include "cpu/spinning_team.h"

#ifdef __linux__

#include <dirent.h>
#include <dlfcn.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cpu/arithmetic.h"

namespace fusedclip::cpu {
namespace {

// The runtime that torch has loaded, whichever it is: LLVM's and Intel's have GCC's entry points
// too (https://gcc.gnu.org/onlinedocs/libgomp/The-libgomp-ABI.html). Not linked, because another
// copy would have another team.
struct OpenMp {
  void (*parallel)(void (*run)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread_number)();

  static OpenMp Loaded() {
    OpenMp found;
    found.parallel = reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.thread_number =
        reinterpret_cast<decltype(thread_number)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    return found;
  }
  bool is_there() const { return parallel != nullptr && thread_number != nullptr; }
};

// The processor time of a thread of this process, in nanoseconds; -1 when there is no such thread.
int64_t TimeOf(pid_t thread) {
  // Linux's number for that clock: clock_getcpuclockid(3) makes it for processes.
  const auto clock = static_cast<clockid_t>(~static_cast<unsigned>(thread) << 3 | 6);
  timespec time;
  if (clock_gettime(clock, &time) != 0) return -1;
  return int64_t{1000000000} * time.tv_sec + time.tv_nsec;
}

// Whether it has a core now: its time goes on between two looks, of half a microsecond each.
bool IsRunning(pid_t thread) {
  const int64_t before = TimeOf(thread);
  return before >= 0 && TimeOf(thread) > before;
}

pid_t CurrentThread() { return static_cast<pid_t>(syscall(SYS_gettid)); }

// Whether so many threads of this process have a core, the calling one not counted.
bool OthersAreRunning(int count) {
  const std::unique_ptr<DIR, int (*)(DIR*)> threads(opendir("/proc/self/task"), &closedir);
  if (threads == nullptr) return false;
  const pid_t self = CurrentThread();
  while (const dirent* entry = count > 0 ? readdir(threads.get()) : nullptr) {
    const pid_t thread = std::atoi(entry->d_name);
    if (thread > 0 && thread != self && IsRunning(thread)) --count;
  }
  return count == 0;
}

// The other threads of the calling thread's team; empty until it was met.
thread_local std::vector<pid_t> t_team;

bool TeamIsSpinning(int threads) {
  // Before it is met only its size is known.
  if (static_cast<int>(t_team.size()) != threads - 1) return OthersAreRunning(threads - 1);
  for (const pid_t thread : t_team) {
    if (IsRunning(thread)) continue;
    if (TimeOf(thread) < 0) t_team.clear();  // there is another team by now
    return false;
  }
  return true;
}

struct Region {
  Job* job;
  OpenMp openmp;
  std::vector<pid_t>* team;  // [i] is number i + 1

  static void Run(void* data) noexcept {
    const IeeeArithmetic ieee;
    const Region* self = static_cast<const Region*>(data);
    const int part = self->openmp.thread_number();
    if (part > 0) (*self->team)[part - 1] = CurrentThread();
    self->job->Work(part, [] {});
  }
};

// The child of fork() has none of the team's threads, and OpenMP would wait for them for ever.
std::atomic<bool> g_is_forked{false};
const bool g_knows_of_forks =
    pthread_atfork(nullptr, nullptr, [] { g_is_forked.store(true); }) == 0;

}  // namespace

bool RunOnSpinningTeam(Job* job, int threads) {
  if (!g_knows_of_forks || g_is_forked.load()) return false;
  static const OpenMp openmp = OpenMp::Loaded();
  if (!openmp.is_there() || !TeamIsSpinning(threads)) return false;
  t_team.assign(threads - 1, 0);
  Region region{job, openmp, &t_team};
  openmp.parallel(&Region::Run, &region, threads, 0);
  // Inside a region of the caller's it has no team.
  if (std::count(t_team.begin(), t_team.end(), 0) > 0) t_team.clear();
  return true;
}

}  // namespace fusedclip::cpu

#else

namespace fusedclip::cpu {

bool RunOnSpinningTeam(Job*, int) { return false; }

}  // namespace fusedclip::cpu

#endif
