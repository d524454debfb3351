"""The CUDA kernels' own source on an emulated GPU, against float64: values, bytes moved, order, bounds."""

from __future__ import annotations

import ctypes

import emulated
import numpy as np
import pytest
import torch
from emulated import KINDS, Machine
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ganexport.kernels._launch import InterpolateArguments, PenaltyArguments
from ganexport.kernels._reference import sample_epsilon

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# dtype: relative L2 error of dg, of which 2^-11 and 2^-8 are the rounding of one half or bfloat16 number
GRADIENT_TOLERANCE = {"float32": 1e-6, "float16": 6e-4, "bfloat16": 4.5e-3}
PENALTY_TOLERANCE = 1e-6  # fp32 sums of non-negative terms, in a tree


def machine(
    seed: int = 0, *, cluster: int = 4, threads: int = 64, window: int = 3, sms: int = 4, l2: int = 1 << 16
) -> Machine:
    return Machine(
        l2_bytes=l2, multiprocessors=sms, max_cluster=cluster, threads_limit=threads, window=window, seed=seed
    )


def expected(
    values: np.ndarray, kind: str, weight: float, target: float, eps: float, scale: float
) -> tuple[float, np.ndarray]:
    """Penalty and gradient in float64, from the formulas."""
    sums = (values**2).sum(1)  # [N]
    if kind == "r1":
        return weight * sums.mean() / 2, values * (weight * scale / len(values))
    norms = np.sqrt(sums + eps)  # [N]
    excess = norms - target if kind == "two-sided" else np.maximum(0, norms - target)  # [N]
    slopes = np.divide(2 * excess, norms, out=np.zeros_like(norms), where=norms > 0)  # [N]
    return weight * (excess**2).mean(), slopes[:, None] * values * (weight * scale / len(values))


