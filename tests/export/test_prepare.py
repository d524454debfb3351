"""Each preparing pass alone: what it changes, and that the function stays the same."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from ganexport.errors import ExportError
from ganexport.export.prepare import evaluation_mode, prepare_module
from ganexport.export.prepare import parametrizations as strip
from ganexport.export.prepare.affine_grid import SymbolicAffineGrid
from ganexport.export.prepare.attention import FourDimensionalAttention
from ganexport.export.prepare.autocast import FullPrecision, without_autocast
from ganexport.export.prepare.autograd_functions import plain_functions
from ganexport.export.prepare.cumulative_product import ScannedProduct
from ganexport.export.prepare.fold import FoldAsConvolution
from ganexport.export.prepare.linspace import SymbolicLinspace
from ganexport.export.prepare.modulated_convolution import PerSampleConvolution
from ganexport.export.prepare.randomness import Randomness, refuse
from ganexport.export.prepare.recurrent import FreeLengthRecurrence


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal,
        old_weight_norm, old_spectral_norm,
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "old weight_norm", "old spectral_norm"],
)  # fmt: skip
def test_parametrizations_are_stripped_and_the_copy_alone_changes(wrap):
    torch.manual_seed(0)
    module = nn.Sequential(wrap(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before = module(x)
        twin = copy.deepcopy(module)
        lines = strip.apply(twin)
        assert lines == ["strip-parametrizations: 1 weights"]
        assert not parametrize.is_parametrized(twin[0])
        assert not twin[0]._forward_pre_hooks
        assert sorted(twin[0].state_dict()) == ["bias", "weight"]
        torch.testing.assert_close(twin(x), before)
        torch.testing.assert_close(module(x), before, msg="the original must not change")


def test_nothing_to_strip_changes_nothing():
    assert strip.apply(nn.Linear(2, 2).eval()) == []


def test_evaluation_reaches_modules_that_override_train():
    class Stubborn(nn.Dropout):
        def train(self, mode: bool = True):
            return self

    module = nn.Sequential(nn.BatchNorm1d(3), Stubborn(0.5))
    lines = evaluation_mode.apply(module)
    assert lines == ["evaluation-mode: 3 modules were in training mode"]
    x = torch.ones(4, 3)
    assert torch.equal(module(x), module(x))
    assert prepare_module(module) == []


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.mark_non_differentiable(x)
        assert ctx.needs_input_grad == (False, False)
        return x * factor


def test_functions_run_plain_inside_the_block_alone():
    x = torch.ones(2)
    before = vars(torch.autograd.Function)["apply"]
    with plain_functions() as seen:
        assert torch.equal(Scaled.apply(x, 3.0), x * 3)
    assert seen == ["Scaled"]
    assert vars(torch.autograd.Function)["apply"] is before


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2),
    st.integers(0, 2), st.integers(1, 2), st.booleans(), st.integers(5, 9), st.integers(5, 9),
)  # fmt: skip
def test_per_sample_convolution_equals_the_grouped_one(
    batch, inputs, outputs, kernel, stride, padding, dilation, bias, height, width
):
    torch.manual_seed(batch * 100 + inputs)
    x = torch.randn(1, batch * inputs, height, width, dtype=torch.float64)
    w = torch.randn(batch * outputs, inputs, kernel, kernel, dtype=torch.float64)
    b = torch.randn(batch * outputs, dtype=torch.float64) if bias else None
    if height + 2 * padding < dilation * (kernel - 1) + 1 or width + 2 * padding < dilation * (kernel - 1) + 1:
        return
    wanted = F.conv2d(x, w, b, stride, padding, dilation, groups=batch)
    with PerSampleConvolution() as mode:
        given_out = F.conv2d(x, w, b, stride=stride, padding=padding, dilation=dilation, groups=batch)
    assert mode.count == (1 if batch > 1 and inputs > 1 else 0)
    torch.testing.assert_close(given_out, wanted)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 4), st.integers(2, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3),
    st.integers(0, 1), st.integers(0, 1), st.integers(3, 6), st.integers(3, 6),
)  # fmt: skip
def test_per_sample_transposed_convolution_equals_the_grouped_one(
    batch, inputs, outputs, kernel, stride, padding, extra, height, width
):
    if padding > kernel - 1 or extra >= stride:
        return
    torch.manual_seed(batch)
    x = torch.randn(1, batch * inputs, height, width, dtype=torch.float64)
    w = torch.randn(batch * inputs, outputs, kernel, kernel, dtype=torch.float64)
    arguments = {"stride": stride, "padding": padding, "output_padding": extra, "groups": batch}
    wanted = F.conv_transpose2d(x, w, **arguments)
    if not wanted.numel():
        return
    with PerSampleConvolution() as mode:
        made = F.conv_transpose2d(x, w, **arguments)
    assert mode.count == 1
    torch.testing.assert_close(made, wanted)


def test_ordinary_grouped_convolutions_are_left_alone():
    depthwise = nn.Conv2d(4, 4, 3, groups=4)
    with PerSampleConvolution() as mode:
        depthwise(torch.randn(1, 4, 8, 8))
        depthwise(torch.randn(2, 4, 8, 8))
    assert mode.count == 0


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("mask", [None, "pair", "full"])
def test_attention_of_any_rank_equals_its_four_dimensional_form(rank, mask):
    torch.manual_seed(0)
    lead = {2: (), 3: (2,), 4: (2, 3)}[rank]
    query, key, value = torch.randn(*lead, 5, 8), torch.randn(*lead, 7, 8), torch.randn(*lead, 7, 4)
    masks = {None: None, "pair": torch.randn(5, 7), "full": torch.randn(*lead, 5, 7)}
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=masks[mask], scale=0.3)
    with FourDimensionalAttention() as mode:
        made = F.scaled_dot_product_attention(query, key, value, attn_mask=masks[mask], scale=0.3)
    assert mode.count == (1 if rank < 4 else 0)
    torch.testing.assert_close(made, wanted)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 1),
    st.integers(1, 2), st.integers(3, 8), st.booleans(),
)  # fmt: skip
def test_fold_equals_the_transposed_convolution(batch, channels, high, wide, stride, padding, dilation, size, batched):
    torch.manual_seed(batch)
    kernel, output = (high, wide), (size, size + 1)
    spans = [n + 2 * padding - dilation * (k - 1) - 1 for n, k in zip(output, kernel, strict=True)]
    if min(spans) < 0:
        return
    patches = (spans[0] // stride + 1) * (spans[1] // stride + 1)
    x = torch.randn(batch, channels * high * wide, patches, dtype=torch.float64)
    x = x if batched else x[0]
    wanted = F.fold(x, output, kernel, dilation, padding, stride)
    with FoldAsConvolution() as mode:
        made = F.fold(x, output, kernel, dilation=dilation, padding=padding, stride=stride)
    assert mode.count == (not any(span % stride for span in spans)), "a rest is left to torch"
    torch.testing.assert_close(made, wanted)


CALLS = {
    "randn": lambda x: torch.randn(2, 3),
    "randn size": lambda x: torch.randn(size=(2, 3)),
    "randn list": lambda x: torch.randn([2, 3], device="cpu"),
    "randn_like": torch.randn_like,
    "rand": lambda x: torch.rand((2, 3)),
    "rand_like": torch.rand_like,
    "normal_": lambda x: torch.empty(2, 3).normal_(1.0, 2.0),
    "normal": lambda x: torch.normal(x, 0.5),
    "normal scalar": lambda x: torch.normal(0.0, 1.0, (2, 3)),
    "uniform_": lambda x: torch.empty(2, 3).uniform_(-1, 1),
    "bernoulli": lambda x: torch.bernoulli(torch.full((2, 3), 0.5)),
    "exponential_": lambda x: torch.empty(2, 3).exponential_(),
    "dropout": lambda x: F.dropout(x, 0.5),
    "dropout2d": lambda x: F.dropout2d(x[None, :, :, None], 0.5),
    "new_empty": lambda x: x.new_empty(2, 3).normal_(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_random_calls_are_found_with_their_line_and_answered(call):
    x = torch.ones(2, 3)
    with Randomness() as recorder:
        call(x)
    (found,) = recorder.draws
    assert found.where.startswith("test_prepare.py:")
    assert found.kind in ("normal", "uniform")
    results = []
    for _ in range(2):
        with Randomness(lambda number, shape: torch.full(tuple(shape), 0.25)):
            results.append(call(x))
    assert torch.equal(results[0], results[1])
    with pytest.raises(ExportError, match=r"test_prepare\.py:\d+: .*--noise input"):
        refuse(recorder.draws, "error")
    refuse(recorder.draws, "input")


def test_supplied_noise_keeps_mean_spread_and_share():
    x = torch.ones(2, 3)
    with Randomness(lambda number, shape: torch.full(tuple(shape), 0.25)):
        assert torch.equal(torch.empty(2, 3).normal_(1.0, 2.0), torch.full((2, 3), 1.5))
        assert torch.equal(torch.empty(2, 3).uniform_(-1, 1), torch.full((2, 3), -0.5))
        assert torch.equal(torch.normal(x, 0.5), torch.full((2, 3), 1.125))
        assert torch.equal(F.dropout(x, 0.2), x / 0.8)
        assert torch.equal(F.dropout(x, 0.3), x * 0)
        assert torch.equal(F.dropout(x, 0.3, training=False), x)


def test_dropout_that_is_off_is_no_randomness():
    with Randomness() as recorder:
        F.dropout(torch.ones(2), 0.5, training=False)
        nn.Dropout(0.5).eval()(torch.ones(2))
        F.dropout(torch.ones(2), 0.0)
    assert recorder.draws == []


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 11])
@pytest.mark.parametrize("ends", [(-1, 1), (0.0, 7.0), (3.0, -0.3)])
def test_linspace_of_a_symbolic_size_is_torchs(steps, ends):
    class Grid(nn.Module):
        def forward(self, x):
            with SymbolicLinspace() as rewriting:
                grid = torch.linspace(*ends, x.shape[0])
            assert rewriting.count == 1
            return grid + x

    program = torch.export.export(
        Grid(), (torch.zeros(4),), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},)
    )
    assert torch.allclose(program.module()(torch.zeros(steps)), torch.linspace(*ends, steps), rtol=1e-6, atol=1e-6)
    with SymbolicLinspace() as rewriting:
        assert torch.equal(torch.linspace(0, 1, 5), torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    assert rewriting.count == 0


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("sizes", [(5, 7), (1, 4), (3, 1, 6)], ids=str)
def test_affine_grids_of_a_symbolic_size_are_torchs(corners, sizes):
    axes = len(sizes)

    class Grid(nn.Module):
        def forward(self, x, theta):
            with SymbolicAffineGrid() as rewriting:
                grid = F.affine_grid(theta, x.shape, align_corners=corners)
            assert rewriting.count == 1
            return grid

    dims = {axis + 2: torch.export.Dim(f"n{axis}", min=1, max=64) for axis in range(axes)}
    theta = torch.randn(2, axes, axes + 1)
    program = torch.export.export(Grid(), (torch.zeros(2, 3, *range(8, 8 + axes)), theta), dynamic_shapes=(dims, {}))
    image = torch.zeros(2, 3, *sizes)
    wanted = F.affine_grid(theta, image.shape, align_corners=corners)
    torch.testing.assert_close(program.module()(image, theta), wanted)
    with SymbolicAffineGrid() as rewriting:
        F.affine_grid(theta, image.shape, align_corners=corners)
    assert rewriting.count == 0


@pytest.mark.parametrize("length", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_cumulative_products_are_torchs(length, dim):
    x = torch.randn(length, length, length, dtype=torch.float64)
    with ScannedProduct() as rewriting:
        made = [torch.cumprod(x, dim), x.cumprod(dim=dim), (x > 0).cumprod(dim), x.cumprod(dim, dtype=torch.float32)]
    assert rewriting.count == 4
    wanted = [torch.cumprod(x, dim), x.cumprod(dim=dim), (x > 0).cumprod(dim), x.cumprod(dim, dtype=torch.float32)]
    for ours, theirs in zip(made, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_is_off_within_and_back_after():
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    with without_autocast() as seen, torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.float32
    assert seen.count == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_casts_to_half_precision_change_nothing_within():
    x = torch.ones(2, 4)
    with FullPrecision() as seen:
        made = [x.half(), x.bfloat16(), x.to(torch.float16), x.type(torch.bfloat16), torch.zeros(2, dtype=torch.half)]
        assert x.to(torch.float64).dtype == torch.float64
        assert x.long().dtype == torch.int64
    assert {value.dtype for value in made} == {torch.float32}
    assert seen.count == len(made)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_recurrent_layers_stay_whole_over_a_free_length(kind, both_ways, batch_first):
    torch.manual_seed(0)

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = kind(3, 5, 2, bidirectional=both_ways, batch_first=batch_first, dropout=0.5)

        def forward(self, x):
            with FreeLengthRecurrence() as mode:
                outputs, state = self.layer(x)
            self.count = mode.count
            return outputs, *(state if isinstance(state, tuple) else (state,))

    module = Recurrent().eval()
    length, batch = torch.export.Dim("length", min=2, max=40), torch.export.Dim("batch", min=1, max=9)
    axes = {0: batch, 1: length} if batch_first else {0: length, 1: batch}
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(4, 6, 3),), dynamic_shapes=(axes,), strict=False)
        x = torch.randn(7, 2, 3)
        for made, wanted in zip(program.module()(x), module(x), strict=True):
            torch.testing.assert_close(made, wanted)
    assert module.count == 0, "a fixed length is left to torch"
    assert sum(str(node.target).startswith("ganexport.") for node in program.graph.nodes) == 1


def test_projected_and_packed_recurrence_is_left_to_torch():
    with FreeLengthRecurrence() as mode:
        nn.LSTM(3, 5, proj_size=2)(torch.randn(4, 2, 3))
        nn.GRU(3, 5)(nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)]))
    assert mode.count == 0
