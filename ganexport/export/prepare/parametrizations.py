"""Replace parametrized weights (weight norm, spectral norm, orthogonal, …) by the weights they produce.

Left in place they are recomputed at every call: half the nodes and twice the engine of a SAGAN.
"""

from __future__ import annotations

import torch
from torch.nn.utils import parametrize

from ganexport.export.prepare.evaluation_mode import freeze


def apply(module: torch.nn.Module) -> list[str]:
    """Strip parametrizations and the hooks of their predecessors, keeping the effective weights.

    The module must be in evaluation mode: spectral norm updates its vectors in training.

    Returns:
        One line with the number of tensors.
    """
    count = 0
    for child in list(module.modules()):
        if "parametrizations" in child._modules:  # its own: stand-ins show the attributes of what they stand for
            _own_class(child)
            for name in list(getattr(child, "parametrizations")):  # noqa: B009 - typed as a tensor
                parametrize.remove_parametrizations(child, name, leave_parametrized=True)
                count += 1
        count += _strip_hooks(child)
    if not count:
        return []
    freeze(module)
    return [f"strip-parametrizations: {count} weights"]


def _own_class(child: torch.nn.Module) -> None:
    """Removing a parametrization deletes a property of the module's class, which copies share."""
    cls = type(child)
    members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    child.__class__ = type(cls.__name__, cls.__bases__, members)


def _strip_hooks(child: torch.nn.Module) -> int:
    """The pre-forward hooks of the older weight_norm and spectral_norm: objects that recompute one weight.

    They are recognised by what they are (a pre-hook that names a tensor it can compute and remove).
    """
    count = 0
    for key, hook in list(child._forward_pre_hooks.items()):
        name = getattr(hook, "name", None)
        if isinstance(name, str) and callable(getattr(hook, "remove", None)):
            with torch.no_grad():
                hook(child, ())  # type: ignore[operator]
                hook.remove(child)  # type: ignore[attr-defined]
            del child._forward_pre_hooks[key]
            _drop_state_hooks(child, hook)
            count += 1
    return count


def _drop_state_hooks(child: torch.nn.Module, hook: object) -> None:
    """Spectral norm also hooks into saving and loading; those speak of tensors that are gone now."""
    for hooks in (child._state_dict_hooks, child._load_state_dict_pre_hooks):
        for key, other in list(hooks.items()):
            inner = getattr(other, "hook", other)
            if getattr(inner, "fn", None) is hook:
                del hooks[key]
