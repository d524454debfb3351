"""``torch.searchsorted`` as a count, which every format can do.

Volume renderers draw samples along rays from a distribution function with it (NeRF, Mildenhall et al. 2020,
arXiv 2003.08934, section 5.2; pi-GAN; EG3D).
"""

from __future__ import annotations

from typing import Any

import torch

from ganexport.export.prepare._rewriting import Rewriting, arguments


class CountedSearch(Rewriting):
    """How many of the sorted values lie below each value (or at it, from the right)."""

    line = "counted-search: {} searches in sorted values as counts"

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :class:`Rewriting`."""
        if func is not torch.searchsorted:
            return NotImplemented
        given = arguments(("sorted_sequence", "input"), args, kwargs)
        ordered, values = given["sorted_sequence"], given.get("input")
        if not isinstance(values, torch.Tensor) or given.get("sorter") is not None or given.get("out") is not None:
            return NotImplemented
        if not values.ndim or ordered.ndim not in (1, values.ndim):
            return NotImplemented
        right = given.get("right", False) or given.get("side") == "right"
        row, value = ordered[..., None, :], values[..., None]
        count = (row <= value if right else row < value).sum(-1)
        return count.to(torch.int32) if given.get("out_int32") else count
