"""The seed contract, against published vectors, an independent scalar implementation and golden values."""

from __future__ import annotations

import json
import math
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ganexport
from ganexport.errors import UsageError
from ganexport.seeding import Sampling, _philox, batched, latents, normal_below, normal_quantile, philox, stream_of
from ganexport.seeding._transforms import random_values
from ganexport.spec import Dim, GeneratorSpec, Normal, TensorSpec, parse_input

GOLDEN = json.loads((Path(__file__).parent / "seeding_golden.json").read_text())


def spec_of(*inputs: str, outputs: tuple[TensorSpec, ...] = (), dims: tuple[Dim, ...] = (Dim("batch"),)):
    return GeneratorSpec(tuple(parse_input(text) for text in inputs), outputs, dims)


# ---- an implementation of docs/seed-contract.md in plain Python, one number at a time ---------------

DOC = (Path(__file__).parent.parent / "docs" / "seed-contract.md").read_text()


def doc_tables() -> list[list[float]]:
    """The polynomials A … F as the document prints them."""
    rows = [
        line.strip("| ").split("|") for line in DOC.splitlines() if line.startswith(tuple(f"| {k} |" for k in range(8)))
    ]
    assert len(rows) == 24
    return [[float(row[column]) for row in rows[block * 8 : block * 8 + 8]] for block in range(3) for column in (1, 2)]


A, B, C, D, E, F = doc_tables()


def scalar_word(seed: int, name: str, i: int, e: int) -> int:
    h = 0x811C9DC5
    for byte in name.encode():
        h = ((h ^ byte) * 0x01000193) % 2**32
    c0, c1, c2, c3 = e // 4, h, i % 2**32, i // 2**32
    k0, k1 = seed % 2**32, seed // 2**32
    for _ in range(10):
        x, y = c2 * 0xCD9E8D57, c0 * 0xD2511F53
        c0, c1, c2, c3 = (x >> 32) ^ c1 ^ k0, x % 2**32, (y >> 32) ^ c3 ^ k1, y % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return (c0, c1, c2, c3)[e % 4]


def horner(table: list[float], r: float) -> float:
    value = table[7]
    for coefficient in table[6::-1]:
        value = value * r + coefficient
    return value


def scalar_log(x: float) -> float:
    f, k = math.frexp(x)
    if f < 0.7071067811865476:
        f, k = f + f, k - 1
    s = (f - 1) / (f + 1)
    z = s * s
    value = 2 / 15
    for divisor in (13, 11, 9, 7, 5, 3, 1):
        value = value * z + 2 / divisor
    return value * s + k * 0.6931471805599453


def scalar_quantile(p: float) -> float:
    q = p - 0.5
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        return (horner(A, r) / horner(B, r)) * q
    r = math.sqrt(-scalar_log(min(p, 1 - p)))
    x = horner(C, r - 1.6) / horner(D, r - 1.6) if r <= 5 else horner(E, r - 5) / horner(F, r - 5)
    return -x if q < 0 else x


