"""Inputs to time and to compare with, the same in every process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ganexport.errors import UsageError
from ganexport.runtime.base import Array, Feeds, Runner
from ganexport.seeding import batched, latents
from ganexport.spec import BATCH, Constant, Dim, GeneratorSpec, Label, TensorSpec, Uniform

#: Input sets that the timed loop rotates through.
ROTATION = 4


def drawable(spec: GeneratorSpec) -> GeneratorSpec:
    """The spec with a sampler for every input: images to be fed are drawn uniformly from their range.

    Timing does not depend on the values, and the comparison only needs the same ones everywhere.
    """

    def fill(tensor: TensorSpec) -> TensorSpec:
        if tensor.sampler is not None:
            return tensor
        if tensor.dtype in ("bool", "uint8", "int8", "int32", "int64"):
            high = int(tensor.range[1]) if tensor.range else 1
            return msgspec.structs.replace(tensor, sampler=Label(max(high, 1)))
        low, high_value = tensor.range or (0.0, 1.0)
        return msgspec.structs.replace(tensor, sampler=Uniform(low, high_value))

    return msgspec.structs.replace(spec, inputs=tuple(fill(t) for t in spec.inputs))


def resolve_sizes(spec: GeneratorSpec, sizes: Mapping[str, int]) -> dict[str, int]:
    """All dimensions' sizes: the asked ones where the generator has such a dimension, else the optimum.

    Raises:
        UsageError: A size is outside its dimension.
    """
    whole = batched(spec)
    known = {dim.name for dim in whole.dims}
    asked = {name: size for name, size in sizes.items() if name in known}
    if BATCH in sizes and BATCH not in known and sizes[BATCH] != 1:
        raise UsageError(f"this generator has no batch dimension, so batch {sizes[BATCH]} cannot be run")
    return whole.sizes(**asked)


def draw(spec: GeneratorSpec, sizes: Mapping[str, int], seed: int = 0, start: int = 0) -> dict[str, Array]:
    """One input set of these sizes: samples start … of the seed."""
    whole = drawable(spec)
    resolved = resolve_sizes(whole, sizes)
    return latents(whole, seed, start, resolved.get(BATCH, 1), sizes=resolved)


def rotation(spec: GeneratorSpec, sizes: Mapping[str, int], seed: int = 0) -> list[dict[str, Array]]:
    """:data:`ROTATION` different input sets, so that no engine is timed on one it has in its cache."""
    batch = resolve_sizes(spec, sizes).get(BATCH, 1)
    return [draw(spec, sizes, seed, index * batch) for index in range(ROTATION)]


def items(spec: GeneratorSpec, sizes: Mapping[str, int]) -> int:
    """Samples that one run of these sizes produces."""
    return resolve_sizes(spec, sizes).get(BATCH, 1)


def all_constant(spec: GeneratorSpec) -> bool:
    """Whether no input varies from sample to sample."""
    return all(isinstance(t.sampler, Constant) for t in spec.inputs)


def static_batch(spec: GeneratorSpec) -> Dim | None:
    """The batch dimension, also where the shapes are fixed."""
    return batched(spec).batch


# ---- reference outputs ------------------------------------------------------------------------

Sets = list[tuple[dict[str, Array], dict[str, Array]]]


def parity_inputs(spec: GeneratorSpec, batches: tuple[int, ...] = (1, 7)) -> list[dict[str, Array]]:
    """Input sets to compare on: batch sizes clipped to what the generator takes."""
    whole = batched(spec)
    if whole.batch is None:
        return [draw(spec, {}, seed=1)]
    sizes = {min(max(b, whole.batch.min), whole.batch.max) for b in batches}
    sizes = {size // whole.batch.step * whole.batch.step or whole.batch.step for size in sizes}
    return [draw(spec, {BATCH: size}, seed=1) for size in sorted(sizes)]


def write_reference(path: Path, runner: Runner, batches: tuple[int, ...] = (1, 7)) -> None:
    """Run the reference on :func:`parity_inputs` and keep both."""
    arrays: dict[str, Array] = {}
    for number, feeds in enumerate(parity_inputs(runner.spec, batches)):
        outputs = runner.run(feeds)
        arrays |= {f"{number}/in/{name}": value for name, value in feeds.items()}
        arrays |= {f"{number}/out/{name}": value for name, value in outputs.items()}
    with path.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def read_reference(path: Path) -> Sets:
    """What :func:`write_reference` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        keys = list(stored)
        numbers = sorted({int(key.split("/")[0]) for key in keys})
        return [
            (
                {k.split("/", 2)[2]: stored[k] for k in keys if k.startswith(f"{n}/in/")},
                {k.split("/", 2)[2]: stored[k] for k in keys if k.startswith(f"{n}/out/")},
            )
            for n in numbers
        ]


def compare(runner: Runner, reference: Sets, precision: str) -> dict[str, Any]:
    """Outputs of a runner against reference outputs, judged by the one table of tolerances.

    Inputs and outputs meet by name; where not one name is shared (lone files), by position.

    Returns:
        ``verdict`` ("pass" or "fail"), ``psnr`` in dB of the worst output (None: identical),
        ``max_abs``, ``samples`` and ``failures``.
    """
    from ganexport.parity import Comparison, tolerance

    ranges = {tensor.name: tensor.range for tensor in runner.spec.outputs}
    comparisons: dict[str, Comparison] = {}
    for number, (feeds, expected) in enumerate(reference):
        actual = _renamed(runner.run(_renamed(feeds, [t.name for t in runner.spec.inputs])), list(expected))
        for name, truth in expected.items():
            comparison = comparisons.setdefault(name, Comparison(name, ranges.get(name)))
            if name in actual:
                comparison.add(truth, actual[name], number)
            else:
                comparison.failures.append(f"{name}: the candidate has no such output")
    row = tolerance("uint8" if all(t.dtype == "uint8" for t in runner.spec.outputs) else precision)
    failures = [text for comparison in comparisons.values() for text in comparison.judge(row)]
    results = [comparison.result() for comparison in comparisons.values()]
    decibels = [r.psnr for r in results if r.psnr is not None]
    return {
        "verdict": "fail" if failures or not results else "pass",
        "psnr": min(decibels) if decibels else None,
        "max_abs": max((r.max_abs for r in results), default=None),
        "samples": min((r.samples for r in results), default=0),
        "precision": row.precision,
        "failures": failures,
    }


def _renamed(arrays: Mapping[str, Array], wanted: list[str]) -> dict[str, Array]:
    """The same arrays under other names, by position: lone files of one generator need not agree on names."""
    if set(arrays) & set(wanted) or len(arrays) != len(wanted):
        return dict(arrays)
    return dict(zip(wanted, arrays.values(), strict=True))


def as_feeds(arrays: Mapping[str, Any]) -> Feeds:
    """Host arrays under their input names."""
    return {name: np.asarray(value) for name, value in arrays.items()}
