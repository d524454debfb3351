"""Complex numbers in a captured graph as pairs of real ones, and Fourier transforms as matrix products.

ONNX has no complex tensors, its exporter forms for a few operators only, and TensorRT no Fourier transform.
Every operator of the graph that makes or takes a complex tensor is replaced by real arithmetic on
(real part, imaginary part); everything else stays as it was. A transform along an axis is a product with
the matrix exp(-2 pi i k n / N), which is made from the axis's size where that is symbolic: the products k n
are reduced modulo N before they become angles, so large axes lose nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ganexport.errors import ExportError

COMPLEX_OUTPUT = "the module returns a complex tensor: return its parts, torch.view_as_real(x), or x.abs()"

aten = torch.ops.aten


class Pair:
    """A complex tensor (or number) as two real ones of the same shape."""

    def __init__(self, real: Any, imaginary: Any) -> None:
        self.real = real
        self.imaginary = imaginary

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return int(self.real.ndim)


def has_complex(program: torch.export.ExportedProgram) -> bool:
    """Whether any tensor of the program is complex."""
    return any(is_complex(node.meta.get("val")) for node in program.graph.nodes)


def is_complex(value: Any) -> bool:
    """Whether a traced value is a complex tensor, or a list with one."""
    if isinstance(value, tuple | list):
        return any(is_complex(item) for item in value)
    return isinstance(value, torch.Tensor) and value.is_complex()


class PairedModule(torch.nn.Module):
    """Runs a program's graph with pairs for its complex tensors.

    Args:
        program: As captured.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.graph_module = program.module(check_guards=False)
        #: path of a complex weight → its two parts, which take its place
        self.parts: dict[str, tuple[str, str]] = {}
        paths = {str(node.target) for node in self.graph_module.graph.nodes if node.op == "get_attr"}
        paths |= {name for name, _ in self.graph_module.named_parameters()}
        paths |= {name for name, _ in self.graph_module.named_buffers()}
        for number, path in enumerate(sorted(paths)):
            owner, _, name = path.rpartition(".")
            module = self.graph_module.get_submodule(owner)
            value = getattr(module, name)
            if not is_complex(value):
                continue
            delattr(module, name)
            self.parts[path] = (f"real_{number}", f"imaginary_{number}")
            for part, values in zip(self.parts[path], (value.detach().real, value.detach().imag), strict=True):
                self.register_buffer(part, values.clone())

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The program's outputs for its inputs."""
        weights = {path: Pair(getattr(self, real), getattr(self, other)) for path, (real, other) in self.parts.items()}
        value = _PairInterpreter(self.graph_module, weights).run(*inputs)
        if any(isinstance(item, Pair) for item in (value if isinstance(value, tuple | list) else [value])):
            raise ExportError(COMPLEX_OUTPUT)
        return value


