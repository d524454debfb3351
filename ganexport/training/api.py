"""``ganexport.train``: from a recipe to a trained run, in one call."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from ganexport.artifact import write_atomic, writing
from ganexport.checkpoint import checkpoint_path, read_state, steps_of
from ganexport.data import SOURCES, ImageSet, open_images
from ganexport.data.fit import Fit
from ganexport.errors import BackendUnavailableError, OutputError, RecipeError, UsageError
from ganexport.recipe import FILE, Recipe, load_recipe, override, read_toml, resolve, to_plain, to_toml
from ganexport.training.curves import draw_curves
from ganexport.training.distributed import Group
from ganexport.training.loop import DIVERGED_FILE, ROLLBACK_FACTOR, Trainer
from ganexport.training.metrics import read_metrics
from ganexport.training.networks import build, check_parts, fitted, model_size
from ganexport.training.progress import Reporter
from ganexport.training.step import check_device

#: Keys that may differ on ``--resume``: they do not change what is learnt.
FREE = (
    "description",
    "data.source",  # the images are compared by their digest instead
    "data.workers",
    "training.device",
    "training.cuda_graphs",
    "training.checkpoint_every",
    "training.keep",
    "guard.",
    "logging.",
)
#: What ``--tune`` chooses.
TUNED = (
    "training.precision",
    "training.compile",
    "training.cuda_graphs",
    "training.memory_format",
    "training.threads",
)
TUNING_FILE = "tuning.json"
LOCK = ".lock"


class TrainingResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a training went.

    Attributes:
        run: The run's folder; None after a dry run or ``tune_only``.
        step: Updates done.
        finished: Whether that is the recipe's last step.
        already_finished: Whether there was nothing left to do.
        seconds: Wall-clock of the training loop.
        parameters: Trained numbers of the generator and the discriminator.
        metrics: The last line of metrics.
        recipe: Resolved, as nested plain values.
        tuning: Rows of the tuner's table; empty without ``tune``.
    """

    run: str | None
    step: int
    finished: bool
    already_finished: bool = False
    seconds: float = 0.0
    parameters: dict[str, int] = {}
    metrics: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    tuning: list[dict[str, Any]] = []


def train(
    recipe: str | Recipe | None = None,
    *,
    data: str | None = None,
    out: str | os.PathLike[str] | None = None,
    sets: Sequence[str] = (),
    resume: bool = False,
    rollback: bool = False,
    init_from: str | os.PathLike[str] | None = None,
    freeze_d: int | None = None,
    tune: bool = False,
    tune_only: bool = False,
    dry_run: bool = False,
    download: bool = False,
    reporter: Reporter | None = None,
) -> TrainingResult:
    """Train a GAN.

    Under ``torchrun`` every process calls this; the run's folder must then be one that all of them see.

    Args:
        recipe: A name of ``ganexport recipes``, a TOML file, a folder with one, or a Recipe; None takes the run's
            own with ``resume``.
        data: Images instead of the recipe's, as :func:`ganexport.data.open_images` takes them.
        out: The run's folder; ``runs/<recipe>`` when None.
        sets: "key.path=value" overrides.
        resume: Go on from the newest checkpoint in ``out``; from the start when there is none.
        rollback: On divergence go back to the last checkpoint with half the rate, up to five times. With
            ``resume`` of a run that diverged: go on from its last checkpoint with half the rate.
        init_from: Start from these weights: a run, a trained model's name or folder, or a weights file. Tensors are
            taken where name and shape agree; the others start afresh and are named.
        freeze_d: Stages of the discriminator, from the image on, that are not trained.
        tune: Time precision, compilation, memory format and threads on this machine first, and take the fastest.
        tune_only: Only that; nothing is trained or written.
        dry_run: Check everything (recipe, data, networks) and write nothing.
        download: Allow fetching a named data set.
        reporter: Told of what happens; silent when None.

    Returns:
        How it went.

    Raises:
        RecipeError: Everything wrong with the recipe at once, or a resume that would change what is learnt.
        DataError: Images missing, damaged or not of the model's size.
        OutputError: ``out`` is not empty, in use by another training, or not writable; or the disk is full.
        DivergenceError: Training diverged; the last checkpoint is good.
        InterruptedBySignalError: SIGTERM or Ctrl-C; a checkpoint was written.
    """
    told = reporter or Reporter()
    if recipe is None and not (resume and out is not None):
        raise UsageError("name a recipe (list them with: ganexport recipes), or give --resume with --out RUN")
    sets = [*sets, *_transfer_sets(init_from, freeze_d)]
    wanted = _wanted(recipe, data, sets, Path(out) if out is not None else None)
    run = Path(out) if out is not None else Path("runs") / wanted.name
    group = Group.from_environment()
    quiet = told if group.leads else Reporter()
    try:
        with _claimed(run, group, resume=resume) if not (dry_run or tune_only) else contextlib.nullcontext():
            return _train(wanted, run, group, quiet, resume, rollback, tune or tune_only, tune_only, dry_run, download)
    finally:
        group.close()


