"""``convert``: from any source to a verified artifact."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ganexport.artifact import Artifact, ArtifactWriter
from ganexport.build.certify import check_limits
from ganexport.build.options import BuildOptions
from ganexport.errors import UsageError
from ganexport.export import formats
from ganexport.export.source import Description, TorchSource, open_source
from ganexport.spec import BATCH, Dim, GeneratorSpec, TensorSpec, parse_call, parse_dim, parse_input, parse_output

#: In the place of a format: whatever is fastest here.
AUTO = "auto"


def convert(
    source: Any,
    *,
    to: str | Sequence[str] = ("onnx",),
    output: str | os.PathLike[str],
    precision: str | None = None,
    inputs: Sequence[str | TensorSpec] = (),
    outputs: Sequence[str] = (),
    dims: Sequence[str | Dim] = (),
    batch: str | Dim | None = None,
    weights: str | os.PathLike[str] | None = None,
    weights_key: str | None = None,
    call: str | Mapping[str, Any] = "",
    noise: str = "error",
    truncation: float | None = None,
    mapping: str | None = None,
    output_dtype: str | None = None,
    options: BuildOptions | None = None,
    verify_budget: float = 120.0,
    min_psnr: float | None = None,
    allow_mismatch: bool = False,
    optimize_for: str = "balanced",
    bench_batches: Sequence[int] = (),
    allow_torch: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Artifact:
    """Export a generator, prove each file against its source, and publish the artifact.

    Args:
        source: A run, a trained model's name, ``package.module:factory``, an ``nn.Module`` (copied, and
            left as it is), an artifact or an .onnx file. The last two need no torch.
        to: Formats: "torchscript", "onnx", "trt", "openvino", "aoti"; or "auto" alone: the fastest
            that this machine can run, see :func:`ganexport.export.auto.auto`.
        output: The artifact's folder. An artifact that is converted into itself keeps its files, where
            they hold at the sizes asked for.
        precision: "fp32", "fp16", "bf16", "int8", or "auto": fp16 with the layers that need it in
            fp32. Made on the graph; inputs and outputs stay fp32. "fp32" when not said; with
            ``to="auto"`` every precision competes when not said.
        inputs: ``"z=normal[batch,512]"`` and so on, in the order of the module's arguments.
        outputs: ``"image=[-1,1]:NCHW"``: names, ranges and layouts.
        dims: ``"height=64:256:1024/8"``: ranges of symbolic dimensions.
        batch: ``"1:8:64"``, short for ``dims=["batch=1:8:64"]``.
        weights: safetensors, or a checkpoint of tensors, for a factory's module.
        weights_key: Where the state is in a nested checkpoint, e.g. "g_ema".
        call: Keyword arguments of every call, literals only: ``"noise_mode='const'"``.
        noise: What becomes of random numbers drawn inside forward: "error", "input", "constant".
        truncation: Baked into the graph.
        mapping: Path of the sub-module that maps z to w; its mean latent is computed and baked in where
            truncation needs one.
        output_dtype: "uint8": the image leaves the graph as NHWC bytes.
        options: Of the builders.
        verify_budget: Seconds of comparing a file.
        min_psnr: dB; overrides the tolerance table's.
        allow_mismatch: Publish a file outside tolerance, with its failures recorded.
        optimize_for: With ``to="auto"``: "latency" (the smallest batch), "throughput" (the largest)
            or "balanced" (all alike).
        bench_batches: With ``to="auto"``: batches to measure; the smallest, optimal and largest when empty.
        allow_torch: With ``to="auto"``: formats that need torch at run time compete too.
        progress: Told what happens, a line at a time.

    Returns:
        The published artifact.

    Raises:
        UsageError: Options that cannot be meant.
        ExportError: A generator that cannot be exported as asked; cause, line and fix are named.
        ParityError: A file is outside its tolerance; nothing was published.
        MissingDependencyError: A package that a format needs is not installed.
        OutputError: The artifact cannot be written.
    """
    wanted = tuple(dict.fromkeys([to] if isinstance(to, str) else to))
    if AUTO in wanted:
        from ganexport.export.auto import convert_auto

        words: dict[str, Any] = {
            "inputs": inputs, "outputs": outputs, "dims": dims, "batch": batch, "weights": weights,
            "weights_key": weights_key, "call": call, "noise": noise, "truncation": truncation,
            "output_dtype": output_dtype, "mapping": mapping,
        }  # fmt: skip
        return convert_auto(
            source, wanted, output, words, precision=precision or AUTO, options=options or BuildOptions(),
            budget=verify_budget, min_psnr=min_psnr, allow_mismatch=allow_mismatch, goal=optimize_for,
            batches=bench_batches, allow_torch=allow_torch, progress=progress,
        )  # fmt: skip
    if optimize_for != "balanced" or bench_batches or allow_torch:
        raise UsageError("--optimize-for, --bench-batch and --allow-torch belong to --to auto")
    precision, options = precision or "fp32", options or BuildOptions()
    formats.check(wanted, precision, options)
    settings = ConvertSettings(
        precision, noise, truncation, _gives_bytes(output_dtype), options, verify_budget, min_psnr,
        allow_mismatch, mapping,
    )  # fmt: skip
    description = describe(inputs, outputs, dims, batch, weights, weights_key, call)
    opened = open_source(source, description, precision, wanted)
    if mapping is not None and truncation is None:
        raise UsageError("--mapping serves --truncation and --split: give one of them, or leave it out")
    say = progress or (lambda _text: None)
    with ArtifactWriter(output) as writer:
        return convert_opened(opened, description, wanted, settings, writer, say)


def convert_opened(
    opened: Any, description: Description, wanted: tuple[str, ...], settings: ConvertSettings, writer: ArtifactWriter,
    say: Callable[[str], None], passes: tuple[str, ...] = (),
) -> Artifact:  # fmt: skip
    """:func:`convert` once the source is open.

    Args:
        opened: A ``TorchSource`` or ``GraphSource``.
        description: What the user said about it.
        wanted: Formats.
        settings: What else was asked for.
        writer: Of the artifact.
        say: Progress.
        passes: What was done to the source already, for the manifest.
    """
    if before := writer.replaces(opened.provenance.source):
        say(f"{writer.destination} holds {before}, and will be replaced")
    if isinstance(opened, TorchSource):
        from ganexport.export.from_module import convert_module

        return convert_module(opened, description, wanted, settings, writer, say, passes)
    from ganexport.export.from_graph import convert_graph

    return convert_graph(opened, description, wanted, settings, writer, say)


def split(
    source: Any, mapping: str, *, to: str | Sequence[str] = ("onnx",), output: str | os.PathLike[str],
    progress: Callable[[str], None] | None = None, **described: Any,
) -> tuple[Artifact, Artifact]:  # fmt: skip
    """Export a style generator as two artifacts, ``output/mapping`` and ``output/synthesis``, proved together.

    Args:
        source: As for :func:`convert`, but a module: finished graphs cannot be cut by a sub-module's name.
        mapping: Path of the sub-module that maps z to w.
        to: Formats of each half.
        output: Folder of both.
        progress: Told what happens, a line at a time.
        described: As for :func:`convert`.

    Returns:
        The two artifacts.

    Raises:
        UsageError: The source is no module, or cannot be cut there.
        As :func:`convert`.
    """
    wanted = tuple(dict.fromkeys([to] if isinstance(to, str) else to))
    precision = described.pop("precision", None) or "fp32"
    options = described.pop("options", None) or BuildOptions()
    formats.check(wanted, precision, options)
    description = describe(**{key: described.pop(key) for key in _DESCRIBED if key in described})
    settings = ConvertSettings(
        precision, described.pop("noise", "error"), described.pop("truncation", None),
        _gives_bytes(described.pop("output_dtype", None)), options,
        described.pop("verify_budget", 120.0), described.pop("min_psnr", None), described.pop("allow_mismatch", False),
    )  # fmt: skip
    if described:
        raise UsageError(f"--split takes no {sorted(described)[0]}")
    opened = open_source(source, description, precision, wanted)
    if not isinstance(opened, TorchSource):
        raise UsageError("--split needs a module (a run, package.module:factory); this is a finished graph")
    from ganexport.export.split import convert_split

    return convert_split(opened, description, wanted, settings, Path(output), mapping, progress or (lambda _text: None))


def _gives_bytes(output_dtype: str | None) -> bool:
    if output_dtype not in (None, "float32", "uint8"):
        raise UsageError(f"output dtype {output_dtype!r}: float32 or uint8")
    return output_dtype == "uint8"


def _source_spec(spec: GeneratorSpec | None, noise: str) -> GeneratorSpec | None:
    """An artifact's spec without the inputs that ``--noise input`` added."""
    if spec is None or noise != "input":
        return spec
    kept = tuple(tensor for tensor in spec.inputs if not re.fullmatch(r"noise_\d+_*", tensor.name))
    return msgspec.structs.replace(spec, inputs=kept)


