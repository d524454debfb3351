"""The public functions: the reference against formulas, the operator against the reference, compiled, refusals."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from ganexport.errors import BackendUnavailableError, UsageError
from ganexport.kernels import gradient_penalty as module
from ganexport.kernels._launch import empty_gradient, samples_are_dense
from ganexport.kernels._reference import sample_epsilon
from ganexport.kernels.gradient_penalty import (
    KINDS,
    gradient_penalty,
    gradient_penalty_reference,
    interpolate,
    interpolate_reference,
    make_rng_state,
)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# dtype: relative L2 of the gradient against the reference in float64, from the rounding of one number
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4.5e-3}


def operator(
    grad: torch.Tensor,
    *,
    kind: str = "two-sided",
    weight: float | torch.Tensor = 10.0,
    target: float = 1.0,
    eps: float = 1e-12,
    loss_scale: torch.Tensor | None = None,
    needs_gradient: bool = True,
) -> torch.Tensor:
    """The torch operator by its own name, which on the CPU runs its CPU implementation."""
    tensor = weight if isinstance(weight, torch.Tensor) else None
    number = 1.0 if tensor is not None else weight
    code = KINDS.index(kind)
    return torch.ops.ganexport.gradient_penalty(grad, tensor, loss_scale, number, code, target, eps, needs_gradient)[0]


def gradients(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """[N, …] with norms between about 0.5 and 3."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    scale = torch.linspace(0.5, 3.0, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    return (values / values.flatten(1).norm(dim=1).view_as(scale) * scale if len(shape) > 1 else scale).to(dtype)


def derivative(function, grad: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = grad.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = function(leaf, **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_formula(kind):
    grad = gradients((6, 3, 4, 4), torch.float64)
    norms = np.linalg.norm(grad.numpy().reshape(6, -1), axis=1)
    terms = {
        "two-sided": (norms - 1.2) ** 2,
        "one-sided": np.maximum(0, norms - 1.2) ** 2,
        "r1": norms**2 / 2,
    }[kind]
    value = gradient_penalty_reference(grad, kind=kind, weight=7.0, target=1.2, eps=0.0)
    assert float(value) == pytest.approx(7.0 * terms.mean(), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", [operator, gradient_penalty], ids=["operator", "reference"])
def test_first_and_second_derivatives(kind, function):
    grad = gradients((4, 3, 5), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, kind=kind, weight=3.0), grad)
    assert torch.autograd.gradgradcheck(lambda x: function(x, kind=kind, weight=3.0), grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1,), (5,), (1, 1), (3, 7), (4, 3, 8, 8), (2, 1, 1, 1)])
def test_the_operator_agrees_with_the_reference(dtype, kind, shape):
    grad = gradients(shape, dtype)
    value, gradient = derivative(operator, grad, kind=kind, target=0.1)
    wanted, wanted_gradient = derivative(gradient_penalty_reference, grad.double(), kind=kind, weight=10.0, target=0.1)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-9)
    assert relative(gradient, wanted_gradient) <= TOLERANCES[dtype]


