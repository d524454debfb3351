"""The learning-curve picture of a run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ganexport.artifact import write_atomic
from ganexport.errors import MissingDependencyError
from ganexport.training.metrics import read_metrics

FILE = "curves.png"
#: Panel title → metrics drawn in it, where the run has them.
PANELS: dict[str, tuple[str, ...]] = {
    "losses": ("d_loss", "g_loss"),
    "critic's answers": ("D(x)", "D(G(z))", "real_logit", "fake_logit"),
    "penalties and the Wasserstein estimate": ("wasserstein_estimate", "penalty"),
    "gradient norms": ("d_gradient_norm", "g_gradient_norm"),
}


def draw_curves(run: Path) -> Path | None:
    """Draw ``RUN/curves.png`` from the run's metrics.

    Returns:
        Its path; None when there are no metrics to draw.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OutputError: Not writable.
    """
    lines = [line for line in read_metrics(run) if "d_loss" in line]
    if not lines:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("drawing curves.png needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes: Any = figure.subplots(2, 2, sharex=True)
    for axis, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        present = [name for name in names if any(name in line for line in lines)]
        if "D(x)" in present:
            present = ["D(x)", "D(G(z))"]
        for name in present:
            points = [(line["step"], line[name]) for line in lines if name in line]
            axis.plot(*zip(*points, strict=True), label=name, linewidth=0.8)
        axis.set_title(title)
        axis.grid(alpha=0.3)
        if present:
            axis.legend(loc="best", fontsize="small")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    axes[1][1].set_yscale("log")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(run / FILE, buffer.getvalue())
    return run / FILE
