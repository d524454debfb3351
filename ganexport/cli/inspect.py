"""``ganexport inspect``: what an artifact, a run or an ONNX file holds."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ganexport.cli._console import json_option, print_json, results
from ganexport.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from ganexport.artifact import ArtifactFile

EXAMPLES = """
\b
Examples:
  ganexport inspect digits
  ganexport inspect digits --layers
  ganexport inspect --diff digits digits-int8
  ganexport inspect generator.onnx --json
"""


@click.command("inspect", epilog=EXAMPLES)
@click.argument("paths", metavar="PATH [OTHER]", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--diff", is_flag=True, help="Show what PATH and OTHER do not share.")
@click.option("--layers", is_flag=True, help="List every layer with its precision and the line it came from.")
@json_option
def command(paths: tuple[Path, ...], diff: bool, layers: bool, as_json: bool) -> None:
    """Show what PATH holds: an artifact's folder, a training run, or a lone .onnx file."""
    if len(paths) != (2 if diff else 1):
        raise UsageError(
            f"--diff compares two paths, got {len(paths)}"
            if diff
            else "inspect shows one path; --diff compares two: ganexport inspect --diff A B"
        )
    found = [examine(path, layers=layers) for path in paths]
    if diff:
        from ganexport.cli._difference import difference
        from ganexport.cli._difference import show as show_difference

        result = difference(*found)
        if as_json:
            print_json(result)
        else:
            show_difference(result, results())
    elif as_json:
        print_json(found[0])
    else:
        {"artifact": _show_artifact, "onnx": _show_onnx, "run": _show_run}[found[0]["kind"]](found[0])


def examine(path: Path, *, layers: bool = False) -> dict[str, Any]:
    """Everything ``inspect`` shows, by the kind of thing that lies there.

    Args:
        path: An artifact's folder, a run, or a lone .onnx file.
        layers: Whether each layer is listed, not only counted.

    Raises:
        ArtifactError: Nothing there, or nothing that is known.
    """
    from ganexport.artifact import MANIFEST

    if path.is_file() and path.suffix.lower() == ".onnx":
        return _examine_onnx(path, layers)
    if path.is_dir() and not (path / MANIFEST).is_file() and _is_run(path):
        return _examine_run(path)
    return _examine_artifact(path, layers)


def _is_run(path: Path) -> bool:
    return (path / "recipe.toml").is_file() or (path / "checkpoints").is_dir()


def _examine_artifact(path: Path, layers: bool) -> dict[str, Any]:
    import msgspec

    from ganexport.artifact import Artifact

    artifact = Artifact(path)
    manifest = artifact.manifest
    return {
        "kind": "artifact",
        "path": str(path),
        "schema_version": manifest.schema_version,
        "spec": msgspec.to_builtins(manifest.spec),
        "files": [_examine_file(artifact, f, layers) for f in manifest.files],
        "provenance": msgspec.to_builtins(manifest.provenance),
        "golden": bool(manifest.golden_sha256),
        "report": manifest.report,
    }


def _examine_file(artifact: Any, file: ArtifactFile, layers: bool) -> dict[str, Any]:
    import msgspec

    state = _state(artifact, file)
    found: dict[str, Any] = {**msgspec.to_builtins(file), "state": state, "bytes_with_weights": artifact.bytes_of(file)}
    if file.format == "onnx" and state == "ok":
        found |= _graph(artifact.path / file.path, artifact.spec, layers)
    return found


def _graph(path: Path, spec: Any, layers: bool) -> dict[str, Any]:
    """Operations a sample at the optimum, and layers by precision; nothing without the package onnx."""
    import msgspec

    from ganexport.bench import roofline
    from ganexport.build.layers import counted, layer_precisions
    from ganexport.build.onnx_file import first_line, load_model

    try:
        model = load_model(path)
        listed = layer_precisions(model)
        cost = roofline.count(path, spec, {dim.name: dim.opt for dim in spec.dims})
    except Exception as error:  # noqa: BLE001 - the rest is shown for a graph that onnx cannot analyse too
        return {"graph": {"unknown": first_line(error)}}
    graph: dict[str, Any] = {
        "flops": cost.flops, "weights": cost.weights, "nodes": len(model.graph.node), "layers": counted(listed),
    }  # fmt: skip
    if layers:
        graph["each"] = [msgspec.to_builtins(layer) for layer in listed]
    return {"graph": graph}


def _state(artifact: Any, file: ArtifactFile) -> str:
    """ "ok", or why the file must not be loaded."""
    try:
        artifact.verified_path(file)
    except ArtifactError as error:
        return str(error)
    return "ok"


def _examine_onnx(path: Path, layers: bool) -> dict[str, Any]:
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
            **_lone_graph(path, spec, layers),
        }
    raise BackendUnavailableError(f"{path}: nothing here reads ONNX files: {'; '.join(reasons)}")


def _lone_graph(path: Path, spec: Any, layers: bool) -> dict[str, Any]:
    """As :func:`_graph`, for a file of unknown origin: a child process reads it first."""
    from ganexport.build.rehearse import rehearse

    rehearse(path)
    return _graph(path, spec, layers)


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
        size = file["bytes_with_weights"]
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
        _show_graph(console, file)
    for file in found["files"]:
        for note in (file.get("certificate") or {}).get("notes", ()):
            console.print(f"{file['path']}: {note}", markup=False)


def _show_graph(console: Any, file: dict[str, Any]) -> None:
    """Operations and precisions of an ONNX file's layers."""
    graph = file.get("graph")
    if not graph:
        return
    if "unknown" in graph:
        console.print(f"{file['path']}: layers and operations are not counted: {graph['unknown']}", markup=False)
        return
    by_precision = "; ".join(
        f"{precision}: " + ", ".join(f"{count} {operator}" for operator, count in row.items())
        for precision, row in graph["layers"].items()
    )
    flops = f"{graph['flops'] / 1e9:.3g} GFLOP a sample, {graph['weights'] / 1e6:.3g} M weights"
    console.print(f"{file['path']}: {flops}; {by_precision}", markup=False)
    for layer in graph.get("each", ()):
        origin = f"  {layer['origin']}" if layer["origin"] else ""
        console.print(f"  {layer['precision']}  {layer['operator']} {layer['node']}{origin}", markup=False)


def _parity(certificate: dict[str, Any] | None) -> tuple[str, str]:
    """Verdict with the worst sample's PSNR, and the runtime that it was found with."""
    from rich.markup import escape

    if not certificate:
        return "[yellow]not checked[/]", ""
    decibels = [o["worst_psnr"] for o in certificate.get("outputs", ()) if o.get("worst_psnr") is not None]
    colour = {"pass": "green", "partial": "yellow"}.get(certificate["verdict"], "red")
    worst = f" {min(decibels):.1f} dB" if decibels else " identical" if certificate.get("outputs") else ""
    drift = certificate.get("frechet_drift")
    worst += "" if drift is None else f", Fréchet drift {drift:.2%}"
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
    _show_graph(console, found)


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
