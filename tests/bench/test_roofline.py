"""Operations and bytes counted by hand."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from ganexport.bench import roofline
from ganexport.bench.api import _with_roofline
from ganexport.measure import peaks
from ganexport.measurement import Measurement, Series
from tests.bench import onnx_models


def test_the_hand_counted_generator(tmp_path):
    path = tmp_path / "g.onnx"
    path.write_bytes(onnx_models.generator().SerializeToString())
    cost = roofline.count(path, onnx_models.SPEC, {"batch": 4})
    gemm = 2 * 16 * 128
    transposed = 2 * (8 * 4 * 4) * 3 * 16  # every input element meets 3 x 4 x 4 weights
    assert cost.flops == gemm + transposed
    assert cost.weights == 16 * 128 + 8 * 3 * 16 + 4
    assert cost.activations == (16 + 128) + (8 * 16 + 3 * 64)


def test_the_spec_is_read_off_the_file_when_not_given(tmp_path):
    path = tmp_path / "g.onnx"
    path.write_bytes(onnx_models.generator().SerializeToString())
    assert roofline.count(path, None, {}) == roofline.count(path, onnx_models.SPEC, {"batch": 1})


@pytest.mark.parametrize(("group", "stride"), [(1, 1), (4, 2)])
def test_grouped_and_strided_convolutions(tmp_path, group, stride):
    weight = np.zeros((8, 8 // group, 3, 3), np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], group=group, strides=[stride, stride], pads=[1, 1, 1, 1])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path / "g.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())
    side = 16 // stride
    assert roofline.count(path, None, {}).flops == 2 * (8 * side * side) * (8 // group) * 9


def row(milliseconds, precision="fp32", items=4):
    series = (Series("compute", (int(milliseconds * 1e6),) * 5, items),)
    about = {"name": "x", "device": "cpu", "precision": precision}
    return Measurement(about, {"sizes": {"batch": items}}, series)


PEAKS = {"cpu": {"gemm": {"fp32": 100e9}, "copy": 10e9}}


def test_share_and_bound():
    heavy = roofline.Cost(flops=1e9, weights=0, activations=1e6)  # 250 operations a byte
    (found,) = roofline.annotate([row(80)], {"": heavy}, PEAKS)
    roof = found.facts["roofline"]
    assert roof["bound"] == "compute"
    assert roof["share"] == pytest.approx(4e9 / 0.080 / 100e9)
    light = roofline.Cost(flops=1e6, weights=0, activations=1e6)  # a quarter operation a byte
    (found,) = roofline.annotate([row(4)], {"": light}, PEAKS)
    roof = found.facts["roofline"]
    assert roof["bound"] == "memory"
    assert roof["roof"] == pytest.approx(0.25 * 10e9)
    assert roof["share"] == pytest.approx(4e6 / 0.004 / 2.5e9)


def test_every_row_is_held_against_the_threads_it_had(tmp_path):
    path, environment = tmp_path / "g.onnx", {}
    path.write_bytes(onnx_models.generator().SerializeToString())
    one = msgspec.structs.replace(row(4), candidate={"name": "ort", "device": "cpu", "threads": 1})
    (found,) = _with_roofline((one,), [str(path)], None, environment, lambda *_: None)
    peak = environment["peaks"]["cpu 1 thread"]
    roof = found.facts["roofline"]
    assert roof["roof"] == pytest.approx(min(peak["gemm"]["fp32"], roof["intensity"] * peak["copy"]))
    everything = {"cpu": {"gemm": {"fp32": 9 * peak["gemm"]["fp32"]}, "copy": 9 * peak["copy"]}}
    cost = {"": roofline.count(path, None, {})}
    (again,) = roofline.annotate([one], cost, environment["peaks"] | everything)
    assert again.facts["roofline"] == roof
    (none,) = roofline.annotate([one], cost, everything)
    assert "roofline" not in none.facts


@pytest.mark.parametrize(
    ("candidate", "key"),
    [
        ({}, "cpu"),
        ({"device": "cuda:1", "threads": 2}, "cuda"),
        ({"device": "cpu", "threads": 1, "cores": "0,1"}, "cpu cores 0,1 1 thread"),
    ],
)
def test_which_peaks_count(candidate, key):
    assert roofline.peak_key(candidate) == key


def test_the_bandwidth_is_that_of_all_threads():
    spent: dict[int, float] = {}
    measuring = threading.Thread(target=peaks._copy, args=(3,))
    measuring.start()
    while measuring.is_alive():
        for thread in threading.enumerate():
            task = Path(f"/proc/self/task/{thread.native_id}/schedstat")
            if thread.name.startswith("copy") and task.exists():
                spent[thread.native_id] = int(task.read_text().split()[0]) / 1e9
        time.sleep(0.02)
    assert len(spent) == 3
    assert min(spent.values()) > 0.3 * max(spent.values())


def test_weights_are_shared_by_the_batch():
    cost = roofline.Cost(flops=1e6, weights=1e6, activations=0)
    assert cost.intensity(64, "fp32") == pytest.approx(64 * cost.intensity(1, "fp32"))
    assert cost.intensity(1, "fp16") == pytest.approx(2 * cost.intensity(1, "fp32"))


def test_without_a_peak_of_that_precision_there_is_no_share():
    cost = roofline.Cost(1e9, 0, 1e6)
    (found,) = roofline.annotate([row(80, "int8")], {"": cost}, PEAKS)
    assert "share" not in found.facts["roofline"]
    assert roofline.annotate([Measurement({"name": "gone"}, {}, unavailable="why")], {"": cost}, PEAKS)[0].facts == {}


@pytest.mark.parametrize(("rate", "counts"), [(2e9, False), (5e11, True)], ids=["one by one", "units of its own"])
@pytest.mark.parametrize("precisions", [["fp32", "fp16"], ["fp16"]], ids=["beside fp32", "alone"])
def test_a_half_precision_slower_than_fp32_is_no_peak(rate, counts, precisions, monkeypatch):
    monkeypatch.setattr(peaks, "_numpy_gemm", lambda precision, device: 2e11 if precision == "fp32" else None)
    monkeypatch.setattr(peaks, "_torch_gemm", lambda torch, precision, device: rate if precision == "fp16" else None)
    monkeypatch.setattr(peaks, "_copy", lambda count: 1e10)
    found = peaks.measure("cpu", precisions)["gemm"]
    assert ("fp16" in found) is counts
    assert ("fp32" in found) is ("fp32" in precisions)
