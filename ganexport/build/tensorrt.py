"""ONNX to a TensorRT engine: TensorRT 10.x, 11.x and TensorRT-RTX from the same code.

Networks are strongly typed: the precision is the ONNX file's, and the builder has no say in it
(TensorRT 11 removed the precision flags). TensorRT-RTX builds without a GPU; plain TensorRT
needs the GPU that it builds for.
"""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ganexport.artifact import write_atomic
from ganexport.build.options import BuildOptions, Built, file_name
from ganexport.errors import BackendUnavailableError, ExportError, MissingDependencyError, UsageError
from ganexport.spec import Dim, GeneratorSpec

#: Precisions of the ONNX file that the parser takes.
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
#: Python module of each flavour, in order of preference: plain TensorRT where it is installed.
FLAVOURS = ("tensorrt", "tensorrt_rtx")


def load_library() -> tuple[str, Any]:
    """The installed TensorRT.

    Returns:
        (flavour, module): flavour is "tensorrt" or "tensorrt_rtx".

    Raises:
        MissingDependencyError: Neither is installed.
    """
    import importlib

    for flavour in FLAVOURS:
        with contextlib.suppress(ImportError, OSError):
            return flavour, importlib.import_module(flavour)
    raise MissingDependencyError(
        "no TensorRT here: pip install tensorrt-rtx-cu13 (builds engines without a GPU) or tensorrt-cu13"
    )


def unavailable() -> str | None:
    """Why engines cannot be built here; None when they can."""
    try:
        load_library()
    except MissingDependencyError as error:
        return str(error)
    return None


def build(model: Path, spec: GeneratorSpec, folder: Path, precision: str, options: BuildOptions) -> Built:
    """Build an engine from an ONNX file.

    Args:
        model: The ONNX file, already in the wanted precision.
        spec: Its Dims become the optimisation profile.
        folder: Where to write.
        precision: Of the ONNX file.
        options: builder_level, workspace_mb, timing_cache, version_compatible,
            hardware_compatible and compute_capabilities.

    Returns:
        The engine, with flavour, version, platform and compute capability in ``requires``.

    Raises:
        MissingDependencyError: No TensorRT is installed.
        BackendUnavailableError: The builder needs a GPU that is not here.
        ExportError: The parser or the builder refuses the graph; node and origin are named.
    """
    flavour, trt = load_library()
    log = _logger(trt)
    builder = _create_builder(trt, flavour, log)
    network = builder.create_network(_network_flags(trt))
    _parse(trt, flavour, log, network, model)
    config = builder.create_builder_config()
    _configure(trt, flavour, config, options)
    config.add_optimization_profile(_profile(builder, network, spec))
    log.last = ""
    with _timing_cache(config, options.timing_cache):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = _told(model, log.last or "no reason given", options)
        raise ExportError(f"{flavour} {trt.__version__} cannot build {model.name}: {reason}")
    name = file_name("engine", precision)
    write_atomic(folder / name, bytes(plan))
    requires = {"flavour": flavour, "version": str(trt.__version__), "platform": _platform()}
    requires |= _capability_required(flavour, options)
    notes = (
        f"built by {flavour} {trt.__version__}: {network.num_layers} layers parsed from {model.name}, "
        f"{_describe_profile(spec)}",
    )
    return Built(name, (), requires, (f"{flavour} {trt.__version__} strongly-typed",), notes)


def parse(model: Path) -> None:
    """Parse an ONNX file and build nothing.

    Raises:
        MissingDependencyError, BackendUnavailableError, ExportError: As :func:`build`.
    """
    flavour, trt = load_library()
    log = _logger(trt)
    builder = _create_builder(trt, flavour, log)
    _parse(trt, flavour, log, builder.create_network(_network_flags(trt)), model)


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps the last error, which the builder reports only here."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            """Called by TensorRT."""
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last = " ".join(message.split())[:400]

    return Log()


def _create_builder(trt: Any, flavour: str, log: Any) -> Any:
    try:
        builder = trt.Builder(log)
    except Exception as error:  # noqa: BLE001 - pybind raises TypeError when the factory returns null
        raise BackendUnavailableError(
            f"{flavour} {trt.__version__} cannot start its builder here: {log.last or error}; plain TensorRT needs "
            "a GPU to build, TensorRT-RTX does not (pip install tensorrt-rtx-cu13)"
        ) from None
    return builder


def _network_flags(trt: Any) -> int:
    flags = trt.NetworkDefinitionCreationFlag
    return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0


def _parse(trt: Any, flavour: str, log: Any, network: Any, model: Path) -> None:
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(model)):
        return
    reasons = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = _attribute(error, "node_name") or f"node {_attribute(error, 'node')}"
        operator = _attribute(error, "node_operator")
        reasons.append((f"{operator} {node}" if operator else str(node), " ".join(str(error.desc()).split()), node))
    if not reasons:
        raise ExportError(f"{flavour} {trt.__version__} cannot parse {model.name}: {log.last or 'no reason given'}")
    where, description, node = reasons[0]
    origin = node_origin(model, str(node))
    origin = f" from {origin}" if origin else "".join(f" ({told})" for told in _origins(model, description)[:1])
    if description in ("", "false"):  # all that the parser says of an operator that it does not know
        description = "an operator that this TensorRT does not have; write it with others"
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    raise ExportError(f"{flavour} {trt.__version__} cannot parse {where}{origin}: {description[:300]}{more}")


def _attribute(error: Any, name: str) -> Any:
    value = getattr(error, name, None)
    return value() if callable(value) else value


def node_origin(model: Path, node: str) -> str:
    """The line of the user's code that a node came from, "net.py:12", when the exporter recorded it."""
    from ganexport.build.onnx_file import load_model, origin_of

    with contextlib.suppress(Exception):
        for candidate in load_model(model).graph.node:
            if candidate.name == node:
                return origin_of(candidate)
    return ""


