"""``ganexport doctor``: what works on this machine, and why the rest does not."""

from __future__ import annotations

from typing import Any

import click

from ganexport.cli._console import json_option, print_json, results
from ganexport.errors import EXIT_CHECK_FAILED, EXIT_OK

EXAMPLES = """
\b
Examples:
  ganexport doctor
  ganexport doctor --json | jq '.backends[] | select(.available)'
"""


@click.command("doctor", epilog=EXAMPLES)
@json_option
def command(as_json: bool) -> int:
    """Say which backends, kernels and devices work on this machine, and why not.

    Exit code 1 when no backend works, so it serves as a readiness probe.
    """
    found = examine()
    if as_json:
        print_json(found)
    else:
        _show(found)
    return EXIT_OK if any(entry["available"] for entry in found["backends"]) else EXIT_CHECK_FAILED


def examine() -> dict[str, Any]:
    """Everything ``doctor`` says: ``backends``, ``kernels``, ``devices``, ``versions`` and ``environment``."""
    from ganexport import environment
    from ganexport.kernels import _library

    described = environment.describe()
    kernels = _library.status()
    return {
        "backends": _backends(),
        "kernels": {
            "gradient_penalty": {
                "available": kernels.available,
                "reason": kernels.reason,
                "architectures": list(kernels.architectures),
            }
        },
        "devices": _devices(described),
        "versions": described["libraries"],
        "environment": {key: described[key] for key in ("os", "machine", "python", "memory_bytes", "variables")},
    }


def _backends() -> list[dict[str, Any]]:
    from ganexport.runtime import BACKENDS

    rows = []
    for name in BACKENDS:
        runner = BACKENDS.load(name).RUNNER
        reason = runner.unavailable()
        rows.append(
            {
                "name": name,
                "available": reason is None,
                "reason": reason or "",
                "formats": list(runner.formats),
                "devices": list(runner.usable_devices()) if reason is None else [],
            }
        )
    return rows


def _devices(described: dict[str, Any]) -> list[dict[str, Any]]:
    from ganexport.runtime import _cuda

    cpu = described["cpu"]
    devices = [{"name": "cpu", "model": cpu.get("model"), "cores": cpu.get("affinity"), "usable": True, "reason": ""}]
    reason = _cuda.unavailable()
    for index, gpu in enumerate(described["gpus"]):
        about = {**gpu, "model": gpu.get("name"), "name": f"cuda:{index}"}
        devices.append({**about, "usable": reason is None, "reason": reason or ""})
    if not described["gpus"]:
        devices.append({"name": "cuda", "usable": False, "reason": reason or "no NVIDIA driver answers"})
    return devices


def _show(found: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = results()
    table = Table("backend", "works", "formats", "devices or reason", title="Backends", title_justify="left")
    for row in found["backends"]:
        says = ", ".join(row["devices"]) if row["available"] else escape(row["reason"])
        table.add_row(row["name"], _mark(row["available"]), ", ".join(row["formats"]), says)
    console.print(table)
    table = Table("part", "works", "what or reason", title="Kernels and devices", title_justify="left")
    for name, kernel in found["kernels"].items():
        says = "sm " + ", ".join(kernel["architectures"]) if kernel["available"] else escape(kernel["reason"])
        table.add_row(name, _mark(kernel["available"]), says)
    for device in found["devices"]:
        cores = f", {device['cores']} cores" if device.get("cores") else ""
        says = device["reason"] or f"{device.get('model') or device['name']}{cores}"
        table.add_row(device["name"], _mark(device["usable"]), escape(says))
    console.print(table)
    versions = (f"{name} {version}" for name, version in found["versions"].items() if version)
    console.print(f"python {found['environment']['python']}, " + ", ".join(versions), markup=False)


def _mark(works: bool) -> str:
    return "[green]yes[/]" if works else "[red]no[/]"
