"""Fourier transforms and complex numbers inside a generator: real arithmetic, the same function, any length."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ganexport.errors import ExportError
from ganexport.export.capture import capture
from ganexport.export.complex_pairs import PairedModule, has_complex
from ganexport.export.convert import convert, describe
from ganexport.export.prepare.spectral import SpectralAsConvolution
from ganexport.export.prepared import prepare
from ganexport.export.source import open_source


@pytest.mark.parametrize("length", [None, 70, 85])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("n_fft", "win_length"), [(16, 14), (15, 15), (16, None)])
def test_short_time_transforms_are_torchs(n_fft, win_length, normalized, center, length):
    torch.manual_seed(0)
    signal = torch.randn(2, 81, dtype=torch.float64)
    window = torch.hamming_window(win_length or n_fft, dtype=torch.float64)
    forward = {"hop_length": 4, "win_length": win_length, "window": window, "normalized": normalized, "center": center}
    wanted = torch.stft(signal, n_fft, return_complex=True, **forward)
    with SpectralAsConvolution() as mode:
        made = torch.stft(signal, n_fft, return_complex=True, **forward)
        single = signal[0].stft(n_fft, return_complex=False, **forward)
    assert mode.count == 2
    torch.testing.assert_close(made, wanted)
    torch.testing.assert_close(single, torch.view_as_real(wanted[0]))
    if not center and win_length == 14:  # the window is zero at the ends, and torch refuses to divide by it
        with pytest.raises(RuntimeError, match="window overlap add min"):
            torch.istft(wanted, n_fft, length=length, **forward)
        return
    back = torch.istft(wanted, n_fft, length=length, **forward)
    with SpectralAsConvolution() as mode:
        again = torch.istft(wanted, n_fft, length=length, **forward)
        alone = wanted[0].istft(n_fft, length=length, **forward)
    assert mode.count == 2
    torch.testing.assert_close(again, back)
    torch.testing.assert_close(alone, back[0])


def test_what_is_asked_for_beyond_the_last_frame_is_zero():
    spectrum = torch.stft(torch.randn(2, 81), 16, 4, window=torch.hamming_window(16), return_complex=True)
    wanted = torch.istft(spectrum, 16, 4, window=torch.hamming_window(16), length=100)
    with SpectralAsConvolution():
        made = torch.istft(spectrum, 16, 4, window=torch.hamming_window(16), length=100)
    assert made.shape == wanted.shape == (2, 100)
    torch.testing.assert_close(made, wanted)


def test_what_has_no_such_form_is_left_to_torch():
    signal = torch.randn(2, 64, dtype=torch.complex64)
    with SpectralAsConvolution() as mode:
        spectrum = torch.stft(signal, 16, window=torch.ones(16), onesided=False, return_complex=True)
        torch.istft(spectrum, 16, window=torch.ones(16), onesided=False, return_complex=True)
    assert mode.count == 0


class Of(nn.Module):
    """One function of [2, 6, 8], which may be anything."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 8, dtype=torch.complex64))
        self.register_buffer("other", torch.randn(6, 8))

    def forward(self, x):
        return self.function(self, x)


def spectrum(x):
    return torch.fft.fft2(x)


FUNCTIONS = {
    "add": lambda m, x: (spectrum(x) + x + (2 - 1j)).abs(),
    "sub": lambda m, x: (1 - spectrum(x) - x).abs(),
    "mul": lambda m, x: (spectrum(x) * m.weight * (0.5 + 2j) * m.other * 3).real,
    "div": lambda m, x: (spectrum(x) / (m.weight + 3) / 2 / (1 + 1j)).imag,
    "in place": lambda m, x: spectrum(x).mul_(m.weight).add_(x).div_(2).abs(),
    "part in place": lambda m, x: slice_in_place(spectrum(x)),
    "i times": lambda m, x: torch.exp(x * 1j).real + torch.exp(1j * x).imag,
    "exp": lambda m, x: torch.exp(torch.complex(x * 0.1, x)).angle(),
    "log": lambda m, x: torch.log(spectrum(x) + 3).real,
    "polar": lambda m, x: torch.view_as_real(torch.polar(x.abs(), x)),
    "pow": lambda m, x: (spectrum(x) * 0.1).pow(3).real + ((spectrum(x) + 9) ** -2).imag,
    "sgn": lambda m, x: torch.sgn(spectrum(x)).real,
    "conj": lambda m, x: (spectrum(x).conj() * spectrum(x)).real.sqrt(),
    "where": lambda m, x: torch.where(x > 0, spectrum(x), torch.zeros_like(spectrum(x))).abs(),
    "matmul": lambda m, x: (spectrum(x) @ m.weight.mT).abs() + (x.to(m.weight.dtype) @ m.weight.mT).real,
    "einsum": lambda m, x: torch.einsum("bij,ij->bi", spectrum(x), m.weight).abs(),
    "moving": lambda m, x: (
        torch.stack(
            [
                part.flip(-1).roll(1, 1).reshape(-1, 48)
                for part in spectrum(x).chunk(2, 2)[0].repeat(1, 1, 2).split(2, 0)
            ]
        ).real
    ),
    "cat with real": lambda m, x: torch.cat([spectrum(x), x], 1).imag,
    "view": lambda m, x: torch.view_as_complex(x.reshape(2, 6, 4, 2)).angle(),
    "norm": lambda m, x: spectrum(x).norm(dim=-1),
    "cast": lambda m, x: (x.to(torch.complex64) * m.weight).abs(),
    "full": lambda m, x: (torch.full((6, 8), 1 + 2j) * x + torch.ones(6, 8, dtype=torch.complex64)).imag,
    "fft": lambda m, x: torch.fft.ifft(torch.fft.fft(x, norm="ortho", dim=1), n=5, norm="forward").abs(),
    "rfft": lambda m, x: torch.fft.irfft(torch.fft.rfft(x, dim=1, norm="forward"), n=7, dim=1, norm="ortho"),
    "rfft2": lambda m, x: torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho") * m.weight[:, :5], s=(6, 8)),
    "rfft padded": lambda m, x: torch.fft.rfft(x, n=11).abs() + torch.fft.rfft(x, n=10).abs().sum(),
    "fftn": lambda m, x: torch.fft.ifftn(torch.fft.fftn(x)).real + torch.fft.fftshift(torch.fft.fft2(x)).abs(),
    "rfftn": lambda m, x: torch.fft.irfftn(torch.fft.rfftn(x, dim=(1, 2)), s=(6, 8), dim=(1, 2), norm="forward"),
    "odd": lambda m, x: torch.fft.irfft(torch.fft.rfft(x[..., :7])),
}


