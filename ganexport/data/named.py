"""torchvision's data sets by name; fetched only when the user asks for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from ganexport.data.images import ImageSet, from_arrays
from ganexport.errors import DataError, MissingDependencyError

_CLASSES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}


def default_folder() -> Path:
    """Where named sets lie: ``$GANEXPORT_DATA``, else ``ganexport`` in the user's cache folder."""
    given = os.environ.get("GANEXPORT_DATA")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ganexport"


def read_named(name: str, *, split: str, download: bool, folder: str | None = None) -> ImageSet:
    """A torchvision set.

    Raises:
        MissingDependencyError: torchvision is not installed.
        DataError: Not there and not to be fetched, the fetch failed, or damaged files.
    """
    try:
        from torchvision import datasets
    except ImportError:
        raise MissingDependencyError(f"data {name!r} needs torchvision: pip install 'ganexport[train]'") from None
    root = Path(folder).expanduser() if folder else default_folder()
    make: Any = getattr(datasets, _CLASSES[name])
    try:
        found = make(root=str(root), train=split == "train", download=download)
    except RuntimeError as error:
        if download:
            raise DataError(f"{root}: fetching {name} failed: {str(error).splitlines()[0]}") from None
        raise DataError(f"{name}: not found in {root}; add --download to fetch it, or give a path") from None
    except OSError as error:
        raise DataError(f"{root}: fetching or reading {name} failed: {error}") from None
    except (ValueError, EOFError, KeyError) as error:
        raise DataError(f"{root}: the files of {name} are damaged ({error}); remove them and add --download") from None
    images = np.asarray(found.data, np.uint8)
    labels = np.asarray(found.targets, np.int64)
    return from_arrays(images, labels, name=f"{name} {split}", where=str(root), classes=tuple(found.classes))
