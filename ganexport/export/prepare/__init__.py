"""Named passes that make a module exportable, one small file each, in the order in which they run.

Passes on modules change the module's structure; passes while tracing answer single calls that
the module makes. Both match structure (parametrizations, operators, arguments), never names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Modules of this package with ``apply(module) -> list[str]``: what was changed, for the manifest.
MODULE_PASSES = ("evaluation_mode", "parametrizations")
#: Modules of this package with a context manager, active while the module runs under an exporter.
TRACING_PASSES = (
    "autograd_functions", "distributions", "autocast", "modulated_convolution", "attention", "linspace",
    "affine_grid", "cumulative_product", "fold", "recurrent", "spectral", "randomness",
)  # fmt: skip


def prepare_module(module: torch.nn.Module) -> list[str]:
    """Run every module pass in place.

    Returns:
        One line for each pass that changed something, as recorded in the manifest.
    """
    lines: list[str] = []
    for name in MODULE_PASSES:
        lines += importlib.import_module(f"{__name__}.{name}").apply(module)
    return lines
