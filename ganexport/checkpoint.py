"""Checkpoints and runs on disk: byte-reproducible, written whole or not at all, checked when read.

::

    RUN/recipe.toml                       resolved recipe
    RUN/checkpoints/<step>/state.json     step, thread count, sha256 of the tensor files, …
                           *.safetensors  generator, discriminator, ema, optimizers, random
    RUN/metrics.jsonl  RUN/samples/  RUN/tensorboard/

A tensor file holds no time, host or path, and no metadata (safetensors writes several metadata
keys in random order). Nothing is unpickled, ever.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from ganexport.artifact import writing
from ganexport.errors import CheckpointError, MissingDependencyError
from ganexport.recipe import FILE, Recipe, component_options, find_recipe, models_folder, read_toml, registries, resolve
from ganexport.recipe import to_plain as recipe_to_plain
from ganexport.spec import GeneratorSpec

FOLDER = "checkpoints"
STATE = "state.json"
#: Weights of a trained model under models/ (float16 or float32).
WEIGHTS = "weights.safetensors"
SCHEMA_VERSION = 1

Tensors = dict[str, Tensor]


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint holds besides tensors.

    Attributes:
        schema_version: :data:`SCHEMA_VERSION` of the writer.
        step: Generator updates done.
        threads: CPU threads inside an operation; resuming restores it, as sums depend on it.
        world: Number of processes.
        data: Digest of the training images.
        rate_scale: Factor on both rates, lowered by a rollback.
        rollbacks: How often training went back to an earlier checkpoint.
        finished: Whether the run's last step is done.
        torch: Version that wrote it.
        extra: State of smaller parts (guard, gradient scalers).
        files: sha256 by name of the tensor files.
    """

    schema_version: int = SCHEMA_VERSION
    step: int
    threads: int
    world: int
    data: str
    rate_scale: float = 1.0
    rollbacks: int = 0
    finished: bool = False
    torch: str = ""
    extra: dict[str, Any] = {}
    files: dict[str, str] = {}


class Checkpoint(NamedTuple):
    """A checkpoint read back: its folder, state and tensors by file."""

    path: Path
    state: State
    tensors: dict[str, Tensors]


class LoadedRun(NamedTuple):
    """A generator ready to be used.

    Attributes:
        module: Evaluation mode, float32, on the CPU.
        spec: Its inputs and outputs.
        recipe: The resolved recipe as nested plain values.
        step: Of the checkpoint; None for a trained model.
        name: Of the recipe.
    """

    module: nn.Module
    spec: GeneratorSpec
    recipe: dict[str, Any]
    step: int | None
    name: str


# ---- tensor files ----------------------------------------------------------------------------


def encode_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as the content of a safetensors file; the same tensors give the same bytes."""
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})


def read_tensors(path: Path) -> Tensors:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        MissingDependencyError: safetensors is not installed.
        CheckpointError: Missing, a directory, truncated, or another format.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError:
        raise MissingDependencyError(f"{path}: reading it needs safetensors: pip install safetensors") from None
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: truncated or not safetensors: {str(error).splitlines()[0]}") from None


# ---- checkpoints -----------------------------------------------------------------------------


def steps_of(run: Path) -> list[int]:
    """Steps of a run's checkpoints, ascending."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and path.is_dir())


def checkpoint_path(run: Path, step: int) -> Path:
    """Folder of a run's checkpoint."""
    return run / FOLDER / f"{step:08d}"


def write_checkpoint(run: Path, state: State, tensors: Mapping[str, Mapping[str, Tensor]], keep: int) -> Path:
    """Write a checkpoint so that it is visible only when complete, then remove those beyond ``keep``.

    Args:
        run: The run's folder.
        state: ``files`` is filled in here.
        tensors: Tensors by file name without suffix.
        keep: Newest checkpoints to keep, this one included.

    Raises:
        OutputError: The disk is full or not writable; earlier checkpoints are untouched.
    """
    destination = checkpoint_path(run, state.step)
    with writing(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(destination.parent)
        folder = Path(tempfile.mkdtemp(prefix=".writing-", dir=destination.parent))
        try:
            digests = {}
            for name, content in sorted(tensors.items()):
                encoded = encode_tensors(content)
                digests[name] = hashlib.sha256(encoded).hexdigest()
                _write_synced(folder / f"{name}.safetensors", encoded)
            text = msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(state, files=digests)), indent=2)
            _write_synced(folder / STATE, text + b"\n")
            folder.chmod(0o755)
            if destination.exists():  # the same step once more, after a rollback or as the run's last
                shutil.rmtree(destination)
            folder.rename(destination)
            _sync_folder(destination.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        for step in steps_of(run)[:-keep]:
            shutil.rmtree(checkpoint_path(run, step))
    return destination


def remove_after(run: Path, step: int) -> None:
    """Remove the checkpoints after a step (those of a training that was rolled back)."""
    with writing(run / FOLDER):
        for later in steps_of(run):
            if later > step:
                shutil.rmtree(checkpoint_path(run, later))


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(".writing-*"):  # of a process that was killed while it wrote
        shutil.rmtree(path, ignore_errors=True)


def read_state(path: Path) -> State:
    """The state of one checkpoint's folder.

    Raises:
        CheckpointError: Missing, damaged, or written by a newer ganexport.
    """
    file = path / STATE
    try:
        state = msgspec.json.decode(file.read_bytes(), type=State)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no {STATE} in it, so it is not a checkpoint; remove this folder") from None
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: damaged: {error}; remove this folder to go on from the one before") from None
    if state.schema_version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{file}: written by a newer ganexport (schema {state.schema_version}): upgrade ganexport"
        )
    return state


