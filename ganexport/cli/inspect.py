"""``ganexport inspect``: what an artifact, a run or an ONNX file holds."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ganexport.cli._console import json_option, print_json, results
from ganexport.errors import ArtifactError

if TYPE_CHECKING:
    from ganexport.artifact import ArtifactFile

EXAMPLES = """
\b
Examples:
  ganexport inspect digits
  ganexport inspect generator.onnx --json
"""


@click.command("inspect", epilog=EXAMPLES)
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def command(path: Path, as_json: bool) -> None:
    """Show what PATH holds: an artifact's folder, a training run, or a lone .onnx file."""
    found = examine(path)
    if as_json:
        print_json(found)
    else:
        {"artifact": _show_artifact, "onnx": _show_onnx, "run": _show_run}[found["kind"]](found)


def examine(path: Path) -> dict[str, Any]:
    """Everything ``inspect`` shows, by the kind of thing that lies there.

    Raises:
        ArtifactError: Nothing there, or nothing that is known.
    """
    from ganexport.artifact import MANIFEST

    if path.is_file() and path.suffix.lower() == ".onnx":
        return _examine_onnx(path)
    if path.is_dir() and not (path / MANIFEST).is_file() and _is_run(path):
        return _examine_run(path)
    return _examine_artifact(path)


def _is_run(path: Path) -> bool:
    return (path / "recipe.toml").is_file() or (path / "checkpoints").is_dir()


def _examine_artifact(path: Path) -> dict[str, Any]:
    import msgspec

    from ganexport.artifact import Artifact

    artifact = Artifact(path)
    manifest = artifact.manifest
    return {
        "kind": "artifact",
        "path": str(path),
        "schema_version": manifest.schema_version,
        "spec": msgspec.to_builtins(manifest.spec),
        "files": [{**msgspec.to_builtins(f), "state": _state(artifact, f)} for f in manifest.files],
        "provenance": msgspec.to_builtins(manifest.provenance),
        "golden": bool(manifest.golden_sha256),
        "report": manifest.report,
    }


def _state(artifact: Any, file: ArtifactFile) -> str:
    """ "ok", or why the file must not be loaded."""
    try:
        artifact.verified_path(file)
    except ArtifactError as error:
        return str(error)
    return "ok"


def _examine_onnx(path: Path) -> dict[str, Any]:
    import msgspec

    from ganexport.artifact import sha256_file
    from ganexport.errors import BackendUnavailableError
    from ganexport.runtime import BACKENDS
    from ganexport.runtime._onnx_file import metadata_and_producers
    from ganexport.runtime._probe import SPEC_KEY, probe

    reasons = []
    for backend in ("onnxruntime", "openvino"):
        if reason := BACKENDS.load(backend).RUNNER.unavailable():
            reasons.append(reason)
            continue
        spec = probe(path, backend)
        metadata = metadata_and_producers(path)[0]
        return {
            "kind": "onnx",
            "path": str(path),
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
            "spec": msgspec.to_builtins(spec),
            "spec_from": "metadata" if SPEC_KEY in metadata else "graph",
            "metadata": {key: value for key, value in metadata.items() if key != SPEC_KEY},
        }
    raise BackendUnavailableError(f"{path}: nothing here reads ONNX files: {'; '.join(reasons)}")


def _examine_run(path: Path) -> dict[str, Any]:
    recipe: dict[str, Any] = {}
    if (path / "recipe.toml").is_file():
        try:
            recipe = tomllib.loads((path / "recipe.toml").read_text())
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path / 'recipe.toml'}: cannot be read: {error}") from None
    checkpoints = sorted(p.name for p in (path / "checkpoints").glob("*") if p.is_dir() and not p.name.startswith("."))
    return {
        "kind": "run",
        "path": str(path),
        "recipe": recipe,
        "checkpoints": checkpoints,
        "metrics": _last_metrics(path / "metrics.jsonl"),
        "bytes": sum(p.stat().st_size for p in path.rglob("*") if p.is_file()),
    }


