"""What a generator takes and gives: named inputs, outputs and the range of every free dimension.

One :class:`Dim` is the single source for the ONNX dynamic shape, the TensorRT optimisation
profile, the batches of a benchmark and the validation of a command line.
"""

from __future__ import annotations

import ast
import math
import re
from typing import Annotated, Any, SupportsIndex

import msgspec

from ganexport.errors import UsageError

BATCH = "batch"

DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "int8", "bool")

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*\Z")
_NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?)"


class Normal(msgspec.Struct, frozen=True, tag="normal"):
    """Independent Gaussian elements, the latent z of nearly every GAN."""

    mean: float = 0.0
    std: float = 1.0


class Uniform(msgspec.Struct, frozen=True, tag="uniform"):
    """Independent elements, uniform in [low, high)."""

    low: float = 0.0
    high: float = 1.0


class Label(msgspec.Struct, frozen=True, tag="label"):
    """Class indices in [0, classes), uniform."""

    classes: int


class OneHot(msgspec.Struct, frozen=True, tag="onehot"):
    """A one-hot row over the last dimension, the class uniform."""

    classes: int


class Constant(msgspec.Struct, frozen=True, tag="constant"):
    """The same value everywhere (a truncation, a noise strength)."""

    value: float


Sampler = Normal | Uniform | Label | OneHot | Constant


