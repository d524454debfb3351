"""Exact rewrites of ONNX graphs, one file each, applied only where they pay.

Each module has ``apply(model, target) -> int``: it changes an ``onnx_ir`` model in place and says how
often. "Exact" means the same sums of the same numbers, up to the order of summation: the tests run
original and rewritten graphs in ONNX Runtime over random shapes and attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ganexport.build.cost import Target
from ganexport.errors import ArtifactError
from ganexport.registry import Registry

if TYPE_CHECKING:
    import onnx

REWRITES = Registry("ganexport.build.rewrites", "rewrite", exclude=("__init__",))

#: The order matters: folding first (weights are still those of the original layers), shapes of layers
#: next, then what the new layers allow.
DEFAULT_ORDER = (
    "remove-dead",
    "fold-batch-norm",
    "fold-scale",
    "merge-gemm",
    "fold-blur",
    "upsample-conv",
    "first-layer-gemm",
    "conv-transpose",
    "fold-batch-norm",
    "hoist-pointwise",
    "nhwc-scales",
    "remove-dead",
)


def rewrite(
    model: onnx.ModelProto,
    target: Target | None = None,
    passes: Sequence[str] = DEFAULT_ORDER,
    options: dict[str, dict[str, Any]] | None = None,
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Apply rewrites to an ONNX model.

    Args:
        model: Unchanged by this call.
        target: Where it will run; a rewrite that does not pay there is left out. None: all of them.
        passes: Names of rewrites, in order.
        options: Further arguments of a pass by its name, ``{"conv-transpose": {"form": "crop"}}``.

    Returns:
        The rewritten model (inputs, outputs, their names and symbolic sizes unchanged) and the names
        of the passes that changed something, each with its count: ``"conv-transpose x4"``.

    Raises:
        UsageError: An unknown pass.
        ArtifactError: The model cannot be read.
    """
    import onnx_ir as ir

    from ganexport.build.rewrites._graph import infer_shapes

    modules = [(name, REWRITES.load(name)) for name in passes]
    try:
        graph = ir.from_proto(model)
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"the ONNX model cannot be read: {error}") from None
    applied: list[str] = []
    for name, module in modules:
        graph = infer_shapes(graph)
        count = module.apply(graph, target, **(options or {}).get(name, {}))
        if count:
            applied.append(f"{name} x{count}")
    graph.graph.sort()
    result: onnx.ModelProto = ir.to_proto(infer_shapes(graph))
    return result, tuple(applied)
