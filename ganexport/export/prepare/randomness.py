"""Random numbers drawn inside forward: refused, made inputs, or made constant; never silently random.

A stock exporter writes RandomNormal nodes, and two runs of one file differ. Dropout that is left on
in evaluation (``F.dropout`` defaults to training) is random too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch.overrides import TorchFunctionMode

from ganexport.errors import ExportError
from ganexport.export.prepare._location import caller

MODES = ("error", "input", "constant")

_NORMAL = {
    torch.randn: "randn",
    torch.randn_like: "randn_like",
    torch.Tensor.normal_: "normal_",
    torch.normal: "normal",
}
_UNIFORM = {torch.rand: "rand", torch.rand_like: "rand_like", torch.Tensor.uniform_: "uniform_"}
_EXPONENTIAL = {torch.Tensor.exponential_: "exponential_"}
_BERNOULLI = {torch.bernoulli: "bernoulli", torch.Tensor.bernoulli: "bernoulli"}
_DROPOUT = {
    F.dropout: "dropout",
    torch.dropout: "dropout",
    F.dropout1d: "dropout1d",
    F.dropout2d: "dropout2d",
    F.dropout3d: "dropout3d",
    torch.feature_dropout: "feature_dropout",
}
#: Random calls that no input or constant can stand for in a general way.
_OTHER = {
    torch.randint: "randint",
    torch.randint_like: "randint_like",
    torch.randperm: "randperm",
    torch.multinomial: "multinomial",
    torch.Tensor.multinomial: "multinomial",
    torch.poisson: "poisson",
    torch.Tensor.random_: "random_",
    torch.Tensor.bernoulli_: "bernoulli_",
    torch.Tensor.geometric_: "geometric_",
    torch.Tensor.log_normal_: "log_normal_",
    torch.Tensor.cauchy_: "cauchy_",
    torch.alpha_dropout: "alpha_dropout",
    F.alpha_dropout: "alpha_dropout",
    F.feature_alpha_dropout: "feature_alpha_dropout",
    torch.binomial: "binomial",
    torch._standard_gamma: "gamma sampling",
    torch._sample_dirichlet: "dirichlet sampling",
}


class Draw(msgspec.Struct, frozen=True):
    """One random call: what it drew, how large, and where."""

    kind: str  # "normal" or "uniform": the base distribution that stands for it
    function: str
    shape: tuple[int, ...]
    where: str


class _Call(msgspec.Struct):
    kind: str
    function: str
    shape: tuple[Any, ...]
    like: Any
    finish: Callable[[Any], Any]


class Randomness(TorchFunctionMode):
    """Answers random calls inside ``forward``.

    Args:
        supply: Called with the number of the call and its shape, gives the base noise (N(0, 1) for
            kind "normal", U[0, 1) for "uniform"); None lets the call draw and only records it.
    """

    def __init__(self, supply: Callable[[int, tuple[Any, ...]], Any] | None = None) -> None:
        super().__init__()
        self.supply = supply
        self.draws: list[Draw] = []
        self._inside = False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Called by torch for every function."""
        kwargs = kwargs or {}
        call = None if self._inside else _recognise(func, args, kwargs)
        if call is None:
            return func(*args, **kwargs)
        number = len(self.draws)
        self.draws.append(Draw(call.kind, call.function, tuple(call.shape), caller()))
        self._inside = True
        try:
            if self.supply is None or call.kind == "other":
                return func(*args, **kwargs)
            return call.finish(self.supply(number, call.shape))
        finally:
            self._inside = False


