"""Does ONNX Runtime's CUDA provider run a convolution here? Runs it, compares, prints JSON.

python -m benchmarks._onnxruntime_probe
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

SIZE = 16


def main() -> None:
    import onnxruntime

    found: dict[str, Any] = {"version": onnxruntime.__version__, "providers": onnxruntime.get_available_providers()}
    if "CUDAExecutionProvider" not in found["providers"]:
        found |= {"runs": False, "reason": "this build has no CUDA provider"}
    else:
        try:
            found |= _run()
        except Exception as error:  # noqa: BLE001 - any failure is the answer
            found |= {"runs": False, "reason": " ".join(str(error).split())[:300]}
    sys.stdout.write(json.dumps(found) + "\n")


def _run() -> dict[str, Any]:
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    from ganexport.runtime.onnxruntime import preload_cuda

    random = np.random.default_rng(0)
    weight = random.integers(-2, 3, (4, 3, 3, 3)).astype(np.float32)  # exact in TF32 too
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, SIZE, SIZE])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    x = random.integers(-2, 3, (1, 3, SIZE, SIZE)).astype(np.float32)
    loaded = preload_cuda()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "probe.onnx")
        onnx.save(model, path)
        results = {}
        for provider in ("CUDAExecutionProvider", "CPUExecutionProvider"):
            session = onnxruntime.InferenceSession(path, providers=[provider])
            if provider not in session.get_providers():
                return {"runs": False, "reason": f"the session did not take {provider}", "preloaded": loaded}
            results[provider] = session.run(None, {"x": x})[0]
    error = float(np.abs(results["CUDAExecutionProvider"] - results["CPUExecutionProvider"]).max())
    return {"runs": error == 0.0, "largest_error": error, "preloaded": loaded}


if __name__ == "__main__":
    main()