class _PairInterpreter(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule, weights: dict[str, Pair]) -> None:
        super().__init__(module)
        self.weights = weights

    def run_node(self, n: torch.fx.Node) -> Any:
        try:
            return super().run_node(n)
        except _MissingRuleError as error:
            from ganexport.export.capture import _quoted_place

            place = _quoted_place(n.meta.get("stack_trace") or "")
            raise ExportError(
                f"{place + ': ' if place else ''}{error} of complex numbers has no real form here; write it with real "
                "and imaginary parts (torch.view_as_real)"
            ) from None

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.weights[target] if target in self.weights else super().get_attr(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not _mentions_complex((target, args, kwargs)):
            return super().call_function(target, args, kwargs)
        name = _name(target)
        rule = RULES.get(name)
        if rule is None:
            raise _MissingRuleError(name)
        made = rule(*args, **kwargs)
        if _changes_its_argument(target) and isinstance(args[0], Pair):
            made = _pair(made)
            for own, new in ((args[0].real, made.real), (args[0].imaginary, made.imaginary)):
                own.copy_(new) if isinstance(new, torch.Tensor) else own.fill_(new)
            return args[0]
        return made


class _MissingRuleError(Exception):
    pass


_MAKERS = {"complex", "polar", "view_as_complex", "_fft_r2c", "fft_rfft", "fft_rfft2", "fft_rfftn", "fft_fft",
           "fft_fft2", "fft_fftn", "fft_ifft", "fft_ifft2", "fft_ifftn", "fft_ihfft"}  # fmt: skip


def _name(target: Any) -> str:
    """ "add" of aten.add.Tensor, aten.add_ and operator.add alike."""
    packet = getattr(target, "overloadpacket", None)
    name = packet.__name__ if packet is not None else getattr(target, "__name__", str(target))
    return name if name.startswith("_") else name.rstrip("_")


def _changes_its_argument(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and bool(schema.arguments) and schema.arguments[0].is_write


def _mentions_complex(parts: tuple[Any, Any, Any]) -> bool:
    target, args, kwargs = parts
    if _name(target) in _MAKERS:
        return True
    found = False

    def look(value: Any) -> None:
        nonlocal found
        if isinstance(value, Pair | complex) or (isinstance(value, torch.dtype) and value.is_complex):
            found = True
        elif isinstance(value, tuple | list):
            for item in value:
                look(item)

    look(args)
    look(tuple(kwargs.values()))
    return found


def _split(value: torch.Tensor) -> Pair:
    return Pair(value.real.contiguous(), value.imag.contiguous())


def _pair(value: Any) -> Pair:
    """Anything as a pair."""
    if isinstance(value, Pair):
        return value
    if isinstance(value, torch.Tensor):
        return _split(value) if value.is_complex() else Pair(value, torch.zeros_like(value))
    number = complex(value)
    return Pair(number.real, number.imag)


# --- arithmetic ------------------------------------------------------------------------------------------------


def _multiply(a: Any, b: Any) -> Pair:
    if not isinstance(a, Pair | complex):
        b = _pair(b)
        return Pair(a * b.real, a * b.imaginary)
    if not isinstance(b, Pair | complex):
        a = _pair(a)
        return Pair(a.real * b, a.imaginary * b)
    a, b = _pair(a), _pair(b)
    if isinstance(a.real, float):
        a, b = b, a
    if isinstance(b.real, float) and b.real == 0.0:  # i times something: no zeros to multiply
        return Pair(a.imaginary * -b.imaginary, a.real * b.imaginary)
    return Pair(a.real * b.real - a.imaginary * b.imaginary, a.real * b.imaginary + a.imaginary * b.real)


def _add(a: Any, b: Any, alpha: Any = 1) -> Pair:
    b = _multiply(b, alpha) if alpha != 1 else b
    if not isinstance(a, Pair | complex):
        b = _pair(b)
        return Pair(a + b.real, _wide(b.imaginary, a))
    if not isinstance(b, Pair | complex):
        a = _pair(a)
        return Pair(a.real + b, _wide(a.imaginary, b))
    a, b = _pair(a), _pair(b)
    return Pair(a.real + b.real, a.imaginary + b.imaginary)


def _wide(value: Any, other: Any) -> Any:
    """``value`` as wide as its sum with ``other``."""
    return value + torch.zeros_like(other) if isinstance(other, torch.Tensor) else value


def _negate(a: Any) -> Any:
    return Pair(-a.real, -a.imaginary) if isinstance(a, Pair) else -a


def _subtract(a: Any, b: Any, alpha: Any = 1) -> Pair:
    return _add(a, _negate(_multiply(b, alpha) if alpha != 1 else b))


def _reciprocal(a: Pair) -> Pair:
    square = a.real * a.real + a.imaginary * a.imaginary
    return Pair(a.real / square, -a.imaginary / square)


def _divide(a: Any, b: Any) -> Pair:
    if not isinstance(b, Pair | complex):
        a = _pair(a)
        return Pair(a.real / b, a.imaginary / b)
    return _multiply(a, 1 / b if isinstance(b, complex) else _reciprocal(b))


def _absolute(a: Pair) -> torch.Tensor:
    return torch.sqrt(a.real * a.real + a.imaginary * a.imaginary)


def _exponential(a: Pair) -> Pair:
    size = torch.exp(a.real)
    return Pair(size * torch.cos(a.imaginary), size * torch.sin(a.imaginary))


def _power(a: Pair, exponent: Any) -> Pair:
    if isinstance(exponent, int | float) and exponent == int(exponent) and 1 <= abs(exponent) <= 8:
        value = a
        for _ in range(abs(int(exponent)) - 1):
            value = _multiply(value, a)
        return value if exponent > 0 else _reciprocal(value)
    raise _MissingRuleError("pow")


def _sign(a: Pair) -> Pair:
    size = _absolute(a)
    safe = torch.where(size == 0, torch.ones_like(size), size)
    return Pair(a.real / safe, a.imaginary / safe)


def _where(condition: Any, a: Any, b: Any) -> Pair:
    a, b = _pair(a), _pair(b)
    return Pair(torch.where(condition, a.real, b.real), torch.where(condition, a.imaginary, b.imaginary))


def _bilinear(product: Callable[[Any, Any], Any], a: Any, b: Any) -> Pair:
    """A product of two tensors that is linear in each."""
    if not isinstance(a, Pair):
        return Pair(product(a, b.real), product(a, b.imaginary))
    if not isinstance(b, Pair):
        return Pair(product(a.real, b), product(a.imaginary, b))
    return Pair(
        product(a.real, b.real) - product(a.imaginary, b.imaginary),
        product(a.real, b.imaginary) + product(a.imaginary, b.real),
    )


def _einsum(equation: str, operands: Sequence[Any], path: Any = None) -> Pair:
    if len(operands) == 1:
        return Pair(torch.einsum(equation, operands[0].real), torch.einsum(equation, operands[0].imaginary))
    if len(operands) != 2:
        raise _MissingRuleError("einsum of more than two operands")
    return _bilinear(lambda a, b: torch.einsum(equation, a, b), *operands)


def _linear(value: Any, weight: Any, bias: Any = None) -> Pair:
    made = _bilinear(torch.nn.functional.linear, value, weight)
    return made if bias is None else _add(made, bias)


def _sum_of_squares(a: Pair, *args: Any, **kwargs: Any) -> torch.Tensor:
    made: torch.Tensor = torch.linalg.vector_norm(_absolute(a), *args, **kwargs)
    return made


# --- makers and takers -----------------------------------------------------------------------------------------


def _to(value: Any, *args: Any, **kwargs: Any) -> Any:
    """A cast: between complex kinds, from real to complex, or (dropping the imaginary part) back."""
    wanted = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.dtype)), None)
    if wanted is None:
        return value
    if wanted.is_complex:
        half = torch.float64 if wanted == torch.complex128 else torch.float32
        made = _pair(value)
        return Pair(made.real.to(half), made.imaginary.to(half))
    return (value.real if isinstance(value, Pair) else value).to(wanted)


