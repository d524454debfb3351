"""What ``--to auto`` tries on this machine: backend × precision × rewrite, each built into a folder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from ganexport.build import onnx_file, openvino
from ganexport.build.cost import Target
from ganexport.build.openvino_wide import keep_vectors_wide
from ganexport.build.options import BuildOptions
from ganexport.build.quantize import int8_weights
from ganexport.build.rewrites import rewrite
from ganexport.environment import usable_cores
from ganexport.errors import GanExportError
from ganexport.runtime import BACKENDS
from ganexport.runtime._onnxruntime_cuda import can_graph
from ganexport.spec import GeneratorSpec

if TYPE_CHECKING:
    import onnx


#: Ways to rewrite a graph for int8 that the cost model cannot tell apart well enough: "" is its own choice.
VARIANTS: dict[str, dict[str, dict[str, Any]] | None] = {
    "": None,
    "crop": {"conv-transpose": {"form": "crop"}, "upsample-conv": {"form": "crop"}},
    "blur folded": {"fold-blur": {"always": True}},
}


class Wanted(Protocol):
    """The part of the settings that concerns building."""

    @property
    def precision(self) -> str:
        """ "auto", or the only one to build."""
        ...

    @property
    def min_psnr(self) -> float:
        """dB that int8 must reach."""
        ...

    @property
    def options(self) -> BuildOptions:
        """Of the builders."""
        ...


class Option(msgspec.Struct, frozen=True, omit_defaults=True):
    """One candidate: a file, a backend and its settings.

    Attributes:
        name: Unique.
        backend: Name in :data:`ganexport.runtime.BACKENDS`.
        format: Of the file.
        precision: Row of the tolerance table that applies to it.
        path: The file.
        companions: Names of files that belong to it, beside it.
        settings: Of the backend.
        device: That it runs on; the backend's own choice when empty.
        passes: Steps that led to it.
        requires: What it needs to run.
        unavailable: Why it cannot be tried here.
    """

    name: str
    backend: str
    format: str
    precision: str
    path: str
    companions: tuple[str, ...] = ()
    settings: dict[str, Any] = {}
    passes: tuple[str, ...] = ()
    requires: dict[str, str] = {}
    unavailable: str = ""
    device: str = ""


def with_threads(option: Option) -> Iterator[Option]:
    """The candidate with fewer threads than all cores: half of them, and one."""
    if "threads" not in option.settings:
        return
    for threads in sorted({1, usable_cores() // 2} - {0, usable_cores()}):
        changed = {**option.settings, "threads": threads}
        yield msgspec.structs.replace(option, name=f"{option.name}, {threads} threads", settings=changed)


def with_layouts(option: Option) -> Iterator[Option]:
    """The candidate on CUDA with its convolutions' channels last."""
    if option.device == "cuda":
        yield msgspec.structs.replace(option, name=f"{option.name}, nhwc", settings={**option.settings, "nhwc": True})


def build_options(
    path: Path, spec: GeneratorSpec, folder: Path, batch: int, wanted: Wanted, say: Callable[[str], None]
) -> Iterator[Option]:
    """Everything worth measuring here; what cannot be built or run comes with the reason.

    Args:
        path: The fp32 ONNX file.
        spec: Of it.
        folder: Where to build.
        batch: Batch size that rewrites are priced for.
        wanted: Tolerance and calibration.
        say: Progress.
    """
    model = onnx_file.load_model(path)
    builder = _Builder(model, path, spec, folder, batch, wanted, say)
    yield from builder.onnxruntime()
    yield from builder.openvino()
    yield from builder.tensorrt()


