"""Plain-torch gradient penalty and interpolation: importable everywhere, independent of the CUDA library.

These are what the kernels are judged against, and what runs where no kernel does. They are differentiable to any
order, compile, and accumulate in float32 (float64 for float64 input) whatever the input's dtype is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def square_sums(grad: Tensor) -> Tensor:
    """Sum of squares of each sample.

    Args:
        grad: [N, …], any floating dtype and memory format.

    Returns:
        [N], float32 (float64 when ``grad`` is float64).
    """
    wide = grad if grad.dtype == torch.float64 else grad.float()  # [N, …]
    squares = wide.square()  # [N, …]
    return squares.sum(dim=tuple(range(1, grad.ndim))) if grad.ndim > 1 else squares  # [N]


def gradient_norms(sums: Tensor, eps: float) -> Tensor:
    """``sqrt(sums + eps)`` [N], with 0 and a zero derivative where the argument is exactly 0."""
    shifted = sums + eps  # [N]
    zero = shifted == 0  # [N]; NaN is not zero, so it reaches the result
    return torch.where(zero, 0.0, torch.where(zero, 1.0, shifted).sqrt())  # [N]


def gradient_penalty_reference(
    grad: Tensor,
    *,
    kind: str = "two-sided",
    weight: float | Tensor,
    target: float = 1.0,
    eps: float = 1e-12,
    loss_scale: float | Tensor | None = None,
) -> Tensor:
    """The gradient penalty in plain torch operations: arguments and result as of ``gradient_penalty``.

    With s_i = Σ g_i² and n_i = sqrt(s_i + eps):

    - "two-sided" (Gulrajani et al. 2017, arXiv:1704.00028): weight · mean_i (n_i - target)²
    - "one-sided" (Petzka et al. 2018, arXiv:1709.08894): weight · mean_i max(0, n_i - target)²
    - "r1" (Mescheder et al. 2018, arXiv:1801.04406; R2 is the same on fake images): weight · mean_i s_i / 2
    """
    sums = square_sums(grad)  # [N]
    if kind == "r1":
        return weight * (sums.mean() / 2)
    excess = gradient_norms(sums, eps) - target  # [N]
    if kind == "one-sided":
        excess = excess.clamp_min(0.0)  # [N]
    elif kind != "two-sided":
        raise ValueError(kind)
    return weight * excess.square().mean()


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``constant · word``, without ever exceeding the 63 bits of a positive int64."""
    low = constant * (word & 0xFFFF)
    middle = constant * (word >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def sample_epsilon(rng_state: Tensor, count: int) -> Tensor:
    """ε of ``count`` samples: Philox4x32-10 (Salmon et al. 2011), one block a sample, 24 bits of its first word.

    The key is the seed; the 128-bit counter is (sample index, offset), 64 bits each, low words first.

    Args:
        rng_state: [2] int64: seed and offset.
        count: Number of samples N.

    Returns:
        [N] float32 in [0, 1).
    """
    index = torch.arange(count, dtype=torch.int64, device=rng_state.device)  # [N]
    seed, offset = rng_state[0], rng_state[1]
    key = [seed & _WORD, (seed >> 32) & _WORD]
    positions = [offset.expand(count), (offset >> 32).expand(count)]  # [N]
    counter = [word & _WORD for word in (index, index >> 32, *positions)]
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], counter[0])
        high1, low1 = _multiply(_MULTIPLIERS[1], counter[2])
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + _KEY_STEPS[0]) & _WORD, (key[1] + _KEY_STEPS[1]) & _WORD]
    return (counter[0] >> 8).to(torch.float32) * 2.0**-24  # [N]


def interpolate_reference(real: Tensor, fake: Tensor, rng_state: Tensor) -> Tensor:
    """``fake + ε_i (real - fake)`` [N, …] in plain torch operations; advances ``rng_state[1]`` by one."""
    epsilon = sample_epsilon(rng_state, real.shape[0])  # [N]
    rng_state[1].add_(1)
    epsilon = epsilon.view(-1, *[1] * (real.ndim - 1))  # [N, 1, …]
    if real.dtype == torch.float64:
        return torch.addcmul(fake, epsilon.double(), real - fake)  # [N, …]
    wide = fake.float()  # [N, …]
    return (wide + epsilon * (real.float() - wide)).to(real.dtype)  # [N, …]
