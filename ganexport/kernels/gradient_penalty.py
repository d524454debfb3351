"""The gradient penalty of a critic and the interpolation it is taken at: fused on CUDA, plain torch elsewhere.

The critic's input gradients go in, the penalty comes out as a scalar that can be differentiated::

    images = interpolate(real, fake, rng_state)                           # [N, C, H, W]
    grad = torch.func.grad(lambda x: critic(x).sum())(images.float())     # [N, C, H, W]
    (loss + gradient_penalty(grad, kind="two-sided", weight=10.0)).backward()

works eagerly and inside ``torch.compile(fullgraph=True)`` (the ``backward()`` outside).
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from ganexport.errors import BackendUnavailableError, UsageError, unknown_name
from ganexport.kernels import _launch
from ganexport.kernels._ops import KINDS
from ganexport.kernels._reference import gradient_penalty_reference, interpolate_reference

__all__ = [
    "KINDS",
    "gradient_penalty",
    "gradient_penalty_reference",
    "interpolate",
    "interpolate_reference",
    "make_rng_state",
    "why_not_cuda",
]

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
    """Penalty on the norms of a critic's per-sample input gradients.

    With s_i = Σ_j g_ij² and n_i = sqrt(s_i + eps):

    - "two-sided" (Gulrajani et al. 2017, arXiv:1704.00028): weight · mean_i (n_i - target)²
    - "one-sided" (Petzka et al. 2018, arXiv:1709.08894): weight · mean_i max(0, n_i - target)²
    - "r1" (Mescheder et al. 2018, arXiv:1801.04406; R2 is the same at fake images): weight · mean_i s_i / 2

    Equivalent to :func:`gradient_penalty_reference`. On CUDA, value and gradient are made in one pass over ``grad``.
    Where n_i is exactly 0 (eps = 0 only) the gradient is taken as 0; NaN in a sample makes the penalty NaN.

    Args:
        grad: [N, …] of float32, float16, bfloat16 (or float64: reference only), in any memory layout. Samples that
            are dense in memory in any order (contiguous, channels_last, a slice of the batch) are read in place.
        kind: One of "two-sided", "one-sided", "r1".
        weight: A number, or a tensor of one element on ``grad``'s device, so that changing it neither recompiles
            nor synchronises.
        target: The norm aimed at (unused by "r1").
        eps: Added to s_i under the root (unused by "r1").
        loss_scale: The upstream gradient that the backward will probably receive, such as a GradScaler's scale (a
            number, or a tensor of one element on ``grad``'s device). It changes no result; when it is right, the
            backward on CUDA reads and writes nothing. None means 1.
        impl: "auto" takes the kernel on CUDA where it can and says once why when it can't; "cuda" refuses instead;
            "reference" is plain torch.

    Returns:
        [] float32 (float64 for float64 input), differentiable with respect to ``grad`` (twice as well).

    Raises:
        UsageError: Unknown kind or impl, empty or integer ``grad``, a weight that doesn't fit or requires grad.
        BackendUnavailableError: ``impl="cuda"`` and the kernel cannot run here; the message says why.
    """
    _check_gradient(grad, kind)
    _check_scalar("weight", weight, grad)
    _check_scalar("loss_scale", loss_scale, grad)
    if _resolve(impl, grad.device.type, grad.device.index, grad.dtype) == "reference":
        return gradient_penalty_reference(grad, kind=kind, weight=weight, target=target, eps=eps, loss_scale=loss_scale)
    tensor_weight = weight.detach().float() if isinstance(weight, Tensor) else None  # [] or [1]
    scale = _device_scalar(loss_scale, grad)  # [] or [1]
    outputs: tuple[Tensor, Tensor, Tensor] = torch.ops.ganexport.gradient_penalty(
        grad,
        tensor_weight,
        scale,
        1.0 if isinstance(weight, Tensor) else float(weight),
        KINDS.index(kind),
        float(target),
        float(eps),
        grad.requires_grad and torch.is_grad_enabled(),
    )
    return outputs[0]


def interpolate(real: Tensor, fake: Tensor, rng_state: Tensor, *, impl: str = "auto") -> Tensor:
    """``fake + ε_i (real - fake)`` with one uniform ε_i in [0, 1) a sample (arXiv:1704.00028, algorithm 1).

    ε_i is a function of (seed, offset, i) alone: the same on every device, in every implementation and batch size.
    For DRAGAN (arXiv:1705.07215) pass the perturbed real images as ``fake``.

    Args:
        real: [N, …] of float32, float16 or bfloat16 (float64: reference only).
        fake: As ``real``, same shape, dtype and device.
        rng_state: [2] int64 on the same device, from :func:`make_rng_state`. Its offset is advanced by one on the
            device, so that a replayed CUDA graph draws anew and a compiled one bakes nothing in.
        impl: As in :func:`gradient_penalty`. The kernel has no derivative: with ``real`` or ``fake`` requiring
            grad, "auto" takes the reference.

    Returns:
        [N, …] in ``fake``'s dtype.

    Raises:
        UsageError: Tensors that don't fit each other.
        BackendUnavailableError: ``impl="cuda"`` and the kernel cannot run here or would lose a gradient.
    """
    if real.shape != fake.shape or real.dtype != fake.dtype or real.device != fake.device:
        raise UsageError(
            "interpolate needs real and fake images of one shape, dtype and device, got "
            f"{tuple(real.shape)} {real.dtype} on {real.device} and {tuple(fake.shape)} {fake.dtype} on {fake.device}"
        )
    if fake.ndim == 0 or fake.numel() == 0 or not fake.dtype.is_floating_point:
        raise UsageError(f"interpolate needs floating point images [N, …], got {tuple(fake.shape)} {fake.dtype}")
    if rng_state.shape != (2,) or rng_state.dtype != torch.int64 or rng_state.device != fake.device:
        raise UsageError(f"interpolate needs an rng_state from make_rng_state(seed, device='{fake.device}')")
    chosen = _resolve(impl, fake.device.type, fake.device.index, fake.dtype)
    if chosen == "cuda" and torch.is_grad_enabled() and (real.requires_grad or fake.requires_grad):
        if impl == "cuda":
            raise BackendUnavailableError(
                "the interpolation kernel has no derivative: detach real and fake, or use impl='reference'"
            )
        chosen = "reference"
    if chosen == "reference":
        return interpolate_reference(real, fake, rng_state)
    outputs: tuple[Tensor, Tensor] = torch.ops.ganexport.interpolate(real, fake, rng_state)
    return outputs[0]


def make_rng_state(seed: int, device: torch.device | str = "cpu") -> Tensor:
    """A state for :func:`interpolate`: [2] int64 (seed, offset 0) on ``device``. Checkpoint it as any tensor."""
    return torch.tensor([seed, 0], dtype=torch.int64, device=device)


def why_not_cuda(device: torch.device | str = "cuda", dtype: torch.dtype = torch.float32) -> str:
    """Why ``impl="auto"`` would not take the kernel for tensors like these; empty when it would."""
    chosen = torch.device(device)
    if chosen.type != "cuda":
        return f"the tensors are on {chosen.type}, the kernels need CUDA"
    if dtype not in _launch.DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {dtype}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return _launch.unavailable(torch.cuda.current_device() if chosen.index is None else chosen.index)


@torch.compiler.assume_constant_result
def _resolve(impl: str, device_type: str, device_index: int | None, dtype: torch.dtype) -> str:
    """ "cuda" or "reference"; a constant to the compiler, which must not trace the search for the library."""
    return _decide(impl, device_type, device_index, dtype)


@functools.cache
def _decide(impl: str, device_type: str, device_index: int | None, dtype: torch.dtype) -> str:
    if impl not in IMPLEMENTATIONS:
        raise unknown_name("implementation", impl, IMPLEMENTATIONS)
    if impl == "reference" or (impl == "auto" and device_type != "cuda"):
        return "reference"
    device = device_type if device_index is None else f"{device_type}:{device_index}"
    reason = why_not_cuda(device, dtype)
    if not reason:
        return "cuda"
    if impl == "cuda":
        raise BackendUnavailableError(f"the CUDA gradient penalty is not available: {reason}")
    warnings.warn(f"gradient penalty: plain torch instead of the CUDA kernel: {reason}", stacklevel=4)
    return "reference"


def _check_gradient(grad: Tensor, kind: str) -> None:
    if kind not in KINDS:
        raise unknown_name("gradient penalty", kind, KINDS)
    if grad.ndim == 0 or grad.numel() == 0 or not grad.dtype.is_floating_point:
        raise UsageError(
            f"gradient_penalty needs floating point gradients [N, …] with at least one element, "
            f"got {tuple(grad.shape)} {grad.dtype}"
        )


def _device_scalar(value: float | Tensor | None, grad: Tensor) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach().float()  # [] or [1]
    return None if value is None else grad.new_full((), value, dtype=torch.float32)  # []


def _check_scalar(name: str, value: float | Tensor | None, grad: Tensor) -> None:
    if not isinstance(value, Tensor):
        return
    if value.numel() != 1 or value.device != grad.device or value.requires_grad:
        raise UsageError(
            f"gradient_penalty's {name} must be a number or a tensor of one element on {grad.device} that doesn't "
            f"require grad, got {tuple(value.shape)} on {value.device}"
        )
