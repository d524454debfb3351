"""Weights files into a module: safetensors, or pickles that hold tensors and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ganexport.errors import CheckpointError, MissingDependencyError

State = dict[str, torch.Tensor]


def read_weights(path: Path) -> Any:
    """The content of a weights file, tensors on the CPU.

    Raises:
        CheckpointError: Missing, truncated, or a pickle with code in it (which is never run).
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: a directory, not a weights file")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    import pickle

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) or "Unsupported" in str(error):
            raise CheckpointError(
                f"{path}: holds Python objects besides tensors, which could run code; save module.state_dict() "
                "(torch.save or safetensors) and pass that"
            ) from None
        raise CheckpointError(f"{path}: not a readable checkpoint: {_line(error)}") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path}: truncated or not a checkpoint: {_line(error)}") from None


def _read_safetensors(path: Path) -> State:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise MissingDependencyError(f"{path}: reading it needs safetensors: pip install safetensors") from None
    try:
        return load_file(path, device="cpu")
    except Exception as error:  # noqa: BLE001 - SafetensorError is no subclass of anything useful
        raise CheckpointError(f"{path}: truncated or not safetensors: {_line(error)}") from None


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def load_into(module: torch.nn.Module, content: Any, where: str, key: str | None = None) -> str:
    """Load weights into a module, strictly.

    Finds the state in nested mappings by how well it fits, and removes a prefix that all keys
    share ("module.", "generator.", "_orig_mod.").

    Args:
        module: Changed in place.
        content: As :func:`read_weights` gives it.
        where: File name for messages.
        key: Path of the state in the content, e.g. "g_ema" or "models/generator".

    Returns:
        What was taken, e.g. "g_ema without the prefix 'module.'".

    Raises:
        CheckpointError: No such key, several states fit alike, or tensors are missing, unexpected
            or of another shape; they are counted and the first are named.
    """
    found = states(content)
    if key is not None:
        found = {key: _at(content, key, where)}
    if not found:
        raise CheckpointError(f"{where}: holds no tensors")
    wanted = module.state_dict()
    fits = {name: _fit(state, wanted) for name, state in found.items()}
    best = max(score for score, _ in fits.values())
    chosen = [name for name, (score, _) in fits.items() if score == best]
    if len(chosen) > 1 and best > 0:
        raise CheckpointError(
            f"{where}: several states fit alike: {', '.join(sorted(chosen))}; say which with --weights-key {chosen[0]}"
        )
    name = chosen[0]
    prefix = fits[name][1]
    state = {k.removeprefix(prefix): v for k, v in found[name].items() if k.startswith(prefix)}
    _check_fit(state, wanted, where, name)
    module.load_state_dict(state, strict=True)
    return f"{name or 'the file'}{f' without the prefix {prefix!r}' if prefix else ''}"


def states(content: Any) -> dict[str, State]:
    """All mappings of tensors in a file's content, by their path in it ("" for the outermost, "ema/generator")."""
    return dict(_states(content))


def _states(content: Any, path: str = "", depth: int = 0) -> list[tuple[str, State]]:
    if not isinstance(content, Mapping) or depth > 4:
        return []
    tensors = {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    found = [(path, tensors)] if tensors else []
    for key, value in content.items():
        if isinstance(value, Mapping):
            found += _states(value, f"{path}/{key}" if path else str(key), depth + 1)
    return found


def _at(content: Any, key: str, where: str) -> State:
    node = content
    for part in key.split("/"):
        if not isinstance(node, Mapping) or part not in node:
            known = ", ".join(map(str, node)) if isinstance(node, Mapping) and len(node) < 40 else ""
            raise CheckpointError(f"{where}: no key {key!r} in it{f'; there is: {known}' if known else ''}")
        node = node[part]
    if not isinstance(node, Mapping):
        raise CheckpointError(f"{where}: {key!r} is not a mapping of tensors")
    return {str(k): v for k, v in node.items() if isinstance(v, torch.Tensor)}


def _fit(state: State, wanted: Mapping[str, Any]) -> tuple[int, str]:
    """(tensors of the right name and shape, the prefix to remove for it)."""
    prefixes = {""}
    probe = next(iter(wanted), None)
    if probe is not None:
        prefixes |= {key[: -len(probe)] for key in state if key.endswith("." + probe)}
    scores = []
    for prefix in prefixes:
        names = (key.removeprefix(prefix) for key in state if key.startswith(prefix))
        scores.append((sum(n in wanted and state[prefix + n].shape == wanted[n].shape for n in names), prefix))
    return max(scores, key=lambda pair: (pair[0], -len(pair[1])))


def _check_fit(state: State, wanted: Mapping[str, torch.Tensor], where: str, name: str) -> None:
    shapes = [
        f"{key} {list(state[key].shape)} for {list(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    problems = [
        _some("missing", [key for key in wanted if key not in state]),
        _some("unexpected", [key for key in state if key not in wanted]),
        _some("of another shape", shapes),
    ]
    told = "; ".join(text for text in problems if text)
    if told:
        raise CheckpointError(f"{where}{f' ({name})' if name else ''} does not fit the module: {told}")


def _some(what: str, names: list[str], limit: int = 4) -> str:
    if not names:
        return ""
    more = ", …" if len(names) > limit else ""
    return f"{len(names)} {what} ({', '.join(names[:limit])}{more})"


def weights_digest(module: torch.nn.Module) -> str:
    """sha256 over (name, dtype, shape, bytes) of every tensor in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
