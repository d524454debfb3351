"""Static int8: which tensors become 8 bits wide, over which range, and the proof that it is good enough.

onnxruntime.quantization does the mechanics (QuantizeLinear/DequantizeLinear pairs, per-channel
symmetric weights, per-tensor unsigned activations). What is chosen here:

- the range of every activation, from inputs drawn by the spec's own samplers: the largest values
  seen, a percentile, the entropy criterion (Migacz, "8-bit inference with TensorRT", GTC 2017), or the
  smallest mean squared error of the rounding; whichever gives the best pictures;
- whether channels are equalised first (:mod:`ganexport.build.equalize`), where the graph as it is does not do;
- which layers stay wide: the noise that each layer alone brings is measured, and those with the most
  noise for the least work are left in fp32 until the worst picture is good enough.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ganexport.artifact import INT8_WEIGHTS
from ganexport.build import onnx_file
from ganexport.environment import int8_overflows
from ganexport.errors import ExportError, MissingDependencyError, UsageError
from ganexport.parity import Comparison, tolerance
from ganexport.runtime.onnxruntime import exact_session
from ganexport.seeding import Sampling
from ganexport.spec import BATCH, GeneratorSpec

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]

#: How ranges are chosen, in the order of trying.
METHODS = ("minmax", "percentile", "mse", "entropy")
#: Seed of the calibration inputs; certificates draw from another.
CALIBRATION_SEED = 0xCA11
#: Seed of the inputs on which methods and layers are judged: neither calibration's nor a certificate's.
JUDGING_SEED = 0x1DEE
#: Samples on which methods and layers are judged, at least and at most: the worst of 1,600 read 8 dB below the worst
#: of 128 on dcgan-mnist, where one sample in 500 leaves the ranges of 64.
JUDGED, JUDGED_MOST = 128, 1024
#: Samples whose largest values make the "minmax" ranges, at most.
RANGED_MOST = 2048
#: Multiply-accumulates that a pass over such samples may take; costlier generators see fewer.
PASS = 2e11
#: dB above the wanted figure to aim at: a certificate looks at more inputs than the least that are judged.
MARGIN = 1.5
#: The same where as many as a certificate looks at are judged.
SMALL_MARGIN, MANY = 0.5, 512
#: Times the allowed noise from which a selection of layers is not tried.
HOPELESS = 3.0
#: As the manifest says it where rounding was given up.
UNROUNDED = "unrounded outputs (ONNX Runtime computes those layers in fp32)"
PERCENTILE = 99.99
BINS = 2048
#: Largest weight of 7 bits: two products with unsigned bytes fit into 16 bits (2 x 255 x 64 < 2^15).
NARROW_WEIGHT = 64
#: The entropy search takes a second a tensor with 2048.
ENTROPY_BINS = 512

COMPUTE = ("Conv", "ConvTranspose", "Gemm", "MatMul")
#: Share of all products below which a layer stays wide: a style network's matrices bring noise and no time, and
#: convolutions of single numbers (a convolution's time is also that of moving its pixels).
SMALL = {"Gemm": 0.005, "MatMul": 0.005, "Conv": 0.0001, "ConvTranspose": 0.0001}
#: Operators that only move numbers.
REARRANGING = ("DepthToSpace", "Slice", "Reshape", "Transpose", "Flatten", "Squeeze")
#: Operators that pass 8-bit numbers on as they are.
TRANSPARENT = ("DepthToSpace", "Slice", "Concat", "Reshape", "Transpose", "Relu", "MaxPool", "Flatten", "Squeeze")


@dataclass(frozen=True)
class Quantized:
    """An int8 model and how it was made.

    Attributes:
        model: The QDQ model.
        method: One of :data:`METHODS`.
        wide: Names of compute nodes that stayed in fp32.
        psnr: dB of the worst judged sample.
        sensitivity: dB of the worst judged sample with only that node quantized.
        methods: dB of the worst judged sample by method tried, everything quantized.
        variant: Label of the form of the graph that was quantized; "" for the one that was given.
        unrounded: Outputs that no int8 layer reads are left unrounded, against the caller's wish.
        narrow_weights: Weights have 7 bits.
    """

    model: onnx.ModelProto
    method: str
    wide: tuple[str, ...]
    psnr: float
    sensitivity: dict[str, float] = field(default_factory=dict)
    methods: dict[str, float] = field(default_factory=dict)
    variant: str = ""
    unrounded: bool = False
    narrow_weights: bool = False

    @property
    def passes(self) -> tuple[str, ...]:
        """As the manifest names it."""
        kept = f", {len(self.wide)} layers wide" if self.wide else ""
        form = f", {self.variant}" if self.variant else ""
        exact = f", {UNROUNDED}" if self.unrounded else ""
        bits = ", 7-bit weights" if self.narrow_weights else ""
        return (f"int8 static {self.method}{form}{bits}{kept}{exact}",)


def unavailable() -> str | None:
    """Why nothing can be quantized here; None when it can."""
    try:
        import onnxruntime.quantization  # noqa: F401
    except ImportError as error:
        return f"int8 needs onnxruntime with onnx: pip install onnxruntime onnx ({error})"
    return None


def quantize(
    model: onnx.ModelProto,
    spec: GeneratorSpec,
    *,
    samples: int = 64,
    methods: Sequence[str] = METHODS,
    keep: Sequence[str] = (),
    min_psnr: float | None = None,
    compute: Sequence[str] = COMPUTE,
    wide_outputs: bool = False,
    narrow_weights: bool | None = None,
    variants: Iterable[tuple[str, onnx.ModelProto]] = (),
    progress: Callable[[str], None] | None = None,
) -> Quantized:
    """Quantize the convolutions and matrix products of a fp32 model.

    Args:
        model: fp32; its inputs are the spec's. Unchanged by this call.
        spec: Says how to draw calibration inputs.
        samples: Inputs drawn for calibration.
        methods: Which of :data:`METHODS` to try, in this order, until one is good enough.
        keep: Names or operator types of nodes that stay in fp32.
        min_psnr: dB that the worst picture must reach; the tolerance table's figure when None.
        compute: Operator types to quantize.
        wide_outputs: Do not round tensors that no quantized layer reads: OpenVINO computes
            int8 x int8 -> fp32 in one kernel, ONNX Runtime needs the rounding to do so. It is done all the same
            when nothing else reaches the figure, and recorded.
        narrow_weights: Give weights 7 bits, which processors without VNNI need and which costs about 1 dB; None:
            where this one needs it, or where that cannot be told.
        variants: (label, model): other forms of the same function, tried when the first is not good enough.
        progress: Told what happens.

    Raises:
        MissingDependencyError: onnxruntime's quantization cannot be imported.
        UsageError: Unknown method, an input without a sampler, or fewer than 1 sample.
        ExportError: Nothing to quantize, or no selection of layers reaches the wanted figure.
    """
    if reason := unavailable():
        raise MissingDependencyError(reason)
    if samples < 1 or not methods or set(methods) - set(METHODS):
        raise UsageError(f"int8 calibration needs at least 1 sample and methods among {', '.join(METHODS)}")
    target = tolerance("int8").min_psnr if min_psnr is None else min_psnr
    say = progress or (lambda _text: None)
    narrow = int8_overflows() is not False if narrow_weights is None else narrow_weights
    with tempfile.TemporaryDirectory(prefix="ganexport-int8-") as folder, _silent():

        def work_on(
            number: int, label: str, form: onnx.ModelProto, *, wide: bool, inputs: _Inputs | None = None
        ) -> _Work:
            place = Path(folder) / f"{number}-{wide}"
            place.mkdir()
            return _Work(form, spec, place, inputs or samples, tuple(compute), tuple(keep), wide, label, narrow)

        first = work_on(0, "", model, wide=wide_outputs)
        margin = first.inputs.margin
        if not first.nodes:
            raise ExportError(f"int8: no {', '.join(compute)} with constant weights to quantize")
        say(f"calibrating int8 on {samples} inputs")
        forms: dict[str, onnx.ModelProto] = {"": model}

        def trying() -> Iterator[_Trial]:
            yield from (_Trial(first, name) for name in methods)
            for number, (label, form) in enumerate(variants, 1):
                say(f"int8 is not good enough yet: {label}")
                forms[label] = form
                yield _Trial(work_on(number, label, form, wide=wide_outputs, inputs=first.inputs), methods[0])

        trials: list[_Trial] = []
        for trial in trying():
            trials.append(trial)
            if trial.reached >= target + margin:
                return trial.all_narrow(_by_method(trials))
        by_method = _by_method(trials)
        # Every method has its turn: the one that does best with the noisiest layer in int8 need not without it.
        trials.sort(key=lambda trial: -trial.reached)
        say(f"int8 reads {trials[0].reached:.1f} dB: measuring each layer's noise")
        close: list[Quantized] = []
        for trial in trials:
            if (made := trial.relax(target, by_method, close)) is not None:
                return made
        if not wide_outputs:
            say("int8: leaving outputs unrounded")
            label = trials[0].work.label
            exact = work_on(0, label, forms[label], wide=True, inputs=first.inputs)
            for name in dict.fromkeys((trials[0].method, methods[0])):
                made = _Trial(exact, name).relax(target, by_method, close, all_too=True)
                if made is not None:
                    return replace(made, unrounded=True)
        if close:
            return max(close, key=lambda made: made.psnr)
    raise ExportError(
        f"int8 stays below {target:g} dB with any layer quantized (best method {trials[0].method}, "
        f"{trials[0].reached:.1f} dB with all of them): use bf16 or fp16, or a lower --min-psnr"
    )


def _by_method(trials: Sequence[_Trial]) -> dict[str, float]:
    """What each method reached on the graph as it was given."""
    return {trial.method: trial.reached for trial in trials if not trial.work.label}


class _Trial:
    """One form of the graph under one method of choosing ranges, everything quantized."""

    def __init__(self, work: _Work, method: str) -> None:
        self.work, self.method = work, method
        self.ranges = work.ranges(method)
        self.model = work.build(self.ranges, ())
        self.reached = work.judge(self.model)

    def all_narrow(self, by_method: dict[str, float]) -> Quantized:
        """The model as it is."""
        work = self.work
        return Quantized(
            self.model, self.method, (), self.reached, {}, by_method, work.label, narrow_weights=work.narrow_weights
        )

    def relax(
        self, target: float, by_method: dict[str, float], close: list[Quantized], *, all_too: bool = False
    ) -> Quantized | None:
        """Leave layers wide, the most noise for the least work first, until the target is reached.

        Args:
            target: dB; a margin more is wanted.
            by_method: For the record.
            close: Takes selections that reach the target without the margin.
            all_too: Whether nothing wide is a selection to return.

        Returns:
            The first selection that is good enough; None without one.
        """
        work, ranges, wanted = self.work, self.ranges, target + self.work.inputs.margin
        if all_too and self.reached >= wanted:
            return self.all_narrow(by_method)
        few = max(1, len(work.inputs.judged) // 4)  # they only order the layers
        alone = {
            name: work.judge(work.build(ranges, [other for other in work.nodes if other != name]), few)
            for name in work.nodes
        }
        total = sum(work.work.get(name, 0.0) for name in work.nodes) or 1.0
        noise = {name: 0.0 if math.isinf(alone[name]) else 10 ** (-alone[name] / 10) for name in work.nodes}

        def gain(name: str) -> float:
            return noise[name] / (work.work.get(name, 0.0) / total + 0.02)

        allowed = 10 ** (-wanted / 10)
        wide: list[str] = []
        for name in sorted(work.nodes, key=gain, reverse=True)[:-1]:
            wide.append(name)
            # Noises of layers add up, roughly: what is far from good enough need not be tried.
            if sum(noise[other] for other in work.nodes if other not in wide) > HOPELESS * allowed:
                continue
            made = work.build(ranges, wide)
            reached = work.judge(made)
            found = Quantized(
                *(made, self.method, tuple(wide), reached, alone, by_method, work.label),
                narrow_weights=work.narrow_weights,
            )
            if reached >= wanted:
                return found
            if reached >= target:
                close.append(found)
        return None


class _Inputs:
    """What ranges are taken from and pictures judged on, the same for every form of a graph.

    Args:
        model: fp32; its outputs are the truth.
        spec: Inputs with samplers.
        samples: For calibration.
        cost: Multiply-accumulates a sample, which bounds how many are looked at.
    """

    def __init__(self, model: onnx.ModelProto, spec: GeneratorSpec, samples: int, cost: float) -> None:
        affordable = int(PASS / max(cost, 1.0))
        judged = max(JUDGED, min(JUDGED_MOST, affordable))
        self.ranged = max(samples, min(RANGED_MOST, affordable))
        self.margin = SMALL_MARGIN if judged >= MANY else MARGIN
        self.calibration = calibration_inputs(spec, samples)
        self.judged = list(_draw(spec, JUDGING_SEED, judged))
        self.reference = [_run(model, feeds) for feeds in self.judged]


class _Work:
    """One form of the graph being quantized: its layers, ranges and trials."""

    def __init__(
        self,
        model: onnx.ModelProto,
        spec: GeneratorSpec,
        folder: Path,
        inputs: _Inputs | int,
        compute: tuple[str, ...],
        keep: tuple[str, ...],
        wide_outputs: bool,
        label: str = "",
        narrow_weights: bool = False,
    ) -> None:
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self.spec, self.folder, self.wide_outputs, self.label = spec, folder, wide_outputs, label
        self.narrow_weights = narrow_weights
        self.source = folder / "source.onnx"
        import onnx

        onnx.save(_named(model), self.source)
        prepared = folder / "prepared.onnx"
        quant_pre_process(
            str(self.source), str(prepared), skip_optimization=True, skip_symbolic_shape=True, auto_merge=False
        )
        self.model = onnx.load(prepared)
        constants = {tensor.name for tensor in self.model.graph.initializer}
        self.nodes = [
            node.name
            for node in self.model.graph.node
            if node.op_type in compute
            and any(name in constants for name in node.input[1:2])
            and node.name not in keep
            and node.op_type not in keep
        ]
        self.work = _work_by_node(self.model)
        small = self._small()
        self.nodes = [name for name in self.nodes if name not in small]
        if isinstance(inputs, int):
            cost = sum(self.work.values()) * math.prod(size for name, size in spec.sizes().items() if name != BATCH)
            inputs = _Inputs(self.model, spec, inputs, cost)
        self.inputs = inputs

    def _small(self) -> set[str]:
        """Layers that are not worth their noise."""
        total = sum(self.work.values())
        return {
            node.name
            for node in self.model.graph.node
            if node.op_type in SMALL and self.work.get(node.name, 0.0) < SMALL[node.op_type] * total
        }

    def ranges(self, method: str) -> dict[str, tuple[float, float]]:
        """(lowest, highest) of every activation, by one method."""
        from onnxruntime.quantization import CalibrationMethod
        from onnxruntime.quantization.calibrate import create_calibrator

        kinds = {"minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy}
        extra: dict[str, Any] = {}
        if method in ("percentile", "mse"):
            extra = {"num_bins": BINS, "percentile": PERCENTILE}
        elif method == "entropy":
            # The search compares every clip between the two; onnxruntime's default leaves nothing to search.
            extra = {"num_bins": ENTROPY_BINS, "num_quantized_bins": 128}
        calibrator = create_calibrator(
            self.source.parent / "prepared.onnx",
            [*COMPUTE, *TRANSPARENT],
            augmented_model_path=str(self.folder / f"{method}.onnx"),
            calibrate_method=kinds.get(method, CalibrationMethod.Percentile),
            extra_options=extra,
        )
        # Histograms keep every value that they have seen; largest values need no memory.
        many = _draw(self.spec, CALIBRATION_SEED, self.inputs.ranged)
        calibrator.collect_data(_Reader(many if method == "minmax" else self.inputs.calibration))
        if method == "mse":
            histograms = calibrator.collector.histogram_dict
            return {
                name: best_range(found[0], found[1], float(found[2]), float(found[3]))
                for name, found in histograms.items()
            }
        data = calibrator.compute_data()
        return {name: _pair(entry.range_value) for name, entry in data.items()}

    def build(self, ranges: Mapping[str, tuple[float, float]], wide: Sequence[str]) -> onnx.ModelProto:
        """The QDQ model with these ranges, some nodes left wide."""
        import onnx
        from onnxruntime.quantization import CalibrationMethod, QuantType
        from onnxruntime.quantization.calibrate import TensorData, TensorsData
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        data = {
            name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()
        }
        narrow = [name for name in self.nodes if name not in wide]
        carried = _carriers(self.model, set(narrow))
        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        types = sorted({node.op_type for node in copy.graph.node if node.name in {*narrow, *carried}})
        quantizer = QDQQuantizer(
            copy,
            per_channel=True,
            reduce_range=self.narrow_weights,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, dict(data)),
            nodes_to_quantize=[*narrow, *carried],
            nodes_to_exclude=[],
            op_types_to_quantize=types,
            extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
        )
        quantizer.quantize_model()
        made: onnx.ModelProto = quantizer.model.model
        _read_inputs_exactly(made, {node.name for node in self.model.graph.node} - {*narrow, *carried})
        if self.wide_outputs:
            strip_useless_pairs(made)
            strip_repeated_pairs(made)
        onnx_file.sort_nodes(made)
        return made

    def judge(self, model: onnx.ModelProto, sets: int | None = None) -> float:
        """dB of the worst judged sample over all outputs, on all input sets or the first few."""
        worst = math.inf
        comparisons = [Comparison(tensor.name, tensor.range) for tensor in self.spec.outputs]
        for number, (feeds, truth) in enumerate(
            zip(self.inputs.judged[:sets], self.inputs.reference[:sets], strict=True)
        ):
            outputs = _run(model, feeds)
            for comparison in comparisons:
                comparison.add(truth[comparison.name], outputs[comparison.name], number)
        for comparison in comparisons:
            result = comparison.result()
            if result.nonfinite or comparison.failures:
                return -math.inf
            worst = min(worst, math.inf if result.worst_psnr is None else result.worst_psnr)
        return worst


def _pair(values: Any) -> tuple[float, float]:
    low, high = values
    return float(low.item()), float(high.item())


class _Reader:
    """Calibration inputs one after the other, as onnxruntime's calibrators read them."""

    def __init__(self, sets: Iterable[dict[str, Array]]) -> None:
        self._left = iter(sets)

    def get_next(self) -> dict[str, Array] | None:
        """The next input set, None at the end."""
        return next(self._left, None)

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> dict[str, Array]:
        return next(self._left)


