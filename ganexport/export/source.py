"""What is converted: a run, a trained model, ``package.module:factory``, an artifact or an ONNX file."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ganexport.artifact import MANIFEST, Artifact, ArtifactFile, Provenance
from ganexport.errors import CheckpointError, GanExportError, MissingDependencyError, UsageError
from ganexport.spec import Dim, GeneratorSpec, TensorSpec

if TYPE_CHECKING:
    import torch

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*\Z")
_SPEC_FROM_SAMPLES = "describe its inputs, e.g. --input 'z=normal[batch,128]'"


class UndescribedError(UsageError):
    """A module that says nothing of its inputs, and neither did the user."""


class Description(msgspec.Struct, frozen=True):
    """What the user says about a generator, beyond naming it.

    Attributes:
        inputs: In the order of the module's arguments.
        outputs: (name, range, layout) of outputs, in order.
        dims: Ranges of symbolic dimensions.
        weights: Weights file of a factory's module.
        weights_key: Where the state is inside a nested checkpoint.
        call: Keyword arguments of every call.
        assumed: Stands for what was not said (an artifact's spec, when its source is opened to verify it).
    """

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[tuple[str, tuple[float, float], str | None], ...] = ()
    dims: tuple[Dim, ...] = ()
    weights: Path | None = None
    weights_key: str | None = None
    call: dict[str, Any] = {}
    assumed: GeneratorSpec | None = None


class TorchSource:
    """A module with what is known of its inputs; outputs may still have to be probed.

    Attributes:
        module: In whatever mode it came; free to be changed.
        spec: Inputs and dims; outputs are () when only running the module tells them.
        provenance: For the manifest.
        call: Keyword arguments of every call.
    """

    def __init__(
        self, module: torch.nn.Module, spec: GeneratorSpec, provenance: Provenance, call: dict[str, Any]
    ) -> None:
        self.module = module
        self.spec = spec
        self.provenance = provenance
        self.call = call


class GraphSource:
    """An ONNX file that already exists, alone or in an artifact; needs no torch.

    Attributes:
        path: The ONNX file, hash-checked when it came from an artifact.
        file: Its manifest entry; None for a lone file.
        artifact: The artifact it came from.
        provenance: For the manifest.
    """

    def __init__(
        self, path: Path, provenance: Provenance, artifact: Artifact | None = None, file: ArtifactFile | None = None
    ) -> None:
        self.path = path
        self.provenance = provenance
        self.artifact = artifact
        self.file = file


def require_torch(why: str) -> Any:
    """The ``torch`` package.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import torch
    except ImportError:
        raise MissingDependencyError(f"{why} needs torch: pip install 'ganexport[export]'") from None
    return torch


def open_source(
    source: Any, description: Description, precision: str = "fp32", formats: Sequence[str] = ()
) -> TorchSource | GraphSource:
    """Find out what ``source`` is and open it.

    Args:
        source: A path, a name, ``package.module:factory``, or an ``nn.Module``.
        description: What the user says about it.
        precision: Wanted; it selects among an artifact's ONNX files.
        formats: Wanted; a lone file is first read in a child process by each library that they need.

    Raises:
        UsageError: It is none of those, or its inputs are not described.
        CheckpointError, ArtifactError: It is one, and damaged.
    """
    if not isinstance(source, str | Path):
        return _from_module(source, description, type(source).__name__)
    text = str(source)
    path = Path(text)
    if path.is_dir() and (path / MANIFEST).is_file():
        return _from_artifact(path, description, precision)
    if path.suffix.lower() == ".onnx":
        _refuse_torch_options(description, text)
        from ganexport.build.rehearse import rehearse

        rehearse(path, formats)
        return GraphSource(path, Provenance(source=path.name))
    if _FACTORY.match(text) and not path.exists():
        return _from_factory(text, description)
    _refuse_python_files(text)
    return _from_run(text, description)


def _refuse_python_files(text: str) -> None:
    """``nets/style.py:Generator`` is ``nets.style:Generator``."""
    file, _, name = text.rpartition(":") if not text.endswith(".py") else (text, "", "FACTORY")
    if not file.endswith(".py"):
        return
    parts = Path(file).with_suffix("").parts
    if all(part.isidentifier() for part in parts):
        raise UsageError(f"{text}: name the module, not its file: {'.'.join(parts)}:{name}")
    raise UsageError(
        f"{text}: name the module, not its file: run ganexport in {Path(file).parent} with {parts[-1]}:{name}"
    )


def _refuse_torch_options(description: Description, what: str) -> None:
    for name in ("weights", "weights_key", "call"):
        if getattr(description, name):
            raise UsageError(f"--{name.replace('_', '-')} is for package.module:factory; {what} is a finished file")


def _refuse_description(description: Description, what: str) -> None:
    for name, value in (("--input", description.inputs), ("--output", description.outputs)):
        if value:
            raise UsageError(f"{name}: {what} already says what its inputs and outputs are")


def _from_artifact(path: Path, description: Description, precision: str) -> GraphSource:
    artifact = Artifact(path)
    _refuse_torch_options(description, str(path))
    _refuse_description(description, str(path))
    present = [f for f in artifact.manifest.files if f.format == "onnx"]
    exact = [f for f in present if f.precision == precision]
    full = [f for f in present if f.precision == "fp32"]
    usable = exact or full or present
    file = usable[0] if usable else artifact.find("onnx")  # which raises, naming what is there
    return GraphSource(artifact.verified_path(file), artifact.manifest.provenance, artifact, file)


def _from_run(text: str, description: Description) -> TorchSource:
    try:
        from ganexport.checkpoint import load_run
    except ImportError:
        require_torch(f"{text}: loading a run")
        raise
    run = load_run(text)
    _refuse_description(description, text)
    for name in ("weights", "weights_key"):
        if getattr(description, name):
            raise UsageError(f"--{name.replace('_', '-')} is for package.module:factory; {text} brings its own weights")
    spec = _override_dims(run.spec, description.dims)
    from ganexport.export.weights import weights_digest

    provenance = Provenance(
        source=run.name,
        weights_sha256=weights_digest(run.module),
        recipe=_plain(run.recipe),
        step=run.step,
    )
    return TorchSource(run.module, spec, provenance, dict(description.call))


def _plain(recipe: Any) -> dict[str, Any]:
    value = msgspec.to_builtins(recipe)
    return value if isinstance(value, dict) else {}


def _override_dims(spec: GeneratorSpec, dims: Sequence[Dim]) -> GeneratorSpec:
    for dim in dims:
        spec.dim(dim.name)
    given = {dim.name: dim for dim in dims}
    return msgspec.structs.replace(spec, dims=tuple(given.get(dim.name, dim) for dim in spec.dims))


def _from_factory(text: str, description: Description) -> TorchSource:
    require_torch(f"{text}: a Python generator")
    module, made = _call_factory(text)
    spec = None
    if isinstance(module, tuple) and len(module) == 2 and isinstance(module[1], GeneratorSpec):
        module, spec = module
    return _from_module(module, description, text, spec, made=made)


def _call_factory(text: str) -> tuple[Any, bool]:
    """What the factory gives, and whether it made it for us; a module that stands under the name is taken as it is."""
    import importlib

    from torch import nn

    package, _, name = text.partition(":")
    with _as_its_script(), _plain_python():
        try:
            module = importlib.import_module(package)
        except ImportError as error:
            if error.name and (package == error.name or package.startswith(error.name + ".")):
                raise UsageError(f"{text}: no module {error.name!r} here or installed") from None
            raise UsageError(f"{text}: importing {package} failed: {error}") from None
        except GanExportError:
            raise
        except SystemExit as error:
            raise _ended(text, error) from None
        except Exception as error:  # noqa: BLE001 - the user's module may raise anything
            raise UsageError(f"{text}: importing {package} failed: {_told(error)}") from None
        target: Any = module
        for part in name.split("."):
            if not hasattr(target, part):
                raise UsageError(f"{text}: {package} has no {name!r}")
            target = getattr(target, part)
        if isinstance(target, nn.Module):
            return target, False
        if not callable(target):
            raise UsageError(f"{text}: {name} is not callable; name a function or class that makes the module")
        try:
            return target(), True
        except GanExportError:
            raise
        except SystemExit as error:
            raise _ended(text, error) from None
        except Exception as error:  # noqa: BLE001 - the user's factory may raise anything
            raise UsageError(f"{text}: the factory failed: {_told(error)}") from None


def _ended(text: str, error: SystemExit) -> UsageError:
    told = f": {' '.join(str(error).split())[:300]}" if isinstance(error.code, str) else ""
    return UsageError(
        f"{text}: it ended the program (sys.exit{told}); it sees an empty command line here: name a function that "
        "passes what it needs"
    )


def _told(error: BaseException) -> str:
    from ganexport.export.prepare._location import innermost

    where = innermost(error.__traceback__)
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}{f' ({where})' if where else ''}"


