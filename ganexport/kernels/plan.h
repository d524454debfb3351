// How a batch is spread over the GPU: which kernel, how many threads, blocks and bytes of workspace. Host code only.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace ganexport {

struct Machine {
  int multiprocessors;
  int max_cluster;  // largest cluster the kernel can be launched with; 1 where clusters don't exist
  int64_t l2_bytes;
};

struct Plan {
  bool wide;    // words of 16 bytes, else of one element
  bool split;   // two reads of g, else one
  int threads;  // a block
  int team;     // lanes a sample; 0 when it takes the block or the cluster
  int ranks;    // blocks a cluster
  int64_t blocks;
  int64_t words;   // a sample
  int64_t chunks;  // a sample (split)
  int64_t lag;     // split: chunks between first and second read
  size_t workspace_bytes;
  size_t zeroed_bytes;  // of the workspace's beginning, before the launch
};

inline int power_of_two_at_least(int64_t value) {
  int power = 1;
  while (power < value) power *= 2;
  return power;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `threads_limit` is 512 on a GPU; the tests lower it so that small problems reach every path.
inline Plan make_plan(int64_t samples, int64_t elements, int element_bytes, bool aligned, bool gradient,
                      const Machine& machine, int threads_limit = 512) {
  Plan plan{};
  plan.wide = aligned && elements * element_bytes % 16 == 0;
  plan.words = plan.wide ? elements * element_bytes / 16 : elements;
  plan.ranks = 1;
  const int held = plan.wide ? 8 : 16;
  if (plan.words <= 32 * held) {
    // Neighbouring lanes read at least 128 neighbouring bytes where the sample has them.
    plan.team = power_of_two_at_least(
        std::max<int64_t>(divide_up(plan.words, held), std::min<int64_t>(plan.words, plan.wide ? 8 : 32)));
    // 256 threads a block, fewer when the batch is too small to fill the GPU with such blocks.
    const int64_t lanes = divide_up(samples * plan.team, machine.multiprocessors);
    plan.threads = static_cast<int>(std::clamp<int64_t>(divide_up(lanes, 32) * 32, 32, std::min(256, threads_limit)));
    plan.threads = power_of_two_at_least(plan.threads);
    plan.blocks = divide_up(samples, plan.threads / plan.team);
    plan.workspace_bytes = static_cast<size_t>(plan.blocks) * sizeof(double);
    return plan;
  }
  const int64_t block_words = static_cast<int64_t>(threads_limit) * held;
  while (plan.ranks <= machine.max_cluster && plan.ranks * block_words < plan.words) plan.ranks *= 2;
  if (plan.ranks <= machine.max_cluster) {
    const int64_t share = divide_up(plan.words, plan.ranks);
    plan.threads = static_cast<int>(divide_up(divide_up(share, held), 32) * 32);
    plan.blocks = samples * plan.ranks;
    plan.workspace_bytes = static_cast<size_t>(samples) * sizeof(double);
    return plan;
  }
  plan.split = true;
  plan.ranks = 1;
  plan.threads = threads_limit;
  plan.chunks = divide_up(plan.words, block_words);
  const int64_t total = samples * plan.chunks;
  plan.blocks = std::min<int64_t>(gradient ? 2 * total : total, 2 * static_cast<int64_t>(machine.multiprocessors));
  // A whole sample must be read before any of it is scaled. Beyond that, as many chunks ahead as are in the blocks'
  // hands (each holds two tickets, every other one a first read), so that blocks rarely wait; but no more than a third
  // of L2 holds, since dg passes through it too. A sample that leaves no room for that comes from DRAM twice anyway.
  const int64_t cached = machine.l2_bytes / 3 / (block_words * (plan.wide ? 16 : element_bytes));
  const int64_t room = cached - plan.chunks;
  plan.lag = plan.chunks + (room >= plan.blocks / 4 ? std::min(room, plan.blocks) : plan.blocks);
  plan.zeroed_bytes = 16 + static_cast<size_t>(samples) * 8;
  plan.workspace_bytes = plan.zeroed_bytes + static_cast<size_t>(samples) * sizeof(double) +
                         static_cast<size_t>(total) * sizeof(float);
  return plan;
}

}  // namespace ganexport
