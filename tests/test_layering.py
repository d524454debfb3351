"""Imports go down only: the floors as a table, checked on the source; torch stays out of the torch-free half."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ganexport"

#: Longest matching prefix wins. A module may import from its own floor and below.
FLOORS = {
    "__init__": 5,  # names only: it imports lazily
    "__main__": 5,
    "errors": 0,
    "spec": 0,
    "artifact": 0,
    "parity": 0,
    "seeding": 0,
    "registry": 0,
    "environment": 0,
    "measurement": 0,
    "stats": 0,
    "frechet": 0,
    "cluster": 1,
    "runtime": 1,
    "build": 1,
    "measure": 1,
    "kernels": 1,
    "architectures": 2,
    "objectives": 2,
    "data": 2,
    "recipe": 2,
    "checkpoint": 2,
    "evaluation": 2,
    "training": 3,
    "export": 3,
    "bench": 4,
    "serving": 4,
    "bulk": 4,
    "explore": 4,
    "cli": 5,
}
TORCH_FREE = (
    "errors",
    "spec",
    "artifact",
    "parity",
    "seeding",
    "registry",
    "environment",
    "measurement",
    "stats",
    "frechet",
)
TORCH_MAY = ("runtime.torchscript", "runtime.aoti", "kernels")
MODULES = sorted(ROOT.rglob("*.py"))


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def floor(module: str) -> int:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in FLOORS:
            return FLOORS[".".join(parts[:end])]
    raise AssertionError(f"ganexport.{module} stands on no floor: add it to FLOORS")


def imports(tree: ast.AST, *, top_level_only: bool = False) -> set[str]:
    nodes = []
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        nodes.append(node)
        stack.extend(ast.iter_child_nodes(node))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            if node.module == "ganexport":
                found |= {f"ganexport.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_go_down_only(path: Path) -> None:
    module = dotted(path)
    for name in imports(ast.parse(path.read_text())):
        if name.startswith("ganexport."):
            target = name.removeprefix("ganexport.")
            assert floor(target) <= floor(module), f"{module} (floor {floor(module)}) imports {target}"


def test_export_never_imports_training() -> None:
    for path in (ROOT / "export").rglob("*.py"):
        names = imports(ast.parse(path.read_text()))
        assert not any(name.startswith("ganexport.training") for name in names), path


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_torch_stays_out_of_the_torch_free_half(path: Path) -> None:
    module = dotted(path)
    if floor(module) > 1 or module.startswith(TORCH_MAY):
        return
    torch_free = module.startswith(TORCH_FREE)
    names = imports(ast.parse(path.read_text()), top_level_only=not torch_free)
    assert not any(name == "torch" or name.startswith(("torch.", "torchvision")) for name in names), module
