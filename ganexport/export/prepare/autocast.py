"""Autocast inside ``forward`` is switched off: the truth is the module in fp32, and a precision is asked for.

A generator that autocasts itself exports to a graph of bf16 convolutions that hardly any runtime has, with
rounding that no ``--precision`` controls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


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