def slice_in_place(value):
    value[:, 1:3] *= 2j
    value[:, 0] = 1 + 1j
    value.real[:, 4] = 7.0
    return torch.view_as_real(value)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_pairs_of_real_numbers_compute_the_same(function):
    module = Of(function).eval()
    x = torch.randn(2, 6, 8)
    program = torch.export.export(module, (x,), strict=False)
    assert has_complex(program)
    paired = torch.export.export(PairedModule(program), (x,), strict=False)
    assert not has_complex(paired)
    with torch.no_grad():
        torch.testing.assert_close(paired.module()(x), module(x), rtol=1e-4, atol=1e-4)


def captured(module, inputs, dims=()):
    source = open_source(module, describe(inputs=inputs, dims=list(dims), batch="1:2:4"))
    prepared = prepare(source)
    return prepared, capture(prepared.function, prepared.spec)


@pytest.mark.parametrize("norm", ["backward", "ortho", "forward"])
def test_transforms_of_a_free_size_hold_at_large_sizes(norm):
    class Filter(nn.Module):
        def forward(self, x):
            middle = torch.fft.rfft2(x, norm=norm)
            return torch.fft.irfft2(middle, s=x.shape[-2:], norm=norm), torch.fft.fft(x, norm=norm).real

    module = Filter()
    _, program = captured(module, ["x=normal[batch,height,width]"], ["height=3:8:1024", "width=3:8:1024"])
    for height, width in ((3, 4), (5, 7), (640, 1001)):
        x = torch.randn(2, height, width)
        for made, wanted in zip(program.module()(x), module(x), strict=True):
            assert float((made - wanted).norm() / wanted.norm()) < 1e-5


def test_an_operator_without_a_real_form_is_named_with_its_line():
    module = Of(lambda m, x: torch.linalg.inv(torch.fft.fft2(x)[:, :6, :6]).real)
    with pytest.raises(ExportError, match=r"test_spectral\.py:\d+: .*complex numbers has no real form"):
        captured(module, ["x=normal[batch,6,8]"])


def test_a_complex_output_is_refused_with_what_to_do():
    with pytest.raises(ExportError, match="view_as_real"):
        captured(Of(lambda m, x: torch.fft.fft2(x)), ["x=normal[batch,6,8]"])


def test_a_vocoder_that_ends_with_istft_exports_at_any_length(tmp_path):
    made = convert(
        "generators.spectral:vocoder", to="onnx", output=tmp_path / "out", inputs=["mel=normal[batch,20,frames]"],
        outputs=["audio=[-1,1]:NCT"], batch="1:1:3", dims=["frames=8:32:60"], verify_budget=10,
    )  # fmt: skip
    file = made.find("onnx")
    assert file.certificate.verdict == "pass"
    assert {8, 60} <= {sizes["frames"] for sizes in file.certificate.unseen}
    assert "spectral-convolution: 1 short-time Fourier transforms as convolutions" in file.passes
    assert any(line.startswith("complex-pairs: ") for line in file.passes)
    import onnx

    operators = {node.op_type for node in onnx.load(made.path / "generator.onnx").graph.node}
    assert not operators & {"DFT", "STFT"}  # TensorRT has neither


def test_a_signal_that_goes_through_stft_and_back_keeps_its_length(tmp_path):
    made = convert(
        "generators.spectral:enhancer", to="onnx", output=tmp_path / "out", batch="1:2:3",
        inputs=["audio=uniform(-1,1)[batch,samples]"], dims=["samples=64:250:512"], verify_budget=10,
    )  # fmt: skip
    assert made.find("onnx").certificate.verdict == "pass"
    assert made.spec.outputs[0].shape == ("batch", "samples")


def test_fourier_convolutions_export_at_any_height_and_width(tmp_path):
    made = convert(
        "generators.spectral:inpainter", to=["onnx", "torchscript"], output=tmp_path / "out", batch="1:1:3",
        inputs=["image=uniform(0,1)[batch,3,height,width]", "mask=uniform(0,1)[batch,1,height,width]"],
        outputs=["painted=[0,1]:NCHW"], dims=["height=9:16:31", "width=8:16:24"], verify_budget=10,
    )  # fmt: skip
    assert made.find("onnx").certificate.verdict == "pass"
    assert made.find("torchscript").certificate.verdict == "pass"
