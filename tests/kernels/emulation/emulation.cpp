// The kernels' own source, compiled for the host and launched on the emulated GPU from the same arguments and plans.
#include "cuda_emulation.h"

#include <cstdlib>
// The emulation's names must come first.
#include "gradient_penalty.cuh"
#include "gradient_penalty.h"
#include "interpolation.cuh"
#include "launch.h"
#include "plan.h"

using namespace ganexport;

extern "C" {

struct EmulatedMachine {
  int64_t l2_bytes;
  int32_t multiprocessors, max_cluster, threads_limit, window, seed;
};
struct EmulatedRange {
  uint64_t begin, end;
};
struct EmulatedTraffic {
  uint64_t loaded_bytes, stored_bytes, launches;
};

}  // extern "C"

namespace {

template <typename Function>
int with_dtype(int32_t dtype, Function&& function) {
  if (dtype == 0) return function(float{});
  if (dtype == 1) return function(__half{});
  return function(__nv_bfloat16{});
}

template <typename T>
Plan plan_for(const ganexport_gradient_penalty_arguments& a, const EmulatedMachine& m) {
  const Machine machine{m.multiprocessors, m.max_cluster, m.l2_bytes};
  return make_plan(a.samples, a.elements, sizeof(T), is_aligned(a, sizeof(T)), a.gradient != nullptr, machine,
                   m.threads_limit);
}

template <typename T, int Bytes>
int run_penalty(const ganexport_gradient_penalty_arguments& a, const Plan& plan, int window) {
  const PenaltyParameters p = penalty_parameters(a, plan);
  std::memset(a.workspace, 0, plan.zeroed_bytes);
  return emulation::launch(plan.blocks, plan.threads, plan.ranks, window, [&] {
    if (plan.split) gradient_penalty_split<T, Bytes>(p);
    else if (plan.team) gradient_penalty_resident<T, Bytes, true>(p);
    else gradient_penalty_resident<T, Bytes, false>(p);
  });
}

void prepare(const EmulatedMachine& machine, const EmulatedRange* ranges, int count) {
  auto& state = emulation::state;
  state.random.seed(machine.seed);
  state.readable.clear();
  for (int i = 0; i < count; ++i) state.readable.push_back({ranges[i].begin, ranges[i].end});
  state.loaded_bytes = state.stored_bytes = state.launches = 0;
  state.error = emulation::kNone;
}

int finish(int error, EmulatedTraffic* traffic) {
  *traffic = {emulation::state.loaded_bytes, emulation::state.stored_bytes, emulation::state.launches};
  return error;
}

}  // namespace

extern "C" {

size_t emulated_penalty_arguments_size() { return sizeof(ganexport_gradient_penalty_arguments); }
size_t emulated_interpolate_arguments_size() { return sizeof(ganexport_interpolate_arguments); }

// fields: wide, split, threads, team, ranks, blocks, words, chunks, lag, workspace bytes
void emulated_plan(const ganexport_gradient_penalty_arguments* a, const EmulatedMachine* machine, int64_t* fields) {
  Plan plan{};
  with_dtype(a->dtype, [&](auto element) {
    plan = plan_for<decltype(element)>(*a, *machine);
    return 0;
  });
  const int64_t values[] = {plan.wide, plan.split,  plan.threads, plan.team, plan.ranks,
                            plan.blocks, plan.words, plan.chunks, plan.lag, static_cast<int64_t>(plan.workspace_bytes)};
  std::copy(std::begin(values), std::end(values), fields);
}

int emulated_penalty(const ganexport_gradient_penalty_arguments* a, const EmulatedMachine* machine,
                     const EmulatedRange* ranges, int count, EmulatedTraffic* traffic) {
  prepare(*machine, ranges, count);
  return finish(with_dtype(a->dtype,
                           [&](auto element) {
                             using T = decltype(element);
                             const Plan plan = plan_for<T>(*a, *machine);
                             return plan.wide ? run_penalty<T, 16>(*a, plan, machine->window)
                                              : run_penalty<T, sizeof(T)>(*a, plan, machine->window);
                           }),
                traffic);
}

int emulated_backward(const ganexport_gradient_penalty_arguments* a, const EmulatedMachine* machine,
                      const EmulatedRange* ranges, int count, EmulatedTraffic* traffic) {
  prepare(*machine, ranges, count);
  return finish(with_dtype(a->dtype,
                           [&](auto element) {
                             using T = decltype(element);
                             const Plan plan = plan_for<T>(*a, *machine);
                             const PenaltyParameters p = penalty_parameters(*a, plan);
                             return emulation::launch(3, 64, 1, machine->window, [&] {
                               if (plan.wide) gradient_penalty_backward<T, 16>(p);
                               else gradient_penalty_backward<T, sizeof(T)>(p);
                             });
                           }),
                traffic);
}

int emulated_interpolate(const ganexport_interpolate_arguments* a, const EmulatedMachine* machine,
                         const EmulatedRange* ranges, int count, EmulatedTraffic* traffic) {
  prepare(*machine, ranges, count);
  return finish(with_dtype(a->dtype,
                           [&](auto element) {
                             using T = decltype(element);
                             const bool wide = is_aligned(*a, sizeof(T));
                             const auto p = interpolation_parameters(*a, wide ? 16 / sizeof(T) : 1);
                             const int64_t tile = kInterpolationThreads * kInterpolationWords;
                             return emulation::launch(divide_up(a->samples * p.words, tile), kInterpolationThreads, 1,
                                                      machine->window, [&] {
                                                        if (wide) interpolate<T, 16>(p);
                                                        else interpolate<T, sizeof(T)>(p);
                                                      });
                           }),
                traffic);
}

}  // extern "C"

// The library's own C interface on the emulated GPU, "device" pointers being host pointers: for the Python side's tests.
namespace {
const EmulatedMachine kMachine{1 << 16, 4, 4, 64, 3, 0};
const EmulatedRange kEverywhere{0, UINT64_MAX};
EmulatedTraffic traffic;
}  // namespace

extern "C" {

int ganexport_kernels_counters(int32_t, size_t count, uint32_t** counters) {
  *counters = static_cast<uint32_t*>(std::calloc(count, sizeof(uint32_t)));
  return 0;
}

int ganexport_gradient_penalty_workspace(const ganexport_gradient_penalty_arguments* a, int64_t* bytes) {
  int64_t fields[10];
  emulated_plan(a, &kMachine, fields);
  *bytes = fields[9];
  return 0;
}

int ganexport_gradient_penalty(const ganexport_gradient_penalty_arguments* a, void*) {
  return emulated_penalty(a, &kMachine, &kEverywhere, 1, &traffic);
}

int ganexport_gradient_penalty_backward(const ganexport_gradient_penalty_arguments* a, void*) {
  return emulated_backward(a, &kMachine, &kEverywhere, 1, &traffic);
}

int ganexport_interpolate(const ganexport_interpolate_arguments* a, void*) {
  return emulated_interpolate(a, &kMachine, &kEverywhere, 1, &traffic);
}

}  // extern "C"
