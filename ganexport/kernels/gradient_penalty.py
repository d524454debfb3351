"""The gradient penalty of a critic and the interpolation it is taken at, fused on CUDA, plain torch elsewhere.

The critic's per-sample input gradients go in, the penalty comes out as a scalar that can be differentiated::

    images = interpolate(real, fake, rng_state)
    grad = torch.func.grad(lambda x: critic(x).sum())(images)
    (loss + gradient_penalty(grad, kind="two-sided", weight=10.0)).backward()
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ganexport.errors import BackendUnavailableError, UsageError, unknown_name
from ganexport.kernels._reference import gradient_penalty_reference, interpolate_reference

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["gradient_penalty", "gradient_penalty_reference", "interpolate", "interpolate_reference", "make_rng_state"]

KINDS = ("two-sided", "one-sided", "r1")
IMPLEMENTATIONS = ("auto", "cuda", "reference")


def gradient_penalty(
    grad: Tensor,
    *,
    kind: str = "two-sided",
    weight: float | Tensor,
    target: float = 1.0,
    eps: float = 1e-12,
    loss_scale: float | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Penalty on the norms of a critic's per-sample input gradients."""
    _check(grad, kind, impl)
    if impl == "cuda":
        raise BackendUnavailableError("the CUDA gradient penalty is not available")
    return gradient_penalty_reference(
        grad, kind=kind, weight=weight, target=target, eps=eps, loss_scale=loss_scale
    )


def interpolate(real: Tensor, fake: Tensor, rng_state: Tensor, *, impl: str = "auto") -> Tensor:
    """``fake + ε_i (real - fake)`` with one uniform ε_i a sample."""
    if impl == "cuda":
        raise BackendUnavailableError("the CUDA interpolation is not available")
    return interpolate_reference(real, fake, rng_state)


def make_rng_state(seed: int, device: torch.device | str = "cpu") -> Tensor:
    """A state for :func:`interpolate`: [2] int64 on ``device``, (seed, offset 0). Checkpoint it as any tensor."""
    return torch.tensor([seed, 0], dtype=torch.int64, device=device)


def _check(grad: Tensor, kind: str, impl: str) -> None:
    if kind not in KINDS:
        raise unknown_name("gradient penalty", kind, KINDS)
    if impl not in IMPLEMENTATIONS:
        raise unknown_name("implementation", impl, IMPLEMENTATIONS)
    if grad.ndim == 0 or grad.numel() == 0:
        raise UsageError(f"gradient_penalty needs gradients [N, …] with at least one element, got {tuple(grad.shape)}")
