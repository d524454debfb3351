// The C interface of libganexport_kernels: raw pointers, sizes and a stream; nothing of torch.
//
// Functions return 0 or a CUDA error code (see ganexport_kernels_error). All pointers but the arguments' own are
// device pointers; nothing is allocated or synchronised, so everything can be captured into a CUDA graph.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GANEXPORT_ABI_VERSION 1

typedef struct {
  const void* grad;         // g [N, …]: sample i begins sample_stride · i elements after it, its elements are dense
  void* gradient;           // dg [N, elements], dense; NULL when only the value is wanted
  float* statistics;        // [N + 2]: s_i, weight, loss scale; written by the penalty, read by its backward
  float* penalty;           // [1]
  const float* weight;      // device scalar multiplying weight_value, or NULL
  const float* loss_scale;  // device scalar: the upstream gradient that dg is prepared for, or NULL for 1
  const float* upstream;    // backward only: device scalar
  void* workspace;          // ganexport_gradient_penalty_workspace() bytes, aligned to 16
  uint32_t* counter;        // zero before and after each launch
  int64_t samples;
  int64_t elements;       // a sample
  int64_t sample_stride;  // elements
  float weight_value;
  float target;
  float eps;
  int32_t kind;                // 0 two-sided, 1 one-sided, 2 R1
  int32_t dtype;               // 0 float32, 1 float16, 2 bfloat16
  int32_t device;              // CUDA ordinal
  int32_t skip_when_prepared;  // backward only: leave dg alone when upstream is what it was made with
} ganexport_gradient_penalty_arguments;

typedef struct {
  const void* real;  // [N, elements], dense, real and fake in the same order
  const void* fake;
  void* output;
  float* epsilon;      // [N]
  int64_t* rng_state;  // [2]: seed, offset; the offset is advanced by one
  uint32_t* counter;   // zero before and after each launch
  int64_t samples;
  int64_t elements;
  int32_t dtype;
  int32_t device;
} ganexport_interpolate_arguments;

int ganexport_kernels_abi_version(void);
const char* ganexport_kernels_architectures(void);  // as CMAKE_CUDA_ARCHITECTURES, separated by commas
const char* ganexport_kernels_error(int code);
size_t ganexport_gradient_penalty_arguments_size(void);
size_t ganexport_interpolate_arguments_size(void);

// 0 when the library holds code that `device` can run.
int ganexport_kernels_check_device(int32_t device);
// `count` zeroed counters that live as long as the process. Allocates: never call it during a stream capture.
int ganexport_kernels_counters(int32_t device, size_t count, uint32_t** counters);

int ganexport_gradient_penalty_workspace(const ganexport_gradient_penalty_arguments* arguments, int64_t* bytes);
int ganexport_gradient_penalty(const ganexport_gradient_penalty_arguments* arguments, void* stream);
int ganexport_gradient_penalty_backward(const ganexport_gradient_penalty_arguments* arguments, void* stream);
int ganexport_interpolate(const ganexport_interpolate_arguments* arguments, void* stream);

#ifdef __cplusplus
}
#endif
