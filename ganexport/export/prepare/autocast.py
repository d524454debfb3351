"""Autocast and casts to half precision inside ``forward`` are switched off: the truth is the module in fp32.

A generator that autocasts itself exports to a graph of bf16 convolutions that hardly any runtime has, with
rounding that no ``--precision`` controls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ganexport.export.prepare._rewriting import Rewriting

HALF = (torch.float16, torch.bfloat16)
_CASTS = (torch.Tensor.half, torch.Tensor.bfloat16)


class FullPrecision(Rewriting):
    """Whatever is asked for in half precision is made in fp32."""

    line = "half-casts-off: {} casts of forward to half precision stay in fp32"

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :class:`Rewriting`."""
        if func in _CASTS:
            return args[0].float()
        if not any(_is_half(value) for value in (*args, *kwargs.values())):
            return NotImplemented
        args = tuple(torch.float32 if _is_half(value) else value for value in args)
        return func(*args, **{name: torch.float32 if _is_half(value) else value for name, value in kwargs.items()})


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
