"""Shard formats: the samples of one shard become one file, or one folder of PNG files.

Every format is a function of the samples alone, byte for byte (no time, host or path inside), so a
shard that is made again after an interruption equals the one that was lost.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ganexport.artifact import sha256_file
from ganexport.errors import MissingDependencyError
from ganexport.runtime.base import Array

CHECKSUMS = "SHA256SUMS"


class Samples(NamedTuple):
    """Consecutive samples.

    Attributes:
        indices: Number of each sample under the seed.
        seed: The seed.
        labels: Class of each sample by input name; empty for a generator without labels.
        files: One PNG file a sample; empty for formats that take arrays.
        arrays: Array by name, the first axis counting samples; empty for formats that take files.
    """

    indices: range
    seed: int
    labels: dict[str, Array]
    files: list[bytes]
    arrays: dict[str, Array]

    def about(self, position: int) -> dict[str, Any]:
        """What is known of one sample, as written beside it."""
        labels = {name: int(values[position]) for name, values in self.labels.items()}
        return {"seed": self.seed, "index": self.indices[position], **labels}


def stem(index: int) -> str:
    """Name of one sample's files: twelve digits keep the order of names that of numbers."""
    return f"{index:012d}"


def join(parts: list[Samples]) -> Samples:
    """Consecutive parts as one."""
    first = parts[0]
    return Samples(
        range(first.indices.start, parts[-1].indices.stop),
        first.seed,
        {name: np.concatenate([part.labels[name] for part in parts]) for name in first.labels},
        [file for part in parts for file in part.files],
        {name: np.concatenate([part.arrays[name] for part in parts]) for name in first.arrays},
    )


def write_folder(path: Path, samples: Samples) -> str:
    """A folder of PNG files, with ``labels.jsonl`` for a conditional generator and its own checksums.

    Returns:
        sha256 of the folder's list of checksums.
    """
    path.mkdir()
    files = {f"{stem(index)}.png": data for index, data in zip(samples.indices, samples.files, strict=True)}
    if samples.labels:
        rows = (json.dumps(samples.about(position)) for position in range(len(samples.indices)))
        files["labels.jsonl"] = ("\n".join(rows) + "\n").encode()
    for name, data in files.items():
        with open(f"{path}/{name}", "xb", buffering=0) as stream:  # noqa: PTH123 - pathlib costs more than the file
            stream.write(data)
    lines = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
    (path / CHECKSUMS).write_text(lines)
    return hashlib.sha256(lines.encode()).hexdigest()


def write_npz(path: Path, samples: Samples) -> str:
    """An uncompressed .npz: the arrays, ``index``, ``seed`` and the labels."""
    members = dict(samples.arrays) | samples.labels
    members["index"] = np.uint64(samples.indices.start) + np.arange(len(samples.indices), dtype=np.uint64)
    members["seed"] = np.array(samples.seed, np.uint64)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in members.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getbuffer())  # type: ignore[arg-type]
    return sha256_file(path)


def write_tar(path: Path, samples: Samples) -> str:
    """A WebDataset shard: for each sample ``<number>.png`` and ``<number>.json`` (and ``.cls`` for its class)."""
    keys = [(json.dumps(name), values.tolist()) for name, values in samples.labels.items()]
    parts: list[bytes] = []
    for position, index in enumerate(samples.indices):
        name = stem(index)
        labels = "".join(f", {key}: {values[position]}" for key, values in keys)
        parts += _tar_member(f"{name}.png", samples.files[position])
        parts += _tar_member(f"{name}.json", f'{{"seed": {samples.seed}, "index": {index}{labels}}}'.encode())
        if len(keys) == 1:
            parts += _tar_member(f"{name}.cls", str(keys[0][1][position]).encode())
    parts.append(b"\0" * 1024)
    content = b"".join(parts)
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def _tar_header() -> tuple[bytes, bytes, bytes, int]:
    """What does not vary in the header of a POSIX ustar member: before and after size and checksum, and its sum."""
    owner = b"0000644\x000000000\x000000000\x00"
    modified = b"00000000000\x00"
    kind = (b"0" + bytes(100) + b"ustar\x0000").ljust(356, b"\0")
    return owner, modified, kind, sum(owner + modified + b" " * 8 + kind)


_OWNER, _MODIFIED, _KIND, _SUM = _tar_header()


def _tar_member(name: str, data: bytes) -> tuple[bytes, bytes, bytes]:
    """One file of a POSIX ustar archive: a header of 512 bytes, and the data in blocks of 512."""
    varying = name.encode(), b"%011o\0" % len(data)
    checksum = _SUM + sum(varying[0]) + sum(varying[1])
    header = b"%s%s%s%s%06o\0 %s" % (varying[0].ljust(100, b"\0"), _OWNER, varying[1], _MODIFIED, checksum, _KIND)
    return header, data, bytes(-len(data) % 512)


def require_parquet() -> Any:
    """pyarrow's Parquet writer.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingDependencyError("the parquet format needs pyarrow: pip install pyarrow") from None
    return pyarrow


def write_parquet(path: Path, samples: Samples) -> str:
    """A Parquet file with columns ``image`` (bytes and path, as Hugging Face datasets read it), ``index``,
    ``seed`` and the labels.
    """
    pyarrow = require_parquet()
    images = [
        {"bytes": data, "path": f"{stem(index)}.png"}
        for index, data in zip(samples.indices, samples.files, strict=True)
    ]
    count = len(samples.indices)
    columns = {
        "image": pyarrow.array(images, pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
        "index": pyarrow.array(samples.indices, pyarrow.uint64()),
        "seed": pyarrow.array([samples.seed] * count, pyarrow.uint64()),
    }
    columns |= {name: pyarrow.array(values, pyarrow.int64()) for name, values in samples.labels.items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="none")
    return sha256_file(path)


class Format(NamedTuple):
    """How shards are written.

    Attributes:
        suffix: Of a shard's name; empty for a folder.
        write: Writes one shard and returns its sha256.
        files: Whether samples come as PNG files; otherwise as arrays.
        shard_size: Samples a shard when the user does not say.
    """

    suffix: str
    write: Callable[[Path, Samples], str]
    files: bool
    shard_size: int


FORMATS = {
    "png": Format("", write_folder, True, 1000),
    "npz": Format(".npz", write_npz, False, 10_000),
    "webdataset": Format(".tar", write_tar, True, 10_000),
    "parquet": Format(".parquet", write_parquet, True, 10_000),
}