def scalar_normal(word: int, mean: float = 0.0, std: float = 1.0, t: float | None = None) -> float:
    p = (word + 0.5) * 2.0**-32
    if t is not None:
        low, high = 0.0, 0.5
        for _ in range(60):
            middle = (low + high) * 0.5
            low, high = (middle, high) if scalar_quantile(middle) < -t else (low, middle)
        p = p * ((1 - high) - high) + high
    x = scalar_quantile(p)
    if t is not None:
        x = min(max(x, -t), t)
    x = x * std if std != 1 else x
    x = x + mean if mean != 0 else x
    return struct.unpack("f", struct.pack("f", x))[0]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    start=st.integers(0, 2**64 - 20),
    n=st.integers(1, 9),
    size=st.integers(1, 130),
    name=st.sampled_from(["z", "noise.0", "latent_code", "w"]),
    t=st.sampled_from([None, 0.3, 1.0, 2.5]),
)
def test_normal_and_uniform_match_the_document(seed, start, n, size, name, t):
    spec = spec_of(f"{name}=normal(0.5,2)[batch,{size}]", f"u=uniform(-3,7)[batch,{size}]")
    drawn = latents(spec, seed, start, n, truncation=t)
    row, e = n - 1, size - 1
    wanted = scalar_normal(scalar_word(seed, name, start + row, e), 0.5, 2.0, t)
    assert drawn[name].dtype == np.float32
    assert drawn[name][row, e] == np.float32(wanted)
    word = scalar_word(seed, "u", start, e)
    assert drawn["u"][0, e] == np.float32((word // 256) * 2.0**-24 * 10.0 + -3.0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), start=st.integers(0, 2**63), classes=st.integers(1, 2**31 - 1))
def test_labels_match_the_document(seed, start, classes):
    drawn = latents(spec_of(f"y=label({classes})[batch]", "c=onehot(7)[batch,3,7]"), seed, start, 2)
    assert drawn["y"].dtype == np.int64
    assert drawn["y"].tolist() == [scalar_word(seed, "y", start + j, 0) * classes // 2**32 for j in range(2)]
    assert drawn["c"].shape == (2, 3, 7)
    assert drawn["c"].sum(axis=-1).tolist() == [[1.0] * 3] * 2
    assert drawn["c"][1].argmax(axis=-1).tolist() == [
        scalar_word(seed, "c", start + 1, e) * 7 // 2**32 for e in range(3)
    ]


# ---- published and committed vectors -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "output"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, output, monkeypatch):
    seed, index = key[0] | key[1] << 32, counter[2] | counter[3] << 32
    # In use the block counter starts at zero; the published vectors start elsewhere.
    product = counter[0] * _philox._MULTIPLIERS[0]
    monkeypatch.setattr(_philox, "_lanes", lambda _blocks: (1, 0xFFFFFFFF, product >> 32, product & 0xFFFFFFFF))
    assert _philox._philox_in_lanes(seed, counter[1], index, 1)[0].tolist() == output
    real, blocks = np.arange, np.array([counter[0]], np.uint64)
    monkeypatch.setattr(np, "arange", lambda *a, **k: blocks if a == (1,) else real(*a, **k))
    words = np.empty((1, 1, 4), np.uint32)
    _philox._philox_into(words, np.array([seed], np.uint64), counter[1], np.array([index], np.uint64))
    assert words[0, 0].tolist() == output


def test_both_ways_of_computing_philox_agree():
    seeds = np.array([3, 2**64 - 1, 12345678901234567890], np.uint64)
    indices = np.array([0, 2**63 + 5, 7], np.uint64)
    for blocks in (1, 3, 160, 161):
        together = philox(seeds, 9, indices, blocks)
        for row in range(3):
            assert np.array_equal(philox(seeds[row : row + 1], 9, indices[row : row + 1], blocks)[0], together[row])


def test_fnv1a_gives_its_published_values():
    assert [stream_of(""), stream_of("a"), stream_of("foobar")] == [0x811C9DC5, 0xE40C292C, 0xBF9CF968]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: c["title"])
def test_golden_vectors(case):
    dims = tuple(Dim(*d) for d in case.get("dims", [["batch", 1, 8, 64]]))
    drawn = latents(spec_of(*case["inputs"], dims=dims), **case["arguments"])
    for name, wanted in case["outputs"].items():
        array = drawn[name]
        assert [str(array.dtype), list(array.shape)] == [wanted["dtype"], wanted["shape"]]
        assert array.reshape(-1)[: len(wanted["bytes"]) // array.itemsize // 2].tobytes().hex() == wanted["bytes"]


# High-precision values of the standard normal quantile (40 digits of mpmath, rounded to 17).
@pytest.mark.parametrize(
    ("p", "x"),
    [
        (1e-300, -37.047096299361203),
        (1e-20, -9.2623400897984082),
        (2.0**-33, -6.3379577545537897),
        (1e-5, -4.2648907939228246),
        (0.01, -2.3263478740408412),
        (0.0749, -1.4402382675279628),
        (0.2, -0.84162123357291442),
        (0.5, 0.0),
        (0.6, 0.25334710313579972),
        (0.93, 1.4757910281791711),
    ],
)
def test_the_quantile_is_accurate(p, x):
    assert normal_quantile(np.array([p]))[0] == pytest.approx(x, rel=1e-13, abs=0)


def test_the_probability_of_the_tail_is_accurate():
    for t in (0.01, 0.5, 1.0, 2.0, 4.0):
        assert normal_below(t) == pytest.approx(math.erfc(t / math.sqrt(2)) / 2, rel=1e-12)


def test_moments_and_independence():
    z = latents(spec_of("z=normal[batch,100]"), 11, 0, 20_000)["z"].astype(np.float64)
    count = z.size
    assert abs(z.mean()) < 5 / math.sqrt(count)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / count)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / count)
    below = [(z < x).mean() for x in (-3, -1.5, 0.2, 2.5)]
    truth = [math.erfc(-x / math.sqrt(2)) / 2 for x in (-3, -1.5, 0.2, 2.5)]
    assert np.allclose(below, truth, atol=5 * 0.5 / math.sqrt(count))
    for other in (np.roll(z, 1, axis=0), np.roll(z, 1, axis=1)):
        assert abs((z * other).mean()) < 5 / math.sqrt(count)
    neighbours = latents(spec_of("z=normal[batch,100]"), 12, 0, 20_000)["z"]
    assert abs((z * neighbours).mean()) < 5 / math.sqrt(count)
    assert not np.array_equal(z[0], latents(spec_of("w=normal[batch,100]"), 11, 0, 1)["w"][0])


def test_truncated_moments():
    t = 1.0
    z = latents(spec_of("z=normal[batch,100]"), 5, 0, 5_000, truncation=t)["z"].astype(np.float64)
    density = math.exp(-0.5) / math.sqrt(2 * math.pi)
    variance = 1 - 2 * t * density / (1 - 2 * normal_below(t))
    assert np.abs(z).max() <= t
    assert abs(z.mean()) < 5 * math.sqrt(variance / z.size)
    assert abs(z.var() - variance) < 5 * math.sqrt(1 / z.size)


# ---- the promise -------------------------------------------------------------------------------------


def test_sample_123_of_seed_7_is_the_same_alone_and_in_any_batch():
    spec = spec_of("z=normal[batch,100]", "y=label(10)[batch]", "u=uniform[batch,5]", "c=onehot(10)[batch,10]")
    alone = latents(spec, 7, 123, 1)
    for batch in (64, 1000):
        start = 123 // batch * batch
        within = latents(spec, 7, start, batch)
        for name, array in alone.items():
            assert within[name][123 - start].tobytes() == array[0].tobytes()


def test_one_seed_an_image_is_the_first_image_of_each_seed():
    spec = spec_of("z=normal[batch,100]")
    several = latents(spec, seeds=[7, 2**64 - 1, 7])["z"]
    assert np.array_equal(several[0], latents(spec, 7)["z"][0])
    assert np.array_equal(several[1], latents(spec, 2**64 - 1)["z"][0])
    assert np.array_equal(several[2], several[0])
    later = latents(spec, seeds=[7], start=5)["z"]
    assert np.array_equal(later, latents(spec, 7, 5, 1)["z"])


def test_large_draws_equal_small_ones_across_the_chunks():
    spec = spec_of("z=normal[batch,3,33]")
    many = latents(spec, 1, 0, 700, truncation=1.5)["z"]
    for i in (0, 81, 82, 83, 248, 699):
        assert many[i].tobytes() == latents(spec, 1, i, 1, truncation=1.5)["z"][0].tobytes()


def test_uniform_stays_below_its_end_after_rounding():
    u = latents(spec_of("u=uniform(100,101)[batch,1000]"), 0, 0, 200)["u"]
    assert u.min() >= 100
    assert u.max() < 101


def test_the_batch_axis_may_be_anywhere_and_shared_inputs_are_sample_zero():
    spec = spec_of("z=normal[4,batch,3]", "noise=normal[1,5]", "strength=constant(0.25)[1]")
    drawn = latents(spec, 3, 10, 2)
    straight = latents(spec_of("z=normal[batch,4,3]"), 3, 10, 2)["z"]
    assert np.array_equal(drawn["z"], np.moveaxis(straight, 0, 1))
    assert np.array_equal(drawn["noise"], latents(spec_of("noise=normal[batch,5]"), 3, 0, 1)["noise"])
    assert drawn["strength"].tolist() == [0.25]
    with pytest.raises(UsageError, match="share it"):
        latents(spec, seeds=[1, 2])


def test_fixed_shapes_count_samples_along_the_first_axis():
    fixed = spec_of("z=normal[4,6]", outputs=(TensorSpec("x", "float32", (4, 2)),), dims=())
    assert batched(fixed).batch == Dim("batch", 4, 4, 4)
    assert np.array_equal(latents(fixed, 1, 2, 3)["z"], latents(spec_of("z=normal[batch,6]"), 1, 2, 3)["z"])
    unclear = spec_of("z=normal[4,6]", "y=normal[5,6]", dims=())
    assert batched(unclear) is unclear
    with pytest.raises(UsageError, match="no batch dimension"):
        latents(unclear, n=2)


def test_dtypes():
    spec = spec_of("a=normal[batch,2]:float16", "b=uniform(0,256)[batch,50]:uint8", "c=label(5)[batch,1]:int32")
    drawn = latents(spec, 0, 0, 4)
    assert [str(drawn[k].dtype) for k in "abc"] == ["float16", "uint8", "int32"]
    assert drawn["c"].shape == (4, 1)
    assert len(set(drawn["b"].reshape(-1).tolist())) > 100


def test_labels_may_be_given():
    spec = spec_of("y=label(10)[batch]", "z=normal[batch,2]")
    assert latents(spec, n=3, labels=4)["y"].tolist() == [4, 4, 4]
    assert latents(spec, n=3, labels=[1, 2, 3])["y"].tolist() == [1, 2, 3]
    assert all(array.flags.writeable for array in latents(spec, n=1, labels=3).values())
    assert latents(spec, n=2, labels=np.array([1, 9]))["y"].tolist() == [1, 9]
    onehot = latents(spec_of("c=onehot(3)[batch,3]"), n=2, labels=[0, 2])["c"]
    assert onehot.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert np.array_equal(latents(spec, n=3, labels=4)["z"], latents(spec, n=3)["z"])


def test_a_truncation_input_is_fed_and_the_latents_stay_whole():
    spec = spec_of("z=normal[batch,8]", "truncation=constant(1)[1]")
    drawn = latents(spec, n=2, truncation=0.5)
    assert drawn["truncation"].tolist() == [0.5]
    assert np.array_equal(drawn["z"], latents(spec, n=2)["z"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "allowed are 0 to 2"),
        ({"seed": 1.0}, "not a whole number"),
        ({"seed": True}, "not a whole number"),
        ({"start": -1}, "start is -1"),
        ({"n": 0}, "count is 0"),
        ({"n": -5}, "count is -5"),
        ({"start": 2**64 - 1, "n": 2}, "beyond sample"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [1, -1]}, "seed is -1"),
        ({"labels": 10}, "label is 10, allowed are 0 to 9"),
        ({"labels": -1}, "label is -1"),
        ({"labels": [1, 2, 3]}, "3 labels for 1 samples"),
        ({"labels": "cat"}, "not a whole number"),
        ({"labels": {"x": 1}}, "no label input 'x'"),
        ({"truncation": 0}, "allowed are"),
        ({"truncation": float("nan")}, "allowed are"),
        ({"truncation": "much"}, "not a number"),
        ({"sizes": {"height": 3}}, "no dimension 'height'"),
    ],
)
def test_what_is_out_of_range_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        latents(spec_of("z=normal[batch,2]", "y=label(10)[batch]"), **arguments)


