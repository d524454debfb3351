"""Vectors stay in fp32 when OpenVINO computes in bf16.

What a generator computes a sample and not a pixel (a mapping network, styles, demodulations) costs next to
nothing, and its rounding errors reach every pixel that it scales. An ``.xml`` can say so: the CPU plugin leaves
a node that carries OpenVINO's own attribute "precise" in the precision it has in the file, whatever precision
the engine is asked to compute in.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from pathlib import Path

from ganexport.artifact import write_atomic

#: Share of all products from which a layer's time counts for more than its noise.
SMALL = 0.005
#: Not computed.
_STATIC = ("Const", "Parameter", "Result")
#: Layer types whose second input are weights.
_WEIGHTED = ("MatMul", "Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")


def keep_vectors_wide(path: Path) -> int:
    """Mark the layers of an OpenVINO file that hold one vector a sample and little of the work.

    Args:
        path: The ``.xml``, changed in place.

    Returns:
        How many layers were marked.
    """
    tree = ET.parse(path)  # noqa: S314 - see above
    layers = tree.getroot().findall("layers/layer")
    products = {layer: _products(layer) for layer in layers}
    limit = SMALL * sum(products.values())
    makers: dict[str | None, set[str | None]] = {}
    for edge in tree.getroot().findall("edges/edge"):
        makers.setdefault(edge.get("to-layer"), set()).add(edge.get("from-layer"))
    marked = 0
    narrow: set[str | None] = set()
    for layer in layers:  # makers before readers
        if layer.get("type") in _STATIC or not _is_vector(layer):
            continue
        if products[layer] > limit or makers.get(layer.get("id"), set()) & narrow:
            narrow.add(layer.get("id"))  # a large layer, and what follows it, is narrow up to the next image
            continue
        info = layer.find("rt_info")
        if info is None:
            info = ET.SubElement(layer, "rt_info")
        ET.SubElement(info, "attribute", {"name": "precise", "version": "0"})
        marked += 1
    if marked:
        write_atomic(path, ET.tostring(tree.getroot(), encoding="utf-8", xml_declaration=True))
    return marked


def _ports(layer: ET.Element, side: str) -> list[list[int]]:
    """Sizes of each input or output, -1 where they are open."""
    return [[int(dim.text or 0) for dim in port.findall("dim")] for port in layer.findall(f"{side}/port")]


def _is_vector(layer: ET.Element) -> bool:
    """Whether every output is fp32 and has at most one axis beside the batch that is longer than 1."""
    outputs = _ports(layer, "output")
    wide = all(port.get("precision") == "FP32" for port in layer.findall("output/port"))
    return wide and bool(outputs) and all(all(size == 1 for size in sizes[2:]) for sizes in outputs)


def _products(layer: ET.Element) -> float:
    """Multiply-accumulates a sample, open sizes taken as 1; 0 for anything but a weighted sum."""
    kind, inputs, outputs = layer.get("type"), _ports(layer, "input"), _ports(layer, "output")
    if kind not in _WEIGHTED or len(inputs) < 2 or not outputs:
        return 0.0
    positions = (inputs[0] if "Backprop" in str(kind) else outputs[0])[2:]
    return math.prod(map(float, inputs[1])) * math.prod(float(max(size, 1)) for size in positions)
