"""ganexport generate, inspect and doctor as a user types them: results, exit codes, one clear line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

import ganexport
from ganexport.artifact import MANIFEST, ArtifactWriter, Manifest, Provenance
from ganexport.cli.main import run
from ganexport.parity import Certificate, TensorParity
from ganexport.runtime import _cuda, tensorrt
from ganexport.spec import TensorSpec

sys.path.insert(0, str(Path(__file__).parent.parent / "runtime"))
import tiny_generators as tiny


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "tiny"
    return tiny.make_artifact(path, tiny.image_spec(1, classes=10), tiny.image_model(1, classes=10))


@pytest.fixture
def table(tmp_path):
    """A generator of rows, no pictures."""
    spec = msgspec.structs.replace(
        tiny.image_spec(1), outputs=(TensorSpec("image", "float32", ("batch", 1, 4, 4), None, None, None),)
    )
    return tiny.make_artifact(tmp_path / "table", spec, tiny.image_model(1))


@pytest.fixture
def ganexport_command(capfd):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call


def one_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


# ---- generate ------------------------------------------------------------------------------------------


def test_a_grid(artifact, tmp_path, ganexport_command):
    code, out, err = ganexport_command("generate", artifact.path, "-n", 10, "--seed", 4, "-o", tmp_path / "grid.png")
    assert code == 0
    assert "10 pictures in" in out
    assert "running on onnxruntime" in err
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (24, 32)
    with ganexport.load(artifact.path) as generator:
        pictures = generator.generate(10, seed=4)
    assert np.array_equal(grid[8:16, 16:24], pictures[6, :, :, 0])
    assert not grid[16:, 16:].any()


def test_a_folder_and_json(artifact, tmp_path, ganexport_command):
    arguments = ("-n", 3, "--start", 7, "--labels", "1,2,3", "--json", "-o", tmp_path / "out")
    code, out, _ = ganexport_command("generate", artifact.path, *arguments)
    assert code == 0
    assert json.loads(out)["count"] == 3
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["000007.png", "000008.png", "000009.png"]
    with ganexport.load(artifact.path) as generator:
        pictures = generator.generate(3, start=7, labels=[1, 2, 3])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "000009.png")), pictures[2, :, :, 0])


def test_what_makes_no_pictures_is_told_how_to_get_samples(table, tmp_path, ganexport_command):
    code, _, err = ganexport_command("generate", table.path, "-o", tmp_path / "out")
    assert code == 2
    assert "ganexport generate --format npz" in one_line(err)
    code, _, err = ganexport_command("generate", table.path, "-o", tmp_path / "arrays.npz")
    assert code == 2
    assert "arrays are written as shards: --format npz -o FOLDER" in one_line(err)
    code, out, _ = ganexport_command("generate", table.path, "-n", 3, "--format", "npz", "-o", tmp_path / "out")
    assert code == 0
    assert "3 samples in" in out


def test_pictures_are_not_put_into_an_artifact(artifact, ganexport_command):
    before = sorted(path.name for path in artifact.path.iterdir())
    for more in ((), ("--format", "npz")):
        code, _, err = ganexport_command("generate", artifact.path, "-n", 3, "-o", artifact.path, *more)
        assert code != 0
        assert "is an artifact or a run" in one_line(err)
    assert sorted(path.name for path in artifact.path.iterdir()) == before


def test_seeds_truncation_backend_and_batch(artifact, tmp_path, ganexport_command):
    code, _, err = ganexport_command(
        *("generate", artifact.path, "--seeds", "5,6", "--class", 3, "--truncation", 0.5, "--batch-size", 1),
        *("--backend", "openvino", "--threads", 1, "-o", tmp_path / "out"),
    )
    assert code == 0
    assert "running on openvino" in err
    with ganexport.load(artifact.path, "openvino") as generator:
        picture = generator.generate(seeds=[6], labels=3, truncation=0.5)[0, :, :, 0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "seed-6.png")), picture)


def test_a_seed_may_come_twice_in_a_grid_and_start_counts_within_each(artifact, tmp_path, ganexport_command):
    options = ("--seeds", "5,5", "--labels", "1,2", "--start", 4, "-o", tmp_path / "grid.png")
    assert ganexport_command("generate", artifact.path, *options)[0] == 0
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    with ganexport.load(artifact.path) as generator:
        pictures = generator.generate(seeds=[5, 5], labels=[1, 2], start=4)
    assert np.array_equal(grid, np.hstack(list(pictures[..., 0])))


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_a_signal_says_how_many_are_whole(artifact, tmp_path, number, code, name):
    command = [sys.executable, "-m", "ganexport", "generate", artifact.path, "-n", "10000000", "--format", "npz"]
    command += ["--shard-size", "500", "--threads", "1", "-o", tmp_path / "out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "out" / "SHA256SUMS").exists():
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    whole = 500 * len((tmp_path / "out" / "SHA256SUMS").read_text().splitlines())
    said = f"stopped by {name}; {whole} of 10000000 pictures are whole; the same command continues"
    assert one_line(err) == f"error: {said}"


def test_shards_and_their_continuation(artifact, tmp_path, ganexport_command):
    arguments = ("generate", artifact.path, "-n", 30, "--format", "npz", "--shard-size", 10, "-o", tmp_path / "out")
    assert ganexport_command(*arguments)[0] == 0
    (tmp_path / "out" / "shard-000001.npz").unlink()
    assert ganexport_command(*arguments)[0] == 0
    assert len(list((tmp_path / "out").glob("*.npz"))) == 3
    code, _, err = ganexport_command(*arguments, "--seed", 1)
    assert code == 2
    assert "holds another job" in one_line(err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-n", "0"), "count is 0"),
        (("-n", "many"), "not a valid integer"),
        (("--seed", "-1"), "seed is -1"),
        (("--seed", 2**64), "allowed are 0 to 2^64 - 1"),
        (("--start", "-1"), "start is -1"),
        (("--class", "10"), "label is 10, allowed are 0 to 9"),
        (("--labels", "1,2"), "2 labels for 64 samples"),
        (("--labels", "cat"), "write whole numbers"),
        (("--truncation", "-1"), "truncation is -1"),
        (("--truncation", "nan"), "truncation is nan"),
        (("--batch-size", "100000"), "'batch' is 100000"),
        (("--size", "height=4"), "no dimension 'height'"),
        (("--backend", "onnx"), "unknown backend 'onnx'"),
        (("--backend", "torchscript"), "holds no file for torchscript"),
        (("--device", "tpu"), "write cpu, cuda or cuda:1"),
        (("--precision", "fp8"), "holds no fp8 file"),
        (("--threads", "0"), "must be a whole number from 1"),
        (("--threads", "100000"), "1024 is the most that is taken"),
        (("--shard-size", "5"), "--shard-size needs --format"),
        (("--format", "npz", "--seeds", "1,2"), "--seeds does not go with --format"),
        (("-n", "20000"), "too many: use --format"),
        (("--seeds", "1,2,1"), "--seeds names 1 twice"),
        (("--seeds", "1,2", "-n", "3"), "count 3 and 2 seeds"),
        (("--seeds", "1,2", "--seed", "0"), "--seed and --seeds: give one seed for all pictures"),
        (("--size", "height"), "write NAME=N"),
        (("--format", "npz", "--shard-size", "0"), "shard size is 0, it must be at least 1"),
        (("--format", "npz", "-n", 2**63), "are more than 1,000,000 shards: use a larger --shard-size"),
    ],
)
def test_what_is_out_of_range_is_one_line_and_exit_2(artifact, tmp_path, ganexport_command, arguments, message):
    code, _, err = ganexport_command("generate", artifact.path, *arguments, "-o", tmp_path / "out")
    assert code == 2
    assert message in one_line(err)
    assert not (tmp_path / "out").exists()


def test_outputs_that_cannot_be_written(artifact, tmp_path, ganexport_command):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.png").mkdir()
    for output, message in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "folder.png", "is a folder"),
        (tmp_path / "file" / "grid.png", "error: "),
        ("/proc/nowhere/grid.png", "error: "),
        ("/proc/nowhere", "error: "),
        (tmp_path / "grid.jpg", "a grid is written as NAME.png"),
        (tmp_path / ("x" * 250 + ".png"), "File name too long"),
        ("/dev/full/grid.png", "Not a directory"),
        ("", "is empty; name a file or a folder"),
    ):
        code, _, err = ganexport_command("generate", artifact.path, "-n", 1, "-o", output)
        assert code == 2
        assert message in one_line(err)
        assert "running on" not in err or output == "/proc/nowhere"


@pytest.mark.parametrize("kind", ["missing", "file", "folder", "text"])
def test_what_is_no_artifact(tmp_path, ganexport_command, kind):
    path = tmp_path / ("x.onnx" if kind == "text" else "x")
    if kind in ("file", "text"):
        path.write_text("hello")
    elif kind == "folder":
        path.mkdir()
    for command in (("generate", path, "-o", tmp_path / "o.png"), ("inspect", path)):
        code, _, err = ganexport_command(*command)
        assert code == 2
        assert str(path) in one_line(err)


def test_a_wrong_hash_and_a_future_schema(artifact, tmp_path, ganexport_command):
    changed = tmp_path / "changed"
    shutil.copytree(artifact.path, changed)
    with (changed / "generator.onnx").open("ab") as stream:
        stream.write(b"x")
    code, _, err = ganexport_command("generate", changed, "-o", tmp_path / "o.png")
    assert code == 2
    assert "changed or damaged" in one_line(err)
    assert "changed or damaged" in " ".join(ganexport_command("inspect", changed)[1].split())
    text = (changed / MANIFEST).read_text().replace('"schema_version": 1', '"schema_version": 9')
    (changed / MANIFEST).write_text(text)
    for command in (("generate", changed, "-o", tmp_path / "o.png"), ("inspect", changed)):
        code, _, err = ganexport_command(*command)
        assert code == 2
        assert "newer ganexport" in one_line(err)


def test_names_that_are_not_utf8_are_refused_before_any_work(artifact, tmp_path):
    for words in (["generate", artifact.path, "-n", "1", "--json", "-o"], ["bench", artifact.path, "-o"]):
        command = [sys.executable, "-m", "ganexport", *words, os.fsencode(tmp_path) + b"/\xff.json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert one_line(done.stderr).endswith(r"/\xff.json': is not UTF-8; rename the file or folder")
    assert not list(tmp_path.iterdir())


def test_a_full_disk(artifact, tmp_path):
    """On a real file system of 64 KiB, in a mount namespace of its own."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(place)], check=False).returncode:
        pytest.skip("this kernel allows no mounts in user namespaces")
    for output in ("out", "grid.png", "shards --format webdataset"):
        generate = f"{sys.executable} -m ganexport generate {artifact.path} -n 3000 -o {place}/{output}"
        script = f"mount -t tmpfs -o size=64k none {place} && {generate}; echo code $?; ls -A {place}"
        environment = os.environ | {"PYTHONPATH": str(Path(ganexport.__file__).parent.parent)}
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, env=environment, check=False
        )
        assert "the disk is full" in one_line(done.stderr)
        assert "code 2" in done.stdout
        assert ".grid.png" not in done.stdout


