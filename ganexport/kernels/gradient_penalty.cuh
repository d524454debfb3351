// The gradient penalty and its gradient in one pass over the critic's input gradients g [N, …].
//
// s_i = Σ_j g_ij², n_i = sqrt(s_i + eps); penalty = weight · mean_i φ_i and d(penalty)/dg_ij = factor_i · g_ij.
// gradient_penalty_resident: a sample stays in the registers of a team of lanes, a block or a cluster of blocks:
//   g is read once and dg written once. gradient_penalty_split: samples too large for that; every chunk is read
//   again, from L2, after its sample's sum is known. gradient_penalty_backward: dg for another upstream gradient.
// No sum depends on the order in which blocks finish, so results repeat bit for bit.
#pragma once

#include "device.cuh"

namespace ganexport {

enum Kind : int { kTwoSided = 0, kOneSided = 1, kR1 = 2 };

struct PenaltyParameters {
  const void* grad;         // g: sample i begins sample_stride · i elements after it
  void* gradient;           // dg [N, elements], dense; nullptr when only the value is wanted
  float* statistics;        // [N + 2]: s_i, then the weight and the loss scale that dg was made with
  float* penalty;           // [1]
  const float* weight;      // device scalar that multiplies weight_value, or nullptr
  const float* loss_scale;  // device scalar: the upstream gradient that dg is prepared for, or nullptr for 1
  const float* upstream;    // backward only: device scalar
  float weight_value;
  float target;
  float eps;
  int kind;
  int skip_when_prepared;  // backward only: leave dg alone when upstream is what it was made with
  int team;                // resident: lanes a sample, a power of two
  int team_shift;          // its logarithm
  int ranks;               // resident: blocks a cluster, a power of two
  int rank_shift;          // its logarithm
  int64_t samples;
  int64_t words;          // words a sample
  int64_t sample_stride;  // elements
  // Workspace. `counter` is zero before and after each launch.
  double* values;  // resident: Σ φ of each block; split: φ_i
  unsigned* counter;
  // split only
  int64_t chunks;  // a sample
  int64_t lag;     // chunks between a chunk's first and second read
  unsigned long long* tickets;
  unsigned* arrivals;  // [N]
  unsigned* ready;     // [N]
  float* chunk_sums;   // [N · chunks]
};

struct Term {
  float value;  // φ
  float slope;  // dφ/dg_j = slope · g_j
};

__device__ __forceinline__ Term penalty_term(const PenaltyParameters& p, float sum) {
  if (p.kind == kR1) return {0.5f * sum, 1.0f};
  const float norm = sqrtf(sum + p.eps);
  const float excess = norm - p.target;
  // Written so that NaN is never mistaken for "inside the constraint".
  if (p.kind == kOneSided && excess <= 0.0f) return {0.0f, 0.0f};
  float ratio = excess / norm;
  if (norm == 0.0f) ratio = 0.0f;      // only with eps = 0: the subgradient at zero is taken as zero
  if (isinf(norm)) ratio = 1.0f;       // the limit, where the quotient is NaN
  return {excess * excess, 2.0f * ratio};
}

__device__ __forceinline__ float weight_of(const PenaltyParameters& p) {
  return p.weight ? p.weight_value * __ldcg(p.weight) : p.weight_value;
}

__device__ __forceinline__ float loss_scale_of(const PenaltyParameters& p) {
  return p.loss_scale ? __ldcg(p.loss_scale) : 1.0f;
}

// The last of `count` blocks to come here sums all their values, in index order, and writes the penalty.
// `ticket` is thread 0's: how many blocks had published their value before.
__device__ __forceinline__ void write_penalty_if_last(const PenaltyParameters& p, unsigned ticket, int64_t count,
                                                      int64_t entries, float weight, float loss_scale) {
  GANEXPORT_SHARED(bool, is_last);
  if (threadIdx.x == 0) is_last = ticket == static_cast<unsigned>(count - 1);
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < entries; i += blockDim.x) sum += __ldcg(p.values + i);
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  *p.penalty = static_cast<float>(weight * (sum / static_cast<double>(p.samples)));
  p.statistics[p.samples] = weight;
  p.statistics[p.samples + 1] = loss_scale;
  *p.counter = 0;
}

// The words that one thread keeps: `step` apart, those below `remaining` (counted from its first).
template <int Bytes, bool Again = false>
struct Held {
  Word<Bytes> words[kHeld<Bytes>];

  __device__ __forceinline__ Held(const Word<Bytes>* source, int remaining, int step) {
#pragma unroll
    for (int k = 0; k < kHeld<Bytes>; ++k) {
      // Read for the last time: first to leave the cache; but not when it is to be read again.
      if (k * step < remaining) words[k] = Again ? __ldca(source + k * step) : __ldcs(source + k * step);
      else words[k] = Word<Bytes>{};
    }
  }

