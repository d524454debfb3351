"""Optimizers of the two networks, the rate's schedule and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ganexport.errors import CheckpointError
from ganexport.recipe import Optimizer, Schedule


def make_optimizer(settings: Optimizer, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer a recipe names, in torch's fused form where there is one.

    Adam: Kingma and Ba 2015 (arXiv:1412.6980); AdamW: Loshchilov and Hutter 2019 (arXiv:1711.05101);
    RMSProp: Tieleman and Hinton 2012, as the WGAN paper uses it.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    common: dict[str, Any] = {"lr": settings.rate, "eps": settings.eps, "weight_decay": settings.weight_decay}
    if settings.name == "rmsprop":
        return torch.optim.RMSprop(trained, alpha=settings.alpha, momentum=settings.momentum, foreach=True, **common)
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    fused = all(parameter.device.type in ("cuda", "cpu") for parameter in trained)
    return kind(trained, betas=settings.betas, fused=fused, **common)


def rate_factor(schedule: Schedule, step: int, steps: int) -> float:
    """Factor on the rates at a step, a function of the step alone.

    Args:
        schedule: Warm-up, then constant, linear or cosine.
        step: Updates done, 0 … steps - 1.
        steps: Of the whole run.
    """
    if step < schedule.warmup:
        return (step + 1) / (schedule.warmup + 1)
    if schedule.name == "constant":
        return 1.0
    begin = max(schedule.warmup, int(schedule.start * steps))
    if step < begin:
        return 1.0
    done = (step - begin) / max(1, steps - begin)
    shape = 1.0 - done if schedule.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return schedule.final + (1.0 - schedule.final) * shape


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all parameter groups a rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Euclidean norm over all gradients, a float32 scalar on the device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)).float())
    return norm


def clip_gradients(parameters: Sequence[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale all gradients so that their norm is at most ``limit`` (Pascanu et al. 2013), without a host sync."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(gradients, factor)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors named "<parameter>.<quantity>"."""
    found = {}
    for number, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            if value is not None:
                found[f"{number}.{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return found


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], where: str) -> None:
    """Restore what :func:`optimizer_tensors` gave; rates come from the recipe, not from here.

    Raises:
        CheckpointError: The state is of another optimizer or network.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        if not number.isdigit() or int(number) >= len(parameters):
            raise CheckpointError(f"{where}: optimizer state {key!r} belongs to no parameter of this model")
        like = parameters[int(number)]
        if value.ndim and value.shape != like.shape:
            raise CheckpointError(f"{where}: optimizer state {key!r} is {list(value.shape)}, wanted {list(like.shape)}")
        # The same memory layout as the parameter, which the fused and foreach forms need to be fast.
        state.setdefault(int(number), {})[name] = torch.empty_like(like).copy_(value) if value.ndim else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
