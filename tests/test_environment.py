"""The description of a machine: complete, anonymous, light."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ganexport import environment


def test_it_is_json_and_names_what_a_reader_needs():
    found = json.loads(json.dumps(environment.describe()))
    assert found["cpu"]["logical"] == os.cpu_count()
    assert found["python"] == platform.python_version()
    assert found["memory_bytes"] is None or found["memory_bytes"] > 1 << 28
    assert set(environment.LIBRARIES) < set(found["libraries"])
    assert found["libraries"]["numpy"]


def test_it_identifies_no_one():
    text = json.dumps(environment.describe())
    assert platform.node() not in text or len(platform.node()) < 4
    assert str(Path.home()) not in text
    assert f'"{getpass.getuser()}"' not in text


def test_it_imports_nothing_heavy():
    heavy = ("torch", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx")
    code = f"import sys, ganexport.environment as e; e.describe(); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_a_driver_everything_about_gpus_is_empty(monkeypatch):
    monkeypatch.setattr(environment, "_nvml", lambda: None)
    monkeypatch.setattr(environment.shutil, "which", lambda _: None)
    assert environment.gpus() == []
    assert environment.gpu_state() == {}
    assert environment.energy_joules(0) is None


def test_nvidia_smi_is_read_where_the_library_cannot_be_loaded(monkeypatch, tmp_path):
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.1, 9.0, 143771, 1980, 31'\n")
    command.chmod(0o755)
    monkeypatch.setattr(environment, "_nvml", lambda: None)
    monkeypatch.setattr(environment.shutil, "which", lambda _: str(command))
    (gpu,) = environment.gpus()
    assert gpu["name"] == "NVIDIA H200"
    assert gpu["compute_capability"] == "9.0"
    assert gpu["memory_bytes"] == 143771 << 20


def test_device_key_is_a_folder_name():
    assert environment.device_key({"gpus": [{"name": "NVIDIA H200"}]}) == "nvidia-h200"
    cpu = {"model": "AMD EPYC", "affinity": 2}
    assert environment.device_key({"gpus": [], "cpu": cpu}) == "amd-epyc-2-cores"


@pytest.mark.parametrize(
    ("machine", "flags", "overflows"),
    [
        ("x86_64", "fpu avx2 fma", True),
        ("AMD64", "avx2 avx512f", True),
        ("x86_64", "avx2 avx_vnni", False),
        ("x86_64", "avx2 avx512f avx512_vnni", False),
        ("aarch64", "asimd", False),
        ("x86_64", None, None),
    ],
)
def test_processors_whose_int8_products_overflow_are_known(machine, flags, overflows, monkeypatch):
    text = f"model name : Some CPU\nflags : {flags}\n" if flags else ""
    monkeypatch.setattr(environment, "_read", lambda path: text if path == "/proc/cpuinfo" else "")
    monkeypatch.setattr(environment.platform, "machine", lambda: machine)
    assert environment.int8_overflows.__wrapped__() is overflows


def test_device_key_tells_generations_of_one_name_apart():
    keys = []
    for features in (["avx2"], ["avx2", "avx512f", "avx512_bf16", "avx512_vnni"], ["unheard_of"]):
        cpu = {"model": "AMD EPYC", "affinity": 2, "features": features}
        keys.append(environment.device_key({"gpus": [], "cpu": cpu}))
    assert keys == ["amd-epyc-avx2-2-cores", "amd-epyc-avx512-bf16-2-cores", "amd-epyc-2-cores"]
