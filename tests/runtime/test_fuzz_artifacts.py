"""Damaged manifests, ONNX files and engine preflights: a clear error or a correct load; never a crash, hang or code.

Each case runs in a forked child of this process, a hundred at a time: a child that dies or stands still is the
failure, and the case that did it is kept beside the report.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_generators as tiny

import ganexport
from ganexport.artifact import MANIFEST, Artifact, sha256_file
from ganexport.errors import GanExportError
from ganexport.runtime import _cuda
from ganexport.runtime.tensorrt import preflight

#: Cases of each kind by default, and in the slow test.
FEW, MANY = 200, 10_000
#: Cases a child, seconds it may take, and address space beyond what it has.
BATCH, SECONDS, MEMORY = 100, 120, 4 << 30


def damaged(good: bytes, random: np.random.Generator) -> bytes:
    """A few of: bytes flipped, cut, repeated, replaced by others of the file, long numbers."""
    data = bytearray(good)
    for _ in range(int(random.integers(1, 5))):
        if not data:
            break
        where, action = int(random.integers(len(data))), int(random.integers(6))
        if action == 0:
            data[where] ^= 1 << int(random.integers(8))
        elif action == 1:
            del data[where : where + int(random.integers(1, 32))]
        elif action == 2:
            data[where:where] = data[: int(random.integers(64))]
        elif action == 3:
            other = int(random.integers(len(data)))
            data[where : where + 8] = data[other : other + 8]
        elif action == 4:
            data[where : where + 4] = b"\xff\xff\xff\x7f"
        else:
            data[where] = int(random.integers(256))
    return bytes(data)


HOSTILE = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 0.5, 1e308, "", "..", "../../etc/passwd", "/", "\0", "é" * 500,
    [], {}, [[]], "normal", "batch", "__import__('os')", "${x}", "%s%n",
]  # fmt: skip


def mutated(value, random: np.random.Generator):
    """A JSON value with one place changed: another type, a hostile value, a key gone, doubled or renamed."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = list(value)[int(random.integers(len(value)))]
        action = random.random()
        changed = dict(value)
        if action < 0.08:
            del changed[key]
        elif action < 0.14:
            changed[f"{key}x"] = changed.pop(key)
        else:
            changed[key] = mutated(value[key], random)
        return changed
    if isinstance(value, list) and value and random.random() < 0.85:
        index = int(random.integers(len(value)))
        if random.random() < 0.15:
            return value + value if random.random() < 0.5 else value[:index]
        return [mutated(v, random) if i == index else v for i, v in enumerate(value)]
    return HOSTILE[int(random.integers(len(HOSTILE)))]


def forked(cases, check, folder):
    """Run ``check(case)`` for every case in forked children; outcomes counted.

    Raises:
        AssertionError: A child died, stood still, or let something other than a clear error through.
    """
    counts: Counter[str] = Counter()
    context = multiprocessing.get_context("fork")
    for begin in range(0, len(cases), BATCH):
        part = cases[begin : begin + BATCH]
        here, there = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(part, check, there))
        child.start()
        there.close()
        for number in range(len(part)):
            try:
                told = here.recv() if here.poll(SECONDS) else "hang"
            except EOFError:
                told = "crash"
            if told in ("hang", "crash") or told.startswith("leak"):
                child.kill()
                child.join()
                kept = folder / f"case-{begin + number}"
                kept.write_bytes(part[number] if isinstance(part[number], bytes) else repr(part[number]).encode())
                raise AssertionError(f"{told} (exit {child.exitcode}) at case {begin + number}, kept in {kept}")
            counts[told] += 1
        child.join(SECONDS)
        assert child.exitcode == 0
    return counts


def _child(part, check, pipe):
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.addaudithook(_refuse_code)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for case in part:
        try:
            told = check(case)
        except GanExportError as error:
            told = "refused" if "\n" not in str(error) and str(error) else f"leak: {error!r}"
        except BaseException as error:
            told = f"leak: {type(error).__name__}: {error}"
        pipe.send(told)
    pipe.close()


def _refuse_code(event, arguments):
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class"):
        raise RuntimeError(f"something ran code: {event} {arguments}")


