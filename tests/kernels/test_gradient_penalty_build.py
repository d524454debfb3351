"""The CUDA library as CMake builds it for every architecture: warnings, registers, machine code, interface.

Needs nvcc and no GPU; one build serves all tests here.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from ganexport.kernels._launch import InterpolateArguments, PenaltyArguments

ROOT = Path(__file__).parents[2]
ARCHITECTURES = {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90"}
KERNELS = ("gradient_penalty_resident", "gradient_penalty_split", "gradient_penalty_backward", "interpolate")
NARROW = {"f": "4", "6__half": "2", "13__nv_bfloat16": "2"}

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler on this machine")


def cmake(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["cmake", *arguments], capture_output=True, text=True, env=os.environ | environment, timeout=500, check=False
    )


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> tuple[Path, str]:
    """The library for all architectures, and what the compiler said."""
    build = tmp_path_factory.mktemp("kernels")
    configured = cmake(
        "-S",
        str(ROOT),
        "-B",
        str(build),
        "-DGANEXPORT_KERNELS=ON",
        "-DGANEXPORT_WARNINGS_AS_ERRORS=ON",
        "-DCMAKE_CUDA_ARCHITECTURES=all",
        "-DCMAKE_CUDA_FLAGS=-Xptxas=-v",
    )
    assert configured.returncode == 0, configured.stdout + configured.stderr
    done = cmake("--build", str(build))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in build.rglob("*.so")] == ["libganexport_kernels.so"]
    return build / "libganexport_kernels.so", done.stdout + done.stderr


@pytest.fixture(scope="session")
def resources(built) -> dict[tuple[str, str], dict[str, int]]:
    """(kernel, architecture) → registers, stack and spilled bytes, from ptxas."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    names = ("stack", "spill_stores", "spill_loads", "registers")
    return {(m[1], m[2]): dict(zip(names, map(int, m.groups()[2:]), strict=True)) for m in pattern.finditer(built[1])}


@needs_nvcc
def test_every_kernel_exists_for_every_architecture(resources):
    architectures = {architecture for _, architecture in resources}
    assert architectures >= ARCHITECTURES
    kernels = {kernel for kernel, _ in resources}
    assert len(kernels) == 3 * 2 * 5  # dtypes · word sizes · (two of resident, the other three)
    assert all(any(name in kernel for kernel in kernels) for name in KERNELS)
    assert len(resources) == len(kernels) * len(architectures)


@needs_nvcc
def test_nothing_spills_and_blocks_share_a_multiprocessor(resources):
    for key, used in resources.items():
        assert (used["stack"], used["spill_stores"], used["spill_loads"]) == (0, 0, 0), key
        # Of 65536 registers: 2 blocks of 512 threads, 3 of 256 where a block holds several samples.
        assert used["registers"] <= (80 if "resident" in key[0] and "Lb1E" in key[0] else 64), key


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found:
        return found
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    assert bundled.exists(), "neither the CUDA toolkit nor triton brings cuobjdump"
    return str(bundled)


@pytest.fixture(scope="session")
def instructions(built) -> dict[tuple[str, str], list[str]]:
    """(kernel, architecture) → its instructions' names, in order."""
    listing = subprocess.run([cuobjdump(), "-sass", str(built[0])], capture_output=True, text=True, check=True).stdout
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    architecture = kernel = ""
    for line in listing.splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\w+)", line):
            kernel = match[1]
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]+)", line):
            found[kernel, architecture].append(match[1])
    return found


def select(instructions, part: str, word: str = "Li16E") -> dict[tuple[str, str], list[str]]:
    chosen = {key: code for key, code in instructions.items() if part in key[0] and word in key[0]}
    assert len({kernel for kernel, _ in chosen}) >= 3
    return chosen


@needs_nvcc
def test_no_local_memory_and_no_float_atomics(instructions):
    assert {architecture for _, architecture in instructions} >= ARCHITECTURES
    for key, code in instructions.items():
        assert not [name for name in code if name.startswith(("LDL", "STL"))], key
        assert not [name for name in code if re.match(r"(ATOM|RED).*\.F", name)], key


@needs_nvcc
@pytest.mark.parametrize(
    ("kernel", "loads", "stores"),
    [("resident", 8, 8), ("split", 16, 8), ("gradient_penalty_backward", 1, 1), ("interpolate", 8, 4)],
)
def test_images_move_in_words_of_16_bytes(instructions, kernel, loads, stores):
    for key, code in select(instructions, kernel).items():
        assert len([name for name in code if name.startswith("LDG") and ".128" in name]) >= loads, key
        assert len([name for name in code if name.startswith("STG") and ".128" in name]) >= stores, key


