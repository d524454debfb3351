"""What the two backends that need torch share. This module itself does not import it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self

import numpy as np

from ganexport.errors import ArtifactError, BackendUnavailableError, UsageError
from ganexport.runtime._dlpack import CPU, CUDA, Place
from ganexport.runtime.base import Array, Feeds, Runner, Setting, device_index, first_line
from ganexport.spec import GeneratorSpec

SETTINGS = {"threads": Setting(int, "threads of torch, in the whole process")}
_SWITCHES = threading.RLock()


def torch_unavailable() -> str | None:
    """Why torch cannot be used; None when it can. Looks for it without importing it."""
    from importlib.util import find_spec

    return None if find_spec("torch") else "torch: not installed (pip install 'ganexport[train]')"


def open_torch(device: str | None, settings: Mapping[str, Any]) -> tuple[Any, str]:
    """Import torch, apply the settings and choose the device ("cpu" unless asked: where files were certified).

    Raises:
        BackendUnavailableError: No such GPU.
    """
    torch, where = import_torch(device)
    if "threads" in settings:
        torch.set_num_threads(settings["threads"])
    return torch, where


def import_torch(device: str | None) -> tuple[Any, str]:
    """Import torch and choose the device: "cpu" when None.

    Raises:
        UsageError: Not a device's name.
        BackendUnavailableError: No torch, or no such GPU.
    """
    index = device_index(device)
    if reason := torch_unavailable():
        raise BackendUnavailableError(reason)
    import torch

    if index is not None and index >= torch.cuda.device_count():
        raise BackendUnavailableError(
            f"device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs"
        )
    return torch, "cpu" if index is None else f"cuda:{index}"


@contextlib.contextmanager
def full_float32(torch: Any) -> Iterator[None]:
    """Within the block CUDA multiplies float32 in float32, not in TF32; afterwards all is as it was.

    The switches are of the whole process, and torch's default lets cuDNN's convolutions use TF32. One thread at a
    time is in such a block.
    """
    with _SWITCHES, _float32_alone(torch):
        yield


@contextlib.contextmanager
def _float32_alone(torch: Any) -> Iterator[None]:
    cudnn = torch.backends.cudnn
    try:
        tf32, matmul = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # the process has set the newer switches, beside which these two cannot be read
        parts = (cudnn.conv, torch.backends.cuda.matmul)
        found = [part.fp32_precision for part in parts]
        try:
            for part in parts:
                part.fp32_precision = "ieee"
            yield
        finally:
            for part, value in zip(parts, found, strict=True):
                part.fp32_precision = value
        return
    try:
        cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision(matmul)


class TorchRunner(Runner):
    """A callable from torch tensors to torch tensors, in the order of the spec's inputs and outputs.

    With ``exact`` it multiplies float32 in float32 on CUDA, whatever the process has set.
    """

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    settings: ClassVar[Mapping[str, Setting]] = SETTINGS

    def __init__(
        self, torch: Any, function: Callable[..., Any], spec: GeneratorSpec, device: str, *, exact: bool = False
    ) -> None:
        super().__init__()
        self._exact = exact
        self.spec, self.device = spec, device
        self.runtime = f"torch {torch.__version__} {self.backend} {device}"
        self._torch: Any = torch
        self._function: Any = function
        self._inputs: list[Any] = []
        self._outputs: Any = None
        self._wanted: dict[str, int] = {}

    @classmethod
    def unavailable(cls) -> str | None:
        """Why torch cannot be used; None when it can."""
        return torch_unavailable()

    def prepare(self, feeds: Feeds) -> None:
        """Inputs as tensors on the device."""
        self._wanted = self.spec.infer_sizes(dict(feeds))
        self._inputs = []
        for tensor in self.spec.inputs:
            value = self._torch.from_numpy(np.require(feeds[tensor.name], requirements="W"))
            if tensor.dtype == "bfloat16":
                value = value.to(self._torch.bfloat16)
            self._inputs.append(value.to(self.device))

    def launch(self) -> None:
        """Call the module."""
        try:
            wide = full_float32(self._torch) if self._exact else contextlib.nullcontext()
            with self._torch.inference_mode(), wide:
                self._outputs = self._function(*self._inputs)
        except Exception as error:  # noqa: BLE001 - a module may raise anything
            if isinstance(error, self._torch.OutOfMemoryError):
                raise BackendUnavailableError("out of memory while running; use a smaller batch size") from None
            raise ArtifactError(f"{self.backend} failed while running: {_last_line(error)}") from None

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device != "cpu":
            self._torch.cuda.synchronize(self.device)

    def fetch(self) -> dict[str, Array]:
        """The outputs on the host, after their shapes were checked.

        The check is not idle: compiled packages have been seen to return the example's batch for any input.
        """
        result: dict[str, Array] = {}
        for name, value in self._checked().items():
            moved = value.detach().to("cpu")
            if moved.dtype == self._torch.bfloat16:
                moved = moved.float()
            array: Array = moved.contiguous().numpy()
            # A result that shares memory with the module's own buffers or inputs must not reach the caller.
            result[name] = array.copy() if self.device == "cpu" else array
        return result

    def places(self) -> dict[str, Place]:
        """The module's own results, on its device."""
        found = {}
        for name, value in self._checked().items():
            tensor = value.detach().contiguous()
            kind = (CPU, 0) if tensor.device.type == "cpu" else (CUDA, tensor.device.index)
            found[name] = Place(tensor.data_ptr(), tuple(tensor.shape), str(tensor.dtype)[6:], kind, tensor)
        return found

    def _checked(self) -> dict[str, Any]:
        """The outputs by name, after their shapes were checked."""
        found = {}
        for tensor, value in zip(self.spec.outputs, self._flatten(self._outputs), strict=True):
            shape = list(value.shape)
            wanted = [self._wanted.get(size) if isinstance(size, str) else size for size in tensor.shape]
            if len(wanted) != len(shape) or any(w not in (None, s) for w, s in zip(wanted, shape, strict=True)):
                raise ArtifactError(
                    f"{self.backend}: output {tensor.name!r} has shape {shape} for inputs of "
                    f"{self._wanted}, its spec says {list(tensor.shape)}: the file is wrong, convert again"
                )
            found[tensor.name] = value
        return found

    def _flatten(self, outputs: Any) -> list[Any]:
        if isinstance(outputs, Mapping):
            missing = [t.name for t in self.spec.outputs if t.name not in outputs]
            if missing:
                raise ArtifactError(f"{self.backend}: no output {missing[0]!r}, only {', '.join(map(str, outputs))}")
            return [outputs[tensor.name] for tensor in self.spec.outputs]
        flat = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
        if len(flat) != len(self.spec.outputs):
            raise ArtifactError(f"{self.backend}: {len(flat)} outputs, its spec says {len(self.spec.outputs)}")
        return flat

    def close(self) -> None:
        """Drop the module."""
        with self._lock:
            self._closed = True
            self._function, self._inputs, self._outputs = None, [], None


def in_memory_runner(
    torch: Any, function: Callable[..., Any], spec: GeneratorSpec, device: str, name: str
) -> TorchRunner:
    """A runner of a module that lies in memory, not in a file.

    Args:
        torch: The module, from :func:`import_torch`.
        function: From tensors to tensors, on ``device`` already.
        spec: Of the generator.
        device: "cpu" or "cuda:0".
        name: What the backend is called: "eager", "compile", …
    """

    class InMemoryRunner(TorchRunner):
        backend: ClassVar[str] = name

        @classmethod
        def _open(cls, *_: Any, **__: Any) -> Self:
            raise UsageError(f"{name} runs a module in memory, it opens no files")

    return InMemoryRunner(torch, function, spec, device)


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return first_line(lines[-1]) if lines else type(error).__name__
