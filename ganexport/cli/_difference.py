"""What two inspected things do not share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Keys that say nothing about the generator, or repeat at length what another says.
_IGNORED = frozenset({"path", "kind", "report", "golden", "state", "worst", "sizes", "unseen", "notes", "each"})


def difference(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Every fact that two results of :func:`ganexport.cli.inspect.examine` do not share.

    Returns:
        ``same``; ``changed``: fact → [first, second], None where a side lacks it; and for two artifacts
        with golden outputs for the same inputs ``outputs``: dB of the worst sample by output ("identical"
        where no bit differs).
    """
    sides = _paired_files(first.get("files", []), second.get("files", []))
    left, right = (flatten({**found, "files": files}) for found, files in zip((first, second), sides, strict=True))
    names = sorted(left.keys() | right.keys())
    changed = {name: [left.get(name), right.get(name)] for name in names if left.get(name) != right.get(name)}
    outputs = compare_golden_outputs(first, second)
    same = not changed and first["kind"] == second["kind"] and set(outputs.values()) <= {"identical"}
    return {
        "kind": "difference", "paths": [first["path"], second["path"]], "kinds": [first["kind"], second["kind"]],
        "same": same, "changed": changed, "outputs": outputs,
    }  # fmt: skip


def _paired_files(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Files by format where each side has one of it, else by format and precision; a file alone is one line."""
    counts = {
        kind: max(sum(f["format"] == kind for f in side) for side in (first, second))
        for kind in {f["format"] for f in (*first, *second)}
    }
    sides = tuple(
        {f["format"] if counts[f["format"]] == 1 else f"{f['format']} {f['precision']}": f for f in side}
        for side in (first, second)
    )
    shared = sides[0].keys() & sides[1].keys()
    left, right = ({name: f if name in shared else _in_short(f) for name, f in side.items()} for side in sides)
    return left, right


def _in_short(file: dict[str, Any]) -> str:
    verdict = (file.get("certificate") or {}).get("verdict", "not checked")
    return f"{file['path']}, {file['precision']}, {file['bytes']} bytes, {verdict}"


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """A nested value as facts: ``spec.inputs.z.shape`` → ``["batch", 128]``."""
    found: dict[str, Any] = {}
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in _IGNORED:
                found |= flatten(inner, f"{name}.{key}" if name else str(key))
        return found
    if isinstance(value, list | tuple) and value and all(isinstance(entry, Mapping) for entry in value):
        for number, entry in enumerate(value):
            found |= flatten(entry, f"{name}.{entry.get('name', number)}")
        return found
    return {name: list(value) if isinstance(value, tuple) else value}


def compare_golden_outputs(first: dict[str, Any], second: dict[str, Any]) -> dict[str, str]:
    """The outputs of two artifacts' sources for the same golden inputs; empty when there are none."""
    import numpy as np

    from ganexport.artifact import Artifact
    from ganexport.build.golden import read_golden
    from ganexport.parity import Comparison

    if not (first.get("golden") and second.get("golden")):
        return {}
    artifacts = [Artifact(Path(side["path"])) for side in (first, second)]
    sets = []
    for artifact in artifacts:
        path = artifact.golden_path()
        assert path is not None
        sets.append(read_golden(path, artifact.spec))
    specs = [artifact.spec for artifact in artifacts]
    comparisons = {t.name: Comparison(t.name, t.range) for t in specs[0].outputs if t in specs[1].outputs}
    for (feeds, truth), (other, value) in zip(*sets, strict=False):
        shared = feeds.keys() == other.keys() and all(np.array_equal(feeds[name], other[name]) for name in feeds)
        if not shared:
            continue
        for name, comparison in comparisons.items():
            comparison.add(truth[name], value[name])
    told = {}
    for name, comparison in comparisons.items():
        if comparison.samples:
            worst = comparison.result().worst_psnr
            told[name] = "identical" if worst is None else f"{worst:.1f} dB at worst"
    return told


def show(found: dict[str, Any], console: Any) -> None:
    """A table of what differs."""
    from rich.markup import escape
    from rich.table import Table

    if found["same"]:
        console.print(f"{found['paths'][0]} and {found['paths'][1]} hold the same", markup=False)
        return
    if found["changed"]:
        table = Table("", *(escape(path) for path in found["paths"]), title="What differs", title_justify="left")
        for name, sides in found["changed"].items():
            table.add_row(escape(name), *(escape(_told(side)) for side in sides))
        console.print(table)
    for name, text in found["outputs"].items():
        console.print(f"{name} of both sources for the same golden inputs: {text}", markup=False)


def _told(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_told(entry) for entry in value)
    if isinstance(value, str) and len(value) == 64 and all(c in "0123456789abcdef" for c in value):
        return f"{value[:12]}…"
    return str(value)
