"""What a folder of shards is to hold, and how the shards are called."""

from __future__ import annotations

import msgspec

from ganexport.bulk.shards import CHECKSUMS, FORMATS, Format

JOB = "job.json"
SCHEMA_VERSION = 1


class Job(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a folder of shards holds; the same job resumed gives the same bytes.

    Attributes:
        schema_version: :data:`SCHEMA_VERSION` of the writer.
        n: Samples in all.
        seed: Their seed.
        start: Number of the first.
        format: Key of :data:`ganexport.bulk.shards.FORMATS`.
        shard_size: Samples a shard; the last may be smaller.
        batch_size: Samples an engine call.
        engine: sha256 of the file that made them.
        runtime: Library, version and device class that ran it: another one rounds differently.
        spec_sha256: Of the generator's spec.
        labels: Class asked for; None for random ones.
        truncation: As asked.
        sizes: Of symbolic dimensions, as asked.
    """

    schema_version: int
    n: int
    seed: int
    start: int
    format: str
    shard_size: int
    batch_size: int
    engine: str
    runtime: str
    spec_sha256: str
    labels: int | None = None
    truncation: float | None = None
    sizes: dict[str, int] = {}

    @property
    def shards(self) -> int:
        """How many there are in all."""
        return -(-self.n // self.shard_size)


class Progress(msgspec.Struct, frozen=True):
    """Where a job stands.

    Attributes:
        done: Samples in complete shards.
        total: Samples in all.
        rate: Samples a second since this process began; 0 before the first shard.
        eta: Seconds that remain at that rate; None before the first shard.
    """

    done: int
    total: int
    rate: float = 0.0
    eta: float | None = None


def shard_name(number: int, kind: Format) -> str:
    """``shard-000012.tar``."""
    return f"shard-{number:06d}{kind.suffix}"


def shard_samples(number: int, job: Job) -> int:
    """How many samples a shard holds."""
    return min(job.shard_size, job.n - number * job.shard_size)


def shard_entry(number: int, job: Job) -> str:
    """What is listed of a shard: the file, or a folder's own list of checksums."""
    name = shard_name(number, FORMATS[job.format])
    return f"{name}/{CHECKSUMS}" if job.format == "png" else name
