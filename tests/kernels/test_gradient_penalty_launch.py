"""The way from tensors to the C interface, launched on the emulated GPU with tensors in host memory."""

from __future__ import annotations

import contextlib
import ctypes

import emulated
import pytest
import torch

from ganexport.kernels import _launch
from ganexport.kernels import gradient_penalty as module
from ganexport.kernels._reference import gradient_penalty_reference, interpolate_reference, sample_epsilon
from ganexport.kernels.gradient_penalty import KINDS, gradient_penalty, make_rng_state

TOLERANCES = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4.5e-3}


@pytest.fixture
def emulated_gpu(monkeypatch):
    """``_launch`` with the emulated library, which takes host pointers."""
    monkeypatch.setattr(_launch, "_require", lambda _index: emulated.library())
    monkeypatch.setattr(_launch, "_index", lambda _device: 0)
    monkeypatch.setattr(_launch, "_stream", lambda _tensor: ctypes.c_void_p(0))
    monkeypatch.setattr(_launch, "_pools_ready", set())
    monkeypatch.setattr(torch.cuda, "device", lambda _index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    _launch._counter_pool.cache_clear()
    yield
    _launch._counter_pool.cache_clear()


def settings(kind: str = "two-sided", weight: float = 10.0) -> dict:
    return {"weight_value": weight, "kind": KINDS.index(kind), "target": 1.0, "eps": 1e-12}


def gradients(*shape: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values / values.flatten(1).norm(dim=1).mean() * 2


def wanted(grad: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = grad.detach().double().requires_grad_()
    value = gradient_penalty_reference(leaf, weight=10.0, **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


LAYOUTS = {
    "contiguous": lambda: gradients(4, 3, 8, 8),
    "channels_last": lambda: gradients(4, 3, 8, 8).to(memory_format=torch.channels_last),
    "every other sample": lambda: gradients(8, 3, 8, 8)[::2],
    "one sample repeated": lambda: gradients(1, 3, 8, 8).expand(4, 3, 8, 8),
    "unaligned": lambda: gradients(4, 3, 8, 9).flatten()[1:769].view(4, 3, 8, 8),
    "sliced within the sample": lambda: gradients(4, 3, 8, 12)[..., 2:10],
    "large": lambda: gradients(3, 3, 120, 120),
    "single numbers": lambda: gradients(5, 1).flatten(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_penalty_and_backward(emulated_gpu, layout, dtype):
    grad = LAYOUTS[layout]().to(dtype)
    scale = torch.tensor(4.0)
    value, prepared, statistics = _launch.penalty(grad, None, scale, settings(), needs_gradient=True)
    expected, gradient = wanted(grad)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    assert prepared.shape == grad.shape
    assert statistics.shape == (grad.shape[0] + 2,)
    for upstream, options in ((4.0, {"prepared": prepared}), (-1.0, {}), (-1.0, {"prepared": prepared})):
        got = _launch.backward(
            grad, statistics, torch.tensor(upstream), {"kind": 0, "target": 1.0, "eps": 1e-12}, **options
        )
        error = (got.double() - upstream * gradient).norm() / (upstream * gradient).norm()
        assert error <= TOLERANCES[dtype], (upstream, options)
        assert (got is prepared) == bool(options)


def test_weight_from_the_device_and_value_alone(emulated_gpu):
    grad = gradients(4, 100)
    value, gradient, _ = _launch.penalty(grad, torch.tensor(5.0), None, settings(weight=2.0), needs_gradient=False)
    assert float(value) == pytest.approx(float(wanted(grad)[0]), rel=1e-6)
    assert gradient.numel() == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed"])
def test_interpolation(emulated_gpu, layout):
    real, fake = gradients(4, 3, 8, 8), gradients(4, 3, 8, 8).flip(0)
    if layout != "contiguous":
        fake = fake.to(memory_format=torch.channels_last)
    if layout == "channels_last":
        real = real.to(memory_format=torch.channels_last)
    state = make_rng_state(7)
    output, epsilon = _launch.interpolate(real, fake, state)
    assert state.tolist() == [7, 1]
    assert torch.equal(epsilon, sample_epsilon(make_rng_state(7), 4))
    assert output.stride() == fake.stride()
    torch.testing.assert_close(output, interpolate_reference(real, fake, make_rng_state(7)), rtol=1e-6, atol=1e-6)


def test_counters_go_round_and_captured_ones_are_never_shared(emulated_gpu, monkeypatch):
    device = torch.device("cpu")
    eager = {_launch._counter(device)[0] for _ in range(100)}
    assert len(eager) == 100
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = {_launch._counter(device)[0] for _ in range(100)}
    assert len(captured) == 100
    assert not eager & captured
    _launch._pools_ready.clear()  # the process's first call is being captured: nothing can be allocated
    address, owner = _launch._counter(device)
    assert owner is not None
    assert address == owner.data_ptr()
    assert int(owner) == 0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_public_function_hands_its_arguments_to_the_operator(monkeypatch, compiled, kind):
    """On CUDA ``gradient_penalty`` calls the operator; here it is made to, with the operator's CPU implementation."""
    monkeypatch.setattr(module, "_resolve", torch.compiler.assume_constant_result(lambda *_: "cuda"))
    torch._dynamo.reset()
    grad = gradients(4, 30)
    expected, gradient = wanted(grad, kind=kind, target=0.5)
    for weight in (10.0, torch.tensor(10.0)):
        for scale in (None, 2.0, torch.tensor(2.0)):

            def function(x, weight=weight, scale=scale):
                return gradient_penalty(x, kind=kind, weight=weight, target=0.5, loss_scale=scale)

            run = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
            leaf = grad.clone().requires_grad_()
            value = run(leaf)
            (2 * value).backward()
            assert float(value.detach()) == pytest.approx(float(expected), rel=1e-6)
            torch.testing.assert_close(leaf.grad.double(), 2 * gradient, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        assert not gradient_penalty(grad, kind=kind, weight=10.0).requires_grad
