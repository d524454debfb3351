// A GPU for tests, in one host thread: every CUDA thread is a fiber, and the order in which fibers and blocks run is
// random. Warps, shuffles, barriers, shared memory, thread block clusters and atomics behave as CUDA promises and no
// better: shared memory starts poisoned, other blocks' shared memory is gone once they have exited, a barrier that
// not all threads reach is a deadlock, and loads outside the registered arrays are counted as errors.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define GANEXPORT_SHARED(type, name) \
  static char name##_tag;            \
  type& name = *static_cast<type*>(emulation::shared(&name##_tag, sizeof(type)))

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
struct Index {
  unsigned x;
};

namespace emulation {

constexpr size_t kSharedBytes = 4096, kStackBytes = 64 << 10;
constexpr uint64_t kIdleRounds = 2'000;  // without a barrier passed, an atomic or a thread's end: a deadlock

enum Error : int { kNone = 0, kDeadlock = 1, kOutOfBounds = 2, kExitedBlock = 3, kSharedOverflow = 4 };

struct Warp {
  unsigned char slots[2][32][8];
  int arrived = 0;
  unsigned generation = 0;
  bool runs = true;
};

struct Cluster;

struct Block {
  unsigned index;
  bool runs = true;
  int arrived = 0, running;
  unsigned generation = 0;
  std::vector<Warp> warps;
  alignas(16) unsigned char shared[kSharedBytes];
  Cluster* cluster;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  int threads, arrived = 0, running;
  unsigned generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  unsigned thread;
  unsigned cluster_generation;
  Block* block;
  bool done;
};

struct Range {
  uintptr_t begin, end;
};

struct State {
  ucontext_t scheduler;
  Fiber* fiber = nullptr;
  Index block_dim{}, grid_dim{};
  std::function<void()> kernel;
  std::mt19937 random;
  std::map<const void*, size_t> shared_offsets;
  size_t shared_used = 0;
  std::vector<Range> readable;
  uint64_t loaded_bytes = 0, stored_bytes = 0, launches = 0, progress = 0;
  int error = kNone;
};
inline State state;

inline void yield() { swapcontext(&state.fiber->context, &state.scheduler); }
inline void maybe_yield() {
  if (state.random() % 2) yield();
}

inline void* shared(const void* tag, size_t bytes) {
  auto [entry, is_new] = state.shared_offsets.try_emplace(tag, state.shared_used);
  if (is_new) state.shared_used += (bytes + 15) / 16 * 16;
  if (state.shared_used > kSharedBytes) {
    state.error = kSharedOverflow;
    entry->second = 0;
  }
  return state.fiber->block->shared + entry->second;
}

inline void barrier() {
  Block& block = *state.fiber->block;
  const unsigned generation = block.generation;
  if (++block.arrived == static_cast<int>(state.block_dim.x)) {
    block.arrived = 0;
    ++block.generation;
    ++state.progress;
  }
  while (block.generation == generation) yield();
}

template <typename V>
V exchange(V value, unsigned source) {
  static_assert(sizeof(V) <= 8);
  const unsigned lane = state.fiber->thread % 32;
  Warp& warp = state.fiber->block->warps[state.fiber->thread / 32];
  const unsigned generation = warp.generation;
  std::memcpy(warp.slots[generation % 2][lane], &value, sizeof(V));
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.generation;
    ++state.progress;
  }
  while (warp.generation == generation) yield();
  std::memcpy(&value, warp.slots[generation % 2][source], sizeof(V));
  return value;
}

template <typename V>
V checked_load(const V* address) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  bool inside = begin % sizeof(V) == 0;
  inside = inside && std::any_of(state.readable.begin(), state.readable.end(), [begin](const Range& range) {
             return range.begin <= begin && begin + sizeof(V) <= range.end;
           });
  state.loaded_bytes += sizeof(V);
  if (inside) return *address;
  state.error = kOutOfBounds;
  return V{};
}

template <typename V>
void checked_store(V* address, V value) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(V) != 0) state.error = kOutOfBounds;
  state.stored_bytes += sizeof(V);
  *address = value;
}

inline void run_fiber() {
  state.kernel();
  Fiber& fiber = *state.fiber;
  fiber.done = true;
  ++state.progress;
  --fiber.block->running;
  --fiber.block->cluster->running;
  swapcontext(&fiber.context, &state.scheduler);
}

inline void start_fiber(Fiber& fiber, Block& block, unsigned thread) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  fiber.thread = thread;
  fiber.block = &block;
  fiber.done = false;
  makecontext(&fiber.context, run_fiber, 0);
}

