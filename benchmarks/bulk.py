"""Bulk generation on this machine: its rate against what engine and encoder allow, and SIGKILL survived at full length.

    python -m benchmarks.bulk ARTIFACT [--count 1000000] [--format webdataset] [--kills 5] [--output bulk.json]

Rate. In turn, several times: the engine alone (e images a second, latents drawn, uint8 pictures made),
encoding and writing alone (p), and ``generate_bulk`` as it is (r). Where both share the cores, 1/e + 1/p
seconds an image are all that can be done at best; reported is r · (1/e + 1/p).

Kills. ``ganexport generate`` is started and killed with SIGKILL, as often as asked, at random
moments spread over the work, and then runs to its end. Every shard must be there with its listed
checksum, and none beyond; shards chosen at random are made again by an undisturbed process and must
be equal byte for byte (all of them with --whole, which makes everything twice).
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ganexport
from benchmarks._rows import Results, median, say
from ganexport.artifact import sha256_file
from ganexport.bulk.job import generate_bulk
from ganexport.bulk.making import ShardMaker
from ganexport.bulk.plan import Job, shard_name
from ganexport.bulk.shards import CHECKSUMS, FORMATS
from ganexport.runtime.generator import Generator

LIMIT = 0.9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--count", type=int, default=1_000_000, help="images of the run that is killed; 0: none")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--samples", type=int, default=10, help="shards made again and compared")
    parser.add_argument("--whole", action="store_true", help="make everything again and compare all")
    parser.add_argument("--formats", default="webdataset", help="of the rate, comma-separated; the first is killed")
    parser.add_argument("--rounds", type=int, default=5, help="of the rate; 0: none")
    parser.add_argument("--images", type=int, default=20_000, help="a round of the rate")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where shards are written; a temporary one when not given")
    parser.add_argument("--output", type=Path, default=Path("bulk.json"))
    arguments = parser.parse_args()
    formats = arguments.formats.split(",")
    planned = [({"name": "bulk", "format": f}, {"images": arguments.images}) for f in formats if arguments.rounds]
    if arguments.count:
        about = {"images": arguments.count, "kills": arguments.kills}
        planned.append(({"name": "killed", "format": formats[0]}, about))
    results = Results(arguments.output, "Bulk generation", planned)
    failed = False
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        if arguments.rounds:
            # As ganexport generate opens it.
            with ganexport.load(arguments.artifact, "onnxruntime", "cpu", settings={"spinning": False}) as generator:
                results.note(f"runs on {generator.runtime}")
                for index, kind in enumerate(formats):
                    series, share = rate(generator, Path(scratch), kind, arguments.images, arguments.rounds)
                    facts = {"share_of_the_possible": share, "limit": LIMIT}
                    results.add(index, series, items=arguments.images, facts=facts)
                    failed |= share < LIMIT
        if arguments.count:
            facts = killed(arguments, Path(scratch), formats[0])
            results.add(len(planned) - 1, facts=facts)
            failed |= bool(facts["wrong"])
    return int(failed)


# ---- rate -------------------------------------------------------------------------------------------


def rate(
    generator: Generator, scratch: Path, kind: str, images: int, rounds: int
) -> tuple[dict[str, list[int]], float]:
    """Nanoseconds for the images by the engine alone, by the rest alone, and together; the median share."""
    series: dict[str, list[int]] = {"engine": [], "encode-and-write": [], "together": []}
    for turn in range(-1, rounds):
        taken = []
        for name, work in (("engine", engine), ("encode-and-write", encode_and_write), ("together", together)):
            folder = scratch / "rate"
            begun = time.perf_counter_ns()
            spent = work(generator, folder, kind, images)
            taken.append(spent or time.perf_counter_ns() - begun)
            shutil.rmtree(folder, ignore_errors=True)
            if turn >= 0:  # the first round warms
                series[name].append(taken[-1])
    shares = [int((e + p) / r * 1e6) for e, p, r in zip(*series.values(), strict=True)]
    e, p, r = (images / median(series[name]) * 1e9 for name in series)
    share = median(shares) / 1e6
    say(f"{kind}: engine {e:,.0f}/s, encode and write {p:,.0f}/s, together {r:,.0f}/s: {share:.1%} of the possible")
    return series, share


def engine(generator: Generator, _folder: Path, _kind: str, images: int) -> int:
    for _ in generator.batches(images, seed=1):
        pass
    return 0


def encode_and_write(generator: Generator, folder: Path, kind: str, images: int) -> int:
    """Every batch's outputs are there already; only what follows the engine is timed."""
    job = _job(generator, kind, images)
    folder.mkdir()
    maker = ShardMaker(generator, folder, job, workers=len(os.sched_getaffinity(0)))
    ready = list(itertools.islice(generator.batches(min(images, 4096), seed=1, batch_size=job.batch_size), 64))
    begun = time.perf_counter_ns()
    with ThreadPoolExecutor(1) as writer:
        writes = [
            writer.submit(maker.write, number, parts)
            for number, parts in enumerate(_encoded(maker, ready, images, job))
        ]
        for write in writes:
            write.result()
    spent = time.perf_counter_ns() - begun
    maker.close()
    return spent


