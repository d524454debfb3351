"""The kernels as torch operators: CUDA, CPU and fake implementations, and the autograd formula.

``ganexport::gradient_penalty`` returns the penalty together with its gradient, made in the same pass for the
upstream gradient ``loss_scale`` (1 when absent). The backward hands that gradient over as it is; whether the
upstream gradient really has that value is decided on the device, and only if not is it computed again, from g.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ganexport.kernels import _launch
from ganexport.kernels._launch import empty_gradient
from ganexport.kernels._reference import gradient_norms, sample_epsilon, square_sums

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("two-sided", "one-sided", "r1")  # the index is the kernel's code

torch.library.define(
    "ganexport::gradient_penalty",
    "(Tensor grad, Tensor? weight, Tensor? loss_scale, float weight_value, int kind, float target, float eps, "
    "bool needs_gradient) -> (Tensor penalty, Tensor gradient, Tensor statistics)",
)
torch.library.define(
    "ganexport::gradient_penalty_backward",
    "(Tensor grad, Tensor statistics, Tensor upstream, int kind, float target, float eps) -> Tensor",
)
torch.library.define(
    "ganexport::interpolate", "(Tensor real, Tensor fake, Tensor(a!) rng_state) -> (Tensor output, Tensor epsilon)"
)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[N] as [N, 1, …], to be multiplied with ``like`` [N, …]."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _slopes(sums: Tensor, kind: int, target: float, eps: float) -> Tensor:
    """[N]: dφ_i/dg_i = slope_i · g_i. Differentiable with respect to ``sums``."""
    if KINDS[kind] == "r1":
        return torch.ones_like(sums)
    norms = gradient_norms(sums, eps)  # [N]
    zero = norms == 0  # [N]
    slopes = 2 * (norms - target) / torch.where(zero, 1.0, norms)  # [N]
    slopes = torch.where(zero, 0.0, torch.where(norms.isinf(), 2.0, slopes))  # [N]
    return torch.where(norms <= target, 0.0, slopes) if KINDS[kind] == "one-sided" else slopes


def _gradient(grad: Tensor, sums: Tensor, factor: Tensor, kind: int, target: float, eps: float) -> Tensor:
    """d(penalty)/d(grad) [N, …], with ``factor`` [] = weight · upstream gradient."""
    factors = _slopes(sums, kind, target, eps) * (factor / grad.shape[0])  # [N]
    return (grad.to(factors.dtype) * _per_sample(factors, grad)).to(grad.dtype)  # [N, …]


@torch.library.impl("ganexport::gradient_penalty", "CPU")
def _penalty_cpu(
    grad: Tensor,
    weight: Tensor | None,
    loss_scale: Tensor | None,
    weight_value: float,
    kind: int,
    target: float,
    eps: float,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sums = square_sums(grad)  # [N]
    one = sums.new_ones(())  # []
    total_weight = weight_value * (one if weight is None else weight.to(sums.dtype).view(()))  # []
    scale = one if loss_scale is None else loss_scale.to(sums.dtype).view(())  # []
    if KINDS[kind] == "r1":
        values = sums / 2  # [N]
    else:
        excess = gradient_norms(sums, eps) - target  # [N]
        values = (excess.clamp_min(0) if KINDS[kind] == "one-sided" else excess).square()  # [N]
    gradient = grad.new_empty(0)  # [0]
    if needs_gradient:
        gradient = empty_gradient(grad)  # [N, …]
        gradient.copy_(_gradient(grad, sums, total_weight * scale, kind, target, eps))
    statistics = torch.cat([sums, torch.stack([total_weight, scale])])  # [N + 2]
    return total_weight * values.mean(), gradient, statistics


@torch.library.impl("ganexport::gradient_penalty", "CUDA")
def _penalty_cuda(
    grad: Tensor,
    weight: Tensor | None,
    loss_scale: Tensor | None,
    weight_value: float,
    kind: int,
    target: float,
    eps: float,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = {"weight_value": weight_value, "kind": kind, "target": target, "eps": eps}
    return _launch.penalty(grad, weight, loss_scale, settings, needs_gradient=needs_gradient)


@torch.library.register_fake("ganexport::gradient_penalty")
def _penalty_fake(
    grad: Tensor,
    weight: Tensor | None,
    loss_scale: Tensor | None,
    weight_value: float,
    kind: int,
    target: float,
    eps: float,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(grad.dtype)
    gradient = empty_gradient(grad) if needs_gradient else grad.new_empty(0)
    return grad.new_empty((), dtype=wide), gradient, grad.new_empty(grad.shape[0] + 2, dtype=wide)


@torch.library.impl("ganexport::gradient_penalty_backward", "CPU")
def _backward_cpu(grad: Tensor, statistics: Tensor, upstream: Tensor, kind: int, target: float, eps: float) -> Tensor:
    gradient = empty_gradient(grad)  # [N, …]
    return gradient.copy_(_gradient(grad, statistics[:-2], statistics[-2] * upstream, kind, target, eps))


@torch.library.impl("ganexport::gradient_penalty_backward", "CUDA")
def _backward_cuda(grad: Tensor, statistics: Tensor, upstream: Tensor, kind: int, target: float, eps: float) -> Tensor:
    return _launch.backward(grad, statistics, upstream, {"kind": kind, "target": target, "eps": eps})


@torch.library.register_fake("ganexport::gradient_penalty_backward")
def _backward_fake(
    grad: Tensor,
    statistics: Tensor,
    upstream: Tensor,
    kind: int,
    target: float,
    eps: float,
) -> Tensor:
    return empty_gradient(grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    grad, _, _, _, kind, target, eps, needs_gradient = inputs
    _, gradient, statistics = output
    ctx.mark_non_differentiable(gradient, statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, statistics)
    # Not a saved tensor: it is given away once, to the first backward, and then belongs to whoever received it.
    ctx.prepared = gradient if needs_gradient else None
    ctx.settings = {"kind": kind, "target": target, "eps": eps}


def _backward(ctx: Any, upstream: Tensor | None, _gradient_upstream: None, _statistics_upstream: None) -> Any:
    nothing = (None,) * 7
    if upstream is None or not ctx.needs_input_grad[0]:
        return None, *nothing
    grad, statistics = ctx.saved_tensors
    prepared, ctx.prepared = ctx.prepared, None
    if torch.is_grad_enabled():  # create_graph=True: in differentiable operations
        factor = statistics[-2] * upstream  # []
        return _gradient(grad, square_sums(grad), factor, **ctx.settings), *nothing
    if prepared is None:  # a second backward through the same graph, or a forward that wasn't asked for it
        return torch.ops.ganexport.gradient_penalty_backward(grad, statistics, upstream, **ctx.settings), *nothing
    if type(prepared) is not torch.Tensor:  # being traced: as an expression, which a compiler fuses with what follows
        factors = upstream / statistics[-1]  # []
        return (prepared.to(factors.dtype) * factors).to(prepared.dtype), *nothing
    if prepared.device.type == "cuda":
        return _launch.backward(grad, statistics, upstream, ctx.settings, prepared=prepared), *nothing
    if torch.equal(upstream, statistics[-1]):
        return prepared, *nothing
    return torch.ops.ganexport.gradient_penalty_backward(grad, statistics, upstream, **ctx.settings), *nothing


torch.library.register_autograd("ganexport::gradient_penalty", _backward, setup_context=_setup_context)


@torch.library.impl("ganexport::interpolate", "CPU")
def _interpolate_cpu(real: Tensor, fake: Tensor, rng_state: Tensor) -> tuple[Tensor, Tensor]:
    epsilon = sample_epsilon(rng_state, fake.shape[0])  # [N]
    rng_state[1] += 1
    wide = _wide(fake.dtype)
    mixed = torch.lerp(fake.to(wide), real.to(wide), _per_sample(epsilon.to(wide), fake))  # [N, …]
    return empty_gradient(fake).copy_(mixed), epsilon


@torch.library.impl("ganexport::interpolate", "CUDA")
def _interpolate_cuda(real: Tensor, fake: Tensor, rng_state: Tensor) -> tuple[Tensor, Tensor]:
    return _launch.interpolate(real, fake, rng_state)


@torch.library.register_fake("ganexport::interpolate")
def _interpolate_fake(real: Tensor, fake: Tensor, rng_state: Tensor) -> tuple[Tensor, Tensor]:
    return empty_gradient(fake), fake.new_empty(fake.shape[0], dtype=torch.float32)
