"""ONNX Runtime on CUDA: inputs and outputs that stay on the device, and graphs replayed for shapes seen before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ganexport.runtime.base import Array, Feeds
from ganexport.spec import GeneratorSpec, TensorSpec

#: Shapes whose captured graphs are kept.
GRAPHS = 16


class Binding:
    """Inputs and outputs of one session in device memory.

    Args:
        session: Of the CUDA provider.
        outputs: Names of its outputs.
        index: Number of the GPU.
        kind: "cuda", or "cpu" where a test has no GPU.
    """

    def __init__(self, session: Any, outputs: Sequence[str], index: int, kind: str = "cuda") -> None:
        self._session, self._outputs, self._place = session, outputs, (kind, index)
        self.io = session.io_binding()

    def prepare(self, feeds: Feeds) -> None:
        """Copy the inputs to the device."""
        import onnxruntime

        self.io.clear_binding_inputs()
        self.io.clear_binding_outputs()
        for name, array in feeds.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array, *self._place)
            self.io.bind_ortvalue_input(name, value)
        for name in self._outputs:
            self.io.bind_output(name, *self._place)

    def launch(self) -> None:
        """Run the session."""
        self._session.run_with_iobinding(self.io)

    def synchronize(self) -> None:
        """Wait for the device."""
        self.io.synchronize_outputs()

    def fetch(self) -> list[Array]:
        """Copies of the outputs."""
        found: list[Array] = self.io.copy_outputs_to_cpu()
        return found

    def values(self) -> list[Any]:
        """The outputs, on the device."""
        found: list[Any] = self.io.get_outputs()
        return found


class GraphBinding:
    """As :class:`Binding`, for a session with ``enable_cuda_graph``: each shape has buffers and a graph of its own.

    ONNX Runtime replays the graph of an annotation for whatever is bound, so every shape gets an annotation; -1 runs
    without a graph (https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html).

    Args:
        session: Of the CUDA provider.
        outputs: Names of its outputs.
        index: Number of the GPU.
        spec: Says the outputs' shapes; see :func:`can_graph`.
        kind: "cuda", or "cpu" where a test has no GPU.
    """

    def __init__(
        self, session: Any, outputs: Sequence[str], index: int, spec: GeneratorSpec, kind: str = "cuda"
    ) -> None:
        self._session, self._place = session, (kind, index)
        self._outputs = [next(tensor for tensor in spec.outputs if tensor.name == name) for name in outputs]
        self._spec = spec
        self._kinds: dict[tuple[tuple[int, ...], ...], _Bound] = {}
        self._now: _Bound | None = None

    def prepare(self, feeds: Feeds) -> None:
        """Copy the inputs to where the graph of their shapes reads them."""
        key = tuple(array.shape for array in feeds.values())
        bound = self._kinds.get(key)
        if bound is None:
            number = len(self._kinds) if len(self._kinds) < GRAPHS else -1
            sizes = self._spec.infer_sizes(dict(feeds))
            bound = _Bound(self._session, feeds, self._outputs, sizes, self._place, number)
            if number >= 0:
                self._kinds[key] = bound
        bound.copy(feeds)
        self._now = bound

    def launch(self) -> None:
        """Run or replay."""
        assert self._now is not None
        self._session.run_with_iobinding(self._now.io, self._now.options)

    def synchronize(self) -> None:
        """Wait for the device."""
        assert self._now is not None
        self._now.io.synchronize_outputs()

    def fetch(self) -> list[Array]:
        """Copies of the outputs."""
        copies = self._place[0] != "cpu"  # there it is a view
        return [value.numpy() if copies else value.numpy().copy() for value in self.values()]

    def values(self) -> list[Any]:
        """The outputs, on the device."""
        assert self._now is not None
        return self._now.outputs


class _Bound:
    def __init__(
        self,
        session: Any,
        feeds: Feeds,
        outputs: Sequence[TensorSpec],
        sizes: dict[str, int],
        place: tuple[str, int],
        number: int,
    ) -> None:
        import onnxruntime

        self.io = session.io_binding()
        self.options = onnxruntime.RunOptions()
        self.options.add_run_config_entry("gpu_graph_id", str(number))
        make = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        self._inputs = {name: make(array.shape, array.dtype, *place) for name, array in feeds.items()}
        self.outputs = [make(tensor.resolve(sizes), np.dtype(tensor.dtype), *place) for tensor in outputs]
        for name, value in self._inputs.items():
            self.io.bind_ortvalue_input(name, value)
        for tensor, value in zip(outputs, self.outputs, strict=True):
            self.io.bind_ortvalue_output(tensor.name, value)

    def copy(self, feeds: Feeds) -> None:
        for name, array in feeds.items():
            self._inputs[name].update_inplace(array)


def can_graph(spec: GeneratorSpec) -> bool:
    """Whether buffers for every output can be made before a run: sizes known from the inputs, types that numpy has."""
    given = {size for tensor in spec.inputs for size in tensor.shape if isinstance(size, str)}
    sizes = {size for tensor in spec.outputs for size in tensor.shape if isinstance(size, str)}
    return sizes <= given and all(tensor.dtype != "bfloat16" for tensor in (*spec.inputs, *spec.outputs))