  template <typename T>
  __device__ __forceinline__ float sum_squares() const {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kHeld<Bytes>; ++k) sum = add_squares<T>(words[k], sum);
    return sum;
  }

  // dg is first to leave L2: it must not push g out, and measured it is 1 to 8% faster than __stwb for large g.
  template <typename T>
  __device__ __forceinline__ void store_scaled(Word<Bytes>* destination, int remaining, int step, float factor) {
#pragma unroll
    for (int k = 0; k < kHeld<Bytes>; ++k) {
      if constexpr (sizeof(T) == 2) keep_packed(words[k]);
      if (k * step >= remaining) continue;
      const Word<Bytes> word = scale_word<T>(words[k], factor);
      __stcs(destination + k * step, word);
    }
  }
};

// One read, one write. Team: a sample belongs to p.team lanes of a warp, whose words lie p.team apart. Otherwise it
// belongs to the cluster; each warp takes a run of words 32 apart, so that one address serves all with constant
// offsets, and the runs go round the cluster's blocks.
template <typename T, int Bytes, bool Team>
__global__ void __launch_bounds__(Team ? kTeamThreads : kMaxThreads, Team ? 3 : 2)
    gradient_penalty_resident(const PenaltyParameters p) {
  const int step = Team ? p.team : kWarp;
  const int lane = static_cast<int>(threadIdx.x) & (step - 1);
  const int rank = !Team && p.ranks > 1 ? static_cast<int>(cluster_rank()) : 0;
  const unsigned group = Team ? blockIdx.x : blockIdx.x >> p.rank_shift;
  int64_t sample = group;
  int first = lane;
  if (Team) sample = (static_cast<int64_t>(group) * blockDim.x + threadIdx.x) >> p.team_shift;
  else first += (static_cast<int>(threadIdx.x) / kWarp * p.ranks + rank) * kWarp * kHeld<Bytes>;
  const bool active = !Team || sample < p.samples;
  if (!active) sample = 0;
  const int remaining = active ? static_cast<int>(p.words) - first : 0;
  const bool leads = active && first == 0;

  const T* start = static_cast<const T*>(p.grad) + sample * p.sample_stride;
  Held<Bytes> held(reinterpret_cast<const Word<Bytes>*>(start) + first, remaining, step);
  const float weight = weight_of(p);
  const float loss_scale = loss_scale_of(p);
  float sum = held.template sum_squares<T>();
  sum = Team ? team_sum(sum, p.team) : block_sum(sum);
  if (!Team && p.ranks > 1) sum = cluster_sum(sum, p.ranks);

  const Term term = penalty_term(p, sum);
  if (leads) p.statistics[sample] = sum;
  double value = leads ? static_cast<double>(term.value) : 0.0;
  if (Team) value = block_sum(value);
  unsigned ticket = 0;
  if (threadIdx.x == 0 && rank == 0) {  // before dg is stored, so that the fence has little to wait for
    p.values[group] = value;
    __threadfence();
    ticket = atomicAdd(p.counter, 1u);
  }
  if (p.gradient) {
    const float factor = term.slope * (weight * loss_scale / static_cast<float>(p.samples));
    auto* destination = reinterpret_cast<Word<Bytes>*>(p.gradient) + sample * p.words + first;
    held.template store_scaled<T>(destination, remaining, step, factor);
  }
  if (rank == 0) {
    const unsigned groups = gridDim.x >> p.rank_shift;
    write_penalty_if_last(p, ticket, groups, groups, weight, loss_scale);
  }
  if (!Team && p.ranks > 1) cluster_wait();
}

// The order of work in the split kernel. Blocks draw tickets, so whatever a ticket waits for has a lower one, is
// already being worked on, and cannot be starved: no launch needs all its blocks on the GPU at once.
struct SplitTask {
  bool second;  // second read: scale and store; else first read: sum
  int64_t chunk;
  __device__ __forceinline__ SplitTask(int64_t ticket, int64_t total, int64_t lag) {
    if (lag > total) lag = total;
    const int64_t turn = ticket - lag;       // after `lag` first reads, second and first reads alternate
    const int64_t pairs = 2 * (total - lag);
    if (turn < 0) {
      second = false, chunk = ticket;
    } else if (turn < pairs) {
      second = turn % 2 == 0, chunk = second ? turn / 2 : lag + turn / 2;
    } else {
      second = true, chunk = total - lag + (turn - pairs);
    }
  }
};

