"""What a figure was measured on: processor, memory, system, libraries, GPU and its state.

Nothing here identifies a person or a place: no host name, user name or path. Libraries are asked
for their versions through package metadata, so nothing heavy is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

#: Library → the distributions that may provide it, the first that is installed counts.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "numpy": ("numpy",),
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt_rtx_cu13", "tensorrt-rtx", "tensorrt_rtx"),
    "triton": ("triton",),
    "cuda-bindings": ("cuda-bindings",),
    "msgspec": ("msgspec",),
}

#: Vector and matrix instructions, the least first: they decide what low precision is worth.
_FEATURES = (
    *("asimd", "sve", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_int8", "amx_bf16"),
)
#: Where Linux counts the energy of processors, and more than a processor package draws.
POWERCAP = Path("/sys/class/powercap")
PACKAGE_WATTS = 1000
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def describe() -> dict[str, Any]:
    """The conditions of a measurement, as plain JSON values.

    Returns:
        ``cpu`` (model, cores, affinity, frequency), ``memory_bytes``, ``os``, ``python``,
        ``libraries`` (name → version, None when not installed), ``gpus`` (one mapping each, empty
        without an NVIDIA driver), ``load_average`` and the thread-count ``variables`` that were set.
    """
    return {
        "cpu": _cpu(),
        "memory_bytes": _memory(),
        # The release without its build suffix, which may name the machine's owner.
        "os": " ".join([platform.system(), *re.findall(r"^\d+(?:\.\d+)*", platform.release())]),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "libraries": versions(),
        "gpus": gpus(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "variables": {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
    }


def versions() -> dict[str, str | None]:
    """Version of each of :data:`LIBRARIES`, and of ganexport; None when it is not installed."""
    import ganexport

    return {"ganexport": ganexport.__version__} | {name: _version(names) for name, names in LIBRARIES.items()}


def device_key(environment: dict[str, Any]) -> str:
    """A short folder name for a machine's results.

    It is the GPU's name; without one the processor's, its best vector instructions and its core count: a virtual
    machine calls processors of different generations by one name ("AMD EPYC").
    """
    if environment.get("gpus"):
        name = str(environment["gpus"][0].get("name") or "gpu")
    else:
        cpu = environment.get("cpu", {})
        present = [feature for feature in _FEATURES if feature in (cpu.get("features") or ())]
        cores = cpu.get("affinity") or cpu.get("logical") or 1
        name = f"{cpu.get('model') or 'cpu'} {' '.join(present[-1:])} {cores} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def int8_overflows() -> bool | None:
    """Whether int8 products can overflow on this processor; None when that cannot be told.

    x86 without VNNI adds two products of an unsigned and a signed byte in 16 bits (``vpmaddubsw``), which saturates
    as soon as weights use all 8 bits: pictures come out wrong, without an error. Weights of 7 bits are safe.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i686", "i386"):
        return False
    features = _cpu()["features"]
    return not {"avx_vnni", "avx512_vnni"} & set(features) if features else None


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpu() -> dict[str, Any]:
    text = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    frequency = re.search(r"^cpu MHz\s*:\s*([\d.]+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags.group(1).split()) if flags else set()
    return {
        "model": model.group(1).strip() if model else platform.processor() or None,
        "logical": os.cpu_count(),
        "affinity": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "mhz": float(frequency.group(1)) if frequency else None,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        "virtual": " hypervisor " in f" {flags.group(1)} " if flags else None,
        "features": [name for name in _FEATURES if name in present],
    }


def usable_cores() -> int:
    """Processor cores that this process may use: by its affinity, and by its container's limit rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = core_quota()
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def quota_threads() -> int | None:
    """Threads for an engine that would otherwise take every core of the machine; None where it may."""
    return None if core_quota() is None else usable_cores()


def core_quota() -> float | None:
    """Cores' worth of time that control groups grant this process (its container's limit); None without a limit.

    An engine with a thread for every core of the machine is stopped for most of each period under such a limit.
    """
    grants = []
    for line in _read("/proc/self/cgroup").splitlines() or ["0::/"]:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        # A group has no more than those around it. Inside a container its own is mounted at the top, whatever the
        # path says.
        for group in (path, *map(str, PurePosixPath(path).parents)):
            folder = group.rstrip("/")
            if not controllers:  # version 2
                quota, _, period = _read(f"/sys/fs/cgroup{folder}/cpu.max").strip().partition(" ")
            else:
                quota, period = (
                    _read(f"/sys/fs/cgroup/cpu{folder}/cpu.cfs_{name}_us").strip() for name in ("quota", "period")
                )
            if quota.isdigit() and period.isdigit() and int(period) > 0:
                grants.append(int(quota) / int(period))
    return min(grants, default=None)


def _memory() -> int | None:
    total = re.search(r"^MemTotal:\s*(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    sizes = [int(total.group(1)) * 1024] if total else []
    if limit.isdigit():
        sizes.append(int(limit))
    return min(sizes) if sizes else None


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@cache
def _nvml() -> ctypes.CDLL | None:
    """NVIDIA's management library, initialised; None where there is no driver."""
    name = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
    try:
        library = ctypes.CDLL(name)
        return library if library.nvmlInit_v2() == 0 else None
    except (OSError, AttributeError):
        return None


