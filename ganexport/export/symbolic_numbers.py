"""``int(size)`` and ``float(size)`` that stay symbolic.

Python's ``int()`` has to give a plain number, so torch fixes the size that it was shown. Window attention counts its
images with ``int(windows.shape[0] / (h * w / 64))``, decoders resize to ``int(h * 1.5)``, and many write
``int(x.shape[0])`` for nothing. While such a module is traced, the names ``int`` and ``float`` in the files that do so
mean torch's symbolic conversions; everything else about them is Python's.
"""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

Globals = dict[str, Any]


class _Symbolic(type):
    """A type that converts symbolic numbers without fixing them, and is Python's own for everything else."""

    plain: type
    kinds: tuple[type, ...]
    convert: Any

    def __call__(cls, *args: Any, **keywords: Any) -> Any:
        if len(args) == 1 and not keywords and isinstance(args[0], torch.SymInt | torch.SymFloat):
            return cls.convert(args[0])
        return cls.plain(*args, **keywords)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, (cls.plain, *cls.kinds))

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, cls.plain)


class _Int(builtins.int, metaclass=_Symbolic):
    plain, kinds, convert = builtins.int, (torch.SymInt,), staticmethod(torch.sym_int)


class _Float(builtins.float, metaclass=_Symbolic):
    plain, kinds, convert = builtins.float, (torch.SymFloat,), staticmethod(torch.sym_float)


#: What the names mean meanwhile.
NAMES: dict[str, type] = {"int": _Int, "float": _Float}


def number_forms() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How the exporter writes what it has no form for itself: ``round(size * scale)``, half to even in both worlds."""
    from onnx import TensorProto
    from onnxscript import opset18

    op: Any = opset18

    def rounded(number: Any, digits: int | None = None) -> Any:
        if digits:
            return op.Div(op.Round(op.Mul(number, 10.0**digits)), 10.0**digits)
        return op.Cast(op.Round(number), to=TensorProto.INT64)

    return {builtins.round: rounded}


@contextlib.contextmanager
def symbolic_numbers(scopes: Sequence[Globals]) -> Iterator[None]:
    """Give ``int`` and ``float`` their symbolic meaning in these global namespaces, for the time being.

    Args:
        scopes: ``f_globals`` of the files; a file with names of its own for them keeps those.
    """
    given = [(scope, name) for scope in scopes for name in NAMES if name not in scope]
    try:
        for scope, name in given:
            scope[name] = NAMES[name]
        yield
    finally:
        for scope, name in given:
            scope.pop(name, None)
