"""The texts a user types: whatever they are, a value or one clear refusal; what is accepted means what it says."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ganexport.cli.convert import split_outputs
from ganexport.errors import GanExportError, UsageError
from ganexport.export.convert import describe
from ganexport.seeding import latents
from ganexport.spec import GeneratorSpec, parse_call, parse_dim, parse_input, parse_output

ALPHABET = st.text(st.sampled_from("azbx_=[](),:.-+/*0123456789 eE'\"\n\tnormaluifcstdhbٱ²１"), max_size=40)
PARSERS = [parse_input, parse_dim, parse_output, parse_call]


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(PARSERS), st.one_of(ALPHABET, st.text(max_size=60)))
@example(parse_input, "z=normal[batch,512]:float32")
@example(parse_call, "x=" + "(" * 300)
@example(parse_call, "x=" + "-" * 5000 + "1")
@example(parse_call, "x=1\0")
@example(parse_call, "x=9" + "9" * 6000)
@example(parse_dim, "h=１:２:３")
@example(parse_output, "image=[1e999,2]")
@example(parse_output, "image=[-1,1]:N")
@example(parse_input, "y=label(1e400)[batch]")
@example(parse_input, "y=constant(1e39)[1]")
def test_any_text_is_a_value_or_one_clear_refusal(parse, text):
    refusal = "none"
    try:
        parse(text)
    except GanExportError as error:
        refusal = str(error)
    assert refusal


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("abz_ =[]-1,.:NCHW/"), max_size=20), st.lists(ALPHABET, max_size=3))
def test_any_values_of_output_are_split_or_refused(first, rest):
    given_values = (first, *rest)
    try:
        path, specs = split_outputs(given_values)
    except UsageError:
        return
    assert len(specs) == len(given_values) - 1
    assert str(path)


SAMPLERS = st.sampled_from(
    ["normal", "normal(1,2)", "uniform", "uniform(-1,1)", "label(7)", "onehot(5)", "constant(0.5)", "constant(-3)"]
)


@settings(max_examples=150, deadline=None)
@given(SAMPLERS, st.lists(st.integers(1, 5), max_size=3), st.integers(1, 3), st.integers(0, 5))
def test_what_is_accepted_can_be_drawn(sampler, sizes, low, more):
    sizes = [*sizes, 5] if sampler.startswith("onehot") else sizes
    text = f"x={sampler}[{','.join(['batch', *map(str, sizes)])}]"
    described = describe(inputs=[text], batch=f"{low}:{low + more}:{low + 2 * more}")
    spec = GeneratorSpec(described.inputs, (), described.dims)
    drawn = latents(spec, 0, 0, low + more)["x"]
    assert drawn.shape == (low + more, *sizes)
    spec.infer_sizes({"x": drawn})


@pytest.mark.parametrize(
    "settings_given",
    [
        {"dims": ["batch=1:2:3"], "batch": "1:2:3"},
        {"inputs": ["z"]},
        {"outputs": ["image=[1,-1"]},
        {"call": "f()"},
        {"call": "x=__import__('os').system('true')"},
        {"batch": "x"},
    ],
)
def test_refusals_of_whole_descriptions(settings_given):
    with pytest.raises(UsageError):
        describe(**settings_given)
