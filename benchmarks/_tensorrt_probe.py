"""Does a TensorRT run its own engine on this GPU? Builds x → relu(x) + x, runs it, compares. Prints JSON.

    python -m benchmarks._tensorrt_probe tensorrt|tensorrt_rtx

Uses the library's own API and cuda-bindings alone, so the answer does not depend on anything of ours.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

SIZE = 1024


def main() -> None:
    flavour = sys.argv[1]
    trt = importlib.import_module(flavour)
    found: dict[str, Any] = {"flavour": flavour, "version": trt.__version__}
    serialized = _build(trt)
    found["built_bytes"] = len(bytes(serialized))
    sys.stdout.write(json.dumps(found) + "\n")  # a crash further on leaves this line
    sys.stdout.flush()
    try:
        found["largest_error"] = _run(trt, serialized)
        found["runs"] = found["largest_error"] == 0.0
    except Exception as error:  # noqa: BLE001 - any failure is the answer
        found |= {"runs": False, "reason": " ".join(str(error).split())[:300]}
    sys.stdout.write(json.dumps(found) + "\n")


def _build(trt: Any) -> Any:
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    x = network.add_input("x", trt.float32, (SIZE,))
    relu = network.add_activation(x, trt.ActivationType.RELU).get_output(0)
    total = network.add_elementwise(relu, x, trt.ElementWiseOperation.SUM).get_output(0)
    total.name = "y"
    network.mark_output(total)
    serialized = builder.build_serialized_network(network, builder.create_builder_config())
    if serialized is None:
        raise RuntimeError("the builder returned nothing")
    return serialized


def _run(trt: Any, serialized: Any) -> float:
    import numpy as np
    from cuda.bindings import runtime as cuda

    def check(result: tuple[Any, ...]) -> Any:
        if int(result[0]):
            raise RuntimeError(f"CUDA error {int(result[0])}")
        return result[1] if len(result) > 1 else None

    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(bytes(serialized))
    if engine is None:
        raise RuntimeError("the engine could not be deserialised")
    context = engine.create_execution_context()
    if context is None:
        raise RuntimeError("no execution context")
    x = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    y = np.empty_like(x)
    stream = check(cuda.cudaStreamCreate())
    device = {name: check(cuda.cudaMalloc(x.nbytes)) for name in ("x", "y")}
    copy = cuda.cudaMemcpyKind
    check(cuda.cudaMemcpy(device["x"], x.ctypes.data, x.nbytes, copy.cudaMemcpyHostToDevice))
    for name, address in device.items():
        context.set_tensor_address(name, int(address))
    if not context.execute_async_v3(int(stream)):
        raise RuntimeError("execute_async_v3 said no")
    check(cuda.cudaStreamSynchronize(stream))
    check(cuda.cudaMemcpy(y.ctypes.data, device["y"], y.nbytes, copy.cudaMemcpyDeviceToHost))
    return float(np.abs(y - (np.maximum(x, 0) + x)).max())


if __name__ == "__main__":
    main()