def best_range(histogram: Array, edges: Array, low: float, high: float, levels: int = 256) -> tuple[float, float]:
    """The clipped range with the smallest mean squared rounding error.

    Args:
        histogram: [bins] counts.
        edges: [bins + 1] ascending.
        low: Smallest value seen.
        high: Largest value seen.
        levels: Numbers that 8 bits can hold.

    Returns:
        (low, high), each scaled by the same share of what was seen.
    """
    counts = histogram.astype(np.float64)
    centres = (edges[:-1] + edges[1:]).astype(np.float64) / 2
    best, chosen = math.inf, (low, high)
    for share in np.linspace(1.0, 0.3, 71):
        bottom, top = min(low * share, 0.0), max(high * share, 0.0)
        step = (top - bottom) / (levels - 1)
        if step <= 0:
            return low, high
        clipped = np.clip(centres, bottom, top)
        # Inside the range the error is uniform over a step, outside it is what was cut off.
        error = float((counts * (centres - clipped) ** 2).sum() + counts.sum() * step * step / 12)
        if error < best:
            best, chosen = error, (bottom, top)
    return chosen


def strip_useless_pairs(model: onnx.ModelProto) -> int:
    """Remove QuantizeLinear/DequantizeLinear pairs of activations that no quantized layer reads.

    Args:
        model: QDQ model, changed in place.

    Returns:
        How many pairs were removed.
    """
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    producers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    outputs = {value.name for value in model.graph.output}

    def is_narrow(node: Any) -> bool:
        maker = producers.get(node.input[1])
        return maker is not None and maker.op_type == "DequantizeLinear"

    def is_useful(name: str) -> bool:
        for node in readers.get(name, []):
            if node.op_type in COMPUTE and node.input[0] == name and is_narrow(node):
                return True
            carries = node.op_type in (*TRANSPARENT, "QuantizeLinear", "DequantizeLinear")
            if carries and any(is_useful(output) for output in node.output):
                return True
        return False

    removed = []
    for node in list(model.graph.node):
        quantized = _rounding_of(node, producers, constants)
        if quantized is None or is_useful(node.output[0]):
            continue
        source, target = quantized.input[0], node.output[0]
        if target in outputs:
            maker = producers.get(source)
            if maker is None or len(readers.get(source, [])) > 1 or source in outputs:
                continue
            maker.output[list(maker.output).index(source)] = target
        else:
            for reader in readers.get(target, []):
                for index, name in enumerate(reader.input):
                    if name == target:
                        reader.input[index] = source
            readers.setdefault(source, []).extend(readers.get(target, []))
        removed.append(node)
    for node in removed:
        model.graph.node.remove(node)
        quantized = producers[node.input[0]]
        if not any(quantized.output[0] in other.input for other in model.graph.node):
            model.graph.node.remove(quantized)
    return len(removed)