def _handle(library: ctypes.CDLL, index: int) -> ctypes.c_void_p | None:
    handle = ctypes.c_void_p()
    return handle if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0 else None


def _text(function: Any, *arguments: Any) -> str | None:
    buffer = ctypes.create_string_buffer(96)
    return buffer.value.decode(errors="replace") if function(*arguments, buffer, 96) == 0 else None


def _number(function: Any, *arguments: Any, kind: Any = ctypes.c_uint) -> int | None:
    value = kind()
    return int(value.value) if function(*arguments, ctypes.byref(value)) == 0 else None


def gpus() -> list[dict[str, Any]]:
    """Every NVIDIA GPU: name, driver, memory, clocks and temperature now; empty without a driver."""
    library = _nvml()
    if library is None:
        return _gpus_from_command()
    count = _number(library.nvmlDeviceGetCount_v2) or 0
    return [found for index in range(count) if (found := _gpu(library, index))]


def _gpu(library: ctypes.CDLL, index: int) -> dict[str, Any] | None:
    handle = _handle(library, index)
    if handle is None:
        return None
    memory = _Memory()
    has_memory = library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0
    major, minor = ctypes.c_int(), ctypes.c_int()
    capability = library.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)) == 0
    return {
        "name": _text(library.nvmlDeviceGetName, handle),
        "driver": _text(library.nvmlSystemGetDriverVersion),
        "compute_capability": f"{major.value}.{minor.value}" if capability else None,
        "memory_bytes": memory.total if has_memory else None,
        "max_sm_mhz": _number(library.nvmlDeviceGetMaxClockInfo, handle, 1),
        "max_memory_mhz": _number(library.nvmlDeviceGetMaxClockInfo, handle, 2),
        "power_limit_watts": _watts(library, handle),
        **gpu_state(index),
    }


def _watts(library: ctypes.CDLL, handle: ctypes.c_void_p) -> float | None:
    milliwatts = _number(library.nvmlDeviceGetEnforcedPowerLimit, handle)
    return None if milliwatts is None else milliwatts / 1000


def gpu_state(index: int = 0) -> dict[str, Any]:
    """What changes while measuring: clocks, temperature, throttling, memory in use; empty without a driver."""
    library = _nvml()
    handle = _handle(library, index) if library is not None else None
    if library is None or handle is None:
        return {}
    reasons = _number(library.nvmlDeviceGetCurrentClocksThrottleReasons, handle, kind=ctypes.c_ulonglong) or 0
    memory = _Memory()
    used = memory.used if library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0 else None
    return {
        "sm_mhz": _number(library.nvmlDeviceGetClockInfo, handle, 1),
        "memory_mhz": _number(library.nvmlDeviceGetClockInfo, handle, 2),
        "temperature": _number(library.nvmlDeviceGetTemperature, handle, 0),
        # Idle (bit 0) and the clocks setting (bit 1) are no throttling.
        "throttled": bool(reasons & ~0b11),
        "memory_used_bytes": used,
    }