@pytest.mark.parametrize("function", [operator, gradient_penalty], ids=["operator", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", [0.0, 1e-12])
def test_zero_gradients(function, kind, eps):
    value, gradient = derivative(function, torch.zeros(3, 4), kind=kind, weight=4.0, eps=eps)
    assert float(value) == pytest.approx({"two-sided": 4.0, "one-sided": 0.0, "r1": 0.0}[kind], rel=1e-5)
    assert (gradient == 0).all()


@pytest.mark.parametrize("function", [operator, gradient_penalty], ids=["operator", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_reaches_the_penalty(function, kind):
    grad = torch.ones(3, 4)
    grad[1, 2] = torch.nan
    value, gradient = derivative(function, grad, kind=kind, weight=1.0)
    assert value.isnan()
    assert gradient[[0, 2]].isfinite().all()


def test_layouts_are_kept_and_read_in_place():
    dense = gradients((4, 3, 6, 5))
    layouts = {
        "channels_last": dense.to(memory_format=torch.channels_last),
        "permuted": gradients((4, 6, 3, 5)).permute(0, 2, 1, 3),
        "every other sample": gradients((8, 3, 6, 5))[::2],
        "one sample repeated": gradients((1, 3, 6, 5)).expand(4, 3, 6, 5),
    }
    for name, grad in layouts.items():
        assert samples_are_dense(grad), name
        assert empty_gradient(grad).stride()[1:] == grad.stride()[1:], name
    layouts["sliced within the sample"] = gradients((4, 3, 6, 9))[..., 2:7]
    assert not samples_are_dense(layouts["sliced within the sample"])
    for name, grad in layouts.items():
        leaf = grad.detach().requires_grad_()
        gradient = torch.autograd.grad(operator(leaf), leaf)[0]
        _, wanted = derivative(gradient_penalty_reference, grad.contiguous(), weight=10.0)
        assert relative(gradient, wanted) < 1e-6, name


def test_weight_and_loss_scale_as_tensors():
    grad = gradients((4, 9))
    wanted_value, wanted = derivative(gradient_penalty_reference, grad, weight=10.0)
    for weight in (10.0, torch.tensor(10.0), torch.tensor([10.0])):
        for scale in (None, torch.tensor(4.0)):
            value, gradient = derivative(operator, grad, weight=weight, loss_scale=scale)
            torch.testing.assert_close(value, wanted_value)
            torch.testing.assert_close(gradient, wanted)
            leaf = grad.clone().requires_grad_()
            (operator(leaf, weight=weight, loss_scale=scale) * 4).backward()
            torch.testing.assert_close(leaf.grad, 4 * wanted)


def test_backward_twice_never_touches_what_was_given_away():
    leaf = gradients((4, 9)).requires_grad_()
    value = operator(leaf)
    first = torch.autograd.grad(value, leaf, torch.tensor(1.0), retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(value, leaf, torch.tensor(3.0), retain_graph=True)[0]
    third = torch.autograd.grad(value, leaf, torch.tensor(1.0))[0]
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, 3 * kept)
    torch.testing.assert_close(third, kept)
    _, wanted = derivative(gradient_penalty_reference, leaf, weight=10.0)
    torch.testing.assert_close(first, wanted)


def test_backward_without_a_prepared_gradient():
    leaf = gradients((4, 9)).requires_grad_()
    operator(leaf, needs_gradient=False).backward()
    torch.testing.assert_close(leaf.grad, derivative(gradient_penalty_reference, leaf, weight=10.0)[1])


def test_operators_keep_torchs_rules():
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for grad in (gradients((4, 3, 5)), gradients((2, 3, 4, 4)).to(memory_format=torch.channels_last)):
        arguments = (grad.requires_grad_(), None, torch.tensor(2.0), 10.0, 0, 1.0, 1e-12, True)
        torch.library.opcheck(torch.ops.ganexport.gradient_penalty.default, arguments, test_utils=checks)
    images = [torch.randn(4, 3, 5) for _ in range(2)]
    torch.library.opcheck(torch.ops.ganexport.interpolate.default, (*images, make_rng_state(0)), test_utils=checks)
    arguments = (gradients((4, 3)), torch.rand(6), torch.tensor(1.0), 0, 1.0, 1e-12)
    torch.library.opcheck(torch.ops.ganexport.gradient_penalty_backward.default, arguments, test_utils=checks)


def critic() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.LeakyReLU(0.2), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 1)]
    return torch.nn.Sequential(*layers)


def critic_step(model, images, function, scale):
    grad = torch.func.grad(lambda x: model(x).sum())(images)
    return function(grad) * scale


@pytest.mark.parametrize(("backend", "kind"), [*(("aot_eager", kind) for kind in KINDS), ("inductor", "two-sided")])
def test_compiled_critic_step_has_eager_gradients(backend, kind):
    model, images = critic(), torch.randn(4, 3, 8, 8)
    weight = torch.tensor(10.0)

    def parameter_gradients(step, function, scale):
        model.zero_grad()
        step(model, images, function, scale).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    functions = [
        lambda grad: gradient_penalty(grad, kind=kind, weight=weight),
        lambda grad: operator(grad, kind=kind, weight=weight),
    ]
    for function in functions:
        torch._dynamo.reset()
        compiled = torch.compile(critic_step, fullgraph=True, backend=backend)
        for scale in (1.0, 0.25):
            wanted = parameter_gradients(
                critic_step, lambda grad: gradient_penalty_reference(grad, kind=kind, weight=10.0), scale
            )
            got = parameter_gradients(compiled, function, scale)
            assert len(got) == len(wanted) > 0
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [operator, gradient_penalty], ids=["operator", "reference"])
def test_autocast_changes_nothing(function):
    grad = gradients((4, 9), torch.bfloat16)
    outside = derivative(function, grad, weight=10.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = derivative(function, grad, weight=10.0)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


# Random123's known answers for philox4x32-10 (kat_vectors): counter, key, first output word.
KNOWN_ANSWERS = [
    ((0, 0), (0, 0), 0x6627E8D5),
    ((-1, -1), (-1, -1), 0x408F276D),
    ((0x85A308D3243F6A88, 0x0370734413198A2E), (0x299F31D0A4093822, 0), 0xD16CFE09),
]


@pytest.mark.parametrize(("counter", "key", "word"), KNOWN_ANSWERS)
def test_epsilon_is_philox(counter, key, word, monkeypatch):
    index, offset = (value - (1 << 64) if value >= 1 << 63 else value for value in counter)
    monkeypatch.setattr(torch, "arange", lambda *_args, **_kw: torch.tensor([index]))
    seed = key[0] - (1 << 64) if key[0] >= 1 << 63 else key[0]
    epsilon = sample_epsilon(torch.tensor([seed, offset]), 1)
    assert int(epsilon.double() * 2**24) == word >> 8


def test_interpolation_lies_between_and_never_repeats():
    real, fake = torch.ones(1000, 2), torch.zeros(1000, 2)
    state = make_rng_state(5)
    first, second = interpolate(real, fake, state), interpolate(real, fake, state)
    assert state.tolist() == [5, 2]
    assert ((first >= 0) & (first < 1)).all()
    assert (first[:, 0] == first[:, 1]).all()
    assert not torch.equal(first, second)
    assert float(first.mean()) == pytest.approx(0.5, abs=0.03)
    resumed = torch.tensor([5, 1])
    assert torch.equal(interpolate(real, fake, resumed), second)
    assert torch.equal(interpolate(real[:10], fake[:10], make_rng_state(5)), first[:10])


@pytest.mark.parametrize("dtype", DTYPES)
def test_interpolation_operator_agrees_with_the_reference(dtype):
    real, fake = torch.randn(9, 3, 4, 4, dtype=dtype), torch.randn(9, 3, 4, 4, dtype=dtype)
    state = make_rng_state(1)
    output, epsilon = torch.ops.ganexport.interpolate(real, fake, state)
    assert state[1] == 1
    assert torch.equal(epsilon, sample_epsilon(make_rng_state(1), 9))
    wanted = interpolate_reference(real, fake, make_rng_state(1))
    torch.testing.assert_close(output, wanted, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_compiled_interpolation_bakes_nothing_in():
    real, fake = torch.ones(4, 2), torch.zeros(4, 2)
    for function in (interpolate, lambda *a: torch.ops.ganexport.interpolate(*a)[0]):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        state, eager_state = make_rng_state(3), make_rng_state(3)
        for _ in range(3):
            torch.testing.assert_close(compiled(real, fake, state), interpolate(real, fake, eager_state))
        assert state.tolist() == [3, 3]


def test_refusals_are_one_line_and_name_what_is_known():
    grad = gradients((4, 9))
    cases = [
        (lambda: gradient_penalty(grad, kind="two_sided", weight=1.0), "two-sided"),
        (lambda: gradient_penalty(grad, weight=1.0, impl="gpu"), "auto, cuda, reference"),
        (lambda: gradient_penalty(torch.zeros(0, 3), weight=1.0), "at least one element"),
        (lambda: gradient_penalty(torch.tensor(1.0), weight=1.0), "at least one element"),
        (lambda: gradient_penalty(torch.ones(2, 2, dtype=torch.int64), weight=1.0), "floating point"),
        (lambda: gradient_penalty(grad, weight=torch.ones(2)), "one element"),
        (lambda: gradient_penalty(grad, weight=torch.ones(1, requires_grad=True)), "require grad"),
        (lambda: interpolate(grad, grad[:2], make_rng_state(0)), "one shape"),
        (lambda: interpolate(grad, grad, torch.zeros(2)), "make_rng_state"),
    ]
    for call, text in cases:
        with pytest.raises(UsageError) as caught:
            call()
        assert text in str(caught.value)
        assert "\n" not in str(caught.value)


def test_asking_for_cuda_refuses_with_the_reason():
    grad = gradients((4, 9))
    with pytest.raises(BackendUnavailableError, match="tensors are on cpu"):
        gradient_penalty(grad, weight=1.0, impl="cuda")
    with pytest.raises(BackendUnavailableError, match="tensors are on cpu"):
        interpolate(grad, grad, make_rng_state(0), impl="cuda")
    assert "float64" in module.why_not_cuda("cuda", torch.float64)


def test_auto_says_once_why_it_takes_the_reference():
    code = (
        "import warnings; from ganexport.kernels import gradient_penalty as m; import torch; "
        "[m._resolve('auto', 'cuda', 0, torch.float64) for _ in range(3)]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr.count("plain torch instead of the CUDA kernel") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient_penalty(gradients((2, 3)), weight=1.0)  # on the CPU plain torch is what is meant: no word
