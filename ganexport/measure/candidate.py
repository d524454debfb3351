"""What is to be measured: a name, and how a worker process makes a runner of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import msgspec

from ganexport.errors import UsageError


class Candidate(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing to measure, described so that a fresh process can make it.

    Attributes:
        name: Shown in tables; unique within a measurement.
        factory: ``package.module:function``, called in the worker as ``function(**arguments)``; it
            returns a :class:`~ganexport.runtime.base.Runner`. Nothing of it is imported by the
            measuring process.
        arguments: JSON values.
        about: Backend, precision, device, settings: written beside the figures.
        variables: Environment variables of the worker (thread counts of OpenMP, …).
        cores: CPU cores that its process is pinned to; empty pins nothing.
        unavailable: A reason known beforehand why it cannot run; no process is started then.
    """

    name: str
    factory: str
    arguments: dict[str, Any] = {}
    about: dict[str, Any] = {}
    variables: dict[str, str] = {}
    cores: tuple[int, ...] = ()
    unavailable: str = ""

    def described(self) -> dict[str, Any]:
        """The flat mapping that goes into a measurement."""
        return {"name": self.name, **self.about}


def resolve(dotted: str) -> Callable[..., Any]:
    """The function behind ``package.module:function``.

    Raises:
        UsageError: No such module or function.
    """
    module, _, name = dotted.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            raise UsageError(f"{dotted}: no module {error.name!r}") from None
        raise
    except AttributeError:
        raise UsageError(f"{dotted}: {module} has no {name!r}") from None
    assert callable(found)
    return found  # type: ignore[no-any-return]
