"""What the command line tells TensorRT's builder reaches it, or is refused; its errors name the user's line."""

from __future__ import annotations

import json

import pytest

from ganexport.build import tensorrt
from ganexport.build.options import BuildOptions
from ganexport.cli.convert import command
from ganexport.errors import ExportError, GanExportError, UsageError

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

DESCRIBED = ["--input", "z=normal[batch,8]", "--batch", "1:6:9", "--verify-budget", "2"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An artifact with the ONNX file of a module with one convolution, for engines to be built from."""
    from ganexport.export.convert import convert

    folder = tmp_path_factory.mktemp("options") / "a"
    convert("generators.trt_traps:Plain", to="onnx", output=folder, inputs=["z=normal[batch,8]"], batch="1:6:9",
            verify_budget=2.0)  # fmt: skip
    return folder


def run(*words):
    """The command line in this process; the refusal where there is one."""
    try:
        command.main([str(word) for word in words], standalone_mode=False)
    except GanExportError as error:
        return error
    return None


def build(exported, tmp_path, *words):
    return run(exported, "--to", "trt", "-o", tmp_path / "out", "--verify-budget", "2", "--json", *words)


@pytest.fixture
def configured(monkeypatch):
    """The builder's configuration as the real builder got it."""
    seen = []
    original = tensorrt._configure

    def watch(library, flavour, config, options):
        original(library, flavour, config, options)
        seen.append(config)

    monkeypatch.setattr(tensorrt, "_configure", watch)
    return seen


def test_level_and_workspace_reach_the_builder(exported, tmp_path, configured):
    result = build(exported, tmp_path, "--builder-level", 2, "--workspace", 64)
    assert result is None, result
    assert configured[0].builder_optimization_level == 2
    assert configured[0].get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 64 << 20


def test_too_small_a_workspace_says_to_raise_it(exported, tmp_path):
    model, spec = exported / "generator.onnx", _spec(exported)
    with pytest.raises(ExportError, match=r"raise --workspace \(it is 0 MiB\)"):
        tensorrt.build(model, spec, tmp_path, "fp32", BuildOptions(workspace_mb=0))


def test_target_gpus_are_recorded_and_change_the_engine(exported, tmp_path, configured):
    digests = {}
    for name, words in {"all": [], "one": ["8.6"], "two": ["8.9", "12.0"]}.items():
        given = [word for capability in words for word in ("--compute-capability", capability)]
        result = run(exported, "--to", "trt", "-o", tmp_path / name, "--verify-budget", "2", "--json", *given)
        assert result is None, result
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        engine = next(f for f in manifest["files"] if f["format"] == "trt")
        assert engine["requires"].get("compute_capability", "") == ",".join(words)
        digests[name] = engine["sha256"]
    assert [config.num_compute_capabilities for config in configured][1:] == [1, 2]
    assert digests["one"] != digests["two"]


def test_an_unknown_gpu_is_refused_with_the_known_ones(exported, tmp_path):
    refusal = build(exported, tmp_path, "--compute-capability", "6.1")
    assert isinstance(refusal, UsageError)
    assert "7.5, 8.0, 8.6, 8.9, 12.0, 12.1" in str(refusal)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--version-compatible"], "no lean runtime"),
        (["--hardware-compatible"], "every GPU generation"),
        (["--timing-cache", "cache.bin"], "no-op"),
    ],
)
def test_what_this_flavour_would_ignore_is_refused(exported, tmp_path, words, why):
    refusal = build(exported, tmp_path, *words)
    assert isinstance(refusal, UsageError)
    assert str(refusal).startswith(words[0])
    assert why in str(refusal)
    assert not (tmp_path / "out").exists()


class _Config:
    """Records what plain TensorRT's configuration is told; its builder needs a GPU."""

    def __init__(self):
        self.flags, self.pools, self.cache, self.told = [], {}, None, []

    def set_flag(self, flag):
        self.flags.append(flag)

    def clear_flag(self, flag):
        self.flags = [f for f in self.flags if f != flag]

    def set_memory_pool_limit(self, pool, size):
        self.pools[pool] = size

    def create_timing_cache(self, content):
        self.told.append(content)
        return None if content == b"of another version" else content

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache

    def get_timing_cache(self):
        return type("Cache", (), {"serialize": staticmethod(lambda: b"measured")})


def test_plain_tensorrt_gets_every_option():
    config = _Config()
    options = BuildOptions(builder_level=5, workspace_mb=3, version_compatible=True, hardware_compatible=True)
    tensorrt._configure(trt, "tensorrt", config, options)
    assert config.builder_optimization_level == 5
    assert config.pools == {trt.MemoryPoolType.WORKSPACE: 3 << 20}
    assert config.flags == [trt.BuilderFlag.VERSION_COMPATIBLE]
    assert config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS
    with pytest.raises(UsageError, match="TensorRT-RTX only"):
        tensorrt._configure(trt, "tensorrt", config, BuildOptions(compute_capabilities=("8.9",)))


@pytest.mark.parametrize("before", [None, b"measured before", b"of another version"])
def test_the_timing_cache_is_read_and_written(tmp_path, before):
    path, config = tmp_path / "cache", _Config()
    if before is not None:
        path.write_bytes(before)
    with tensorrt._timing_cache(config, path):
        assert config.cache == (before if before == b"measured before" else b"")
    assert path.read_bytes() == b"measured"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Determinant", ["Det", "trt_traps.py", "an operator that this TensorRT does not have"]),
        ("Bits", ["trt_traps.py", "Failed to import initializer"]),
    ],
)
def test_what_the_parser_refuses_is_told_with_the_users_line(name, words, tmp_path):
    refusal = run(f"generators.trt_traps:{name}", "--to", "trt", "-o", tmp_path / "out", *DESCRIBED)
    assert isinstance(refusal, ExportError)
    for word in words:
        assert word in str(refusal)
    assert f"trt_traps.py:{_line(name)}" in str(refusal)
    assert not (tmp_path / "out").exists()


def test_an_operator_without_an_onnx_form_is_told_with_the_users_line(tmp_path):
    refusal = run("generators.trt_traps:Unknown", "--to", "onnx", "-o", tmp_path / "out", *DESCRIBED)
    assert isinstance(refusal, ExportError)
    assert str(refusal).startswith(f"trt_traps.py:{_line('Unknown')}: prims.erf_inv has no ONNX form")


def _line(name):
    """Of the call that the class's comment marks."""
    from pathlib import Path

    import generators

    lines = (Path(generators.__file__).parent / "trt_traps.py").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"class {name}("))
    return next(i + 1 for i in range(start, len(lines)) if "# here" in lines[i])


def _spec(folder):
    from ganexport.artifact import Artifact

    return Artifact(folder).spec


@pytest.mark.parametrize("to", [["onnx"], ["torchscript", "openvino"]])
def test_options_that_nothing_would_read_are_refused(exported, tmp_path, to):
    formats = [word for name in to for word in ("--to", name)]
    result = run(exported, *formats, "-o", tmp_path / "out", "--workspace", 64, "--compute-capability", "9.0")
    assert isinstance(result, UsageError)
    assert str(result).startswith("--workspace, --compute-capability: for TensorRT alone; add --to trt")
    assert not (tmp_path / "out").exists()