def _origins(model: Path, text: str) -> list[str]:
    """ "NAME is from net.py:12" for each node or tensor of the model that a message names."""
    from ganexport.build.onnx_file import load_model, origin_of

    places: dict[str, str] = {}
    with contextlib.suppress(Exception):
        for node in load_model(model).graph.node:
            for name in (node.name, *node.input, *node.output):
                if name and origin_of(node):
                    places.setdefault(name, origin_of(node))
    named = dict.fromkeys(word.rstrip(".:") for word in re.findall(r"[\w./:-]+", text))
    return [f"{name} is from {places[name]}" for name in named if name in places][:3]


def _told(model: Path, reason: str, options: BuildOptions) -> str:
    """The builder's words, with where the nodes in them came from and what to do about them."""
    text = "; ".join([reason, *_origins(model, reason)])
    if options.workspace_mb is not None and "workspace" in reason.lower():
        text += f"; raise --workspace (it is {options.workspace_mb} MiB) or leave it out"
    return text


def _refuse_on_rtx(options: BuildOptions) -> None:
    """Options that TensorRT-RTX takes without a word, or with a warning, and does nothing with.

    Raises:
        UsageError: One of them was given.
    """
    refused = {
        "--timing-cache": (
            options.timing_cache is not None,
            "TensorRT-RTX measures nothing while it builds (its timing cache is a no-op): leave it out",
        ),
        "--version-compatible": (
            options.version_compatible,
            "TensorRT-RTX has no lean runtime to load such engines with: rebuild after an upgrade, in seconds",
        ),
        "--hardware-compatible": (
            options.hardware_compatible,
            "a TensorRT-RTX engine fits every GPU generation it knows unless --compute-capability names fewer: "
            "leave it out",
        ),
    }
    for name, (given, reason) in refused.items():
        if given:
            raise UsageError(f"{name}: {reason}")


def _configure(trt: Any, flavour: str, config: Any, options: BuildOptions) -> None:
    if flavour == "tensorrt_rtx":
        _refuse_on_rtx(options)
    if options.builder_level is not None:
        if not 0 <= options.builder_level <= 5:
            raise UsageError(f"builder level {options.builder_level}: TensorRT has 0 to 5")
        config.builder_optimization_level = options.builder_level
    if options.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.compute_capabilities:
        _target(trt, config, options.compute_capabilities)
    # TF32 has fp16's mantissa: an engine called fp32 must not use it behind the user's back.
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)
    # Node names in the engine are what an error or a profile can be traced back with.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED


def _target(trt: Any, config: Any, capabilities: tuple[str, ...]) -> None:
    if not hasattr(config, "set_compute_capability"):
        raise UsageError(
            "target compute capabilities exist in TensorRT-RTX only; plain TensorRT builds for its own GPU"
        )
    known = {name: getattr(trt.ComputeCapability, name) for name in dir(trt.ComputeCapability) if name.startswith("SM")}
    config.num_compute_capabilities = len(capabilities)
    for index, text in enumerate(capabilities):
        name = "SM" + text.replace(".", "").upper().removeprefix("SM")
        if name not in known:
            readable = ", ".join(f"{n[2:-1]}.{n[-1]}" for n in sorted(known, key=lambda n: int(n[2:])))
            raise UsageError(f"compute capability {text!r} is not one of TensorRT-RTX's: {readable}")
        config.set_compute_capability(known[name], index)


def _profile(builder: Any, network: Any, spec: GeneratorSpec) -> Any:
    profile = builder.create_optimization_profile()
    dims = {dim.name: dim for dim in spec.dims}
    for index in range(network.num_inputs):
        tensor = spec.input(network.get_input(index).name)
        shapes = [tuple(_size(dims, size, which) for size in tensor.shape) for which in ("min", "opt", "max")]
        if tensor.shape or shapes[0]:
            profile.set_shape(tensor.name, *shapes)
    return profile


def _size(dims: dict[str, Dim], size: int | str, which: str) -> int:
    return size if isinstance(size, int) else int(getattr(dims[size], which))


def _describe_profile(spec: GeneratorSpec) -> str:
    ranges = ", ".join(f"{d.name} {d.min}:{d.opt}:{d.max}" for d in spec.dims)
    return f"profile {ranges}" if ranges else "fixed shapes"


@contextlib.contextmanager
def _timing_cache(config: Any, path: Path | None) -> Iterator[None]:
    if path is None or not hasattr(config, "create_timing_cache"):
        yield
        return
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None:  # written by another version: start over rather than fail
        cache = config.create_timing_cache(b"")
    if cache is not None:
        config.set_timing_cache(cache, ignore_mismatch=False)
    yield
    kept = config.get_timing_cache()
    if kept is not None:
        write_atomic(path, bytes(kept.serialize()))


def _platform() -> str:
    return f"{platform.system()}-{platform.machine()}".lower()


def _capability_required(flavour: str, options: BuildOptions) -> dict[str, str]:
    if flavour == "tensorrt_rtx":
        return {"compute_capability": ",".join(options.compute_capabilities)} if options.compute_capabilities else {}
    found = _own_capability()
    if not found:
        return {}
    return {"compute_capability": f"{found}+" if options.hardware_compatible else found}


def _own_capability() -> str:
    with contextlib.suppress(Exception):
        from cuda.bindings import runtime

        attribute = runtime.cudaDeviceAttr
        major = runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMajor, 0)[1]
        minor = runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMinor, 0)[1]
        return f"{major}.{minor}"
    return ""
