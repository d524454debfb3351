"""``torch.linspace`` over a symbolic number of steps, from ``arange``: the operator itself fixes the number.

Generators that warp or encode positions build their grids with it, from the size of their input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class SymbolicLinspace(TorchFunctionMode):
    """start + i (end - start) / (steps - 1) for i in arange(steps), where steps is symbolic.

    Attributes:
        count: How many calls were rewritten.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Called by torch for every function."""
        kwargs = kwargs or {}
        if func is not torch.linspace:
            return func(*args, **kwargs)
        given = dict(zip(("start", "end", "steps"), args, strict=False)) | kwargs
        steps = given.get("steps")
        if not isinstance(steps, torch.SymInt) or given.get("out") is not None:
            return func(*args, **kwargs)
        self.count += 1
        dtype = given.get("dtype") or torch.get_default_dtype()
        index = torch.arange(steps, device=given.get("device"))
        last = index[-1:]  # a tensor: ONNX has no division of a symbolic size
        start, end = given["start"], given["end"]
        step = (end - start) / last.clamp(min=1).to(dtype)
        # The first half counts from the start and the second from the end, as torch does: both are met to the bit.
        forward, backward = start + index * step, end - (last - index) * step
        return torch.where(index * 2 <= last, forward, backward).to(dtype)
