"""Metrics on disk: one JSON object a line, and TensorBoard's events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ganexport.artifact import write_atomic, writing
from ganexport.errors import MissingDependencyError

FILE = "metrics.jsonl"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics; a last line cut off by a kill is left out."""
    path = run / FILE
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


class MetricsWriter:
    """Appends lines to metrics.jsonl, after cutting it back to the step training starts from.

    Args:
        run: The run's folder.
        step: Lines beyond this step are removed: their training was lost and is repeated.
        tensorboard: Also write events below ``run/tensorboard``.

    Raises:
        MissingDependencyError: tensorboard is wanted and not installed.
        OutputError: Not writable.
    """

    def __init__(self, run: Path, step: int, *, tensorboard: bool) -> None:
        self._path = run / FILE
        kept = [line for line in read_metrics(run) if line["step"] <= step]
        write_atomic(self._path, "".join(_line(line) for line in kept).encode())
        self._events: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise MissingDependencyError(
                    "logging.tensorboard needs tensorboard: pip install tensorboard, or --set logging.tensorboard=false"
                ) from None
            with writing(run / "tensorboard"):
                self._events = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; numbers also go to TensorBoard.

        Raises:
            OutputError: The disk is full.
        """
        with writing(self._path), self._path.open("a", encoding="utf-8") as stream:
            stream.write(_line(line))
        if self._events is not None:
            for name, value in line.items():
                if name != "step" and isinstance(value, int | float):
                    self._events.add_scalar(name, value, line["step"])

    def image(self, name: str, pixels: Any, step: int) -> None:
        """A grid, uint8 [H, W, C], to TensorBoard."""
        if self._events is not None:
            self._events.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close."""
        if self._events is not None:
            self._events.close()


def _line(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"
