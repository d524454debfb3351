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
    assert environment.energy_counters(0) == {}


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


def powercap(folder, used, limit=262_143_328_850):
    """A powercap tree as Linux shows it: packages, their parts, and the platform that holds them once more."""
    for number, microjoules in enumerate(used):
        for zone, name in ((f"intel-rapl:{number}", f"package-{number}"), (f"intel-rapl:{number}:0", "dram")):
            (folder / zone).mkdir(parents=True, exist_ok=True)
            (folder / zone / "name").write_text(f"{name}\n")
            (folder / zone / "energy_uj").write_text(f"{microjoules}\n")
            (folder / zone / "max_energy_range_uj").write_text(f"{limit}\n")
    (folder / "intel-rapl:9").mkdir(exist_ok=True)
    (folder / "intel-rapl:9" / "name").write_text("psys\n")
    (folder / "intel-rapl:9" / "energy_uj").write_text(f"{sum(used)}\n")


@pytest.mark.parametrize(
    ("used", "later", "seconds", "joules"),
    [
        ((1_000_000,), (3_500_000,), 1.0, 2.5),
        ((1_000_000, 7_000_000), (2_000_000, 9_000_000), 1.0, 3.0),
        ((262_143_000_000,), (671_150,), 1.0, 1.0),  # the counter began again: 328,850 to its end, then 671,150
        ((1_000_000,), (3_500_000,), 300.0, None),  # so long that it may have gone round unseen
    ],
)
def test_energy_of_packages_also_where_a_counter_began_again(tmp_path, monkeypatch, used, later, seconds, joules):
    monkeypatch.setattr(environment, "POWERCAP", tmp_path)
    powercap(tmp_path, used)
    before = environment.energy_counters()
    powercap(tmp_path, later)
    assert environment.energy_joules(before, environment.energy_counters(), seconds) == joules


def test_energy_that_is_not_counted_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "POWERCAP", tmp_path)
    assert environment.energy_joules({}, environment.energy_counters(), 1.0) is None
    powercap(tmp_path, (5_000_000,))
    before = environment.energy_counters()
    (tmp_path / "intel-rapl:0" / "max_energy_range_uj").unlink()
    endless = environment.energy_counters()
    assert endless == {"intel-rapl:0": (5_000_000, 0)}
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1")
    assert environment.energy_joules(endless, environment.energy_counters(), 1.0) is None
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("")
    assert environment.energy_joules(before, environment.energy_counters(), 1.0) is None


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "5000 100000\n"}, 1),
        ({"/proc/self/cgroup": "0::/a.slice/b\n", "/sys/fs/cgroup/a.slice/b/cpu.max": "300000 100000\n"}, 3),
        (
            {
                "/proc/self/cgroup": "0::/a.slice/b/c\n",
                "/sys/fs/cgroup/a.slice/b/c/cpu.max": "max 100000\n",
                "/sys/fs/cgroup/a.slice/b/cpu.max": "700000 100000\n",
                "/sys/fs/cgroup/a.slice/cpu.max": "200000 100000\n",
            },
            2,
        ),
        (
            {
                "/proc/self/cgroup": "5:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "/proc/self/cgroup": "5:cpu,cpuacct:/\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            64,
        ),
        ({}, 64),
    ],
)
def test_a_containers_limit_counts_as_cores(files, cores, monkeypatch):
    monkeypatch.setattr(environment, "_read", lambda path: files.get(path, ""))
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: set(range(64)))
    assert environment.usable_cores() == cores
    assert environment.quota_threads() == (None if cores == 64 else cores)
