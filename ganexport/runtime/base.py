"""The contract of a runner: one engine running one file of an artifact."""

from __future__ import annotations

import abc
import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ganexport.errors import ArtifactError, BackendUnavailableError, UsageError, unknown_name
from ganexport.spec import GeneratorSpec, Label, TensorSpec

if TYPE_CHECKING:
    from ganexport.runtime._dlpack import Borrowed, Place

Array = NDArray[Any]
Feeds = Mapping[str, Array]


#: More threads than any machine has cores: a slip of the pen would take all processes that the system allows.
MAX_THREADS = 1024


class Setting(NamedTuple):
    """One option of a backend.

    Attributes:
        kind: Type of its value; whole numbers count from 1.
        meaning: For people.
        choices: The values it may have; any when empty.
    """

    kind: type
    meaning: str
    choices: tuple[str, ...] = ()


class Runner(abc.ABC):
    """One engine, ready to run.

    Subclasses implement :meth:`prepare`, :meth:`launch`, :meth:`synchronize`, :meth:`fetch` and
    :meth:`close`; the four-part call exists so that a benchmark times every backend alike:
    host-to-device, compute and device-to-host apart. Everyone else calls :meth:`run`, which is
    thread-safe and returns arrays that the caller owns.

    Attributes:
        backend: The registry's name of the backend, "onnxruntime", "tensorrt", …
        device: "cpu" or "cuda:0".
        spec: The generator's spec.
        runtime: Library, version and provider, as written into a certificate.
        formats: Formats of an artifact's files that it opens.
        devices: Kinds of device it runs on.
        settings: What can be set, by name.
    """

    backend: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    settings: ClassVar[Mapping[str, Setting]] = {}
    device: str
    spec: GeneratorSpec
    runtime: str

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    @abc.abstractmethod
    def unavailable(cls) -> str | None:
        """Why this backend cannot run on this machine; None when it can. Must not raise."""

    @classmethod
    def usable_devices(cls) -> tuple[str, ...]:
        """Those of :attr:`devices` that this machine has."""
        from ganexport.runtime import _cuda

        return tuple(kind for kind in cls.devices if kind == "cpu" or _cuda.unavailable() is None)

    @classmethod
    def open(
        cls,
        path: Path,
        spec: GeneratorSpec,
        *,
        device: str | None = None,
        settings: Mapping[str, Any] | None = None,
        requires: Mapping[str, str] | None = None,
    ) -> Self:
        """Load a file: settings, device, library and file are checked in this order, then the engine is opened.

        Args:
            path: The engine, already checked against its manifest.
            spec: The generator's spec.
            device: "cpu", "cuda", "cuda:1"; None for the backend's best.
            settings: ``threads`` and backend-specific options; unknown ones are refused.
            requires: What the manifest says the file needs; checked before loading.

        Raises:
            UsageError: An unknown setting or device, or a value that it cannot have.
            BackendUnavailableError: Library, GPU or version missing; both sides are named.
            ArtifactError: The file is damaged or not of this kind.
        """
        chosen = check_settings(cls.backend, settings, cls.settings)
        check_device(cls, device)
        cls.preflight(path, requires or {}, device)
        if not path.is_file():
            raise ArtifactError(f"{path}: no such file")
        return cls._open(path, spec, device, chosen, requires or {})

    @classmethod
    def preflight(cls, path: Path, requires: Mapping[str, str], device: str | None) -> None:
        """Whether a file can run here, before its bytes are read.

        Raises:
            BackendUnavailableError: The library is missing, or what is here is not what the file needs.
        """
        del path, requires, device
        if reason := cls.unavailable():
            raise BackendUnavailableError(reason)

    @classmethod
    @abc.abstractmethod
    def _open(
        cls,
        path: Path,
        spec: GeneratorSpec,
        device: str | None,
        settings: Mapping[str, Any],
        requires: Mapping[str, str],
    ) -> Self:
        """Open the engine; arguments and file were checked by :meth:`open`."""

    @abc.abstractmethod
    def prepare(self, feeds: Feeds) -> None:
        """Put the inputs where the engine reads them (host to device)."""

    @abc.abstractmethod
    def launch(self) -> None:
        """Start the engine on the prepared inputs; may return before it is done."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Wait until the launched work is done."""

    @abc.abstractmethod
    def fetch(self) -> dict[str, Array]:
        """The outputs as arrays the caller owns (device to host)."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release the engine's memory; calling twice is fine."""

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run once, from host arrays to host arrays.

        Args:
            feeds: One array an input, of the spec's shapes; dtypes are converted only where exact
                (int32 labels to int64, float64 to float32 latents), otherwise refused.

        Returns:
            One array an output, owned by the caller.

        Raises:
            UsageError: Inputs missing, unknown, of wrong shape or dtype, outside a dimension's
                range, NaN, or labels out of range.
        """
        return self.run_checked(check_feeds(self.spec, feeds))

    def run_checked(self, checked: Mapping[str, Array]) -> dict[str, Array]:
        """As :meth:`run`, for inputs that :func:`check_feeds` returned or :mod:`ganexport.seeding` drew."""
        with self._lock:
            if self._closed:
                raise UsageError("this generator is closed")
            self.prepare(checked)
            self.launch()
            self.synchronize()
            return self.fetch()

    @contextlib.contextmanager
    def borrow(self, feeds: Feeds) -> Iterator[dict[str, Borrowed]]:
        """Run once and lend the outputs where the engine left them, on the GPU or the host, without a copy.

        They implement DLPack. The runner is held for the length of the block, so other threads wait;
        its next run overwrites what was lent. Work that reads them on a GPU is waited for at the
        end of the block.

        Args:
            feeds: As in :meth:`run`.

        Yields:
            One :class:`~ganexport.runtime._dlpack.Borrowed` an output; nothing made from it by
            ``from_dlpack`` may be used after the block: copy there what must stay.

        Raises:
            UsageError: As :meth:`run`.
        """
        from ganexport.runtime._dlpack import Borrowed

        checked = check_feeds(self.spec, feeds)
        with self._lock:
            if self._closed:
                raise UsageError("this generator is closed")
            self.prepare(checked)
            self.launch()
            self.synchronize()
            lent = {name: Borrowed(where) for name, where in self.places().items()}
            try:
                yield lent
            finally:
                for output in lent.values():
                    output.end()
                self.wait_for_readers()

    def places(self) -> dict[str, Place]:
        """Where the outputs of the last launch lie."""
        from ganexport.runtime._dlpack import place

        return {name: place(array) for name, array in self.fetch().items()}

    def wait_for_readers(self) -> None:
        """Wait until nothing reads the outputs that were lent: all of the device's work, where there is one."""
        if self.device.startswith("cuda"):
            from ganexport.runtime import _cuda

            _cuda.synchronize(device_index(self.device) or 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Tensor(NamedTuple):
    """One input or output as an engine describes it; None stands for a free size."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


def check_signature(spec: GeneratorSpec, inputs: Sequence[Tensor], outputs: Sequence[Tensor], path: Path) -> None:
    """Refuse a file whose inputs or outputs are not the spec's.

    Raises:
        ArtifactError: Naming the first tensor that is missing, or of another dtype or shape.
    """
    for kind, wanted, found in (("input", spec.inputs, inputs), ("output", spec.outputs, outputs)):
        have = {tensor.name: tensor for tensor in found}
        if {tensor.name for tensor in wanted} != set(have):
            raise ArtifactError(
                f"{path}: its {kind}s are {', '.join(have) or 'none'}, its spec says "
                f"{', '.join(t.name for t in wanted) or 'none'}: convert again"
            )
        for tensor in wanted:
            actual = have[tensor.name]
            if tensor.dtype == "bfloat16":
                raise ArtifactError(
                    f"{path}: {kind} {tensor.name!r} is bfloat16, which numpy cannot hold: convert with fp32 inputs "
                    "and outputs (the default in every precision)"
                )
            if actual.dtype != tensor.dtype:
                raise ArtifactError(
                    f"{path}: {kind} {tensor.name!r} is {actual.dtype}, its spec says {tensor.dtype}: convert again"
                )
            if kind == "input" and not _fits(spec, tensor, actual.shape):
                shape = ", ".join("?" if size is None else str(size) for size in actual.shape)
                raise ArtifactError(
                    f"{path}: input {tensor.name!r} is [{shape}], its spec says "
                    f"[{', '.join(map(str, tensor.shape))}]: convert again"
                )


def _fits(spec: GeneratorSpec, tensor: TensorSpec, shape: tuple[int | None, ...]) -> bool:
    """Whether a file's input takes the sizes that its spec promises."""
    if len(shape) != len(tensor.shape):
        return False
    for promised, actual in zip(tensor.shape, shape, strict=True):
        if actual is None:
            continue
        if isinstance(promised, int):
            if promised != actual:
                return False
        elif not (dim := spec.dim(promised)).static or dim.opt != actual:
            return False
    return True


def check_settings(backend: str, settings: Mapping[str, Any] | None, known: Mapping[str, Setting]) -> dict[str, Any]:
    """Settings of a backend, refused where unknown or of the wrong type.

    Args:
        backend: For the message.
        settings: As given, from the manifest or the caller.
        known: Each setting by name.

    Raises:
        UsageError: Naming the setting.
    """
    checked = dict(settings or {})
    for name, value in checked.items():
        if name not in known:
            raise unknown_name(f"setting of {backend}", name, tuple(known))
        wanted, meaning, choices = known[name]
        unfit = wanted is int and (isinstance(value, bool) or not isinstance(value, int) or value < 1)
        if unfit or not isinstance(value, wanted) or (choices and value not in choices):
            what = "a whole number from 1" if wanted is int else f"a {wanted.__name__}"
            what = f"one of {', '.join(choices)}" if choices else what
            raise UsageError(f"setting {name!r} of {backend} ({meaning}) must be {what}, got {value!r}")
        if name == "threads" and isinstance(value, int) and value > MAX_THREADS:
            raise UsageError(f"setting 'threads' of {backend} is {value}; {MAX_THREADS} is the most that is taken")
    return checked


def check_device(runner: type[Runner], device: str | None) -> None:
    """Refuse a kind of device on which a backend does not run.

    Raises:
        UsageError: Not a device's name.
        BackendUnavailableError: Naming those on which it runs.
    """
    kind = device if device_index(device) is None else "cuda"
    if kind is not None and kind not in runner.devices:
        raise BackendUnavailableError(
            f"device {device}: {runner.backend} does not run on {kind}, only on {', '.join(runner.devices)}"
        )


def device_index(device: str | None) -> int | None:
    """Number of a CUDA device ("cuda", "cuda:1"); None for "cpu" and None.

    Raises:
        UsageError: Neither.
    """
    if device in (None, "cpu"):
        return None
    assert device is not None
    name, _, number = device.partition(":")
    if name != "cuda" or (number and not (number.isascii() and number.isdigit() and len(number) < 4)):
        raise UsageError(f"device {device!r}: write cpu, cuda or cuda:1")
    return int(number or 0)


def first_line(error: BaseException | str, limit: int = 300) -> str:
    """The first line of a library's error that says something, shortened."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:limit]


def check_feeds(spec: GeneratorSpec, feeds: Feeds) -> dict[str, Array]:
    """Inputs as contiguous arrays of the spec's dtypes, in the spec's order.

    Raises:
        UsageError: See :meth:`Runner.run`.
    """
    arrays = {name: np.asarray(value) for name, value in feeds.items()}
    spec.infer_sizes(arrays)
    return {tensor.name: _check_feed(tensor, arrays[tensor.name]) for tensor in spec.inputs}


def _check_feed(tensor: TensorSpec, array: Array) -> Array:
    wanted = np.dtype("float32" if tensor.dtype == "bfloat16" else tensor.dtype)
    if array.dtype != wanted:
        if array.dtype.kind not in "fiub" or not (
            array.dtype.kind == wanted.kind or (array.dtype.kind in "iu" and wanted.kind in "iuf")
        ):
            raise UsageError(f"input {tensor.name!r} has dtype {array.dtype}, wanted {wanted}")
        converted = array.astype(wanted)
        if wanted.kind in "iu" and not np.array_equal(converted, array):
            raise UsageError(f"input {tensor.name!r} holds numbers that do not fit {wanted}")
        array = converted
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UsageError(f"input {tensor.name!r} holds NaN or infinite values")
    if isinstance(tensor.sampler, Label) and array.size:
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= tensor.sampler.classes:
            wrong = low if low < 0 else high
            raise UsageError(
                f"input {tensor.name!r} holds label {wrong}, allowed are 0 to {tensor.sampler.classes - 1}"
            )
    return np.asarray(array, order="C")
