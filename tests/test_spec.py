"""Specs and their parsers: what is accepted, what is refused, and that refusals are one clear line."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganexport.errors import GanExportError, UsageError
from ganexport.spec import (
    Constant,
    Dim,
    GeneratorSpec,
    Label,
    Normal,
    OneHot,
    TensorSpec,
    Uniform,
    parse_call,
    parse_dim,
    parse_input,
    parse_output,
    spec_from_json,
    spec_to_json,
)

SPEC = GeneratorSpec(
    (parse_input("z=normal[batch,512]"), parse_input("y=label(10)[batch]")),
    (TensorSpec("image", "float32", ("batch", 3, "height", "width"), None, (-1.0, 1.0), "NCHW"),),
    (Dim("batch", 1, 8, 64), Dim("height", 64, 256, 1024, 8), Dim("width", 64, 256, 1024, 8)),
)


class Shaped:
    def __init__(self, *shape: int) -> None:
        self.shape = shape


@pytest.mark.parametrize(
    ("text", "name", "shape", "sampler", "dtype"),
    [
        ("z=normal[batch,512]", "z", ("batch", 512), Normal(), "float32"),
        ("z = normal(0.5, 2)[batch, 512]:float16", "z", ("batch", 512), Normal(0.5, 2.0), "float16"),
        ("c=onehot(10)[batch,10]", "c", ("batch", 10), OneHot(10), "float32"),
        ("y=label(1000)[batch]", "y", ("batch",), Label(1000), "int64"),
        (
            "image=uniform(-1,1)[batch,3,height,width]",
            "image",
            ("batch", 3, "height", "width"),
            Uniform(-1, 1),
            "float32",
        ),
        ("truncation=constant(0.7)[1]", "truncation", (1,), Constant(0.7), "float32"),
        ("mask=data[batch,1]", "mask", ("batch", 1), None, "float32"),
    ],
)
def test_inputs_are_read_as_written(text, name, shape, sampler, dtype):
    tensor = parse_input(text)
    assert (tensor.name, tensor.shape, tensor.sampler, tensor.dtype) == (name, shape, sampler, dtype)


@pytest.mark.parametrize(
    "text",
    ["", "z", "z=normal", "z=gauss[1]", "z=normal(1)[1]", "z=normal(0,-1)[1]", "z=uniform(1,1)[2]", "y=label(0)[1]",
     "y=label(1.5)[1]", "y=label(nan)[1]", "c=onehot(10)[batch,9]", "z=normal[batch,-1]", "z=normal[a b]",
     "z=normal[1]:complex64", "9=normal[1]", "t=constant(inf)[1]", "z=normal[99999999999]"],
)  # fmt: skip
def test_malformed_inputs_are_refused_in_one_line(text):
    with pytest.raises(UsageError) as refusal:
        parse_input(text)
    assert "\n" not in str(refusal.value)


@given(st.text(max_size=60))
def test_parsers_never_fail_in_another_way(text):
    for parse in (parse_input, parse_dim, parse_output, parse_call, spec_from_json):
        with contextlib.suppress(GanExportError):
            parse(text)


@pytest.mark.parametrize(
    ("text", "dim"),
    [
        ("height=64:256:1024/8", Dim("height", 64, 256, 1024, 8)),
        ("batch=1:8:64", Dim("batch", 1, 8, 64)),
        ("frames=128", Dim("frames", 128, 128, 128)),
    ],
)
def test_dims_are_read_as_written(text, dim):
    assert parse_dim(text) == dim


@pytest.mark.parametrize(
    "text", ["batch", "batch=", "batch=0", "batch=8:1:64", "h=10:20:30/8", "b=1:2", "b=1:2:3:4", "b=-1"]
)
def test_malformed_dims_are_refused(text):
    with pytest.raises(UsageError):
        parse_dim(text)


def test_calls_take_literals_and_evaluate_nothing():
    assert parse_call("noise_mode='const', scale=2, flag=None") == {"noise_mode": "const", "scale": 2, "flag": None}
    for text in ("x=__import__('os')", "print(1)", "**{}", "x=1)(", "x=y"):
        with pytest.raises(UsageError):
            parse_call(text)


def test_specs_survive_json():
    assert spec_from_json(spec_to_json(SPEC)) == SPEC


def test_sizes_checked_over_all_inputs():
    narrow = GeneratorSpec(SPEC.inputs, SPEC.outputs, SPEC.dims)
    assert narrow.infer_sizes({"z": Shaped(3, 512), "y": Shaped(3)}) == {"batch": 3}
    for feeds, words in (
        ({"z": Shaped(3, 512)}, "missing input y"),
        ({"z": Shaped(3, 512), "y": Shaped(4)}, "another input has batch=3"),
        ({"z": Shaped(3, 511), "y": Shaped(3)}, "wanted [batch, 512]"),
        ({"z": Shaped(65, 512), "y": Shaped(65)}, "allowed are 1 to 64"),
        ({"z": Shaped(3, 512), "y": Shaped(3), "w": Shaped(1)}, "no input 'w'"),
    ):
        with pytest.raises(UsageError, match=words.replace("[", r"\[").replace("]", r"\]")):
            narrow.infer_sizes(feeds)


def test_checked_sizes_stay_inside_the_range_and_on_the_step():
    dim = Dim("height", 64, 256, 1024, 8)
    sizes = dim.sizes()
    assert {64, 256, 1024} <= set(sizes)
    for size in sizes:
        dim.check(size)
    assert len(set(dim.sizes(unseen=(64, 256))) & {64, 256}) == 0


def test_undeclared_dimension_is_refused_with_the_option_to_add():
    with pytest.raises(UsageError, match="--dim frames=min:opt:max"):
        GeneratorSpec((parse_input("mel=normal[batch,80,frames]"),), (), (Dim("batch"),))
