"""Run the kernels' own source on the emulated GPU of ``emulation/``: build it once, and give it numpy arrays."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import ganexport.kernels
from ganexport.kernels._launch import InterpolateArguments, PenaltyArguments

SOURCES = Path(ganexport.kernels.__file__).parent
KINDS = ("two-sided", "one-sided", "r1")
ERRORS = ("", "deadlock", "load out of bounds", "shared memory of a block that has exited", "too much shared memory")
GUARD = 64  # elements before and after each array
POISON = 0x7FC1  # a NaN in the upper half of any dtype


class Machine(ctypes.Structure):
    """The emulated GPU: small numbers, so that small problems reach every path."""

    _fields_ = (
        ("l2_bytes", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("multiprocessors", "max_cluster", "threads_limit", "window", "seed")),
    )


class _Range(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_uint64), ("end", ctypes.c_uint64))


class Traffic(ctypes.Structure):
    """Bytes of g (and other streamed tensors) loaded, bytes stored, kernels launched."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("loaded", "stored", "launches"))


def build(sources: Path = SOURCES) -> ctypes.CDLL:
    """The kernels in ``sources`` compiled for the host, all warnings being errors."""
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "the emulation needs a C++ compiler"
    target = Path(tempfile.mkdtemp(prefix="ganexport-emulation-")) / "emulation.so"
    source = Path(__file__).parent / "emulation" / "emulation.cpp"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    command = [compiler, *flags, "-Wno-unknown-pragmas", f"-I{sources}", str(source), "-o", str(target)]
    subprocess.run(command, check=True, timeout=300)
    loaded = ctypes.CDLL(str(target))
    loaded.emulated_penalty_arguments_size.restype = ctypes.c_size_t
    loaded.emulated_interpolate_arguments_size.restype = ctypes.c_size_t
    shutil.rmtree(target.parent)
    return loaded


