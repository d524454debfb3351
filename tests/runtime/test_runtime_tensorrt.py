"""TensorRT without a GPU: the preflight, and the runner's bookkeeping on a stand-in for the device.

Real engines run in tests/gpu; here the CUDA calls are replaced by copies in host memory, so that
buffers, shapes, profiles and graphs are exercised by the same code.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_generators

import ganexport
from ganexport.cli.main import run
from ganexport.errors import ArtifactError, BackendUnavailableError, UsageError
from ganexport.runtime import _cuda, tensorrt
from ganexport.runtime._cuda import Gpu
from ganexport.runtime.tensorrt import TensorRtRunner, preflight, unsupported
from ganexport.spec import Dim

H200 = Gpu(0, "NVIDIA H200", "9.0")
RTX = {"tensorrt_rtx": "1.7.1.116"}
FULL = {"tensorrt": "10.13.2.6"}


@pytest.mark.parametrize(
    ("requires", "have", "flavour"),
    [
        ({"flavour": "tensorrt_rtx", "version": "1.7.1.116"}, RTX, "tensorrt_rtx"),
        ({"flavour": "tensorrt", "version": "10.13.2"}, FULL, "tensorrt"),
        ({"flavour": "tensorrt", "version": "10.13.2.6", "compute_capability": "9.0"}, FULL, "tensorrt"),
        ({"flavour": "tensorrt", "compute_capability": "8.0+"}, FULL, "tensorrt"),
        ({"flavour": "tensorrt_rtx", "compute_capability": "8.9, 9.0"}, RTX, "tensorrt_rtx"),
        ({}, FULL | RTX, "tensorrt"),
    ],
)
def test_what_fits_passes(tmp_path, requires, have, flavour):
    assert preflight(tmp_path / "a" / "generator.engine", requires, H200, have) == flavour


@pytest.mark.parametrize(
    ("requires", "have", "gpu", "both_sides"),
    [
        ({"flavour": "tensorrt", "version": "10.9.0.34"}, FULL, H200, ["tensorrt 10.9.0.34", "tensorrt 10.13.2.6"]),
        ({"flavour": "tensorrt", "version": "11.0.0.1"}, RTX, H200, ["tensorrt 11.0.0.1", "tensorrt_rtx 1.7.1.116"]),
        ({"flavour": "tensorrt_rtx", "version": "1.4.0.7"}, {}, H200, ["tensorrt_rtx 1.4.0.7", "no TensorRT"]),
        ({"flavour": "tensorrt", "compute_capability": "12.0"}, FULL, H200, ["12.0", "NVIDIA H200 has 9.0"]),
        ({"flavour": "tensorrt", "compute_capability": "10.0+"}, FULL, H200, ["10.0+", "9.0"]),
        ({"flavour": "tensorrt", "compute_capability": "8.6"}, FULL, "no GPU", ["compute capability 8.6", "no GPU"]),
        ({"flavour": "tensorrt", "platform": "windows-amd64"}, FULL, H200, ["windows-amd64"]),
    ],
)
def test_what_does_not_fit_is_named_on_both_sides_with_the_command(tmp_path, requires, have, gpu, both_sides):
    path = tmp_path / "a" / "generator.engine"
    with pytest.raises(BackendUnavailableError) as refusal:
        preflight(path, requires, gpu, have)
    for side in both_sides:
        assert side in str(refusal.value)
    assert f"ganexport convert {path.parent} --to trt -o {path.parent}" in str(refusal.value)


@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6", "8.9", "12.0", "12.1", "13.0"])
def test_gpus_that_tensorrt_rtx_has_code_for(capability):
    assert unsupported(pytest.importorskip("tensorrt_rtx"), Gpu(0, "GPU", capability)) is None


@pytest.mark.parametrize("capability", ["7.0", "9.0", "10.0"])
def test_a_gpu_that_tensorrt_rtx_has_no_code_for_is_named(capability):
    reason = unsupported(pytest.importorskip("tensorrt_rtx"), Gpu(0, "NVIDIA H200", capability))
    assert f"no code for compute capability {capability} (NVIDIA H200), only for 7.5, 8.0" in reason
    assert unsupported(SimpleNamespace(__name__="tensorrt"), Gpu(0, "NVIDIA H200", capability)) is None


def test_on_such_a_gpu_another_backend_is_chosen_and_the_engine_refused(monkeypatch, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    gpu = Gpu(0, "NVIDIA H200", "9.0")
    monkeypatch.setattr(_cuda, "unavailable", lambda: None)
    monkeypatch.setattr(_cuda, "gpu", lambda index: gpu)
    monkeypatch.setattr(tensorrt, "gpu_or_reason", lambda index: gpu)
    monkeypatch.setattr(_cuda, "Device", lambda index: SimpleNamespace(index=index))
    assert "no code for compute capability 9.0" in TensorRtRunner.unavailable()
    path = tmp_path / "generator.engine"
    path.write_bytes(b"never read")
    with pytest.raises(BackendUnavailableError, match="cannot run here: tensorrt_rtx") as refusal:
        TensorRtRunner.open(path, tiny_generators.image_spec(), requires={"flavour": "tensorrt_rtx"})
    assert "\n" not in str(refusal.value)


def test_an_engine_of_another_version_is_refused_before_its_bytes_are_read(tmp_path):
    about = {"format": "trt", "requires": {"flavour": "tensorrt_rtx", "version": "0.9.0.1"}}
    artifact = tiny_generators.make_artifact(tmp_path / "a", extra={"generator.engine": (b"not an engine", about)})
    with pytest.raises(BackendUnavailableError, match=r"it was built by tensorrt_rtx 0\.9\.0\.1, here is"):
        ganexport.load(artifact.path, "tensorrt")
    with ganexport.load(artifact.path) as generator:
        assert "0.9.0.1" in generator.remarks[0]


def test_a_real_engine_is_passed_over_without_a_gpu_or_runs_on_one(tmp_path):
    path = tiny_generators.save(tiny_generators.image_model(spec=tiny_generators.image_spec()), tmp_path / "net.onnx")
    assert run(["convert", str(path), "--to", "onnx", "--to", "trt", "-o", str(tmp_path / "a")]) == 0
    with ganexport.load(tmp_path / "a") as generator, ganexport.load(tmp_path / "a", "onnxruntime", "cpu") as onnx:
        expected = "onnxruntime" if _cuda.unavailable() else "tensorrt"
        assert generator.backend == expected
        assert np.abs(generator.generate(9, seed=1).astype(int) - onnx.generate(9, seed=1)).max() <= 1
    if _cuda.unavailable():
        with pytest.raises(BackendUnavailableError, match="it needs a GPU, here is no usable GPU"):
            ganexport.load(tmp_path / "a", "tensorrt")


def test_the_processor_is_refused():
    with pytest.raises(BackendUnavailableError, match="device cpu: tensorrt does not run on cpu, only on cuda"):
        TensorRtRunner.open(None, tiny_generators.image_spec(), device="cpu")
    with pytest.raises(UsageError, match="cuda_graphs"):
        TensorRtRunner.open(None, tiny_generators.image_spec(), settings={"cuda_graphs": True})


# ---- a device of host memory --------------------------------------------------------------------------


class HostDevice:
    """What _cuda.Device does, with host memory; it counts what is alive."""

    index, stream = 0, 0

    def __init__(self):
        self.memory: dict[int, ctypes.Array] = {}
        self.captured = self.replayed = 0
        self.graphs: set[int] = set()
        self.closed = False

    def select(self):
        assert not self.closed

    def synchronize(self):
        pass

    def allocate(self, size):
        block = ctypes.create_string_buffer(max(size, 1))
        self.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, address):
        del self.memory[address]

    def to_device(self, address, array):
        assert array.flags.c_contiguous
        assert array.nbytes <= len(self.memory[address])
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def to_host(self, array, address):
        assert array.nbytes <= len(self.memory[address])
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def capture(self, launch):
        self.captured += 1
        self.graphs.add(self.captured)
        self._launch = launch
        return self.captured

    def replay(self, graph):
        assert graph in self.graphs, "a graph that was forgotten"
        self.replayed += 1
        self._launch()

    def forget(self, graph):
        self.graphs.remove(graph)

    def close(self):
        self.closed = True


class HostEngine:
    """An engine and its context that double z, with two profiles: batches 1 to 4 and 5 to 64."""

    num_optimization_profiles = 2

    def __init__(self):
        self.shape, self.addresses, self.profiles = (0, 0), {}, []

    def get_tensor_location(self, _name):
        return "device"

    def get_tensor_profile_shape(self, _name, profile):
        return [((1, 16), (2, 16), (4, 16)), ((5, 16), (8, 16), (64, 16))][profile]

    def create_execution_context(self):
        return self

    def set_optimization_profile_async(self, profile, _stream):
        self.profiles.append(profile)

    def set_input_shape(self, _name, shape):
        self.shape = shape
        return True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def infer_shapes(self):
        return []

    def get_tensor_shape(self, name):
        return (self.shape[0], 3, 8, 8) if name == "image" else self.shape

    def execute_async_v3(self, _stream):
        z = np.frombuffer(
            (ctypes.c_char * (4 * self.shape[0] * 16)).from_address(self.addresses["z"]), np.float32
        ).reshape(self.shape)
        out = (ctypes.c_char * (4 * self.shape[0] * 192)).from_address(self.addresses["image"])
        np.frombuffer(out, np.float32).reshape(self.shape[0], 192)[:] = np.tile(z, 12) * 2
        return True


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(_cuda, "gpu", lambda _index: H200)
    trt = SimpleNamespace(
        __name__="tensorrt", __version__="10.13", TensorLocation=SimpleNamespace(HOST="host", DEVICE="device")
    )
    engine, device = HostEngine(), HostDevice()
    runner = TensorRtRunner(
        trt, engine, tiny_generators.image_spec(dim=Dim("batch", 1, 8, 64)), device, cuda_graph=True
    )
    return runner, engine, device


def test_shapes_profiles_buffers_and_graphs(stand_in):
    runner, engine, device = stand_in
    random = np.random.default_rng(0)
    for batch in (2, 2, 2, 9, 9, 3, 64, 2, 2, 2, 64, 64):
        z = random.normal(size=(batch, 16)).astype(np.float32)
        out = runner.run({"z": z})["image"]
        assert np.array_equal(out.reshape(batch, 192), np.tile(z, 12) * 2)
    assert engine.profiles == [1, 0, 1, 0, 1]
    assert len(device.memory) == 2
    assert device.replayed >= 5
    assert device.captured == len(device.graphs) + 2  # those of the buffers that were outgrown are gone
    runner.close()
    runner.close()
    assert not device.memory
    assert not device.graphs
    assert device.closed
    with pytest.raises(UsageError, match="closed"):
        runner.run({"z": np.zeros((1, 16), np.float32)})


def test_buffers_are_lent_until_all_work_of_the_gpu_is_done(stand_in, monkeypatch):
    runner, engine, _ = stand_in
    waited: list[int] = []
    monkeypatch.setattr(_cuda, "synchronize", waited.append)
    with runner.borrow({"z": np.ones((3, 16), np.float32)}) as lent:
        image = lent["image"]
        assert image._place() == (engine.addresses["image"], (3, 3, 8, 8), "float32", (2, 0), None)
        assert (image.device, waited) == ("cuda:0", [])
    assert waited == [0]


def test_a_profile_that_covers_nothing_is_named(stand_in):
    runner, engine, _ = stand_in
    engine.get_tensor_profile_shape = lambda *_: ((1, 16), (2, 16), (4, 16))
    with pytest.raises(ArtifactError, match=r"no optimisation profile of this engine covers z \[9, 16\]"):
        runner.run({"z": np.zeros((9, 16), np.float32)})
    assert runner.run({"z": np.ones((4, 16), np.float32)})["image"].max() == 2


def test_a_cuda_error_keeps_its_code_and_words(monkeypatch):
    runtime = SimpleNamespace(cudaGetErrorString=lambda _code: (0, b"driver too old"))
    monkeypatch.setattr(_cuda, "library", lambda: runtime)
    assert _cuda.check((0,), "x") == ()
    assert _cuda.check((0, 5), "x") == 5
    assert _cuda.check((0, 5, 6), "x") == (5, 6)
    with pytest.raises(BackendUnavailableError, match="CUDA error 35 in x: driver too old"):
        _cuda.check((35,), "x")
    with pytest.raises(BackendUnavailableError, match="out of GPU memory"):
        _cuda.check((2,), "cudaMalloc of 9 bytes")


def test_installed_versions_are_those_of_the_modules():
    for flavour, version in tensorrt.installed().items():
        assert version == __import__(flavour).__version__
