"""Every example runs, and makes the picture that ganexport makes."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ganexport
from ganexport.seeding import latents
from ganexport.spec import Dim, GeneratorSpec, parse_input

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))

from serving_helpers import make_artifact

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

import tiny_generators

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("examples") / "tiny").path


def expected(artifact: Path, seed: int) -> np.ndarray:
    with ganexport.load(artifact) as generator:
        return generator.generate(1, seed)[0]


def test_python_without_torch(artifact: Path, tmp_path: Path) -> None:
    script = ROOT / "examples/python/generate.py"
    output = tmp_path / "seven.png"
    command = [sys.executable, str(script), str(artifact), "7", str(output)]
    subprocess.run(command, check=True, env=ENVIRONMENT, cwd=tmp_path, timeout=60)
    np.testing.assert_array_equal(np.asarray(Image.open(output)), expected(artifact, 7))


@pytest.fixture(scope="module")
def fastapi_port(artifact: Path) -> Iterator[int]:
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port), "--log-level", "warning"]
    process = subprocess.Popen(command, cwd=ROOT / "examples/fastapi", env=ENVIRONMENT | {"ARTIFACT": str(artifact)})
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/openapi.json", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def test_fastapi(artifact: Path, fastapi_port: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{fastapi_port}/images/9.png", timeout=30) as response:
        picture = np.asarray(Image.open(io.BytesIO(response.read())))
    np.testing.assert_array_equal(picture, expected(artifact, 9))
    with pytest.raises(urllib.error.HTTPError, match="422"):
        urllib.request.urlopen(f"http://127.0.0.1:{fastapi_port}/images/-1.png", timeout=30)


@pytest.fixture(scope="module")
def cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs in C++, built by CMake against an unpacked release of ONNX Runtime.

    ``ONNXRUNTIME_ROOT`` names a real one. Without it the library is the Python package's and the header
    our own declarations of the few functions that the example calls.
    """
    import onnxruntime

    assert shutil.which("cmake"), "the example in C++ needs CMake and a compiler"
    folder = tmp_path_factory.mktemp("cpp")
    root = Path(os.environ.get("ONNXRUNTIME_ROOT", folder / "onnxruntime"))
    if not root.exists():
        (root / "include").mkdir(parents=True)
        (root / "lib").mkdir()
        shutil.copy(Path(__file__).parent / "onnxruntime_abi/onnxruntime_c_api.h", root / "include")
        library = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
        for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
            (root / "lib" / name).symlink_to(library)
    options = [f"-DONNXRUNTIME_ROOT={root}", "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS=-Werror"]
    subprocess.run(["cmake", "-S", ROOT / "examples/cpp", "-B", folder / "build", *options], check=True, timeout=120)
    subprocess.run(["cmake", "--build", folder / "build"], check=True, timeout=120)
    return folder / "build"


@pytest.mark.parametrize("channels", [1, 3])
def test_cpp_makes_python_s_picture(cpp: Path, tmp_path: Path, channels: int) -> None:
    spec, model = tiny_generators.image_spec(channels), tiny_generators.image_model(channels)
    artifact = tiny_generators.make_artifact(tmp_path / "tiny", spec, model).path
    picture = tmp_path / "picture.ppm"
    subprocess.run([cpp / "generate", artifact / "generator.onnx", str(2**64 - 1), picture], check=True, timeout=60)
    made = expected(artifact, 2**64 - 1)
    np.testing.assert_array_equal(np.asarray(Image.open(picture)).reshape(made.shape), made)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("nothing.onnx", "7", "x.ppm"), "nothing.onnx"), (("tiny.onnx", "7", "/no/where.ppm"), "cannot be written")],
)
def test_cpp_says_what_is_wrong(cpp: Path, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    (tmp_path / "tiny.onnx").write_bytes(tiny_generators.image_model().SerializeToString())
    command = [cpp / "generate", *arguments]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_cpp_with_a_wrong_folder_of_onnx_runtime_says_what_is_missing(tmp_path: Path) -> None:
    command = ["cmake", "-S", ROOT / "examples/cpp", "-B", tmp_path / "build"]
    wrong = subprocess.run(
        [*command, f"-DONNXRUNTIME_ROOT={tmp_path}"], check=False, capture_output=True, text=True, timeout=120
    )
    assert wrong.returncode != 0
    assert "holds no onnxruntime_c_api.h" in " ".join(wrong.stderr.split())


def test_cpp_latents_are_python_s_bit_for_bit(cpp: Path) -> None:
    spec = GeneratorSpec((parse_input("z=normal[batch,3,1001]"),), (), (Dim("batch"),))
    for seed, index in [(0, 0), (7, 123), (2**40 + 3, 2**33 + 1), (2**64 - 1, 2**64 - 1)]:
        command = [cpp / "latents", str(seed), "z", str(index), "3003"]
        drawn = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
        assert drawn == latents(spec, seed, index)["z"].tobytes()
