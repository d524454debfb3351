"""A style generator as two artifacts: mapping (z to w) and synthesis (w to the image), proved together.

The cut is behind one sub-module, named by its path. Services that edit, mix or interpolate latents run
the two halves apart; each is an artifact like any other, in every format.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from ganexport.artifact import MANIFEST, Artifact, ArtifactWriter, write_atomic
from ganexport.build import certify as certifying
from ganexport.errors import BackendUnavailableError, OutputError, ParityError, UsageError
from ganexport.export.convert import ConvertSettings, convert_opened
from ganexport.export.engines import open_engine
from ganexport.export.mapping import latent_moments
from ganexport.export.prepare.evaluation_mode import freeze
from ganexport.export.prepare.mapping import FromMapping, UpToMapping
from ganexport.export.prepared import bake_truncation, prepare
from ganexport.export.probe import probe
from ganexport.export.source import Description, TorchSource
from ganexport.export.wrapped import Invocation, Wrapped, run_module, tensors_of, torch_dtype
from ganexport.parity import Certificate
from ganexport.runtime.base import Runner
from ganexport.seeding import latents
from ganexport.spec import BATCH, GeneratorSpec, Normal, TensorSpec

Array = NDArray[Any]
#: Name of the tensor between the halves, and of the two folders.
LATENT, PARTS = "w", ("mapping", "synthesis")
#: The proof that the halves together are the whole.
PROOF = "certificate.json"


def convert_split(
    source: TorchSource, description: Description, wanted: Sequence[str], settings: ConvertSettings, output: Path,
    path: str, say: Callable[[str], None],
) -> tuple[Artifact, Artifact]:  # fmt: skip
    """Write ``output/mapping``, ``output/synthesis`` and ``output/certificate.json``, all or nothing.

    Args:
        source: The whole generator.
        description: As the user gave it; its outputs belong to the synthesis.
        wanted: Formats of each half.
        settings: Of each half.
        output: A new or empty folder, or an earlier split.
        path: Of the mapping network.
        say: Progress.

    Raises:
        UsageError: No such sub-module, or the generator cannot be cut behind it.
        ParityError: A half, or both together, are outside tolerance.
        OutputError: The folder is something else, or cannot be written.
    """
    _refuse_other_folders(output)
    source.module.eval()
    freeze(source.module)
    source, baked = bake_truncation(source, settings.truncation, path)
    settings = msgspec.structs.replace(settings, truncation=None, mapping=None)
    mapping, synthesis = cut(source, path)
    whole = prepare(source, declared=description.outputs, noise=settings.noise, uint8=settings.uint8)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
    try:
        plain = msgspec.structs.replace(description, outputs=())
        halves = []
        for name, half in zip(PARTS, (mapping, synthesis), strict=True):
            say(f"{name}:")
            told = description if name == "synthesis" else plain
            part = settings if name == "synthesis" else msgspec.structs.replace(settings, uint8=False)
            with ArtifactWriter(folder / name) as writer:
                halves.append(convert_opened(half, told, tuple(wanted), part, writer, say, tuple(baked)))
        say("verifying both together")
        certificate = _prove(halves[0], halves[1], whole.reference, whole.spec, settings)
        if certificate.failures and not settings.allow_mismatch:
            raise ParityError(
                f"mapping and synthesis together are outside tolerance, nothing was published: "
                f"{'; '.join(certificate.failures[:3])} (--allow-mismatch publishes them all the same)"
            )
        write_atomic(folder / PROOF, msgspec.json.format(msgspec.json.encode(certificate), indent=2) + b"\n")
        folder.chmod(0o755)
        if output.exists():
            shutil.rmtree(output)
        folder.replace(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Artifact(output / PARTS[0]), Artifact(output / PARTS[1])


def _refuse_other_folders(output: Path) -> None:
    if not output.exists():
        return
    ours = output.is_dir() and {p.name for p in output.iterdir()} <= {*PARTS, PROOF}
    if not ours or any(p.is_dir() and not (p / MANIFEST).is_file() for p in output.iterdir()):
        raise OutputError(f"{output}: exists and is no split generator; choose another output")


def cut(source: TorchSource, path: str) -> tuple[TorchSource, TorchSource]:
    """The two halves as sources of their own.

    Raises:
        UsageError: No such sub-module, or it does not return one tensor with a batch.
        ExportError: ``forward`` fails, or never calls it.
    """
    spec = source.spec
    names = [tensor.name for tensor in spec.inputs]
    call = Invocation(source.module, names)
    mean, deviation = latent_moments(source, path, draws=1024)
    first = UpToMapping(source.module, path, call)
    found = probe(Wrapped(first, names, source.call, rewrite=False).eval(), spec)
    latent = msgspec.structs.replace(found.outputs[0], name=_free(names))
    if not latent.shape or latent.shape[0] != BATCH:
        raise UsageError(f"--mapping {path}: gives {list(latent.shape)}, not one latent a sample")
    sampler = Normal(
        float(mean.mean()), float((deviation.square() + mean.square()).mean().sub(mean.mean() ** 2).sqrt())
    )
    reach_w = [name for name in names if _matters(first, source, name)]
    kept = {t.name for t in spec.inputs if t.name in reach_w} or set(names)
    mapping = _half(source, first, [t for t in spec.inputs if t.name in kept], names, (latent,), spec)

    shapes = [(t.resolve({**spec.sizes(), BATCH: 1})[1:], torch_dtype(t)) for t in spec.inputs]
    unbatched = [t.name for t in spec.inputs if not t.shape or t.shape[0] != BATCH]
    needed = [t for t in spec.inputs if t.name in unbatched or _matters_beside(source, path, call, t, latent, sampler)]
    wanted = {t.name for t in needed}
    second = FromMapping(
        source.module, path, call,
        [None if t.name in wanted else known for t, known in zip(spec.inputs, shapes, strict=True)],
    )  # fmt: skip
    given = msgspec.structs.replace(latent, sampler=sampler)
    used = {size for t in (given, *needed) for size in t.shape}
    dims = tuple(dim for dim in spec.dims if dim.name in used)
    synthesis_spec = GeneratorSpec((given, *needed), (), dims, f"{spec.name}_synthesis")
    synthesis = TorchSource(second, synthesis_spec, source.provenance, source.call)
    return mapping, synthesis


def _free(names: Sequence[str]) -> str:
    name = LATENT
    while name in names:
        name += "_"
    return name


class _Chosen(torch.nn.Module):
    """A first half that is given some of its inputs; the others do not reach w, and zeros stand for them."""

    def __init__(self, first: UpToMapping, shapes: list[Any]) -> None:
        super().__init__()
        self.first, self.shapes = first, shapes

    def forward(self, *inputs: torch.Tensor, **keywords: Any) -> torch.Tensor:
        left = iter(inputs)
        batch = inputs[0].shape[0]
        every = [next(left) if s is None else torch.zeros((batch, *s[0]), dtype=s[1]) for s in self.shapes]
        value: torch.Tensor = self.first(*every, **keywords)
        return value


def _half(
    source: TorchSource, first: UpToMapping, inputs: list[TensorSpec], names: list[str],
    outputs: tuple[TensorSpec, ...], spec: GeneratorSpec,
) -> TorchSource:  # fmt: skip
    kept = {t.name for t in inputs}
    shapes = [
        None if t.name in kept else (t.resolve({**spec.sizes(), BATCH: 1})[1:], torch_dtype(t)) for t in spec.inputs
    ]
    used = {size for t in inputs for size in t.shape}
    dims = tuple(dim for dim in spec.dims if dim.name in used)
    half = GeneratorSpec(tuple(inputs), outputs, dims, f"{spec.name}_mapping")
    module = first if len(inputs) == len(names) else _Chosen(first, shapes)
    return TorchSource(module, half, source.provenance, source.call)


def _matters(first: UpToMapping, source: TorchSource, name: str) -> bool:
    """Whether w changes with an input."""
    spec = source.spec
    size = 1 if spec.batch is None else max(spec.batch.min, min(4, spec.batch.max))
    function = Wrapped(first, [t.name for t in spec.inputs], source.call, rewrite=False).eval()
    feeds, other = latents(spec, 1, 0, size), latents(spec, 2, 0, size)
    before = run_module(function, tensors_of(spec, feeds))[0]
    after = run_module(function, tensors_of(spec, feeds | {name: other[name]}))[0]
    return not torch.equal(before, after)


def _matters_beside(
    source: TorchSource, path: str, call: Invocation, tensor: TensorSpec, latent: TensorSpec, sampler: Normal
) -> bool:
    """Whether the outputs change with an input while w stays as it is."""
    spec = source.spec
    size = 1 if spec.batch is None else max(spec.batch.min, min(4, spec.batch.max))
    second = FromMapping(source.module, path, call, [None] * len(spec.inputs))
    given = msgspec.structs.replace(latent, sampler=sampler)
    dims = tuple(dim for dim in spec.dims)
    whole = GeneratorSpec((given, *spec.inputs), (), dims, spec.name)
    function = Wrapped(second, [t.name for t in whole.inputs], source.call, rewrite=False).eval()
    feeds, other = latents(whole, 1, 0, size), latents(whole, 2, 0, size)
    torch.manual_seed(0)
    before = run_module(function, tensors_of(whole, feeds))
    torch.manual_seed(0)
    after = run_module(function, tensors_of(whole, feeds | {tensor.name: other[tensor.name]}))
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


class _Chain:
    """Both halves as one engine."""

    def __init__(self, first: Runner, second: Runner, names: tuple[str, str]) -> None:
        self.first, self.second, self.names = first, second, names

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        wanted = {t.name for t in self.first.spec.inputs}
        w = self.first.run({name: value for name, value in feeds.items() if name in wanted})[self.names[0]]
        others = {t.name for t in self.second.spec.inputs} - {self.names[1]}
        given = {name: value for name, value in feeds.items() if name in others}
        return self.second.run({self.names[1]: np.ascontiguousarray(w, np.float32), **given})


def _prove(
    mapping: Artifact, synthesis: Artifact, reference: Any, spec: GeneratorSpec, settings: ConvertSettings
) -> Certificate:
    """Both halves, one after the other, against the whole."""
    engines: list[Runner] = []
    try:
        engines.append(_first_runnable(mapping))
        engines.append(_first_runnable(synthesis))
        chain = _Chain(engines[0], engines[1], (mapping.spec.outputs[0].name, synthesis.spec.inputs[0].name))
        runtime = " then ".join(dict.fromkeys(engine.runtime for engine in engines))
        precision = mapping.manifest.files[0].precision
        return certifying.certify(
            chain, reference, spec, precision, reference_name=reference.name, runtime=runtime, budget=settings.budget,
            min_psnr=settings.min_psnr, optimum=64,
        ).certificate  # fmt: skip
    finally:
        for engine in engines:
            engine.close()


def _first_runnable(artifact: Artifact) -> Runner:
    reasons = []
    for file in artifact.manifest.files:
        try:
            return open_engine(artifact.verified_path(file), artifact.spec, file.format, file.precision, file.requires)
        except (BackendUnavailableError, KeyError) as error:
            reasons.append(f"{file.path}: {error}")
    raise BackendUnavailableError(f"{artifact.path}: nothing in it runs here: {'; '.join(reasons)}")