def test_rebuild_without_a_gpu_says_so(artifact, tmp_path, ganexport_command, monkeypatch):
    monkeypatch.setattr(_cuda, "unavailable", lambda: "no usable GPU: none")
    code, _, err = ganexport_command("generate", artifact.path, "--rebuild", "-o", tmp_path / "o.png")
    assert code == 2
    assert "--rebuild: an engine needs a GPU" in one_line(err)


def test_rebuild_makes_the_engine_again_where_the_preflight_refuses_it(tmp_path, ganexport_command, monkeypatch):
    model = tiny.save(tiny.image_model(spec=tiny.image_spec()), tmp_path / "net.onnx")
    folder = tmp_path / "a"
    assert ganexport_command("convert", model, "--to", "onnx", "--to", "trt", "-o", folder)[0] == 0
    built = {f["format"]: f for f in json.loads((folder / MANIFEST).read_text())["files"]}
    text = (folder / MANIFEST).read_text().replace(built["trt"]["requires"]["version"], "0.9.0.1")
    (folder / MANIFEST).write_text(text)
    # A GPU for the preflight; this machine may have none, and then ONNX Runtime makes the pictures.
    monkeypatch.setattr(_cuda, "unavailable", lambda: None)
    monkeypatch.setattr(tensorrt, "gpu_or_reason", lambda _index: _cuda.Gpu(0, "a GPU", "9.0"))
    code, _, err = ganexport_command("generate", folder, "--rebuild", "-n", 2, "-o", tmp_path / "o.png")
    assert code == 0, err
    assert "it was built by tensorrt_rtx 0.9.0.1, here is tensorrt_rtx" in " ".join(err.split())
    again = {f["format"]: f for f in json.loads((folder / MANIFEST).read_text())["files"]}
    assert again["trt"]["requires"] == built["trt"]["requires"]
    assert again["onnx"]["sha256"] == built["onnx"]["sha256"]
    assert (tmp_path / "o.png").is_file()


