"""Autocast and casts to half precision inside ``forward`` are switched off: the truth is the module in fp32.

A generator that autocasts itself exports to a graph of bf16 convolutions that hardly any runtime has, with
rounding that no ``--precision`` controls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

HALF = (torch.float16, torch.bfloat16)
_CASTS = (torch.Tensor.half, torch.Tensor.bfloat16)


class FullPrecision(TorchFunctionMode):
    """Whatever is asked for in half precision is made in fp32.

    Attributes:
        count: Calls that were changed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Called by torch for every function."""
        kwargs = kwargs or {}
        if func in _CASTS:
            self.count += 1
            return args[0].float()
        if any(_is_half(value) for value in (*args, *kwargs.values())):
            self.count += 1
            args = tuple(torch.float32 if _is_half(value) else value for value in args)
            kwargs = {name: torch.float32 if _is_half(value) else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _is_half(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value in HALF


class Switched:
    """Counts what was switched off.

    Attributes:
        count: Enabled autocast regions that were entered.
    """

    def __init__(self) -> None:
        self.count = 0


@contextmanager
def without_autocast() -> Iterator[Switched]:
    """Within the block autocast regions change nothing."""
    seen = Switched()
    kind = torch.amp.autocast_mode.autocast
    enter, leave = kind.__enter__, kind.__exit__

    def pass_by(self: Any) -> Any:
        seen.count += bool(self._enabled)
        return self

    # Nothing is on outside either, so that a region which switches it off has nothing to do.
    kind.__enter__ = pass_by  # type: ignore[method-assign]
    kind.__exit__ = lambda *_: None  # type: ignore[method-assign,assignment]
    try:
        yield seen
    finally:
        kind.__enter__, kind.__exit__ = enter, leave  # type: ignore[method-assign]