def _last_metrics(path: Path) -> dict[str, Any]:
    """The last whole line of the metrics (a run that is being written may end in half a line)."""
    if not path.is_file():
        return {}
    for line in reversed(path.read_text(errors="replace").splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def _show_artifact(found: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = results()
    _show_spec(console, found["spec"], found["path"])
    table = Table(
        "file", "format", "precision", "size", "needs", "parity", "runtime", title="Files", title_justify="left"
    )
    for file in found["files"]:
        needs = ", ".join(f"{key} {value}" for key, value in file.get("requires", {}).items())
        state = "" if file["state"] == "ok" else f"\n[red]{escape(file['state'])}[/]"
        parity, runtime = _parity(file.get("certificate"))
        size = file["bytes"]
        table.add_row(
            escape(file["path"]) + state, file["format"], file["precision"], _size(size), escape(needs), parity, runtime
        )
    console.print(table)
    source = found["provenance"]
    step = f", step {source['step']}" if source.get("step") is not None else ""
    weights = f", weights {source['weights_sha256'][:12]}…" if source.get("weights_sha256") else ""
    console.print(f"from {source['source']}{step}{weights}", markup=False)
    if source.get("versions"):
        console.print("made with " + ", ".join(f"{k} {v}" for k, v in source["versions"].items()), markup=False)
    for file in found["files"]:
        for note in (file.get("certificate") or {}).get("notes", ()):
            console.print(f"{file['path']}: {note}", markup=False)


def _parity(certificate: dict[str, Any] | None) -> tuple[str, str]:
    """Verdict with the worst sample's PSNR, and the runtime that it was found with."""
    from rich.markup import escape

    if not certificate:
        return "[yellow]not checked[/]", ""
    decibels = [o["worst_psnr"] for o in certificate.get("outputs", ()) if o.get("worst_psnr") is not None]
    colour = {"pass": "green", "partial": "yellow"}.get(certificate["verdict"], "red")
    worst = f" {min(decibels):.1f} dB" if decibels else " identical" if certificate.get("outputs") else ""
    return f"[{colour}]{certificate['verdict']}[/]{worst}", escape(certificate["runtime"])


def _show_spec(console: Any, spec: dict[str, Any], title: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "name", "dtype", "shape", "drawn or range", title=escape(f"{spec['name']} in {title}"))
    table.title_justify = "left"
    for kind in ("inputs", "outputs"):
        for tensor in spec[kind]:
            sampler = tensor.get("sampler")
            says = _sampler(sampler) if sampler else "fed by the caller" if kind == "inputs" else ""
            if tensor.get("range"):
                says += f" {list(tensor['range'])} {tensor.get('layout') or ''}"
            shape = "[" + ", ".join(map(str, tensor["shape"])) + "]"
            table.add_row(kind[:-1], tensor["name"], tensor["dtype"], escape(shape), escape(says.strip()))
    for dim in spec["dims"]:
        step = f" in steps of {dim['step']}" if dim["step"] > 1 else ""
        table.add_row("dimension", dim["name"], "", f"{dim['min']} to {dim['max']}{step}", f"best at {dim['opt']}")
    console.print(table)


def _sampler(sampler: dict[str, Any]) -> str:
    values = ", ".join(f"{value:g}" for key, value in sampler.items() if key != "type")
    return f"{sampler['type']}({values})"


def _show_onnx(found: dict[str, Any]) -> None:
    console = results()
    _show_spec(console, found["spec"], found["path"])
    origin = "its metadata" if found["spec_from"] == "metadata" else "its graph alone"
    console.print(f"{_size(found['bytes'])}, sha256 {found['sha256'][:12]}…, described by {origin}", markup=False)


def _show_run(found: dict[str, Any]) -> None:
    console = results()
    recipe = found["recipe"]
    name = recipe.get("name") or recipe.get("recipe") or "a run"
    console.print(f"{name} in {found['path']}, {_size(found['bytes'])}", markup=False)
    checkpoints = found["checkpoints"]
    last = f", the last at step {checkpoints[-1]}" if checkpoints else ""
    console.print(f"{len(checkpoints)} checkpoints{last}", markup=False)
    for section, values in recipe.items():
        shown = ", ".join(f"{k}={v}" for k, v in values.items()) if isinstance(values, dict) else values
        console.print(f"  {section}: {shown}", markup=False)
    if found["metrics"]:
        console.print("last metrics: " + ", ".join(f"{k} {v}" for k, v in found["metrics"].items()), markup=False)


def _size(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.1f} GiB"
