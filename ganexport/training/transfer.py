"""Transfer learning: start from the weights of another training, as far as they fit, and say what did not.

Freezing the discriminator's first stages is FreezeD (Mo et al. 2020, arXiv:2002.10964): the layers next to the image
keep what they learnt on the larger data set, and the rest is fine-tuned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from ganexport.checkpoint import FOLDER, WEIGHTS, find_run, read_checkpoint, read_tensors
from ganexport.errors import CheckpointError, RecipeError, UsageError
from ganexport.export.weights import read_weights, states

#: A model's discriminator, beside ``WEIGHTS``, where it ships one.
DISCRIMINATOR = "discriminator.safetensors"
NETWORKS = ("generator", "discriminator")
_NAMED = 3


class Transferred(msgspec.Struct, frozen=True):
    """What one network took over.

    Attributes:
        network: "generator" or "discriminator".
        source: Where the weights were.
        loaded: Names of tensors that were taken.
        fresh: Names of the network's tensors that keep their initial values, each with the reason.
        unused: Names of tensors of the source that the network has not.
    """

    network: str
    source: str
    loaded: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        """One line for people."""
        parts = [
            f"{self.network}: {len(self.loaded)} of {len(self.loaded) + len(self.fresh)} tensors from {self.source}"
        ]
        for what, names in (("starting afresh", self.fresh), ("not used", self.unused)):
            if names:
                more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
                parts.append(f"{what}: {', '.join(names[:_NAMED])}{more}")
        return "; ".join(parts)


def start_from(source: str, generator: nn.Module, discriminator: nn.Module) -> tuple[Transferred, ...]:
    """Copy the weights of a source into two networks, tensor by tensor, where name and shape agree.

    Args:
        source: A run (its averaged generator and its discriminator), a trained model's folder or name, or a weights
            file: a generator's state, or one whose names begin with "generator." and "discriminator.".
        generator: Changed in place.
        discriminator: Changed in place, when the source has one.

    Returns:
        What was loaded, one entry a network; no entry for a discriminator that the source does not have.

    Raises:
        CheckpointError: Nothing there, damaged, or nothing of it fits the generator.
    """
    found = read_source(source)
    taken = []
    for name, module in zip(NETWORKS, (generator, discriminator), strict=True):
        if name in found:
            taken.append(_copy_fitting(module, found[name], name, source))
    if not taken or not taken[0].loaded:
        raise CheckpointError(
            f"--init-from {source}: nothing in it fits the recipe's generator"
            + (f" ({taken[0].fresh[0]})" if taken and taken[0].fresh else "")
            + "; train the same architecture"
        )
    return tuple(taken)


def read_source(source: str) -> dict[str, Mapping[str, Tensor]]:
    """The tensors of a source by network: "generator" always, "discriminator" where there is one.

    Raises:
        CheckpointError: Nothing there, or damaged.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _from_file(path)
    folder = find_run(source)
    if (folder / WEIGHTS).is_file():
        found = {"generator": read_tensors(folder / WEIGHTS)}
        if (folder / DISCRIMINATOR).is_file():
            found["discriminator"] = read_tensors(folder / DISCRIMINATOR)
        return dict(found)
    if not (folder / FOLDER).is_dir():
        raise CheckpointError(f"--init-from {source}: comes as a recipe without weights")
    tensors = read_checkpoint(folder, only=("generator", "ema", "discriminator")).tensors
    return {"generator": tensors.get("ema", tensors["generator"]), "discriminator": tensors["discriminator"]}


def _from_file(path: Path) -> dict[str, Mapping[str, Tensor]]:
    content = states(read_weights(path))
    if not content:
        raise CheckpointError(f"--init-from {path}: holds no tensors")
    flat = content.get("", {})
    split = {
        name: {key.removeprefix(f"{name}."): value for key, value in flat.items() if key.startswith(f"{name}.")}
        for name in NETWORKS
    }
    for name in NETWORKS:
        split[name] = split[name] or content.get(name, {})
    if not split["generator"]:
        if len(content) > 1:
            raise CheckpointError(
                f"--init-from {path}: holds several states ({', '.join(sorted(content))}); "
                "call the right ones generator and discriminator"
            )
        split["generator"] = next(iter(content.values()))
    return {name: tensors for name, tensors in split.items() if tensors}


def _copy_fitting(module: nn.Module, tensors: Mapping[str, Tensor], network: str, source: str) -> Transferred:
    own = module.state_dict()
    loaded, fresh = [], []
    with torch.no_grad():
        for name, tensor in own.items():
            given = tensors.get(name)
            if given is None:
                fresh.append(f"{name} (not in the source)")
            elif given.shape != tensor.shape:
                fresh.append(f"{name} ({list(given.shape)} in the source, {list(tensor.shape)} here)")
            elif not torch.isfinite(given.float()).all():
                raise CheckpointError(f"--init-from {source}: {network} tensor {name} holds NaN or infinite values")
            else:
                tensor.copy_(given)
                loaded.append(name)
    unused = tuple(name for name in tensors if name not in own)
    return Transferred(network, source, tuple(loaded), tuple(fresh), unused)


def stages(discriminator: nn.Module, images: Tensor, labels: Tensor | None = None) -> list[nn.Module]:
    """The discriminator's layers with weights in the order in which an image passes them.

    Lists, sequences and dictionaries of modules are looked into; a residual block is one stage.

    Args:
        discriminator: Called once, in evaluation mode, on its own device.
        images: [N, C, H, W], of any content.
        labels: [N] for a conditional discriminator.
    """

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if isinstance(child, nn.ModuleList | nn.Sequential | nn.ModuleDict):
                yield from walk(child)
            elif any(True for _ in child.parameters()):
                yield child

    passed: dict[nn.Module, None] = {}
    hooks = [child.register_forward_pre_hook(lambda m, _: passed.setdefault(m)) for child in walk(discriminator)]
    training = discriminator.training
    try:
        with torch.no_grad():
            discriminator.eval()(images, *([] if labels is None else [labels]))
    finally:
        discriminator.train(training)
        for hook in hooks:
            hook.remove()
    return list(passed)


def freeze(discriminator: nn.Module, count: int, images: Tensor, labels: Tensor | None = None) -> None:
    """Freeze the first ``count`` :func:`stages` of a discriminator: their weights get no gradient.

    Raises:
        RecipeError: It has no more stages than that, so nothing would be left to train.
    """
    found = stages(discriminator, images, labels)
    if count >= len(found):
        raise RecipeError(
            f"transfer.freeze_discriminator: {count}: the discriminator has {len(found)} stages; freeze fewer"
        )
    for stage in found[:count]:
        stage.requires_grad_(False)


def check_freezable(taken: tuple[Transferred, ...], count: int) -> None:
    """Refuse to freeze a discriminator that was not loaded.

    Raises:
        UsageError: The source has no discriminator that fits.
    """
    if count and not any(entry.network == "discriminator" and entry.loaded for entry in taken):
        raise UsageError("--freeze-d: the source has no discriminator that fits; frozen random layers learn nothing")
