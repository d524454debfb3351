"""A module behind one plain interface: tensors in the spec's order in, a tuple of tensors out."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from ganexport.errors import ExportError, UsageError
from ganexport.export.prepare._location import innermost
from ganexport.export.prepare._rewriting import Rewriting
from ganexport.export.prepare.adaptive_pooling import FreeSizePooling
from ganexport.export.prepare.affine_grid import SymbolicAffineGrid
from ganexport.export.prepare.attention import FourDimensionalAttention
from ganexport.export.prepare.autocast import FullPrecision, without_autocast
from ganexport.export.prepare.autograd_functions import plain_functions
from ganexport.export.prepare.batch_statistics import WrittenOutStatistics
from ganexport.export.prepare.cumulative_product import ScannedProduct
from ganexport.export.prepare.distributions import unchecked_distributions
from ganexport.export.prepare.fold import FoldAsConvolution
from ganexport.export.prepare.linspace import SymbolicLinspace
from ganexport.export.prepare.modulated_convolution import PerSampleConvolution
from ganexport.export.prepare.random_slopes import MeanSlopes
from ganexport.export.prepare.randomness import Draw, Randomness
from ganexport.export.prepare.recurrent import FreeLengthRecurrence
from ganexport.export.prepare.search import CountedSearch
from ganexport.export.prepare.shifting import SlicedRoll
from ganexport.export.prepare.spectral import SpectralAsConvolution
from ganexport.export.prepare.take_along import TakenByGather
from ganexport.measure.feeds import resolve_sizes
from ganexport.seeding import latents
from ganexport.spec import BATCH, GeneratorSpec, TensorSpec

Array = np.ndarray[Any, Any]

#: Entered in this order when a module is exported, and not for its reference.
REWRITINGS: tuple[type[Rewriting], ...] = (
    PerSampleConvolution,
    FourDimensionalAttention,
    SymbolicLinspace,
    SymbolicAffineGrid,
    ScannedProduct,
    FoldAsConvolution,
    FreeLengthRecurrence,
    SpectralAsConvolution,
    FreeSizePooling,
    TakenByGather,
    SlicedRoll,
    MeanSlopes,
    WrittenOutStatistics,
    CountedSearch,
)


def flatten_outputs(value: Any) -> tuple[list[str] | None, tuple[torch.Tensor, ...]]:
    """Tensors of a module's result in its order, with their names where it is a mapping or a dataclass.

    What is nested gets dotted names: ``{"features": [a, b]}`` is ``features.0`` and ``features.1``.

    Raises:
        ExportError: There is no tensor in it.
    """
    if isinstance(value, torch.Tensor):
        return None, (value,)
    found = list(_leaves(value))
    if not found:
        raise ExportError(f"the module returns {type(value).__name__}; return a tensor, a tuple or a dict of tensors")
    named = not isinstance(value, tuple | list) or hasattr(value, "_fields")
    return [name for name, _ in found] if named else None, tuple(tensor for _, tensor in found)


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(dotted name, tensor) of everything nested in a result; what is no tensor is left out."""
    if isinstance(value, torch.Tensor):
        yield prefix, value
        return
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, tuple | list):
        items = list(zip(getattr(value, "_fields", None) or map(str, range(len(value))), value, strict=True))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        return
    for key, item in items:
        yield from _leaves(item, f"{prefix}.{key}" if prefix else key)


class Seen:
    """What the tracing passes met during the last call.

    Attributes:
        rewritten: A line for the manifest for each of :data:`REWRITINGS` that had something to do.
        complex: Complex tensors that a captured graph held before they became pairs.
        unproved: Relations of sizes that torch could not prove when the graph was captured.
        numbers: Files whose int() and float() of sizes were kept symbolic when the graph was captured.
        autocast: Autocast regions that were switched off.
        half: Casts to half precision that were switched off.
        draws: Random calls, in order.
        names: Of the tensors of a mapping that forward returns.
        writes: Whether forward wrote into its inputs.
    """

    def __init__(self) -> None:
        self.rewritten: list[str] = []
        self.complex = 0
        self.unproved = 0
        self.numbers: tuple[str, ...] = ()
        self.autocast = 0
        self.half = 0
        self.draws: list[Draw] = []
        self.names: list[str] | None = None
        self.writes = False


