"""Recipes: everything a training depends on, typed, from TOML; all mistakes are reported at once.

A recipe is found by name (those that come with the package, in ``models/``), as a folder with a
``recipe.toml`` in it, or as a ``.toml`` file.
"""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ganexport.errors import GanExportError, RecipeError, UsageError, nearest, unknown_name
from ganexport.registry import Registry

FILE = "recipe.toml"

Count = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: no unknown keys, never changed."""


class Component(Section, frozen=True, kw_only=True):
    """An architecture, objective or regularizer: its registry key and its own options.

    In TOML the options stand beside ``name``.
    """

    name: str
    options: dict[str, Any] = {}


class Data(Section, frozen=True, kw_only=True):
    """Where the images come from.

    Attributes:
        source: A name ("mnist-10k" comes with the package) or a path; see ``ganexport.data``.
        fit: What to do with images of another size than the model's: "refuse", "pad" or "resize".
        workers: Processes that decode pictures when they do not fit in memory.
    """

    source: str = "mnist-10k"
    fit: Literal["refuse", "pad", "resize"] = "refuse"
    workers: Count = 2


class Training(Section, frozen=True, kw_only=True):
    """The loop.

    Attributes:
        steps: Generator updates.
        batch_size: Images an update, over all processes and accumulated parts.
        seed: Of weights, latents, order of the data and everything else random.
        n_critic: Discriminator updates before each generator update.
        accumulation: Equal parts in which each process works through its share of a batch, to save memory.
        initialization: "default" (the architecture's, or torch's) or "normal" (N(0, 0.02), as in the DCGAN paper;
            refused by architectures with one of their own: stylegan2 and r3gan).
        precision: "fp32", "tf32", "bf16" or "fp16" (autocast; weights stay fp32).
        compile: "off" or a mode of torch.compile.
        cuda_graphs: Replay each update as one CUDA graph, compiled or not; needs a GPU.
        memory_format: "contiguous" or "channels_last".
        device: "auto" takes CUDA where there is a GPU.
        threads: CPU threads inside an operation; 0 takes one a core.
        checkpoint_every: Steps between checkpoints.
        keep: Checkpoints kept; older ones are removed.
    """

    steps: Count = 938
    batch_size: Count = 64
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    n_critic: Count = 1
    accumulation: Count = 1
    initialization: Literal["default", "normal"] = "default"
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    compile: Literal["off", "default", "reduce-overhead", "max-autotune", "aot_eager"] = "off"
    cuda_graphs: bool = False
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    device: Annotated[str, Meta(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    checkpoint_every: Count = 250
    keep: Count = 3


class Optimizer(Section, frozen=True, kw_only=True):
    """One network's optimizer.

    Attributes:
        name: "adam", "adamw" or "rmsprop".
        rate: Learning rate before the schedule.
        betas: Of Adam and AdamW.
        alpha: Smoothing of RMSProp.
        momentum: Of RMSProp.
        eps: Added to the denominator.
        weight_decay: L2 for Adam and RMSProp, decoupled for AdamW.
        clip_norm: Gradients are scaled down to this norm; 0 leaves them alone.
    """

    name: Literal["adam", "adamw", "rmsprop"] = "adam"
    rate: Positive = 2e-4
    betas: tuple[BelowOne, BelowOne] = (0.5, 0.999)
    alpha: BelowOne = 0.99
    momentum: BelowOne = 0.0
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    clip_norm: NonNegative = 0.0


class Optimizers(Section, frozen=True, kw_only=True):
    """Separate optimizers of the two networks."""

    generator: Optimizer = Optimizer()
    discriminator: Optimizer = Optimizer()


class Ema(Section, frozen=True, kw_only=True):
    """Exponential moving average of the generator's weights, which is what gets exported.

    Attributes:
        decay: Per step; 0 switches the average off.
        warmup: Steps s over which the decay rises: min(decay, (1 + t) / (warmup + t)) at step t.
    """

    decay: BelowOne = 0.999
    warmup: Count = 10


class Schedule(Section, frozen=True, kw_only=True):
    """The rate of both optimizers over the run, as a factor.

    Attributes:
        name: "constant", "linear" or "cosine" (from 1 down to ``final``).
        warmup: Steps over which the factor rises linearly from 0.
        start: Share of the run after which it begins to fall.
        final: Factor at the end.
    """

    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Whole = 0
    start: BelowOne = 0.0
    final: Share = 0.0


class Transfer(Section, frozen=True, kw_only=True):
    """Where the weights come from, other than from the seed.

    Attributes:
        init_from: A run, a trained model's name or folder, or a weights file; "" starts afresh. What fits by name
            and shape is taken, the rest starts afresh and is named.
        freeze_discriminator: Stages of the discriminator, from the image on, that are not trained (FreezeD).
    """

    init_from: str = ""
    freeze_discriminator: Whole = 0


class Guard(Section, frozen=True, kw_only=True):
    """When training counts as diverged.

    Attributes:
        explode: A loss beyond this, or a gradient norm beyond a hundred times it, is an explosion.
        collapse: For this many logged steps in a row the critic tells real from fake with certainty
            (or answers everything alike) and the generator gets no gradient.
        patience: Logged steps in a row that an explosion must last.
    """

    explode: Positive = 1e4
    collapse: Count = 50
    patience: Count = 3


class Logging(Section, frozen=True, kw_only=True):
    """What is written down, and how often.

    Attributes:
        every: Steps between lines of metrics.jsonl.
        sample_every: Steps between sample grids.
        samples: Images in a grid.
        tensorboard: Also write TensorBoard events.
    """

    every: Count = 10
    sample_every: Count = 250
    samples: Annotated[int, Meta(ge=1, le=1024)] = 64
    tensorboard: bool = True


class Recipe(Section, frozen=True, kw_only=True):
    """A whole recipe. ``name`` is what runs and artifacts made of it are called."""

    name: str
    description: str = ""
    architecture: Component
    objective: Component
    regularizers: tuple[Component, ...] = ()
    data: Data = Data()
    training: Training = Training()
    optimizer: Optimizers = Optimizers()
    ema: Ema = Ema()
    schedule: Schedule = Schedule()
    transfer: Transfer = Transfer()
    guard: Guard = Guard()
    logging: Logging = Logging()


# ---- finding ---------------------------------------------------------------------------------


def models_folder() -> Path:
    """The folder of the recipes and trained models that come with ganexport (installed, or in a checkout)."""
    here = Path(__file__).resolve().parent
    return here / "models" if (here / "models").is_dir() else here.parent / "models"


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with ganexport, sorted."""
    return tuple(sorted(path.parent.name for path in models_folder().glob(f"*/{FILE}")))