@pytest.mark.parametrize(
    ("text", "dtype", "fits"),
    [
        ("y=label(256)[batch]", "uint8", True),
        ("y=label(257)[batch]", "uint8", False),
        ("y=label(129)[batch]", "int8", False),
        ("y=label(2049)[batch]", "float16", True),
        ("y=label(4097)[batch]", "float16", False),
        ("y=label(2)[batch]", "bool", True),
        ("y=label(3)[batch]", "bool", False),
        ("t=constant(255)[batch]", "uint8", True),
        ("t=constant(256)[batch]", "uint8", False),
        ("t=constant(-1)[batch]", "uint8", False),
        ("t=constant(0.5)[batch]", "int64", False),
        ("t=constant(1e6)[batch]", "float16", False),
        ("u=uniform(0,256)[batch]", "uint8", True),
        ("u=uniform(0,300)[batch]", "uint8", False),
        ("u=uniform(-1e5,1e5)[batch]", "float16", False),
    ],
)
def test_what_a_dtype_cannot_hold_is_refused_instead_of_wrapping_around(text, dtype, fits):
    spec = spec_of(text)
    spec = msgspec.structs.replace(spec, inputs=(msgspec.structs.replace(spec.inputs[0], dtype=dtype),))
    if fits:
        assert latents(spec, n=3)[text[0]].dtype == dtype
    else:
        with pytest.raises(UsageError, match=f"does not fit dtype {dtype}"):
            latents(spec, n=3)