def _encoded(maker: ShardMaker, ready: list[Any], images: int, job: Job) -> Iterator[list[Any]]:
    batches = itertools.cycle(ready)
    for begin in range(0, images, job.shard_size):
        parts, size = [], 0
        while size < min(job.shard_size, images - begin):
            batch = next(batches)._replace(begin=size)
            maker.slots.acquire()
            future = maker.pool.submit(maker.encode, begin, batch)
            future.add_done_callback(lambda _: maker.slots.release())
            parts.append(future)
            size += batch.size
        yield parts


def _job(generator: Generator, kind: str, images: int) -> Job:
    batch = generator.spec.batch
    assert batch is not None
    size = min(FORMATS[kind].shard_size, images)
    return Job(1, images, 1, 0, kind, size, min(batch.opt, size), "", generator.runtime, "")


def together(generator: Generator, folder: Path, kind: str, images: int) -> int:
    generate_bulk(generator, folder, images, seed=1, format=kind)
    return 0


# ---- kills ------------------------------------------------------------------------------------------


def killed(arguments: argparse.Namespace, scratch: Path, kind: str) -> dict[str, Any]:
    """Run, kill, run on; what was wrong is in ``wrong``."""
    folder, rng = scratch / "shards", random.Random(arguments.seed)
    size = FORMATS[kind].shard_size
    shards = -(-arguments.count // size)
    begun, kills, running = time.monotonic(), 0, 0.0
    marks = sorted(rng.uniform(0, shards) for _ in range(arguments.kills))
    for mark in [*marks, None]:
        started = time.monotonic()
        process = subprocess.Popen(_command(arguments, kind, folder), stdout=subprocess.DEVNULL)
        while process.poll() is None:
            time.sleep(rng.uniform(0.005, 0.05))
            if mark is not None and time.monotonic() - started > 1 and _complete(folder) >= int(mark):
                time.sleep(rng.uniform(0, 1))
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                say(f"killed with {_complete(folder)} of {shards} shards complete")
                break
        running += time.monotonic() - started
        if mark is None and process.returncode != 0:
            raise SystemExit(f"ganexport generate ended with {process.returncode}")
    wrong = _check_complete(folder, kind, shards)
    numbers = range(shards) if arguments.whole else sorted(rng.sample(range(shards), min(arguments.samples, shards)))
    wrong += _check_equal(arguments, folder, kind, list(numbers))
    for line in wrong:
        say(line)
    say(f"{arguments.count:,} images, {kills} kills, {running:.0f} s of work: {len(wrong)} shards wrong")
    return {
        "kills": kills,
        "shards": shards,
        "compared": len(numbers),
        "seconds": round(time.monotonic() - begun, 1),
        "seconds_of_work": round(running, 1),
        "images_per_second": round(arguments.count / running, 1),
        "wrong": wrong,
    }


def _command(arguments: argparse.Namespace, kind: str, folder: Path) -> list[str]:
    command = [sys.executable, "-m", "ganexport", "generate", str(arguments.artifact), "-n", str(arguments.count)]
    return [*command, "--seed", str(arguments.seed), "--format", kind, "-o", str(folder)]


def _complete(folder: Path) -> int:
    sums = folder / CHECKSUMS
    return len(sums.read_bytes().splitlines()) if sums.is_file() else 0


def _entry(kind: str, number: int) -> str:
    name = shard_name(number, FORMATS[kind])
    return f"{name}/{CHECKSUMS}" if kind == "png" else name


def _check_complete(folder: Path, kind: str, shards: int) -> list[str]:
    """Every shard with its listed checksum, and nothing else in the folder."""
    lines = (line.partition("  ") for line in (folder / CHECKSUMS).read_text().splitlines())
    listed = {name: checksum for checksum, _, name in lines}
    wanted = {_entry(kind, number) for number in range(shards)}
    wrong = [f"{name}: not listed" for name in wanted - set(listed)] + [f"{n}: too much" for n in set(listed) - wanted]
    wrong += [
        f"{name}: another checksum" for name in wanted & set(listed) if sha256_file(folder / name) != listed[name]
    ]
    present = {path.name for path in folder.iterdir()} - {CHECKSUMS, "job.json", ".lock"}
    return wrong + [f"{name}: left over" for name in present - {name.partition("/")[0] for name in wanted}]


def _check_equal(arguments: argparse.Namespace, folder: Path, kind: str, numbers: list[int]) -> list[str]:
    """These shards once more, by a process that nobody disturbs."""
    wrong, size = [], FORMATS[kind].shard_size
    with ganexport.load(arguments.artifact) as generator:
        for number in numbers:
            again = folder.parent / "again"
            count = min(size, arguments.count - number * size)
            generate_bulk(
                generator, again, count, seed=arguments.seed, start=number * size, format=kind, shard_size=size
            )
            if sha256_file(again / _entry(kind, 0)) != sha256_file(folder / _entry(kind, number)):
                wrong.append(f"{_entry(kind, number)}: differs from an undisturbed run")
            shutil.rmtree(again)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
