"""Every kind of source: read right, and one clear DataError naming the file when it is not right."""

from __future__ import annotations

import contextlib
import gzip
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ganexport.data import open_images
from ganexport.data.fit import Fit, fit
from ganexport.data.folder import read_folder
from ganexport.data.images import from_arrays
from ganexport.errors import DataError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 7, 5), np.uint8)
LABELS = np.arange(12) % 3


def idx_bytes(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_idx(folder: Path, *, packed: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("images-idx3", IMAGES), ("labels-idx1", LABELS.astype(np.uint8))):
        raw = idx_bytes(values)
        path = folder / f"train-{name}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(raw) if packed else raw)
    return folder


def write_pictures(folder: Path, mode: str = "L", size: tuple[int, int] = (6, 4), count: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new(mode, size, number * 10 if mode == "L" else None).save(folder / f"{number}.png")
    return folder


def test_embedded_images_are_mnist() -> None:
    images = open_images("mnist-10k")
    assert images.size == (28, 28, 1)
    assert len(images) == 10_000
    assert np.bincount(images.labels).tolist() == [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
    assert images.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]  # as in the original file
    assert images.digest == open_images("embedded").digest
    packed = Path(__file__).parents[2] / "ganexport" / "data" / "mnist_10k.npz"
    assert packed.stat().st_size <= 2_000_000
    attribution = packed.with_name("MNIST_ATTRIBUTION.md").read_text()
    assert "Yann LeCun, Corinna Cortes, Christopher J. C. Burges" in attribution
    assert "CC BY-SA 3.0" in attribution


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_idx_folder_and_file(tmp_path: Path, packed: bool) -> None:
    folder = write_idx(tmp_path / "digits", packed=packed)
    for source in (folder, next(folder.glob("train-images*"))):
        images = open_images(str(source))
        assert (images.array()[..., 0] == IMAGES).all()
        assert images.labels.tolist() == LABELS.tolist()
        assert images.size == (7, 5, 1)


def test_numpy_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=LABELS)
    np.savez(tmp_path / "b.npz", x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:2])
    np.save(tmp_path / "c.npy", RNG.integers(0, 256, (4, 3, 8, 8), np.uint8))
    assert (open_images(str(tmp_path / "a.npz")).array()[..., 0] == IMAGES).all()
    assert open_images(str(tmp_path / "b.npz")).labels.tolist() == LABELS.tolist()
    assert len(open_images(str(tmp_path / "b.npz"), split="test")) == 2
    assert open_images(str(tmp_path / "c.npy")).size == (8, 8, 3)  # channels first is turned round


def test_numpy_files_under_the_other_ending(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=LABELS)
    np.save(tmp_path / "b.npy", IMAGES)
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    for name in ("a.npy", "b.npz"):
        assert (open_images(str(tmp_path / name)).array()[..., 0] == IMAGES).all()
    assert open_images(str(tmp_path / "a.npy")).labels.tolist() == LABELS.tolist()


