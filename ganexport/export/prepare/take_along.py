"""``torch.take_along_dim`` as ``gather``: its broadcasting fixes the sizes that it compares."""

from __future__ import annotations

from typing import Any

import torch

from ganexport.export.prepare._rewriting import Rewriting, arguments


class TakenByGather(Rewriting):
    """Broadcasts axes of size 1 against the others, without asking whether two symbolic sizes are equal."""

    line = "take-along-dim: {} as gather"

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :class:`Rewriting`."""
        if func not in (torch.take_along_dim, torch.Tensor.take_along_dim) or kwargs.get("out") is not None:
            return NotImplemented
        given = arguments(("input", "indices", "dim"), args, kwargs)
        value, indices, dim = given["input"], given["indices"], given.get("dim")
        if dim is None:
            return value.reshape(-1).gather(0, indices.reshape(-1))
        if value.ndim != indices.ndim:
            return NotImplemented  # torch refuses it in its own words
        dim %= value.ndim
        return _widened(value, indices, dim).gather(dim, _widened(indices, value, dim))


def _widened(value: torch.Tensor, other: torch.Tensor, dim: int) -> torch.Tensor:
    """The tensor with its axes of size 1 as long as the other's, but for one axis."""
    sizes = [
        other.shape[axis] if axis != dim and isinstance(size, int) and size == 1 else -1
        for axis, size in enumerate(value.shape)
    ]
    return value.expand(sizes)
