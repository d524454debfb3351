// Launches of the kernels behind the C interface of gradient_penalty.h.
#include "gradient_penalty.cuh"

#include <atomic>

#include "gradient_penalty.h"
#include "interpolation.cuh"
#include "launch.h"
#include "plan.h"

#define GANEXPORT_EXPORT extern "C" __attribute__((visibility("default")))

namespace ganexport {
namespace {

#define GANEXPORT_TRY(call)                                  \
  do {                                                       \
    const cudaError_t error_ = (call);                       \
    if (error_ != cudaSuccess) return static_cast<int>(error_); \
  } while (0)

// Makes a device current for one call, then the caller's again. Meanwhile the first use of a kernel, which loads it,
// is allowed even if this thread is capturing a graph.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cudaThreadExchangeStreamCaptureMode(&mode_);
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess && previous_ != device) {
      status_ = cudaSetDevice(device);
      changed_ = status_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
    cudaThreadExchangeStreamCaptureMode(&mode_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int previous_ = 0;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
  bool changed_ = false;
  cudaError_t status_ = cudaSuccess;
};

cudaLaunchConfig_t launch_config(int64_t blocks, int threads, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return config;
}

// Largest cluster of full blocks that fits this device, 1 where the code that was loaded has no cluster support.
template <typename T, int Bytes>
int max_cluster(int device) {
  static std::atomic<int> known[64];  // 0: not asked yet
  const bool kept = device < 64;
  if (kept && known[device].load() > 0) return known[device].load();
  int largest = 1, supported = 0;
  const auto kernel = gradient_penalty_resident<T, Bytes, false>;
  cudaFuncAttributes attributes{};
  cudaDeviceGetAttribute(&supported, cudaDevAttrClusterLaunch, device);
  if (supported && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    for (int ranks = kMaxCluster; ranks > 1 && largest == 1; ranks /= 2) {
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(ranks), 1, 1};
      cudaLaunchConfig_t config = launch_config(ranks, kMaxThreads, nullptr);
      config.attrs = &attribute;
      config.numAttrs = 1;
      int clusters = 0;
      if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0) largest = ranks;
    }
  }
  cudaGetLastError();  // a refused question is an answer here, not an error of the next launch
  if (kept) known[device].store(largest);
  return largest;
}

template <typename T>
int plan_for(const ganexport_gradient_penalty_arguments& a, Plan* plan) {
  Machine machine{};
  int l2_bytes = 0;
  GANEXPORT_TRY(cudaDeviceGetAttribute(&machine.multiprocessors, cudaDevAttrMultiProcessorCount, a.device));
  GANEXPORT_TRY(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, a.device));
  machine.l2_bytes = l2_bytes;
  const bool aligned = is_aligned(a, sizeof(T));
  const bool wide = aligned && a.elements * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  machine.max_cluster = wide ? max_cluster<T, 16>(a.device) : max_cluster<T, sizeof(T)>(a.device);
  *plan = make_plan(a.samples, a.elements, sizeof(T), aligned, a.gradient != nullptr, machine);
  return plan->blocks > INT32_MAX ? static_cast<int>(cudaErrorInvalidConfiguration) : 0;
}

template <typename T, int Bytes>
int launch_penalty(const ganexport_gradient_penalty_arguments& a, const Plan& plan, cudaStream_t stream) {
  const PenaltyParameters parameters = penalty_parameters(a, plan);
  cudaLaunchConfig_t config = launch_config(plan.blocks, plan.threads, stream);
  if (plan.split) {
    GANEXPORT_TRY(cudaMemsetAsync(a.workspace, 0, plan.zeroed_bytes, stream));
    return cudaLaunchKernelEx(&config, gradient_penalty_split<T, Bytes>, parameters);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(plan.ranks), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = plan.ranks > 1 ? 1 : 0;
  if (plan.team) return cudaLaunchKernelEx(&config, gradient_penalty_resident<T, Bytes, true>, parameters);
  return cudaLaunchKernelEx(&config, gradient_penalty_resident<T, Bytes, false>, parameters);
}

template <typename T>
int penalty(const ganexport_gradient_penalty_arguments& a, cudaStream_t stream) {
  Plan plan;
  if (const int error = plan_for<T>(a, &plan)) return error;
  return plan.wide ? launch_penalty<T, 16>(a, plan, stream) : launch_penalty<T, sizeof(T)>(a, plan, stream);
}

template <typename T>
int backward(const ganexport_gradient_penalty_arguments& a, cudaStream_t stream) {
  Plan plan;
  if (const int error = plan_for<T>(a, &plan)) return error;
  int multiprocessors = 0;
  GANEXPORT_TRY(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, a.device));
  const PenaltyParameters parameters = penalty_parameters(a, plan);
  const int64_t blocks = std::min<int64_t>(divide_up(a.samples * plan.words, kMaxThreads), 4LL * multiprocessors);
  cudaLaunchConfig_t config = launch_config(blocks, kMaxThreads, stream);
  return plan.wide ? cudaLaunchKernelEx(&config, gradient_penalty_backward<T, 16>, parameters)
                   : cudaLaunchKernelEx(&config, gradient_penalty_backward<T, sizeof(T)>, parameters);
}