# ---- inspect --------------------------------------------------------------------------------------------


def test_inspect_an_artifact(tmp_path, ganexport_command):
    parity = TensorParity("image", 256, 1e-5, 1e-6, 120.0, 98.5, (3, 1), 2.0)
    certificate = Certificate("pass", "eager torch fp32", "onnxruntime 1.0 CPU", "fp32", (parity,), notes=("a remark",))
    with ArtifactWriter(tmp_path / "a") as writer:
        (writer.folder / "generator.onnx").write_bytes(tiny.image_model().SerializeToString())
        needs = {"onnxruntime": "1.20"}
        file = writer.describe("generator.onnx", "onnx", "fp32", certificate=certificate, requires=needs)
        source = Provenance("dcgan-mnist", "ab" * 32, step=2000, versions={"torch": "2.14.1"})
        writer.publish(Manifest(1, tiny.image_spec(), (file,), source))
    code, out, _ = ganexport_command("inspect", tmp_path / "a")
    assert code == 0
    for text in ("normal(0, 1)", "batch", "generator.onnx", "98.5 dB", "dcgan-mnist, step 2000", "abab", "a remark"):
        assert text in out
    code, out, _ = ganexport_command("inspect", tmp_path / "a", "--json")
    found = json.loads(out)
    assert found["files"][0]["state"] == "ok"
    assert found["files"][0]["certificate"]["verdict"] == "pass"
    assert found["spec"]["inputs"][0]["name"] == "z"