def copy_with_mistake(folder: Path, name: str, right: str, wrong: str) -> Path:
    """The kernels' sources in ``folder``, with one place changed."""
    for source in (*SOURCES.glob("*.cuh"), *SOURCES.glob("*.h")):
        shutil.copy(source, folder)
    text = (folder / name).read_text()
    assert text.count(right) >= 1, f"{name} no longer contains {right!r}"
    (folder / name).write_text(text.replace(right, wrong))
    return folder


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels as they are."""
    return build()


DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2}


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 values as the dtype's bits (uint32 or uint16), rounded to nearest even."""
    if dtype == "float32":
        return values.astype(np.float32).view(np.uint32)
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def decode(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The dtype's bits as float64."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(np.float32 if dtype == "float32" else np.float16).astype(np.float64)


@dataclass
class Guarded:
    """An array with poisoned neighbours, that starts ``offset`` elements after a 16-byte boundary."""

    bits: np.ndarray
    offset: int = 0
    whole: np.ndarray = field(init=False)
    inner: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        """Copy the content between two guards."""
        size = self.bits.itemsize
        raw = np.full(self.bits.size + 2 * GUARD + 32, POISON if size == 2 else POISON << 16, self.bits.dtype)
        shift = (-raw.ctypes.data % 16) // size
        self.whole = raw[shift : shift + self.bits.size + 2 * GUARD + 16]
        begin = GUARD + self.offset
        self.inner = self.whole[begin : begin + self.bits.size]
        self.inner[:] = self.bits.reshape(-1)
        self.untouched = np.ones(self.whole.size, bool)
        self.untouched[begin : begin + self.bits.size] = False

    @property
    def address(self) -> int:
        """Of the first element."""
        return self.inner.ctypes.data

    @property
    def range(self) -> _Range:
        """What may be read."""
        return _Range(self.address, self.address + self.inner.nbytes)

    def guards_hold(self) -> bool:
        """Whether nothing outside was written."""
        return bool((self.whole[self.untouched] == (POISON if self.bits.itemsize == 2 else POISON << 16)).all())


@dataclass
class Result:
    """What a launch left behind, in float64, with the bytes it moved."""

    penalty: float
    gradient: np.ndarray | None
    sums: np.ndarray
    scalars: tuple[float, float]
    plan: dict[str, int]
    traffic: Traffic
    gradient_bits: np.ndarray | None


PLAN = ("wide", "split", "threads", "team", "ranks", "blocks", "words", "chunks", "lag", "workspace_bytes")


def plan_of(arguments: PenaltyArguments, machine: Machine) -> dict[str, int]:
    """The launch that ``make_plan`` chooses."""
    fields = (ctypes.c_int64 * len(PLAN))()
    library().emulated_plan(ctypes.byref(arguments), ctypes.byref(machine), fields)
    return dict(zip(PLAN, fields, strict=True))


def penalty(
    values: np.ndarray,
    dtype: str,
    machine: Machine,
    *,
    kind: str = "two-sided",
    weight: float = 1.0,
    weight_tensor: float | None = None,
    loss_scale: float | None = None,
    target: float = 1.0,
    eps: float = 1e-12,
    gradient: bool = True,
    offset: int = 0,
    gap: int = 0,
) -> Result:
    """Run the penalty kernel on ``values`` [N, M].

    Args:
        values: [N, M] as float64; rounded to ``dtype``.
        dtype: "float32", "float16" or "bfloat16".
        machine: The emulated GPU.
        kind: Which penalty.
        weight: The number.
        weight_tensor: The device scalar that multiplies it.
        loss_scale: The device scalar.
        target: Norm aimed at.
        eps: Under the root.
        gradient: Whether dg is wanted.
        offset: Elements by which g and dg start after a 16-byte boundary.
        gap: Elements between two samples of g.
    """
    samples, elements = values.shape
    spread = np.full((samples, elements + gap), np.nan)
    spread[:, :elements] = values
    source = Guarded(encode(spread, dtype), offset)
    code = np.uint32 if dtype == "float32" else np.uint16
    output = Guarded(np.full(samples * elements, POISON << 16 if dtype == "float32" else POISON, code), offset)
    statistics = Guarded(np.full(samples + 2, POISON << 16, np.uint32))
    scalar = Guarded(np.full(1, POISON << 16, np.uint32))
    factors = np.array([weight_tensor or 0.0, loss_scale or 0.0], np.float32)
    counter = np.zeros(1, np.uint32)
    arguments = PenaltyArguments(
        grad=source.address,
        gradient=output.address if gradient else None,
        statistics=statistics.address,
        penalty=scalar.address,
        weight=None if weight_tensor is None else factors.ctypes.data,
        loss_scale=None if loss_scale is None else factors.ctypes.data + 4,
        counter=counter.ctypes.data,
        samples=samples,
        elements=elements,
        sample_stride=elements + gap,
        weight_value=weight,
        target=target,
        eps=eps,
        kind=KINDS.index(kind),
        dtype=DTYPE_CODES[dtype],
    )
    plan = plan_of(arguments, machine)
    workspace = Guarded(np.full(plan["workspace_bytes"] // 2 + 1, POISON, np.uint16))
    arguments.workspace = workspace.address
    ranges = (_Range * samples)()
    for i in range(samples):
        begin = source.address + i * (elements + gap) * source.inner.itemsize
        ranges[i] = _Range(begin, begin + elements * source.inner.itemsize)
    if gap == 0:
        ranges[0] = source.range
    traffic = Traffic()
    code_ = library().emulated_penalty(
        ctypes.byref(arguments), ctypes.byref(machine), ranges, 1 if gap == 0 else samples, ctypes.byref(traffic)
    )
    assert code_ == 0, ERRORS[code_]
    assert all(array.guards_hold() for array in (source, output, statistics, scalar, workspace)), "write out of bounds"
    assert counter[0] == 0, "the counter must be left at zero"
    numbers = statistics.inner.view(np.float32).astype(np.float64)
    bits = output.inner.reshape(samples, elements)
    if not gradient:
        assert (bits == (POISON << 16 if dtype == "float32" else POISON)).all(), "dg was written unasked"
    return Result(
        penalty=float(scalar.inner.view(np.float32)[0]),
        gradient=decode(bits, dtype) if gradient else None,
        sums=numbers[:-2],
        scalars=(numbers[-2], numbers[-1]),
        plan=plan,
        traffic=traffic,
        gradient_bits=bits if gradient else None,
    )


def backward(
    values: np.ndarray,
    dtype: str,
    machine: Machine,
    *,
    sums: np.ndarray,
    upstream: float,
    weight: float,
    loss_scale: float,
    kind: str,
    prepared: np.ndarray | None = None,
    eps: float = 1e-12,
    offset: int = 0,
) -> tuple[np.ndarray, np.ndarray, Traffic]:
    """Run the backward kernel: dg as float64 and as bits [N, M], and the bytes moved.

    Args:
        values: [N, M] as float64.
        dtype: As in :func:`penalty`.
        machine: The emulated GPU.
        sums: [N] float32 sums of squares, as the penalty kernel left them.
        upstream: The upstream gradient.
        weight: As the penalty kernel recorded it.
        loss_scale: As the penalty kernel recorded it.
        kind: Which penalty.
        prepared: Bits [N, M] of the dg that exists already, or None for an uninitialised one.
        eps: Under the root.
        offset: As in :func:`penalty`.
    """
    samples, elements = values.shape
    source = Guarded(encode(values, dtype), offset)
    poison = np.full(source.inner.size, POISON << 16 if dtype == "float32" else POISON, source.inner.dtype)
    output = Guarded(poison if prepared is None else prepared.reshape(-1), offset)
    statistics = np.concatenate([sums, [weight, loss_scale]]).astype(np.float32)
    scalar = np.array([upstream], np.float32)
    arguments = PenaltyArguments(
        grad=source.address,
        gradient=output.address,
        statistics=statistics.ctypes.data,
        upstream=scalar.ctypes.data,
        samples=samples,
        elements=elements,
        sample_stride=elements,
        target=1.0,
        eps=eps,
        kind=KINDS.index(kind),
        dtype=DTYPE_CODES[dtype],
        skip_when_prepared=prepared is not None,
    )
    traffic = Traffic()
    ranges = (_Range * 1)(source.range)
    code = library().emulated_backward(ctypes.byref(arguments), ctypes.byref(machine), ranges, 1, ctypes.byref(traffic))
    assert code == 0, ERRORS[code]
    assert source.guards_hold(), "g was written"
    assert output.guards_hold(), "write out of bounds"
    bits = output.inner.reshape(samples, elements)
    return decode(bits, dtype), bits, traffic


def interpolate(
    real: np.ndarray, fake: np.ndarray, dtype: str, machine: Machine, rng_state: np.ndarray, offset: int = 0
) -> tuple[np.ndarray, np.ndarray, Traffic]:
    """Run the interpolation kernel on [N, M]: output as float64, ε [N], bytes moved; ``rng_state`` is advanced."""
    samples, elements = fake.shape
    inputs = [Guarded(encode(x, dtype), offset) for x in (real, fake)]
    output = Guarded(np.full(fake.size, POISON << 16 if dtype == "float32" else POISON, inputs[0].inner.dtype), offset)
    epsilon = Guarded(np.full(samples, POISON << 16, np.uint32))
    counter = np.zeros(1, np.uint32)
    arguments = InterpolateArguments(
        real=inputs[0].address,
        fake=inputs[1].address,
        output=output.address,
        epsilon=epsilon.address,
        rng_state=rng_state.ctypes.data,
        counter=counter.ctypes.data,
        samples=samples,
        elements=elements,
        dtype=DTYPE_CODES[dtype],
    )
    ranges = (_Range * 2)(*(x.range for x in inputs))
    traffic = Traffic()
    code = library().emulated_interpolate(
        ctypes.byref(arguments), ctypes.byref(machine), ranges, 2, ctypes.byref(traffic)
    )
    assert code == 0, ERRORS[code]
    assert all(array.guards_hold() for array in (*inputs, output, epsilon)), "write out of bounds"
    assert counter[0] == 0, "the counter must be left at zero"
    return decode(output.inner.reshape(samples, elements), dtype), epsilon.inner.view(np.float32).copy(), traffic