def _filled(make: Callable[..., Any], filler: Any = 0) -> Callable[..., Any]:
    def call(*args: Any, dtype: Any = None, **kwargs: Any) -> Pair:
        kwargs = {k: v for k, v in kwargs.items() if k in ("device",)}
        args = tuple(a.real if isinstance(a, Pair) else a for a in args)
        value = complex(args[-1] if filler is None else filler)
        args = args[:-1] if filler is None else args
        base = make(*args, dtype=torch.float32, **kwargs)
        return Pair(base + value.real, base + value.imag)

    return call


def _both(operator: Callable[..., Any]) -> Callable[..., Any]:
    """An operator that only moves or sums numbers: on each part alone."""

    def call(*args: Any, **kwargs: Any) -> Any:
        reals = operator(*_parts(args, real=True), **{k: _parts(v, real=True) for k, v in kwargs.items()})
        others = operator(*_parts(args, real=False), **{k: _parts(v, real=False) for k, v in kwargs.items()})
        if isinstance(reals, tuple | list):
            return [Pair(a, b) for a, b in zip(reals, others, strict=True)]
        return Pair(reals, others)

    return call


def _parts(value: Any, *, real: bool) -> Any:
    if isinstance(value, Pair):
        return value.real if real else value.imaginary
    if isinstance(value, complex):
        return value.real if real else value.imag
    if isinstance(value, tuple | list):
        # In one list (torch.cat), a real tensor beside a complex one has no imaginary part.
        mixed = any(isinstance(item, Pair) for item in value)
        return [
            torch.zeros_like(item)
            if mixed and not real and isinstance(item, torch.Tensor) and item.is_floating_point()
            else _parts(item, real=real)
            for item in value
        ]
    return value