def cpu_counters() -> dict[str, float]:
    """Counters of what else happens to the processor; their differences over a measurement tell.

    Returns:
        ``busy`` and ``steal`` (seconds of all cores together: computing, and withheld by the hypervisor),
        ``quota`` (seconds that this control group was stopped for exceeding its CPU quota), ``thermal`` (times
        that a core throttled for heat). What the system does not count is left out.
    """
    found: dict[str, float] = {}
    fields = _read("/proc/stat").partition("\n")[0].split()
    if len(fields) > 8 and fields[0] == "cpu":
        ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields[1:9]]
        found |= {"busy": ticks[0] + ticks[1] + ticks[2] + ticks[5] + ticks[6], "steal": ticks[7]}
    group = re.search(r"^0::(/.*)$", _read("/proc/self/cgroup"), re.MULTILINE)
    statistics = _read(f"/sys/fs/cgroup{group.group(1).rstrip('/')}/cpu.stat") if group else ""
    if throttled := re.search(r"^throttled_usec (\d+)$", statistics, re.MULTILINE):
        found["quota"] = int(throttled.group(1)) / 1e6
    counts = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
    numbers = [int(text) for path in counts if (text := _read(str(path)).strip()).isdigit()]
    if numbers:
        found["thermal"] = sum(numbers)
    return found


def energy_counters(index: int | None = None) -> dict[str, tuple[int, int]]:
    """Counters of the energy used so far: of GPU ``index`` (NVML), or of the processor packages (RAPL) with None.

    Returns:
        Name → (microjoules since some moment in the past, the reading after which it starts again at 0; 0 for
        never). Empty where the machine has no counter that this process may read.
    """
    if index is not None:
        library = _nvml()
        handle = _handle(library, index) if library is not None else None
        if library is None or handle is None:
            return {}
        millijoules = _number(library.nvmlDeviceGetTotalEnergyConsumption, handle, kind=ctypes.c_ulonglong)
        return {} if millijoules is None else {f"gpu {index}": (millijoules * 1000, 0)}
    found = {}
    for zone in sorted(POWERCAP.glob("intel-rapl:*")):
        # Below packages lie their parts, and beside them "psys", which holds them once more.
        if _read(str(zone / "name")).startswith("package"):
            used, limit = (_read(str(zone / name)).strip() for name in ("energy_uj", "max_energy_range_uj"))
            if used.isdigit():
                found[zone.name] = int(used), int(limit) if limit.isdigit() else 0
    return found


def energy_joules(
    before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]], seconds: float
) -> float | None:
    """Energy between two readings of :func:`energy_counters`, ``seconds`` apart.

    Returns:
        Joules; None without a counter, and where one may have started again more than once: within so long that
        :data:`PACKAGE_WATTS` would have filled it.
    """
    if not before or before.keys() != after.keys():
        return None
    total = 0
    for name, (first, limit) in before.items():
        last, _ = after[name]
        if (limit and seconds * PACKAGE_WATTS * 1e6 > limit) or (not limit and last < first):
            return None
        total += last - first if last >= first else last + limit - first
    return total / 1e6


def _gpus_from_command() -> list[dict[str, Any]]:
    """The same through nvidia-smi, where the library cannot be loaded but the command is there."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    fields = "name,driver_version,compute_cap,memory.total,clocks.sm,temperature.gpu"
    try:
        text = subprocess.run(
            [command, f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in text.strip().splitlines():
        name, driver, capability, memory, clock, temperature = ([*map(str.strip, line.split(",")), *[""] * 6])[:6]
        found.append(
            {
                "name": name,
                "driver": driver,
                "compute_capability": capability,
                "memory_bytes": int(float(memory)) << 20 if memory.replace(".", "").isdigit() else None,
                "sm_mhz": int(clock) if clock.isdigit() else None,
                "temperature": int(temperature) if temperature.isdigit() else None,
            }
        )
    return found
