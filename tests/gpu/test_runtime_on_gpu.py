"""Engines on a real GPU, against ONNX Runtime on the CPU: shapes, threads, graphs, ownership, damage."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

import ganexport
from ganexport.artifact import MANIFEST
from ganexport.errors import ArtifactError, BackendUnavailableError
from ganexport.export.convert import convert
from ganexport.runtime import _cuda
from ganexport.runtime.tensorrt import TensorRtRunner, installed

sys.path.insert(0, str(Path(__file__).parent.parent / "runtime"))
import tiny_generators as tiny

pytestmark = pytest.mark.xdist_group("runtime")  # one process: the artifact is made once


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    spec = tiny.image_spec(3, classes=10)
    path = tiny.save(tiny.image_model(3, classes=10, spec=spec), folder / "net.onnx")
    # An engine can be built for other GPUs than this one.
    convert(str(path), to=["onnx", "trt"] if installed() else ["onnx"], output=folder / "a")
    return folder / "a"


@pytest.fixture(scope="module")
def engine(artifact):
    """The artifact, where TensorRT has code for this GPU."""
    reason = TensorRtRunner.unavailable()
    if reason and not installed():
        pytest.skip(reason)
    if reason:
        with pytest.raises(BackendUnavailableError, match="cannot run here"):
            ganexport.load(artifact, "tensorrt")
        pytest.skip(reason)
    return artifact


@pytest.fixture(scope="module")
def reference(artifact):
    with ganexport.load(artifact, "onnxruntime", "cpu") as loaded:
        yield loaded


@pytest.fixture(params=[True, False], ids=["graphs", "no-graphs"])
def generator(engine, request):
    with ganexport.load(engine, "tensorrt", settings={"cuda_graph": request.param}) as loaded:
        yield loaded


def test_the_engine_is_what_load_chooses(engine):
    with ganexport.load(engine) as loaded:
        assert loaded.backend == "tensorrt"
        assert loaded.device == "cuda:0"
        assert _cuda.gpu(0).name in loaded.runtime


def test_every_batch_size_matches_the_processor(generator, reference):
    for batch in (1, 8, 8, 8, 64, 3, 64, 8, 1, 1, 17):
        feeds = ganexport.latents(reference.spec, 3, batch, batch)
        wanted = reference.run(feeds)["image"]
        assert np.abs(generator.run(feeds)["image"] - wanted).max() < 1e-3
    assert np.abs(generator.generate(200, seed=5).astype(int) - reference.generate(200, seed=5)).max() <= 1


def test_twenty_threads_get_the_pictures_of_one(generator):
    wanted = [generator.generate(9, seed=seed) for seed in range(10)]
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda seed: generator.generate(9, seed=seed % 10), range(100)))
    assert all(np.array_equal(pictures, wanted[n % 10]) for n, pictures in enumerate(found))


def test_outputs_belong_to_the_caller(generator):
    feeds = ganexport.latents(generator.spec, 1, 0, 4)
    first = generator.run(feeds)["image"]
    kept = first.copy()
    generator.run(ganexport.latents(generator.spec, 2, 0, 4))
    assert np.array_equal(first, kept)


def test_torch_reads_lent_outputs_on_the_gpu(generator):
    check_lent(generator)


def check_lent(generator):
    torch = pytest.importorskip("torch")
    feeds = ganexport.latents(generator.spec, 1, 0, 4)
    wanted = generator.run(feeds)["image"]
    with generator.borrow(feeds) as lent:
        image = torch.from_dlpack(lent["image"])
        assert image.device.type == "cuda"
        found = image.cpu().numpy()
    assert np.array_equal(found, wanted)


def test_the_parts_of_a_call_give_what_run_gives(generator):
    feeds = ganexport.latents(generator.spec, 1, 0, 4)
    wanted = generator.run(feeds)["image"]
    runner = generator.runner
    runner.prepare(feeds)
    for _ in range(5):
        runner.launch()
    runner.synchronize()
    assert np.array_equal(runner.fetch()["image"], wanted)


@pytest.mark.alone
def test_device_memory_comes_back(engine):
    runtime = _cuda.library()

    def free() -> int:
        return _cuda.check(runtime.cudaMemGetInfo(), "memory")[0]

    with ganexport.load(engine, "tensorrt") as loaded:
        loaded.generate(64)
    before = free()
    for _ in range(10):
        with ganexport.load(engine, "tensorrt") as loaded:
            loaded.generate(64)
    assert before - free() < 64 << 20


def test_a_damaged_engine_with_a_right_hash_is_one_clear_line(engine, tmp_path):
    import shutil

    shutil.copytree(engine, tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    entry = next(f for f in manifest["files"] if f["format"] == "trt")
    path = tmp_path / "a" / entry["path"]
    data = path.read_bytes()[:1000]
    path.write_bytes(data)
    entry["sha256"] = sha256(data).hexdigest()
    (tmp_path / "a" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="cannot load this engine") as refusal:
        ganexport.load(tmp_path / "a", "tensorrt")
    assert "\n" not in str(refusal.value)


def test_a_gpu_that_is_not_there_is_named(engine):
    with pytest.raises(BackendUnavailableError, match="no GPU 99"):
        ganexport.load(engine, "tensorrt", "cuda:99")


def test_onnxruntime_on_cuda_or_a_clear_refusal(artifact, reference):
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(BackendUnavailableError, match="pip install onnxruntime-gpu"):
            ganexport.load(artifact, "onnxruntime", "cuda")
        return
    graphs = {"cuda_graph": True}
    for settings, limit in (({}, 1e-3), (graphs, 1e-3), (graphs | {"nhwc": True}, 1e-3), ({"tf32": True}, 2e-2)):
        with ganexport.load(artifact, "onnxruntime", "cuda", settings=settings) as loaded:
            assert loaded.device == "cuda:0"
            for batch in (1, 8, 3, 64, 1, 8, 3, 64, *range(10, 30), 8):
                feeds = ganexport.latents(reference.spec, 3, batch, batch)
                assert np.abs(loaded.run(feeds)["image"] - reference.run(feeds)["image"]).max() < limit
    for settings in ({}, graphs):
        check_used_by_threads(artifact, settings)


def check_used_by_threads(artifact, settings):
    with ganexport.load(artifact, "onnxruntime", "cuda", settings=settings) as loaded:
        check_lent(loaded)
        wanted = [loaded.generate(9, seed=seed) for seed in range(5)]
        with ThreadPoolExecutor(10) as pool:
            found = list(pool.map(lambda seed: loaded.generate(9, seed=seed % 5), range(50)))
        assert all(np.array_equal(pictures, wanted[n % 5]) for n, pictures in enumerate(found))


def test_torch_is_not_needed(engine):
    import subprocess

    assert importlib.util.find_spec("cuda.bindings")
    load = f"ganexport.load({str(engine)!r}, 'tensorrt')"
    script = f"import sys, ganexport; {load}.generate(3); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr
