"""LSTM, GRU and RNN layers over a free length: an operator of their own while the graph is captured.

torch unrolls a recurrent layer over the length of its example while it captures, which fixes the length.
Hidden behind an operator whose shapes are symbolic they stay whole, and become ONNX's LSTM, GRU and RNN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ganexport.export.prepare._rewriting import Rewriting


@torch.library.custom_op("ganexport::lstm", mutates_args=())
def lstm(
    value: Tensor, hidden: Tensor, cell: Tensor, weights: Sequence[Tensor], biased: bool, layers: int,
    both_ways: bool, batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``torch.lstm`` without dropout: [length, batch, features] to (outputs, last hidden, last cell)."""
    states = (hidden, cell)
    outputs, last, last_cell = torch.lstm(
        value, states, list(weights), biased, layers, 0.0, False, both_ways, batch_first
    )
    return outputs.contiguous(), last.contiguous(), last_cell.contiguous()


@torch.library.custom_op("ganexport::gru", mutates_args=())
def gru(
    value: Tensor, hidden: Tensor, weights: Sequence[Tensor], biased: bool, layers: int, both_ways: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``torch.gru`` without dropout: [length, batch, features] to (outputs, last hidden)."""
    outputs, last = torch.gru(value, hidden, list(weights), biased, layers, 0.0, False, both_ways, batch_first)
    return outputs.contiguous(), last.contiguous()


@torch.library.custom_op("ganexport::rnn", mutates_args=())
def rnn(
    value: Tensor, hidden: Tensor, weights: Sequence[Tensor], biased: bool, layers: int, both_ways: bool,
    batch_first: bool, activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``torch.rnn_tanh`` or ``torch.rnn_relu`` without dropout."""
    run = torch.rnn_tanh if activation == "Tanh" else torch.rnn_relu
    outputs, last = run(value, hidden, list(weights), biased, layers, 0.0, False, both_ways, batch_first)
    return outputs.contiguous(), last.contiguous()


def _like_outputs(value: Tensor, hidden: Tensor, both_ways: bool) -> Tensor:
    return value.new_empty((value.shape[0], value.shape[1], hidden.shape[2] * (2 if both_ways else 1)))


@lstm.register_fake
def _(value, hidden, cell, weights, biased, layers, both_ways, batch_first):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return _like_outputs(value, hidden, both_ways), torch.empty_like(hidden), torch.empty_like(cell)


@gru.register_fake
def _(value, hidden, weights, biased, layers, both_ways, batch_first):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return _like_outputs(value, hidden, both_ways), torch.empty_like(hidden)


@rnn.register_fake
def _(value, hidden, weights, biased, layers, both_ways, batch_first, activation):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return _like_outputs(value, hidden, both_ways), torch.empty_like(hidden)


_VF = torch._C._VariableFunctions
_LSTM = (torch.lstm, _VF.lstm)
_GRU = (torch.gru, _VF.gru)
_RNN = {torch.rnn_tanh: "Tanh", _VF.rnn_tanh: "Tanh", torch.rnn_relu: "Relu", _VF.rnn_relu: "Relu"}


class FreeLengthRecurrence(Rewriting):
    """Keeps recurrent layers whole where their length is symbolic."""

    line = "free-length-recurrence: {} recurrent layers kept whole"

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :class:`Rewriting`."""
        if kwargs or len(args) != 9 or not self._is_recurrent(func):
            return NotImplemented
        value, state, weights, biased, layers, dropout, training, both_ways, batch_first = args
        # Packed sequences pass their batch sizes where the state is, and the state where the weights are.
        if not isinstance(weights, tuple | list) or not isinstance(value.shape[1 if batch_first else 0], torch.SymInt):
            return NotImplemented
        if training and dropout:
            return NotImplemented
        if func in _LSTM and state[0].shape[2] != state[1].shape[2]:  # projected: ONNX has no such LSTM
            return NotImplemented
        if func in _LSTM:
            return lstm(value, state[0], state[1], list(weights), biased, layers, both_ways, batch_first)
        if func in _GRU:
            return gru(value, state, list(weights), biased, layers, both_ways, batch_first)
        return rnn(value, state, list(weights), biased, layers, both_ways, batch_first, _RNN[func])

    @staticmethod
    def _is_recurrent(func: Any) -> bool:
        try:
            return func in _LSTM or func in _GRU or func in _RNN
        except TypeError:  # an unhashable callable is none of ours
            return False


def onnx_forms() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How the exporter writes these operators."""
    from onnxscript import opset18
    from onnxscript.function_libs.torch_lib.ops.core import aten_gru, aten_lstm

    op: Any = opset18  # its stubs know no lists

    def to_lstm(value, hidden, cell, weights, biased, layers, both_ways, batch_first):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        return aten_lstm(value, [hidden, cell], weights, biased, layers, 0.0, False, both_ways, batch_first)

    def to_gru(value, hidden, weights, biased, layers, both_ways, batch_first):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        return aten_gru(value, hidden, weights, biased, layers, 0.0, False, both_ways, batch_first)

    def to_rnn(value, hidden, weights, biased, layers, both_ways, batch_first, activation):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        ways, each = (2 if both_ways else 1), (4 if biased else 2)
        value = op.Transpose(value, perm=[1, 0, 2]) if batch_first else value
        lasts = []
        for layer in range(layers):
            own = weights[layer * ways * each : (layer + 1) * ways * each]
            stacked = [
                op.Concat(*[op.Unsqueeze(tensor, [0]) for tensor in own[part::each]], axis=0) for part in range(each)
            ]
            bias = op.Concat(*stacked[2:], axis=1) if biased else None
            state = op.Slice(hidden, [layer * ways], [(layer + 1) * ways], [0])
            made, last = op.RNN(
                value, stacked[0], stacked[1], bias, None, state, activations=[activation] * ways,
                direction="bidirectional" if both_ways else "forward", hidden_size=hidden.shape[2],
            )  # fmt: skip
            # [length, ways, batch, hidden] to [length, batch, ways * hidden]
            value = op.Reshape(op.Transpose(made, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
            lasts.append(last)
        value = op.Transpose(value, perm=[1, 0, 2]) if batch_first else value
        return value, lasts[0] if layers == 1 else op.Concat(*lasts, axis=0)

    library = torch.ops.ganexport
    return {library.lstm.default: to_lstm, library.gru.default: to_gru, library.rnn.default: to_rnn}


def refuse(program: torch.export.ExportedProgram, what: str) -> str:
    """Why a format without these operators cannot hold the program; empty when it can."""
    for node in program.graph.nodes:
        if str(node.target).startswith("ganexport."):
            return f"{what} cannot hold a recurrent layer over a free length; export one length, or use --to onnx"
    return ""
