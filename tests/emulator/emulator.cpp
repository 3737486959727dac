// The emulator's scheduler and its device.

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "cuda_runtime.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#define __sanitizer_start_switch_fiber(save, bottom, size)
#define __sanitizer_finish_switch_fiber(save, bottom, size)
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

// A small GPU of Hopper's kind: enough multiprocessors for several blocks, few enough to be quick.
constexpr int kMultiprocessors = 4;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kMaxSharedBytes = 227 << 10;
constexpr int kUnaskedSharedBytes = 48 << 10;
constexpr int kSystemsSharedBytes = 1 << 10;  // of each block
// What a multiprocessor can set aside as shared memory.
constexpr int kCarveouts[] = {8 << 10,   16 << 10,  32 << 10,  64 << 10, 100 << 10,
                              132 << 10, 164 << 10, 196 << 10, 228 << 10};
constexpr int kLargeParametersVersion = 12010;  // of the driver
constexpr size_t kSmallParameterBytes = 4096, kLargeParameterBytes = 32764;
constexpr int kMaxThreadsPerBlock = 1024;
constexpr int kWarp = 32;
constexpr size_t kStackBytes = 192 << 10;  // the parameters alone are 32 KiB

}  // namespace

// The name that the kernels give their dynamic shared memory.
namespace fusedclip::cuda {
alignas(16) thread_local uint4 shared_memory[kMaxSharedBytes / sizeof(uint4)];
}

namespace emulator {

std::atomic<int64_t> bytes_read{0}, bytes_written{0};

namespace {

std::atomic<int> g_next_error{0};
std::atomic<int> g_driver_version{13000};
std::atomic<int> g_cooperative_blocks{-1};  // that fit on a part of the device; -1: no part
std::map<const void*, std::map<cudaFuncAttribute, int>> g_attributes;  // of kernels
std::atomic<uint64_t> g_launches{0};

struct Block;

// Where a stack goes on; GCC's and Clang's own setjmp, for between two stacks swapcontext would ask
// the kernel for the signal mask and have AddressSanitizer forget what it knows of the stack.
using Place = void* [5];

__attribute__((noinline, no_sanitize("address"))) void Jump(Place to) { __builtin_longjmp(to, 1); }

__attribute__((noinline, no_sanitize("address"))) void Switch(Place from, Place to) {
  if (__builtin_setjmp(from) == 0) Jump(to);
}

struct Fiber {
  Place place;
  bool begun = false;
  char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  Block* block = nullptr;
  unsigned index = 0;
  bool done = false;
};

// Fibers that wait until `expected` of them do.
struct Barrier {
  size_t expected = 0;
  std::vector<Fiber*> waiting;
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][kWarp];  // of every other shuffle
  int turn[kWarp] = {};
};

struct Block {
  unsigned index;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Fiber*> ready;
  std::vector<char> shared;
};

struct Grid {
  std::deque<Fiber> fibers;
  std::deque<Block> blocks;
  Barrier barrier;
  std::mt19937_64 random;
  const std::function<void()>* thread = nullptr;
  Place scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  Fiber* running = nullptr;
};

Grid* g_grid = nullptr;  // one at a time: see Launch

[[noreturn]] void Fail(const char* message) {
  std::fprintf(stderr, "emulator: %s\n", message);
  std::abort();
}

void ToScheduler() {
  Grid& grid = *g_grid;
  Fiber* self = grid.running;
  __sanitizer_start_switch_fiber(self->done ? nullptr : &self->fake_stack, grid.scheduler_stack,
                                 grid.scheduler_stack_bytes);
  Switch(self->place, grid.scheduler);
  __sanitizer_finish_switch_fiber(self->fake_stack, &grid.scheduler_stack,
                                  &grid.scheduler_stack_bytes);
}

void RunFiber() {
  Grid& grid = *g_grid;
  __sanitizer_finish_switch_fiber(nullptr, &grid.scheduler_stack, &grid.scheduler_stack_bytes);
  (*grid.thread)();
  grid.running->done = true;
  ToScheduler();
  Fail("a finished thread was run again");
}

void Wait(Barrier& barrier) {
  Fiber* self = g_grid->running;
  barrier.waiting.push_back(self);
  if (barrier.waiting.size() == barrier.expected) {
    for (Fiber* fiber : barrier.waiting) fiber->block->ready.push_back(fiber);
    barrier.waiting.clear();
  }
  ToScheduler();
}

// Leaves the running stack for a new one, on which RunFiber is called.
__attribute__((noinline, no_sanitize("address"))) void Begin(Place from, char* stack) {
  if (__builtin_setjmp(from) != 0) return;
  static thread_local ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, RunFiber, 0);
  setcontext(&context);
}

