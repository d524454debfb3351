"""Philox4x32-10: random words that are a function of a key and a counter alone.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

#: Blocks worked on at a time, so that the temporaries stay in the processor's cache.
_CHUNK = 1 << 13
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
#: Up to here long integers are faster than arrays.
_FEW_BLOCKS = 160
# Zero-dimensional arrays rather than numpy scalars: an operation on a short array is then twice as fast.
_MASK = np.array(0xFFFFFFFF, np.uint64)
_SHIFT = np.array(32, np.uint64)


def philox(seeds: Array, stream: int, indices: Array, blocks: int) -> Array:
    """Random words of the counters (block, stream, index low, index high) under 64-bit keys.

    Args:
        seeds: [samples] or [1], uint64: key, low word first.
        stream: Second word of the counter.
        indices: [samples] uint64: third and fourth word of the counter.
        blocks: Counters 0 .. blocks - 1 as the first word.

    Returns:
        [samples, blocks * 4] uint32.
    """
    samples = indices.shape[0]
    if samples == 1 and blocks <= _FEW_BLOCKS:
        return _philox_in_lanes(int(seeds[0]), stream, int(indices[0]), blocks)
    words = np.empty((samples, blocks, 4), np.uint32)
    rows = max(1, _CHUNK // max(blocks, 1))
    for begin in range(0, samples, rows):
        part = slice(begin, begin + rows)
        _philox_into(words[part], seeds[part] if seeds.size > 1 else seeds, stream, indices[part])
    return words.reshape(samples, blocks * 4)


@functools.lru_cache(maxsize=64)
def _lanes(blocks: int) -> tuple[int, int, int, int]:
    """Whole numbers of 64-bit lanes, one a block: ones, 32-bit masks, both words of number times first multiplier."""
    ones = sum(1 << (64 * block) for block in range(blocks))
    mask = ones * 0xFFFFFFFF
    product = sum((block * 0xD2511F53) << (64 * block) for block in range(blocks))
    return ones, mask, (product >> 32) & mask, product & mask


def philox_of_one(seed: int, stream: int, index: int, blocks: int) -> Array:
    """:func:`philox` for one sample, [1, blocks * 4]."""
    if blocks <= _FEW_BLOCKS:
        return _philox_in_lanes(seed, stream, index, blocks)
    return philox(np.array([seed], np.uint64), stream, np.array([index], np.uint64), blocks)


def _philox_in_lanes(seed: int, stream: int, index: int, blocks: int) -> Array:
    """:func:`philox` for one sample, in Python's long integers: one operation works on all blocks.

    A lane of 64 bits holds one word, so a product with a 32-bit constant never reaches the next
    lane. For a single latent this takes a third of the time of forty operations on short arrays.
    What is the same in every lane stays a short number: all but the block's own product in the first
    round, and half of the second.
    """
    ones, mask, high, low = _lanes(blocks)
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    product = (index & 0xFFFFFFFF) * 0xCD9E8D57
    even, odd = (product >> 32) ^ stream ^ key0, product & 0xFFFFFFFF
    c2 = high ^ (((index >> 32) ^ key1) * ones)
    key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    product, lanes = even * 0xD2511F53, c2 * 0xCD9E8D57
    c0, c1 = ((lanes >> 32) & mask) ^ ((odd ^ key0) * ones), lanes & mask
    c2, c3 = low ^ (((product >> 32) ^ key1) * ones), (product & 0xFFFFFFFF) * ones
    key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    for _ in range(8):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((p1 >> 32) & mask) ^ c1 ^ (key0 * ones), p1 & mask
        c2, c3 = ((p0 >> 32) & mask) ^ c3 ^ (key1 * ones), p0 & mask
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    pairs = np.empty((blocks, 2), "<u8")
    pairs[:, 0] = np.frombuffer((c0 | c1 << 32).to_bytes(8 * blocks, "little"), "<u8")
    pairs[:, 1] = np.frombuffer((c2 | c3 << 32).to_bytes(8 * blocks, "little"), "<u8")
    return pairs.view("<u4").reshape(1, blocks * 4)


def _philox_into(words: Array, seeds: Array, stream: int, indices: Array) -> None:
    """The ten rounds, for [samples, blocks, 4] words."""
    shape = words.shape[:2]
    # Words 0 and 2 of the state lie in `even`, words 1 and 3 in `odd`, so that one operation serves
    # two words; the rounds swap the halves, which plain contiguous views do fastest.
    even, odd, product, multiplier = np.empty((4, 2, *shape), np.uint64)
    even[0] = np.arange(shape[1], dtype=np.uint64)
    even[1] = (indices & _MASK)[:, None]
    odd[0] = stream
    odd[1] = (indices >> _SHIFT)[:, None]
    multiplier[0], multiplier[1] = _MULTIPLIERS
    (even0, even1), (odd0, odd1), (product0, product1) = even, odd, product
    for key in _round_keys(seeds, shape):
        np.multiply(even, multiplier, product)
        np.right_shift(product1, _SHIFT, even0)
        np.right_shift(product0, _SHIFT, even1)
        np.bitwise_xor(even, odd, even)
        np.bitwise_xor(even, key, even)
        np.bitwise_and(product1, _MASK, odd0)
        np.bitwise_and(product0, _MASK, odd1)
    words[..., 0], words[..., 2] = even
    words[..., 1], words[..., 3] = odd


def _round_keys(seeds: Array, shape: tuple[int, ...]) -> Array:
    """The ten rounds' keys: the seed's halves, bumped by the Weyl constants.

    [10, 2, samples or 1, 1]; spelled out to [10, 2, samples, blocks] where that is small, as
    broadcasting costs more than the operation itself on short arrays.
    """
    halves = np.stack([seeds & _MASK, seeds >> _SHIFT])  # [2, samples]
    keys: Array = ((halves[None] + _BUMPS) & _MASK)[..., None]
    if shape[0] * shape[1] > 1024:
        return keys
    wide: Array = np.empty((10, 2, *shape), np.uint64)
    wide[...] = keys
    return wide


_BUMPS = (np.arange(10, dtype=np.uint64)[:, None] * _WEYL)[:, :, None]  # [10, 2, 1]


@functools.lru_cache(maxsize=256)
def stream_of(name: str) -> int:
    """The 32-bit FNV-1a hash of an input's name in UTF-8: its stream of random words."""
    value = 0x811C9DC5
    for byte in name.encode():
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return value
