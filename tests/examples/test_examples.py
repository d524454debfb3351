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


def test_cpp_latents_are_python_s_bit_for_bit(tmp_path: Path) -> None:
    assert shutil.which("cmake"), "the example in C++ needs CMake and a compiler"
    source = ROOT / "examples/cpp"
    subprocess.run(["cmake", "-S", source, "-B", tmp_path, "-DCMAKE_BUILD_TYPE=Release"], check=True, timeout=120)
    subprocess.run(["cmake", "--build", tmp_path], check=True, timeout=120)
    spec = GeneratorSpec((parse_input("z=normal[batch,3,1001]"),), (), (Dim("batch"),))
    for seed, index in [(0, 0), (7, 123), (2**40 + 3, 2**33 + 1), (2**64 - 1, 2**64 - 1)]:
        command = [tmp_path / "latents", str(seed), "z", str(index), "3003"]
        drawn = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
        assert drawn == latents(spec, seed, index)["z"].tobytes()
