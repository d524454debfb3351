"""Custom autograd Functions run as their plain forward while exporting.

``torch.jit.trace`` records an opaque Python call for them that cannot be saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _Context:
    """Takes whatever a forward stores for a backward that will not happen."""

    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *_: Any) -> None:
        """Ignored."""

    save_for_forward = mark_non_differentiable = mark_dirty = set_materialize_grads = save_for_backward


@contextmanager
def plain_functions() -> Iterator[list[str]]:
    """Replace ``Function.apply`` by the forward alone.

    Yields:
        Names of the Functions that were called, filled while the block runs.
    """
    seen: list[str] = []
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type[torch.autograd.Function], *inputs: Any, **keywords: Any) -> Any:
        if cls.__name__ not in seen:
            seen.append(cls.__name__)
        if cls.__module__.startswith("torch."):
            return original.__get__(None, cls)(*inputs, **keywords)
        if cls.setup_context is not torch.autograd.Function.setup_context:
            return cls.forward(*inputs, **keywords)
        context = _Context()
        context.needs_input_grad = (False,) * len(inputs)
        return cls.forward(context, *inputs, **keywords)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign,assignment]
    try:
        yield seen
    finally:
        torch.autograd.Function.apply = original