def _train(
    wanted: Recipe,
    run: Path,
    group: Group,
    reporter: Reporter,
    resume: bool,
    rollback: bool,
    tune: bool,
    tune_only: bool,
    dry_run: bool,
    download: bool,
) -> TrainingResult:
    before = _run_recipe(run) if resume and not tune_only else None
    recipe = _continued(before, wanted, _tuned_before(run)) if before is not None else wanted
    device = _device(recipe.training.device, group)
    steps = steps_of(run) if before is not None else []
    latest = read_state(checkpoint_path(run, steps[-1])) if steps else None
    recipe = _concrete(recipe, device, latest.threads if latest is not None else recipe.training.threads)
    if latest is not None and latest.finished and latest.step >= recipe.training.steps and not dry_run:
        reporter.remark(f"{run}: already finished at step {latest.step}; nothing to do")
        return _result(run, latest.step, recipe, finished=True, already_finished=True)
    check_parts(recipe, group.world)
    check_device(recipe.training.precision, device, cuda_graphs=recipe.training.cuda_graphs)
    torch.set_num_threads(recipe.training.threads)
    fit = Fit(model_size(recipe), recipe.data.fit)
    images = fitted(recipe, open_images(recipe.data.source, download=download, fit=fit))
    reporter.resolved(to_toml(recipe))
    if classes := _told_classes(images):
        reporter.remark(classes)
    parameters = _count_parameters(recipe)
    if dry_run:
        if latest is None:
            _transfer(Trainer(recipe, images, group=group, device=device), reporter)
        return _result(None, latest.step if latest else 0, recipe, parameters=parameters)
    table: list[dict[str, Any]] = []
    if tune and latest is None:
        recipe, table = _tune(recipe, images, group, device, reporter)
        if tune_only:
            return _result(None, 0, recipe, parameters=parameters, tuning=table)
        torch.set_num_threads(recipe.training.threads)
    elif tune:
        reporter.remark("the run keeps the settings it was started with: tuning is for a fresh start")
    trainer = Trainer(recipe, images, group=group, device=device, run=run, reporter=reporter, rollback=rollback)
    if latest is not None:
        trainer.restore()
        reporter.remark(f"going on from step {latest.step} of {recipe.training.steps}")
    else:
        _transfer(trainer, reporter)
    if group.leads:  # not before: what cannot start leaves its folder free for the next attempt
        _write_recipe(run, recipe, table)
    group.barrier()
    if rollback and group.gather((run / DIVERGED_FILE).is_file())[0]:
        why = f"the run had diverged; on from step {trainer.step}"
        trainer.lower_rate(trainer.rate_scale * ROLLBACK_FACTOR, trainer.rollbacks + 1, why)
    clock = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - clock
    if group.leads:
        draw_curves(run)
    return _result(run, trainer.step, recipe, True, seconds=seconds, parameters=parameters, tuning=table)


