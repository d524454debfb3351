"""The user's module as one of our own to change: a deep copy on the CPU, and what has none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ganexport.errors import ExportError, UsageError


def copied(module: nn.Module) -> nn.Module:
    """A deep copy on the CPU; the module itself stays as it is.

    Raises:
        ExportError: It holds what cannot be copied; the attribute is named.
    """
    memo: dict[int, Any] = {}
    for tensor in _tensors(module):
        if not tensor.is_leaf:  # what the older weight norm leaves at every forward; torch copies leaves alone
            memo[id(tensor)] = tensor.detach().cpu().clone()
        elif tensor.device.type not in ("cpu", "meta"):
            moved = tensor.detach().cpu()
            parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if parameter else moved
    try:
        with torch.no_grad():  # or the copies of TorchScript's parameters have a history
            return copy.deepcopy(module, memo)
    except Exception as error:  # noqa: BLE001 - copying runs the user's code
        where = _culprit(module, memo)
        raise ExportError(
            f"the module cannot be copied{f': {where}' if where else ''} ({type(error).__name__}: {error}); keep that "
            "out of the module, or give its class a __deepcopy__"
        ) from None


def ours(module: nn.Module, name: str, *, made: bool) -> nn.Module:
    """The module, free to be changed and on the CPU, without the wrappers of parallel training.

    Args:
        module: The user's.
        name: For messages.
        made: Whether it was made for us, by a factory; a caller's own is copied.

    Raises:
        UsageError: It has no weights yet.
        ExportError: It cannot be copied.
    """
    while isinstance(module, DataParallel | DistributedDataParallel):
        module = module.module
    for key, tensor in (*module.named_parameters(), *module.named_buffers()):
        if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
            raise UsageError(f"{name}: {key} has no size yet (a lazy layer): run the module once before you hand it on")
        if tensor.is_meta:
            raise UsageError(f"{name}: {key} is on the meta device and has no values: make the module on the CPU")
    return module if made and all(t.device.type == "cpu" for t in _tensors(module)) else copied(module)


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers and plain attributes of all sub-modules."""
    for child in module.modules():
        for value in (*child._parameters.values(), *child._buffers.values(), *vars(child).values()):
            if isinstance(value, torch.Tensor):
                yield value


def _culprit(module: nn.Module, memo: dict[int, Any]) -> str:
    """The innermost attribute that cannot be copied, as ``lock of Trainer``; empty when none is found alone."""
    for child in reversed(list(module.modules())):
        for key, value in vars(child).items():
            if key == "_modules":
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:  # noqa: BLE001 - as above
                return f"{key} of {type(child).__name__}"
    return ""
