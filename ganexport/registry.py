"""Registries that list names without importing anything.

A registry is a package folder: each module in it whose name does not start with an
underscore is one entry, and the file's name (underscores written as hyphens) is its key.
Adding an architecture, an objective or a format is therefore adding one file.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from ganexport.errors import unknown_name


class Registry:
    """The modules of one package, by name, imported only when asked for.

    Args:
        package: Dotted name of the package that holds one module an entry.
        kind: What an entry is, for error messages ("architecture", "objective", …).
        exclude: Module names in the folder that are not entries.
    """

    def __init__(self, package: str, kind: str, exclude: tuple[str, ...] = ()) -> None:
        self.package = package
        self.kind = kind
        root = Path(__file__).resolve().parent.joinpath(*package.split(".")[1:])
        self._modules = {
            path.stem.replace("_", "-"): path.stem
            for path in sorted(root.glob("*.py"))
            if not path.stem.startswith("_") and path.stem not in exclude
        }

    def names(self) -> tuple[str, ...]:
        """All keys, sorted, without importing any entry."""
        return tuple(self._modules)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def load(self, name: str) -> ModuleType:
        """Import and return the entry's module.

        Raises:
            UsageError: The name is not in the registry; the known ones and the nearest are named.
        """
        if name not in self._modules:
            raise unknown_name(self.kind, name, self.names())
        return importlib.import_module(f"{self.package}.{self._modules[name]}")