class _Builder:
    """Builds the candidates of one model, each backend's in turn."""

    def __init__(
        self,
        model: onnx.ModelProto,
        path: Path,
        spec: GeneratorSpec,
        folder: Path,
        batch: int,
        wanted: Wanted,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.path, self.spec, self.folder = model, path, spec, folder
        self.batch, self.wanted, self.say = batch, wanted, say

    def _unavailable(self, backend: str) -> str:
        reason: str | None = BACKENDS.load(backend).RUNNER.unavailable()
        return reason or ""

    def _wants(self, precision: str) -> bool:
        return self.wanted.precision in ("auto", precision)

    def onnxruntime(self) -> Iterator[Option]:
        """On the processor fp32 as it is, fp32 rewritten, int8; where it has a GPU, what :meth:`_on_cuda` makes too."""
        backend, settings = "onnxruntime", {"threads": usable_cores()}
        if reason := self._unavailable(backend):
            yield Option(backend, backend, "onnx", "fp32", "", unavailable=reason)
            return
        opset = {"opset": str(max((e.version for e in self.model.opset_import if not e.domain), default=0))}
        if "cuda" not in BACKENDS.load(backend).RUNNER.usable_devices():
            yield from self._on_cpu(backend, settings, opset)
            return
        for option in self._on_cpu(backend, settings, opset):
            yield msgspec.structs.replace(option, device="cpu")
        yield from self._guarded("onnxruntime cuda", backend, "fp32", self._on_cuda, opset)

    def _on_cpu(self, backend: str, settings: dict[str, Any], opset: dict[str, str]) -> Iterator[Option]:
        if self._wants("fp32"):
            yield Option("onnxruntime fp32", backend, "onnx", "fp32", str(self._plain), (), settings, (), opset)
            model, passes = rewrite(self.model, Target(backend, "fp32", self.batch))
            if passes:
                file = str(self._save(model, "ort-fp32", "generator.onnx"))
                yield Option("onnxruntime fp32 rewritten", backend, "onnx", "fp32", file, (), settings, passes, opset)
        if self._wants("int8"):
            yield from self._guarded("onnxruntime int8", backend, "int8", self._onnxruntime_int8, settings, opset)

    def _onnxruntime_int8(self, settings: dict[str, Any], requires: dict[str, str]) -> Iterator[Option]:
        model, passes = self._int8("onnxruntime", "")
        file = self._save(model, "ort-int8", "generator.int8.onnx")
        requires = {**requires, **int8_weights(model)}
        yield Option("onnxruntime int8", "onnxruntime", "onnx", "int8", str(file), (), settings, passes, requires)

    def _on_cuda(self, requires: dict[str, str]) -> Iterator[Option]:
        """fp32, TF32 and fp16, the last also with transposed convolutions as convolutions; launched and replayed."""
        from ganexport.build.precision import low_precision

        def option(name: str, precision: str, file: Path, *passes: str, **settings: Any) -> Option:
            return Option(
                f"onnxruntime {name} cuda", "onnxruntime", "onnx", precision, str(file), device="cuda",
                settings=settings, passes=passes, requires=requires,
            )  # fmt: skip

        found = []
        if self._wants("fp32"):
            found.append(option("fp32", "fp32", self._plain))
            if self.wanted.precision == "auto":
                found.append(option("tf32", "tf32", self._plain, tf32=True))
        if self._wants("fp16"):
            file = self._save(low_precision(self.model, "fp16"), "cuda-fp16", "generator.fp16.onnx")
            found.append(option("fp16", "fp16", file, "fp16"))
            model, passes = rewrite(self.model, Target("onnxruntime-cuda", "fp16", self.batch))
            if passes:
                file = self._save(low_precision(model, "fp16"), "cuda-fp16r", "generator.fp16.onnx")
                found.append(option("fp16 rewritten", "fp16", file, *passes, "fp16"))
        for launched in found:
            yield launched
            if can_graph(self.spec):
                settings = {**launched.settings, "cuda_graph": True}
                yield msgspec.structs.replace(launched, name=f"{launched.name} graph", settings=settings)

    def openvino(self) -> Iterator[Option]:
        """fp32, bf16 and int8; the last two on rewritten graphs too."""
        backend = "openvino"
        if reason := self._unavailable(backend) or openvino.unavailable() or "":
            yield Option(backend, backend, "openvino", "fp32", "", unavailable=reason)
            return
        if self._wants("fp32"):
            yield from self._guarded("openvino fp32", backend, "fp32", self._openvino_plain)
        if self._wants("bf16") and _has_bf16():
            yield from self._guarded("openvino bf16", backend, "bf16", self._openvino_bf16)
        for variant in self._variants("int8") if self._wants("int8") else ():
            name = "openvino int8" + (f" ({variant})" if variant else "")
            yield from self._guarded(name, backend, "int8", self._openvino_int8, name, variant)

    def _variants(self, precision: str) -> list[str]:
        """Names in :data:`VARIANTS` of the graphs worth building for OpenVINO: those that differ."""
        found: dict[bytes, str] = {}
        for name, options in VARIANTS.items():
            model, _ = rewrite(self.model, Target("openvino", precision, self.batch), options=options)
            found.setdefault(_structure(model), name)
        return list(found.values())

    def _openvino_plain(self) -> Iterator[Option]:
        yield self._openvino("openvino fp32", self.model, (), "ov-fp32", "fp32", {})
        model, passes = rewrite(self.model, Target("openvino", "fp32", self.batch))
        if passes:
            yield self._openvino("openvino fp32 rewritten", model, passes, "ov-fp32r", "fp32", {})

    def _openvino_bf16(self) -> Iterator[Option]:
        bf16 = {"precision": "bf16"}
        yield self._openvino("openvino bf16", self.model, (), "ov-bf16", "bf16", bf16)
        model, passes = rewrite(self.model, Target("openvino", "bf16", self.batch))
        if passes:
            yield self._openvino("openvino bf16 rewritten", model, passes, "ov-bf16r", "bf16", bf16)

    def _openvino_int8(self, name: str, variant: str) -> Iterator[Option]:
        model, passes = self._int8("openvino", variant)
        folder = f"ov-int8-{variant.replace(' ', '-') or 'chosen'}"
        made = self._openvino(name, model, passes, folder, "int8", {})
        yield made
        if _has_bf16():
            settings = {**made.settings, "precision": "bf16"}
            yield msgspec.structs.replace(made, name=f"{name} + bf16", settings=settings)

    def _openvino(
        self, name: str, model: onnx.ModelProto, passes: tuple[str, ...], folder: str, precision: str,
        settings: dict[str, Any],
    ) -> Option:  # fmt: skip
        source = self._save(model, folder, "source.onnx")
        built = openvino.build(source, self.spec, source.parent, precision, self.wanted.options)
        file = source.parent / built.path
        if precision != "fp32" and (count := keep_vectors_wide(file)):
            passes = (*passes, f"fp32-vectors x{count}")
        return Option(
            name, "openvino", "openvino", precision, str(file), built.companions,
            {"threads": usable_cores(), **settings}, (*passes, *built.passes), dict(built.requires),
        )  # fmt: skip

    def _int8(self, backend: str, variant: str) -> tuple[onnx.ModelProto, tuple[str, ...]]:
        from ganexport.build.equalize import FOLDING, equalised_forms
        from ganexport.build.quantize import calibration_inputs, quantize

        target, samples = Target(backend, "int8", self.batch), self.wanted.options.calibration_samples
        model, passes = rewrite(self.model, target, options=VARIANTS[variant])
        folded = rewrite(self.model, target, passes=FOLDING)[0]
        forms = equalised_forms(
            folded,
            lambda: calibration_inputs(self.spec, samples),
            lambda form: rewrite(form, target, options=VARIANTS[variant])[0],
        )
        made = quantize(
            model, self.spec, samples=samples, min_psnr=self.wanted.min_psnr, variants=forms,
            wide_outputs=backend == "openvino", progress=self.say,
        )  # fmt: skip
        return made.model, (*passes, *made.passes)

    def tensorrt(self) -> Iterator[Option]:
        """fp32 and fp16 engines, where TensorRT and a GPU are."""
        backend = "tensorrt"
        if reason := self._unavailable(backend):
            yield Option(backend, backend, "trt", "fp32", "", unavailable=reason)
            return
        for precision in filter(self._wants, ("fp32", "fp16")):
            yield from self._guarded(f"tensorrt {precision}", backend, precision, self._tensorrt, precision)

    def _tensorrt(self, precision: str) -> Iterator[Option]:
        from ganexport.build import tensorrt
        from ganexport.build.precision import low_precision

        model = self.model if precision == "fp32" else low_precision(self.model, precision)
        source = self._save(model, f"trt-{precision}", "source.onnx")
        built = tensorrt.build(source, self.spec, source.parent, precision, self.wanted.options)
        yield Option(
            f"tensorrt {precision}", "tensorrt", "trt", precision, str(source.parent / built.path), built.companions,
            {}, built.passes, dict(built.requires),
        )  # fmt: skip

    # ---- helpers ------------------------------------------------------------------------------

    def _guarded(
        self, name: str, backend: str, precision: str, make: Callable[..., Iterator[Option]], *arguments: Any
    ) -> Iterator[Option]:
        """The candidates that ``make`` builds; one that fails becomes a row with its reason."""
        self.say(f"building {name}")
        try:
            yield from list(make(*arguments))
        except GanExportError as error:
            yield Option(name, backend, "", precision, "", unavailable=str(error))

    def _save(self, model: onnx.ModelProto, folder: str, name: str) -> Path:
        path = self.folder / folder / name
        onnx_file.write_spec(model, self.spec)
        onnx_file.save_model(model, path)
        return path

    @functools.cached_property
    def _plain(self) -> Path:
        """The fp32 file as it is."""
        return self._save(self.model, "ort", "generator.onnx")


def _structure(model: onnx.ModelProto) -> bytes:
    """What tells two rewritten graphs of one model apart: operators, connections and attributes, not weights."""
    return b"".join(node.SerializeToString(deterministic=True) for node in model.graph.node)


def _has_bf16() -> bool:
    """Whether this processor multiplies bf16 faster than fp32, as OpenVINO sees it."""
    import openvino as library

    return "BF16" in library.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