// First read of a chunk: its sum; the last chunk of a sample to arrive makes the sample's sum known.
template <typename T, int Bytes>
__device__ __forceinline__ void sum_chunk(const PenaltyParameters& p, int64_t chunk, int64_t sample,
                                          const Word<Bytes>* source, int remaining) {
  GANEXPORT_SHARED(bool, is_last);
  const Held<Bytes, true> held(source, remaining, kWarp);
  const float sum = block_sum(held.template sum_squares<T>());
  if (threadIdx.x == 0) {
    p.chunk_sums[chunk] = sum;
    __threadfence();
    is_last = atomicAdd(p.arrivals + sample, 1u) == static_cast<unsigned>(p.chunks - 1);
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  double total = 0.0;
  for (int64_t i = threadIdx.x; i < p.chunks; i += blockDim.x) total += __ldcg(p.chunk_sums + sample * p.chunks + i);
  total = block_sum(total);
  if (threadIdx.x == 0) {
    p.statistics[sample] = static_cast<float>(total);
    p.values[sample] = penalty_term(p, static_cast<float>(total)).value;
    __threadfence();
    atomicExch(p.ready + sample, 1u);
  }
}

// Second read of a chunk, from L2 as far as `lag` allows; issued before the wait for the sample's sum.
template <typename T, int Bytes>
__device__ __forceinline__ void scale_chunk(const PenaltyParameters& p, int64_t sample, float scale,
                                            const Word<Bytes>* source, Word<Bytes>* destination, int remaining) {
  GANEXPORT_SHARED(float, factor);
  Held<Bytes> held(source, remaining, kWarp);
  if (threadIdx.x == 0) {
    while (*static_cast<volatile unsigned*>(p.ready + sample) == 0) __nanosleep(64);
    __threadfence();
    factor = penalty_term(p, __ldcg(p.statistics + sample)).slope * scale;
  }
  __syncthreads();
  held.template store_scaled<T>(destination, remaining, kWarp, factor);
}

template <typename T, int Bytes>
__global__ void __launch_bounds__(kMaxThreads, 2) gradient_penalty_split(const PenaltyParameters p) {
  GANEXPORT_SHARED(unsigned long long, shared_ticket);
  const float weight = weight_of(p);
  const float loss_scale = loss_scale_of(p);
  const float scale = weight * loss_scale / static_cast<float>(p.samples);
  const int64_t total = p.samples * p.chunks;
  const int64_t tasks = p.gradient ? 2 * total : total;
  const int64_t lag = p.gradient ? p.lag : total;
  unsigned long long next = threadIdx.x == 0 ? atomicAdd(p.tickets, 1ull) : 0;
  while (true) {
    if (threadIdx.x == 0) shared_ticket = next;
    __syncthreads();
    const int64_t ticket = static_cast<int64_t>(shared_ticket);
    if (ticket >= tasks) break;
    if (threadIdx.x == 0) next = atomicAdd(p.tickets, 1ull);  // drawn early: its latency hides behind this task
    const SplitTask task(ticket, total, lag);
    const int64_t sample = task.chunk / p.chunks;
    const int run = kWarp * kHeld<Bytes>;  // words a warp
    const int64_t first = (task.chunk % p.chunks * (blockDim.x / kWarp) + threadIdx.x / kWarp) * run + threadIdx.x % kWarp;
    const int64_t left = p.words - first;
    const int remaining = left < run ? static_cast<int>(left) : run;
    const T* start = static_cast<const T*>(p.grad) + sample * p.sample_stride;
    const auto* source = reinterpret_cast<const Word<Bytes>*>(start) + first;
    if (task.second) {
      auto* destination = reinterpret_cast<Word<Bytes>*>(p.gradient) + sample * p.words + first;
      scale_chunk<T, Bytes>(p, sample, scale, source, destination, remaining);
    } else {
      sum_chunk<T, Bytes>(p, task.chunk, sample, source, remaining);
    }
    __syncthreads();  // shared memory is used again by the next task
  }
  unsigned arrived = 0;
  if (threadIdx.x == 0) {
    __threadfence();
    arrived = atomicAdd(p.counter, 1u);
  }
  write_penalty_if_last(p, arrived, gridDim.x, p.samples, weight, loss_scale);
}

// dg for an upstream gradient that it wasn't prepared for, from g and the sums; nothing at all when it was.
template <typename T, int Bytes>
__global__ void __launch_bounds__(kMaxThreads) gradient_penalty_backward(const PenaltyParameters p) {
  const float upstream = *p.upstream;
  if (p.skip_when_prepared && upstream == p.statistics[p.samples + 1]) return;
  const float scale = p.statistics[p.samples] * upstream / static_cast<float>(p.samples);
  const int64_t total = p.samples * p.words;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= total) return;
  Cursor cursor(index, p.words);
  for (; index < total; index += step, cursor.advance(step, p.words)) {
    const auto* source =
        reinterpret_cast<const Word<Bytes>*>(static_cast<const T*>(p.grad) + cursor.sample * p.sample_stride);
    const float factor = penalty_term(p, p.statistics[cursor.sample]).slope * scale;
    __stwb(reinterpret_cast<Word<Bytes>*>(p.gradient) + index, scale_word<T>(__ldcs(source + cursor.word), factor));
  }
}

}  // namespace ganexport
