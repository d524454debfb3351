"""Images leave the graph as the bytes of a picture: NHWC uint8, a quarter of fp32's traffic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from ganexport.errors import UsageError
from ganexport.spec import GeneratorSpec

if TYPE_CHECKING:
    import onnx


def uint8_spec(spec: GeneratorSpec) -> GeneratorSpec:
    """The spec whose image output is NHWC uint8 with range (0, 255).

    Raises:
        UsageError: No image output, or one whose range is not declared.
    """
    image = spec.image_output
    if image is None:
        raise UsageError("uint8 output needs an image among the outputs; declare it, e.g. --output 'image=[-1,1]:NCHW'")
    if image.dtype == "uint8":
        raise UsageError(f"output {image.name!r} is uint8 already")
    if image.range is None:
        raise UsageError(
            f"uint8 output needs the range of {image.name!r}: --output '{image.name}=[-1,1]:{image.layout}'"
        )
    shape = image.shape
    if image.layout == "NCHW":
        shape = (shape[0], shape[2], shape[3], shape[1])
    changed = msgspec.structs.replace(image, dtype="uint8", shape=shape, layout="NHWC", range=(0.0, 255.0))
    outputs = tuple(changed if tensor is image else tensor for tensor in spec.outputs)
    return msgspec.structs.replace(spec, outputs=outputs)


def append_uint8(model: onnx.ModelProto, spec: GeneratorSpec) -> GeneratorSpec:
    """Append (x - low)·255/(high - low), round half to even, clamp, cast and transpose to the graph, in fp32.

    Args:
        model: Changed in place; its image output keeps its name.
        spec: The spec before.

    Returns:
        The spec after.

    Raises:
        UsageError: As :func:`uint8_spec`.
    """
    from onnx import TensorProto, helper, numpy_helper

    changed = uint8_spec(spec)
    image = spec.image_output
    assert image is not None
    assert image.range is not None
    low, high = image.range
    raw = f"{image.name}_before_uint8"
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == image.name:
                    names[index] = raw
    for name, value in (("low", low), ("scale", 255.0 / (high - low)), ("zero", 0.0), ("peak", 255.0)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), f"uint8_{name}"))
    steps = [("Sub", ["uint8_low"]), ("Mul", ["uint8_scale"]), ("Round", []), ("Clip", ["uint8_zero", "uint8_peak"])]
    current = raw
    for operator, extra in steps:
        following = f"uint8_{operator.lower()}"
        model.graph.node.append(helper.make_node(operator, [current, *extra], [following], name=following))
        current = following
    transpose = image.layout == "NCHW"
    last = "uint8_cast" if transpose else image.name
    model.graph.node.append(helper.make_node("Cast", [current], [last], name="uint8_cast", to=TensorProto.UINT8))
    if transpose:
        model.graph.node.append(
            helper.make_node("Transpose", [last], [image.name], name="uint8_nhwc", perm=[0, 2, 3, 1])
        )
    for value in model.graph.output:
        if value.name == image.name:
            value.type.tensor_type.elem_type = TensorProto.UINT8
    return changed
