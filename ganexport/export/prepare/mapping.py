"""The mapping network of a style generator: its mean latent, truncation towards it, and the cut behind it.

Any sub-module serves whose one tensor everything else is made from: it is named by its path
("mapping", "style", "g.map"), never recognised by its class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ganexport.errors import ExportError, UsageError
from ganexport.export.prepare._copying import copied

#: Draws over which the mean latent is taken, and how many run at once.
MEAN_DRAWS, MEAN_BATCH = 4096, 256
#: Seed of those draws, apart from the certificate's and calibration's.
MEAN_SEED = 0x3EA7


class Reached(Exception):  # noqa: N818 - control flow: forward need not go on
    """Carries what the mapping network returned."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value


def submodule(module: nn.Module, path: str) -> nn.Module:
    """The sub-module at a path.

    Raises:
        UsageError: There is none; those of the first two levels are named.
    """
    try:
        found = module.get_submodule(path) if path else None
    except AttributeError:
        found = None
    if found is None:
        names = [name for name, _ in module.named_modules() if name and name.count(".") < 2]
        shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
        raise UsageError(f"--mapping {path}: no such sub-module; there is: {shown or 'none'}")
    return found


def replace(module: nn.Module, path: str, made: nn.Module) -> None:
    """Put another module at a path."""
    parent, _, name = path.rpartition(".")
    module.get_submodule(parent)._modules[name] = made


class _StandIn(nn.Module):
    """Stands in a sub-module's place, with its attributes for those who read them.

    Args:
        inner: What stood there.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        """The inner module's, where this one has none; how to copy it is nobody else's affair."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return getattr(super().__getattr__("inner"), name)


class _Through(_StandIn):
    """Stands in the place of a sub-module on the way to the mapping network.

    Exporters follow the calls of modules, and one that is left by an exception breaks their account. Calling this one
    is no such call: on the way a module's ``forward`` runs alone, and the mapping network has returned when
    :class:`Reached` is raised.
    """

    def __init__(self, inner: nn.Module, stop: bool, path: str) -> None:
        super().__init__(inner)
        self.stop, self.path = stop, path

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """Run what stands behind, and stop where that was the mapping network."""
        if self.stop:
            raise Reached(_one_tensor(self.inner(*inputs, **keywords), self.path))
        return self.inner.forward(*inputs, **keywords)


def _stop_at(module: nn.Module, path: str) -> None:
    """Make ``module.forward`` end with :class:`Reached` as soon as the sub-module has answered."""
    names = path.split(".")
    for depth in range(len(names), 0, -1):  # from the inside, so that paths still hold
        inside = ".".join(names[:depth])
        replace(module, inside, _Through(module.get_submodule(inside), depth == len(names), path))


def _one_tensor(value: Any, path: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise UsageError(
            f"--mapping {path}: returns a {type(value).__name__}; name a sub-module that returns one tensor"
        )
    return value


class UpToMapping(nn.Module):
    """Inputs to w: the module, left as soon as its mapping network has answered.

    Args:
        module: The whole generator; a copy is changed.
        path: Of its mapping network.
        call: How the module is called with the inputs: ``call(module, inputs, keywords)``.
    """

    def __init__(self, module: nn.Module, path: str, call: Any) -> None:
        super().__init__()
        submodule(module, path)
        self.module, self.path, self.call = copied(module), path, call
        _stop_at(self.module, path)

    def forward(self, *inputs: torch.Tensor, **keywords: Any) -> torch.Tensor:
        """w for the inputs."""
        try:
            self.call(self.module.forward, inputs, keywords)
        except Reached as found:
            return found.value
        raise ExportError(
            f"--mapping {self.path}: forward never calls it by that name; name one that it does, or its parent"
        )


class _Held:
    """What a stand-in returns, and how often it was asked; apart, since exporters put modules' attributes back."""

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None
        self.calls = 0


class Given(_StandIn):
    """Stands in the mapping network's place and returns the w that it was given.

    Args:
        inner: What stood there, whose attributes others may read.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.held = _Held()

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        """w."""
        self.held.calls += 1
        assert self.held.value is not None
        return self.held.value


class FromMapping(nn.Module):
    """w and the inputs that are needed beside it, to the outputs.

    Args:
        module: The whole generator; in a copy its mapping network is replaced.
        path: Of its mapping network.
        call: As in :class:`UpToMapping`.
        shapes: Of each of the module's inputs, without the leading batch, with its dtype; None for an input that
            is given. The others do not reach the outputs but through w: zeros stand for them.
    """

    def __init__(
        self, module: nn.Module, path: str, call: Any, shapes: list[tuple[tuple[int, ...], torch.dtype] | None]
    ) -> None:
        super().__init__()
        module = copied(module)
        self.given = Given(submodule(module, path))
        replace(module, path, self.given)
        self.module, self.path, self.call, self.shapes = module, path, call, shapes

    def forward(self, w: torch.Tensor, *others: torch.Tensor, **keywords: Any) -> Any:
        """The outputs for w."""
        left = iter(others)
        inputs = [
            next(left) if known is None else torch.zeros((w.shape[0], *known[0]), dtype=known[1])
            for known in self.shapes
        ]
        held = self.given.held
        held.value, held.calls = w, 0
        try:
            value = self.call(self.module, tuple(inputs), keywords)
        finally:
            held.value = None
        if held.calls != 1:
            raise UsageError(
                f"--mapping {self.path}: forward calls it {held.calls} times; a split needs exactly one call"
            )
        return value


class Truncated(_StandIn):
    """A mapping network whose w is pulled towards the mean: mean + psi (w - mean).

    Args:
        inner: The mapping network.
        mean: [1, …], of w over many draws.
        psi: 1 leaves w, 0 gives the mean.
    """

    def __init__(self, inner: nn.Module, mean: torch.Tensor, psi: float) -> None:
        super().__init__(inner)
        self.psi = psi
        self.latent_mean: torch.Tensor
        self.register_buffer("latent_mean", mean)

    def forward(self, *inputs: Any, **keywords: Any) -> torch.Tensor:
        """The truncated w."""
        w: torch.Tensor = self.inner(*inputs, **keywords)
        return self.latent_mean + self.psi * (w - self.latent_mean)
