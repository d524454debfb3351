"""A 2-d convolution whose double backward consists of convolutions as large as the forward's.

A penalty's gradient with respect to a convolution's weights is, for the part that goes through the input gradient
dx = conv_backward(dy, w), once more a weight gradient: that of a convolution with the penalty's gradient of dx in the
place of x. torch's own formula (``_convolution_double_backward``) computes it as a convolution with batch and channels
exchanged instead, and a grouped one group by group: the backward of R3GAN's critic step for 64 pixels became 1,381
convolutions and 2,640 slices, 4,574 nodes where 570 do, and compiling it had not ended after 400 seconds. Known from
StyleGAN2-ADA's conv2d_gradfix, which is for eager CUDA only; here the operators can be captured by
``torch.compile`` and are differentiable under ``torch.func.grad``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function  # type: ignore[attr-defined]
from torch.autograd.function import _SingleLevelFunction
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from ganexport.objectives.regularizers._replacing import Replacing

_aten = torch.ops.aten
_SETTINGS = "int[] stride, int[] padding, int[] dilation, int groups"

torch.library.define("ganexport::convolution", f"(Tensor x, Tensor weight, Tensor? bias, {_SETTINGS}) -> Tensor")
torch.library.define(
    "ganexport::convolution_input_gradient", f"(Tensor upstream, Tensor x, Tensor weight, {_SETTINGS}) -> Tensor"
)
torch.library.define(
    "ganexport::convolution_weight_gradient", f"(Tensor upstream, Tensor x, Tensor weight, {_SETTINGS}) -> Tensor"
)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return cast(Tensor, _aten.convolution(x, weight, bias, stride, padding, dilation, False, [0, 0], groups))


def _gradient(
    upstream: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    wanted: int,
) -> Tensor:
    """With respect to x (0) or the weight (1)."""
    settings = (stride, padding, dilation, False, [0, 0], groups)
    mask = [wanted == 0, wanted == 1, False]
    return cast(Tensor, _aten.convolution_backward(upstream, x, weight, None, *settings, mask)[wanted])


#: Operators and what they are made of; a compiler replaces them by it.
PLAIN: dict[Any, Callable[..., Tensor]] = {
    torch.ops.ganexport.convolution.default: _convolution,
    torch.ops.ganexport.convolution_input_gradient.default: functools.partial(_gradient, wanted=0),
    torch.ops.ganexport.convolution_weight_gradient.default: functools.partial(_gradient, wanted=1),
}
for _operator, _function in PLAIN.items():
    torch.library.impl(_operator._schema.name, "CompositeExplicitAutograd")(_function)
    torch.library.register_fake(_operator._schema.name)(_function)


def teach_compiler() -> None:
    """Let torch's compiler see the convolutions that the operators are made of, and choose their layouts."""
    from torch._inductor.decomposition import decompositions

    decompositions.update(PLAIN)


def _below_autograd(operator: Any, *arguments: Any) -> Tensor:
    # Gradients stay enabled for the levels of torch.func further out; autograd.Function has switched them off.
    with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
        return cast(Tensor, operator(*arguments))


class _Convolution(_SingleLevelFunction):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        return _below_autograd(torch.ops.ganexport.convolution, x, weight, bias, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, *ctx.settings = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.ganexport.convolution_input_gradient(upstream, x, weight, *ctx.settings)
        if ctx.needs_input_grad[1]:
            dw = torch.ops.ganexport.convolution_weight_gradient(upstream, x, weight, *ctx.settings)
        if ctx.needs_input_grad[2]:
            db = upstream.sum((0, 2, 3))
        return dx, dw, db, None, None, None, None


class _InputGradient(_SingleLevelFunction):
    @staticmethod
    def forward(upstream: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> Tensor:
        return _below_autograd(torch.ops.ganexport.convolution_input_gradient, upstream, x, weight, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        upstream, _, weight, *ctx.settings = inputs
        ctx.save_for_backward(upstream, weight)

    @staticmethod
    def backward(ctx: Any, second: Tensor) -> Any:
        """``second`` is the gradient with respect to dx [N, C, H, W]; dx does not depend on x."""
        upstream, weight = ctx.saved_tensors
        d_upstream = dw = None
        if ctx.needs_input_grad[0]:
            d_upstream = torch.ops.ganexport.convolution(second, weight, None, *ctx.settings)
        if ctx.needs_input_grad[2]:
            dw = torch.ops.ganexport.convolution_weight_gradient(upstream, second, weight, *ctx.settings)
        return d_upstream, None, dw, None, None, None, None


def _apply(function: Any, *arguments: Any) -> Tensor:
    with enable_single_level_autograd_function():
        return cast(Tensor, function.apply(*arguments))


@torch.library.impl("ganexport::convolution", "Autograd")
def _convolution_autograd(*arguments: Any) -> Tensor:
    return _apply(_Convolution, *arguments)


@torch.library.impl("ganexport::convolution_input_gradient", "Autograd")
def _input_gradient_autograd(*arguments: Any) -> Tensor:
    return _apply(_InputGradient, *arguments)


class GroupedConvolutions(Replacing):
    """Inside, grouped 2-d convolutions are :func:`conv2d` on CUDA and where a compiler captures them.

    Elsewhere torch's own stay: on a CPU, eager, the two take the same time.
    """

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Replace the convolution, pass everything else on."""
        if func is F.conv2d and (named.get("groups", 1) > 1 or (len(args) > 6 and args[6] > 1)):
            tensor = args[0] if args else named["input"]
            if tensor.device.type == "cuda" or torch.compiler.is_compiling():
                return conv2d(*args, **named)
        return super().call(func, args, named)


def conv2d(
    input: Tensor,  # noqa: A002 - torch's name
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv2d``, differentiable twice with respect to the input, once to the weights.

    Args:
        input: [N, C, H, W].
        weight: [O, C / groups, kH, kW].
        bias: [O].
        stride, padding, dilation, groups: As torch's; a padding in words is left to torch.
    """
    x = input
    if isinstance(padding, str) or x.ndim != 4:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)  # type: ignore[arg-type]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    pairs = [[value, value] if isinstance(value, int) else list(value) for value in (stride, padding, dilation)]
    return cast(Tensor, torch.ops.ganexport.convolution(x, weight, bias, *pairs, groups))
