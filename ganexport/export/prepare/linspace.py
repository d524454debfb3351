"""``torch.linspace`` over a symbolic number of steps, from ``arange``: the operator itself fixes the number.

Generators that warp or encode positions build their grids with it, from the size of their input.
"""

from __future__ import annotations

from typing import Any

import torch

from ganexport.export.prepare._rewriting import Rewriting, arguments


class SymbolicLinspace(Rewriting):
    """start + i (end - start) / (steps - 1) for i in arange(steps), where steps is symbolic."""

    line = "symbolic-linspace: {} grids whose size follows the input's"

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :class:`Rewriting`."""
        if func is not torch.linspace:
            return NotImplemented
        given = arguments(("start", "end", "steps"), args, kwargs)
        steps = given.get("steps")
        if not isinstance(steps, torch.SymInt) or given.get("out") is not None:
            return NotImplemented
        dtype = given.get("dtype") or torch.get_default_dtype()
        index = torch.arange(steps, device=given.get("device"))
        last = index[-1:]  # a tensor: ONNX has no division of a symbolic size
        start, end = given["start"], given["end"]
        step = (end - start) / last.clamp(min=1).to(dtype)
        # The first half counts from the start and the second from the end, as torch does: both are met to the bit.
        forward, backward = start + index * step, end - (last - index) * step
        return torch.where(index * 2 <= last, forward, backward).to(dtype)
