"""ganexport: from a GAN checkpoint to a verified, benchmarked, production-ready generator.

Importing this package is fast: nothing heavy is loaded until one of the names below is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Public name → module that defines it.
_EXPORTS = {
    "load": "ganexport.runtime.generator",
    "Generator": "ganexport.runtime.generator",
    "latents": "ganexport.seeding",
    "convert": "ganexport.export.convert",
    "verify": "ganexport.export.verify",
    "benchmark": "ganexport.bench.api",
    "train": "ganexport.training.api",
    "GanExportError": "ganexport.errors",
    "GeneratorSpec": "ganexport.spec",
    "TensorSpec": "ganexport.spec",
    "Dim": "ganexport.spec",
    "Artifact": "ganexport.artifact",
}

__all__ = ["__version__", *sorted(_EXPORTS)]  # noqa: PLE0604 - the names of the table above

if TYPE_CHECKING:
    from ganexport.artifact import Artifact as Artifact
    from ganexport.errors import GanExportError as GanExportError
    from ganexport.spec import Dim as Dim
    from ganexport.spec import GeneratorSpec as GeneratorSpec
    from ganexport.spec import TensorSpec as TensorSpec


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'ganexport' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