template <typename T>
int interpolation(const ganexport_interpolate_arguments& a, cudaStream_t stream) {
  const bool wide = is_aligned(a, sizeof(T));
  const InterpolationParameters parameters = interpolation_parameters(a, wide ? 16 / sizeof(T) : 1);
  const int64_t tile = kInterpolationThreads * kInterpolationWords;
  const int64_t blocks = divide_up(a.samples * parameters.words, tile);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = launch_config(blocks, kInterpolationThreads, stream);
  return wide ? cudaLaunchKernelEx(&config, interpolate<T, 16>, parameters)
              : cudaLaunchKernelEx(&config, interpolate<T, sizeof(T)>, parameters);
}

// Calls `function` with a value of the element type that `dtype` names.
template <typename Function>
int with_dtype(int32_t dtype, Function&& function) {
  switch (dtype) {
    case 0:
      return function(float{});
    case 1:
      return function(__half{});
    case 2:
      return function(__nv_bfloat16{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace ganexport

GANEXPORT_EXPORT int ganexport_kernels_abi_version(void) { return GANEXPORT_ABI_VERSION; }
GANEXPORT_EXPORT const char* ganexport_kernels_architectures(void) { return GANEXPORT_ARCHITECTURES; }
GANEXPORT_EXPORT const char* ganexport_kernels_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
GANEXPORT_EXPORT size_t ganexport_gradient_penalty_arguments_size(void) {
  return sizeof(ganexport_gradient_penalty_arguments);
}
GANEXPORT_EXPORT size_t ganexport_interpolate_arguments_size(void) { return sizeof(ganexport_interpolate_arguments); }

GANEXPORT_EXPORT int ganexport_kernels_check_device(int32_t device) {
  const ganexport::DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, ganexport::gradient_penalty_resident<float, 16, true>);
  cudaGetLastError();
  return error;
}

GANEXPORT_EXPORT int ganexport_kernels_counters(int32_t device, size_t count, uint32_t** counters) {
  const ganexport::DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  GANEXPORT_TRY(cudaMalloc(reinterpret_cast<void**>(counters), count * sizeof(uint32_t)));
  GANEXPORT_TRY(cudaMemset(*counters, 0, count * sizeof(uint32_t)));
  return cudaDeviceSynchronize();
}

GANEXPORT_EXPORT int ganexport_gradient_penalty_workspace(const ganexport_gradient_penalty_arguments* arguments,
                                                          int64_t* bytes) {
  const ganexport::DeviceGuard guard(arguments->device);
  if (guard.status() != cudaSuccess) return guard.status();
  ganexport::Plan plan;
  const int error = ganexport::with_dtype(
      arguments->dtype, [&](auto element) { return ganexport::plan_for<decltype(element)>(*arguments, &plan); });
  if (error == 0) *bytes = static_cast<int64_t>(plan.workspace_bytes);
  return error;
}

GANEXPORT_EXPORT int ganexport_gradient_penalty(const ganexport_gradient_penalty_arguments* arguments, void* stream) {
  const ganexport::DeviceGuard guard(arguments->device);
  if (guard.status() != cudaSuccess) return guard.status();
  return ganexport::with_dtype(arguments->dtype, [&](auto element) {
    return ganexport::penalty<decltype(element)>(*arguments, static_cast<cudaStream_t>(stream));
  });
}

GANEXPORT_EXPORT int ganexport_gradient_penalty_backward(const ganexport_gradient_penalty_arguments* arguments,
                                                         void* stream) {
  const ganexport::DeviceGuard guard(arguments->device);
  if (guard.status() != cudaSuccess) return guard.status();
  return ganexport::with_dtype(arguments->dtype, [&](auto element) {
    return ganexport::backward<decltype(element)>(*arguments, static_cast<cudaStream_t>(stream));
  });
}

GANEXPORT_EXPORT int ganexport_interpolate(const ganexport_interpolate_arguments* arguments, void* stream) {
  const ganexport::DeviceGuard guard(arguments->device);
  if (guard.status() != cudaSuccess) return guard.status();
  return ganexport::with_dtype(arguments->dtype, [&](auto element) {
    return ganexport::interpolation<decltype(element)>(*arguments, static_cast<cudaStream_t>(stream));
  });
}