def _told_classes(images: ImageSet) -> str:
    """The classes that were found, in the order of their numbers; empty without labels."""
    if images.labels is None or not images.classes:
        return ""
    counts = np.bincount(images.labels, minlength=len(images.classes))
    named = zip(images.classes, counts, strict=False)
    shown = [f"{name if name == str(i) else f'{i} {name}'} ({count:,})" for i, (name, count) in enumerate(named)]
    more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
    return f"{images.name}: {len(images):,} images; classes: {', '.join(shown[:20])}{more}"


def _transfer(trainer: Trainer, reporter: Reporter) -> None:
    """Start from the weights that the recipe names, if it does, and tell what was taken."""
    if trainer.recipe.transfer.init_from:
        for taken in trainer.networks.transfer():
            reporter.remark(str(taken))


def _write_recipe(run: Path, recipe: Recipe, table: list[dict[str, Any]]) -> None:
    """The recipe as it is trained, and what the tuner measured, where it did."""
    write_atomic(run / FILE, to_toml(recipe).encode())
    if table:
        content = {"rows": table, "chosen": {key: _get(to_plain(recipe), key) for key in TUNED}}
        write_atomic(run / TUNING_FILE, msgspec.json.format(msgspec.json.encode(content), indent=2))


# ---- recipe and place ------------------------------------------------------------------------


def _wanted(recipe: str | Recipe | None, data: str | None, sets: Sequence[str], out: Path | None) -> Recipe:
    """The recipe the caller asks for, with its overrides."""
    if data is not None and data not in SOURCES:
        data = str(Path(data).expanduser().absolute())
    more = [*sets, *([f"data.source={_quoted(data)}"] if data is not None else [])]
    if isinstance(recipe, Recipe):
        return resolve(override(to_plain(recipe), more), recipe.name)
    if recipe is not None:
        return load_recipe(recipe, more)
    assert out is not None
    own = _run_recipe(out)
    if own is None:
        raise UsageError(f"{out}: no run to resume there; name a recipe to start one")
    return resolve(override(to_plain(own), more), str(out / FILE))


def _transfer_sets(init_from: str | os.PathLike[str] | None, freeze_d: int | None) -> list[str]:
    sets = []
    if init_from is not None:
        place = Path(init_from).expanduser()
        sets.append(f"transfer.init_from={_quoted(str(place.absolute() if place.exists() else init_from))}")
    if freeze_d is not None:
        sets.append(f"transfer.freeze_discriminator={freeze_d}")
    return sets


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()


def _run_recipe(run: Path) -> Recipe | None:
    """The recipe in a run's folder; None when there is none."""
    path = run / FILE
    return resolve(read_toml(path), str(path)) if path.is_file() else None


def _tuned_before(run: Path) -> dict[str, Any]:
    """What a tuner chose when the run was started."""
    path = run / TUNING_FILE
    if not path.is_file():
        return {}
    try:
        chosen = msgspec.json.decode(path.read_bytes())["chosen"]
    except (msgspec.DecodeError, KeyError, TypeError):
        return {}
    return chosen if isinstance(chosen, dict) else {}


