"""Loading and generating: the same pictures in any batch, thread and backend; errors in one clear line."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import msgspec
import numpy as np
import pytest
import tiny_generators
from onnx import TensorProto, helper, numpy_helper

import ganexport
from ganexport.artifact import MANIFEST
from ganexport.errors import ArtifactError, BackendUnavailableError, GanExportError, IntegrityError, UsageError
from ganexport.runtime._images import to_uint8
from ganexport.spec import Dim, GeneratorSpec, TensorSpec, parse_input

BACKENDS = ("onnxruntime", "openvino")


@pytest.fixture(params=BACKENDS)
def generator(request, artifact):
    with ganexport.load(artifact.path, request.param) as loaded:
        yield loaded


def test_pictures_are_those_of_the_weights(generator):
    z = ganexport.latents(generator.spec, 7, 100, 20)["z"]
    truth = tiny_generators.reference(tiny_generators.image_model(), z)
    wanted = np.floor((truth + 1) * 127.5 + 0.5).clip(0, 255).transpose(0, 2, 3, 1)
    pictures = generator.generate(20, seed=7, start=100)
    assert pictures.shape == (20, 8, 8, 3)
    assert pictures.dtype == np.uint8
    assert np.abs(pictures.astype(int) - wanted).max() <= 1
    assert (pictures == wanted).mean() > 0.99


def test_a_sample_is_the_same_alone_and_in_any_batch(generator):
    alone = generator.generate(1, seed=7, start=123)
    for batch_size in (1, 5, 8, 64):
        many = generator.generate(130, seed=7, batch_size=batch_size)
        assert np.abs(many[123].astype(int) - alone[0]).max() <= 1
    streamed = np.concatenate(list(generator.stream(130, seed=7, batch_size=64)))
    assert np.array_equal(streamed, many)
    parts = [b.shape[0] for b in generator.stream(130, seed=7, batch_size=64)]
    assert parts == [64, 64, 2]


def test_twenty_threads_get_the_pictures_of_one(generator):
    wanted = {seed: generator.generate(9, seed=seed) for seed in range(40)}
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda seed: generator.generate(9, seed=seed), list(range(40)) * 5))
    assert all(np.array_equal(pictures, wanted[n % 40]) for n, pictures in enumerate(found))


def test_outputs_belong_to_the_caller(generator):
    feeds = ganexport.latents(generator.spec, 1, 0, 4)
    first = generator.run(feeds)["image"]
    kept = first.copy()
    generator.run(ganexport.latents(generator.spec, 2, 0, 4))
    assert np.array_equal(first, kept)
    first[:] = 9
    assert np.array_equal(generator.run(feeds)["image"], kept)


def test_the_parts_of_a_call_give_what_run_gives(generator):
    feeds = ganexport.latents(generator.spec, 1, 0, 4)
    runner = generator.runner
    runner.prepare(feeds)
    for _ in range(2):
        runner.launch()
        runner.synchronize()
    assert np.array_equal(runner.fetch()["image"], generator.run(feeds)["image"])


def test_run_checks_what_it_is_fed(generator):
    good = np.zeros((2, 16), np.float32)
    assert generator.run({"z": good.astype(np.float64)})["image"].shape == (2, 3, 8, 8)
    good.flags.writeable = False
    assert generator.run({"z": good})["image"].shape == (2, 3, 8, 8)
    for feeds, message in (
        ({}, "missing input z"),
        ({"z": good, "y": good}, "no input 'y'"),
        ({"z": good[:, :4]}, r"shape \[2, 4\], wanted \[batch, 16\]"),
        ({"z": np.full_like(good, np.nan)}, "NaN"),
        ({"z": np.zeros((65, 16), np.float32)}, "'batch' is 65"),
        ({"z": np.zeros((2, 16), "U3")}, "dtype"),
    ):
        with pytest.raises(UsageError, match=message):
            generator.run(feeds)


def test_labels_seeds_and_samples(labelled):
    with ganexport.load(labelled.path) as generator:
        one = generator.generate(4, labels=3)
        assert one.shape == (4, 8, 8, 1)
        assert np.array_equal(generator.generate(4, labels=[3, 3, 3, 3]), one)
        assert not np.array_equal(generator.generate(4, labels=4), one)
        many = generator.generate(30, labels=[n % 10 for n in range(30)], batch_size=8)
        assert np.abs(many[13].astype(int) - generator.generate(1, start=13, labels=3)[0]).max() <= 1
        by_seed = generator.generate(seeds=[5, 6, 5])
        assert np.array_equal(by_seed[0], by_seed[2])
        assert np.array_equal(by_seed[1], generator.generate(1, seed=6)[0])
        arrays = generator.sample(30, batch_size=7)["image"]
        assert arrays.shape == (30, 1, 8, 8)
        assert arrays.dtype == np.float32
        assert np.array_equal(to_uint8(arrays, generator.spec.outputs[0]), generator.generate(30, batch_size=7))
        assert generator.generate().shape == (1, 8, 8, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "count is 0"),
        ({"n": -3}, "count is -3"),
        ({"n": 1.5}, "not a whole number"),
        ({"n": 10**18}, "do not fit memory"),
        ({"n": 1, "seed": -1}, "seed is -1"),
        ({"n": 1, "seed": 2**64}, "seed is"),
        ({"n": 1, "start": -1}, "start is -1"),
        ({"n": 1, "labels": 10}, "label is 10, allowed are 0 to 9"),
        ({"n": 2, "labels": [1]}, "1 labels for 2"),
        ({"n": 2, "seeds": [1]}, "count 2 and 1 seeds"),
        ({"n": 1, "batch_size": 65}, "'batch' is 65"),
        ({"n": 1, "batch_size": 0}, "'batch' is 0"),
        ({"n": 1, "truncation": -1}, "truncation"),
        ({"n": 1, "sizes": {"height": 5}}, "no dimension 'height'"),
    ],
)
def test_what_is_out_of_range_is_refused_before_anything_runs(labelled, arguments, message):
    with ganexport.load(labelled.path) as generator:
        for method in (generator.generate, generator.stream) if arguments["n"] != 10**18 else (generator.generate,):
            with pytest.raises(UsageError, match=message):
                method(**arguments)


def test_closed_generators_say_so(artifact):
    for backend in BACKENDS:
        generator = ganexport.load(artifact.path, backend)
        generator.close()
        generator.close()
        with pytest.raises(UsageError, match="closed"):
            generator.generate(1)


def test_steps_and_least_batches_are_padded_out_of_sight(tmp_path):
    artifact = tiny_generators.make_artifact(tmp_path / "a", tiny_generators.image_spec(dim=Dim("batch", 4, 8, 16, 4)))
    plain = tiny_generators.make_artifact(tmp_path / "b")
    with ganexport.load(artifact.path) as stepped, ganexport.load(plain.path) as free:
        for n in (1, 3, 4, 13, 21):
            pictures = stepped.generate(n, seed=2)
            assert pictures.shape[0] == n
            assert np.abs(pictures.astype(int) - free.generate(n, seed=2)).max() <= 1
        batches = list(stepped.batches(5, seed=2))
        assert [b.inputs["z"].shape[0] for b in batches] == [5]
        with pytest.raises(UsageError, match="multiples of 4"):
            stepped.generate(8, batch_size=6)


def test_a_fixed_batch_gives_any_count(tmp_path):
    spec = GeneratorSpec(
        (parse_input("z=normal[4,16]"),), (TensorSpec("image", "float32", (4, 3, 8, 8), None, (-1.0, 1.0), "NCHW"),)
    )
    artifact = tiny_generators.make_artifact(tmp_path / "a", spec, tiny_generators.image_model(batch=4))
    with ganexport.load(artifact.path) as generator:
        pictures = generator.generate(6, seed=2)
        z = ganexport.latents(spec, 2, 0, 6)["z"]
        truth = tiny_generators.reference(tiny_generators.image_model(), z).transpose(0, 2, 3, 1)
        assert np.abs(pictures / 127.5 - 1 - truth).max() < 0.01


def test_a_batch_that_is_baked_in_is_found(tmp_path):
    model = tiny_generators.image_model()
    shape = next(t for t in model.graph.initializer if t.name == "shape")
    shape.CopyFrom(numpy_helper.from_array(np.array([1, 3, 8, 8], np.int64), "shape"))
    for node in model.graph.node:
        if node.op_type == "Reshape":
            node.input[0] = "first"
    for tensor in (("starts", [0]), ("ends", [1])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(tensor[1], np.int64), tensor[0]))
    model.graph.node.insert(2, helper.make_node("Slice", ["activated", "starts", "ends"], ["first"]))
    artifact = tiny_generators.make_artifact(tmp_path / "a", model=model)
    with ganexport.load(artifact.path) as generator, pytest.raises(ArtifactError, match="baked in"):
        generator.generate(4)


def test_nan_never_becomes_a_picture(tmp_path):
    artifact = tiny_generators.make_artifact(tmp_path / "a", model=tiny_generators.image_model(last="Log"))
    with ganexport.load(artifact.path) as generator, pytest.raises(ArtifactError, match="NaN"):
        generator.generate(4)


def audio_artifact(path: Path):
    """z [batch, 4, frames] to a waveform of twice the frames."""
    inputs = [helper.make_tensor_value_info("mel", TensorProto.FLOAT, ["batch", 4, "frames"])]
    outputs = [helper.make_tensor_value_info("audio", TensorProto.FLOAT, ["batch", 1, None])]
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(4, 1, 2)).astype(np.float32), "w")
    node = helper.make_node("ConvTranspose", ["mel", "w"], ["audio"], strides=[2])
    graph = helper.make_graph([node], "vocoder", inputs, outputs, [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    spec = GeneratorSpec(
        (parse_input("mel=normal[batch,4,frames]"),),
        (TensorSpec("audio", "float32", ("batch", 1, "samples"), None, (-1.0, 1.0), "NCT"),),
        (Dim("batch"), Dim("frames", 4, 16, 64)),
    )
    return tiny_generators.make_artifact(path, spec, model)


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_that_are_no_pictures_are_sampled(tmp_path, backend):
    with ganexport.load(audio_artifact(tmp_path / "a").path, backend) as generator:
        with pytest.raises(UsageError, match="is '8', which is not a whole number"):
            generator.sample(2, seed=0, sizes={generator.spec.dims[-1].name: "8"})
        with pytest.raises(UsageError, match=r"not declared to be images .*use \.sample"):
            generator.generate(1)
        assert generator.sample(10)["audio"].shape == (10, 1, 32)
        assert generator.sample(3, sizes={"frames": 20})["audio"].shape == (3, 1, 40)
        with pytest.raises(UsageError, match="'frames' is 65"):
            generator.sample(1, sizes={"frames": 65})


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    "shape", [(70, 1, 28, 28), (5, 3, 90, 70), (2, 3, 200, 301), (1, 1, 3, 40_000), (9, 4, 1, 999)]
)
def test_large_outputs_are_converted_in_pieces_to_the_same_bytes(shape, layout):
    values = np.random.default_rng(1).normal(0, 1, shape).astype(np.float32)
    spec = TensorSpec("image", "float32", ("batch", *shape[1:]), None, (-1.0, 1.0), "NCHW")
    wanted = np.clip(values * np.float32(127.5) + np.float32(128), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    if layout == "NHWC":
        values = np.ascontiguousarray(values.transpose(0, 2, 3, 1))
        spec = TensorSpec("image", "float32", ("batch", *values.shape[1:]), None, (-1.0, 1.0), "NHWC")
    made = to_uint8(values, spec)
    assert made.flags.c_contiguous
    assert np.array_equal(made, wanted)
    values.reshape(-1)[-1] = np.nan
    with pytest.raises(ArtifactError, match="holds NaN"):
        to_uint8(values, spec)


def test_uint8_outputs_pass_through_in_either_layout():
    nhwc = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3)).astype(np.uint8)
    spec = TensorSpec("image", "uint8", ("batch", 4, 5, 3), None, (0.0, 255.0), "NHWC")
    assert to_uint8(nhwc, spec) is nhwc
    nchw = np.ascontiguousarray(nhwc.transpose(0, 3, 1, 2))
    spec = TensorSpec("image", "uint8", ("batch", 3, 4, 5), None, (0.0, 255.0), "NCHW")
    assert np.array_equal(to_uint8(nchw, spec), nhwc)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("values", [(-1.0, 1.0), (0.0, 1.0), (0.0, 255.0), (-2.5, 3.0)])
def test_conversion_clamps_and_rounds(dtype, values):
    low, high = values
    levels = np.arange(256)
    exact = (low + levels * (high - low) / 255).astype(dtype).reshape(1, 16, 16, 1)
    spec = TensorSpec("image", dtype, (1, 16, 16, 1), None, values, "NHWC")
    assert np.array_equal(to_uint8(exact, spec).reshape(-1), levels)
    outside = np.array([low - 5, high + 5, np.inf, -np.inf], dtype).reshape(1, 2, 2, 1)
    assert to_uint8(outside, spec).reshape(-1).tolist() == [0, 255, 255, 0]


# ---- which file runs -------------------------------------------------------------------------------


def test_without_a_gpu_the_engine_is_passed_over_and_the_reason_kept(tmp_path):
    extra = {"generator.engine": (b"engine", {"format": "trt", "requires": {"flavour": "tensorrt_rtx"}})}
    artifact = tiny_generators.make_artifact(tmp_path / "a", extra=extra)
    (artifact.path / "generator.engine").write_bytes(b"damaged, but nobody is going to load it")
    with ganexport.load(artifact.path) as generator:
        assert generator.backend == "onnxruntime"
        assert len(generator.remarks) == 1
        assert "trt fp32 with tensorrt" in generator.remarks[0]
        assert "GPU" in generator.remarks[0]
    with pytest.raises(BackendUnavailableError, match="rebuild it on the machine that runs it: ganexport convert"):
        ganexport.load(artifact.path, "tensorrt")


def test_backends_are_refused_by_name(artifact):
    with pytest.raises(UsageError, match=r"unknown backend 'onnxrt'. Did you mean 'onnxruntime'"):
        ganexport.load(artifact.path, "onnxrt")
    with pytest.raises(BackendUnavailableError, match="holds no file for torchscript, only onnx fp32"):
        ganexport.load(artifact.path, "torchscript")
    with pytest.raises(BackendUnavailableError, match="holds no fp16 file"):
        ganexport.load(artifact.path, precision="fp16")
    with pytest.raises(UsageError, match="write cpu, cuda or cuda:1"):
        ganexport.load(artifact.path, "onnxruntime", "gpu")
    with pytest.raises(BackendUnavailableError, match="cuda"):
        ganexport.load(artifact.path, "onnxruntime", "cuda")


def test_settings_are_honoured_and_unknown_ones_refused(tmp_path, artifact):
    for backend in BACKENDS:
        with ganexport.load(artifact.path, backend, settings={"threads": 1}) as generator:
            assert generator.generate(1).shape == (1, 8, 8, 3)
        with pytest.raises(UsageError, match=r"unknown setting of .* 'thread'. Did you mean 'threads'"):
            ganexport.load(artifact.path, backend, settings={"thread": 1})
        with pytest.raises(UsageError, match="must be a whole number from 1"):
            ganexport.load(artifact.path, backend, settings={"threads": 0})
    measured = tiny_generators.make_artifact(
        tmp_path / "a", settings={"backend": "openvino", "threads": 1, "precision": "f32"}
    )
    with ganexport.load(measured.path, "openvino") as generator:
        assert generator.runner._compiled.get_property("INFERENCE_NUM_THREADS") == 1
    with ganexport.load(measured.path, "openvino", settings={"precision": "f32"}) as generator:
        # What was measured stays where the caller says nothing of it.
        assert generator.runner._compiled.get_property("INFERENCE_NUM_THREADS") == 1
    with ganexport.load(measured.path) as generator:  # the backend that it was measured with comes first
        assert generator.backend == "openvino"
    with ganexport.load(measured.path, "onnxruntime") as generator:  # which knows no "precision"
        assert generator.backend == "onnxruntime"


def test_precision_is_chosen(tmp_path):
    half = tiny_generators.image_model(weights_seed=1).SerializeToString()
    extra = {"generator.fp16.onnx": (half, {"format": "onnx", "precision": "fp16"})}
    artifact = tiny_generators.make_artifact(tmp_path / "a", extra=extra)
    with ganexport.load(artifact.path) as first, ganexport.load(artifact.path, precision="fp16") as second:
        assert [first.file.precision, second.file.precision] == ["fp32", "fp16"]
        assert not np.array_equal(first.generate(2), second.generate(2))


def test_a_file_that_cannot_run_is_passed_over_for_another_precision_of_its_format(tmp_path):
    half = tiny_generators.image_model(weights_seed=1).SerializeToString()
    needs = {"requires": {"int8_weights": "8 bits"}}  # an int8 file that OpenVINO refuses without VNNI
    extra = {
        "generator.int8.onnx": (half, {"format": "onnx", "precision": "int8", **needs}),
        "generator.fp16.onnx": (half, {"format": "onnx", "precision": "fp16"}),
    }
    artifact = tiny_generators.make_artifact(tmp_path / "a", extra=extra)
    (artifact.path / "generator.onnx").unlink()
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    manifest["files"] = [f for f in manifest["files"] if f["precision"] != "fp32"]
    (artifact.path / "manifest.json").write_text(json.dumps(manifest))
    with patch("ganexport.runtime.openvino.int8_overflows", return_value=None):
        with ganexport.load(artifact.path, "openvino") as generator:
            assert generator.file.precision == "fp16"
        with pytest.raises(BackendUnavailableError, match=r"this one does not tell.*convert with --precision int8"):
            ganexport.load(artifact.path, "openvino", precision="int8")


# ---- damaged and hostile things ---------------------------------------------------------------------


def test_a_changed_file_is_never_loaded(tmp_path):
    artifact = tiny_generators.make_artifact(tmp_path / "a")
    path = artifact.path / "generator.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="changed or damaged"):
        ganexport.load(artifact.path)


def test_a_file_that_is_not_its_spec_is_refused(tmp_path):
    for name, spec in {
        "inputs": GeneratorSpec(
            (parse_input("w=normal[batch,16]"),), tiny_generators.image_spec().outputs, (Dim("batch"),)
        ),
        "shape": GeneratorSpec(
            (parse_input("z=normal[batch,17]"),), tiny_generators.image_spec().outputs, (Dim("batch"),)
        ),
        "dtype": GeneratorSpec(
            (parse_input("z=normal[batch,16]:float16"),), tiny_generators.image_spec().outputs, (Dim("batch"),)
        ),
        "fixed": GeneratorSpec(
            (parse_input("z=normal[batch,16]"),), (TensorSpec("x", "float32", (1,)),), (Dim("batch"),)
        ),
    }.items():
        artifact = tiny_generators.make_artifact(tmp_path / name, spec)
        for backend in BACKENDS:
            with pytest.raises(ArtifactError, match="its spec says"):
                ganexport.load(artifact.path, backend)
    baked = tiny_generators.make_artifact(tmp_path / "baked", model=tiny_generators.image_model(batch=2))
    with pytest.raises(ArtifactError, match=r"input 'z' is \[2, 16\], its spec says \[batch, 16\]"):
        ganexport.load(baked.path)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("content", [b"", b"not an onnx file", b"\x08\x08" + bytes(200)])
def test_damaged_engines_with_a_right_hash_are_one_clear_line(tmp_path, backend, content):
    artifact = tiny_generators.make_artifact(tmp_path / "a")
    (artifact.path / "generator.onnx").write_bytes(content)
    manifest = json.loads((artifact.path / MANIFEST).read_text())
    manifest["files"][0]["sha256"] = __import__("hashlib").sha256(content).hexdigest()
    (artifact.path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError) as refusal:
        ganexport.load(artifact.path, backend)
    assert "\n" not in str(refusal.value)
    assert "generator.onnx" in str(refusal.value)


def test_what_is_no_artifact_is_refused(tmp_path):
    (tmp_path / "x.engine").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match="no such file or folder"):
        ganexport.load(tmp_path / "missing")
    with pytest.raises(ArtifactError, match=r"a lone file must be an \.onnx"):
        ganexport.load(tmp_path / "x.engine")
    with pytest.raises(ArtifactError, match=f"no {MANIFEST}"):
        ganexport.load(tmp_path / "folder")
    future = tiny_generators.make_artifact(tmp_path / "future")
    text = (future.path / MANIFEST).read_text().replace('"schema_version": 1', '"schema_version": 2')
    (future.path / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match="newer ganexport"):
        ganexport.load(future.path)


def mutate(manifest: dict, random: np.random.Generator) -> bytes:
    """One to three random changes of a manifest: of its values, keys, structure or bytes."""
    values = [
        None, True, -1, 0, 1, 2, 2**31, 2**63, 2**64, -0.5, 1e308, "", "batch", "z", "../x", "float16", "uint8", [], {},
        [[]], "\0", "é" * 50, [1, 2], {"type": "label", "classes": 0}, {"type": "normal", "std": -1.0}, "NHWC", "trt",
        "0" * 64,
    ]  # fmt: skip
    tree = json.loads(json.dumps(manifest))
    for _ in range(random.integers(1, 4)):
        spots: list = []

        def walk(node, spots=spots):
            for key in list(node) if isinstance(node, dict) else range(len(node)):
                spots.append((node, key))
                if isinstance(node[key], dict | list):
                    walk(node[key])

        walk(tree)
        if not spots:
            break
        node, key = spots[random.integers(len(spots))]
        action = random.integers(4)
        value = values[random.integers(len(values))]
        if action == 0:
            del node[key]
        elif action == 1 and isinstance(node, dict):
            node[str(value)] = node.pop(key)
        elif action == 2 and isinstance(node, list):
            node.insert(int(random.integers(len(node) + 1)), value)
        else:
            node[key] = value
    text = bytearray(json.dumps(tree).encode())
    if random.integers(5) == 0 and text:
        for _ in range(random.integers(1, 4)):
            text[random.integers(len(text))] = random.integers(256)
    return bytes(text)


def fuzz(artifact, count: int, seed: int) -> dict[str, int]:
    random = np.random.default_rng(seed)
    good = json.loads((artifact.path / MANIFEST).read_text())
    outcomes = {"refused": 0, "loaded": 0, "refused later": 0}
    for _ in range(count):
        (artifact.path / MANIFEST).write_bytes(mutate(good, random))
        try:
            generator = ganexport.load(artifact.path, settings={"threads": 1})
        except GanExportError:
            outcomes["refused"] += 1
            continue
        try:
            pictures = generator.sample(2, seed=1)
            assert pictures
            outcomes["loaded"] += 1
        except GanExportError:
            outcomes["refused later"] += 1
        finally:
            generator.close()
    return outcomes


def test_two_thousand_mutated_manifests(tmp_path):
    outcomes = fuzz(tiny_generators.make_artifact(tmp_path / "a"), 2000, 0)
    assert outcomes["refused"] > 500
    assert outcomes["loaded"] > 50


@pytest.mark.slow
def test_ten_thousand_mutated_manifests(tmp_path):
    path = tmp_path / "a"
    artifact = tiny_generators.make_artifact(
        path, tiny_generators.image_spec(1, classes=10), tiny_generators.image_model(1, classes=10)
    )
    outcomes = fuzz(artifact, 10_000, 1)
    assert outcomes["refused"] > 2500
    assert outcomes["loaded"] > 250


# ---- without torch, and fast ------------------------------------------------------------------------

BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'torchvision', 'onnx', 'PIL', 'rich'):
            raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Blocker())
import ganexport
for path, backend in {cases!r}:
    pictures = ganexport.load(path, backend).generate(3, seed=1)
    assert pictures.shape == (3, 8, 8, 3), pictures.shape
try:
    ganexport.load({cases!r}[0][0], 'tensorrt')
except ganexport.GanExportError:
    pass
assert 'torch' not in sys.modules
print('done')
"""


