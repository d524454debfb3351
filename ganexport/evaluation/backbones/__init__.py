"""Networks whose features images are compared by, one file each.

A module here defines ``backbone(weights, device)``, which gives a :class:`Backbone`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ganexport.registry import Registry

BACKBONES = Registry("ganexport.evaluation.backbones", "backbone")


class Backbone(NamedTuple):
    """What turns images into features.

    Attributes:
        description: What the features are, at which size images enter and how they are resized, for the record.
        features: From uint8 [N, H, W, C] to (float features [N, D], class probabilities [N, K] or None).
    """

    description: str
    features: Callable[[NDArray[np.uint8]], tuple[NDArray[Any], NDArray[Any] | None]]
