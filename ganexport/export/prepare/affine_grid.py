"""``F.affine_grid`` for a symbolic height and width, written out: the operator itself fixes them.

Generators that warp what they drew use it (spatial transformers, Jaderberg et al. 2015, arXiv 1506.02025).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it

from ganexport.export.prepare._rewriting import Rewriting


class SymbolicAffineGrid(Rewriting):
    """theta's columns times the coordinates of the pixels, plus its last column, where the size is symbolic."""

    line = "symbolic-affine-grid: {} sampling grids whose size follows the input's"

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :class:`Rewriting`."""
        return _grid(*args, **kwargs) if func is F.affine_grid else NotImplemented


def _grid(theta: torch.Tensor, size: Any, align_corners: bool | None = None) -> Any:
    """[N, *size, axes] of theta [N, axes, axes + 1] and size (N, C, height, width) or (N, C, depth, height, width)."""
    sizes = size[2:]
    if not any(isinstance(steps, torch.SymInt) for steps in sizes):
        return NotImplemented
    axes = len(sizes)
    shift = (1,) * axes
    made = theta[:, :, axes].reshape(-1, *shift, axes)
    for axis, steps in enumerate(sizes):
        index = torch.arange(steps, device=theta.device)
        last = index[-1:]  # a tensor: ONNX has no division of a symbolic size
        # Corners at the centres of the outermost pixels, or at their outer edges; a single pixel is at 0.
        span = last.clamp(min=1) if align_corners else last + 1
        place = ((2 * index - last).to(theta.dtype) / span.to(theta.dtype)).reshape(
            *(-1 if other == axis else 1 for other in range(axes)), 1
        )
        column = theta[:, :, axes - 1 - axis].reshape(-1, *shift, axes)  # x, the last axis of the size, comes first
        made = made + column * place
    return made
