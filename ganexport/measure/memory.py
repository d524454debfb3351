"""Memory and processor use of this process, as the system counts it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any


def status() -> dict[str, int]:
    """``peak_bytes``, ``resident_bytes`` and ``threads`` of this process.

    The peak is VmHWM, which belongs to this program alone; ``ru_maxrss`` would carry over the
    parent's peak through fork and exec.
    """
    found: dict[str, int] = {}
    names = {"VmHWM": ("peak_bytes", 1024), "VmRSS": ("resident_bytes", 1024), "Threads": ("threads", 1)}
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return _from_resource()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name in names:
            key, scale = names[name]
            found[key] = int(value.split()[0]) * scale
    return found


def reset_peak() -> None:
    """Forget the peak so far, so that the next one belongs to what runs now (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def device_peak() -> int | None:
    """Peak device memory of this process in bytes as torch's allocator saw it; None when torch is not loaded."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated())


def _from_resource() -> dict[str, int]:
    try:
        import resource
    except ImportError:
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_bytes": peak if sys.platform == "darwin" else peak * 1024}
