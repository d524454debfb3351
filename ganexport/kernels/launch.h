// From the C interface's arguments to the kernels' parameters. Shared by the launches and the tests' emulation.
#pragma once

#include "gradient_penalty.h"
#include "plan.h"

namespace ganexport {

inline bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline bool is_aligned(const ganexport_gradient_penalty_arguments& a, int element_bytes) {
  return on_16_bytes(a.grad) && on_16_bytes(a.gradient) && a.sample_stride * element_bytes % 16 == 0;
}

inline bool is_aligned(const ganexport_interpolate_arguments& a, int element_bytes) {
  return on_16_bytes(a.real) && on_16_bytes(a.fake) && on_16_bytes(a.output) && a.elements * element_bytes % 16 == 0;
}

inline PenaltyParameters penalty_parameters(const ganexport_gradient_penalty_arguments& a, const Plan& plan) {
  PenaltyParameters p{};
  p.grad = a.grad;
  p.gradient = a.gradient;
  p.statistics = a.statistics;
  p.penalty = a.penalty;
  p.weight = a.weight;
  p.loss_scale = a.loss_scale;
  p.upstream = a.upstream;
  p.weight_value = a.weight_value;
  p.target = a.target;
  p.eps = a.eps;
  p.kind = a.kind;
  p.skip_when_prepared = a.skip_when_prepared;
  p.team = plan.team;
  p.ranks = plan.ranks;
  while (1 << p.team_shift < p.team) ++p.team_shift;
  while (1 << p.rank_shift < p.ranks) ++p.rank_shift;
  p.samples = a.samples;
  p.words = plan.words;
  p.sample_stride = a.sample_stride;
  p.counter = a.counter;
  p.values = static_cast<double*>(a.workspace);
  if (plan.split) {
    auto* bytes = static_cast<unsigned char*>(a.workspace);
    p.tickets = reinterpret_cast<unsigned long long*>(bytes);
    p.arrivals = reinterpret_cast<unsigned*>(bytes + 16);
    p.ready = p.arrivals + a.samples;
    p.values = reinterpret_cast<double*>(bytes + plan.zeroed_bytes);
    p.chunk_sums = reinterpret_cast<float*>(p.values + a.samples);
    p.chunks = plan.chunks;
    p.lag = plan.lag;
  }
  return p;
}

inline InterpolationParameters interpolation_parameters(const ganexport_interpolate_arguments& a, int word_elements) {
  return {a.real, a.fake, a.output, a.epsilon, a.rng_state, a.counter, a.samples, a.elements / word_elements};
}

}  // namespace ganexport
