"""Symbolic sizes divided with a floor, where the number divided may be negative.

ONNX's Div cuts towards zero, Python's ``//`` goes down, and the exporter writes the one for the other: padding of
``(a - b) // 2`` is one pixel off where the difference is -1.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

#: Added before the division and taken off after: sizes divided are not below -SHIFT times the divisor.
SHIFT = 1 << 16


def floor_forms(program: torch.export.ExportedProgram) -> dict[Callable[..., Any], Callable[..., Any]]:
    """For the exporter's translation table; empty where no negative size is divided, as that form is the shorter."""
    return {operator.floordiv: _floor_division} if any(map(_may_be_negative, program.graph.nodes)) else {}


def _may_be_negative(node: torch.fx.Node) -> bool:
    if node.target is not operator.floordiv or not isinstance(node.args[0], torch.fx.Node):
        return False
    size = node.args[0].meta.get("val")
    if not isinstance(size, torch.SymInt):
        return False
    known = size.node.shape_env
    return known is None or bool(known.bound_sympy(size.node.expr).lower < 0)


def _floor_division(self: Any, other: Any) -> Any:
    """(self + SHIFT other) / other - SHIFT: of no negative number, so cut as it is floored; other is positive."""
    from onnxscript import opset18 as op

    shift = op.Constant(value_int=SHIFT)
    return op.Sub(op.Div(op.Add(self, op.Mul(other, shift)), other), shift)
