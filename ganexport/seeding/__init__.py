"""The seed contract: sample i of seed s is a function of (s, the input's name, i) alone.

Not of the batch size, the backend, the machine or the count. Every number comes from
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and a
transform made of correctly rounded IEEE operations (+, -, *, /, sqrt), without a call into a maths
library and without fused multiply-add, so that any language can match it bit for bit.
``docs/seed-contract.md`` is the specification for implementers.
"""

from __future__ import annotations

from ganexport.seeding._inputs import MAX_SEED, TRUNCATION, Sampling, batched, latents
from ganexport.seeding._philox import philox, stream_of
from ganexport.seeding._transforms import normal_below, normal_quantile

__all__ = [
    "MAX_SEED",
    "TRUNCATION",
    "Sampling",
    "batched",
    "latents",
    "normal_below",
    "normal_quantile",
    "philox",
    "stream_of",
]
