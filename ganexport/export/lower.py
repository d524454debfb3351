"""From the fp32 ONNX file to fp16, bf16, int8, or "auto": fp16 with the layers that need it in fp32."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ganexport.build import diverge, onnx_file
from ganexport.build.options import Built, file_name
from ganexport.build.precision import low_precision, matching
from ganexport.build.quantize import UNROUNDED, int8_weights
from ganexport.build.symmetric import symmetric_activations
from ganexport.errors import ExportError, UsageError
from ganexport.export.publish import Publication
from ganexport.parity import Certificate, tolerance

Lowered = tuple[Built, str, Certificate, str, str]
#: Rounds of "auto"; each keeps twice as many further layers in fp32 as the one before.
ROUNDS = 6
#: Times that an int8 file outside its tolerance is made again, and the dB that may be missing for asking for just
#: them: beyond, almost no layer would be left in int8.
RETRIES = 2
WITHIN_REACH = 8.0


def lower(
    publication: Publication,
    source: Built,
    precision: str,
    seen: Sequence[Mapping[str, int]],
    wanted: Sequence[str] = (),
) -> Lowered:
    """Make and certify the ONNX file of another precision.

    Args:
        publication: Holds spec, reference and settings.
        source: The fp32 file in its folder.
        precision: "fp16", "bf16", "int8" or "auto".
        seen: Sizes that the exporter was shown.
        wanted: Formats that will be built from it; TensorRT asks for its own kind of bf16 and int8.

    Returns:
        (file, its precision, certificate, picture of its worst sample, hint for a failure).

    Raises:
        UsageError: ``keep_fp32`` names a node that is not there.
        ExportError: The graph cannot be converted.
    """
    model = diverge.read(publication.folder / source.path)
    keep = publication.settings.options.keep_fp32
    if unknown := matching(model, keep):
        raise UsageError(f"--keep-fp32 {unknown[0]}: the graph has no node or operator of that name")
    if precision == "auto":
        return _auto(publication, source, model, seen)
    publication.say(f"making {precision}")
    if "trt" in wanted and precision == "bf16" and not matching(model, ["ConvTranspose"]):
        keep = (*keep, "ConvTranspose")  # TensorRT-RTX 1.7 has no bf16 deconvolution
    needed = tolerance(precision).min_psnr if publication.settings.min_psnr is None else publication.settings.min_psnr
    asked = Asked(needed)
    built = _make(publication, source, model, precision, keep, wanted, asked)
    certificate, picture = _certify(publication, built, precision, seen)
    for _ in range(RETRIES if precision == "int8" else 0):
        if (more := again(certificate, asked, needed)) is None:
            break
        asked = more
        publication.say("int8 is not good enough yet: " + asked.told())
        try:
            built = _make(publication, source, model, precision, keep, wanted, asked)
        except ExportError:
            break  # what was made stands, and is refused for what it is
        certificate, picture = _certify(publication, built, precision, seen)
    hint = _hint(publication, model, built, precision) if certificate.failures else ""
    return built, precision, certificate, picture, hint


class Asked(NamedTuple):
    """What is asked of int8.

    Attributes:
        min_psnr: dB of the worst picture.
        unrounded: Outputs that no int8 layer reads are left unrounded.
    """

    min_psnr: float
    unrounded: bool = False

    def told(self) -> str:
        """For a progress line."""
        return "leaving outputs unrounded" if self.unrounded else f"asking for {self.min_psnr:.1f} dB"


def again(certificate: Certificate, asked: Asked, needed: float) -> Asked | None:
    """What to ask for after a file that is not within its tolerance: less noise, or else no rounded outputs.

    The certificate looks at more pictures than the search for layers did, and at their distribution, whose Fréchet
    distance drifts in proportion to the noise's power.

    Args:
        certificate: Of the file.
        asked: What was asked of it.
        needed: dB that its worst picture must reach.

    Returns:
        None when the file is good, or nothing is left to ask for.
    """
    worst = min((output.worst_psnr for output in certificate.outputs if output.worst_psnr is not None), default=100.0)
    missing = needed - worst + 0.5 if worst < needed else 0.0
    limit, drift, excess = tolerance(certificate.precision).max_drift, certificate.frechet_drift, 0.0
    if limit is not None and drift is not None and drift > limit:
        excess = 10 * math.log10(drift / limit) + 1
    if max(missing, excess) <= 0:
        return None
    if max(missing, excess) <= WITHIN_REACH:
        return Asked(max(asked.min_psnr + missing, worst + excess), asked.unrounded)
    return None if asked.unrounded else Asked(asked.min_psnr, unrounded=True)


def _make(
    publication: Publication,
    source: Built,
    model: Any,
    precision: str,
    keep: Sequence[str],
    wanted: Sequence[str] = (),
    asked: Asked | None = None,
) -> Built:
    folder = publication.folder
    name = file_name("onnx", precision)
    path = folder / name
    weights: dict[str, str] = {}
    passes = (*source.passes, f"precision-{precision}", *([f"keep-fp32: {', '.join(keep)}"] if keep else []))
    if precision == "int8":
        made, passes = _int8(publication, model, keep, wanted, asked or Asked(tolerance(precision).min_psnr))
        passes = (*source.passes, *passes)
        weights = int8_weights(made)
    else:
        made = low_precision(model, precision, keep)
    onnx_file.sort_nodes(made)
    onnx_file.write_spec(made, publication.spec)
    companions = onnx_file.save_model(made, path)
    onnx_file.check_model(path)
    opset = str(max(e.version for e in made.opset_import if e.domain in ("", "ai.onnx")))
    return Built(name, companions, {"opset": opset, **weights}, passes)


def _int8(
    publication: Publication, model: Any, keep: Sequence[str], wanted: Sequence[str], asked: Asked
) -> tuple[Any, tuple[str, ...]]:
    """The QDQ model and its lines for the manifest."""
    from ganexport.build.cost import Target
    from ganexport.build.equalize import FOLDING, equalised_forms
    from ganexport.build.quantize import calibration_inputs, quantize
    from ganexport.build.rewrites import rewrite

    spec, samples = publication.spec, publication.settings.options.calibration_samples
    target = Target("onnxruntime", "int8")
    symmetric = "trt" in wanted
    # TensorRT runs transposed convolutions as they are; "keep" names nodes of the graph as it is.
    rewritten = not keep and not symmetric

    def finish(form: Any) -> Any:
        return rewrite(form, target)[0] if rewritten else form

    first, rewrites = rewrite(model, target) if rewritten else (model, ())
    folded = model if keep else rewrite(model, target, passes=FOLDING)[0]
    made = quantize(
        first, spec, samples=samples, keep=keep, min_psnr=asked.min_psnr,
        # OpenVINO and TensorRT compute int8 x int8 -> fp32; ONNX Runtime's convolutions have to round.
        wide_outputs=asked.unrounded or (bool({"trt", "openvino"} & set(wanted)) and "onnx" not in wanted),
        # GPUs add products in 32 bits, and ONNX Runtime does so when told to; OpenVINO does what the processor does.
        narrow_weights=False if "trt" in wanted and "openvino" not in wanted else None,
        variants=equalised_forms(folded, lambda: calibration_inputs(spec, samples), finish),
        progress=publication.say,
    )  # fmt: skip
    passes = (*rewrites, *made.passes)
    if asked.unrounded:
        passes += (UNROUNDED,)
    if symmetric and (count := symmetric_activations(made.model)):
        passes += (f"symmetric-activations: {count} nodes",)
    return made.model, passes


def _certify(
    publication: Publication, built: Built, precision: str, seen: Sequence[Mapping[str, int]]
) -> tuple[Certificate, str]:
    return publication.certify(publication.folder / built.path, "onnx", precision, seen, built.requires)


def _layers(publication: Publication, model: Any, path: Path, precision: str) -> list[diverge.Layer]:
    low = onnx_file.load_model(path)
    return diverge.divergence(model, low, [diverge.small_feed(publication.spec)], precision)


def _hint(publication: Publication, model: Any, built: Built, precision: str) -> str:
    """Which layer to look at; nothing when the layers cannot be compared here."""
    if precision == "bf16":
        return "try --precision fp16 or auto"  # ONNX Runtime's CPU cannot run bf16 layer by layer
    try:
        layers = _layers(publication, model, publication.folder / built.path, precision)
    except Exception:  # noqa: BLE001 - a hint is never worth hiding the failure itself
        return ""
    first = diverge.first_diverging(layers)
    if first is None:
        return ""
    overflow = f", whose values reach {first.peak:.3g}" if precision == "fp16" and first.peak > 3e4 else ""
    return (
        f"the first layer to diverge is {first.told()}{overflow}; --precision auto keeps such layers in fp32, "
        f"or name it: --keep-fp32 {first.node}"
    )


def _auto(publication: Publication, source: Built, model: Any, seen: Sequence[Mapping[str, int]]) -> Lowered:
    """fp16; whatever overflows, then whatever adds most error, goes back to fp32 until the certificate passes."""
    given = publication.settings.options.keep_fp32
    keep: set[str] = set()
    publication.say("making fp16")
    built = _make(publication, source, model, "fp16", given)
    layers = _layers(publication, model, publication.folder / built.path, "fp16")
    keep |= diverge.neighbours(model, set(diverge.overflowing(layers)))
    certificate: Certificate | None = None
    picture = ""
    for round_number in range(ROUNDS):
        if keep or certificate is not None:
            publication.say(f"keeping {len(keep)} layers in fp32")
            built = _make(publication, source, model, "fp16", (*given, *sorted(keep)))
        certificate, picture = _certify(publication, built, "fp16", seen)
        if not certificate.failures:
            break
        layers = _layers(publication, model, publication.folder / built.path, "fp16")
        offenders = sorted((x for x in layers if x.node not in keep), key=lambda x: -x.growth)[: 2 << round_number]
        if not offenders:
            break
        keep |= diverge.neighbours(model, {layer.node for layer in offenders})
    assert certificate is not None
    hint = "even with the diverging layers in fp32; use --precision fp32" if certificate.failures else ""
    return built, "fp16", certificate, picture, hint