def read_checkpoint(run: Path, step: int | None = None, only: tuple[str, ...] | None = None) -> Checkpoint:
    """Read and check a checkpoint.

    Args:
        run: The run's folder.
        step: Of the checkpoint; the newest when None.
        only: Tensor files to read; all when None.

    Raises:
        CheckpointError: No checkpoint, or a damaged one.
    """
    steps = steps_of(run)
    if not steps:
        raise CheckpointError(f"{run}: no checkpoint in it yet; train on with: ganexport train --resume --out {run}")
    if step is None:
        step = steps[-1]
    elif step not in steps:
        raise CheckpointError(f"{run}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    path = checkpoint_path(run, step)
    state = read_state(path)
    names = state.files if only is None else [name for name in only if name in state.files]
    tensors = {}
    for name in names:
        file = path / f"{name}.safetensors"
        try:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            raise CheckpointError(f"{file}: {error.strerror}; remove {path} to go on from the one before") from None
        if digest != state.files[name]:
            raise CheckpointError(
                f"{file}: truncated or changed (its sha256 is not the one in {STATE}); "
                f"remove {path} to go on from the one before"
            )
        tensors[name] = read_tensors(file)
    return Checkpoint(path, state, tensors)


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into a module's parameters and buffers, strictly, cast to their dtype.

    Raises:
        CheckpointError: Missing or unexpected names, or another shape; the first are named.
    """
    own = module.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in tensors]
    wrong += [f"{name} is not of this model" for name in tensors if name not in own]
    wrong += [
        f"{name} is {list(tensors[name].shape)}, the model's is {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{where}: does not fit the recipe's architecture: {'; '.join(wrong[:3])}{more}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


# ---- runs and trained models -----------------------------------------------------------------


def build_generator(recipe: Recipe) -> tuple[nn.Module, GeneratorSpec]:
    """The recipe's generator with fresh weights, and its spec."""
    module = registries()["architecture"].load(recipe.architecture.name)
    options = component_options(recipe.architecture, module)
    return module.generator(options), msgspec.structs.replace(module.spec(options), name=recipe.name)


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a run or a model folder (one with a recipe in it)."""
    return (Path(path) / FILE).is_file()


def find_run(source: str | os.PathLike[str]) -> Path:
    """The folder of a run, a trained model's folder, or a trained model's name.

    Raises:
        CheckpointError: Nothing there, a file, or a folder without a recipe.
    """
    path = Path(source).expanduser()
    if is_run(path):
        return path
    named = models_folder() / str(source)
    if str(source).replace("\\", "/").count("/") == 0 and is_run(named):
        return named
    if path.is_dir():
        raise CheckpointError(f"{path}: no {FILE} in it, so it is neither a run nor a model's folder")
    if path.exists():
        raise CheckpointError(f"{path}: a file; give the run's folder")
    raise CheckpointError(
        f"{source}: no such run, and no trained model of that name; list them with: ganexport recipes"
    )


def load_run(path: str | os.PathLike[str], *, step: int | None = None, ema: bool = True) -> LoadedRun:
    """The generator of a run, or of a trained model under models/ (by folder or by name).

    Args:
        path: A run, a folder with ``recipe.toml`` and ``weights.safetensors``, or a trained model's name.
        step: Checkpoint of a run; the newest when None.
        ema: Take the averaged weights where the run has them.

    Returns:
        The generator in evaluation mode, float32, on the CPU, with its spec.

    Raises:
        CheckpointError: No such run, no weights in it yet, or damaged ones.
        RecipeError: Its recipe is damaged.
    """
    folder = find_run(path)
    file = find_recipe(str(folder))
    raw = read_toml(file)
    raw.setdefault("name", folder.resolve().name)
    recipe = resolve(raw, str(file))
    module, spec = build_generator(recipe)
    if (folder / WEIGHTS).is_file():
        if step is not None:
            raise CheckpointError(f"{folder}: a trained model has no checkpoints to choose from (step {step})")
        load_state(module, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
        found = None
    elif folder.parent == models_folder() and not (folder / FOLDER).is_dir():
        raise CheckpointError(
            f"{folder.name}: comes as a recipe without weights; train it: ganexport train {folder.name}"
        )
    else:
        checkpoint = read_checkpoint(folder, step, only=("generator", "ema"))
        which = "ema" if ema and "ema" in checkpoint.tensors else "generator"
        if which not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.path}: holds no generator")
        load_state(module, checkpoint.tensors[which], str(checkpoint.path / f"{which}.safetensors"))
        found = checkpoint.state.step
    plain = recipe_to_plain(recipe)
    # What is made from a run travels: the place of the images on this machine stays behind.
    plain["data"]["source"] = Path(recipe.data.source).name
    plain["transfer"]["init_from"] = Path(recipe.transfer.init_from).name
    return LoadedRun(module.float().eval().requires_grad_(False), spec, plain, found, recipe.name)
