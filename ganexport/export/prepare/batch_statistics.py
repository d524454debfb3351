"""Batch normalisation by the statistics of what comes in, written out: the exporter writes the running ones' form.

AdaIN is often computed so, with the samples as channels of one batch (MUNIT, Huang et al. 2018, arXiv 1804.04732).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it

from ganexport.export.prepare._rewriting import Rewriting, arguments

_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


class WrittenOutStatistics(Rewriting):
    """(x - mean) / sqrt(var + eps) over all axes but the channels', times weight, plus bias."""

    line = "batch-statistics: {} normalisations by the statistics of their input written out"

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :class:`Rewriting`."""
        if func is not F.batch_norm:
            return NotImplemented
        given = arguments(_NAMES, args, kwargs)
        if not given.get("training", False):
            return NotImplemented
        value = given["input"]
        axes = [axis for axis in range(value.ndim) if axis != 1]
        spread = (1, -1, *(1 for _ in axes[1:]))
        centred = value - value.mean(axes, keepdim=True)
        made = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + given.get("eps", 1e-5))
        if given.get("weight") is not None:
            made = made * given["weight"].view(spread)
        return made if given.get("bias") is None else made + given["bias"].view(spread)
