"""Load an artifact or a lone ONNX file, and make pictures with it: the whole of a deployer's API."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from ganexport.artifact import FORMATS, Artifact, ArtifactFile
from ganexport.errors import ArtifactError, BackendUnavailableError, GanExportError, MissingDependencyError, UsageError
from ganexport.runtime import BACKENDS
from ganexport.runtime._images import image_tensor, to_uint8
from ganexport.runtime.base import Array, Feeds, Runner, check_device
from ganexport.seeding import Sampling, batched
from ganexport.spec import BATCH, GeneratorSpec, TensorSpec

if TYPE_CHECKING:
    from ganexport.runtime._dlpack import Borrowed


def load(
    path: str | os.PathLike[str],
    backend: str | None = None,
    device: str | None = None,
    *,
    precision: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Generator:
    """Open a generator.

    Args:
        path: An artifact's folder, or a lone ``.onnx`` (its spec is read from its metadata, else
            derived from its graph; it is opened in a child process with limits first).
        backend: "onnxruntime", "openvino", "tensorrt", "torchscript" or "aoti"; None for the first file
            that runs here, by format in the order of ``ganexport.artifact.FORMATS``, then fp32 before
            the other precisions. What was passed over and why stands in :attr:`Generator.remarks`.
        device: "cpu", "cuda" or "cuda:1"; None for that on which the file was measured at export, else the
            backend's best.
        precision: "fp32", "fp16", "bf16", "tf32" or "int8"; None for any (an engine in fp16 comes before an ONNX
            file in fp32: it was built to be run here).
        settings: ``threads`` and options of the backend; each of those measured at export, which the
            manifest records, where it is not given.

    Returns:
        A thread-safe generator; close it, or use it as a context manager.

    Raises:
        ArtifactError: Not an artifact, damaged, or of a newer schema.
        IntegrityError: A file's content is not what the manifest says.
        BackendUnavailableError: Nothing in it runs here; every reason is named.
    """
    location = Path(path)
    if backend is not None and backend not in BACKENDS:
        BACKENDS.load(backend)  # refuses, naming the known ones
    if location.is_file():
        return _load_file(location, backend, device, precision, settings)
    artifact = Artifact(location)
    skipped: list[str] = []
    failures: list[GanExportError] = []
    for file, name in candidates(artifact, backend, precision):
        try:
            runner = open_runner(artifact, file, name, device=device, settings=settings)
        except (BackendUnavailableError, MissingDependencyError) as error:
            skipped.append(f"{file.format} {file.precision} with {name}: {error}")
            failures.append(error)
        else:
            return Generator(runner, location, file, tuple(skipped))
    if backend is not None and len(failures) == 1:
        raise failures[0]
    raise BackendUnavailableError(_nothing_runs(artifact, backend, precision, skipped))


def candidates(
    artifact: Artifact, backend: str | None = None, precision: str | None = None
) -> Iterator[tuple[ArtifactFile, str]]:
    """Files of an artifact with the backends that open them, best first."""
    files = [f for f in artifact.manifest.files if f.format in FORMATS and precision in (None, f.precision)]
    for file in sorted(files, key=lambda f: (FORMATS.index(f.format), f.precision != "fp32")):
        measured_with = file.settings.get("backend")
        # First the backend that the file was measured with, then the format's own; onnx goes to ONNX Runtime.
        for name in sorted(BACKENDS, key=lambda n: (n != measured_with, n != file.format, n)):
            if backend in (None, name) and file.format in BACKENDS.load(name).RUNNER.formats:
                yield file, name


def open_runner(
    artifact: Artifact,
    file: ArtifactFile,
    backend: str,
    *,
    device: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Runner:
    """One file of an artifact with one backend: availability first, then the file's hash, then the engine.

    Args:
        artifact: The artifact.
        file: One of its manifest's files.
        backend: A backend that opens this format.
        device: As in :func:`load`.
        settings: As in :func:`load`; the manifest's, each where it is not given, are used with the backend
            that they were measured with (``settings["backend"]``, any when not said), and so is the device that
            they were measured on (``settings["device"]``), where this machine has it.

    Raises:
        BackendUnavailableError, IntegrityError, ArtifactError: As :func:`load`.
    """
    runner_class: type[Runner] = BACKENDS.load(backend).RUNNER
    # Here too, so that a file that cannot run is not hashed first.
    check_device(runner_class, device)
    runner_class.preflight(artifact.path / file.path, file.requires, device)
    own = dict(file.settings)
    measured_with, measured_on = own.pop("backend", backend), own.pop("device", None)
    if measured_with == backend:
        settings = {**own, **(settings or {})}
        if device is None and measured_on is not None and measured_on in runner_class.usable_devices():
            device = measured_on
    path = artifact.verified_path(file)
    return runner_class.open(path, artifact.spec, device=device, settings=settings, requires=file.requires)


def _nothing_runs(artifact: Artifact, backend: str | None, precision: str | None, skipped: list[str]) -> str:
    if skipped:
        return f"{artifact.path}: nothing in it runs here: {'; '.join(skipped)}"
    wanted = " ".join(filter(None, (precision, f"file for {backend}" if backend else "file")))
    present = ", ".join(f"{f.format} {f.precision}" for f in artifact.manifest.files) or "nothing"
    return f"{artifact.path}: holds no {wanted}, only {present}; see ganexport convert --help"


def _load_file(
    path: Path,
    backend: str | None,
    device: str | None,
    precision: str | None,
    settings: Mapping[str, Any] | None,
) -> Generator:
    if path.suffix.lower() != ".onnx":
        raise ArtifactError(
            f"{path}: a lone file must be an .onnx; engines and other formats are loaded from their artifact's folder"
        )
    if precision is not None:
        raise UsageError(f"precision {precision!r}: a lone ONNX file has the one it was made with")
    from ganexport.runtime._probe import probe

    if backend is not None and "onnx" not in BACKENDS.load(backend).RUNNER.formats:
        raise UsageError(f"backend {backend!r} does not open ONNX files; use onnxruntime or openvino")
    names = [backend] if backend else ["onnxruntime", "openvino"]
    skipped: list[str] = []
    for name in names:
        runner_class: type[Runner] = BACKENDS.load(name).RUNNER
        if reason := runner_class.unavailable():
            skipped.append(reason)
            continue
        spec = probe(path, name)
        runner = runner_class.open(path, spec, device=device, settings=settings)
        return Generator(runner, path, None, tuple(skipped))
    raise BackendUnavailableError(f"{path}: no backend for ONNX files here: {'; '.join(skipped)}")


class Generator:
    """A loaded generator. All methods may be called from many threads at once.

    Sample i of a seed depends on the seed and i alone (see docs/seed-contract.md), so the same
    request gives the same picture in any batch, on any machine; engines differ by their rounding.

    Attributes:
        spec: Inputs, outputs and dimensions.
        path: What was loaded.
        file: The manifest's entry of the file in use; None for a lone ONNX file.
        remarks: Files and backends that were passed over, with the reasons.
    """

    def __init__(self, runner: Runner, path: Path, file: ArtifactFile | None, remarks: tuple[str, ...] = ()) -> None:
        self.runner = runner
        self.spec: GeneratorSpec = runner.spec
        self.path = path
        self.file = file
        self.remarks = remarks
        self._batched = batched(self.spec)
        self._samplings: dict[tuple[tuple[str, int], ...], Sampling] = {}

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        return self.runner.backend

    @property
    def device(self) -> str:
        """ "cpu" or "cuda:0"."""
        return self.runner.device

    @property
    def runtime(self) -> str:
        """Library, version and provider."""
        return self.runner.runtime

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run on arrays of your own; see :meth:`ganexport.runtime.base.Runner.run`."""
        return self.runner.run(feeds)

    def borrow(self, feeds: Feeds) -> AbstractContextManager[dict[str, Borrowed]]:
        """Run on arrays of your own and read the outputs where the engine left them, by DLPack and without a copy.

        They are valid inside the ``with`` block only, and other threads wait for its end; see
        :meth:`ganexport.runtime.base.Runner.borrow`. What :meth:`run` returns is yours to keep.
        """
        return self.runner.borrow(feeds)

    def generate(
        self,
        n: int | None = None,
        seed: int = 0,
        *,
        start: int = 0,
        seeds: Sequence[int] | None = None,
        labels: Any = None,
        truncation: float | None = None,
        batch_size: int | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> Array:
        """Make pictures.

        Args:
            n: How many; 1 when not given, or as many as ``seeds``.
            seed: 0 to 2^64 - 1.
            start: Number of the first sample of the seed.
            seeds: One seed a picture: the first (or ``start``-th) sample of each.
            labels: One class for all or one a picture; random classes when not given.
            truncation: See :func:`ganexport.latents`.
            batch_size: Samples an engine call; the optimum of the generator's batch dimension
                when not given. Fits memory; does not change the latents.
            sizes: Sizes of other symbolic dimensions, the optimum when not given.

        Returns:
            [n, H, W, C] uint8.

        Raises:
            UsageError: Count, seed, label, truncation or size out of range; outputs that are no images.
        """
        tensor = self._image_tensor
        request = self._request(n, sizes, _asked(seed, start, seeds, labels, truncation, batch_size))
        if request.single:
            _, outputs = self._call(request, 0, request.n)
            return to_uint8(outputs[tensor.name], tensor)
        pictures = (to_uint8(batch.outputs[tensor.name], tensor) for batch in self._batches(request))
        return _collect(pictures, request.n)

    def sample(
        self,
        n: int | None = None,
        seed: int = 0,
        *,
        start: int = 0,
        seeds: Sequence[int] | None = None,
        labels: Any = None,
        truncation: float | None = None,
        batch_size: int | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> dict[str, Array]:
        """As :meth:`generate`, for any kind of output: the engine's arrays as they are.

        Returns:
            Array by output name; its batch axis holds the n samples. Outputs without a batch axis
            are those of the first engine call.
        """
        asked = _asked(seed, start, seeds, labels, truncation, batch_size)
        parts = [batch.outputs for batch in self._batches(self._request(n, sizes, asked))]
        joined = {}
        for tensor in self._batched.outputs:
            arrays = [part[tensor.name] for part in parts]
            several = len(arrays) > 1 and BATCH in tensor.shape
            joined[tensor.name] = np.concatenate(arrays, tensor.shape.index(BATCH)) if several else arrays[0]
        return joined

    def stream(
        self,
        n: int | None = None,
        seed: int = 0,
        *,
        start: int = 0,
        seeds: Sequence[int] | None = None,
        labels: Any = None,
        truncation: float | None = None,
        batch_size: int | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> Iterator[Array]:
        """As :meth:`generate`, batch by batch: any count in the memory of one batch.

        Arguments are checked at the call, not at the first batch.

        Yields:
            [up to batch_size, H, W, C] uint8.
        """
        tensor = self._image_tensor
        batches = self.batches(n, sizes, **_asked(seed, start, seeds, labels, truncation, batch_size))
        return (to_uint8(batch.outputs[tensor.name], tensor) for batch in batches)

    def batches(self, n: int | None = None, sizes: Mapping[str, int] | None = None, **asked: Any) -> Iterator[Batch]:
        """The engine calls of a request one by one, with inputs and outputs as they are.

        Args:
            n: As in :meth:`generate`.
            sizes: As in :meth:`generate`.
            asked: ``seed``, ``start``, ``seeds``, ``labels``, ``truncation``, ``batch_size``.
        """
        return self._batches(self._request(n, sizes, _asked(**asked)))

    def _request(self, n: int | None, sizes: Mapping[str, int] | None, asked: dict[str, Any]) -> _Request:
        key = tuple(sorted(sizes.items())) if sizes else ()
        sampling = self._samplings.get(key)
        if sampling is None:
            sampling = self._samplings[key] = Sampling(self._batched, sizes)
        return _Request(sampling, n, **asked)

    @functools.cached_property
    def _image_tensor(self) -> TensorSpec:
        return image_tensor(self._batched)

    def _batches(self, request: _Request) -> Iterator[Batch]:
        for begin in range(0, request.n, request.size):
            count = min(request.size, request.n - begin)
            yield Batch(begin, count, *self._call(request, begin, count))

    def _call(self, request: _Request, begin: int, count: int) -> tuple[dict[str, Array], dict[str, Array]]:
        """Inputs and outputs of the engine call for samples begin … begin + count - 1 of a request."""
        ran = request.padded(count)
        feeds = request.feeds(begin, count, ran)
        outputs = self.runner.run_checked(feeds)
        if request.dim is not None:
            outputs = {t.name: _rows(outputs[t.name], t.shape, count, ran) for t in self._batched.outputs}
            if ran != count:
                feeds = {t.name: _rows(feeds[t.name], t.shape, count, ran) for t in self._batched.inputs}
        return feeds, outputs

    def close(self) -> None:
        """Release the engine; calling twice is fine."""
        self.runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Generator({str(self.path)!r}, backend={self.backend!r}, device={self.device!r})"


class Batch(NamedTuple):
    """One engine call.

    Attributes:
        begin: Position of its first sample within the request.
        size: Samples in it.
        inputs: Array by input name.
        outputs: Array by output name.
    """

    begin: int
    size: int
    inputs: dict[str, Array]
    outputs: dict[str, Array]


def _asked(
    seed: int = 0,
    start: int = 0,
    seeds: Sequence[int] | None = None,
    labels: Any = None,
    truncation: float | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    return {
        "seed": seed,
        "start": start,
        "seeds": seeds,
        "labels": labels,
        "truncation": truncation,
        "batch_size": batch_size,
    }


class _Request:
    """What was asked for, checked, and cut into engine calls."""

    def __init__(
        self,
        sampling: Sampling,
        n: int | None,
        *,
        seed: int,
        start: int,
        seeds: Sequence[int] | None,
        labels: Any,
        truncation: float | None,
        batch_size: int | None,
    ) -> None:
        if n is None:
            n = 1 if seeds is None else len(seeds)
        elif seeds is not None and n != len(seeds):
            raise UsageError(f"count {n} and {len(seeds)} seeds: give one seed an image, or leave the count out")
        if isinstance(labels, (np.generic, np.ndarray)) and labels.ndim == 0:
            labels = labels.item()  # one class for all, from a loop over an array
        sampling.check(seed, start, n, seeds=seeds, labels=labels, truncation=truncation)
        self.sampling = sampling
        self.n, self.seed, self.start, self.seeds = int(n), seed, start, seeds
        self.labels, self.truncation = labels, truncation
        self.dim = sampling.spec.batch
        if batch_size is not None:
            if self.dim is None:
                raise UsageError("this generator has no batch dimension: leave the batch size out")
            self.dim.check(batch_size)
        size = batch_size or (self.dim.opt if self.dim else 1)
        self.size = min(size, self.n)
        self.single = self.size == self.n

    def feeds(self, begin: int, count: int, ran: int) -> dict[str, Array]:
        """Inputs of the engine call for ``count`` samples from ``begin`` on, padded to ``ran``."""
        piece = slice(begin, begin + count)
        feeds = self.sampling.draw_checked(
            self.seed,
            self.start + begin if self.seeds is None else self.start,
            count,
            seeds=None if self.seeds is None else self.seeds[piece],
            labels=None if self.labels is None else self._labels(piece),
            truncation=self.truncation,
        )
        return feeds if ran == count else self._pad(feeds, ran - count)

    def padded(self, count: int) -> int:
        """The smallest batch that the generator takes and that holds ``count`` samples."""
        if self.dim is None:
            return count
        return max(self.dim.min, -(-count // self.dim.step) * self.dim.step)

    def _labels(self, piece: slice) -> Any:
        if isinstance(self.labels, Mapping):
            return {name: _part(value, piece) for name, value in self.labels.items()}
        return _part(self.labels, piece)

    def _pad(self, feeds: dict[str, Array], missing: int) -> dict[str, Array]:
        padded = {}
        for tensor in self.sampling.spec.inputs:
            array = feeds[tensor.name]
            if BATCH in tensor.shape:
                axis = tensor.shape.index(BATCH)
                array = np.concatenate([array, np.repeat(array.take([-1], axis), missing, axis)], axis)
            padded[tensor.name] = array
        return padded


def _part(labels: Any, piece: slice) -> Any:
    return labels[piece] if hasattr(labels, "__getitem__") and not isinstance(labels, str) else labels


def _rows(array: Array, shape: tuple[int | str, ...], count: int, ran: int) -> Array:
    """The first ``count`` samples of an output, after its batch axis proved to be as long as the input's."""
    if BATCH not in shape:
        return array
    axis = shape.index(BATCH)
    if axis >= array.ndim or array.shape[axis] != ran:
        raise ArtifactError(
            f"the engine returned shape {list(array.shape)} for a batch of {ran}: the file has its batch size "
            "baked in; convert again"
        )
    if count == ran:
        return array
    return np.ascontiguousarray(array[(slice(None),) * axis + (slice(0, count),)])


def _collect(batches: Iterator[Array], n: int) -> Array:
    """All batches in one array, allocated once.

    Raises:
        UsageError: They do not fit memory.
    """
    result: Array | None = None
    done = 0
    for batch in batches:
        if result is None:
            try:
                result = np.empty((n, *batch.shape[1:]), np.uint8)
            except (MemoryError, ValueError):
                size = n * batch[0].nbytes
                raise UsageError(
                    f"{n} images of {batch[0].nbytes} bytes ({size / 2**30:.0f} GiB) do not fit memory: use .stream()"
                ) from None
        result[done : done + len(batch)] = batch
        done += len(batch)
    assert result is not None
    return result
