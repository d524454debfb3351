"""A folder of static files that runs the ONNX file in a browser, through onnxruntime-web.

The npm package is not part of it: ``npm install`` in the folder fetches it, and any file server then
serves the page. Latents follow the seed contract, so a seed shows the picture that Python makes.
"""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

import msgspec

from ganexport.artifact import writing
from ganexport.build.options import BuildOptions, Built
from ganexport.errors import ExportError
from ganexport.seeding import batched
from ganexport.spec import GeneratorSpec

#: Precisions of the ONNX file that onnxruntime-web's WebAssembly backend has kernels for.
PRECISIONS = ("fp32", "int8")
#: Oldest onnxruntime-web whose file names generator.js knows.
ONNXRUNTIME_WEB = ">=1.20.0"
FOLDER = "web"
_ASSETS = ("index.html", "generator.js", "seeding.js")
_DTYPES = ("float32", "int64", "int32")


def unavailable() -> str | None:
    """Why the folder cannot be built here; nothing is needed, so it always can."""
    return None


def build(model: Path, spec: GeneratorSpec, folder: Path, precision: str, options: BuildOptions) -> Built:
    """Write ``web/`` (``web-int8/``) with the page, the scripts, the spec and the model.

    Args:
        model: The ONNX file, in one piece.
        spec: The generator's spec: pictures drawn from seeds.
        folder: Where to write.
        precision: Of the ONNX file.
        options: Nothing of it concerns this format.

    Raises:
        ExportError: A precision, an input or an output that the page cannot handle.
        OutputError: The folder cannot be written.
    """
    spec = batched(spec)
    _check(model, spec, precision)
    home = FOLDER if precision == "fp32" else f"{FOLDER}-{precision}"
    target = folder / home
    with writing(target):
        target.mkdir(exist_ok=True)
        assets = files("ganexport.build").joinpath("web_assets")
        for name in _ASSETS:
            (target / name).write_bytes(assets.joinpath(name).read_bytes())
        (target / "spec.json").write_bytes(msgspec.json.format(msgspec.json.encode(spec), indent=2) + b"\n")
        (target / "package.json").write_bytes(_package())
        shutil.copyfile(model, target / "generator.onnx")
    names = (*_ASSETS[1:], "spec.json", "package.json", "generator.onnx")
    return Built(
        f"{home}/{_ASSETS[0]}",
        tuple(f"{home}/{name}" for name in names),
        {"onnxruntime-web": ONNXRUNTIME_WEB},
        ("web",),
        (f"run npm install in {home}/, then serve it with any file server",),
    )


def _package() -> bytes:
    package = {"private": True, "type": "module", "dependencies": {"onnxruntime-web": ONNXRUNTIME_WEB}}
    return msgspec.json.format(msgspec.json.encode(package), indent=2) + b"\n"


def _check(model: Path, spec: GeneratorSpec, precision: str) -> None:
    if precision not in PRECISIONS:
        raise ExportError(f"web: {precision} has no kernels in the browser; convert to {' or '.join(PRECISIONS)}")
    image = spec.image_output
    if image is None or (image.range is None and image.dtype != "uint8"):
        raise ExportError(
            'web: the page shows pictures, and no output is one with a range; add --output "image=[-1,1]:NCHW"'
        )
    if image.dtype not in ("float32", "uint8"):
        raise ExportError(f"web: output {image.name!r} is {image.dtype}; the page reads float32 and uint8")
    if spec.batch is None:
        raise ExportError("web: this generator has no batch dimension to count samples by")
    for tensor in spec.inputs:
        if tensor.sampler is None:
            raise ExportError(f"web: input {tensor.name!r} has no sampler, so a seed cannot make it")
        if tensor.dtype not in _DTYPES:
            raise ExportError(f"web: input {tensor.name!r} is {tensor.dtype}; the page makes {', '.join(_DTYPES)}")
    if any(model.parent.glob(f"{model.name}.data")) or any(model.parent.glob(f"{model.name}_data")):
        raise ExportError(f"web: {model.name} keeps its weights in a file of their own; the page needs them inside")
