"""Exponential moving average of the generator, with a warm-up of its decay."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ganexport.recipe import Ema


class MovingAverage:
    """An averaged copy of a module.

    At update t (from 0) the decay is min(decay, (1 + t) / (warmup + t)), so that the random first
    weights are soon forgotten. Floating-point buffers (running statistics) are averaged like
    weights; other buffers are copied.

    Args:
        module: The network that is trained.
        settings: Decay and warm-up.
    """

    def __init__(self, module: nn.Module, settings: Ema) -> None:
        self.settings = settings
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        mine, theirs = self.module.state_dict(), module.state_dict()
        smooth = [name for name in mine if mine[name].is_floating_point()]
        self._average = [mine[name] for name in smooth]
        self._source = [theirs[name] for name in smooth]
        self._copied = [(mine[name], theirs[name]) for name in mine if name not in set(smooth)]

    def update(self, step: int) -> None:
        """Move towards the module's present weights, after update ``step`` (from 0)."""
        decay = min(self.settings.decay, (1 + step) / (self.settings.warmup + step))
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._source, 1.0 - decay)
            for mine, theirs in self._copied:
                mine.copy_(theirs)