@needs_nvcc
def test_all_loads_are_under_way_before_the_first_is_used(instructions):
    for key, code in select(instructions, "resident").items():
        loads = [i for i, name in enumerate(code) if name.startswith("LDG") and ".128" in name]
        first_use = next(i for i, name in enumerate(code) if name.startswith(("FFMA", "FMUL", "HADD2.F32")))
        assert len(loads) == 8, key
        assert loads[-1] < first_use, key


@needs_nvcc
def test_clusters_only_where_they_exist(instructions):
    for (kernel, architecture), code in select(instructions, "resident").items():
        barriers = [name for name in code if "CGABAR" in name]
        spans_blocks = kernel.endswith("Lb0EEEvNS_17PenaltyParametersE")
        assert bool(barriers) == (spans_blocks and int(architecture[3:]) >= 90), (kernel, architecture)


@needs_nvcc
def test_the_library_needs_neither_torch_nor_a_cuda_runtime(built):
    needed = subprocess.run(["ldd", str(built[0])], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"libtorch|libc10|libcudart|libcuda\b|python", needed)
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(built[0])], capture_output=True, text=True, check=True
    ).stdout.split()[2::3]
    assert symbols
    assert all(symbol.startswith("ganexport_") for symbol in symbols)


@needs_nvcc
def test_the_interface_is_the_one_python_expects(built):
    library = ctypes.CDLL(str(built[0]))
    for name, structure in (("gradient_penalty", PenaltyArguments), ("interpolate", InterpolateArguments)):
        size = getattr(library, f"ganexport_{name}_arguments_size")
        size.restype = ctypes.c_size_t
        assert size() == ctypes.sizeof(structure)


@needs_nvcc
def test_without_a_gpu_the_library_loads_and_gives_an_error_code(built):
    import torch

    library = ctypes.CDLL(str(built[0]))
    code = library.ganexport_kernels_check_device(0)
    assert (code == 0) == torch.cuda.is_available()
    arguments = PenaltyArguments(dtype=0, device=0, samples=1, elements=4)
    size = ctypes.c_int64()
    if code:
        assert library.ganexport_gradient_penalty_workspace(ctypes.byref(arguments), ctypes.byref(size)) != 0
        assert library.ganexport_gradient_penalty(ctypes.byref(arguments), None) != 0


@needs_nvcc
def test_status_names_file_and_architectures(built):
    code = (
        "import json, sys; import ganexport.kernels as k; s = k.status(); assert 'torch' not in sys.modules; "
        "print(json.dumps([s.available, str(s.path), s.reason, s.architectures]))"
    )
    environment = os.environ | {"GANEXPORT_KERNELS_LIBRARY": str(built[0])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    available, path, reason, architectures = json.loads(done.stdout)
    assert (available, path, reason) == (True, str(built[0]), "")
    assert {"75-real", "90-real"} <= set(architectures)
    assert architectures[-1].endswith("-virtual")


def without_nvcc(tmp_path: Path) -> dict[str, str]:
    """A PATH that holds every program needed but nvcc."""
    for name in ("cmake", "make", "ninja", "gcc", "g++", "cc", "c++", "sh", "uname"):
        if found := shutil.which(name):
            (tmp_path / name).symlink_to(found)
    return {"PATH": str(tmp_path), "CUDACXX": "", "CUDA_PATH": "", "CUDA_HOME": ""}


def test_without_nvcc_nothing_is_built_and_one_line_says_so(tmp_path):
    path = tmp_path / "bin"
    path.mkdir()
    done = cmake("-S", str(ROOT), "-B", str(tmp_path / "build"), **without_nvcc(path))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "ganexport:" in line]
    assert len(lines) == 1
    assert "no working nvcc" in lines[0]


def test_kernels_can_be_refused_and_demanded(tmp_path):
    refused = cmake("-S", str(ROOT), "-B", str(tmp_path / "off"), "-DGANEXPORT_KERNELS=OFF")
    assert refused.returncode == 0
    assert "GANEXPORT_KERNELS=OFF" in refused.stdout
    path = tmp_path / "bin"
    path.mkdir()
    demanded = cmake("-S", str(ROOT), "-B", str(tmp_path / "on"), "-DGANEXPORT_KERNELS=ON", **without_nvcc(path))
    assert demanded.returncode != 0