class Wrapped(torch.nn.Module):
    """What the exporters see.

    Args:
        module: The user's.
        names: Input names in order; passed as keywords when forward has parameters of all those names.
        call: Keyword arguments of every call.
        noise_inputs: How many of the trailing inputs are noise (``--noise input``).
        constants: Noise of every random call in order (``--noise constant``), expandable to its shape.
        rewrite: Whether per-sample convolutions are rewritten (exporting) or run as written (reference).
        finish: Last step on the outputs (uint8 images).
        own_inputs: Whether the module is given copies, because it writes into its inputs.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        names: list[str],
        call: Mapping[str, Any],
        *,
        noise_inputs: int = 0,
        constants: list[torch.Tensor] | None = None,
        rewrite: bool = True,
        finish: Callable[[tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]] | None = None,
        own_inputs: bool = False,
    ) -> None:
        super().__init__()
        self.module = module
        self.names = names
        self.call = dict(call)
        self.noise_inputs = noise_inputs
        self.rewrite = rewrite
        self.finish = finish
        self.own_inputs = own_inputs
        self.invoke = Invocation(module, names)
        # In an object of its own: torch.export puts back what forward assigns to the module.
        self.seen = Seen()
        self.constants = len(constants) if constants is not None else 0
        for index, tensor in enumerate(constants or []):
            self.register_buffer(f"noise_{index}", tensor)

    def forward(self, *inputs: torch.Tensor) -> Any:
        """One call, under the tracing passes."""
        noise: tuple[torch.Tensor, ...] = ()
        if self.own_inputs:
            inputs = tuple(tensor.clone() for tensor in inputs)
        if self.noise_inputs:
            inputs, noise = inputs[: -self.noise_inputs], inputs[-self.noise_inputs :]
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # what torch.compile wraps runs as written
            stack.enter_context(plain_functions())
            stack.enter_context(unchecked_distributions())
            autocast = stack.enter_context(without_autocast())
            precise = stack.enter_context(FullPrecision())
            modes = [stack.enter_context(kind()) for kind in (REWRITINGS if self.rewrite else ())]
            randomness = stack.enter_context(Randomness(self._supply(noise)))
            value = self.invoke(self.module, inputs, self.call)
        self.seen.rewritten = [mode.line.format(mode.count) for mode in modes if mode.count]
        self.seen.autocast = autocast.count
        self.seen.half = precise.count
        self.seen.draws = randomness.draws
        self.seen.names, tensors = flatten_outputs(value)
        if self.finish is not None:
            tensors = self.finish(tensors)
        return tensors[0] if len(tensors) == 1 else tensors

    def _supply(self, noise: tuple[torch.Tensor, ...]) -> Callable[[int, tuple[Any, ...]], Any] | None:
        if noise:
            return lambda number, shape: noise[number]
        if self.constants:
            return lambda number, shape: getattr(self, f"noise_{number}").expand(*shape).clone()
        return None


class Invocation:
    """How a module is called with inputs of these names: by keyword where forward has them all, else by position.

    A dotted name is part of a nested argument: ``batch.image`` is the entry "image" of a dict, ``styles.0`` the first
    entry of a list.
    """

    def __init__(self, module: torch.nn.Module, names: list[str]) -> None:
        self.names = list(names)
        self.arguments = list(dict.fromkeys(name.partition(".")[0] for name in names))
        self.by_keyword = _takes_keywords(module, self.arguments)

    def __call__(
        self, module: Callable[..., Any], inputs: tuple[torch.Tensor, ...], keywords: Mapping[str, Any]
    ) -> Any:
        """The module's result."""
        arguments = _nested(zip(self.names, inputs, strict=True))
        if self.by_keyword:
            return module(**arguments, **keywords)
        return module(*arguments.values(), **keywords)


def _nested(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Values by dotted names as dicts of dicts, and of lists where the keys are 0, 1, …"""
    found: dict[str, Any] = {}
    deeper: dict[str, list[tuple[str, Any]]] = {}
    for name, value in items:
        first, dot, rest = name.partition(".")
        if dot:
            deeper.setdefault(first, []).append((rest, value))
            found.setdefault(first, None)
        else:
            found[first] = value
    for name, parts in deeper.items():
        inner = _nested(parts)
        found[name] = list(inner.values()) if list(inner) == [str(i) for i in range(len(inner))] else inner
    return found


def _takes_keywords(module: torch.nn.Module, names: list[str]) -> bool:
    try:
        parameters = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return all(name in parameters and parameters[name].kind in kinds for name in names)


def draw_inputs(spec: GeneratorSpec, sizes: Mapping[str, int], seed: int = 0, start: int = 0) -> dict[str, Any]:
    """Inputs of these sizes; where the first size is a fixed one, as many samples as it says."""
    resolved = resolve_sizes(spec, sizes)
    return latents(spec, seed, start, resolved.get(BATCH, 1), sizes=resolved)


def tensors_of(spec: GeneratorSpec, feeds: Mapping[str, Array]) -> tuple[torch.Tensor, ...]:
    """Feeds as tensors in the spec's order."""
    return tuple(torch.from_numpy(np.ascontiguousarray(feeds[t.name])).to(torch_dtype(t)) for t in spec.inputs)


def torch_dtype(tensor: TensorSpec) -> torch.dtype:
    """The torch dtype of a tensor."""
    dtype = getattr(torch, tensor.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


class EagerReference:
    """The user's module in eager fp32: the truth that candidates are compared with.

    Args:
        function: The wrapped module.
        spec: With its outputs.

    Attributes:
        weights_sha256: Digest of the module's tensors as they came, where it is known.
    """

    weights_sha256: str = ""

    def __init__(self, function: Wrapped, spec: GeneratorSpec) -> None:
        self.function = function
        self.spec = spec
        self.name = f"eager torch {torch.__version__} fp32"

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name for host arrays."""
        outputs = run_module(self.function, tensors_of(self.spec, feeds))
        return {tensor.name: _to_numpy(value) for tensor, value in zip(self.spec.outputs, outputs, strict=True)}


def _to_numpy(value: torch.Tensor) -> Array:
    value = value.detach().cpu()
    return value.float().numpy() if value.dtype in (torch.bfloat16,) else value.numpy()


def run_module(function: Wrapped, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Run on copies of the inputs, without gradients; whatever the user's code raises is one line with its place.

    Raises:
        ExportError: forward failed.
        UsageError: forward does not take these arguments.
    """
    inputs = tuple(tensor.clone() for tensor in inputs)
    versions = [tensor._version for tensor in inputs]
    try:
        with torch.no_grad():
            value = function(*inputs)
    except (ExportError, UsageError):
        raise
    except Exception as error:  # noqa: BLE001 - the user's forward may raise anything
        where = innermost(error.__traceback__)
        shapes = ", ".join(
            f"{name} {list(x.shape)}" for name, x in zip([*function.names, *["noise"] * 99], inputs, strict=False)
        )
        text = " ".join(str(error).split())[:300]
        raise ExportError(
            f"running the module on {shapes} failed: {type(error).__name__}: {text}{f' at {where}' if where else ''}"
        ) from None
    function.seen.writes = function.seen.writes or versions != [tensor._version for tensor in inputs]
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)
