"""What ``.run`` and ``.generate`` cost over the engine's own call.

    python -m benchmarks.overhead [ARTIFACT] [--latent 128] [--output overhead.json]

One process, one engine. The three calls are made in turn, so that each sample has its
counterpart from the same moment: the difference is taken pair by pair. ``.run`` checks and copies
nothing; ``.generate`` draws the latents by the seed contract, of another seed in each call, and makes
uint8 pictures.

Batch 1: one thread and a generator as small as it can be, so that the difference is not lost in the
engine's own scatter. With an ARTIFACT of a real generator also its batch of ``--batch``, as a share.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import ganexport
from benchmarks._rows import Results, median, say
from ganexport.runtime.generator import Generator
from ganexport.runtime.onnxruntime import OnnxRuntimeRunner
from ganexport.seeding import latents
from ganexport.spec import Dim, GeneratorSpec, Normal, TensorSpec, spec_to_json

#: Microseconds over the engine's own call that are promised.
LIMITS = {"run": 30.0, "generate": 80.0}
#: Share of the engine's own call at the large batch that is promised.
SHARE = 0.03


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, nargs="?", help="a real generator, for the large batch")
    parser.add_argument("--batch", type=int, default=64, help="of ARTIFACT")
    parser.add_argument("--latent", type=int, default=128, help="elements of the latent")
    parser.add_argument("--calls", type=int, default=20_000, help="of each kind")
    parser.add_argument("--output", type=Path, default=Path("overhead.json"))
    arguments = parser.parse_args()
    conditions = {"batch": 1, "threads": 1, "latent": arguments.latent, "image": [1, 28, 28]}
    names = ("engine", *LIMITS)
    planned = [({"name": name, "backend": "onnxruntime"}, conditions) for name in names]
    if arguments.artifact:
        large = {"batch": arguments.batch, "artifact": arguments.artifact.name}
        planned += [({"name": name, "backend": "onnxruntime"}, large) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.onnx"
        path.write_bytes(tiny_model(arguments.latent))
        with ganexport.load(path, "onnxruntime", "cpu", settings={"threads": 1}) as generator:
            samples = measure(generator, 1, arguments.calls)
    results = Results(arguments.output, "Overhead of .run and .generate over the engine's own call", planned)
    for index, name in enumerate(samples):
        over = [now - own for now, own in zip(samples[name], samples["engine"], strict=True)]
        facts = {"median_over_engine_us": median(over) / 1e3, "limit_us": LIMITS.get(name)} if name in LIMITS else None
        results.add(index, {"end-to-end": samples[name]}, facts=facts)
        if facts:
            own = median(samples["engine"]) / 1e3
            say(f"{name}: {facts['median_over_engine_us']:.1f} µs over the engine's {own:.1f}")
    if arguments.artifact:
        with ganexport.load(arguments.artifact, "onnxruntime", "cpu") as generator:
            samples = measure(generator, arguments.batch, min(arguments.calls, 300))
        for index, name in enumerate(samples, len(LIMITS) + 1):
            shares = [now / own - 1 for now, own in zip(samples[name], samples["engine"], strict=True)]
            share = sorted(shares)[len(shares) // 2]
            facts = {"median_share_over_engine": share, "limit": SHARE} if name in LIMITS else None
            results.add(index, {"end-to-end": samples[name]}, items=arguments.batch, facts=facts)
            if facts:
                own = median(samples["engine"]) / 1e6
                say(f"{name}, batch {arguments.batch}: {share:.1%} over the engine's {own:.2f} ms")
    return 0


def tiny_model(latent: int) -> bytes:
    """z [batch, latent] → tanh of one matrix product → [batch, 1, 28, 28], with its spec in the metadata."""
    random = np.random.default_rng(0)
    constants: dict[str, NDArray[Any]] = {
        "weight": random.normal(0, latent**-0.5, (latent, 784)).astype(np.float32),
        "shape": np.array([-1, 1, 28, 28], np.int64),
    }
    nodes = [
        helper.make_node("MatMul", ["z", "weight"], ["product"]),
        helper.make_node("Tanh", ["product"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["image"]),
    ]
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", latent])
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 28, 28])
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "tiny", [z], [image], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    spec = GeneratorSpec(
        (TensorSpec("z", "float32", ("batch", latent), Normal()),),
        (TensorSpec("image", "float32", ("batch", 1, 28, 28), range=(-1.0, 1.0), layout="NCHW"),),
        (Dim("batch", 1, 8, 64),),
        "tiny",
    )
    helper.set_model_props(model, {"ganexport.spec": spec_to_json(spec)})
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def measure(generator: Generator, batch: int, calls: int) -> dict[str, list[int]]:
    """Nanoseconds of each call, in turn."""
    feeds = latents(generator.spec, 7, n=batch)
    assert isinstance(generator.runner, OnnxRuntimeRunner)
    session = generator.runner._session  # the engine itself, for what it takes without us
    names = [output.name for output in session.get_outputs()]
    seeds = itertools.count()
    functions = {
        "engine": lambda: session.run(names, feeds),
        "run": lambda: generator.run(feeds),
        "generate": lambda: generator.generate(batch, next(seeds), batch_size=batch),
    }
    made = generator.generate(batch, 7)
    assert np.array_equal(made, generator.generate(batch, 7)), "not deterministic"
    samples: dict[str, list[int]] = {name: [] for name in functions}
    gc.disable()
    for turn in range(-calls // 10, calls):
        for name, function in functions.items():
            begun = time.perf_counter_ns()
            function()
            taken = time.perf_counter_ns() - begun
            if turn >= 0:
                samples[name].append(taken)
    gc.enable()
    return samples


if __name__ == "__main__":
    sys.exit(main())