def sample_values(samples: int, elements: int, dtype: str, seed: int, spread: float = 1.0) -> np.ndarray:
    """[N, M] with norms from 0.3 to 3 times ``spread``, away from 1, where excess has no relative accuracy."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(samples, elements))
    norms = np.where(rng.random(samples) < 0.5, rng.uniform(0.3, 0.7, samples), rng.uniform(1.5, 3.0, samples))
    values *= (spread * norms / np.linalg.norm(values, axis=1))[:, None]
    return emulated.decode(emulated.encode(values, dtype), dtype)


def check(result: emulated.Result, values: np.ndarray, dtype: str, kind: str, weight: float, scale: float) -> None:
    penalty, gradient = expected(values, kind, weight, 1.0, 1e-12, scale)
    assert result.penalty == pytest.approx(penalty, rel=PENALTY_TOLERANCE, abs=1e-12)
    np.testing.assert_allclose(result.sums, (values**2).sum(1), rtol=1e-6)
    assert result.scalars == (np.float32(weight), np.float32(scale))
    error = np.linalg.norm(result.gradient - gradient)
    # Subnormal halves have an absolute step of 2^-24 instead of a relative one.
    floor = 2.0**-25 * np.sqrt(values.size) if dtype == "float16" else 0.0
    assert error <= GRADIENT_TOLERANCE[dtype] * np.linalg.norm(gradient) + floor


# Sizes at the seams: words of 16 bytes, held words a lane, a warp's run (256 words), a block's 64 threads, clusters.
SIZES = st.one_of(
    st.integers(1, 70),
    st.sampled_from([127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 8191, 8192]),
    st.integers(1, 2500).map(lambda n: 8 * n),
    st.integers(71, 20_000),
)


@settings(max_examples=150, deadline=None)
@given(
    samples=st.integers(1, 9),
    elements=SIZES,
    dtype=st.sampled_from(list(BYTES)),
    kind=st.sampled_from(KINDS),
    cluster=st.sampled_from([1, 2, 4, 8]),
    window=st.integers(1, 6),
    offset=st.sampled_from([0, 0, 0, 1, 3]),
    gap=st.sampled_from([0, 0, 0, 1, 8]),
    seed=st.integers(0, 1 << 16),
)
@example(samples=1, elements=1, dtype="float32", kind="two-sided", cluster=1, window=1, offset=0, gap=0, seed=0)
@example(samples=9, elements=20_000, dtype="float32", kind="two-sided", cluster=1, window=1, offset=0, gap=0, seed=0)
@example(samples=2, elements=16_384, dtype="float32", kind="r1", cluster=8, window=1, offset=0, gap=0, seed=0)
def test_penalty_and_gradient_are_float64s(samples, elements, dtype, kind, cluster, window, offset, gap, seed):
    values = sample_values(samples, elements, dtype, seed, 1.0)
    result = emulated.penalty(
        values, dtype, machine(seed, cluster=cluster, window=window), kind=kind, weight=10.0, offset=offset, gap=gap
    )
    check(result, values, dtype, kind, 10.0, 1.0)
    size = values.size * BYTES[dtype]
    assert result.traffic.launches == 1
    assert result.traffic.loaded == (2 * size if result.plan["split"] else size)
    assert result.traffic.stored == size


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(1, 300), elements=st.integers(1, 40), seed=st.integers(0, 1 << 16))
def test_many_tiny_samples(samples, elements, seed):
    values = sample_values(samples, elements, "float32", seed)
    result = emulated.penalty(values, "float32", machine(seed, window=5), weight=1.0)
    check(result, values, "float32", "two-sided", 1.0, 1.0)
    assert result.plan["team"] <= 32


@pytest.mark.parametrize("cluster", [1, 8])
@pytest.mark.parametrize("elements", [5, 1024, 20_000])
def test_results_repeat_bit_for_bit_in_any_order(cluster, elements):
    values = sample_values(7, elements, "float32", 1)
    runs = [emulated.penalty(values, "float32", machine(seed, cluster=cluster, window=1 + seed)) for seed in range(5)]
    for run in runs[1:]:
        assert run.penalty == runs[0].penalty
        assert (run.sums == runs[0].sums).all()
        assert (run.gradient_bits == runs[0].gradient_bits).all()


@pytest.mark.parametrize(("elements", "path"), [(100, "team"), (2048, "block"), (8192, "cluster"), (40_000, "split")])
@pytest.mark.parametrize("dtype", list(BYTES))
def test_every_path_with_weight_and_loss_scale_from_the_device(elements, path, dtype):
    values = sample_values(5, elements, dtype, 3)
    # As many samples as multiprocessors: no reason to spread one that fits into a block.
    result = emulated.penalty(values, dtype, machine(sms=5), weight=2.0, weight_tensor=5.0, loss_scale=64.0)
    check(result, values, dtype, "two-sided", 10.0, 64.0)
    plan = result.plan
    taken = "split" if plan["split"] else "team" if plan["team"] else "cluster" if plan["ranks"] > 1 else "block"
    if dtype == "float32":
        assert taken == path


@pytest.mark.parametrize("elements", [100, 4096, 40_000])
def test_value_alone_reads_once_and_writes_nothing(elements):
    values = sample_values(5, elements, "float32", 3)
    result = emulated.penalty(values, "float32", machine(), gradient=False)
    assert result.penalty == pytest.approx(expected(values, "two-sided", 1.0, 1.0, 1e-12, 1.0)[0], rel=1e-6)
    assert result.traffic.loaded == values.size * 4
    assert result.traffic.stored == 0


@pytest.mark.parametrize("elements", [3, 1000, 40_000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", [0.0, 1e-12])
def test_zero_gradients_have_the_defined_value(elements, kind, eps):
    result = emulated.penalty(np.zeros((3, elements)), "float32", machine(), kind=kind, eps=eps, weight=4.0)
    assert result.penalty == pytest.approx({"two-sided": 4.0, "one-sided": 0.0, "r1": 0.0}[kind], rel=1e-5)
    assert (result.gradient == 0).all()


@pytest.mark.parametrize("elements", [3, 1000, 40_000])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_never_hidden_and_stays_in_its_sample(elements, kind):
    values = sample_values(3, elements, "float32", 0)
    values[1, elements // 2] = np.nan
    result = emulated.penalty(values, "float32", machine(), kind=kind)
    assert np.isnan(result.penalty)
    assert np.isnan(result.gradient[1, elements // 2])
    assert np.isfinite(result.gradient[[0, 2]]).all()


def test_sums_beyond_float32_leave_a_finite_gradient():
    result = emulated.penalty(np.full((2, 64), 1e25), "float32", machine())
    assert np.isinf(result.penalty)
    np.testing.assert_allclose(result.gradient, 1e25, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 40),
    elements=st.integers(1, 500),
    dtype=st.sampled_from(list(BYTES)),
    kind=st.sampled_from(KINDS),
    offset=st.sampled_from([0, 0, 1]),
    seed=st.integers(0, 1 << 16),
)
def test_backward_makes_the_gradient_for_any_upstream(samples, elements, dtype, kind, offset, seed):
    values = sample_values(samples, elements, dtype, seed)
    forward = emulated.penalty(values, dtype, machine(seed), kind=kind, weight=10.0, loss_scale=8.0, offset=offset)
    settings_ = {"sums": forward.sums, "weight": 10.0, "loss_scale": 8.0, "kind": kind, "offset": offset}
    _, kept, traffic = emulated.backward(
        values, dtype, machine(seed), upstream=8.0, prepared=forward.gradient_bits, **settings_
    )
    assert (kept == forward.gradient_bits).all()
    assert (traffic.loaded, traffic.stored) == (0, 0)  # the prepared gradient isn't touched
    for prepared in (forward.gradient_bits, None):
        gradient, _, traffic = emulated.backward(
            values, dtype, machine(seed), upstream=-0.5, prepared=prepared, **settings_
        )
        wanted = expected(values, kind, 10.0, 1.0, 1e-12, -0.5)[1]
        floor = 2.0**-25 * np.sqrt(values.size) if dtype == "float16" else 0.0
        assert np.linalg.norm(gradient - wanted) <= GRADIENT_TOLERANCE[dtype] * np.linalg.norm(wanted) + floor
        assert (traffic.loaded, traffic.stored) == (values.size * BYTES[dtype],) * 2


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(1, 400),
    elements=st.integers(1, 60) | st.sampled_from([1024, 3000]),
    dtype=st.sampled_from(list(BYTES)),
    offset=st.sampled_from([0, 0, 1]),
    key=st.integers(-(1 << 63), (1 << 63) - 1),
    position=st.integers(0, 1 << 40),
)
def test_interpolation_draws_the_references_epsilon(samples, elements, dtype, offset, key, position):
    samples = min(samples, 60_000 // elements)
    rng = np.random.default_rng(samples)
    real, fake = (
        emulated.decode(emulated.encode(rng.normal(size=(samples, elements)), dtype), dtype) for _ in range(2)
    )
    state = np.array([key, position], np.int64)
    wanted = sample_epsilon(torch.from_numpy(state.copy()), samples).numpy()
    output, epsilon, traffic = emulated.interpolate(real, fake, dtype, machine(), state, offset)
    np.testing.assert_array_equal(epsilon, wanted)
    assert state.tolist() == [key, position + 1]
    mixed = fake + wanted[:, None].astype(np.float64) * (real - fake)
    rounding = {"float32": 2e-7, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    np.testing.assert_allclose(output, mixed, rtol=rounding, atol=rounding * 8)
    assert (traffic.loaded, traffic.stored) == (2 * fake.size * BYTES[dtype], fake.size * BYTES[dtype])


def test_the_h200s_own_plans():
    """What runs for the sizes of the benchmark: 132 multiprocessors, clusters of 16, 50 MB of L2, 512 threads."""
    hopper = Machine(l2_bytes=50 << 20, multiprocessors=132, max_cluster=16, threads_limit=512, window=1, seed=0)
    older = Machine(l2_bytes=40 << 20, multiprocessors=108, max_cluster=1, threads_limit=512, window=1, seed=0)

    def plan(samples: int, elements: int, gpu: Machine = hopper, dtype: int = 0) -> dict[str, int]:
        arguments = PenaltyArguments(
            gradient=1 << 8, samples=samples, elements=elements, sample_stride=elements, dtype=dtype
        )
        return emulated.plan_of(arguments, gpu)

    assert plan(64, 28 * 28)["team"] == 32
    assert plan(128, 3 * 32 * 32)["ranks"] <= 2
    for resolution, ranks in ((128, 4), (256, 16)):
        chosen = plan(256, 3 * resolution**2)
        assert (chosen["split"], chosen["ranks"]) == (0, ranks)
    assert plan(256, 3 * 256**2, dtype=1)["ranks"] == 8
    assert plan(32, 3 * 1024**2)["split"] == 1
    assert plan(256, 3 * 128**2, older)["split"] == 1
    for chosen in (plan(32, 3 * 1024**2), plan(32, 3 * 512**2), plan(64, 3 * 256**2, older)):
        assert chosen["lag"] >= chosen["chunks"] + 1
        assert chosen["lag"] * 64 * 1024 <= 40 << 20, "first and second read must both find g in L2"


@pytest.mark.parametrize("elements", [25_000, 40_000])
def test_full_blocks_of_512_threads_in_clusters(elements):
    values = sample_values(1, elements, "float32", 5)
    gpu = Machine(l2_bytes=1 << 20, multiprocessors=2, max_cluster=4, threads_limit=512, window=2, seed=5)
    result = emulated.penalty(values, "float32", gpu, weight=10.0)
    assert result.plan["ranks"] > 1
    check(result, values, "float32", "two-sided", 10.0, 1.0)


def test_argument_structures_agree_with_the_c_header():
    library = emulated.library()
    assert library.emulated_penalty_arguments_size() == ctypes.sizeof(PenaltyArguments)
    assert library.emulated_interpolate_arguments_size() == ctypes.sizeof(InterpolateArguments)


# What an author could get wrong, and the kernel's source with that mistake made.
MISTAKES = {
    "no barrier between a block's partial sums and their use": (
        "device.cuh", "slots[threadIdx.x / kWarp] = value;\n  __syncthreads();", "slots[threadIdx.x / kWarp] = value;"
    ),
    "a block leaves while its cluster still reads its sum": (
        "gradient_penalty.cuh", "if (!Team && p.ranks > 1) cluster_wait();", ""
    ),
    "one word too many": ("gradient_penalty.cuh", "p.words) - first : 0;", "p.words) - first + 1 : 0;"),
    "chunks are scaled before their sample's sum is known": (
        "gradient_penalty.cuh", "while (*static_cast<volatile unsigned*>(p.ready + sample) == 0)", "while (false)"
    ),
    "a sample's last chunk may be read first after it was waited for": (
        "plan.h", "plan.lag = plan.chunks + ", "plan.lag = 0 * "
    ),
    "the counter is left as it is": ("gradient_penalty.cuh", "*p.counter = 0;", ""),
    "the offset is not advanced": ("interpolation.cuh", "offset + 1", "offset"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_emulation_notices_mistakes(mistake, monkeypatch, tmp_path):
    broken = emulated.build(emulated.copy_with_mistake(tmp_path, *MISTAKES[mistake]))
    monkeypatch.setattr(emulated, "library", lambda: broken)

    def exercise() -> None:
        for seed in range(4):
            for elements, cluster in ((100, 1), (8192, 8), (30_000, 1)):
                values = sample_values(4, elements, "float32", seed)
                # An L2 that leaves a chunk's second read only one chunk behind the sample's last first read.
                gpu = machine(seed, cluster=cluster, window=2, sms=2, l2=3 * 16 * 8192)
                result = emulated.penalty(values, "float32", gpu, weight=10.0)
                check(result, values, "float32", "two-sided", 10.0, 1.0)
            state = np.array([1, 2], np.int64)
            emulated.interpolate(values, values, "float32", machine(seed), state)
            assert state[1] == 3

    with pytest.raises(AssertionError):
        exercise()