def _declared(spec: GeneratorSpec | None) -> tuple[tuple[str, tuple[float, float], str | None], ...]:
    """The outputs of a spec in the words of ``--output``; bytes have lost the range of the values behind them."""
    outputs = spec.outputs if spec is not None else ()
    return tuple((t.name, t.range, t.layout) for t in outputs if t.range is not None and t.dtype != "uint8")


#: Arguments of :func:`describe`.
_DESCRIBED = ("inputs", "outputs", "dims", "batch", "weights", "weights_key", "call")


class ConvertSettings(msgspec.Struct, frozen=True):
    """What :func:`convert` was asked for, apart from source and formats."""

    precision: str = "fp32"
    noise: str = "error"
    truncation: float | None = None
    uint8: bool = False
    options: BuildOptions = BuildOptions()
    budget: float = 120.0
    min_psnr: float | None = None
    allow_mismatch: bool = False
    mapping: str | None = None

    def __post_init__(self) -> None:
        check_limits(self.budget, self.min_psnr)
        if self.truncation is not None and not math.isfinite(self.truncation):
            raise UsageError(f"--truncation {self.truncation:g}: needs a finite number")


def describe(
    inputs: Sequence[str | TensorSpec] = (),
    outputs: Sequence[str] = (),
    dims: Sequence[str | Dim] = (),
    batch: str | Dim | None = None,
    weights: str | os.PathLike[str] | None = None,
    weights_key: str | None = None,
    call: str | Mapping[str, Any] = "",
) -> Description:
    """The user's words as a :class:`Description`.

    Raises:
        UsageError: A text that cannot be parsed, an input that nothing draws, or a dimension given twice.
    """
    described = tuple(parse_input(text) if isinstance(text, str) else text for text in inputs)
    for tensor in described:
        if tensor.sampler is None:
            shape = ",".join(map(str, tensor.shape))
            raise UsageError(
                f"--input {tensor.name}: nothing draws data, and files are compared on drawn inputs: say what it is "
                f'like, for pictures "{tensor.name}=uniform(-1,1)[{shape}]"; .run feeds it with your own all the same'
            )
    ranges = [parse_dim(dim) if isinstance(dim, str) else dim for dim in dims]
    if batch is not None:
        ranges.append(parse_dim(f"{BATCH}={batch}") if isinstance(batch, str) else batch)
    names = [dim.name for dim in ranges]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"dimension {repeated[0]!r} is given twice")
    return Description(
        described,
        tuple(parse_output(text) for text in outputs),
        tuple(ranges),
        Path(weights) if weights is not None else None,
        weights_key,
        parse_call(call) if isinstance(call, str) else dict(call),
    )


def open_reference(
    source: Any, *, uint8: bool = False, assumed: GeneratorSpec | None = None, **description: Any
) -> Any:
    """The source as something that runs: the truth for ``verify --against``.

    Args:
        source: As for :func:`convert`.
        uint8: Whether images leave as bytes.
        assumed: Inputs, ranges and names of outputs of a module that are not described.
        description: As for :func:`convert`.

    Raises:
        As :func:`convert`.
    """
    noise = description.pop("noise", "error")
    truncation = description.pop("truncation", None)
    mapping = description.pop("mapping", None)
    described = msgspec.structs.replace(describe(**description), assumed=_source_spec(assumed, noise))
    opened = open_source(source, described)
    if isinstance(opened, TorchSource):
        from ganexport.export.prepared import prepare

        declared = described.outputs or _declared(described.assumed)
        prepared = prepare(opened, declared=declared, noise=noise, truncation=truncation, mapping=mapping, uint8=uint8)
        prepared.reference.weights_sha256 = opened.provenance.weights_sha256
        return prepared.reference
    from ganexport.export.from_graph import GraphReference, refuse_module_options

    refuse_module_options(opened.path.name, noise, truncation, mapping)
    return GraphReference.open(opened, described)