class Dim(msgspec.Struct, frozen=True):
    """A symbolic dimension: its name and the sizes it may take.

    Attributes:
        name: Symbol used in shapes ("batch", "height", "frames").
        min: Smallest size.
        opt: Size to optimise for.
        max: Largest size.
        step: Sizes are multiples of this (a generator with four poolings takes multiples of 16).
    """

    name: str
    min: int = 1
    opt: int = 8
    max: int = 64
    step: int = 1

    def __post_init__(self) -> None:
        where = f"dimension {self.name!r}"
        if not _NAME.match(self.name):
            raise UsageError(f"{where}: a name is letters, digits and underscores, e.g. height")
        if not 1 <= self.min <= self.opt <= self.max:
            raise UsageError(f"{where}: needs 1 <= min <= opt <= max, got {self.min}:{self.opt}:{self.max}")
        if self.step < 1 or any(size % self.step for size in (self.min, self.opt, self.max)):
            raise UsageError(
                f"{where}: min, opt and max must be multiples of the step {self.step}, "
                f"got {self.min}:{self.opt}:{self.max}"
            )

    @property
    def static(self) -> bool:
        """Whether only one size is allowed."""
        return self.min == self.max

    def check(self, size: int) -> None:
        """Refuse a size outside [min, max] or off the step.

        Raises:
            UsageError: Naming the dimension, the size and what is allowed.
        """
        if isinstance(size, bool) or not isinstance(size, SupportsIndex):
            raise UsageError(f"dimension {self.name!r} is {size!r}, which is not a whole number")
        if not self.min <= size <= self.max or size % self.step:
            step = f" in multiples of {self.step}" if self.step > 1 else ""
            raise UsageError(f"dimension {self.name!r} is {size}, allowed are {self.min} to {self.max}{step}")

    def sizes(self, unseen: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Sizes worth checking: min, opt, max and odd sizes between, without those in ``unseen``."""
        middle = [
            self.min + ((self.max - self.min) * numerator // 7) // self.step * self.step for numerator in (1, 3, 5)
        ]
        wanted = sorted({self.min, self.opt, self.max, *middle, min(self.min + self.step, self.max)})
        return tuple(size for size in wanted if size not in unseen)


class TensorSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """One named input or output.

    Attributes:
        name: As the engine calls it.
        dtype: One of :data:`DTYPES`.
        shape: Sizes, or names of :class:`Dim` for symbolic ones.
        sampler: How to draw it (inputs only; None for outputs and for inputs the user must feed).
        range: (low, high) of meaningful values: (-1, 1) for tanh images, (0, 255) for uint8.
        layout: "NCHW", "NHWC" for images, "NCT" for audio, None when it has no such meaning.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    sampler: Sampler | None = None
    range: tuple[float, float] | None = None
    layout: str | None = None

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise UsageError(f"tensor name {self.name!r}: use letters, digits, dots and underscores")
        if self.dtype not in DTYPES:
            raise UsageError(f"tensor {self.name!r}: dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        for size in self.shape:
            if isinstance(size, int) and size < 0:
                raise UsageError(f"tensor {self.name!r}: size {size} in its shape is negative")
        if self.layout is not None and len(self.layout) != len(self.shape):
            raise UsageError(
                f"tensor {self.name!r}: layout {self.layout!r} has {len(self.layout)} letters "
                f"for {len(self.shape)} dimensions"
            )
        if self.range is not None and not self.range[0] < self.range[1]:
            raise UsageError(f"tensor {self.name!r}: range {list(self.range)} must be [low, high] with low < high")

    def resolve(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """The concrete shape at these sizes of the symbolic dimensions.

        Raises:
            UsageError: A symbolic dimension has no size.
        """
        try:
            return tuple(size if isinstance(size, int) else sizes[size] for size in self.shape)
        except KeyError as missing:
            raise UsageError(f"tensor {self.name!r}: no size given for dimension {missing.args[0]!r}") from None

    @property
    def is_image(self) -> bool:
        """Whether it is a batch of pictures with 1, 3 or 4 channels."""
        if self.layout not in ("NCHW", "NHWC") or len(self.shape) != 4:
            return False
        return self.shape[self.layout.index("C")] in (1, 3, 4)


class GeneratorSpec(msgspec.Struct, frozen=True):
    """Inputs, outputs and symbolic dimensions of one generator.

    Attributes:
        inputs: In the order in which the module takes them.
        outputs: In the order in which it returns them.
        dims: Every symbolic dimension used in a shape.
        name: For people; no meaning to the program.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: tuple[Dim, ...] = ()
    name: str = "generator"

    def __post_init__(self) -> None:
        names = [tensor.name for tensor in (*self.inputs, *self.outputs)]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise UsageError(f"tensor names must differ, repeated: {', '.join(repeated)}")
        dims = [dim.name for dim in self.dims]
        if len(set(dims)) != len(dims):
            raise UsageError("dimension names must differ")
        for tensor in self.inputs:
            for size in tensor.shape:
                if isinstance(size, str) and size not in dims:
                    raise UsageError(
                        f"input {tensor.name!r}: dimension {size!r} is not declared; add --dim {size}=min:opt:max"
                    )

    def dim(self, name: str) -> Dim:
        """The dimension of that name.

        Raises:
            UsageError: There is none.
        """
        for dim in self.dims:
            if dim.name == name:
                return dim
        known = ", ".join(d.name for d in self.dims) or "none"
        raise UsageError(f"no dimension {name!r}; this generator has: {known}")

    def input(self, name: str) -> TensorSpec:
        """The input of that name.

        Raises:
            UsageError: There is none.
        """
        for tensor in self.inputs:
            if tensor.name == name:
                return tensor
        raise UsageError(f"no input {name!r}; this generator has: {', '.join(t.name for t in self.inputs)}")

    @property
    def batch(self) -> Dim | None:
        """The dimension over which samples are counted, None when every shape is fixed."""
        return next((dim for dim in self.dims if dim.name == BATCH), None)

    @property
    def image_output(self) -> TensorSpec | None:
        """The output to look at: the only image among the outputs, else the first; None without one."""
        images = [tensor for tensor in self.outputs if tensor.is_image]
        return images[0] if images else None

    def sizes(self, **overrides: int) -> dict[str, int]:
        """Sizes of all dimensions: the optimum, unless overridden and allowed."""
        unknown = set(overrides) - {dim.name for dim in self.dims}
        if unknown:
            self.dim(sorted(unknown)[0])
        for name, size in overrides.items():
            self.dim(name).check(size)
        return {dim.name: overrides.get(dim.name, dim.opt) for dim in self.dims}

    def infer_sizes(self, feeds: dict[str, Any]) -> dict[str, int]:
        """Read the sizes of the symbolic dimensions off the arrays, checking every shape.

        Args:
            feeds: Array (anything with ``shape``) for every input name.

        Returns:
            Size of each symbolic dimension.

        Raises:
            UsageError: A missing or unknown input, a wrong rank or size, or two inputs that disagree.
        """
        expected = {tensor.name for tensor in self.inputs}
        for name in feeds:
            if name not in expected:
                self.input(name)
        missing = sorted(expected - set(feeds))
        if missing:
            raise UsageError(
                f"missing input {', '.join(missing)}; this generator needs {', '.join(t.name for t in self.inputs)}"
            )
        sizes: dict[str, int] = {}
        for tensor in self.inputs:
            shape = tuple(feeds[tensor.name].shape)
            self._match_shape(tensor, shape, sizes)
        for name, size in sizes.items():
            self.dim(name).check(size)
        return sizes

    @staticmethod
    def _match_shape(tensor: TensorSpec, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
        wanted = "[" + ", ".join(map(str, tensor.shape)) + "]"
        if len(shape) != len(tensor.shape):
            raise UsageError(f"input {tensor.name!r} has shape {list(shape)}, wanted {wanted}")
        for size, symbol in zip(shape, tensor.shape, strict=True):
            if isinstance(symbol, str):
                if sizes.setdefault(symbol, size) != size:
                    raise UsageError(
                        f"input {tensor.name!r} has {symbol}={size}, another input has {symbol}={sizes[symbol]}"
                    )
            elif symbol != size:
                raise UsageError(f"input {tensor.name!r} has shape {list(shape)}, wanted {wanted}")


Spec = Annotated[GeneratorSpec, "the spec of one generator"]


def parse_number(text: str, where: str) -> float:
    """A finite number, or a UsageError that names where it stands."""
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"{where}: {text!r} is not a number") from None
    if not math.isfinite(value):
        raise UsageError(f"{where}: {text!r} is not finite")
    return value


def parse_dim(text: str) -> Dim:
    """Parse ``name=min:opt:max[/step]`` or ``name=size`` (a single allowed size).

    >>> parse_dim("height=64:256:1024/8")
    Dim(name='height', min=64, opt=256, max=1024, step=8)

    Raises:
        UsageError: Not of that form, or sizes out of order.
    """
    match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*=\s*(\d+)(?::(\d+):(\d+))?(?:/(\d+))?\s*", text)
    if not match:
        raise UsageError(f"dimension {text!r}: write name=min:opt:max, e.g. height=64:256:1024/8")
    name, low, opt, high, step = match.groups()
    if any(len(number) > 9 for number in (low, opt, high, step) if number):
        raise UsageError(f"dimension {text!r}: sizes must be below 10^9")
    return Dim(name, int(low), int(opt or low), int(high or low), int(step or 1))


def parse_input(text: str) -> TensorSpec:
    """Parse ``name=sampler[shape]`` with an optional ``:dtype``.

    Samplers: ``normal``, ``normal(mean,std)``, ``uniform(low,high)``, ``label(classes)``,
    ``onehot(classes)``, ``constant(value)``, ``data`` (the user feeds it, never sampled).

    >>> parse_input("z=normal[batch,512]").shape
    ('batch', 512)

    Raises:
        UsageError: Not of that form; the message shows the form and what was wrong.
    """
    match = re.fullmatch(
        r"\s*([A-Za-z_][\w.]*)\s*=\s*([a-z]+)\s*(?:\(([^()]*)\))?\s*\[([^\[\]]*)\]\s*(?::\s*(\w+))?\s*", text
    )
    if not match:
        raise UsageError(f"input {text!r}: write name=sampler[shape], e.g. z=normal[batch,512]")
    name, kind, arguments, shape_text, dtype = match.groups()
    where = f"input {name!r}"
    numbers = [parse_number(a.strip(), where) for a in arguments.split(",")] if arguments else []
    sampler = _make_sampler(kind, numbers, where)
    shape = tuple(_parse_size(part.strip(), where) for part in shape_text.split(",")) if shape_text.strip() else ()
    default = "int64" if isinstance(sampler, Label) else "float32"
    if isinstance(sampler, OneHot) and (not shape or shape[-1] != sampler.classes):
        raise UsageError(f"{where}: onehot({sampler.classes}) needs {sampler.classes} as its last size")
    return TensorSpec(name, dtype or default, shape, sampler)


def _parse_size(text: str, where: str) -> int | str:
    if text.isascii() and text.isdigit() and len(text) <= 9:
        return int(text)
    if _NAME.match(text) and "." not in text:
        return text
    raise UsageError(f"{where}: {text!r} in its shape is neither a size nor a dimension's name")


def _make_sampler(kind: str, numbers: list[float], where: str) -> Sampler | None:
    counts = {"normal": (0, 2), "uniform": (0, 2), "label": (1,), "onehot": (1,), "constant": (1,), "data": (0,)}
    if kind not in counts:
        raise UsageError(f"{where}: unknown sampler {kind!r}; known: {', '.join(counts)}")
    if len(numbers) not in counts[kind]:
        raise UsageError(f"{where}: {kind} takes {' or '.join(map(str, counts[kind]))} numbers, got {len(numbers)}")
    if kind == "normal":
        mean, std = numbers or (0.0, 1.0)
        if std <= 0:
            raise UsageError(f"{where}: the standard deviation must be positive, got {std}")
        return Normal(mean, std)
    if kind == "uniform":
        low, high = numbers or (0.0, 1.0)
        if not low < high:
            raise UsageError(f"{where}: uniform(low,high) needs low < high, got {low},{high}")
        return Uniform(low, high)
    if kind == "constant":
        return Constant(numbers[0])
    if kind == "data":
        return None
    if numbers[0] != int(numbers[0]) or not 1 <= numbers[0] < 2**31:
        raise UsageError(f"{where}: {kind}(classes) needs a whole number from 1 to 2^31-1, got {numbers[0]}")
    return Label(int(numbers[0])) if kind == "label" else OneHot(int(numbers[0]))


_LAYOUT_LETTERS = frozenset("NCDHWTL")


def parse_output(text: str) -> tuple[str, tuple[float, float], str | None]:
    """Parse ``name=[low,high]:LAYOUT`` (the layout may be left out).

    >>> parse_output("image=[-1,1]:NCHW")
    ('image', (-1.0, 1.0), 'NCHW')

    Raises:
        UsageError: Not of that form.
    """
    match = re.fullmatch(
        rf"\s*([A-Za-z_][\w.]*)\s*=\s*\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]\s*(?::\s*([A-Z]+))?\s*", text
    )
    if not match:
        raise UsageError(f"output {text!r}: write name=[low,high]:LAYOUT, e.g. image=[-1,1]:NCHW")
    name, low, high, layout = match.groups()
    if layout and (len(set(layout)) != len(layout) or not set(layout) <= _LAYOUT_LETTERS):
        raise UsageError(
            f"output {name!r}: layout {layout}: letters, each once, of N (samples), C (channels), D, H, W, T (time), "
            "L (length); pictures are NCHW or NHWC"
        )
    return name, (float(low), float(high)), layout


def check_layout(tensor: TensorSpec) -> TensorSpec:
    """The tensor, unless its shape says that a picture's channels are where its layout has none.

    Raises:
        UsageError: Declared NHWC and channels first, or the other way round.
    """
    if tensor.layout in ("NCHW", "NHWC") and len(tensor.shape) == 4 and not tensor.is_image:
        other = "NHWC" if tensor.layout == "NCHW" else "NCHW"
        if msgspec.structs.replace(tensor, layout=other).is_image:
            raise UsageError(
                f"output {tensor.name!r} has shape {list(tensor.shape)}, its layout {tensor.layout} would give it "
                f"{tensor.shape[tensor.layout.index('C')]} channels: declare {other}"
            )
    return tensor


def parse_call(text: str) -> dict[str, Any]:
    """Parse keyword arguments with literal values, ``noise_mode='const', scale=2``; nothing is evaluated.

    Raises:
        UsageError: Not keyword=literal pairs.
    """
    try:
        node = ast.parse(f"f({text})", mode="eval").body
        if (
            not isinstance(node, ast.Call)
            or not isinstance(node.func, ast.Name)
            or node.args
            or any(k.arg is None for k in node.keywords)
        ):
            raise ValueError
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UsageError(f"call {text!r}: write name=literal pairs, e.g. noise_mode='const', scale=2") from None


def spec_to_json(spec: GeneratorSpec) -> str:
    """The spec as one line of JSON (the form stored in ONNX metadata)."""
    return msgspec.json.encode(spec).decode()


def spec_from_json(text: str | bytes) -> GeneratorSpec:
    """Read a spec written by :func:`spec_to_json`.

    Raises:
        UsageError: Not a valid spec; the message says where.
    """
    try:
        return msgspec.json.decode(text, type=GeneratorSpec)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"generator spec: {error}") from None
