"""Generators with Fourier transforms inside, at tiny widths."""

import torch
import torch.nn.functional as F
from torch import nn


class Vocoder(nn.Module):
    """iSTFTNet's end (Kaneko et al. 2022, arXiv 2203.02395): magnitude and phase, then istft."""

    def __init__(self, n_fft: int = 16, hop: int = 4) -> None:
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        self.first, self.up = nn.Conv1d(20, 32, 7, 1, 3), nn.ConvTranspose1d(32, 16, 8, 4, 2)
        self.pad, self.last = nn.ReflectionPad1d((1, 0)), nn.Conv1d(16, n_fft + 2, 7, 1, 3)

    def forward(self, mel):
        x = self.up(F.leaky_relu(self.first(mel), 0.1))
        x = self.last(self.pad(F.leaky_relu(x, 0.1)))
        magnitude, phase = x.chunk(2, 1)
        spectrum = torch.exp(magnitude - 2.0) * torch.exp(torch.sin(phase) * 1j)
        window = torch.hann_window(self.n_fft, device=mel.device)
        return torch.istft(spectrum, self.n_fft, self.hop, self.n_fft, window=window).unsqueeze(1)


class Enhancer(nn.Module):
    """Audio to audio with a mask on its spectrogram."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Conv2d(1, 1, 3, padding=1)
        self.register_buffer("window", torch.hann_window(32))

    def forward(self, audio):
        spectrum = torch.stft(audio, 32, 8, 32, self.window, return_complex=True)
        mask = torch.sigmoid(self.mask(spectrum.abs().unsqueeze(1)).squeeze(1))
        return torch.istft(spectrum * mask, 32, 8, 32, self.window, length=audio.shape[-1])


class FourierUnit(nn.Module):
    """Fast Fourier convolution (Chi et al. 2020), as in LaMa (Suvorov et al. 2022, arXiv 2109.07161)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2 * channels, 2 * channels, 1, bias=False), nn.BatchNorm2d(2 * channels)

    def forward(self, x):
        batch = x.shape[0]
        spectrum = torch.fft.rfftn(x, dim=(-2, -1), norm="ortho")
        pairs = torch.stack((spectrum.real, spectrum.imag), -1).permute(0, 1, 4, 2, 3).contiguous()
        pairs = F.relu(self.norm(self.conv(pairs.view((batch, -1, *pairs.shape[3:])))))
        pairs = pairs.view((batch, -1, 2, *pairs.shape[2:])).permute(0, 1, 3, 4, 2).contiguous()
        return torch.fft.irfftn(torch.complex(pairs[..., 0], pairs[..., 1]), s=x.shape[-2:], dim=(-2, -1), norm="ortho")


class Inpainter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 7, padding=3, padding_mode="reflect")
        self.unit, self.last = FourierUnit(8), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, image, mask):
        x = self.first(torch.cat([image * (1 - mask), mask], 1))
        painted = torch.sigmoid(self.last(x + self.unit(x)))
        return mask * painted + (1 - mask) * image


def vocoder() -> nn.Module:
    torch.manual_seed(0)
    return Vocoder()


def enhancer() -> nn.Module:
    torch.manual_seed(0)
    return Enhancer()


def inpainter() -> nn.Module:
    torch.manual_seed(0)
    return Inpainter()
