"""From tensors to the C interface of ``gradient_penalty.h``: layouts, counters, error codes. CUDA tensors only."""

from __future__ import annotations

import ctypes
import functools
import itertools
from typing import TYPE_CHECKING, Any

import torch

from ganexport.errors import BackendUnavailableError
from ganexport.kernels import _library

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_COUNTERS = 1 << 16  # 256 KiB a device; half for eager calls, in turn, half for captured graphs, each its own

_pointer = ctypes.c_void_p


class PenaltyArguments(ctypes.Structure):
    """``ganexport_gradient_penalty_arguments``, field by field."""

    _fields_ = (
        *((name, _pointer) for name in ("grad", "gradient", "statistics", "penalty", "weight", "loss_scale")),
        *((name, _pointer) for name in ("upstream", "workspace", "counter")),
        *((name, ctypes.c_int64) for name in ("samples", "elements", "sample_stride")),
        *((name, ctypes.c_float) for name in ("weight_value", "target", "eps")),
        *((name, ctypes.c_int32) for name in ("kind", "dtype", "device", "skip_when_prepared")),
    )


class InterpolateArguments(ctypes.Structure):
    """``ganexport_interpolate_arguments``, field by field."""

    _fields_ = (
        *((name, _pointer) for name in ("real", "fake", "output", "epsilon", "rng_state", "counter")),
        *((name, ctypes.c_int64) for name in ("samples", "elements")),
        *((name, ctypes.c_int32) for name in ("dtype", "device")),
    )


@functools.cache
def unavailable(device_index: int) -> str:
    """Why the kernels cannot run on this CUDA device; empty when they can."""
    library = _library.library()
    if library is None:
        return _library.status().reason
    code = library.ganexport_kernels_check_device(device_index)
    if code == 0:
        return ""
    compiled = ", ".join(_library.status().architectures)
    major, minor = torch.cuda.get_device_capability(device_index)
    return f"the CUDA kernels (compiled for {compiled}) cannot run on this {major}.{minor} GPU: {_describe(code)}"


def samples_are_dense(tensor: Tensor) -> bool:
    """Whether each sample's elements fill one stretch of memory, in whatever order (channels_last, permuted, …)."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected = expected * size
    return True


def empty_gradient(grad: Tensor) -> Tensor:
    """An uninitialised [N, …] like ``grad``: its samples' own layout when dense, one after the other."""
    if not samples_are_dense(grad):
        return torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    elements = grad.numel() // grad.shape[0]
    return torch.empty_strided(grad.shape, (elements, *grad.stride()[1:]), dtype=grad.dtype, device=grad.device)