def find_recipe(source: str) -> Path:
    """The recipe file that a name, folder or file stands for.

    Raises:
        RecipeError: There is none; the names and the nearest are given.
    """
    if source in recipe_names():
        return models_folder() / source / FILE
    path = Path(source).expanduser()
    if path.is_dir() and (path / FILE).is_file():
        return path / FILE
    if path.is_file():
        return path
    if path.is_dir():
        raise RecipeError(f"{source}: no {FILE} in this folder")
    if path.suffix == ".toml" or "/" in source:
        raise RecipeError(f"{source}: no such recipe file")
    raise RecipeError(str(unknown_name("recipe", source, recipe_names())) + "; or give a .toml file")


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        RecipeError: Unreadable, or not TOML (the line is named).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not TOML: {error}") from None


def load_recipe(source: str, sets: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        source: As :func:`find_recipe`.
        sets: "key.path=value" overrides, the value in TOML (or a bare word).

    Returns:
        The resolved recipe: every option of the architecture, objective and regularizers filled in.

    Raises:
        RecipeError: Everything wrong with it at once, each with its path and the nearest known key.
    """
    path = find_recipe(source)
    raw = read_toml(path)
    raw.setdefault("name", path.parent.name if path.name == FILE else path.stem)
    return resolve(override(raw, sets), str(source))


def override(raw: Mapping[str, Any], sets: Sequence[str]) -> dict[str, Any]:
    """A copy of a raw recipe with "key.path=value" settings applied.

    Raises:
        RecipeError: A setting without "=", or a path that runs through a plain value.
    """
    result: dict[str, Any] = _copy(raw)
    for setting in sets:
        key, equals, text = setting.partition("=")
        keys = key.strip().split(".")
        if not equals or not all(keys):
            raise RecipeError(f"--set {setting!r}: write key=value, e.g. --set training.steps=2000")
        _assign(result, keys, _value(text.strip()), setting)
    return result


def _assign(target: Any, keys: list[str], value: Any, setting: str) -> None:
    for key in keys[:-1]:
        target = _enter(target, key, setting)
    last = keys[-1]
    if isinstance(target, list):
        _enter(target, last, setting)
        target[int(last)] = value
    else:
        target[last] = value


def _enter(target: Any, key: str, setting: str) -> Any:
    if isinstance(target, list):
        if not key.isdigit() or int(key) >= len(target):
            raise RecipeError(f"--set {setting!r}: {key!r} is not one of the {len(target)} entries, counted from 0")
        return target[int(key)]
    child = target.setdefault(key, {})
    if not isinstance(child, dict | list):
        raise RecipeError(f"--set {setting!r}: {key} is a plain value, it has no keys inside")
    return child


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


# ---- checking --------------------------------------------------------------------------------


def registries() -> dict[str, Registry]:
    """Where each kind of component is looked up: "architecture", "objective", "regularizers"."""
    from ganexport.architectures import ARCHITECTURES
    from ganexport.objectives import OBJECTIVES
    from ganexport.objectives.regularizers import REGULARIZERS

    return {"architecture": ARCHITECTURES, "objective": OBJECTIVES, "regularizers": REGULARIZERS}


def resolve(raw: Mapping[str, Any], where: str, *, components: bool = True) -> Recipe:
    """A checked recipe of nested plain values.

    Args:
        raw: As read from TOML.
        where: What to call it in an error.
        components: Look up the architecture, objective and regularizers and fill in their options
            (which imports them, and torch with them).

    Raises:
        RecipeError: Everything wrong at once.
    """
    problems: list[str] = []
    plain = _copy(raw)
    _gather_options(plain, problems)
    recipe = _build(Recipe, plain, "", problems)
    if recipe is not None:
        problems += _contradictions(recipe)
        if components:
            recipe = _with_options(recipe, problems)
    if problems or recipe is None:
        count = f"{len(problems)} mistakes: " if len(problems) > 1 else ""
        raise RecipeError(f"recipe {where}: {count}{'; '.join(problems)}")
    checked: Recipe = recipe
    return checked


def _gather_options(raw: dict[str, Any], problems: list[str]) -> None:
    """Turn ``{name, a, b}`` of components into ``{name, options: {a, b}}``."""

    def gathered(table: Any, path: str) -> Any:
        if isinstance(table, str):
            return {"name": table}
        if not isinstance(table, dict):
            problems.append(f"{path}: expected a table with a name, got {type(table).__name__}")
            return {"name": ""}
        options = {key: value for key, value in table.items() if key != "name"}
        return {**({"name": table["name"]} if "name" in table else {}), "options": options}

    for key in ("architecture", "objective"):
        if key in raw:
            raw[key] = gathered(raw[key], key)
    if isinstance(raw.get("regularizers"), list):
        raw["regularizers"] = [gathered(t, f"regularizers.{i}") for i, t in enumerate(raw["regularizers"])]


def _build(kind: type[msgspec.Struct], raw: Any, path: str, problems: list[str]) -> Any:
    """An instance of a struct; None (and entries in ``problems``) when values are wrong."""
    if not isinstance(raw, Mapping):
        problems.append(f"{path}: expected a table, got {type(raw).__name__}")
        return None
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    before = len(problems)
    for key in raw:
        if key not in fields:
            guess = nearest(str(key), list(fields))
            hint = f" (did you mean {_join(path, guess)}?)" if guess else f" (known: {', '.join(fields)})"
            problems.append(f"{_join(path, str(key))}: unknown key{hint}")
    values = {}
    hints = typing.get_type_hints(kind, include_extras=True)
    for name, field in fields.items():
        if name in raw:
            values[name] = _convert(raw[name], hints[name], _join(path, name), problems)
        elif field.required:
            problems.append(f"{_join(path, name)}: missing")
    if len(problems) > before:
        return None
    try:
        return kind(**values)
    except (GanExportError, ValueError, TypeError) as error:
        problems.append(f"{path}: {error}" if path else str(error))
        return None


def _convert(value: Any, kind: Any, path: str, problems: list[str]) -> Any:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return _build(kind, value, path, problems)
    arguments = typing.get_args(kind)
    is_struct_list = (
        typing.get_origin(kind) is tuple
        and len(arguments) == 2
        and isinstance(arguments[0], type)
        and issubclass(arguments[0], msgspec.Struct)
    )
    if is_struct_list and isinstance(value, list):
        return tuple(_build(arguments[0], item, f"{path}.{i}", problems) for i, item in enumerate(value))
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        problems.append(f"{path}: {_reason(error, value, kind)}")
        return None


def _reason(error: msgspec.ValidationError, value: Any, kind: Any) -> str:
    text = str(error).partition(" - at ")[0].replace("`", "")
    text = text[:1].lower() + text[1:]
    choices = [a for a in typing.get_args(kind) if isinstance(a, str)] if typing.get_origin(kind) is Literal else []
    if choices and isinstance(value, str):
        guess = nearest(value, choices)
        return f"{value!r} is not one of {', '.join(choices)}" + (f" (did you mean {guess!r}?)" if guess else "")
    return text if "got" in text else f"{text}, got {value!r}"


def _join(path: str, key: str | None) -> str:
    return f"{path}.{key}" if path else str(key)


def _contradictions(recipe: Recipe) -> list[str]:
    """What is wrong between values that are right each for itself."""
    found = []
    training = recipe.training
    if training.batch_size % training.accumulation:
        found.append(
            f"training.accumulation: {training.accumulation} does not divide the batch size {training.batch_size}"
        )
    if recipe.schedule.warmup >= training.steps and recipe.schedule.warmup:
        found.append(f"schedule.warmup: {recipe.schedule.warmup} steps of {training.steps} leave nothing to train")
    if recipe.transfer.freeze_discriminator and not recipe.transfer.init_from:
        found.append("transfer.freeze_discriminator: needs transfer.init_from: frozen random layers learn nothing")
    return found


def _with_options(recipe: Recipe, problems: list[str]) -> Recipe:
    known = registries()

    def filled(component: Component, kind: str, path: str) -> Component:
        try:
            module = known[kind].load(component.name)
        except UsageError as error:
            problems.append(f"{path}.name: {error}")
            return component
        if getattr(module, "OWN_INITIALIZATION", False) and recipe.training.initialization != "default":
            problems.append(f"training.initialization: {component.name} has one of its own; leave it at default")
        options = getattr(module, "Options", None)
        if options is None:
            problems.extend(f"{path}.{key}: unknown key; {component.name} has no options" for key in component.options)
            return component
        made = _build(options, component.options, path, problems)
        return component if made is None else Component(name=component.name, options=msgspec.to_builtins(made))

    return msgspec.structs.replace(
        recipe,
        architecture=filled(recipe.architecture, "architecture", "architecture"),
        objective=filled(recipe.objective, "objective", "objective"),
        regularizers=tuple(
            filled(component, "regularizers", f"regularizers.{number}")
            for number, component in enumerate(recipe.regularizers)
        ),
    )


def component_options(component: Component, module: types.ModuleType) -> Any:
    """The ``Options`` struct of a resolved component; None when its module has none.

    Raises:
        RecipeError: Options that do not fit.
    """
    kind = getattr(module, "Options", None)
    if kind is None:
        return None
    problems: list[str] = []
    made = _build(kind, component.options, component.name, problems)
    if made is None:
        raise RecipeError("; ".join(problems))
    return made


# ---- writing ---------------------------------------------------------------------------------


def to_plain(recipe: Recipe) -> dict[str, Any]:
    """Nested plain values, with the options of components beside their names, as in TOML."""
    plain: dict[str, Any] = msgspec.to_builtins(recipe)

    def flat(component: dict[str, Any]) -> dict[str, Any]:
        return {"name": component["name"], **component["options"]}

    plain["architecture"] = flat(plain["architecture"])
    plain["objective"] = flat(plain["objective"])
    plain["regularizers"] = [flat(component) for component in plain["regularizers"]]
    return plain


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML, which :func:`load_recipe` reads back to the same recipe."""
    lines: list[str] = []
    _emit(to_plain(recipe), "", lines)
    return "\n".join(lines).strip() + "\n"


def _emit(table: Mapping[str, Any], path: str, lines: list[str]) -> None:
    tables = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    arrays = {key: value for key, value in table.items() if _is_table_array(value)}
    plain = {key: value for key, value in table.items() if key not in tables and key not in arrays}
    if path and plain:
        lines += ["", f"[{path}]"]
    lines += [f"{key} = {_literal(value)}" for key, value in plain.items() if value is not None and value != []]
    for key, value in tables.items():
        _emit(value, _join(path, key), lines)
    for key, value in arrays.items():
        for entry in value:
            lines += ["", f"[[{_join(path, key)}]]"]
            lines += [f"{name} = {_literal(item)}" for name, item in entry.items() if item is not None]


def _is_table_array(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
        return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_literal(item)}" for key, item in value.items()) + "}"
    return repr(value)