def strip_repeated_pairs(model: onnx.ModelProto) -> int:
    """Remove roundings of numbers that were rounded to the same levels before they were only rearranged.

    Rounding twice to the same levels changes nothing, but OpenVINO goes back to fp32 for the second time.

    Args:
        model: QDQ model, changed in place.

    Returns:
        How many pairs were removed.
    """
    from onnx import numpy_helper

    producers = {name: node for node in model.graph.node for name in node.output}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    outputs = {value.name for value in model.graph.output}

    def levels(node: Any) -> Any:
        """Scale and zero point of a QuantizeLinear or DequantizeLinear, bytes; None when they are computed."""
        names = list(node.input[1:3])
        return tuple(numpy_helper.to_array(tensors[n]).tobytes() for n in names) if set(names) <= set(tensors) else None

    def rounded(name: str, wanted: Any) -> bool:
        maker = producers.get(name)
        if maker is None:
            return False
        if maker.op_type == "DequantizeLinear":
            return bool(levels(maker) == wanted)
        if maker.op_type == "Concat":
            return all(rounded(part, wanted) for part in maker.input)
        return maker.op_type in REARRANGING and rounded(maker.input[0], wanted)

    removed = []
    for node in model.graph.node:
        quantized = _rounding_of(node, producers, set(tensors))
        if quantized is None or node.output[0] in outputs or levels(node) is None:
            continue
        maker = producers.get(quantized.input[0])
        moved = maker is not None and maker.op_type in (*REARRANGING, "Concat")
        if moved and levels(quantized) == levels(node) and rounded(quantized.input[0], levels(node)):
            removed.append((node, quantized))
    for node, quantized in removed:
        for reader in model.graph.node:
            for index, name in enumerate(reader.input):
                if name == node.output[0]:
                    reader.input[index] = quantized.input[0]
        model.graph.node.remove(node)
        if not any(quantized.output[0] in other.input for other in model.graph.node):
            model.graph.node.remove(quantized)
    return len(removed)


