// What every kernel here stands on: words of elements, reductions over teams of threads, thread block clusters.
//
// The same source is compiled by nvcc for the GPU and, in the tests, by a host compiler under an emulation of
// blocks, warps and clusters that supplies the CUDA names used here; hence the few GANEXPORT_ macros.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define GANEXPORT_SHARED(type, name) __shared__ type name
#endif

namespace ganexport {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;
constexpr int kTeamThreads = 256;  // most threads of a block that holds several samples
constexpr int kMaxCluster = 16;
constexpr unsigned kAllLanes = 0xffffffffu;

// A word is what one thread loads or stores at once: 16 bytes where everything is aligned, else one element.
template <int Bytes>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <int Bytes>
using Word = typename WordOf<Bytes>::type;

// Words that one thread keeps in registers. 8 of 16 bytes are 32 registers: with 512 threads, 64 KiB a block and
// two blocks a multiprocessor within 64 registers a thread.
template <int Bytes>
constexpr int kHeld = Bytes == 16 ? 8 : 16;

// Elements travel in 32-bit lanes: one float, or two halves of which the upper is zero in a 2-byte word.
template <typename T>
struct Lane;

template <>
struct Lane<float> {
  static __device__ __forceinline__ float2 decode(uint32_t bits) { return make_float2(__uint_as_float(bits), 0.0f); }
  static __device__ __forceinline__ uint32_t encode(float2 value) { return __float_as_uint(value.x); }
};

template <>
struct Lane<__half> {
  static __device__ __forceinline__ float2 decode(uint32_t bits) {
    return make_float2(__half2float(__ushort_as_half(static_cast<unsigned short>(bits & 0xffffu))),
                       __half2float(__ushort_as_half(static_cast<unsigned short>(bits >> 16))));
  }
  static __device__ __forceinline__ uint32_t encode(float2 value) {
    const __half2 packed = __floats2half2_rn(value.x, value.y);
    return *reinterpret_cast<const uint32_t*>(&packed);
  }
};

template <>
struct Lane<__nv_bfloat16> {
  static __device__ __forceinline__ float2 decode(uint32_t bits) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  }
  static __device__ __forceinline__ uint32_t encode(float2 value) {
    const __nv_bfloat162 packed = __floats2bfloat162_rn(value.x, value.y);
    return *reinterpret_cast<const uint32_t*>(&packed);
  }
};

// Apply an operation on lanes to one word, or to two words of the same place in two tensors.
template <typename Operation>
__device__ __forceinline__ uint4 map_lanes(uint4 a, uint4 b, Operation&& operation) {
  return make_uint4(operation(a.x, b.x), operation(a.y, b.y), operation(a.z, b.z), operation(a.w, b.w));
}
template <typename Operation>
__device__ __forceinline__ uint32_t map_lanes(uint32_t a, uint32_t b, Operation&& operation) {
  return operation(a, b);
}
template <typename Operation>
__device__ __forceinline__ uint16_t map_lanes(uint16_t a, uint16_t b, Operation&& operation) {
  return static_cast<uint16_t>(operation(static_cast<uint32_t>(a), static_cast<uint32_t>(b)));
}

// Σ x² over the elements of a word, added to `sum`.
template <typename T, typename W>
__device__ __forceinline__ float add_squares(W word, float sum) {
  map_lanes(word, word, [&sum](uint32_t bits, uint32_t) {
    const float2 value = Lane<T>::decode(bits);
    sum = fmaf(value.x, value.x, sum);
    if constexpr (sizeof(T) == 2) sum = fmaf(value.y, value.y, sum);
    return bits;
  });
  return sum;
}

template <typename T, typename W>
__device__ __forceinline__ W scale_word(W word, float factor) {
  return map_lanes(word, word, [factor](uint32_t bits, uint32_t) {
    const float2 value = Lane<T>::decode(bits);
    return Lane<T>::encode(make_float2(factor * value.x, factor * value.y));
  });
}

// Makes the compiler forget what it derived from a word, so that across a reduction it keeps the packed word and not
// its decoded elements, which take twice the registers and spill.
template <typename W>
__device__ __forceinline__ void keep_packed(W& word) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(W) == 16) {
    asm volatile("" : "+r"(word.x), "+r"(word.y), "+r"(word.z), "+r"(word.w));
  } else if constexpr (sizeof(W) == 2) {
    asm volatile("" : "+h"(word));
  }
#else
  (void)word;
#endif
}

// Butterfly sum over `width` neighbouring lanes (a power of two): a fixed order, the same bits in every lane.
template <typename V>
__device__ __forceinline__ V team_sum(V value, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// Sum over the block, in every thread. Ends with a barrier passed by all, so it can be called again at once.
template <typename V>
__device__ __forceinline__ V block_sum(V value) {
  using Slots = V[kMaxThreads / kWarp];
  GANEXPORT_SHARED(Slots, slots);
  const int lane = threadIdx.x % kWarp;
  value = team_sum(value, kWarp);
  if (lane == 0) slots[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = lane < static_cast<int>(blockDim.x / kWarp) ? slots[lane] : V(0);
  value = team_sum(value, kMaxThreads / kWarp);
  __syncthreads();
  return __shfl_sync(kAllLanes, value, 0);
}

// Thread block clusters (compute capability 9.0 and up); elsewhere a cluster is one block and nothing is compiled.
#if defined(__CUDACC__)
__device__ __forceinline__ unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().block_rank();
#else
  return 0;
#endif
}
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();  // the instruction wants whole warps
  cooperative_groups::this_cluster().barrier_arrive();
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  cooperative_groups::this_cluster().barrier_wait();
#endif
}
__device__ __forceinline__ float load_from_rank(float* shared, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  return *cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
  return rank == 0 ? *shared : 0.0f;
#endif
}
#endif

// Sum over the cluster of a value that each block has in all its threads. The caller must call cluster_wait()
// before it returns: until then other blocks may still read this one's shared memory.
__device__ __forceinline__ float cluster_sum(float block_value, int ranks) {
  GANEXPORT_SHARED(float, shared_value);
  if (threadIdx.x == 0) shared_value = block_value;
  cluster_arrive();
  cluster_wait();
  const int lane = threadIdx.x % kWarp;
  float value = lane < ranks ? load_from_rank(&shared_value, lane) : 0.0f;
  value = team_sum(value, kMaxCluster);
  cluster_arrive();
  return __shfl_sync(kAllLanes, value, 0);
}

// Position of a word in a batch of samples, moved on without a division as long as it stays in the sample.
struct Cursor {
  int64_t sample;
  int64_t word;
  __device__ __forceinline__ Cursor(int64_t index, int64_t words) : sample(index / words), word(index % words) {}
  __device__ __forceinline__ void advance(int64_t step, int64_t words) {
    word += step;
    if (word >= words) {
      sample += word / words;
      word %= words;
    }
  }
};

}  // namespace ganexport
