"""Finding the kernels' library: a missing, corrupt, foreign or outdated file gives a reason, never an exception."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ganexport.kernels import _library

CODE = "import json; from ganexport.kernels import status; s = status(); print(json.dumps([s.available, s.reason]))"


def status_with(library: Path) -> tuple[bool, str]:
    environment = os.environ | {"GANEXPORT_KERNELS_LIBRARY": str(library)}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    available, reason = json.loads(done.stdout)
    assert "\n" not in reason
    return available, reason


def compiled(folder: Path, source: str) -> Path:
    (folder / "library.c").write_text(source)
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler
    target = folder / "library.so"
    subprocess.run([compiler, "-shared", "-fPIC", str(folder / "library.c"), "-o", str(target)], check=True)
    return target


def test_a_named_file_that_does_not_exist(tmp_path):
    available, reason = status_with(tmp_path / "nothing.so")
    assert not available
    assert "GANEXPORT_KERNELS_LIBRARY names" in reason
    assert "does not exist" in reason


def test_a_corrupt_file(tmp_path):
    (tmp_path / "corrupt.so").write_bytes(b"\x7fELF but not really")
    available, reason = status_with(tmp_path / "corrupt.so")
    assert not available
    assert "cannot be loaded" in reason


def test_another_library(tmp_path):
    available, reason = status_with(compiled(tmp_path, "int something(void) { return 1; }"))
    assert not available
    assert "ganexport_kernels_abi_version" in reason


def test_an_outdated_library(tmp_path):
    source = (
        "int ganexport_kernels_abi_version(void) { return 0; } "
        'const char* ganexport_kernels_architectures(void) { return "90"; }'
    )
    available, reason = status_with(compiled(tmp_path, source))
    assert not available
    assert f"ABI version 0, this ganexport needs {_library.ABI_VERSION}: build it again" in reason


def test_a_matching_library(tmp_path):
    source = (
        f"int ganexport_kernels_abi_version(void) {{ return {_library.ABI_VERSION}; }} "
        'const char* ganexport_kernels_architectures(void) { return "75-real,90-virtual"; }'
    )
    assert status_with(compiled(tmp_path, source)) == (True, "")


def test_where_it_looks(monkeypatch):
    monkeypatch.delenv(_library.PATH_VARIABLE, raising=False)
    places = _library.candidates()
    assert places[0] == Path(_library.__file__).parent / _library.FILE_NAME
    assert places[-1].parent.name == "build"
    monkeypatch.setenv(_library.PATH_VARIABLE, "/somewhere/else.so")
    assert _library.candidates() == [Path("/somewhere/else.so")]


@pytest.mark.parametrize("module", ["ganexport.kernels", "ganexport.kernels._library"])
def test_no_torch_is_needed_to_ask(module):
    code = f"import sys; sys.modules['torch'] = None; import {module} as m; m.status()"
    subprocess.run([sys.executable, "-c", code], check=True)
