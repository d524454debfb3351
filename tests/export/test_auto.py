"""--to auto: candidates are proved, measured and compared; the winner is published with its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

import ganexport
from ganexport.artifact import Artifact
from ganexport.build import onnx_file, tensorrt
from ganexport.build.options import BuildOptions
from ganexport.environment import usable_cores
from ganexport.errors import ParityError, UsageError
from ganexport.export import auto as module
from ganexport.export.auto import Search, Settings, auto
from ganexport.export.auto_candidates import Option, _Builder, with_layouts, with_threads
from ganexport.runtime.onnxruntime import OnnxRuntimeRunner
from ganexport.seeding import latents
from ganexport.spec import Dim, GeneratorSpec, Normal, TensorSpec, spec_to_json

SPEC = GeneratorSpec(
    (TensorSpec("z", "float32", ("batch", 16), Normal()),),
    (TensorSpec("image", "float32", ("batch", 3, 16, 16), range=(-1.0, 1.0), layout="NCHW"),),
    (Dim("batch", 1, 4, 8),),
)


def spec_of(size: int) -> GeneratorSpec:
    """Of :func:`write_generator`'s."""
    image = msgspec.structs.replace(SPEC.outputs[0], shape=("batch", 3, 4 * size, 4 * size))
    return msgspec.structs.replace(SPEC, outputs=(image,))


QUICK = Settings(batches=(1, 4), rounds=2, turn_seconds=0.02, options=BuildOptions(calibration_samples=16), budget=20.0)


