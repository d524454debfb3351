"""Watch a training and say when it has diverged, and what was seen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ganexport.recipe import Guard

#: Logits beyond which a sigmoid is within 1e-4 of certainty.
_CERTAIN = math.log(1 / 1e-4 - 1)
_NO_GRADIENT = 1e-9


class DivergedError(Exception):
    """Training has diverged; the message says what was seen and at which step."""


class DivergenceGuard:
    """Looks at every logged line.

    - A loss, logit or gradient norm that is NaN or infinite: at once.
    - A loss beyond ``explode``, or a gradient norm beyond 100 times it: ``patience`` lines in a row.
    - Collapse of the critic: for ``collapse`` lines in a row the generator gets no gradient, or
      (where logits are log-odds) real and fake are told apart with certainty beyond 1e-4.

    Args:
        settings: The limits.
        log_odds: Whether the objective's logits are log-odds (a sigmoid makes them probabilities).
    """

    def __init__(self, settings: Guard, *, log_odds: bool) -> None:
        self.settings = settings
        self.log_odds = log_odds
        self.exploding = 0
        self.collapsing = 0

    @property
    def calm(self) -> bool:
        """Whether nothing suspicious is going on: only then a checkpoint is worth keeping."""
        return self.exploding == 0 and self.collapsing < self.settings.collapse // 2 + 1

    def look(self, metrics: Mapping[str, float]) -> None:
        """Judge one line of metrics.

        Raises:
            DivergedError: With what was seen.
        """
        step = int(metrics["step"])
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            raise DivergedError(f"step {step}: {', '.join(f'{name} is {metrics[name]}' for name in broken)}")
        self._explosion(step, metrics)
        self._collapse(step, metrics)

    def _explosion(self, step: int, metrics: Mapping[str, float]) -> None:
        limit = self.settings.explode
        large = {name: metrics[name] for name in ("d_loss", "g_loss") if abs(metrics[name]) > limit}
        norms = ("d_gradient_norm", "g_gradient_norm")
        large |= {name: metrics[name] for name in norms if metrics.get(name, 0.0) > 100 * limit}
        self.exploding = self.exploding + 1 if large else 0
        if self.exploding >= self.settings.patience:
            seen = ", ".join(f"{name} = {value:.3g}" for name, value in large.items())
            raise DivergedError(f"step {step}: exploding for {self.exploding} logged steps: {seen}")

    def _collapse(self, step: int, metrics: Mapping[str, float]) -> None:
        starved = metrics.get("g_gradient_norm", 1.0) < _NO_GRADIENT
        certain = self.log_odds and metrics["real_logit"] > _CERTAIN and metrics["fake_logit"] < -_CERTAIN
        self.collapsing = self.collapsing + 1 if starved or certain else 0
        if self.collapsing >= self.settings.collapse:
            seen = "the generator gets no gradient" if starved else "it tells real from fake with certainty"
            raise DivergedError(f"step {step}: the critic collapsed: {seen} for {self.collapsing} logged steps")

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"exploding": self.exploding, "collapsing": self.collapsing}

    def restore(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        self.exploding, self.collapsing = int(state.get("exploding", 0)), int(state.get("collapsing", 0))
