"""``torch.stft`` and ``torch.istft`` as (transposed) convolutions with the windowed Fourier basis.

``istft`` looks at its window's values, which no captured graph can, and neither ONNX nor TensorRT has the
operator; vocoders end with it (iSTFTNet, Kaneko et al. 2022, arXiv 2203.02395). Frames are summed where they
overlap by a transposed convolution, and divided by the same sum of the squared windows, as torch does.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it

from ganexport.export.prepare._rewriting import Rewriting

_FORWARD = (torch.stft, torch.Tensor.stft)
_INVERSE = (torch.istft, torch.Tensor.istft)


class SpectralAsConvolution(Rewriting):
    """Answers short-time Fourier transforms of real signals, and the inverse ones that give real signals."""

    line = "spectral-convolution: {} short-time Fourier transforms as convolutions"

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See :class:`Rewriting`."""
        if func not in _FORWARD and func not in _INVERSE:
            return NotImplemented
        inverse = func in _INVERSE
        run = inverse_transform if inverse else transform
        given = dict(zip(inspect.signature(run).parameters, args, strict=False)) | kwargs
        given = {"input": given.pop("self", None)} | given
        if not (_inverse_fits(given) if inverse else _forward_fits(given)):
            return NotImplemented
        return run(**given)


def _forward_fits(given: dict[str, Any]) -> bool:
    onesided = given.get("onesided")
    return (
        given["input"].is_floating_point()
        and given["input"].ndim in (1, 2)
        and onesided in (None, True)
        and given.get("return_complex") is not None
        and not given.get("align_to_window")
    )


def _inverse_fits(given: dict[str, Any]) -> bool:
    return (
        given["input"].is_complex()
        and given["input"].ndim in (2, 3)
        and given.get("onesided") in (None, True)
        and not given.get("return_complex")
    )


def _basis(n_fft: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of 2 pi k n / n_fft, [n_fft // 2 + 1, n_fft] each."""
    # numpy's, so that a graph being captured holds the values and not how they were computed.
    angle = np.outer(np.arange(n_fft // 2 + 1), np.arange(n_fft)) % n_fft * (2.0 * math.pi / n_fft)
    return _constant(np.cos(angle), like), _constant(np.sin(angle), like)


def _constant(values: np.ndarray[Any, Any], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def _window(window: torch.Tensor | None, win_length: int | None, n_fft: int, like: torch.Tensor) -> torch.Tensor:
    """The window in the middle of n_fft samples, [n_fft]."""
    length = n_fft if win_length is None else win_length
    values = torch.ones(length).to(like) if window is None else window.to(like.dtype)
    left = (n_fft - length) // 2
    return F.pad(values, (left, n_fft - length - left))


def transform(
    input: torch.Tensor,  # noqa: A002 - torch's name for it
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: torch.Tensor | None = None,
    center: bool = True,
    pad_mode: str = "reflect",
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,
    align_to_window: bool | None = None,
) -> torch.Tensor:
    """:func:`torch.stft` of a real signal [samples] or [batch, samples]; its arguments and its result."""
    hop = n_fft // 4 if hop_length is None else hop_length
    signal = input[None, None] if input.ndim == 1 else input[:, None]  # [B, 1, L]
    if center:
        signal = F.pad(signal, (n_fft // 2, n_fft // 2), mode=pad_mode)
    cosine, sine = _basis(n_fft, signal)
    shape = _window(window, win_length, n_fft, signal) * (n_fft**-0.5 if normalized else 1.0)
    real = F.conv1d(signal, (cosine * shape)[:, None], stride=hop)  # [B, bins, frames]
    imaginary = F.conv1d(signal, (-sine * shape)[:, None], stride=hop)
    if input.ndim == 1:
        real, imaginary = real[0], imaginary[0]
    return torch.complex(real, imaginary) if return_complex else torch.stack((real, imaginary), -1)


def inverse_transform(
    input: torch.Tensor,  # noqa: A002 - torch's name for it
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: torch.Tensor | None = None,
    center: bool = True,
    normalized: bool = False,
    onesided: bool | None = None,
    length: Any = None,
    return_complex: bool = False,
) -> torch.Tensor:
    """:func:`torch.istft` of [bins, frames] or [batch, bins, frames], complex, to a real signal."""
    hop = n_fft // 4 if hop_length is None else hop_length
    spectrum = input[None] if input.ndim == 2 else input
    real, imaginary = spectrum.real, spectrum.imag  # [B, bins, frames]
    cosine, sine = _basis(n_fft, real)
    # Each bin but the first, and the last of an even length, stands for two of the full spectrum.
    twice = np.full((n_fft // 2 + 1, 1), 2.0)
    twice[0] = 1.0
    if n_fft % 2 == 0:
        twice[-1] = 1.0
    shape = _window(window, win_length, n_fft, real)
    scale = _constant(twice * (n_fft**-0.5 if normalized else 1.0 / n_fft), real)
    basis = torch.cat((cosine * scale, -sine * scale)) * shape  # [2 bins, n_fft]
    frames = torch.cat((real, imaginary), 1)  # [B, 2 bins, frames]
    summed = F.conv_transpose1d(frames, basis[:, None], stride=hop)[:, 0]  # [B, L]
    ones = torch.ones_like(real[:1, :1])
    envelope = F.conv_transpose1d(ones, shape.square()[None, None], stride=hop)[:, 0]  # [1, L]
    start = n_fft // 2 if center else 0
    if length is None:
        stop = summed.shape[1] - start
        signal = summed[:, start:stop] / envelope[:, start:stop]
    elif isinstance(length, int) and isinstance(summed.shape[1], int):
        stop = min(start + length, summed.shape[1])
        signal = summed[:, start:stop] / envelope[:, start:stop]
        signal = F.pad(signal, (0, length - signal.shape[1]))  # what is asked for beyond the last frame is zero
    else:
        # By index: a slice would ask whether the frames reach that far, which fixes sizes. The length is that of
        # the signal which was cut into these frames, so they do, but for less than one hop.
        place = torch.arange(start, start + length, device=real.device)
        signal = F.pad(summed, (0, hop)).index_select(1, place)
        signal = signal / F.pad(envelope, (0, hop), value=1.0).index_select(1, place)
    return signal[0] if input.ndim == 2 else signal
