"""Device memory, streams and graphs through cuda.bindings, without torch."""

from __future__ import annotations

from typing import Any, NamedTuple

from ganexport.errors import BackendUnavailableError
from ganexport.runtime.base import Array


class Gpu(NamedTuple):
    """One GPU: its number, name and compute capability ("9.0")."""

    number: int
    name: str
    capability: str


def library() -> Any:
    """``cuda.bindings.runtime``.

    Raises:
        BackendUnavailableError: It is not installed.
    """
    try:
        from cuda.bindings import runtime
    except Exception as error:  # noqa: BLE001 - a broken install fails with anything
        raise BackendUnavailableError(f"cuda.bindings is not installed ({error}); pip install cuda-bindings") from None
    return runtime


def check(result: tuple[Any, ...], what: str) -> Any:
    """The value of a CUDA call.

    Raises:
        BackendUnavailableError: The call failed; its code and CUDA's own words.
    """
    code, *values = result
    if int(code) != 0:
        runtime = library()
        text = runtime.cudaGetErrorString(code)[1]
        words = text.decode() if isinstance(text, bytes) else str(text)
        if int(code) == 2:
            raise BackendUnavailableError(f"out of GPU memory ({what}); use a smaller batch size")
        raise BackendUnavailableError(f"CUDA error {int(code)} in {what}: {words}")
    return values[0] if len(values) == 1 else tuple(values)


def unavailable() -> str | None:
    """Why no GPU can be used here; None when one can."""
    try:
        return None if gpus() else "no GPU"
    except BackendUnavailableError as error:
        return f"no usable GPU: {error}"


def gpus() -> list[Gpu]:
    """The GPUs that CUDA sees.

    Raises:
        BackendUnavailableError: No driver, or one too old.
    """
    runtime = library()
    return [gpu(index) for index in range(check(runtime.cudaGetDeviceCount(), "cudaGetDeviceCount"))]


def gpu(index: int) -> Gpu:
    """One GPU.

    Raises:
        BackendUnavailableError: There is no such GPU.
    """
    runtime = library()
    properties = check(runtime.cudaGetDeviceProperties(index), f"GPU {index}")
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return Gpu(index, name, f"{properties.major}.{properties.minor}")


def synchronize(index: int) -> None:
    """Wait for all work of a GPU, on every stream."""
    runtime = library()
    check(runtime.cudaSetDevice(index), "cudaSetDevice")
    check(runtime.cudaDeviceSynchronize(), "cudaDeviceSynchronize")


class Device:
    """One GPU with one stream: buffers that grow, asynchronous copies, captured graphs.

    Args:
        index: Number of the GPU.

    Raises:
        BackendUnavailableError: No such GPU, or it cannot be used.
    """

    def __init__(self, index: int) -> None:
        self.runtime = library()
        self.index = index
        self.select()
        self.stream = check(
            self.runtime.cudaStreamCreateWithFlags(self.runtime.cudaStreamNonBlocking), "cudaStreamCreate"
        )

    def select(self) -> None:
        """Make it the calling thread's device."""
        check(self.runtime.cudaSetDevice(self.index), "cudaSetDevice")

    def allocate(self, size: int) -> int:
        """Address of ``size`` bytes of device memory."""
        return int(check(self.runtime.cudaMalloc(max(size, 1)), f"cudaMalloc of {size} bytes"))

    def free(self, address: int) -> None:
        """Give device memory back."""
        check(self.runtime.cudaFree(address), "cudaFree")

    def to_device(self, address: int, array: Array) -> None:
        """Copy a contiguous host array to device memory, in stream order."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(self.runtime.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, self.stream), "copy in")

    def to_host(self, array: Array, address: int) -> None:
        """Copy device memory to a contiguous host array, in stream order."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(self.runtime.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, self.stream), "copy out")

    def synchronize(self) -> None:
        """Wait until the stream is done."""
        check(self.runtime.cudaStreamSynchronize(self.stream), "cudaStreamSynchronize")

    def capture(self, launch: Any) -> Any:
        """The work that ``launch()`` puts on the stream, as a graph to be replayed.

        Raises:
            BackendUnavailableError: The work cannot be captured.
        """
        mode = self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check(self.runtime.cudaStreamBeginCapture(self.stream, mode), "cudaStreamBeginCapture")
        try:
            launch()
        finally:
            graph = self.runtime.cudaStreamEndCapture(self.stream)
        graph = check(graph, "cudaStreamEndCapture")
        try:
            return check(self.runtime.cudaGraphInstantiate(graph, 0), "cudaGraphInstantiate")
        finally:
            self.runtime.cudaGraphDestroy(graph)

    def replay(self, graph: Any) -> None:
        """Put a captured graph on the stream."""
        check(self.runtime.cudaGraphLaunch(graph, self.stream), "cudaGraphLaunch")

    def forget(self, graph: Any) -> None:
        """Release a captured graph."""
        self.runtime.cudaGraphExecDestroy(graph)

    def close(self) -> None:
        """Release the stream."""
        self.runtime.cudaStreamDestroy(self.stream)
