"""What a person sees of a training: a live bar on a terminal, plain lines elsewhere, nothing from Python."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_SECONDS = 10.0


class Reporter:
    """Says nothing; what the Python function uses unless given another."""

    def resolved(self, toml: str) -> None:
        """The recipe as it will be trained, in TOML."""

    def start(self, done: int, steps: int) -> None:
        """Training goes on from ``done`` of ``steps``."""

    def step(self, step: int) -> None:
        """A step is done."""

    def metrics(self, line: Mapping[str, float]) -> None:
        """A line of metrics was written."""

    def remark(self, text: str) -> None:
        """Something worth knowing happened."""

    def stop(self) -> None:
        """Training ended, well or not."""


class ConsoleReporter(Reporter):
    """A progress bar on a terminal; a line every ten seconds where there is none.

    Args:
        console: Usually stderr's.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Any = None
        self._task: Any = None
        self._latest: Mapping[str, float] = {}
        self._said = 0.0
        self._steps = 0

    def resolved(self, toml: str) -> None:
        """Print the recipe."""
        self._console.print(toml, markup=False)

    def start(self, done: int, steps: int) -> None:
        """Show the bar."""
        self._steps = steps
        self._said = time.monotonic()
        if not self._console.is_terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[numbers]}"), console=self._console)
        self._task = self._bar.add_task("training", total=steps, completed=done, numbers="")
        self._bar.start()

    def step(self, step: int) -> None:
        """Move the bar, or say a line when the last is ten seconds old."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=_numbers(self._latest))
        elif self._steps and (time.monotonic() - self._said >= _PLAIN_SECONDS or step == self._steps):
            self._said = time.monotonic()
            self._console.print(f"step {step}/{self._steps}  {_numbers(self._latest)}".rstrip())

    def metrics(self, line: Mapping[str, float]) -> None:
        """Keep the newest numbers."""
        self._latest = line

    def remark(self, text: str) -> None:
        """Print a line, above the bar when there is one."""
        self._console.print(text, markup=False)

    def stop(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _numbers(line: Mapping[str, float]) -> str:
    wanted = [("D loss", "d_loss"), ("G loss", "g_loss"), ("images/s", "images_per_second")]
    return "  ".join(f"{title} {line[name]:.4g}" for title, name in wanted if name in line)