def test_inputs_without_a_sampler_or_labels_are_refused_by_name():
    with pytest.raises(UsageError, match="'image' has no sampler"):
        latents(spec_of("image=data[batch,3]"))
    with pytest.raises(UsageError, match="takes no labels"):
        latents(spec_of("z=normal[batch,3]"), labels=1)
    with pytest.raises(UsageError, match="neither a normal input"):
        latents(spec_of("u=uniform[batch,3]"), truncation=1.0)
    with pytest.raises(UsageError, match="several inputs are labels"):
        latents(spec_of("a=label(3)[batch]", "b=label(3)[batch]"), labels=1)


def test_a_sampling_can_be_kept_and_reused():
    spec = spec_of("z=normal[batch,8]")
    sampling = Sampling(spec)
    assert np.array_equal(sampling.draw(3, 4, 5)["z"], latents(spec, 3, 4, 5)["z"])
    assert ganexport.latents is latents


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("truncation", [None, 0.02, 0.7, 8.0])
def test_short_arrays_take_another_way_to_the_same_bits(truncation) -> None:
    random = np.random.default_rng(4)
    corners = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)
    words = np.concatenate([corners, random.integers(0, 2**32, 20_000, np.uint32), 2 ** np.arange(32, dtype=np.uint32)])
    whole = random_values(Normal(), words[None], truncation)[0]
    for size in (1, 5, 100, 511, 512, 513):
        pieces = [random_values(Normal(), words[None, b : b + size], truncation)[0] for b in range(0, 3000, size)]
        joined = np.concatenate(pieces)
        np.testing.assert_array_equal(joined.view(np.uint32), whole[: joined.size].view(np.uint32))


def test_what_was_drawn_is_the_caller_s_own():
    spec = spec_of("z=normal[batch,100]")
    first = latents(spec, 1)["z"]
    kept = first.copy()
    latents(spec, 2)
    assert (first == kept).all()


def test_threads_draw_side_by_side():
    sampling = Sampling(spec_of("z=normal[batch,100]"))
    wanted = [sampling.draw(seed)["z"].tobytes() for seed in range(40)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for _ in range(10):
                assert [array["z"].tobytes() for array in pool.map(sampling.draw, range(40))] == wanted
    finally:
        sys.setswitchinterval(before)
