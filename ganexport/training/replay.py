"""A whole update as one CUDA graph: loss, penalty and gradients are launched at once instead of kernel by kernel.

Launching takes the host 5 to 10 microseconds a kernel, and a GAN's update is hundreds of small ones: what a GPU
finishes in 2 milliseconds can take the host 8. A graph holds the addresses and shapes it was captured with, so
inputs are copied to where it reads them, and gradients lie where it writes them
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ganexport.errors import UsageError
from ganexport.runtime.base import first_line

#: Updates of a kind that run as they are before one is captured: libraries choose their kernels, compilers compile.
WARM_UP = 2
#: Kinds of update (which network, which penalties are due, which shapes) whose graphs are kept.
MOST = 16


class Graph(Protocol):
    """What :class:`Updates` needs of a graph."""

    def warm(self, work: Callable[[], Any]) -> Any:
        """Run the work where it will be captured."""

    def capture(self, work: Callable[[], Any]) -> Any:
        """Record the work; its results are filled by :meth:`replay`."""

    def replay(self) -> None:
        """Do what was recorded."""


class CudaGraph:
    """A graph of one GPU. All share a stream to be captured on and a pool of memory.

    Sharing the pool is sound because what a graph leaves for others, gradients and metrics, is held for as long as
    the graph is: only memory that a replay both writes and reads is used by another graph too.
    """

    _shared: ClassVar[dict[torch.device, tuple[torch.cuda.Stream, Any]]] = {}

    def __init__(self, device: torch.device) -> None:
        if device not in self._shared:
            self._shared[device] = (torch.cuda.Stream(device), torch.cuda.graph_pool_handle())
        self._stream, self._pool = self._shared[device]
        self._graph = torch.cuda.CUDAGraph()

    def warm(self, work: Callable[[], Any]) -> Any:
        """On the stream of the capture, so that what belongs to a stream exists."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            found = work()
        current.wait_stream(self._stream)
        return found

    def capture(self, work: Callable[[], Any]) -> Any:
        """Record it.

        Raises:
            UsageError: Something in it cannot be captured, such as an operation that waits for the device.
        """
        try:
            with torch.cuda.graph(
                self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):  # other threads may fetch data meanwhile
                return work()
        except RuntimeError as error:
            said = first_line(error)[:200]
            raise UsageError(
                f"training.cuda_graphs: an update of this recipe cannot be captured ({said}); leave it off"
            ) from None

    def replay(self) -> None:
        """On the current stream."""
        self._graph.replay()


class Updates:
    """Runs updates, each kind of them from its graph once it has one.

    Args:
        make: Gives an empty graph.
    """

    def __init__(self, make: Callable[[], Graph]) -> None:
        self._make = make
        self._kinds: dict[Any, _Kind] = {}

    def run(
        self,
        key: Any,
        parameters: Sequence[nn.Parameter],
        update: Callable[..., dict[str, Tensor]],
        *arguments: Any,
    ) -> dict[str, Tensor]:
        """One update.

        Args:
            key: Names what ``update`` does besides what its tensors' shapes say.
            parameters: Those whose ``.grad`` it adds to.
            update: Gives metrics; reads nothing that changes but its arguments, weights, buffers and random states.
            *arguments: Tensors, None, or dictionaries of them.

        Returns:
            The metrics, in memory that the next update leaves alone. Gradients are in memory that the next update
            of the same kind writes to.
        """
        tensors, structure = pytree.tree_flatten(arguments)
        shapes = tuple((t.shape, t.dtype, t.stride()) if isinstance(t, Tensor) else t for t in tensors)
        kind = self._kinds.get((key, structure, shapes))
        if kind is None:
            if len(self._kinds) == MOST:
                return update(*arguments)
            kind = self._kinds[key, structure, shapes] = _Kind(self._make(), tensors, structure)
        return kind.run(tensors, parameters, update)


class _Kind:
    def __init__(self, graph: Graph, tensors: list[Any], structure: Any) -> None:
        self._graph, self._structure = graph, structure
        self._inputs = [torch.empty_like(t) if isinstance(t, Tensor) else t for t in tensors]
        self._copied = [index for index, t in enumerate(tensors) if isinstance(t, Tensor)]
        self._warm = 0
        self._metrics: dict[str, Tensor] | None = None
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []

    def run(
        self, tensors: list[Any], parameters: Sequence[nn.Parameter], update: Callable[..., dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        arguments = pytree.tree_unflatten(self._inputs, self._structure)
        self._copy(tensors)
        if self._warm < WARM_UP:
            self._warm += 1
            found: dict[str, Tensor] = self._graph.warm(lambda: update(*arguments))
            return found
        # Gradients of another part of the batch are the caller's: the graph writes its own, then they are added.
        before = [(p, p.grad) for p in parameters if p.grad is not None]
        mine = {id(gradient) for _, gradient in self._gradients}
        before = [(p, gradient.clone() if id(gradient) in mine else gradient) for p, gradient in before]
        if self._metrics is None:
            for parameter in parameters:
                parameter.grad = None
            self._metrics = self._graph.capture(lambda: update(*arguments))
            self._gradients = [(p, p.grad) for p in parameters if p.grad is not None]
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._add(before)
        return {name: value.clone() for name, value in self._metrics.items()}

    def _copy(self, tensors: list[Any]) -> None:
        with torch.no_grad():
            torch._foreach_copy_([self._inputs[i] for i in self._copied], [tensors[i].detach() for i in self._copied])

    def _add(self, before: list[tuple[nn.Parameter, Tensor]]) -> None:
        both = [(p.grad, gradient) for p, gradient in before if p.grad is not None]
        if both:
            torch._foreach_add_([mine for mine, _ in both], [other for _, other in both])
        for parameter, gradient in before:
            if parameter.grad is None:
                parameter.grad = gradient
