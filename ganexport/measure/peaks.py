"""What this machine reaches at best: matrix products and copies, measured, for the roofline.

Called in a worker process of its own, so that nothing else runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

#: Side of the square matrices; large enough to be bound by arithmetic, small enough for a second.
_SIDE = {"cpu": 1536, "cuda": 8192}
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}


def measure(device: str = "cpu", precisions: list[str] | None = None, threads: int | None = None) -> dict[str, Any]:
    """Peak matrix-product rate in each precision, and copy bandwidth.

    Args:
        device: "cpu" or "cuda:0".
        precisions: Of "fp32", "tf32", "bf16", "fp16"; those that need torch are left out without it.
        threads: torch's threads; numpy's follow the environment.

    Returns:
        ``gemm`` (precision → operations a second, two a multiply-accumulate) and ``copy`` (bytes a
        second, read and written bytes both counted).
    """
    torch = _torch(precisions or ["fp32"], device)
    if torch is not None and threads is not None:
        torch.set_num_threads(threads)
    gemm = {}
    for precision in precisions or ["fp32"]:
        rates = [rate for rate in (_numpy_gemm(precision, device), _torch_gemm(torch, precision, device)) if rate]
        if rates:
            gemm[precision] = max(rates)
    return {"device": device, "gemm": gemm, "copy": _copy(torch, device)}


def _torch(precisions: list[str], device: str) -> Any:
    if device == "cpu" and precisions == ["fp32"]:
        return None  # numpy's BLAS is enough, and importing torch takes seconds
    try:
        import torch
    except ImportError:
        return None
    return torch


def _best(run: Callable[[], Any], work: float, seconds: float = 0.6) -> float:
    """The best rate over about ``seconds``: a peak is what the machine does undisturbed."""
    run()
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = max(best, work / (time.perf_counter() - start))
    return best


def _numpy_gemm(precision: str, device: str) -> float | None:
    if precision != "fp32" or device != "cpu":
        return None
    side = _SIDE["cpu"]
    a, b = np.ones((side, side), np.float32), np.ones((side, side), np.float32)
    out = np.empty_like(a)
    return _best(lambda: np.matmul(a, b, out=out), 2 * side**3)


def _torch_gemm(torch: Any, precision: str, device: str) -> float | None:
    if torch is None or (precision == "tf32" and device == "cpu"):
        return None
    dtype = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    side = _SIDE[device.partition(":")[0]]
    a = torch.randn(side, side, device=device).to(dtype)
    b = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(a)

    def run() -> None:
        torch.mm(a, b, out=out)
        if device != "cpu":
            torch.cuda.synchronize(device)

    return _best(run, 2 * side**3)


def _copy(torch: Any, device: str) -> float:
    count = _COPY_BYTES[device.partition(":")[0]]
    if device == "cpu":
        source, target = np.ones(count // 8), np.empty(count // 8)
        return _best(lambda: np.copyto(target, source), 2 * count)
    source, target = (torch.empty(count, dtype=torch.uint8, device=device) for _ in range(2))

    def run() -> None:
        target.copy_(source)
        torch.cuda.synchronize(device)

    return _best(run, 2 * count)