@contextlib.contextmanager
def _plain_python() -> Any:
    """``torch.jit.script`` and ``torch.jit.trace`` hand back what they are given.

    Scripted helpers (a fused activation, say) hide their operators from torch.export, and the same code runs
    without them.
    """
    from torch.jit import _state

    enabled = _state._enabled.enabled
    _state.disable()
    try:
        yield
    finally:
        _state._enabled.enabled = enabled


@contextlib.contextmanager
def _as_its_script() -> Any:
    """The current directory is importable, and our own command line is not taken for the user's."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    arguments, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = arguments
        if added:
            with contextlib.suppress(ValueError):
                sys.path.remove(here)


def _from_module(
    module: Any, description: Description, name: str, spec: GeneratorSpec | None = None, *, made: bool = False
) -> TorchSource:
    torch = require_torch("exporting a module")
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"{name}: gives a {type(module).__name__}, not an nn.Module or (nn.Module, GeneratorSpec)")
    from ganexport.export.prepare._copying import ours
    from ganexport.export.weights import load_into, read_weights, weights_digest

    module = ours(module, name, made=made)
    if description.weights is not None:
        load_into(module, read_weights(description.weights), str(description.weights), description.weights_key)
    elif description.weights_key is not None:
        raise CheckpointError("--weights-key says where to look inside --weights, which is missing")
    if spec is None and not description.inputs and description.assumed is not None:
        spec = _override_dims(msgspec.structs.replace(description.assumed, outputs=()), description.dims)
    elif spec is None:
        if not description.inputs:
            raise UndescribedError(f"{name}: {_SPEC_FROM_SAMPLES}")
        spec = GeneratorSpec(description.inputs, (), _used_dims(description), name.rpartition(":")[2])
    else:
        if description.inputs:
            raise UsageError(f"--input: {name} already describes its inputs with a GeneratorSpec")
        if description.outputs and spec.outputs:
            raise UsageError(f"--output: {name} already describes its outputs with a GeneratorSpec")
        spec = _override_dims(spec, description.dims)
    provenance = Provenance(source=name, weights_sha256=weights_digest(module))
    return TorchSource(module, spec, provenance, dict(description.call))


def _used_dims(description: Description) -> tuple[Dim, ...]:
    """The declared dims; an undeclared "batch" gets its default range."""
    given = {dim.name: dim for dim in description.dims}
    used = dict.fromkeys(s for tensor in description.inputs for s in tensor.shape if isinstance(s, str))
    if "batch" in used:
        given.setdefault("batch", Dim("batch"))
    for name in given:
        if name not in used:
            raise UsageError(f"--dim {name}: no --input has a dimension of that name")
    return tuple(given[name] for name in used if name in given)
