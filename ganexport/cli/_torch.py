"""What the commands that need torch say when it is not installed."""

from __future__ import annotations

from importlib.util import find_spec

from ganexport.errors import MissingDependencyError


def require_training() -> None:
    """Check for the packages of the ``train`` extra.

    Raises:
        MissingDependencyError: Naming those that are missing.
    """
    missing = [name for name in ("torch", "safetensors") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"training needs {' and '.join(missing)}: install with: pip install 'ganexport[train]'"
        )
