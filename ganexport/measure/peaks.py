"""What this machine reaches at best: matrix products and copies, measured, for the roofline.

Called in a worker process of its own, so that nothing else runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ganexport.environment import usable_cores
from ganexport.runtime.base import Array

#: What numpy's libraries take their number of threads from.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
#: Side of the square matrices; large enough to be bound by arithmetic, small enough for a second.
_SIDE = {"cpu": 1536, "cuda": 8192}
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}


def measure(device: str = "cpu", precisions: list[str] | None = None, threads: int | None = None) -> dict[str, Any]:
    """Peak matrix-product rate in each precision, and copy bandwidth.

    Args:
        device: "cpu" or "cuda:0".
        precisions: Of "fp32", "tf32", "bf16", "fp16"; those that need torch are left out without it.
        threads: Of the CPU that compute and copy; as many as this process may use cores when not given. numpy's
            products follow the environment (:data:`THREAD_VARIABLES`).

    Returns:
        ``gemm`` (precision, where it has a rate of its own here → operations a second, two a multiply-accumulate) and
        ``copy`` (bytes a second, read and written bytes both counted; of one thread or of all together, whichever is
        more).
    """
    torch = _torch(precisions or ["fp32"], device)
    if torch is not None and threads is not None:
        torch.set_num_threads(threads)
    gemm = {}
    for precision in precisions or ["fp32"]:
        rates = [rate for rate in (_numpy_gemm(precision, device), _torch_gemm(torch, precision, device)) if rate]
        if rates:
            gemm[precision] = max(rates)
    if device == "cpu" and {"fp16", "bf16"} & set(gemm):
        full = gemm.get("fp32") or _numpy_gemm("fp32", device) or 0.0
        # Where torch multiplies halves one by one, engines compute them in fp32: what it reaches is no peak of theirs.
        gemm = {name: rate for name, rate in gemm.items() if name not in ("fp16", "bf16") or rate >= full}
    if device == "cpu":  # some machines give all they have to one thread, and less to several
        copy = max(_copy(count) for count in {1, threads or usable_cores()})
    else:
        copy = _torch_copy(torch, device)
    return {"device": device, "gemm": gemm, "copy": copy}


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


def _copy(threads: int) -> float:
    """Bytes a second of threads that each copy arrays of their own, which they were the first to touch."""
    count = _COPY_BYTES["cpu"] // 8 // threads
    together = threading.Barrier(threads)
    repeats = max(1, threads // 4)  # copies of one task, so that handing out many tasks takes no time beside them

    def again(target: Array, source: Array) -> None:
        for _ in range(repeats):
            np.copyto(target, source)

    def touch(_index: int) -> tuple[Array, Array]:
        together.wait()  # so that no thread takes the arrays of two
        return np.ones(count), np.ones(count)

    with ThreadPoolExecutor(threads, "copy") as pool:
        pairs = list(pool.map(touch, range(threads)))

        def run() -> None:
            for done in [pool.submit(again, target, source) for source, target in pairs]:
                done.result()

        return _best(run, repeats * 2 * 8 * count * threads)


def _torch_copy(torch: Any, device: str) -> float:
    source, target = (torch.empty(_COPY_BYTES["cuda"], dtype=torch.uint8, device=device) for _ in range(2))

    def run() -> None:
        target.copy_(source)
        torch.cuda.synchronize(device)

    return _best(run, 2 * _COPY_BYTES["cuda"])