def test_picture_folders(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_pictures(tmp_path / "animals" / name)
    images = open_images(str(tmp_path / "animals"))
    assert images.classes == ("cat", "dog")
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.size == (4, 6, 1)
    streamed = read_folder(tmp_path / "animals", memory_limit=0)
    assert not streamed.in_memory
    assert (streamed.array() == images.array()).all()


def test_named_sets_are_not_fetched_unasked(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(DataError, match="add --download"):
        open_images("cifar10", folder=str(tmp_path))
    assert not any(tmp_path.iterdir())


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(DataError, match="Did you mean 'fashion-mnist'"):
        open_images("fashion-mnits")


def damaged(tmp_path: Path) -> dict[str, Path]:
    """One file or folder of every kind of damage."""
    good = idx_bytes(IMAGES)
    files = {
        "short-idx3-ubyte": good[:-1],
        "long-idx3-ubyte": good + b"\0",
        "header-idx3-ubyte": good[:7],
        "empty-idx3-ubyte": b"",
        "floats-idx3-ubyte": bytes([0, 0, 0x0D, 3]) + good[4:],
        "words-idx3-ubyte": b"hello world",
        "none-idx3-ubyte": idx_bytes(IMAGES[:0]),
        "huge-idx3-ubyte": bytes([0, 0, 8, 3]) + b"\xff" * 12 + b"\0" * 8,
        "short-idx3-ubyte.gz": gzip.compress(good)[:-9],
        "broken-idx3-ubyte.gz": b"\x1f\x8b" + b"\x07" * 50,
        "labels-idx1-ubyte": idx_bytes(LABELS.astype(np.uint8)),
        "text.npz": b"not a zip",
        "text.npy": b"not numpy",
        "empty.npy": b"",
        "what.txt": b"?",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "nothing.npz", other=IMAGES)
    np.savez(tmp_path / "floats.npz", images=IMAGES.astype(np.float32))
    np.savez(tmp_path / "channels.npz", images=np.zeros((4, 8, 8, 2), np.uint8))
    np.savez(tmp_path / "counts.npz", images=IMAGES, labels=LABELS[:-1])
    np.savez(tmp_path / "negative.npz", images=IMAGES, labels=LABELS - 1)
    np.savez(tmp_path / "zero.npz", images=IMAGES[:0])
    np.savez(tmp_path / "objects.npz", images=IMAGES, labels=np.array([{}] * 12, object))
    np.save(tmp_path / "objects.npy", np.array([{}], object))
    np.save(tmp_path / "number.npy", np.uint8(3))
    with zipfile.ZipFile(tmp_path / "bytes.npz", "w") as packed:
        packed.writestr("images.npy", b"hello")
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (100000000000, 1000, 1000), }".ljust(117) + b"\n"
    vast = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + b"\0" * 9
    (tmp_path / "vast.npy").write_bytes(vast)
    (tmp_path / "brace.npy").write_bytes(vast.replace(b"}", b" "))
    with zipfile.ZipFile(tmp_path / "vast.npz", "w") as packed:
        packed.writestr("images.npy", vast)
    whole = (tmp_path / "channels.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "nothing_here").mkdir()
    mixed = write_pictures(tmp_path / "mixed_sizes")
    Image.new("L", (9, 9)).save(mixed / "z.png")
    colours = write_pictures(tmp_path / "mixed_colours")
    Image.new("RGB", (6, 4)).save(colours / "z.png")
    cut = write_pictures(tmp_path / "cut_picture")
    Image.fromarray(RNG.integers(0, 256, (4, 6), np.uint8)).save(cut / "z.png")
    (cut / "z.png").write_bytes((cut / "z.png").read_bytes()[:55])
    loose = write_pictures(tmp_path / "loose")
    write_pictures(loose / "class")
    deep = write_pictures(tmp_path / "deep", count=1)
    Image.new("I;16", (6, 4)).save(deep / "0.png")
    return {path.name: path for path in tmp_path.iterdir()}


def refusal(path: Path) -> str:
    try:
        open_images(str(path))
    except DataError as error:
        return str(error)
    return pytest.fail(f"{path.name} was read")


def test_damage_is_one_clear_line_naming_the_file(tmp_path: Path) -> None:
    for name, path in damaged(tmp_path).items():
        message = refusal(path)
        assert name in message, name
        assert "\n" not in message
        assert len(message) > len(str(path)) + 10


def test_pickled_arrays_are_never_loaded(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> tuple:
            return Path.touch, (marker,)

    np.savez(tmp_path / "bomb.npz", images=np.array([Bomb()], object))
    (tmp_path / "bomb.npy").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.npz", "bomb.npy"):
        with pytest.raises(DataError, match="bomb"):
            open_images(str(tmp_path / name))
    assert not marker.exists()


def test_random_cuts_and_flips_of_an_idx_file_never_crash(tmp_path: Path) -> None:
    good = bytearray(idx_bytes(IMAGES))
    path = tmp_path / "fuzz-idx3-ubyte"
    for _ in range(200):
        raw = bytearray(good[: RNG.integers(0, len(good) + 1)])
        for position in RNG.integers(0, 20, 2):
            if position < len(raw):
                raw[position] = RNG.integers(0, 256)
        path.write_bytes(raw)
        with contextlib.suppress(DataError):
            assert len(open_images(str(path))) > 0


def test_fit_pads_resizes_or_refuses() -> None:
    images = from_arrays(IMAGES, None, name="set", where="set")
    assert fit(images, (7, 5, 1)) is images
    with pytest.raises(DataError, match=r"5x7, the model takes 8x8; try --set data.fit=pad"):
        fit(images, (8, 8, 1))
    padded = fit(images, (9, 9, 1), "pad").array()
    assert (padded[:, 1:8, 2:7, 0] == IMAGES).all()
    assert padded.sum() == IMAGES.sum()
    assert fit(images, (4, 4, 1), "resize").array().shape == (12, 4, 4, 1)
    with pytest.raises(DataError, match="1 channel, the model takes 3"):
        fit(images, (7, 5, 3), "resize")
    with pytest.raises(DataError, match=r"data.fit=resize"):
        fit(images, (4, 4, 1), "pad")


def test_pictures_of_different_sizes_are_fitted_one_by_one(tmp_path: Path) -> None:
    sizes = [(6, 4), (9, 12), (5, 5)]
    for number, (width, height) in enumerate(sizes):
        Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / f"{number}.png")
    with pytest.raises(DataError, match=r"1\.png: 9x12 with 3 channels, but 0\.png is 6x4"):
        open_images(str(tmp_path))
    images = open_images(str(tmp_path), fit=Fit((8, 8, 3), "resize"))
    assert images.in_memory
    assert fit(images, (8, 8, 3)) is images
    for number, image in enumerate(images.array()):
        pixels = np.asarray(Image.open(tmp_path / f"{number}.png"))[None]
        alone = fit(from_arrays(pixels, None, name="one", where="one"), (8, 8, 3), "resize")
        assert (image == alone.array()[0]).all()
    streamed = read_folder(tmp_path, memory_limit=3 * 8 * 8 * 3 - 1, fit=Fit((8, 8, 3), "resize"))
    assert not streamed.in_memory
    assert (streamed.array() == images.array()).all()
    with pytest.raises(DataError, match=r"0\.png: 6x4, the model takes 8x8; try --set data.fit=pad"):
        open_images(str(tmp_path), fit=Fit((8, 8, 3)))
    with pytest.raises(DataError, match=r"try --set data.fit=pad"):
        read_folder(tmp_path, memory_limit=0, fit=Fit((8, 8, 3)))
    with pytest.raises(DataError, match=r"1\.png: 9x12, the model takes 8x8; try --set data.fit=resize"):
        open_images(str(tmp_path), fit=Fit((8, 8, 3), "pad"))


def test_a_folder_whose_fitted_pictures_are_small_is_kept_in_memory(tmp_path: Path) -> None:
    write_pictures(tmp_path, size=(40, 40))
    assert not read_folder(tmp_path, memory_limit=1000).in_memory
    fitting = read_folder(tmp_path, memory_limit=1000, fit=Fit((8, 8, 1), "resize"))
    assert fitting.in_memory
    assert fitting.digest == read_folder(tmp_path).digest  # that of the pictures, whatever size they are brought to


def test_an_opaque_alpha_is_dropped_and_a_transparent_one_refused(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (3, 8, 8, 4), np.uint8)
    pixels[..., 3] = 255
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    np.savez(tmp_path / "set.npz", images=pixels)
    for source in (tmp_path, tmp_path / "set.npz"):
        assert (fit(open_images(str(source)), (8, 8, 3)).array() == pixels[..., :3]).all()
    pixels[1, 2, 3, 3] = 254
    Image.fromarray(pixels[1]).save(tmp_path / "1.png")
    np.savez(tmp_path / "set.npz", images=pixels)
    with pytest.raises(DataError, match=r"1\.png: has transparent pixels, .*mogrify"):
        open_images(str(tmp_path), fit=Fit((8, 8, 3), "resize"))
    with pytest.raises(DataError, match=r"set: has transparent pixels"):
        fit(open_images(str(tmp_path / "set.npz")), (8, 8, 3))


def test_a_photo_lies_as_the_camera_held_it(tmp_path: Path) -> None:
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:4] = 255  # the upper half, which a quarter turn brings to the right
    photo = Image.fromarray(pixels)
    tags = photo.getexif()
    tags[0x112] = 6
    photo.save(tmp_path / "photo.png", exif=tags)
    (image,) = open_images(str(tmp_path)).images
    assert image.shape == (12, 8, 3)
    assert image[:, 4:].min() == 255
    assert image[:, :4].max() == 0


def test_hidden_names_are_left_out_and_linked_classes_are_read(tmp_path: Path) -> None:
    elsewhere = write_pictures(tmp_path / "elsewhere")
    data = tmp_path / "data"
    write_pictures(data / "dog")
    write_pictures(data / ".ipynb_checkpoints")
    (data / "cat").symlink_to(elsewhere, target_is_directory=True)
    (data / "dog" / "round").symlink_to(data, target_is_directory=True)  # leads back
    (data / "dog" / "._0.png").write_bytes(b"what a Mac leaves")
    images = open_images(str(data))
    assert images.classes == ("cat", "dog")
    assert len(images) == 6
    assert list(images.labels) == [0, 0, 0, 1, 1, 1]


def test_grey_and_printers_pictures_among_colour_ones(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4), (10, 20, 30)).save(tmp_path / "0.png")
    Image.new("L", (6, 4), 99).save(tmp_path / "1.png")
    Image.new("CMYK", (6, 4), (255, 0, 0, 0)).save(tmp_path / "2.jpg")
    for images in (
        open_images(str(tmp_path)),
        open_images(str(tmp_path), fit=Fit((4, 6, 3))),
        read_folder(tmp_path, memory_limit=0),
    ):
        picture = images.array()
        assert picture.shape == (3, 4, 6, 3)
        assert (picture[1] == 99).all()
        assert picture[2, ..., 0].max() < 20
        assert picture[2, ..., 1:].min() > 100
    seen = Image.new("P", (6, 4), 0)
    seen.save(tmp_path / "3.png", transparency=0)
    with pytest.raises(DataError, match="transparent pixels"):
        open_images(str(tmp_path), fit=Fit((4, 6, 3)))
