"""Opening a version of a generator, and checking a new one in a process of its own."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ganexport.environment import usable_cores
from ganexport.errors import ArtifactError
from ganexport.runtime._images import image_tensor, to_uint8
from ganexport.seeding import batched
from ganexport.serving.drawing import Abilities, Job, abilities, draw, padded_rows
from ganexport.spec import GeneratorSpec

if TYPE_CHECKING:
    from ganexport.runtime.generator import Generator
    from ganexport.serving.engine import EngineSettings

Array = NDArray[Any]
#: A version that does not make its first images within this time is refused.
CHECK_SECONDS = 300.0
#: Backends that take the setting "threads".
_THREADED = ("onnxruntime", "openvino")


class Checked(msgspec.Struct, frozen=True):
    """What the check of a version found out.

    Attributes:
        spec: The generator's spec.
        abilities: What it can be asked for.
        runtime: What ran it.
        device: "cpu" or "cuda:0".
    """

    spec: GeneratorSpec
    abilities: Abilities
    runtime: str
    device: str = "cpu"


def open_generator(path: Path, settings: EngineSettings) -> Generator:
    """The generator of an artifact or lone ONNX file.

    Raises:
        GanExportError: As :func:`ganexport.load`.
    """
    from ganexport.runtime.generator import load

    threads = settings.threads
    if threads is None and settings.streams > 1:
        threads = max(1, usable_cores() // settings.streams)
    generator = load(path, settings.backend, settings.device, precision=settings.precision)
    if threads is None or generator.device != "cpu" or generator.backend not in _THREADED:
        return generator
    generator.close()
    return load(path, generator.backend, "cpu", precision=settings.precision, settings={"threads": threads})


def pictures(spec: GeneratorSpec, outputs: dict[str, Array]) -> Array:
    """[n, height, width, channels] uint8 of a generator's outputs."""
    tensor = image_tensor(spec)
    return to_uint8(outputs[tensor.name], tensor)


def check(path: Path, settings: EngineSettings) -> Checked:
    """Load a version and make its smallest batch.

    Raises:
        GanExportError: It cannot be loaded, cannot be served from seeds, or gives NaN.
    """
    generator = open_generator(path, settings)
    try:
        able = abilities(generator.spec)
        spec = batched(generator.spec)
        assert spec.batch is not None
        outputs = generator.run(draw(Job(padded_rows(spec.batch, 1)), spec))
        for name, value in outputs.items():
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise ArtifactError(f"output {name!r} holds NaN or infinite values for seed 0")
        return Checked(generator.spec, able, generator.runtime, generator.device)
    finally:
        generator.close()


async def check_apart(path: Path, settings: EngineSettings) -> Checked:
    """:func:`check` in a process of its own, so that a file that crashes its engine takes nothing with it.

    Raises:
        ArtifactError: With the reason, on one line.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "ganexport.serving.loading",
        str(path),
        msgspec.json.encode(settings).decode(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": python_path()},
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), CHECK_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise ArtifactError(f"{path.name}: made no image within {CHECK_SECONDS:.0f} s") from None
    if process.returncode != 0:
        reason = errors.decode(errors="replace").strip().splitlines() or [f"exit status {process.returncode}"]
        raise ArtifactError(reason[-1])
    return msgspec.json.decode(output.splitlines()[-1], type=Checked)


def python_path() -> str:
    """A PYTHONPATH under which a child process finds this very ganexport."""
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])


def _main() -> int:
    from ganexport.errors import GanExportError
    from ganexport.serving.engine import EngineSettings

    try:
        checked = check(Path(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=EngineSettings))
    except GanExportError as error:
        sys.stderr.write(f"{' '.join(str(error).split())}\n")
        return error.exit_code
    sys.stdout.write(msgspec.json.encode(checked).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
