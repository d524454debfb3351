"""Functions of torch that are replaced by equals of theirs while a penalty is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode


class Replacing(TorchFunctionMode):
    """Inside, every function of torch goes through :meth:`call`; subclasses replace there what they know better.

    Several are combined by inheriting from them all: one mode then does the work of each.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch."""
        return self.call(func, args, dict(kwargs or {}))

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The function's result, or that of what stands in its place."""
        return func(*args, **named)
