"""The bindings of ONNX Runtime's CUDA runner, on the CPU's provider: buffers, shapes, what is kept."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import pytest
import tiny_generators as tiny

from ganexport.runtime._onnxruntime_cuda import GRAPHS, Binding, GraphBinding, can_graph
from ganexport.spec import GeneratorSpec


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[onnxruntime.InferenceSession, GeneratorSpec]:
    spec = tiny.image_spec(3, classes=10)
    path: Path = tiny.save(tiny.image_model(3, classes=10, spec=spec), tmp_path_factory.mktemp("b") / "net.onnx")
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]), spec


def feeds(spec: GeneratorSpec, batch: int, seed: int) -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(seed)
    return {
        tensor.name: (
            numbers.integers(0, 10, tensor.resolve({"batch": batch})).astype(tensor.dtype)
            if tensor.dtype.startswith("int")
            else numbers.standard_normal(tensor.resolve({"batch": batch})).astype(tensor.dtype)
        )
        for tensor in spec.inputs
    }


@pytest.mark.parametrize("graphs", [False, True])
def test_bound_runs_give_what_plain_ones_give_whatever_shape_comes_next(session, graphs: bool) -> None:
    engine, spec = session
    names = [output.name for output in engine.get_outputs()]
    binding = GraphBinding(engine, names, 0, spec, "cpu") if graphs else Binding(engine, names, 0, "cpu")
    kept = []
    for seed, batch in enumerate((1, 3, 1, 3, *range(4, GRAPHS + 6), 1, 3, GRAPHS + 5)):
        inputs = feeds(spec, batch, seed)
        binding.prepare(inputs)
        binding.launch()
        binding.synchronize()
        found = binding.fetch()
        kept.append((found, engine.run(names, inputs)))
    for found, wanted in kept:  # at the end: what was fetched is the caller's own
        for mine, theirs in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_buffers_stay_where_they_are_for_a_shape_seen_before(session) -> None:
    engine, spec = session
    binding = GraphBinding(engine, [output.name for output in engine.get_outputs()], 0, spec, "cpu")
    places = []
    for batch in (2, 5, 2, 5):
        binding.prepare(feeds(spec, batch, 0))
        binding.launch()
        places.append([value.data_ptr() for value in binding.values()])
    assert places[:2] == places[2:]
    assert places[0] != places[1]


def test_outputs_whose_sizes_nobody_knows_beforehand_get_no_buffers() -> None:
    spec = tiny.image_spec(3)
    assert can_graph(spec)
    output = spec.outputs[0]
    free = msgspec.structs.replace(output, shape=("other", *output.shape[1:]), layout=None, range=None)
    assert not can_graph(msgspec.structs.replace(spec, outputs=(free,)))
