"""The CUDA kernels on a GPU: parity with float64, determinism, streams, graphs, compilation, sanitizers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ganexport.kernels._reference import sample_epsilon
from ganexport.kernels.gradient_penalty import (
    KINDS,
    gradient_penalty,
    gradient_penalty_reference,
    interpolate,
    interpolate_reference,
    make_rng_state,
    why_not_cuda,
)

# dtype: relative L2 of the gradient against float64, of which 2^-11 and 2^-8 round one half or bfloat16 number
TOLERANCES = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4.5e-3}
# Teams of 1 to 32 lanes, blocks, clusters of 2 to 16, split reductions; aligned and not.
SHAPES = [
    (1, 1), (1000, 1), (70_000, 3), (64, 1, 28, 28), (5, 7), (33, 127), (128, 3, 32, 32), (64, 3, 64, 64),
    (16, 3, 128, 128), (4, 3, 256, 256), (2, 3, 512, 512), (3, 1, 255, 255), (2, 3, 333, 331), (1, 3, 1024, 1024),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _kernels_run_here() -> None:
    reason = why_not_cuda()
    if reason:
        pytest.fail(reason)


def gradients(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """[N, …] on the GPU with norms from 0.3 to 0.7 and 1.5 to 3, away from 1, where excess has no relative accuracy."""
    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(shape, device="cuda", generator=generator).flatten(1)
    norms = torch.rand(shape[0], device="cuda", generator=generator)
    norms = torch.where(norms < 0.5, 0.3 + 0.8 * norms, 3 * norms)
    return (values / values.norm(dim=1, keepdim=True) * norms[:, None]).view(shape).to(dtype)


def derivative(function, grad: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = grad.detach().requires_grad_()
    value = function(leaf, **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def cuda_penalty(grad: torch.Tensor, **options) -> torch.Tensor:
    return gradient_penalty(grad, **{"weight": 10.0, "impl": "cuda"} | options)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity_with_float64(shape, dtype):
    grad = gradients(shape, dtype)
    for kind in KINDS:
        poison = torch.full_like(grad, torch.nan)  # what torch.empty is likely to hand out next
        del poison
        value, gradient = derivative(cuda_penalty, grad, kind=kind)
        wanted, wanted_gradient = derivative(gradient_penalty_reference, grad.double(), kind=kind, weight=10.0)
        assert float(value) == pytest.approx(float(wanted), rel=1e-6)
        assert gradient.dtype == dtype
        assert gradient.stride() == grad.stride()
        assert relative(gradient, wanted_gradient) <= TOLERANCES[dtype], kind


def test_layouts_and_alignments():
    dense = gradients((8, 3, 32, 32))
    shifted = torch.empty(dense.numel() + 1, device="cuda")[1:].view(dense.shape).copy_(dense)
    cases = {
        "channels_last": dense.to(memory_format=torch.channels_last),
        "permuted": dense.permute(0, 2, 3, 1),
        "every other sample": gradients((16, 3, 32, 32))[::2],
        "one sample repeated": gradients((1, 3, 32, 32)).expand(8, 3, 32, 32),
        "4 bytes after a 16-byte boundary": shifted,
        "sliced within the sample": gradients((8, 3, 32, 40))[..., 4:36],
    }
    for name, grad in cases.items():
        value, gradient = derivative(cuda_penalty, grad)
        wanted, wanted_gradient = derivative(gradient_penalty_reference, grad.double(), weight=10.0)
        assert float(value) == pytest.approx(float(wanted), rel=1e-6), name
        assert relative(gradient, wanted_gradient) <= 1e-6, name


def test_zero_and_nan():
    value, gradient = derivative(cuda_penalty, torch.zeros(3, 1000, device="cuda"), weight=4.0, eps=0.0)
    assert float(value) == 4.0
    assert (gradient == 0).all()
    grad = gradients((3, 1000))
    grad[1, 7] = torch.nan
    value, gradient = derivative(cuda_penalty, grad)
    assert value.isnan()
    assert gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(1000, 5), (64, 784), (16, 3, 128, 128), (2, 3, 512, 512)], ids=str)
def test_results_repeat_bit_for_bit(shape):
    grad = gradients(shape)
    first = derivative(cuda_penalty, grad)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(derivative(cuda_penalty, grad), first, strict=True))


def test_upstream_gradients_weights_and_loss_scales():
    grad = gradients((16, 3, 32, 32))
    _, wanted = derivative(gradient_penalty_reference, grad.double(), weight=10.0)
    for weight in (10.0, torch.tensor(10.0, device="cuda")):
        for scale in (None, 4.0, torch.tensor(4.0, device="cuda")):
            leaf = grad.clone().requires_grad_()
            value = cuda_penalty(leaf, weight=weight, loss_scale=scale)
            first = torch.autograd.grad(value, leaf, torch.tensor(4.0, device="cuda"), retain_graph=True)[0]
            kept = first.clone()
            second = torch.autograd.grad(value, leaf, torch.tensor(-1.0, device="cuda"))[0]
            assert torch.equal(first, kept), "a gradient that was given away changed"
            assert relative(first, 4 * wanted) <= 1e-6
            assert relative(second, -wanted) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind):
    grad = gradients((6, 50))
    results = []
    for function, leaf in ((cuda_penalty, grad.clone()), (gradient_penalty_reference, grad.double())):
        leaf.requires_grad_()
        first = torch.autograd.grad(function(leaf, kind=kind, weight=10.0), leaf, create_graph=True)[0]
        results.append(torch.autograd.grad((first * torch.ones_like(first).cumsum(1)).sum(), leaf)[0])
    assert relative(*results) <= 1e-5


def test_gradcheck_in_the_references_precision():
    leaf = gradients((4, 30)).double().requires_grad_()
    for kind in KINDS:
        assert torch.autograd.gradcheck(lambda x, kind=kind: gradient_penalty(x, kind=kind, weight=3.0), leaf)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_operators_keep_torchs_rules():
    grad = gradients((4, 3, 8, 8)).requires_grad_()
    # Prepared for the upstream gradient that comes: otherwise the backward takes the output's memory for another one.
    arguments = (grad, None, torch.tensor(1.0, device="cuda"), 10.0, 0, 1.0, 1e-12, True)
    torch.library.opcheck(torch.ops.ganexport.gradient_penalty.default, arguments)
    images = [torch.randn(4, 3, 8, 8, device="cuda") for _ in range(2)]
    torch.library.opcheck(torch.ops.ganexport.interpolate.default, (*images, make_rng_state(0, "cuda")))


def test_nothing_waits_for_the_device():
    grad = gradients((64, 3, 64, 64)).requires_grad_()
    weight, scale = torch.tensor(10.0, device="cuda"), torch.tensor(2.0, device="cuda")
    cuda_penalty(grad).backward()
    state = make_rng_state(0, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        (2 * cuda_penalty(grad, weight=weight, loss_scale=scale)).backward()
        interpolate(grad.detach(), grad.detach(), state)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_many_streams_at_once():
    batches = [gradients((64, 784), seed=seed) for seed in range(8)]
    wanted = [float(gradient_penalty_reference(batch.double(), weight=10.0)) for batch in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    for _ in range(50):
        values = []
        for batch, stream in zip(batches, streams, strict=True):
            with torch.cuda.stream(stream):
                values.append(cuda_penalty(batch))
        torch.cuda.synchronize()
        assert [float(value) for value in values] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("shape", [(64, 784), (16, 3, 128, 128), (2, 3, 512, 512)], ids=str)
def test_graph_capture(shape):
    static = gradients(shape).requires_grad_()
    cuda_penalty(static).backward()
    static.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = cuda_penalty(static)
        gradient = torch.autograd.grad(value, static, torch.ones((), device="cuda"))[0]
    for seed in range(3):
        fresh = gradients(shape, seed=seed)
        with torch.no_grad():
            static.copy_(fresh)
        graph.replay()
        wanted, wanted_gradient = derivative(gradient_penalty_reference, fresh.double(), weight=10.0)
        assert float(value) == pytest.approx(float(wanted), rel=1e-6)
        assert relative(gradient, wanted_gradient) <= 1e-6


def test_two_graphs_and_eager_calls_together():
    batches = [gradients((64, 784), seed=seed) for seed in range(3)]
    wanted = [float(gradient_penalty_reference(batch.double(), weight=10.0)) for batch in batches]
    cuda_penalty(batches[0])
    graphs, values = [], []
    for batch in batches[:2]:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            values.append(cuda_penalty(batch))
    streams = [torch.cuda.Stream() for _ in range(3)]
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            eager = cuda_penalty(batches[2])
        torch.cuda.synchronize()
        assert [float(v) for v in (*values, eager)] == pytest.approx(wanted, rel=1e-6)


def test_the_first_call_of_a_process_may_be_captured():
    code = (
        "import torch; from ganexport.kernels.gradient_penalty import *; x = torch.ones(4, 100, device='cuda')\n"
        "g = torch.cuda.CUDAGraph()\n"
        "with torch.cuda.graph(g): v = gradient_penalty(x, weight=1.0, impl='cuda')\n"
        "for _ in range(3):\n    v.fill_(0); g.replay(); assert abs(v.item() - 81.0) < 1e-3, v.item()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_interpolation(dtype):
    for shape in ((1000, 1), (64, 1, 28, 28), (5, 7, 11), (16, 3, 128, 128)):
        real, fake = torch.randn(shape, device="cuda").to(dtype), torch.randn(shape, device="cuda").to(dtype)
        state = make_rng_state(7, "cuda")
        output, epsilon = torch.ops.ganexport.interpolate(real, fake, state)
        assert state.tolist() == [7, 1]
        assert torch.equal(epsilon.cpu(), sample_epsilon(make_rng_state(7), shape[0]))
        wanted = interpolate_reference(real, fake, make_rng_state(7, "cuda"))
        torch.testing.assert_close(output, wanted, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_a_replayed_interpolation_draws_anew():
    real, fake = torch.ones(8, 4, device="cuda"), torch.zeros(8, 4, device="cuda")
    state = make_rng_state(3, "cuda")
    interpolate(real, fake, state, impl="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = interpolate(real, fake, state, impl="cuda")
    state.copy_(make_rng_state(3))
    eager = make_rng_state(3)
    for _ in range(4):
        graph.replay()
        assert torch.equal(output.cpu(), interpolate(real.cpu(), fake.cpu(), eager))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_critic_step(mode, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.LeakyReLU(0.2), torch.nn.Flatten(), torch.nn.Linear(8 * 900, 1)]
    critic = torch.nn.Sequential(*layers).cuda()
    images = torch.randn(4, 3, 32, 32, device="cuda")
    weight = torch.tensor(10.0, device="cuda")

    def step(x, impl):
        grad = torch.func.grad(lambda y: critic(y).sum())(x)
        return gradient_penalty(grad, weight=weight, impl=impl)

    compiled = torch.compile(step, fullgraph=True, mode=mode)
    step(images, "reference").backward()
    wanted = [p.grad.clone() for p in critic.parameters() if p.grad is not None]
    for scale in (1.0, 1.0, 0.5):
        critic.zero_grad()
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        (compiled(images, "cuda") * scale).backward()
        got = [p.grad for p in critic.parameters() if p.grad is not None]
        assert len(got) == len(wanted) > 0
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b * scale, rtol=1e-3, atol=1e-4)  # convolutions reorder their sums


@pytest.mark.parametrize(("samples", "elements"), [(3, (1 << 30) + 8), ((1 << 31) + 5, 1)])
def test_more_than_2_to_the_31_elements(samples, elements):
    free, _ = torch.cuda.mem_get_info()
    needed = samples * elements * 4 + samples * 16 + (2 << 30)
    if free < needed:
        pytest.skip(f"{needed >> 30} GiB of GPU memory are needed, {free >> 30} are free")
    grad = torch.full((samples, elements), 2.0 if elements == 1 else 2.0**-14, dtype=torch.bfloat16, device="cuda")
    value, gradient = derivative(cuda_penalty, grad, weight=1.0)
    norm = 2.0 if elements == 1 else (elements**0.5) * 2.0**-14
    assert float(value) == pytest.approx((norm - 1) ** 2, rel=1e-5)
    slope = 2 * (norm - 1) / norm / samples * float(grad[0, 0])
    ends = torch.stack([gradient[0, 0], gradient[-1, -1], gradient[samples // 2, elements // 2]])
    assert ends.tolist() == pytest.approx([slope] * 3, rel=2.0**-7)