def _recognise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    try:
        if func in _DROPOUT:
            return _dropout(_DROPOUT[func], args, kwargs)
        for table, kind in ((_NORMAL, "normal"), (_UNIFORM, "uniform"), (_EXPONENTIAL, "uniform")):
            if func in table:
                return _draw(table[func], kind, args, kwargs)
        if func in _BERNOULLI:
            share = args[0]
            return _Call("uniform", "bernoulli", tuple(share.shape), share, lambda u: (u < share).to(share.dtype))
        if func is F.gumbel_softmax:
            return _gumbel(*args, **kwargs)
        if func in (F.rrelu, torch.rrelu):
            return _slopes(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            share = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
            return _Call("other", "scaled_dot_product_attention's dropout_p", (), None, _same) if share else None
        if func in _OTHER:
            return _Call("other", _OTHER[func], (), None, _same)
    except TypeError:  # an unhashable callable is none of ours
        return None
    return None


def _draw(name: str, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    if name in ("randn", "rand"):
        shape = kwargs.get("size", args[0] if args and not _is_size(args[0]) else args)
        return _Call(kind, name, tuple(shape), None, lambda noise: _cast(noise, kwargs))
    if name in ("randn_like", "rand_like"):
        like = args[0] if args else kwargs["input"]
        return _Call(kind, name, tuple(like.shape), like, lambda noise: noise.to(kwargs.get("dtype") or like.dtype))
    if name == "normal":
        return _normal(args, kwargs)
    target = args[0]
    first, second = [*args[1:3], None, None][:2]
    if name == "normal_":
        mean = kwargs.get("mean", 0.0 if first is None else first)
        std = kwargs.get("std", 1.0 if second is None else second)
        return _Call(kind, name, tuple(target.shape), target, lambda n: target.copy_(n * std + mean))
    if name == "uniform_":
        low = kwargs.get("from", 0.0 if first is None else first)
        high = kwargs.get("to", 1.0 if second is None else second)
        return _Call(kind, name, tuple(target.shape), target, lambda n: target.copy_(n * (high - low) + low))
    rate = kwargs.get("lambd", 1.0 if first is None else first)
    return _Call(kind, name, tuple(target.shape), target, lambda n: target.copy_(-torch.log1p(-n) / rate))


def _same(noise: Any) -> Any:
    return noise


def _gumbel(logits: Any, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1) -> _Call:
    """Gumbel softmax (Jang et al. 2017, arXiv 1611.01144) of U[0, 1): -log of an exponential draw is Gumbel's."""

    def finish(uniform: Any) -> Any:
        exponential = -torch.log1p(-uniform.clamp(min=2.0**-25))
        soft = ((logits - exponential.log()) / tau).softmax(dim)
        if not hard:
            return soft
        return torch.zeros_like(soft).scatter(dim, soft.argmax(dim, keepdim=True), 1.0)

    return _Call("uniform", "gumbel_softmax", tuple(logits.shape), logits, finish)


def _slopes(
    value: Any,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> _Call | None:
    """RReLU that is left in training: a slope in [lower, upper) for each element below zero."""
    if not training:
        return None
    return _Call(
        "uniform", "rrelu", tuple(value.shape), value,
        lambda uniform: torch.where(value < 0, value * (lower + uniform * (upper - lower)), value),
    )  # fmt: skip


def _normal(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    mean = args[0] if args else kwargs["mean"]
    std = args[1] if len(args) > 1 else kwargs.get("std", 1.0)
    like = next((value for value in (mean, std) if isinstance(value, torch.Tensor)), None)
    shape = tuple(like.shape) if like is not None else tuple(kwargs.get("size") or args[2])
    return _Call("normal", "normal", shape, like, lambda noise: noise * std + mean)


def _dropout(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    value = args[0] if args else kwargs["input"]
    share = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("train", kwargs.get("training", args[2] if len(args) > 2 else True))
    if not training or share == 0.0:
        return None
    shape = tuple(value.shape)
    if name not in ("dropout",):  # whole channels at once
        shape = (*shape[:2], *(1 for _ in shape[2:]))
    if share >= 1.0:
        return _Call("uniform", name, shape, value, lambda noise: value * 0.0)
    return _Call("uniform", name, shape, value, lambda u: value * (u >= share).to(value.dtype) / (1.0 - share))


def _is_size(value: Any) -> bool:
    return isinstance(value, int | torch.SymInt) or (isinstance(value, torch.Tensor) and value.ndim == 0)


def _cast(noise: Any, kwargs: dict[str, Any]) -> Any:
    return noise.to(kwargs["dtype"]) if kwargs.get("dtype") is not None else noise


def refuse(draws: list[Draw], mode: str) -> None:
    """Refuse what ``mode`` cannot make deterministic.

    Raises:
        ExportError: Naming function, file and line, and the options that settle it.
    """
    hopeless = [draw for draw in draws if draw.kind == "other"]
    if hopeless:
        draw = hopeless[0]
        remedy = "set it to 0 in evaluation" if "dropout" in draw.function else "make it an argument of forward"
        raise ExportError(
            f"{draw.where}: {draw.function} draws random numbers inside forward that no input can stand for: {remedy}"
        )
    if draws and mode == "error":
        draw = draws[0]
        more = f" (and {len(draws) - 1} more)" if len(draws) > 1 else ""
        what = "is left on and drops at random" if "dropout" in draw.function else "draws fresh random numbers"
        raise ExportError(
            f"{draw.where}: {draw.function} {what} inside forward{more}, so two runs of the file would differ: "
            "choose --noise input (noise becomes inputs) or --noise constant (noise is fixed), or remove it"
        )
