"""The certificate: what is run, and that each kind of wrongness is seen."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganexport.build.certify import certify, draw, plan
from ganexport.build.golden import choose, read_golden, write_golden
from ganexport.build.picture import write_comparison
from ganexport.export.verify import compare_golden
from ganexport.spec import Dim, GeneratorSpec, TensorSpec, parse_input

SPEC = GeneratorSpec(
    (parse_input("z=normal[batch,4,height]"),),
    (TensorSpec("image", "float32", ("batch", 1, "height", 4), None, (-1.0, 1.0), "NCHW"),),
    (Dim("batch", 1, 4, 9), Dim("height", 4, 8, 16, 4)),
)


class Engine:
    """image = tanh(z) with something wrong when asked."""

    def __init__(self, wrong=None):
        self.wrong = wrong
        self.calls = 0

    def run(self, feeds):
        self.calls += 1
        image = np.tanh(feeds["z"]).transpose(0, 2, 1)[:, None].astype(np.float32)
        return {"image": self.wrong(image, self.calls) if self.wrong else image}


def judge(wrong, precision="fp32", **settings):
    return certify(
        Engine(wrong), Engine(), SPEC, precision, reference_name="truth", runtime="test",
        seen=[{"batch": 3, "height": 8}], optimum=16, **settings,
    )  # fmt: skip


def test_an_equal_engine_passes_and_the_certificate_says_what_was_run():
    certificate = judge(None).certificate
    assert certificate.verdict == "pass"
    assert certificate.deterministic is True
    assert certificate.outputs[0].psnr is None
    corners = [{"batch": b, "height": h} for b in (1, 9) for h in (4, 16)]
    assert all(corner in certificate.sizes for corner in corners)
    assert {"batch": 3, "height": 8} not in certificate.unseen
    assert "16 inputs at the optimum" in certificate.notes[0]


def ruin_one_batch(image, _):
    return np.concatenate([image[:2]] * 9)[: len(image)] if len(image) > 4 else image


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda i, _: i + 0.01, "largest error"),
        (lambda i, _: np.where(np.arange(i.size).reshape(i.shape) == 5, np.nan, i), "NaN or infinite"),
        (lambda i, _: i.astype(np.float16), "dtype float16"),
        (lambda i, _: i[:1] if len(i) > 4 else i, "shape [1"),
        (lambda i, call: i + call * 1e-9 if call > 1 else i, "same input twice"),
        (ruin_one_batch, "worst sample"),
    ],
    ids=["offset", "nan", "dtype", "fixed batch", "random", "wrong only at large batches"],
)
def test_each_kind_of_wrongness_is_a_failure(wrong, words):
    def as_float32(image, call):
        value = wrong(image, call)
        return value if words == "dtype float16" else value.astype(np.float32)

    certificate = judge(as_float32).certificate
    assert certificate.verdict == "fail"
    assert not certificate.passed
    assert any(words in failure for failure in certificate.failures), certificate.failures


TWO = GeneratorSpec(
    (parse_input("z=normal[batch,4]"),),
    (TensorSpec("loss", "float32", ()), TensorSpec("image", "float32", ("batch", 4))),
    (Dim("batch", 1, 4, 9),),
)


class TwoOutputs:
    """A scalar, and the input as it is with something done to it."""

    def __init__(self, change=lambda z: z):
        self.change = change

    def run(self, feeds):
        outputs = {"loss": feeds["z"][0, 0].reshape(()), "image": self.change(feeds["z"])}
        return {name: value for name, value in outputs.items() if value is not None}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda z: z, ""),
        (lambda z: z[..., None], "image: shape [2, 4, 1] where the reference has [2, 4]"),
        (lambda z: z.astype(np.float16), "image: dtype float16 where the reference has float32"),
        (lambda z: None, "output image is missing; there is: loss"),
    ],
    ids=["equal", "shape", "dtype", "missing"],
)
def test_what_cannot_be_compared_is_told_beside_a_scalar_output(change, words):
    golden = [
        ({"z": z}, TwoOutputs().run({"z": z})) for z in (np.ones((2, 4), np.float32), np.ones((9, 4), np.float32))
    ]
    against_golden, _ = compare_golden(TwoOutputs(change), golden, TWO, "fp32")
    assert against_golden.notes == ("11 golden samples",)
    against_source = certify(
        TwoOutputs(change), TwoOutputs(), TWO, "fp32", reference_name="t", runtime="t", optimum=8
    ).certificate
    for found in (against_golden, against_source):
        assert (found.verdict == "pass") == (words == "")
        assert words in " ".join(found.failures)
        assert "nothing was compared" not in " ".join(found.failures)


def test_an_engine_that_raises_is_a_failure_with_the_size():
    def explode(image, _):
        if len(image) == 9:
            raise RuntimeError("profile does not cover this")
        return image

    certificate = judge(explode).certificate
    assert "at batch 9" in certificate.failures[0]
    assert "profile does not cover this" in certificate.failures[0]


def test_the_worst_sample_can_be_found_again():
    outcome = judge(lambda i, call: i + np.float32(0.5) * (np.arange(len(i))[:, None, None, None] == 2))
    feeds = draw(SPEC, outcome.worst)
    assert feeds["z"].shape[0] == outcome.worst.count
    assert outcome.worst_row == 2


def test_a_budget_that_ends_is_written_down():
    ticks = iter(range(0, 100000, 10))
    certificate = judge(None, budget=45.0, clock=lambda: float(next(ticks))).certificate
    assert certificate.verdict == "pass"
    assert "the budget of 45 s ended before" in certificate.notes[1]
    assert certificate.outputs[0].samples < 16 + 4


def test_fixed_shapes_are_certified_too():
    spec = GeneratorSpec(
        (parse_input("z=normal[2,4,8]"),), (TensorSpec("image", "float32", (2, 1, 8, 4), None, (-1.0, 1.0)),), ()
    )
    certificate = certify(Engine(), Engine(), spec, "fp32", reference_name="t", runtime="t", optimum=8).certificate
    assert certificate.verdict == "pass"
    assert certificate.outputs[0].samples == 8


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(0, 6), st.integers(0, 20), st.integers(1, 4)), min_size=1, max_size=4
    )
)
def test_the_plan_visits_every_end_and_only_allowed_sizes(ranges):
    names = ("batch", "height", "width", "frames")
    dims = tuple(
        Dim(name, low * step, (low + more) * step, (low + more + further) * step, step)
        for name, (low, more, further, step) in zip(names, ranges, strict=False)
    )
    spec = GeneratorSpec((TensorSpec("x", "float32", tuple(d.name for d in dims)),), (), dims)
    sets = plan(spec, optimum=10)
    for chosen in sets:
        for dim in dims:
            dim.check(chosen.sizes[dim.name])
        assert chosen.count == chosen.sizes["batch"]
    for dim in dims:
        assert {dim.min, dim.max} <= {chosen.sizes[dim.name] for chosen in sets}
    assert sum(c.count for c in sets if c.role == "optimum") >= 10
    spans = sorted((c.start, c.start + c.count) for c in sets)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), "no sample is drawn twice"


def test_golden_outputs_hold_corners_and_respect_the_limit(tmp_path):
    assert write_golden(tmp_path, SPEC, Engine()) >= 16
    sets = read_golden(tmp_path / "golden.npz", SPEC)
    shapes = {feeds["z"].shape for feeds, _ in sets}
    assert {(1, 4, 4), (9, 4, 16), (1, 4, 16), (9, 4, 4)} <= shapes
    for feeds, outputs in sets:
        assert np.array_equal(outputs["image"], Engine().run(feeds)["image"])
    small = tmp_path / "small"
    small.mkdir()
    write_golden(small, SPEC, Engine(), limit=1)
    assert len(read_golden(small / "golden.npz", SPEC)) == 1
    assert len(choose(SPEC)) > 1


def test_the_comparison_picture_shows_reference_candidate_and_error(tmp_path):
    from PIL import Image

    truth = np.zeros((1, 8, 8), np.float32)
    value = truth.copy()
    value[0, 2, 3] = np.nan
    value[0, 5, 5] = 0.5
    tensor = TensorSpec("image", "float32", ("batch", 1, 8, 8), None, (-1.0, 1.0), "NCHW")
    write_comparison(tmp_path / "p.png", tensor, truth, value)
    sheet = np.asarray(Image.open(tmp_path / "p.png"))
    factor = sheet.shape[0] // 8
    small = sheet[::factor, ::factor]
    assert small.shape == (8, 28, 3)
    assert small[2, 10 + 3].tolist() == [255, 0, 255], "NaN is magenta"
    assert small[5, 20 + 5].tolist() == [255, 255, 255], "the largest error is white"
    assert small[0, 0].tolist() == [128, 128, 128]


LATER = GeneratorSpec(
    (parse_input("z=normal[4,batch]"), parse_input("style=normal[4]")),
    (TensorSpec("notes", "float32", (4, "batch")), TensorSpec("loss", "float32", ())),
    (Dim("batch", 2, 4, 10, 2),),
)


@pytest.mark.parametrize(
    ("change", "independent"),
    [
        (lambda z: z, True),
        (lambda z: z - z.mean(1, keepdims=True), False),  # a statistic of the batch
        (lambda z: z + np.linspace(0, 1, z.shape[1], dtype=np.float32), False),  # the place in the batch
        (lambda z: np.round(z * (127 / np.abs(z).max())) / (127 / np.abs(z).max()), False),  # one scale for all
    ],
    ids=["each alone", "statistics", "place", "dynamic scale"],
)
def test_a_sample_is_looked_for_among_others_on_any_axis(change, independent):
    class Melody:
        def run(self, feeds):
            notes = (change(feeds["z"]) + feeds["style"][:, None]).astype(np.float32)
            return {"notes": notes, "loss": np.zeros((), np.float32)}

    certificate = certify(Melody(), Melody(), LATER, "fp32", reference_name="t", runtime="t", optimum=8).certificate
    assert certificate.independent is independent
    assert certificate.passed is independent
    assert ("others in its batch" in " ".join(certificate.failures)) is not independent


def test_an_engine_that_fails_among_others_is_a_failure_and_no_crash():
    class Late(Engine):
        def run(self, feeds):
            if self.calls > 2:  # the first call and its repetition ran
                raise RuntimeError("out of scratch memory")
            return super().run(feeds)

    certificate = certify(
        Late(), Engine(), SPEC, "fp32", reference_name="t", runtime="t", budget=1e-9, optimum=4
    ).certificate
    assert certificate.verdict == "fail"
    assert "out of scratch memory" in " ".join(certificate.failures)


def test_one_sample_a_call_has_no_others():
    alone = GeneratorSpec(SPEC.inputs, SPEC.outputs, (Dim("batch", 1, 1, 1), SPEC.dims[1]))
    certificate = certify(Engine(), Engine(), alone, "fp32", reference_name="t", runtime="t", optimum=2).certificate
    assert certificate.independent is None
    assert certificate.passed


def test_an_output_whose_size_its_spec_misses_is_refused():
    certificate = judge(None).certificate
    assert certificate.passed

    class Kinked(Engine):
        def run(self, feeds):
            return {"image": super().run(feeds)["image"][:, :, :12]}

    certificate = certify(Kinked(), Kinked(), SPEC, "fp32", reference_name="t", runtime="t", optimum=4).certificate
    assert certificate.verdict == "fail"
    told = [text for text in certificate.failures if "its spec says ['batch', 1, 'height', 4]" in text]
    assert told[0].startswith("image: the source gives [1, 1, 12, 4] at batch 1, height 16")
