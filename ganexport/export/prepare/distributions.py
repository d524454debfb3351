"""``torch.distributions`` without the checks of their arguments, which branch on values.

What they draw is answered like every random call (:mod:`ganexport.export.prepare.randomness`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributions import Distribution


@contextmanager
def unchecked_distributions() -> Iterator[None]:
    """Within the block distributions take their arguments as they are."""
    checked = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(checked)
