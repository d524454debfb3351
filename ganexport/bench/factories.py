"""What a worker process calls to get its runner. Torch is imported only for candidates that are torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ganexport.errors import BackendUnavailableError
from ganexport.runtime.base import Runner
from ganexport.spec import GeneratorSpec, spec_from_json

#: Ways to run a torch module: candidate → (mode of torch.compile or None, inductor's weight freezing).
TORCH_MODES: dict[str, tuple[str | None, bool]] = {
    "eager": (None, False),
    "compile": ("default", False),
    "compile-frozen": ("default", True),
    "compile-reduce-overhead": ("reduce-overhead", False),
    "compile-max-autotune": ("max-autotune", False),
}


def open_artifact(
    artifact: str, path: str, backend: str, device: str | None = None, settings: Mapping[str, Any] | None = None
) -> Runner:
    """A file of an artifact, checked against its manifest, under one backend.

    Args:
        artifact: The artifact's folder.
        path: The file's path inside it.
        backend: Name in :data:`ganexport.runtime.BACKENDS`.
        device: "cpu" or "cuda:0".
        settings: Over those in the manifest.
    """
    from ganexport.artifact import Artifact
    from ganexport.runtime import BACKENDS

    opened = Artifact(artifact)
    file = next(f for f in opened.manifest.files if f.path == path)
    runner = BACKENDS.load(backend).RUNNER
    found = runner.open(
        opened.verified_path(file), opened.spec, device=device, settings=settings or {}, requires=file.requires
    )
    assert isinstance(found, Runner)
    return found


def open_file(
    path: str,
    backend: str,
    device: str | None = None,
    settings: Mapping[str, Any] | None = None,
    spec: str = "",
    requires: Mapping[str, str] | None = None,
) -> Runner:
    """A lone file under one backend; ``spec`` is its spec as JSON, ``requires`` what a manifest would say it needs."""
    from ganexport.runtime import BACKENDS

    runner = BACKENDS.load(backend).RUNNER
    found = runner.open(
        Path(path), spec_from_json(spec), device=device, settings=settings or {}, requires=requires or {}
    )
    assert isinstance(found, Runner)
    return found


def open_torch(
    source: str, mode: str = "eager", device: str = "cpu", precision: str = "fp32", threads: int | None = None
) -> Runner:
    """A run, a model of ours or ``package.module:factory``, eager or compiled.

    Args:
        source: What ``ganexport convert`` takes.
        mode: A key of :data:`TORCH_MODES`.
        device: "cpu" or "cuda:0".
        precision: "fp32", "tf32", "bf16", "fp16": the last two under autocast.
        threads: torch's intra-op threads.
    """
    from ganexport.export.source import Description, TorchSource, UndescribedError, open_source

    try:
        opened = open_source(source, Description())
    except UndescribedError:
        reason = "its inputs are not described; convert it and measure the artifact"
        raise BackendUnavailableError(f"{source}: {reason}") from None
    assert isinstance(opened, TorchSource), source
    spec = opened.spec
    if not spec.outputs:
        raise BackendUnavailableError(f"{source}: its outputs are not described; convert it and measure the artifact")
    return module_runner(
        opened.module, spec, mode=mode, device=device, precision=precision, threads=threads, call=opened.call
    )


def module_runner(
    module: Any,
    spec: GeneratorSpec,
    *,
    mode: str = "eager",
    device: str = "cpu",
    precision: str = "fp32",
    threads: int | None = None,
    call: Mapping[str, Any] | None = None,
) -> Runner:
    """A runner of a torch module in memory; see :func:`open_torch`.

    Raises:
        BackendUnavailableError: No such GPU.
        UsageError: Unknown mode.
    """
    import torch

    from ganexport.errors import unknown_name
    from ganexport.runtime._torch import in_memory_runner

    if mode not in TORCH_MODES:
        raise unknown_name("mode", mode, tuple(TORCH_MODES))
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BackendUnavailableError(f"torch {torch.__version__} sees no CUDA GPU")
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"

    target = _compiled(torch, module.eval().to(device), mode)
    function = _function(torch, target, device, precision, dict(call or {}), TORCH_MODES[mode][0])
    return in_memory_runner(torch, function, spec, device, mode)


def _compiled(torch: Any, module: Any, mode: str) -> Any:
    compile_mode, freeze = TORCH_MODES[mode]
    if compile_mode is None:
        return module
    import torch._inductor.config

    torch._inductor.config.freezing = freeze
    torch._dynamo.config.recompile_limit = 64  # every batch size is compiled for itself
    return torch.compile(module, mode=compile_mode, dynamic=False)


def _function(
    torch: Any, target: Any, device: str, precision: str, call: dict[str, Any], compile_mode: str | None
) -> Any:
    kind = device.partition(":")[0]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    marks = compile_mode in ("reduce-overhead", "max-autotune") and kind == "cuda"

    def run(*inputs: Any) -> Any:
        if marks:
            torch.compiler.cudagraph_mark_step_begin()
        if dtype is None:
            return target(*inputs, **call)
        with torch.autocast(kind, dtype):
            return _float(torch, target(*inputs, **call))

    return run


def _float(torch: Any, outputs: Any) -> Any:
    """Outputs as float32, as an exported file gives them."""
    if isinstance(outputs, Mapping):
        return {name: value.float() for name, value in outputs.items()}
    if isinstance(outputs, list | tuple):
        return [value.float() for value in outputs]
    return outputs.float() if torch.is_floating_point(outputs) else outputs
