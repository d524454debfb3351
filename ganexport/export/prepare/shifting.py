"""``torch.roll`` by a symbolic number of places, and ``fftshift``, which rolls by half the size, as two slices.

Networks that work on spectra centre them with it; the exporter has no form for a shift that follows the size.
"""

from __future__ import annotations

from typing import Any

import torch

from ganexport.errors import ExportError
from ganexport.export.prepare._location import caller
from ganexport.export.prepare._rewriting import Rewriting, arguments

#: What comes first: the place after the middle, rounded up or down.
_BY_HALF = {torch.fft.fftshift: 1, torch.fft.ifftshift: 0}


class SlicedRoll(Rewriting):
    """The last places first, then the others, an axis at a time."""

    line = "sliced-roll: {} shifts that follow the input's size"

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :class:`Rewriting`."""
        if func in _BY_HALF:
            given = arguments(("input", "dim"), args, kwargs)
            value, dim = given["input"], given.get("dim")
            axes = _listed(range(value.ndim) if dim is None else dim)
            starts = [(value.shape[axis] + _BY_HALF[func]) // 2 for axis in axes]
            free = any(isinstance(start, torch.SymInt) for start in starts)
            if free and dim is None and isinstance(value.shape[0], torch.SymInt):
                name = "ifftshift" if func is torch.fft.ifftshift else "fftshift"
                raise ExportError(
                    f"{caller()}: {name} without dim shifts the batch too, so samples change places: say "
                    "which axes, dim=(-2, -1) for pictures"
                )
        elif func in (torch.roll, torch.Tensor.roll):
            given = arguments(("input", "shifts", "dims"), args, kwargs)
            value, shifts, axes = given["input"], _listed(given["shifts"]), _listed(given.get("dims") or ())
            free = len(shifts) == len(axes) and any(isinstance(shift, torch.SymInt) for shift in shifts)
            starts = [-shift % value.shape[axis] for axis, shift in zip(axes, shifts, strict=True)] if free else []
        else:
            return NotImplemented
        if not free:
            return NotImplemented
        for axis, start in zip(axes, starts, strict=True):
            ahead, behind = value.narrow(axis, 0, start), value.narrow(axis, start, value.shape[axis] - start)
            value = torch.cat([behind, ahead], axis)
        return value


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, int | torch.SymInt) else list(value)
