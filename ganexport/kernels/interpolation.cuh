// x̂ = fake + ε_i (real - fake) with one uniform ε_i a sample, drawn in the kernel from a counter.
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): key = seed, counter =
// (sample index, offset). Seed and offset are read from device memory and the offset is advanced there, so a
// replayed CUDA graph draws anew and a compiled one has nothing to bake in.
#pragma once

#include "device.cuh"

namespace ganexport {

constexpr int kInterpolationThreads = 256;
constexpr int kInterpolationWords = 4;  // a thread

struct InterpolationParameters {
  const void* real;  // [N, elements], dense, both in the same order
  const void* fake;
  void* output;
  float* epsilon;      // [N]
  int64_t* rng_state;  // [2]: seed, offset
  unsigned* counter;   // zero before and after each launch
  int64_t samples;
  int64_t words;  // words a sample
};

__device__ __forceinline__ float philox_uniform(uint64_t seed, uint64_t offset, uint64_t index) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32);
  uint32_t c2 = static_cast<uint32_t>(offset), c3 = static_cast<uint32_t>(offset >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return static_cast<float>(c0 >> 8) * 0x1p-24f;  // 24 bits: exact in float32, in [0, 1)
}

template <typename T, int Bytes>
__global__ void __launch_bounds__(kInterpolationThreads) interpolate(const InterpolationParameters p) {
  const uint64_t seed = static_cast<uint64_t>(p.rng_state[0]);
  const uint64_t offset = static_cast<uint64_t>(p.rng_state[1]);
  const int64_t total = p.samples * p.words;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kInterpolationThreads * kInterpolationWords + threadIdx.x;
  const auto* real = static_cast<const Word<Bytes>*>(p.real);
  const auto* fake = static_cast<const Word<Bytes>*>(p.fake);
  Word<Bytes> from[kInterpolationWords], to[kInterpolationWords];
#pragma unroll
  for (int k = 0; k < kInterpolationWords; ++k) {
    const int64_t index = begin + k * kInterpolationThreads;
    from[k] = index < total ? __ldcs(fake + index) : Word<Bytes>{};
    to[k] = index < total ? __ldcs(real + index) : Word<Bytes>{};
  }
  Cursor cursor(begin, p.words);
  int64_t drawn_for = cursor.sample;
  float epsilon = philox_uniform(seed, offset, drawn_for);
#pragma unroll
  for (int k = 0; k < kInterpolationWords; ++k, cursor.advance(kInterpolationThreads, p.words)) {
    const int64_t index = begin + k * kInterpolationThreads;
    if (index >= total) break;
    if (cursor.sample != drawn_for) {
      drawn_for = cursor.sample;
      epsilon = philox_uniform(seed, offset, drawn_for);
    }
    if (cursor.word == 0) p.epsilon[cursor.sample] = epsilon;
    const Word<Bytes> word = map_lanes(from[k], to[k], [epsilon](uint32_t fake_bits, uint32_t real_bits) {
      const float2 a = Lane<T>::decode(fake_bits), b = Lane<T>::decode(real_bits);
      return Lane<T>::encode(make_float2(fmaf(epsilon, b.x - a.x, a.x), fmaf(epsilon, b.y - a.y, a.y)));
    });
    __stwb(static_cast<Word<Bytes>*>(p.output) + index, word);
  }
  __syncthreads();  // every thread of this block has read the state
  if (threadIdx.x != 0) return;
  __threadfence();
  if (atomicAdd(p.counter, 1u) == gridDim.x - 1) {
    p.rng_state[1] = static_cast<int64_t>(offset + 1);
    *p.counter = 0;
  }
}

}  // namespace ganexport