def _read_inputs_exactly(model: onnx.ModelProto, wide: set[str]) -> None:
    """Let nodes that stay wide read a graph's input itself, not what a narrow neighbour reads of it.

    Args:
        model: QDQ model, changed in place.
        wide: Names of those nodes.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    inputs = {value.name for value in model.graph.input}
    for node in model.graph.node:
        for index, name in enumerate(node.input if node.name in wide else ()):
            quantized = _rounding_of(producers[name], producers, set()) if name in producers else None
            if quantized is not None and quantized.input[0] in inputs:
                node.input[index] = quantized.input[0]


def _rounding_of(node: Any, producers: Mapping[str, Any], constants: set[str]) -> Any:
    """The QuantizeLinear before a DequantizeLinear of an activation; None for anything else."""
    quantized = producers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
    if quantized is None or quantized.op_type != "QuantizeLinear" or quantized.input[0] in constants:
        return None
    return quantized


def _named(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every node has a name of its own."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    seen: set[str] = set()
    for number, node in enumerate(copy.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{number}"
        seen.add(node.name)
    return copy


def _carriers(model: onnx.ModelProto, narrow: set[str]) -> list[str]:
    """Transparent nodes between two quantized layers: they move 8-bit numbers there."""
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def leads_on(node: Any) -> bool:
        for name in node.output:
            for reader in readers.get(name, []):
                if reader.name in narrow or (reader.op_type in TRANSPARENT and leads_on(reader)):
                    return True
        return False

    return [node.name for node in model.graph.node if node.op_type in TRANSPARENT and leads_on(node)]


def _work_by_node(model: onnx.ModelProto) -> dict[str, float]:
    """Multiply-accumulates a sample of each compute node, symbolic sizes taken as 1."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    sizes = {
        value.name: [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input)
    }
    weights = {tensor.name: list(tensor.dims) for tensor in inferred.graph.initializer}
    found = {}
    for node in inferred.graph.node:
        if node.op_type not in COMPUTE or len(node.input) < 2 or node.input[1] not in weights:
            continue
        positions = sizes.get(node.input[0] if node.op_type == "ConvTranspose" else node.output[0], [1])[2:]
        found[node.name] = float(math.prod(weights[node.input[1]]) * math.prod(positions))
    return found


