"""What every command prints with: results on stdout, progress and remarks on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
import msgspec

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

json_option = click.option("--json", "as_json", is_flag=True, help="Print machine-readable JSON on stdout.")


def print_json(value: Any) -> None:
    """Any msgspec-encodable value as indented JSON on stdout."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def remarks() -> Console:
    """The console for remarks, on stderr, so that stdout holds results alone."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def results() -> Console:
    """The console for tables and results, on stdout; as wide as needed when not a terminal."""
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)


def whole_numbers(text: str, option: str) -> list[int]:
    """An option's comma-separated whole numbers.

    Raises:
        UsageError: Something else stands between the commas.
    """
    from ganexport.errors import UsageError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r}: write whole numbers separated by commas") from None


def size(text: str) -> tuple[str, int]:
    """A ``--size`` option's name and number.

    Raises:
        UsageError: Not NAME=N.
    """
    from ganexport.errors import UsageError

    name, _, number = text.partition("=")
    if not name or not (number.isascii() and number.isdigit()):
        raise UsageError(f"--size {text!r}: write NAME=N, e.g. height=256")
    return name, int(number)


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator[tuple[Progress, Any]]:
    """A progress bar on stderr; plain nothing when stderr is not a terminal.

    Yields:
        (progress, task): call ``progress.advance(task, n)`` or ``progress.update(task, …)``.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = remarks()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        yield bar, bar.add_task(description, total=total)
