"""The contract of a runner: one engine running one file of an artifact."""

from __future__ import annotations

import abc
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ganexport.errors import UsageError
from ganexport.spec import GeneratorSpec

Array = NDArray[Any]
Feeds = Mapping[str, Array]


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
    """

    backend: ClassVar[str]
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
    @abc.abstractmethod
    def open(
        cls,
        path: Path,
        spec: GeneratorSpec,
        *,
        device: str | None = None,
        settings: Mapping[str, Any] | None = None,
        requires: Mapping[str, str] | None = None,
    ) -> Self:
        """Load a file.

        Args:
            path: The engine, already checked against its manifest.
            spec: The generator's spec.
            device: "cpu", "cuda", "cuda:1"; None for the backend's best.
            settings: ``threads`` and backend-specific options; unknown ones are refused.
            requires: What the manifest says the file needs; checked before loading.

        Raises:
            BackendUnavailableError: Library, GPU or version missing; both sides are named.
            ArtifactError: The file is damaged or not of this kind.
        """

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
        checked = check_feeds(self.spec, feeds)
        with self._lock:
            if self._closed:
                raise UsageError("this generator is closed")
            self.prepare(checked)
            self.launch()
            self.synchronize()
            return self.fetch()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_feeds(spec: GeneratorSpec, feeds: Feeds) -> dict[str, Array]:
    """Inputs as contiguous arrays of the spec's dtypes, in the spec's order.

    Raises:
        UsageError: See :meth:`Runner.run`.
    """
    arrays = {name: np.asarray(value) for name, value in feeds.items()}
    spec.infer_sizes(arrays)
    return {tensor.name: _check_feed(tensor, arrays[tensor.name]) for tensor in spec.inputs}


def _check_feed(tensor: Any, array: Array) -> Array:
    from ganexport.spec import Label

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