// Runs `kernel` on a grid; at most `window` clusters at once, started in index order, as a small GPU would.
inline int launch(int64_t blocks, int threads, int ranks, int window, std::function<void()> kernel) {
  state.kernel = std::move(kernel);
  state.grid_dim = {static_cast<unsigned>(blocks)};
  state.block_dim = {static_cast<unsigned>(threads)};
  ++state.launches;
  std::vector<std::unique_ptr<Cluster>> active;
  static std::vector<std::unique_ptr<Fiber>> idle;
  std::vector<std::unique_ptr<Fiber>> fibers;
  int64_t started = 0;
  uint64_t idle_rounds = 0;
  while (started < blocks || !active.empty()) {
    const uint64_t before = state.progress;
    while (started < blocks && static_cast<int>(active.size()) < window) {
      auto cluster = std::make_unique<Cluster>();
      cluster->threads = cluster->running = threads * ranks;
      for (int rank = 0; rank < ranks; ++rank) {
        auto block = std::make_unique<Block>();
        block->index = static_cast<unsigned>(started++);
        block->running = threads;
        block->warps.resize(threads / 32);
        block->cluster = cluster.get();
        std::memset(block->shared, 0xff, kSharedBytes);
        for (int thread = 0; thread < threads; ++thread) {
          if (idle.empty()) idle.push_back(std::make_unique<Fiber>());
          fibers.push_back(std::move(idle.back()));
          idle.pop_back();
          start_fiber(*fibers.back(), *block, thread);
        }
        cluster->blocks.push_back(std::move(block));
      }
      active.push_back(std::move(cluster));
    }
    std::shuffle(fibers.begin(), fibers.end(), state.random);
    for (auto& cluster : active)
      for (auto& block : cluster->blocks) {  // blocks drift apart, and so do their warps
        block->runs = state.random() % 2;
        for (Warp& warp : block->warps) warp.runs = state.random() % 4 > 0;
      }
    for (auto& fiber : fibers) {
      if (!fiber->block->runs || !fiber->block->warps[fiber->thread / 32].runs) continue;
      state.fiber = fiber.get();
      swapcontext(&state.scheduler, &fiber->context);
    }
    const auto finished = std::partition(fibers.begin(), fibers.end(), [](auto& fiber) { return !fiber->done; });
    std::move(finished, fibers.end(), std::back_inserter(idle));
    fibers.erase(finished, fibers.end());
    active.erase(std::remove_if(active.begin(), active.end(), [](auto& cluster) { return cluster->running == 0; }),
                 active.end());
    idle_rounds = state.progress == before ? idle_rounds + 1 : 0;
    if (idle_rounds > kIdleRounds) {
      state.error = kDeadlock;
      std::move(fibers.begin(), fibers.end(), std::back_inserter(idle));
      return kDeadlock;
    }
  }
  return state.error;
}

}  // namespace emulation

#define threadIdx (Index{emulation::state.fiber->thread})
#define blockIdx (Index{emulation::state.fiber->block->index})
#define blockDim (emulation::state.block_dim)
#define gridDim (emulation::state.grid_dim)

// The CUDA functions that the kernels use.
using std::isinf;
inline void __syncthreads() { emulation::barrier(); }
inline void __threadfence() { emulation::maybe_yield(); }
inline void __nanosleep(unsigned) { emulation::yield(); }
template <typename V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  return emulation::exchange(value, emulation::state.fiber->thread % 32 ^ mask);
}
template <typename V>
V __shfl_sync(unsigned, V value, int lane) {
  return emulation::exchange(value, lane);
}
template <typename V>
V atomicAdd(V* address, V value) {
  emulation::maybe_yield();
  ++emulation::state.progress;
  const V before = *address;
  *address = before + value;
  return before;
}
template <typename V>
V atomicExch(V* address, V value) {
  emulation::maybe_yield();
  return std::exchange(*address, value);
}
template <typename V>
V __ldcs(const V* address) {
  return emulation::checked_load(address);
}
template <typename V>
V __ldca(const V* address) {
  return emulation::checked_load(address);
}
template <typename V>
V __ldcg(const V* address) {
  return *address;
}
template <typename V>
void __stcs(V* address, V value) {
  emulation::checked_store(address, value);
}
template <typename V>
void __stwb(V* address, V value) {
  emulation::checked_store(address, value);
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __half2float(__half value) {
  _Float16 half;
  std::memcpy(&half, &value, 2);
  return static_cast<float>(half);
}
inline __half __float2half_rn(float value) {
  const auto half = static_cast<_Float16>(value);
  __half result;
  std::memcpy(&result, &half, 2);
  return result;
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

namespace ganexport {
inline unsigned cluster_rank() {
  return emulation::state.fiber->block->index % static_cast<unsigned>(emulation::state.fiber->block->cluster->blocks.size());
}
inline void cluster_arrive() {
  emulation::Cluster& cluster = *emulation::state.fiber->block->cluster;
  emulation::state.fiber->cluster_generation = cluster.generation;
  if (++cluster.arrived == cluster.threads) {
    cluster.arrived = 0;
    ++cluster.generation;
    ++emulation::state.progress;
  }
}
inline void cluster_wait() {
  emulation::Fiber& fiber = *emulation::state.fiber;
  while (fiber.block->cluster->generation == fiber.cluster_generation) emulation::yield();
}
inline float load_from_rank(float* shared, unsigned rank) {
  emulation::Block& own = *emulation::state.fiber->block;
  emulation::Block& other = *own.cluster->blocks[rank];
  if (other.running != static_cast<int>(emulation::state.block_dim.x)) emulation::state.error = emulation::kExitedBlock;
  float value;
  std::memcpy(&value, other.shared + (reinterpret_cast<unsigned char*>(shared) - own.shared), 4);
  return value;
}
}  // namespace ganexport
