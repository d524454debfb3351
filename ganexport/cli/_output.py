"""Whether a file can be written, asked before the work of filling it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click


class Destination(click.Path):
    """A path to write to; not the empty text of a variable that is not set, which would mean the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse the empty text."""
        if not value:
            self.fail("is empty; name a file or a folder", param, ctx)
        return super().convert(value, param, ctx)


def require_writable(destination: Path) -> None:
    """Refuse a file that could not be written; nothing is left behind, folders included.

    Raises:
        OutputError: It is a folder or a device, or no file can be made beside it.
    """
    from ganexport.artifact import writing
    from ganexport.errors import OutputError

    with writing(destination):
        if destination.exists() and not destination.is_file():
            what = "a folder" if destination.is_dir() else "no regular file"
            raise OutputError(f"{destination}: is {what}; name a file")
        folder = next(parent for parent in destination.absolute().parents if parent.exists())
        tempfile.NamedTemporaryFile(prefix=f".{destination.name}.", dir=folder).close()  # as write_atomic names it