void Resume(Grid& grid, Fiber* fiber) {
  grid.running = fiber;
  threadIdx.x = fiber->index;
  __sanitizer_start_switch_fiber(&grid.scheduler_fake_stack, fiber->stack, kStackBytes);
  if (fiber->begun) {
    Switch(grid.scheduler, fiber->place);
  } else {
    fiber->begun = true;
    Begin(grid.scheduler, fiber->stack);
  }
  __sanitizer_finish_switch_fiber(grid.scheduler_fake_stack, nullptr, nullptr);
}

// A ready thread of the block, at random; often of the warp that ran last, so that one warp can be
// several barriers of its own ahead of the others.
Fiber* Pick(Grid& grid, Block& block) {
  size_t pick = grid.random() % block.ready.size();
  if (grid.running != nullptr && grid.random() % 64 != 0) {
    const unsigned warp = grid.running->index / kWarp;
    for (size_t i = 0; i < block.ready.size(); ++i) {
      if (block.ready[i]->index / kWarp == warp) pick = i;
    }
  }
  std::swap(block.ready[pick], block.ready.back());
  Fiber* fiber = block.ready.back();
  block.ready.pop_back();
  return fiber;
}

// Runs ready threads of a block until there are none or, now and then, before.
size_t RunBlock(Grid& grid, Block& block) {
  size_t finished = 0;
  blockIdx.x = block.index;
  char* shared = reinterpret_cast<char*>(fusedclip::cuda::shared_memory);
  ASAN_UNPOISON_MEMORY_REGION(shared, kMaxSharedBytes);
  std::copy(block.shared.begin(), block.shared.end(), shared);
  ASAN_POISON_MEMORY_REGION(shared + block.shared.size(), kMaxSharedBytes - block.shared.size());
  do {
    Fiber* fiber = Pick(grid, block);
    Resume(grid, fiber);
    finished += fiber->done;
  } while (!block.ready.empty() && grid.random() % 256 != 0);
  std::copy(shared, shared + block.shared.size(), block.shared.begin());
  ASAN_UNPOISON_MEMORY_REGION(shared, kMaxSharedBytes);
  return finished;
}

// Kept from launch to launch; what the last owner left behind is no longer poisoned.
char* Stack(size_t i) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= i) stacks.emplace_back(new char[kStackBytes]);
  ASAN_UNPOISON_MEMORY_REGION(stacks[i].get(), kStackBytes);
  return stacks[i].get();
}

void Start(Grid& grid, unsigned num_blocks, unsigned num_threads, size_t shared_bytes) {
  for (unsigned b = 0; b < num_blocks; ++b) {
    Block& block = grid.blocks.emplace_back();
    block.index = b;
    block.barrier.expected = num_threads;
    block.warps.resize((num_threads + kWarp - 1) / kWarp);
    for (Warp& warp : block.warps) warp.barrier.expected = kWarp;
    block.shared.assign(shared_bytes, '\xff');  // NaN to whoever reads before writing
    for (unsigned t = 0; t < num_threads; ++t) {
      Fiber& fiber = grid.fibers.emplace_back();
      fiber.stack = Stack(grid.fibers.size() - 1);
      fiber.block = &block;
      fiber.index = t;
      block.ready.push_back(&fiber);
    }
  }
}

void Run(Grid& grid) {
  size_t unfinished = grid.fibers.size();
  std::vector<Block*> ready;
  while (unfinished > 0) {
    ready.clear();
    for (Block& block : grid.blocks) {
      if (!block.ready.empty()) ready.push_back(&block);
    }
    if (ready.empty()) Fail("deadlock: not every thread came to the same barrier");
    unfinished -= RunBlock(grid, *ready[grid.random() % ready.size()]);
  }
}

uint64_t Seed() {
  const char* text = std::getenv("FUSEDCLIP_EMULATOR_SEED");
  return (text == nullptr ? 0 : std::strtoull(text, nullptr, 10)) << 32 | ++g_launches;
}

}  // namespace

void SyncBlock() { Wait(g_grid->running->block->barrier); }

void SyncGrid() {
  if (g_grid->barrier.expected == 0)
    Fail("a barrier of the grid in a launch that is not cooperative");
  Wait(g_grid->barrier);
}

