"""Where in the user's code something happened."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType, TracebackType

_OWN = str(Path(__file__).resolve().parents[2])


def foreign(path: str) -> bool:
    """Whether a source file is torch's, this package's or no file at all."""
    parts = Path(path).parts
    return path.startswith("<") or path.startswith(_OWN) or "torch" in parts or "sympy" in parts


def caller() -> str:
    """``file.py:12`` of the innermost running frame outside torch and this package; "?" when there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not foreign(frame.f_code.co_filename):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def innermost(trace: TracebackType | None) -> str:
    """``file.py:12`` of the innermost frame of a traceback outside torch and this package, empty without one."""
    found = ""
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if not foreign(path):
            found = f"{Path(path).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found