def test_inspect_a_lone_onnx(tmp_path, ganexport_command):
    path = tiny.save(tiny.image_model(spec=tiny.image_spec()), tmp_path / "x.onnx")
    code, out, _ = ganexport_command("inspect", path)
    assert code == 0
    assert "described by its metadata" in out
    bare = tiny.save(tiny.image_model(), tmp_path / "y.onnx")
    found = json.loads(ganexport_command("inspect", bare, "--json")[1])
    assert [found["kind"], found["spec_from"], found["bytes"]] == ["onnx", "graph", bare.stat().st_size]


def test_inspect_a_run(tmp_path, ganexport_command):
    (tmp_path / "checkpoints" / "000100").mkdir(parents=True)
    (tmp_path / "checkpoints" / "000200").mkdir()
    (tmp_path / "recipe.toml").write_text('name = "digits"\n[training]\nsteps = 300\n')
    (tmp_path / "metrics.jsonl").write_text('{"step": 100, "loss": 1.5}\n{"step": 200, "loss": 0.5}\n{"st')
    code, out, _ = ganexport_command("inspect", tmp_path)
    assert code == 0
    for text in ("digits in", "2 checkpoints, the last at step 000200", "steps=300", "loss 0.5"):
        assert text in out
    found = json.loads(ganexport_command("inspect", tmp_path, "--json")[1])
    assert found["metrics"] == {"step": 200, "loss": 0.5}
    (tmp_path / "recipe.toml").write_text("[")
    code, _, err = ganexport_command("inspect", tmp_path)
    assert code == 2
    assert "recipe.toml: cannot be read" in one_line(err)


