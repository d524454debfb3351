"""Put the module in evaluation mode: running statistics fixed, dropout modules off, no gradients, no backward hooks."""

from __future__ import annotations

import torch


def apply(module: torch.nn.Module) -> list[str]:
    """Switch every sub-module to evaluation.

    Sub-modules that override ``train`` are switched too, by their flag.

    Returns:
        One line when something was in training mode.
    """
    training = [name or "the module" for name, child in module.named_modules() if child.training]
    module.eval()
    for child in module.modules():
        child.training = False
        child._backward_hooks.clear()
        child._backward_pre_hooks.clear()
    freeze(module)
    return [f"evaluation-mode: {len(training)} modules were in training mode"] if training else []


def freeze(module: torch.nn.Module) -> None:
    """No gradients for its parameters, of TorchScript modules too, which have no ``requires_grad_``."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