# --- Fourier transforms ----------------------------------------------------------------------------------------


def _matrix(rows: Any, columns: Any, size: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of 2 pi k n / size for k < rows and n < columns."""
    if all(isinstance(value, int) for value in (rows, columns, size)):
        # numpy's, so that the graph holds the values and not how they were computed.
        angle = np.outer(np.arange(rows), np.arange(columns)) % size * (2.0 * math.pi / size)
        cosine, sine = (torch.tensor(values, dtype=like.dtype) for values in (np.cos(angle), np.sin(angle)))
        return cosine, sine
    # Whole numbers below 2^24 are exact in fp32: k n - size floor(k n / size) is, up to a turn.
    length = torch.arange(size, device=like.device)[-1:].to(torch.float32) + 1.0  # a tensor: no symbolic division
    product = torch.arange(rows).to(torch.float32)[:, None] * torch.arange(columns).to(torch.float32)
    turn = (product - length * torch.floor(product / length)) / length
    return torch.cos(turn * (2.0 * math.pi)), torch.sin(turn * (2.0 * math.pi))


def _scale(norm: str, inverse: bool, size: Any, like: torch.Tensor) -> Any:
    if norm == "ortho":
        power = -0.5
    elif (norm == "backward") == inverse:
        power = -1.0
    else:
        return 1.0
    if isinstance(size, int):
        return float(size) ** power
    length = torch.arange(size, device=like.device)[-1:].to(like.dtype) + 1.0
    return length.rsqrt() if power == -0.5 else length.reciprocal()


def _along(value: torch.Tensor, axis: int, matrix: torch.Tensor) -> torch.Tensor:
    """matrix [rows, columns] times the axis of ``value`` that has ``columns``."""
    moved = value.movedim(axis, -1)
    return torch.matmul(moved, matrix.transpose(0, 1)).movedim(-1, axis)


def _resized(value: torch.Tensor, axis: int, size: Any) -> torch.Tensor:
    """Cut or filled with zeros to a size."""
    have = value.shape[axis]
    if statically_known_true(have == size):
        return value
    if statically_known_true(have > size):
        return value.narrow(axis, 0, size)
    if isinstance(have, int) and isinstance(size, int):
        pads = [0, 0] * (value.ndim - 1 - axis % value.ndim) + [0, size - have]
        return torch.nn.functional.pad(value, pads)
    return value.narrow(axis, 0, size)


def _forward_real(value: torch.Tensor, axis: int, size: Any, norm: str, onesided: bool = True) -> Pair:
    size = value.shape[axis] if size is None else size
    value = _resized(value, axis, size)
    cosine, sine = _matrix(size // 2 + 1 if onesided else size, size, size, value)
    scale = _scale(norm, False, size, value)
    return Pair(_along(value, axis, cosine * scale), _along(value, axis, sine * -scale))


def _complex(value: Pair, axis: int, size: Any, norm: str, *, inverse: bool) -> Pair:
    size = value.real.shape[axis] if size is None else size
    real, imaginary = _resized(value.real, axis, size), _resized(value.imaginary, axis, size)
    cosine, sine = _matrix(size, size, size, real)
    scale = _scale(norm, inverse, size, real)
    cosine, sine = cosine * scale, sine * (scale if inverse else -scale)
    return Pair(
        _along(real, axis, cosine) - _along(imaginary, axis, sine),
        _along(real, axis, sine) + _along(imaginary, axis, cosine),
    )


def _backward_real(value: Pair, axis: int, size: Any, norm: str) -> torch.Tensor:
    size = 2 * (value.real.shape[axis] - 1) if size is None else size
    bins = size // 2 + 1
    real, imaginary = _resized(value.real, axis, bins), _resized(value.imaginary, axis, bins)
    cosine, sine = _matrix(size, bins, size, real)  # [size, bins]
    index = torch.arange(bins)
    # Each bin but the first, and the last of an even size, stands for two.
    single = (index == 0) | (index * 2 == size)
    weight = torch.where(single, 1.0, 2.0).to(real.dtype) * _scale(norm, True, size, real)
    return _along(real, axis, cosine * weight) - _along(imaginary, axis, sine * weight)


def _transform(value: Any, axes: Sequence[int], sizes: Sequence[Any], norm: str | None, kind: str) -> Any:
    """kind: "c2c", "inverse" (c2c), "r2c" or "c2r"; the last axis is the real one."""
    norm = norm or "backward"
    if kind == "r2c":
        value = _forward_real(value, axes[-1], sizes[-1], norm)
        axes, sizes = axes[:-1], sizes[:-1]
    if kind in ("c2c", "inverse"):
        value = _pair(value)
    last = kind == "c2r"
    for axis, size in zip(axes[:-1] if last else axes, sizes[:-1] if last else sizes, strict=True):
        value = _complex(value, axis, size, norm, inverse=kind in ("inverse", "c2r"))
    return _backward_real(_pair(value), axes[-1], sizes[-1], norm) if last else value


def _one(kind: str) -> Callable[..., Any]:
    def call(value: Any, n: Any = None, dim: int = -1, norm: str | None = None) -> Any:
        return _transform(value, [dim], [n], norm, kind)

    return call


def _many(kind: str, default: tuple[int, ...] | None) -> Callable[..., Any]:
    def call(value: Any, s: Any = None, dim: Any = default, norm: str | None = None) -> Any:
        rank = value.ndim
        if dim is None:
            dim = list(range(rank)) if s is None else list(range(rank - len(s), rank))
        return _transform(value, list(dim), [None] * len(dim) if s is None else list(s), norm, kind)

    return call


_NORMS = {0: "backward", 1: "ortho", 2: "forward"}


def _core_c2c(value: Any, dim: Sequence[int], normalization: int, forward: bool) -> Any:
    # "No scaling" is 0 whichever way: the inverse's division by the size is asked for as 2.
    return _core(value, dim, [None] * len(dim), normalization, inverse=not forward)


def _core(value: Any, dim: Sequence[int], sizes: Sequence[Any], normalization: int, *, inverse: bool) -> Any:
    norm = _NORMS[normalization]
    if inverse:
        norm = {"backward": "forward", "forward": "backward"}.get(norm, norm)
    return _transform(value, list(dim), sizes, norm, "inverse" if inverse else "c2c")


def _core_r2c(value: Any, dim: Sequence[int], normalization: int, onesided: bool) -> Any:
    if not onesided:
        return _core(value, dim, [None] * len(dim), normalization, inverse=False)
    return _transform(value, list(dim), [None] * len(dim), _NORMS[normalization], "r2c")


def _core_c2r(value: Any, dim: Sequence[int], normalization: int, last: Any) -> Any:
    norm = {"backward": "forward", "forward": "backward"}.get(_NORMS[normalization], "ortho")
    return _transform(value, list(dim), [*[None] * (len(dim) - 1), last], norm, "c2r")


#: Operators that only move numbers, or are linear with real coefficients.
_MOVING = (
    "view", "reshape", "_unsafe_view", "permute", "transpose", "t", "numpy_T", "mT", "slice", "select", "narrow",
    "cat", "stack", "unsqueeze", "squeeze", "expand", "expand_as", "repeat", "flatten", "unflatten", "clone",
    "contiguous", "roll", "flip", "sum", "mean", "index", "index_select", "gather", "split", "split_with_sizes",
    "chunk", "tensor_split", "unbind", "pad", "constant_pad_nd", "movedim", "moveaxis", "swapaxes", "detach", "alias",
    "fft_fftshift", "fft_ifftshift", "cumsum", "diag_embed", "diagonal", "tril", "triu", "lift_fresh_copy",
    "repeat_interleave", "concat", "hstack", "vstack", "select_copy", "slice_copy", "view_copy", "broadcast_to", "tile",
    "masked_fill", "index_put",
)  # fmt: skip

RULES: dict[str, Callable[..., Any]] = {
    "complex": Pair,
    "polar": lambda size, angle: Pair(size * torch.cos(angle), size * torch.sin(angle)),
    "view_as_complex": lambda x: Pair(x[..., 0], x[..., 1]),
    "view_as_real": lambda x: torch.stack((x.real, x.imaginary), -1),
    "real": lambda x: x.real,
    "imag": lambda x: x.imaginary,
    "conj": lambda x: Pair(x.real, -x.imaginary),
    "_conj": lambda x: Pair(x.real, -x.imaginary),
    "conj_physical": lambda x: Pair(x.real, -x.imaginary),
    "resolve_conj": lambda x: x,
    "resolve_neg": lambda x: x,
    "adjoint": lambda x: Pair(x.real.mT, -x.imaginary.mT),
    "mul": _multiply,
    "add": _add,
    "sub": _subtract,
    "rsub": lambda a, b, alpha=1: _subtract(b, a, alpha),
    "neg": _negate,
    "div": _divide,
    "true_divide": _divide,
    "reciprocal": _reciprocal,
    "abs": _absolute,
    "angle": lambda x: torch.atan2(x.imaginary, x.real),
    "exp": _exponential,
    "log": lambda x: Pair(torch.log(_absolute(x)), torch.atan2(x.imaginary, x.real)),
    "pow": _power,
    "square": lambda x: _multiply(x, x),
    "sgn": _sign,
    "where": _where,
    "copy": lambda target, value, non_blocking=False: _pair(value),
    "fill": lambda target, value: _pair(value),
    "zero": lambda target: Pair(torch.zeros_like(target.real), torch.zeros_like(target.real)),
    "matmul": lambda a, b: _bilinear(torch.matmul, a, b),
    "mm": lambda a, b: _bilinear(torch.matmul, a, b),
    "bmm": lambda a, b: _bilinear(torch.matmul, a, b),
    "einsum": _einsum,
    "linear": _linear,
    "linalg_vector_norm": _sum_of_squares,
    "to": _to,
    "_to_copy": _to,
    "zeros": _filled(torch.zeros),
    "zeros_like": _filled(torch.zeros_like),
    "ones": _filled(torch.zeros, 1),
    "ones_like": _filled(torch.zeros_like, 1),
    "full": _filled(torch.zeros, None),
    "full_like": _filled(torch.zeros_like, None),
    "getitem": lambda values, index: values[index],
    "sym_size": lambda x, dim: x.real.shape[dim],
    "fft_fft": _one("c2c"),
    "fft_ifft": _one("inverse"),
    "fft_rfft": _one("r2c"),
    "fft_irfft": _one("c2r"),
    "fft_fft2": _many("c2c", (-2, -1)),
    "fft_ifft2": _many("inverse", (-2, -1)),
    "fft_rfft2": _many("r2c", (-2, -1)),
    "fft_irfft2": _many("c2r", (-2, -1)),
    "fft_fftn": _many("c2c", None),
    "fft_ifftn": _many("inverse", None),
    "fft_rfftn": _many("r2c", None),
    "fft_irfftn": _many("c2r", None),
    "_fft_c2c": _core_c2c,
    "_fft_r2c": _core_r2c,
    "_fft_c2r": _core_c2r,
}
for _operator in _MOVING:
    RULES[_operator] = _both(getattr(aten, _operator))
