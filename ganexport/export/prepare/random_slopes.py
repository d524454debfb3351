"""Randomised leaky ReLU (Xu et al. 2015, arXiv 1505.00853) in evaluation: a leaky ReLU of the mean slope."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it

from ganexport.export.prepare._rewriting import Rewriting, arguments


class MeanSlopes(Rewriting):
    """What RReLU computes when it does not draw, in an operator that every format has."""

    line = "mean-slopes: {} randomised leaky ReLUs in evaluation as leaky ReLUs"

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :class:`Rewriting`."""
        if func not in (F.rrelu, torch.rrelu):
            return NotImplemented
        given = arguments(("input", "lower", "upper", "training"), args, kwargs)
        if given.get("training", False):
            return NotImplemented
        return F.leaky_relu(given["input"], (given.get("lower", 1 / 8) + given.get("upper", 1 / 3)) / 2)
