"""The order of images: the same for any number of processes, any resident or streamed feed, any restart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ganexport.data.feed import Feed
from ganexport.data.folder import read_folder
from ganexport.data.images import from_arrays
from ganexport.data.order import Order
from ganexport.errors import DataError

CPU = torch.device("cpu")
COUNT = 10
IMAGES = np.arange(COUNT, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 3), np.uint8)


def image_set():
    return from_arrays(IMAGES, np.arange(COUNT), name="set", where="set")


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    order = Order(1000, seed=3)
    epochs = [order.permutation(epoch).tolist() for epoch in range(5)]
    assert all(sorted(epoch) == list(range(1000)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5
    assert Order(1000, seed=4).permutation(0).tolist() != epochs[0]


def test_golden_order() -> None:
    # Resuming an old run must see the images in the old order, whatever the library versions.
    assert Order(8, seed=7).permutation(0).tolist() == [2, 3, 4, 7, 6, 0, 5, 1]


def test_samples_run_on_across_epochs_and_cover_the_set() -> None:
    order = Order(COUNT, seed=1)
    run = np.concatenate([order.indices(start, 7) for start in range(0, 70, 7)])
    assert run.tolist() == np.concatenate([order.permutation(epoch) for epoch in range(7)]).tolist()
    assert order.indices(3, 25).tolist() == run[3:28].tolist()  # longer than two epochs


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shards_together_are_the_whole_batch(world: int) -> None:
    whole = Feed(image_set(), 8, seed=5, device=CPU)
    parts = [Feed(image_set(), 8, seed=5, device=CPU, rank=rank, world=world) for rank in range(world)]
    for number in range(4):
        images, labels = whole.batch(number)
        shards = [part.batch(number) for part in parts]
        assert torch.equal(torch.cat([shard[0] for shard in shards]), images)
        assert torch.equal(torch.cat([shard[1] for shard in shards]), labels)


def test_values_are_scaled_to_minus_one_to_one() -> None:
    images = from_arrays(np.array([0, 255], np.uint8)[:, None, None], None, name="s", where="s")
    batch, labels = Feed(images, 2, seed=0, device=CPU).batch(0)
    assert sorted(batch.flatten().tolist()) == [-1.0, 1.0]
    assert batch.shape == (2, 1, 1, 1)
    assert labels is None


def test_streaming_gives_the_same_batches_and_survives_jumps(tmp_path: Path) -> None:
    for number in range(COUNT):
        Image.fromarray(IMAGES[number]).save(tmp_path / f"{number}.png")
    resident = Feed(image_set(), 4, seed=2, device=CPU)
    streamed = Feed(read_folder(tmp_path, memory_limit=0), 4, seed=2, device=CPU, workers=1)
    assert not streamed.resident
    for number in (0, 1, 5, 6):
        assert torch.equal(streamed.batch(number)[0], resident.batch(number)[0])


def test_a_damaged_picture_found_while_streaming_is_named(tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(IMAGES[number]).save(tmp_path / f"{number}.png")
    images = read_folder(tmp_path, memory_limit=0)
    (tmp_path / "2.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"2\.png: not a picture") as caught:
        Feed(images, 3, seed=0, device=CPU, workers=1).batch(0)
    assert "\n" not in str(caught.value)