def write_generator(path: Path, width: int = 32, size: int = 4) -> Path:
    """z -> Gemm -> two transposed convolutions -> tanh; pictures of four times ``size``."""
    rng = np.random.default_rng(0)

    def weights(*shape: int, scale: float) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    constants = {
        "w0": weights(16, width * size**2, scale=0.25),
        "w1": weights(width, width // 2, 4, 4, scale=0.5 / width**0.5),
        "w2": weights(width // 2, 3, 4, 4, scale=0.48 / (width // 2) ** 0.5),
        "shape": np.array([0, width, size, size], np.int64),
    }
    nodes = [
        helper.make_node("Gemm", ["z", "w0"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Reshape", ["b", "shape"], ["c"]),
        helper.make_node("ConvTranspose", ["c", "w1"], ["d"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("ConvTranspose", ["e", "w2"], ["f"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Tanh", ["f"], ["image"]),
    ]
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 16])
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 4 * size, 4 * size])
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [z], [image], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx_file.write_spec(model, spec_of(size))
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_generator(tmp_path_factory.mktemp("auto") / "g.onnx")


@pytest.fixture(scope="module")
def published(source: Path) -> Artifact:
    return auto(source, source.parent / "fastest", QUICK)


def test_the_winner_is_published_with_settings_certificate_and_the_table(published: Artifact) -> None:
    (file,) = published.manifest.files
    report = published.manifest.report["auto"]
    winner = next(row for row in report["candidates"] if row["verdict"] == "winner")
    assert report["winner"] == winner["name"]
    assert file.precision == winner["precision"]
    assert file.settings["backend"] == winner["backend"]
    assert file.settings["threads"] == winner["settings"]["threads"]
    assert file.certificate is not None
    assert file.certificate.verdict == "pass"
    assert set(winner["milliseconds"]) == {"1", "4"}
    names = {row["name"] for row in report["candidates"]}
    assert {"onnxruntime fp32", "onnxruntime int8", "openvino fp32", "openvino int8"} <= names
    assert all(row.get("reason") for row in report["candidates"] if row["verdict"] in ("rejected", "unavailable"))
    measured = {m["candidate"]["name"] for m in report["measurements"]}
    assert winner["name"] in measured
    assert all(m["series"] for m in report["measurements"] if not m.get("unavailable"))
    assert published.golden_path() is not None


def test_the_winner_is_the_fastest_of_those_within_tolerance(published: Artifact) -> None:
    report = published.manifest.report["auto"]
    timed = [r for r in report["candidates"] if r.get("milliseconds") and r["verdict"] in ("winner", "slower")]

    def score(row: dict[str, Any]) -> float:
        return float(np.mean([np.log(ms) for ms in row["milliseconds"].values()]))

    finals = {m["candidate"]["name"] for m in report["measurements"] if m["conditions"]["rounds"] == QUICK.rounds}
    finalists = [row for row in timed if row["name"] in finals]
    assert min(finalists, key=score)["verdict"] == "winner"
    assert all(row.get("psnr") is None or row["psnr"] >= 35.0 for row in timed)


def test_load_runs_the_winner_with_its_settings(published: Artifact, source: Path) -> None:
    (file,) = published.manifest.files
    feeds = latents(SPEC, 5, 0, 4)
    with ganexport.load(published.path) as fast, ganexport.load(source) as truth:
        assert fast.backend == file.settings["backend"]
        got, wanted = fast.run(feeds)["image"], truth.run(feeds)["image"]
    error = np.mean((got - wanted) ** 2)
    assert 10 * np.log10(4.0 / (error + 1e-20)) >= 35.0


def blurred() -> onnx.ModelProto:
    """A transposed convolution as StyleGAN2 has it, the blur behind it."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.standard_normal((64, 64, 3, 3)).astype(np.float32),
        "k": rng.standard_normal((64, 1, 4, 4)).astype(np.float32),
    }
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w"], ["c"], strides=[2, 2]),
        helper.make_node("Conv", ["c", "k"], ["y"], group=64, pads=[1, 1, 1, 1]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64, 16, 16])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64, 32, 32])
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_only_graphs_that_differ_are_built(source: Path, tmp_path: Path) -> None:
    def variants(model: onnx.ModelProto) -> list[str]:
        return _Builder(model, source, SPEC, tmp_path, 4, QUICK, print)._variants("int8")

    assert "blur folded" in variants(blurred())
    assert "blur folded" not in variants(onnx.load(source))
    assert variants(onnx.load(source))[0] == ""


def test_low_precision_on_openvino_keeps_vectors_in_fp32(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    constants = {
        "m": rng.standard_normal((16, 64)).astype(np.float32),
        "axes": np.array([2, 3], np.int64),
        "c": rng.standard_normal((1, 64, 16, 16)).astype(np.float32),
        "w": rng.standard_normal((3, 64, 3, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["z", "m"], ["s"]),
        helper.make_node("Unsqueeze", ["s", "axes"], ["style"]),
        helper.make_node("Mul", ["c", "style"], ["x"]),
        helper.make_node("Conv", ["x", "w"], ["image"], pads=[1, 1, 1, 1]),
    ]
    values = [(tensor.name, list(tensor.shape)) for tensor in (*SPEC.inputs, *SPEC.outputs)]
    z, image = (helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name, sizes in values)
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [z], [image], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    made = _Builder(model, tmp_path / "g.onnx", SPEC, tmp_path, 4, QUICK, lambda _text: None)
    option = made._openvino("x", model, (), "x", "bf16", {})
    wide = made._openvino("y", model, (), "y", "fp32", {})
    assert any(name.startswith("fp32-vectors x") for name in option.passes), option.passes
    assert not any(name.startswith("fp32-vectors") for name in wide.passes)


def test_the_builders_options_reach_the_source_and_the_engines(source: Path, tmp_path: Path) -> None:
    asked = msgspec.structs.replace(QUICK, options=BuildOptions(opset=18, timing_cache=tmp_path / "cache"), budget=1.0)
    described = {"inputs": ["z=normal[batch,8]"], "batch": "1:2:3"}
    base = module._base("generators.tiny:Trap", tmp_path / "base", asked, described, lambda _text: None)
    assert base.find("onnx").requires["opset"] == "18"
    made = _Builder(onnx.load(source), source, SPEC, tmp_path, 4, asked, lambda _text: None)
    if tensorrt.unavailable() or tensorrt.load_library()[0] != "tensorrt_rtx":
        pytest.skip("TensorRT for RTX, which has no timing cache, is not installed")
    with pytest.raises(UsageError, match="--timing-cache"):
        list(made._tensorrt("fp32"))


def test_one_precision_only(source: Path, tmp_path: Path) -> None:
    made = auto(source, tmp_path / "a", msgspec.structs.replace(QUICK, precision="fp32", batches=(1,), goal="latency"))
    rows = made.manifest.report["auto"]["candidates"]
    assert {row["precision"] for row in rows} == {"fp32"}
    assert made.manifest.files[0].certificate is not None


def test_nothing_outside_tolerance_is_published(source: Path, tmp_path: Path) -> None:
    settings = msgspec.structs.replace(QUICK, precision="int8", min_psnr=95.0)
    with pytest.raises(ParityError, match="no candidate"):
        auto(source, tmp_path / "a", settings)
    assert not (tmp_path / "a").exists()


def test_bad_requests_are_refused(source: Path, tmp_path: Path) -> None:
    for settings, message in (
        (Settings(goal="speed"), "latency"),
        (Settings(batches=(9,)), "allowed are 1 to 8"),
    ):
        with pytest.raises(UsageError, match=message):
            auto(source, tmp_path / "a", settings)
    for words, message in (
        ({"to": ("auto", "onnx")}, "alone"),
        ({"to": "auto", "precision": "fp8"}, "fp16"),
        ({"to": "auto", "allow_mismatch": True}, "min-psnr"),
        ({"to": "onnx", "optimize_for": "latency"}, "--to auto"),
    ):
        with pytest.raises(UsageError, match=message):
            ganexport.convert(source, output=tmp_path / "a", **words)
    assert not (tmp_path / "a").exists()


def test_an_artifact_is_not_replaced_by_its_own_winner(published: Artifact) -> None:
    with pytest.raises(UsageError, match="its own source"):
        auto(published.path, published.path, QUICK)


def test_thread_variants_only_where_the_backend_takes_them() -> None:
    option = Option("a", "onnxruntime", "onnx", "fp32", "x.onnx", settings={"threads": usable_cores()})
    assert all(v.settings["threads"] < usable_cores() and v.name != "a" for v in with_threads(option))
    assert not list(with_threads(msgspec.structs.replace(option, settings={})))


def test_goals_look_at_their_batches(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ganexport.convert(source, to="onnx", output=tmp_path / "base")
    times = {"quick start": {"1": 1.0, "4": 9.0}, "quick finish": {"1": 2.0, "4": 4.0}}
    for goal, expected in (("latency", "quick start"), ("throughput", "quick finish"), ("balanced", "quick finish")):
        search = Search(base, tmp_path, msgspec.structs.replace(QUICK, goal=goal), lambda _text: None)
        for name, milliseconds in times.items():
            search.rows[name] = module.Row(name, "onnxruntime", "fp32", milliseconds=milliseconds)
        assert min(times, key=search.score) == expected


def test_the_command(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ganexport.cli.convert import command

    seen: list[Settings] = []

    def instead(_source: Any, output: Any, settings: Settings, **_: Any) -> Artifact:
        seen.append(settings)
        return ganexport.convert(source, to="onnx", output=output)

    monkeypatch.setattr(module, "auto", instead)
    arguments = [str(source), "--to", "auto", "--optimize-for", "latency", "--bench-batch", "2", "--min-psnr", "37"]
    result = CliRunner().invoke(command, [*arguments, "-o", str(tmp_path / "a")], catch_exceptions=False)
    assert result.exit_code == 0
    assert seen == [Settings(batches=(2,), goal="latency", min_psnr=37.0)]


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime says that it has a GPU; what is opened there runs on the processor."""
    opened = OnnxRuntimeRunner.open.__func__

    def usable(_cls: type) -> tuple[str, ...]:
        return ("cpu", "cuda")

    def stand_in(cls: type, path: Path, spec: GeneratorSpec, *, device: str | None = None, **words: Any) -> Any:
        runner = opened(cls, path, spec, device="cpu", **words)
        runner.device = "cuda:0" if device == "cuda" else "cpu"
        return runner

    monkeypatch.setattr(OnnxRuntimeRunner, "usable_devices", classmethod(usable))
    monkeypatch.setattr(OnnxRuntimeRunner, "open", classmethod(stand_in))


@pytest.mark.usefixtures("with_gpu")
def test_a_gpu_adds_fp32_tf32_and_fp16_launched_and_replayed(tmp_path: Path) -> None:
    source, spec = write_generator(tmp_path / "g.onnx", 128, 16), spec_of(16)
    settings = msgspec.structs.replace(QUICK, batches=(64,))
    builder = _Builder(onnx.load(source), source, spec, tmp_path, 64, settings, print)
    options = {option.name: option for option in builder.onnxruntime()}
    ways = {"fp32", "tf32", "fp16", "fp16 rewritten"}
    on_gpu = {f"onnxruntime {way} cuda{how}" for way in ways for how in ("", " graph")}
    assert {name for name, option in options.items() if option.device == "cuda"} == on_gpu
    assert {option.device for name, option in options.items() if name not in on_gpu} == {"cpu"}
    assert options["onnxruntime tf32 cuda graph"].settings == {"tf32": True, "cuda_graph": True}
    rewritten = onnx.load(options["onnxruntime fp16 rewritten cuda"].path)
    assert "ConvTranspose" not in {node.op_type for node in rewritten.graph.node}
    feeds = latents(SPEC, 5, 0, 4)
    with ganexport.load(source) as truth:
        wanted = truth.run(feeds)["image"]
    for name in ("onnxruntime fp16 cuda", "onnxruntime fp16 rewritten cuda"):
        with module.open_option(options[name].path, "onnxruntime", "cuda", {}, spec_to_json(spec)) as runner:
            error = np.mean((runner.run(feeds)["image"] - wanted) ** 2)
        assert 10 * np.log10(4.0 / error) >= 40.0
    (variant,) = with_layouts(options["onnxruntime fp16 cuda graph"])
    assert variant.settings == {"cuda_graph": True, "nhwc": True}
    assert not list(with_layouts(options["onnxruntime fp32"]))


@pytest.mark.usefixtures("with_gpu")
def test_a_graph_that_cannot_be_captured_is_not_tried(tmp_path: Path) -> None:
    path = write_generator(tmp_path / "g.onnx")
    free = msgspec.structs.replace(SPEC.outputs[0], shape=("batch", 3, "height", 16))
    spec = msgspec.structs.replace(SPEC, outputs=(free,), dims=(*SPEC.dims, Dim("height", 1, 16, 64)))
    options = list(_Builder(onnx.load(path), path, spec, tmp_path, 4, QUICK, print).onnxruntime())
    assert any(option.device == "cuda" for option in options)
    assert not any(option.settings.get("cuda_graph") for option in options)


def test_a_gpu_that_does_not_start_leaves_the_processor(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxRuntimeRunner, "usable_devices", classmethod(lambda _cls: ("cpu", "cuda")))
    artifact = auto(source, tmp_path / "out", msgspec.structs.replace(QUICK, precision="fp32"))
    rows = {row["name"]: row for row in artifact.manifest.report["auto"]["candidates"]}
    assert rows["onnxruntime fp32 cuda"]["verdict"] == "rejected"
    assert "onnxruntime-gpu" in rows["onnxruntime fp32 cuda"]["reason"]
    (file,) = artifact.manifest.files
    assert file.settings.get("device") != "cuda"


@pytest.mark.usefixtures("with_gpu")
def test_a_winner_is_loaded_on_the_device_that_it_was_measured_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = "onnxruntime tf32 cuda graph"

    def measured(search: Search, names: list[str]) -> list[str]:
        assert wanted in names
        search.rows[wanted].milliseconds = {"1": 1.0, "4": 2.0}
        return [wanted]

    monkeypatch.setattr(Search, "_measured", measured)
    artifact = auto(source, tmp_path / "out", QUICK)
    (file,) = artifact.manifest.files
    assert (file.format, file.precision) == ("onnx", "tf32")
    assert file.settings == {"backend": "onnxruntime", "device": "cuda", "tf32": True, "cuda_graph": True}
    with ganexport.load(artifact.path) as generator:
        assert generator.device == "cuda:0"
    with ganexport.load(artifact.path, device="cpu") as generator:
        assert generator.device == "cpu"
    monkeypatch.undo()
    feeds = latents(SPEC, 5, 0, 4)
    with ganexport.load(artifact.path) as generator, ganexport.load(source) as truth:
        assert generator.device == "cpu"  # this machine has no GPU
        np.testing.assert_allclose(generator.run(feeds)["image"], truth.run(feeds)["image"], atol=1e-4)