def test_torch_is_never_imported_for_onnx_openvino_or_tensorrt(tmp_path, artifact):
    engine = {
        "generator.engine": (b"x", {"format": "trt", "requires": {"flavour": "tensorrt_rtx", "version": "0.1.2"}})
    }
    both = tiny_generators.make_artifact(tmp_path / "a", extra=engine)
    lone = tiny_generators.save(tiny_generators.image_model(), tmp_path / "lone.onnx")
    cases = [(str(both.path), None), (str(artifact.path), "openvino"), (str(lone), None), (str(lone), "openvino")]
    environment = os.environ | {"PYTHONPATH": str(Path(ganexport.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(cases=cases)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.stdout.strip() == "done", done.stderr


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_gives_the_pictures_of_the_module(tmp_path):
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(16, 192)

        def forward(self, z):
            return torch.tanh(self.linear(z)).reshape(-1, 3, 8, 8)

    module = Net().eval()
    traced = torch.jit.trace(module, torch.zeros(2, 16))
    torch.jit.save(traced, str(tmp_path / "net.pt"))
    about = {"format": "torchscript"}
    extra = {"generator.torchscript.pt": ((tmp_path / "net.pt").read_bytes(), about)}
    artifact = tiny_generators.make_artifact(tmp_path / "a", extra=extra)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch deprecates the format; the user has chosen it
        generator = ganexport.load(artifact.path, "torchscript")
    with generator:
        feeds = ganexport.latents(generator.spec, 3, 0, 5)
        with torch.inference_mode():
            wanted = module(torch.from_numpy(feeds["z"])).numpy()
        found = generator.run(feeds)["image"]
        assert np.allclose(found, wanted, atol=1e-6)
        kept = found.copy()
        generator.generate(4)
        assert np.array_equal(found, kept)
    (artifact.path / "generator.torchscript.pt").write_bytes(b"PK")
    with pytest.raises(IntegrityError):
        ganexport.load(artifact.path, "torchscript")


def test_the_spec_survives_the_manifest(artifact):
    with ganexport.load(artifact.path) as generator:
        assert generator.spec == tiny_generators.image_spec()
        assert "tiny" in repr(generator)
        assert msgspec.to_builtins(generator.spec)["dims"][0]["opt"] == 8


def test_onnxruntime_for_cuda_finds_the_libraries_of_pips_packages():
    if importlib.util.find_spec("nvidia.cu13") is None:
        pytest.skip("pip's CUDA libraries are not installed")
    script = (
        "import sys, onnxruntime; onnxruntime.cuda_version = '13.0'\n"
        "from ganexport.runtime.onnxruntime import preload_cuda\n"
        "found = preload_cuda(); assert 'torch' not in sys.modules\n"
        "mapped = open('/proc/self/maps').read(); assert all(name in mapped for name in found); print(*found)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert {"libcudart.so.13", "libcublas.so.13", "libcudnn.so.9"} <= set(done.stdout.split()), done.stderr


@pytest.mark.parametrize("label", [np.int64(3), np.array(3)])
def test_a_label_may_be_a_number_of_numpy(label, labelled):
    with ganexport.load(labelled.path if hasattr(labelled, "path") else labelled) as generator:
        assert np.array_equal(generator.generate(3, labels=label), generator.generate(3, labels=3))