def int8_weights(model: onnx.ModelProto) -> dict[str, str]:
    """How wide a model's int8 weights are, as ``requires`` of a manifest says it; empty for a model without any."""
    from onnx import TensorProto, numpy_helper

    weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT8}
    read = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"} & set(weights)
    if not read:
        return {}
    widest = max(int(np.abs(numpy_helper.to_array(weights[name]).astype(np.int16)).max(initial=0)) for name in read)
    return {INT8_WEIGHTS: "7 bits" if widest <= NARROW_WEIGHT else "8 bits"}


def calibration_inputs(spec: GeneratorSpec, samples: int) -> list[dict[str, Array]]:
    """The inputs that ranges are taken from.

    Raises:
        UsageError: An input without a sampler.
    """
    return list(_draw(spec, CALIBRATION_SEED, samples))


def _draw(spec: GeneratorSpec, seed: int, samples: int) -> Iterator[dict[str, Array]]:
    """Inputs at the optimum sizes, in calls of the optimum batch (16 at most)."""
    for tensor in spec.inputs:
        if tensor.sampler is None:
            raise UsageError(
                f"int8 calibration draws its inputs, and {tensor.name!r} has no sampler: describe it with "
                f"--input {tensor.name}=uniform(low,high)[...]"
            )
    sizes = spec.sizes()
    sampling = Sampling(spec, {name: size for name, size in sizes.items() if name != BATCH})
    batch = spec.batch
    call = (
        1
        if batch is None
        else min(max(batch.min, min(16, batch.max)) // batch.step * batch.step or batch.step, batch.max)
    )
    for start in range(0, samples, call):
        yield sampling.draw(seed, start, call)


def _run(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    import onnxruntime

    session = _session(onnxruntime, model)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


_SESSIONS: dict[int, tuple[Any, Any]] = {}


def _session(onnxruntime: Any, model: onnx.ModelProto) -> Any:
    """A session of the model; the last one is kept, since a model is run on several input sets."""
    found = _SESSIONS.get(id(model))
    if found is not None and found[0] is model:
        return found[1]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # What the numbers say, not what a processor without VNNI makes of them.
    session = exact_session(model.SerializeToString(), options)
    _SESSIONS.clear()
    _SESSIONS[id(model)] = (model, session)
    return session


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """onnxruntime's quantization logs and prints for its own authors."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(previous)
        _SESSIONS.clear()