uint64_t ShuffleXor(uint64_t value, int mask) {
  Fiber* self = g_grid->running;
  Warp& warp = self->block->warps[self->index / kWarp];
  const int lane = static_cast<int>(self->index % kWarp);
  uint64_t* values = warp.values[warp.turn[lane]++ % 2];
  values[lane] = value;
  Wait(warp.barrier);
  return values[lane ^ mask];
}

namespace {

std::mutex g_stream;  // one launch after the other

int AttributeOf(const void* kernel, cudaFuncAttribute attribute, int otherwise) {
  const auto& known = g_attributes[kernel];
  const auto found = known.find(attribute);
  return found == known.end() ? otherwise : found->second;
}

// Blocks that can be resident at once. What is set aside as shared memory is what the kernel has
// asked for or, as a driver does unasked, the least that holds one block.
unsigned MostBlocks(const void* kernel, size_t shared_bytes) {
  const size_t needed = shared_bytes + kSystemsSharedBytes;
  const int percent = AttributeOf(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 0);
  size_t aside = 0;
  for (const int size : kCarveouts) {
    if (aside < needed || size <= std::end(kCarveouts)[-1] * percent / 100) aside = size;
  }
  const size_t fitting = std::min<size_t>(kBlocksPerMultiprocessor, aside / needed);
  const int part = g_cooperative_blocks;
  return part >= 0 ? part : static_cast<unsigned>(kMultiprocessors * fitting);
}

}  // namespace

int Launch(const char* call, const void* kernel, dim3 grid_size, dim3 block_size,
           size_t shared_bytes, bool cooperative, size_t parameter_bytes,
           const std::function<void()>& thread) {
  if (const int error = g_next_error.exchange(0)) return error;
  const std::lock_guard<std::mutex> in_order(g_stream);
  const size_t asked =
      AttributeOf(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kUnaskedSharedBytes);
  const bool bad_block = block_size.x == 0 || block_size.x > kMaxThreadsPerBlock;
  const bool large = g_driver_version >= kLargeParametersVersion;
  const bool bad_parameters =
      parameter_bytes > (large ? kLargeParameterBytes : kSmallParameterBytes);
  if (grid_size.x == 0 || bad_block || shared_bytes > asked || bad_parameters) {
    std::fprintf(stderr, "emulator: %s of %u blocks of %u threads with %zu and %zu bytes\n", call,
                 grid_size.x, block_size.x, shared_bytes, parameter_bytes);
    return cudaErrorInvalidValue;
  }
  if (cooperative && grid_size.x > MostBlocks(kernel, shared_bytes)) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  Grid grid;
  grid.random.seed(Seed());
  grid.thread = &thread;
  if (cooperative) grid.barrier.expected = grid_size.x * block_size.x;
  Start(grid, grid_size.x, block_size.x, shared_bytes);
  gridDim = grid_size;
  blockDim = block_size;
  g_grid = &grid;
  Run(grid);
  return cudaSuccess;
}

}  // namespace emulator

// For the tests, through ctypes.
extern "C" __attribute__((visibility("default"))) void emulator_take_traffic(int64_t* bytes) {
  bytes[0] = emulator::bytes_read.exchange(0);
  bytes[1] = emulator::bytes_written.exchange(0);
}
extern "C" __attribute__((visibility("default"))) int64_t emulator_launches() {
  return static_cast<int64_t>(emulator::g_launches.load());
}
extern "C" __attribute__((visibility("default"))) void emulator_fail_next_launch(int error) {
  emulator::g_next_error = error;
}
extern "C" __attribute__((visibility("default"))) void emulator_fit_cooperative(int blocks) {
  emulator::g_cooperative_blocks = blocks;
}
extern "C" __attribute__((visibility("default"))) void emulator_set_driver(int version) {
  emulator::g_driver_version = version;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = kMultiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kMaxSharedBytes;
      break;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard<std::mutex> in_order(emulator::g_stream);
  emulator::g_attributes[kernel][attribute] = value;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = emulator::g_driver_version;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::malloc(bytes);
  std::memset(*memory, 0xff, bytes);  // NaN to whoever reads before writing
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
      return "cudaErrorNoKernelImageForDevice";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    case cudaErrorCooperativeLaunchTooLarge:
      return "cudaErrorCooperativeLaunchTooLarge";
    default:
      return "cudaErrorInvalidValue";
  }
}
const char* cudaGetErrorString(cudaError_t) { return "as the emulator was told"; }
