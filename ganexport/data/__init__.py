"""Training data: embedded MNIST, idx files, image folders, arrays, torchvision's sets by name.

:func:`open_images` turns what a user names into an :class:`~ganexport.data.images.ImageSet`;
:class:`~ganexport.data.feed.Feed` gives batches of it in an order that depends on nothing but the seed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ganexport.data.fit import Fit
from ganexport.data.images import ImageSet
from ganexport.errors import DataError, MixedSizesError, nearest

__all__ = ["EMBEDDED", "SOURCES", "ImageSet", "open_images", "open_images_like"]

#: Names of the real MNIST images that come with the package.
EMBEDDED = ("mnist-10k", "embedded")
#: torchvision's sets, fetched only when asked for with ``--download``.
DOWNLOADABLE = ("mnist", "fashion-mnist", "cifar10")
SOURCES = (*EMBEDDED, *DOWNLOADABLE)


def open_images(
    source: str, *, split: str = "train", download: bool = False, folder: str | None = None, fit: Fit | None = None
) -> ImageSet:
    """Open the images a user names.

    Args:
        source: "mnist-10k" (or "embedded"), a torchvision set ("mnist", "fashion-mnist", "cifar10"),
            or a path: an idx file (plain or .gz) or a folder of them, a folder of pictures
            (sub-folders are classes), an .npz or .npy file.
        split: "train" or "test", where the source has both.
        download: Allow torchvision to fetch a set that is not there yet.
        folder: Where torchvision's sets lie; ``$GANEXPORT_DATA`` or ``~/.cache/ganexport`` when None.
        fit: Brings each picture of a folder to a model's size, so that they may have different ones.

    Raises:
        DataError: Missing, corrupt, truncated, empty, of mixed sizes or of an unknown kind.
    """
    if source in EMBEDDED:
        from ganexport.data.arrays import read_embedded

        return read_embedded(split)
    path = Path(source).expanduser()
    if source in DOWNLOADABLE and not path.exists():
        from ganexport.data.named import read_named

        return read_named(source, split=split, download=download, folder=folder)
    if not path.exists():
        guess = nearest(source, SOURCES)
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise DataError(
            f"{source}: no such file or folder, and no data set of that name.{hint} Names: {', '.join(SOURCES)}"
        )
    return _open_path(path, split, fit)


def open_images_like(source: str, size: Callable[[], tuple[int, int, int]], *, split: str = "train") -> ImageSet:
    """Open real images to compare a generator's with.

    Args:
        source: As for :func:`open_images`.
        size: Gives the generator's (H, W, C); asked when a folder holds pictures of several sizes, of which the
            largest centred square (in these proportions) is then resized to it, as ``data.fit = "resize"`` does.
        split: As for :func:`open_images`.

    Raises:
        DataError: As :func:`open_images`.
    """
    try:
        return open_images(source, split=split)
    except MixedSizesError:
        return open_images(source, split=split, fit=Fit(size(), "resize"))


def _open_path(path: Path, split: str, fit: Fit | None) -> ImageSet:
    from ganexport.data import arrays, folder, idx

    if path.is_dir():
        return idx.read_idx_folder(path, split) if idx.looks_like_idx(path) else folder.read_folder(path, fit=fit)
    if path.suffix in (".npz", ".npy"):
        return arrays.read_array_file(path, split)
    if path.suffix == ".gz" or "ubyte" in path.name or path.suffix.startswith(".idx"):
        return idx.read_idx(path)
    raise DataError(
        f"{path}: not a kind of data that is known; give an idx file (plain or .gz), an .npz or .npy file, "
        "or a folder of pictures"
    )
