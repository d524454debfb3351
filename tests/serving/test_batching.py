"""Dynamic batching: full batches, several at a time, answers in order whichever batch ends first."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable

import numpy as np
import pytest
from serving_helpers import make_artifact

from ganexport.serving.batching import Array, Arrays, Batcher
from ganexport.serving.drawing import Job
from ganexport.serving.engine import Engine, EngineSettings
from ganexport.serving.server import ServerOptions, useful_pending
from ganexport.spec import Dim


class _Runs:
    """Doubles its rows; every next call takes less time than the one before, and says how many run at once."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.active = self.most = 0

    async def __call__(self, _key: Hashable, feeds: Arrays, rows: int) -> Arrays:
        assert len(feeds["z"]) == rows
        self.sizes.append(rows)
        self.active += 1
        self.most = max(self.most, self.active)
        await asyncio.sleep(0.2 / len(self.sizes))
        self.active -= 1
        return {"image": 2 * feeds["z"]}


def batcher(runs: _Runs, streams: int) -> Batcher:
    return Batcher(
        runs,
        axes=lambda _key: {"z": 0},
        output_axes=lambda _key: {"image": 0},
        max_rows=lambda _key: 4,
        max_delay=0.01,
        streams=streams,
    )


def rows(count: int, first: int = 0) -> Arrays:
    return {"z": np.arange(first, first + count, dtype=np.float32)[:, None]}


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_rows_come_back_in_order_whichever_batch_ends_first(streams: int) -> None:
    async def ask() -> tuple[_Runs, Array, list[tuple[int, float]]]:
        runs = _Runs()
        outputs, batches = await batcher(runs, streams).submit("key", rows(10), 10)
        return runs, outputs["image"], batches

    runs, image, batches = asyncio.run(ask())
    np.testing.assert_array_equal(image, 2 * rows(10)["z"])
    assert runs.sizes == [4, 4, 2]
    assert runs.most == streams
    assert sorted(size for size, _ in batches) == [2, 4, 4]


def test_a_request_that_gives_up_keeps_no_stream() -> None:
    async def ask() -> Array:
        shared = batcher(_Runs(), 2)
        for first in range(0, 40, 5):
            request = asyncio.create_task(shared.submit("key", rows(5, first), 5))
            await asyncio.sleep(0.005 * (first % 3))
            request.cancel()
        outputs, _ = await asyncio.wait_for(shared.submit("key", rows(10), 10), 10)
        return outputs["image"]

    np.testing.assert_array_equal(asyncio.run(ask()), 2 * rows(10)["z"])


def test_an_engine_gives_the_same_samples_on_any_number_of_streams(tmp_path) -> None:
    path = make_artifact(tmp_path / "tiny", dim=Dim("batch", 1, 4, 4)).path

    async def ask(streams: int) -> list[bytes]:
        engine = Engine(EngineSettings(max_batch=4, streams=streams), ("v1", str(path)))
        jobs = [Job(count, seed=count, format="npy") for count in (1, 9, 3, 12, 2)]
        answers = await asyncio.gather(*(engine.generate("v1", str(path), job) for job in jobs))
        return [answer.body for answer in answers]

    alone, shared = asyncio.run(ask(1)), asyncio.run(ask(3))
    assert alone == shared
    assert all(alone)


@pytest.mark.parametrize(("streams", "replicas", "pending"), [(1, 1, 32), (2, 1, 40), (3, 2, 112)])
def test_half_a_batch_gathers_beside_several_streams(streams: int, replicas: int, pending: int) -> None:
    options = ServerOptions(replicas=replicas, engine=EngineSettings(max_batch=16, streams=streams))
    assert useful_pending(options) == pending