def penalty(
    grad: Tensor,
    weight: Tensor | None,
    loss_scale: Tensor | None,
    settings: dict[str, Any],
    *,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the fused kernel on the current stream: penalty [], gradient [N, …] (or [0]), statistics [N + 2]."""
    source = grad if samples_are_dense(grad) else grad.contiguous()  # [N, …]
    samples = grad.shape[0]
    gradient = empty_gradient(source) if needs_gradient else source.new_empty(0)  # [N, …] or [0]
    statistics = torch.empty(samples + 2, dtype=torch.float32, device=grad.device)  # [N + 2]
    result = torch.empty((), dtype=torch.float32, device=grad.device)  # []
    arguments = _penalty_arguments(source, gradient if needs_gradient else None, statistics, settings)
    arguments.penalty = result.data_ptr()
    arguments.weight = None if weight is None else weight.data_ptr()
    arguments.loss_scale = None if loss_scale is None else loss_scale.data_ptr()
    library = _require(arguments.device)
    size = ctypes.c_int64()
    _check(library.ganexport_gradient_penalty_workspace(ctypes.byref(arguments), ctypes.byref(size)))
    workspace = torch.empty(size.value, dtype=torch.uint8, device=grad.device)  # [bytes]
    counter, _owner = _counter(grad.device)
    arguments.workspace, arguments.counter = workspace.data_ptr(), counter
    _check(library.ganexport_gradient_penalty(ctypes.byref(arguments), _stream(grad)))
    return result, gradient, statistics


def backward(
    grad: Tensor, statistics: Tensor, upstream: Tensor, settings: dict[str, Any], prepared: Tensor | None = None
) -> Tensor:
    """The gradient [N, …] for ``upstream`` []; ``prepared`` itself, untouched when it already is that gradient."""
    source = grad if samples_are_dense(grad) else grad.contiguous()  # [N, …]
    gradient = empty_gradient(source) if prepared is None else prepared  # [N, …]
    scalar = upstream.to(torch.float32).contiguous()  # []
    arguments = _penalty_arguments(source, gradient, statistics, settings)
    arguments.upstream = scalar.data_ptr()
    arguments.skip_when_prepared = prepared is not None
    library = _require(arguments.device)
    _check(library.ganexport_gradient_penalty_backward(ctypes.byref(arguments), _stream(grad)))
    return gradient


def interpolate(real: Tensor, fake: Tensor, rng_state: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the interpolation on the current stream: output [N, …] in ``fake``'s layout, ε [N]."""
    output = empty_gradient(fake)  # [N, …]
    inputs = [x if x.stride() == output.stride() else output.new_empty(0) for x in (real, fake)]
    for i, x in enumerate((real, fake)):
        if inputs[i] is not x:  # another layout: one copy into the output's
            inputs[i] = torch.empty_strided(output.shape, output.stride(), dtype=x.dtype, device=x.device).copy_(x)
    samples = fake.shape[0]
    epsilon = torch.empty(samples, dtype=torch.float32, device=fake.device)  # [N]
    counter, _owner = _counter(fake.device)
    arguments = InterpolateArguments(
        real=inputs[0].data_ptr(),
        fake=inputs[1].data_ptr(),
        output=output.data_ptr(),
        epsilon=epsilon.data_ptr(),
        rng_state=rng_state.data_ptr(),
        counter=counter,
        samples=samples,
        elements=fake.numel() // samples,
        dtype=DTYPES[fake.dtype],
        device=_index(fake.device),
    )
    library = _require(arguments.device)
    _check(library.ganexport_interpolate(ctypes.byref(arguments), _stream(fake)))
    return output, epsilon


def _penalty_arguments(
    source: Tensor, gradient: Tensor | None, statistics: Tensor, settings: dict[str, Any]
) -> PenaltyArguments:
    samples = source.shape[0]
    return PenaltyArguments(
        grad=source.data_ptr(),
        gradient=None if gradient is None else gradient.data_ptr(),
        statistics=statistics.data_ptr(),
        samples=samples,
        elements=source.numel() // samples,
        sample_stride=source.stride(0) if samples > 1 else source.numel(),
        dtype=DTYPES[source.dtype],
        device=_index(source.device),
        **settings,
    )


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _stream(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream(tensor.device).cuda_stream)


@functools.cache
def _counter_pool(index: int) -> tuple[int, Any, Any]:
    """First counter's address, and whose turn it is: eager calls go round their half, graphs never share theirs."""
    base = ctypes.c_void_p()
    _check(_require(index).ganexport_kernels_counters(index, ctypes.c_size_t(_COUNTERS), ctypes.byref(base)))
    half = _COUNTERS // 2
    return base.value or 0, itertools.cycle(range(half)), iter(range(half, _COUNTERS))


_pools_ready: set[int] = set()


def _counter(device: torch.device) -> tuple[int, Tensor | None]:
    """Address of a zeroed counter that no launch in flight uses, and what must be kept alive with it.

    An eager counter comes round again after 32768 launches, more than a device queues. A captured launch keeps its
    own for as long as the graph may be replayed; when none is left, or the first call of all is being captured,
    when nothing can be allocated, the graph gets one with a memset in front.
    """
    index = _index(device)
    with torch.cuda.device(index):
        capturing = torch.cuda.is_current_stream_capturing()
    if capturing:
        slot = next(_counter_pool(index)[2], None) if index in _pools_ready else None
        if slot is None:
            own = torch.zeros(1, dtype=torch.int32, device=device)  # [1]
            return own.data_ptr(), own
        return _counter_pool(index)[0] + 4 * slot, None
    base, turns, _ = _counter_pool(index)
    _pools_ready.add(index)
    return base + 4 * next(turns), None


def _require(index: int) -> ctypes.CDLL:
    reason = unavailable(index)
    library = _library.library()
    if reason or library is None:
        raise BackendUnavailableError(f"the CUDA gradient penalty is not available: {reason}")
    return library


def _describe(code: int) -> str:
    library = _library.library()
    if library is None:
        return str(code)
    library.ganexport_kernels_error.restype = ctypes.c_char_p
    text = library.ganexport_kernels_error(code)
    return f"{text.decode() if text else 'unknown error'} (CUDA error {code})"


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"gradient penalty kernel: {_describe(code)}")