def _continued(before: Recipe, wanted: Recipe, tuned: dict[str, Any]) -> Recipe:
    """The run's recipe with those of the wanted changes that do not change what is learnt.

    Raises:
        RecipeError: Any other change, all of them named.
    """
    old, new = _flat(to_plain(before)), _flat(to_plain(wanted))
    for key in ("training.device", "training.threads"):
        if new[key] in ("auto", 0):
            new[key] = old[key]
    for key in tuned:
        if key in TUNED:
            new[key] = old[key]
    changes = []
    for key in sorted(set(old) | set(new)):
        if old.get(key) == new.get(key) or key.startswith(FREE) or key == "training.steps":
            continue
        changes.append(f"{key} ({old.get(key, 'not set')} in the run, now {new.get(key, 'not set')})")
    if old["training.steps"] != new["training.steps"] and before.schedule.name != "constant":
        changes.append(f"training.steps (the {before.schedule.name} schedule depends on it)")
    if changes:
        raise RecipeError(f"--resume: would change what is learnt: {'; '.join(changes)}; start a new run instead")
    merged = msgspec.structs.replace(wanted, training=before.training)
    free = {
        "checkpoint_every": wanted.training.checkpoint_every,
        "keep": wanted.training.keep,
        "steps": wanted.training.steps,
        "device": new["training.device"],
    }
    return msgspec.structs.replace(merged, training=msgspec.structs.replace(before.training, **free))


def _flat(plain: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        where = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            flat |= _flat(value, where)
        elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            for number, entry in enumerate(value):
                flat |= _flat(entry, f"{where}.{number}")
        else:
            flat[where] = list(value) if isinstance(value, tuple) else value
    return flat


def _get(plain: dict[str, Any], key: str) -> Any:
    value: Any = plain
    for part in key.split("."):
        value = value[part]
    return value


def _concrete(recipe: Recipe, device: torch.device, threads: int) -> Recipe:
    """The recipe with "auto" and 0 replaced by what they stand for here."""
    name = device.type if device.index is None else str(device)
    training = msgspec.structs.replace(recipe.training, device=name, threads=threads or torch.get_num_threads())
    return msgspec.structs.replace(recipe, training=training)


def _device(name: str, group: Group) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise BackendUnavailableError("training.device: torch finds no CUDA device; use --set training.device=cpu")
        index = int(name.partition(":")[2] or torch.cuda.current_device())
        if index >= torch.cuda.device_count():
            raise BackendUnavailableError(f"training.device: {name}: there are {torch.cuda.device_count()} GPUs")
        if group.world > 1:
            return torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(index)  # what names no device lands on this one
    return torch.device(name)


@contextlib.contextmanager
def _claimed(run: Path, group: Group, *, resume: bool) -> Iterator[None]:
    """The run's folder, made and locked by process 0 against a second training.

    Raises:
        OutputError: Not empty without ``resume``, not a run, in use, or not writable.
    """
    if not group.leads:
        yield
        return
    if run.exists() and not run.is_dir():
        raise OutputError(f"{run}: a file; give a folder for the run")
    content = [path for path in run.iterdir() if path.name != LOCK] if run.is_dir() else []
    if content and not resume:
        raise OutputError(f"{run}: not empty; go on with --resume, or choose another --out")
    if content and not (run / FILE).is_file():
        raise OutputError(f"{run}: holds other files and no run; choose another --out")
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
        handle = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"{run}: another training is running in it") from None
        yield
    finally:
        os.close(handle)


# ---- results ---------------------------------------------------------------------------------


def _tune(
    recipe: Recipe, images: Any, group: Group, device: torch.device, reporter: Reporter
) -> tuple[Recipe, list[dict[str, Any]]]:
    if group.world > 1:
        raise UsageError("--tune times one process: tune without torchrun first, then pass the choice with --set")
    from ganexport.training.autotune import tune

    return tune(recipe, images, device, reporter)


def _count_parameters(recipe: Recipe) -> dict[str, int]:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        generator, discriminator, _ = build(recipe)
    count = {"generator": generator, "discriminator": discriminator}
    return {name: sum(p.numel() for p in network.parameters()) for name, network in count.items()}


def _result(run: Path | None, step: int, recipe: Recipe, finished: bool = False, **fields: Any) -> TrainingResult:
    lines = [line for line in read_metrics(run) if "d_loss" in line] if run is not None else []
    return TrainingResult(
        run=str(run) if run is not None else None,
        step=step,
        finished=finished,
        metrics=lines[-1] if lines else {},
        recipe=to_plain(recipe),
        **fields,
    )
