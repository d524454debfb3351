"""What a piece of work costs on a backend in a precision: operations and bytes against measured rates.

A roofline (Williams, Waterman, Patterson, "Roofline", CACM 2009): a kernel takes the longer of its
arithmetic and its memory traffic, plus what launching it costs. The rates are measured ones, see
``docs/optimisation.md``; the model only has to order alternatives of the same layer, the final word
is a measurement (``--to auto``).
"""

from __future__ import annotations

from dataclasses import dataclass

from ganexport.errors import unknown_name

#: Bytes of an element of an activation or weight.
ELEMENT_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0}

MOVES = frozenset({"DepthToSpace", "Concat", "Slice", "Transpose", "Pad", "Resize", "Reshape"})


@dataclass(frozen=True)
class Work:
    """One kernel's work for one sample.

    Attributes:
        op_type: ONNX operator.
        macs: Multiply-accumulates.
        elements: Activation elements read and written.
        weights: Weight elements read.
    """

    op_type: str
    macs: float = 0.0
    elements: float = 0.0
    weights: float = 0.0


@dataclass(frozen=True)
class Rates:
    """What a backend reaches in one precision, for all of a machine's cores together.

    Attributes:
        macs: Multiply-accumulates a second, by operator; "" for any other.
        bytes: Bytes a second that its data movements reach.
        launch: Seconds that one kernel costs beside its work.
        wide: Operators that the backend runs in fp32 whatever the precision asked for.
    """

    macs: dict[str, float]
    bytes: float
    launch: float
    wide: frozenset[str] = frozenset()


#: Ratios matter, not absolute figures: all of one backend's rows are scaled alike by another machine.
RATES: dict[tuple[str, str], Rates] = {
    ("onnxruntime", "fp32"): Rates({"": 80e9}, 8e9, 4e-6),
    ("onnxruntime", "int8"): Rates({"": 200e9, "ConvTranspose": 75e9}, 6e9, 5e-6, frozenset({"ConvTranspose"})),
    ("openvino", "fp32"): Rates({"": 85e9}, 10e9, 5e-6),
    ("openvino", "bf16"): Rates({"": 170e9, "ConvTranspose": 80e9}, 10e9, 6e-6, frozenset({"ConvTranspose"})),
    ("openvino", "int8"): Rates({"": 320e9, "ConvTranspose": 80e9}, 10e9, 6e-6, frozenset({"ConvTranspose"})),
    # Its transposed convolutions in fp16 reached 10 TFLOP/s on an H200, less than in fp32 (results/nvidia-h200/
    # backends.json); that plain convolutions are cuDNN's on tensor cores is assumed, as is what a launch costs.
    ("onnxruntime-cuda", "fp16"): Rates({"": 100e12, "ConvTranspose": 5e12}, 2e12, 4e-6),
    # Tensor cores run transposed convolutions as they are: a rewrite only adds memory traffic.
    ("trt", "fp32"): Rates({"": 20e12}, 1e12, 5e-6),
    ("trt", "fp16"): Rates({"": 200e12}, 1e12, 5e-6),
    ("trt", "bf16"): Rates({"": 200e12}, 1e12, 5e-6),
    ("trt", "int8"): Rates({"": 400e12}, 1e12, 5e-6),
}


@dataclass(frozen=True)
class Target:
    """A backend in a precision, at a batch size, as the cost model sees it.

    Attributes:
        backend: "onnxruntime", "onnxruntime-cuda", "openvino" or "trt".
        precision: "fp32", "fp16", "bf16" or "int8".
        batch: Samples a run, over which weights and launches are shared.
    """

    backend: str
    precision: str
    batch: int = 8

    def __post_init__(self) -> None:
        known = tuple(f"{backend} {precision}" for backend, precision in RATES)
        if (self.backend, self.precision) not in RATES:
            raise unknown_name("target", f"{self.backend} {self.precision}", known)

    @property
    def rates(self) -> Rates:
        """The table's row."""
        return RATES[self.backend, self.precision]

    def seconds(self, work: Work) -> float:
        """Estimated seconds a run of one kernel at the target's batch size."""
        rates = self.rates
        width = ELEMENT_BYTES["fp32" if work.op_type in rates.wide else self.precision]
        moved = width * (work.elements * self.batch + work.weights)
        # A tensor that a wide operator gives to a narrow neighbour is converted: once more through memory.
        if work.op_type in rates.wide:
            moved += ELEMENT_BYTES[self.precision] * work.elements * self.batch
        arithmetic = work.macs * self.batch / rates.macs.get(work.op_type, rates.macs[""])
        traffic = moved / rates.bytes
        if work.op_type in MOVES:
            return rates.launch + traffic
        return rates.launch + max(arithmetic, traffic)