COUNTS = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return tiny.make_artifact(tmp_path_factory.mktemp("fuzz") / "a").path


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_manifests(count, artifact, tmp_path):
    good = (artifact / MANIFEST).read_bytes()
    value = json.loads(good)
    random = np.random.default_rng(count)
    cases = [damaged(good, random) if i % 4 == 0 else json.dumps(mutated(value, random)).encode() for i in range(count)]
    folder = tmp_path / "a"
    shutil.copytree(artifact, folder)

    def check(text):
        (folder / MANIFEST).write_bytes(text)
        opened = Artifact(folder)
        with ganexport.load(folder, settings={"threads": 1}) as generator:
            told = "loaded"
            if generator.spec == spec_good and opened.manifest.files[0].path == "generator.onnx":
                assert np.array_equal(generator.generate(1), truth), "another picture"
                told = "loaded the same"
        return told

    spec_good = Artifact(artifact).spec
    with ganexport.load(artifact, settings={"threads": 1}) as generator:
        truth = generator.generate(1)
    counts = forked(cases, check, tmp_path)
    sys.stdout.write(f"manifests: {dict(counts)}\n")
    assert counts["refused"] > count // 3
    assert sum(counts.values()) == count


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_onnx_files_behind_their_hash_and_past_it(count, artifact, tmp_path):
    """Half of the files keep the old hash (all refused); for the others the manifest was forged to match."""
    good = (artifact / "generator.onnx").read_bytes()
    value = json.loads((artifact / MANIFEST).read_bytes())
    random = np.random.default_rng(count + 1)
    cases = [(damaged(good, random), bool(i % 2)) for i in range(count)]
    folder = tmp_path / "a"
    shutil.copytree(artifact, folder)

    def check(case):
        data, forge = case
        (folder / "generator.onnx").write_bytes(data)
        manifest = json.loads(json.dumps(value))
        if forge:
            entry = manifest["files"][0]
            entry["sha256"], entry["bytes"] = sha256_file(folder / "generator.onnx"), len(data)
        (folder / MANIFEST).write_text(json.dumps(manifest))
        if not forge and data != good:
            with pytest.raises(GanExportError):
                ganexport.load(folder, settings={"threads": 1})
            return "stopped by the hash"
        with ganexport.load(folder, settings={"threads": 1}) as generator:
            generator.sample(1)
        return "past the hash: ran"

    counts = forked(cases, check, tmp_path)
    sys.stdout.write(f"ONNX files: {dict(counts)}\n")
    assert counts["stopped by the hash"] >= count // 2 - count // 20
    assert counts["past the hash: ran"] > 0
    assert counts["refused"] > 0


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_engine_preflights(count, tmp_path):
    needs = {
        "flavour": "tensorrt_rtx", "version": "1.7.1.116", "platform": _machine(), "compute_capability": "8.9,12.0+",
    }  # fmt: skip
    random = np.random.default_rng(count + 2)
    gpu = _cuda.Gpu(0, "a card", "8.9")
    cases = []
    for _ in range(count):
        changed = dict(needs)
        for key in list(changed):
            if random.random() < 0.4:
                text = damaged(changed[key].encode(), random).decode("utf-8", "replace")
                changed[key] = text if random.random() < 0.7 else str(HOSTILE[int(random.integers(len(HOSTILE)))])
        cases.append(changed)

    def check(requires):
        flavour = preflight(tmp_path / "generator.engine", requires, gpu, {"tensorrt_rtx": "1.7.1.116"})
        assert flavour == "tensorrt_rtx"
        assert requires["flavour"].strip() in ("", "tensorrt_rtx")
        assert requires["platform"].strip() == _machine()
        return "fits"

    counts = forked(cases, check, tmp_path)
    sys.stdout.write(f"preflights: {dict(counts)}\n")
    assert counts["refused"] > count // 3
    assert counts["fits"] > 0


def _machine():
    import platform

    return f"{platform.system()}-{platform.machine()}".lower()


def test_a_crash_would_be_noticed(tmp_path):
    with pytest.raises(AssertionError, match=r"crash \(exit -9\) at case 1"):
        forked([b"a", b"b"], lambda case: os.kill(os.getpid(), 9) if case == b"b" else "fine", tmp_path)
    assert (tmp_path / "case-1").read_bytes() == b"b"
    with pytest.raises(AssertionError, match="leak: ZeroDivisionError"):
        forked([1], lambda _: 1 // 0, tmp_path)
    with pytest.raises(AssertionError, match="leak: RuntimeError: something ran code"):
        forked([1], lambda _: os.system("true"), tmp_path)
