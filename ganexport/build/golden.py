"""Golden inputs with the source's fp32 outputs, so that an artifact can be verified without its source."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ganexport.artifact import GOLDEN, write_atomic
from ganexport.build.certify import Engine, InputSet, draw, plan
from ganexport.errors import ArtifactError
from ganexport.seeding import batched
from ganexport.spec import BATCH, GeneratorSpec

Array = NDArray[Any]
#: At least this many samples, and at most this many bytes (the first set is always kept).
SAMPLES, LIMIT_BYTES = 16, 8 << 20


def choose(spec: GeneratorSpec) -> list[InputSet]:
    """Input sets for the golden file: the optimum (a few samples) and every corner, 16 samples or more."""
    named = batched(spec)
    batch = named.batch
    best = named.sizes()
    if batch is not None:
        best[BATCH] = max(batch.min, min(batch.opt, 8 - 8 % batch.step or batch.step))
    per_call = best.get(BATCH, 1)
    seen: list[dict[str, int]] = []
    corners = []
    for chosen in plan(spec):
        if chosen.role == "corner" and chosen.sizes not in seen:
            seen.append(chosen.sizes)
            corners.append(chosen)
    total = sum(chosen.count for chosen in corners)
    optimum = [InputSet(best, 1_000_000 + i * per_call, per_call, "optimum") for i in range(-(-SAMPLES // per_call))]
    needed = max(1, -(-(SAMPLES - total) // per_call))
    return [*optimum[:needed], *corners, *optimum[needed:]]


def write_golden(folder: Path, spec: GeneratorSpec, reference: Engine, limit: int = LIMIT_BYTES) -> int:
    """Run the reference and write ``golden.npz``.

    Returns:
        Number of samples kept; sets that would pass the limit are left out.
    """
    arrays: dict[str, Array] = {}
    used, samples, number = 0, 0, 0
    for chosen in choose(spec):
        feeds = draw(spec, chosen)
        size = sum(a.nbytes for a in feeds.values())
        if number and used + size > limit:
            continue
        outputs = reference.run(feeds)
        size += sum(a.nbytes for a in outputs.values())
        if number and used + size > limit:
            continue
        arrays |= {f"{number}/in/{name}": value for name, value in feeds.items()}
        arrays |= {f"{number}/out/{name}": value for name, value in outputs.items()}
        used, samples, number = used + size, samples + chosen.count, number + 1
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_atomic(folder / GOLDEN, buffer.getvalue())
    return samples


def read_golden(path: Path, spec: GeneratorSpec) -> list[tuple[dict[str, Array], dict[str, Array]]]:
    """(inputs, outputs) of every golden set.

    Raises:
        ArtifactError: Damaged, holding objects, or not this spec's.
    """
    sets: dict[int, tuple[dict[str, Array], dict[str, Array]]] = {}
    try:
        with np.load(path, allow_pickle=False) as content:
            for key in content.files:
                number, side, name = key.split("/", 2)
                pair = sets.setdefault(int(number), ({}, {}))
                pair[("in", "out").index(side)][name] = content[key]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path}: golden inputs are damaged: {error}") from None
    inputs, outputs = {t.name for t in spec.inputs}, {t.name for t in spec.outputs}
    if not sets or any(set(a) != inputs or set(b) != outputs for a, b in sets.values()):
        raise ArtifactError(f"{path}: golden inputs do not belong to this spec")
    return [sets[number] for number in sorted(sets)]