# ---- doctor ---------------------------------------------------------------------------------------------


def test_doctor(ganexport_command):
    code, out, _ = ganexport_command("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    backends = {row["name"]: row for row in found["backends"]}
    assert set(backends) == {"onnxruntime", "openvino", "tensorrt", "torchscript", "aoti"}
    assert backends["onnxruntime"]["available"]
    assert backends["onnxruntime"]["devices"][0] == "cpu"
    for row in [*found["backends"], *found["kernels"].values()]:
        assert row["available"] or row["reason"]
    assert found["devices"][0]["usable"]
    assert found["versions"]["onnxruntime"]
    code, out, _ = ganexport_command("doctor")
    assert code == 0
    for name in (*backends, "gradient_penalty", "cpu"):
        assert name in out


def test_doctor_says_no_when_nothing_works(ganexport_command, monkeypatch):
    from ganexport.runtime import BACKENDS

    for name in BACKENDS:
        monkeypatch.setattr(
            BACKENDS.load(name).RUNNER, "unavailable", classmethod(lambda cls: f"{cls.backend} is gone")
        )
    code, out, _ = ganexport_command("doctor", "--json")
    assert code == 1
    assert all(row["reason"].endswith("is gone") and row["devices"] == [] for row in json.loads(out)["backends"])


def test_help_has_an_example(ganexport_command):
    for name in ("generate", "inspect", "doctor"):
        code, out, _ = ganexport_command(name, "--help")
        assert code == 0
        assert f"ganexport {name} " in out
        assert "Example" in out


def test_generate_from_a_run_and_what_needs_an_artifact(tmp_path, ganexport_command):
    sets = ["training.steps=2", "architecture.width=4", "logging.tensorboard=false", "training.device=cpu"]
    words = [word for setting in sets for word in ("--set", setting)]
    assert ganexport_command("train", "dcgan-mnist", *words, "--out", tmp_path / "run")[0] == 0
    code, _, err = ganexport_command("generate", tmp_path / "run", "-n", 4, "-o", tmp_path / "grid.png")
    assert code == 0, err
    assert "running on torch" in err
    assert np.asarray(Image.open(tmp_path / "grid.png")).shape == (56, 56)
    for options in (["--format", "npz"], ["--threads", 2], ["--precision", "fp16"]):
        code, _, err = ganexport_command("generate", tmp_path / "run", *options, "-n", 4, "-o", tmp_path / "shards")
        assert code == 2
        assert f"{options[0]}: {tmp_path / 'run'} is a run, not an artifact" in one_line(err)
    code, _, err = ganexport_command("generate", "sngan-resnet-cifar10", "-n", 4, "-o", tmp_path / "x.png")
    assert code == 2
    assert "recipe without weights" in one_line(err)


@pytest.mark.parametrize(("kind", "spins"), [(None, True), ("npz", False)])
def test_for_shards_the_engine_s_threads_sleep_while_they_wait(artifact, kind, spins):
    from ganexport.cli.generate import _open

    options = {"threads": 2, "backend": None, "device": None, "precision": None, "kind": kind}
    with _open(artifact.path, options) as generator:
        assert generator.backend == "onnxruntime"
        chosen = generator.runner._session.get_session_options()
        assert chosen.intra_op_num_threads == 2
        if spins:
            with pytest.raises(RuntimeError):
                chosen.get_session_config_entry("session.intra_op.allow_spinning")  # as ONNX Runtime has it
        else:
            assert chosen.get_session_config_entry("session.intra_op.allow_spinning") == "0"
