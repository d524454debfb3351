"""Generators with a catch: each holds something that export has to notice, work around or refuse in plain words."""

import torch
import torch.nn.functional as F
from torch import nn


class BatchStatistics(nn.Module):
    """normalisation by the batch's own statistics, in evaluation mode too (pix2pix, and layers without running ones)"""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 4 * 4 * 4)
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.last = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, z):
        return torch.tanh(self.last(F.relu(self.norm(self.first(z).view(-1, 4, 4, 4)))))


class MinibatchDeviation(nn.Module):
    """the deviation over the batch as one more channel, which belongs into a discriminator"""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 4 * 4 * 4), nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, z):
        x = self.first(z).view(-1, 4, 4, 4)
        deviation = x.var(0, unbiased=False).add(1e-8).sqrt().mean().expand(x.shape[0], 1, 4, 4)
        return torch.tanh(self.last(torch.cat([x, deviation], 1)))


class PyramidPooling(nn.Module):
    """features of grids of fixed sizes, spread over the image again (PSPNet), averages and maxima"""

    def __init__(self, pool=nn.AdaptiveAvgPool2d):
        super().__init__()
        self.pools = nn.ModuleList(pool(k) for k in (1, 2, 3, 6))
        self.strips = nn.ModuleList(pool(k) for k in ((None, 1), (1, None), (2, None)))
        self.last = nn.Conv2d(3 * 8, 3, 3, padding=1)

    def forward(self, x):
        grids = [pool(x) for pool in (*self.pools, *self.strips)]
        return torch.tanh(self.last(torch.cat([x, *(F.interpolate(g, size=x.shape[2:]) for g in grids)], 1)))


class NamedLikeItsInput(PyramidPooling):
    """returns a dict whose entry is called like the input"""

    def forward(self, image):
        return {"image": super().forward(image)}


class LargestPooling(PyramidPooling):
    """the same with maxima"""

    def __init__(self):
        super().__init__(nn.AdaptiveMaxPool2d)


class PooledSpeech(nn.Module):
    """a free length to eight frames, both ways"""

    def forward(self, x):
        return torch.cat([F.adaptive_avg_pool1d(x, 8), F.adaptive_max_pool1d(x, 8)], 1)


class ConvBlock(nn.Module):
    """one convolution of an image"""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)


class WindowsCountedByInt(ConvBlock):
    """windows of 4, put together again with int() of a quotient of sizes (Swin's window_reverse)"""

    def forward(self, x):
        b, c, h, w = x.shape
        y = x.permute(0, 2, 3, 1).view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4, c)
        count = int(y.shape[0] / (h * w / 4 / 4))
        y = y.view(count, h // 4, w // 4, 4, 4, -1).permute(0, 1, 3, 2, 4, 5).reshape(count, h, w, -1)
        return torch.tanh(self.conv(y.permute(0, 3, 1, 2)))


class SizesAsInts(ConvBlock):
    """int() and float() of sizes all over"""

    def forward(self, x):
        b, h, w = int(x.shape[0]), int(x.shape[2]), int(x.shape[3])
        y = self.conv(x).reshape(b, 3, h * w).mean(2).view(b, 3, 1, 1).expand(b, 3, h, w)
        y = F.interpolate(x + y, size=(int(h * 1.5), int(w * 0.5)), mode="bilinear")
        return torch.tanh(y / float(h) * (torch.arange(int(w * 0.5)) / float(w)))


class RoundedSize(ConvBlock):
    """round() of a size"""

    def forward(self, x):
        size = (round(x.shape[2] * 0.5), round(x.shape[3] * 1.5))
        return F.rrelu(F.interpolate(self.conv(x), size=size))


class AdaptedByBatchNorm(ConvBlock):
    """AdaIN as batch normalisation of one batch whose channels are all the samples' (MUNIT)"""

    def __init__(self):
        super().__init__()
        self.affine = nn.Linear(8, 6)

    def forward(self, image, style):
        x = self.conv(image)
        b, c, h, w = x.shape
        scale, shift = (part.reshape(-1) for part in self.affine(style).chunk(2, 1))
        mean, spread = torch.zeros(3).repeat(b), torch.ones(3).repeat(b)
        y = F.batch_norm(x.view(1, b * c, h, w), mean, spread, scale, shift, True, 0.1, 1e-5)
        return torch.tanh(y.view(b, c, h, w))


class IntHidesABranch(ConvBlock):
    """a branch on a size behind int()"""

    def forward(self, x):
        height = int(x.shape[2])
        return torch.tanh(self.conv(x) if height > 20 else self.conv(2 * x))


class LargerSide(ConvBlock):
    """a square as long as the larger side"""

    def forward(self, x):
        h, w = x.shape[2:]
        side = max(h, w)
        return torch.tanh(self.conv(F.pad(x, (0, side - w, 0, side - h))))


class TakesAlong(nn.Module):
    """the larger half of each sample, by take_along_dim with and without broadcasting"""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)

    def forward(self, z):
        x = self.first(z)
        order = torch.argsort(z, 1, descending=True)[:, :8]
        return torch.take_along_dim(x, order, 1) + x.take_along_dim(torch.arange(8)[None], dim=-1)


class CentredSpectrum(ConvBlock):
    """a spectrum with its middle in the middle, and a roll by half the size"""

    def forward(self, x):
        spectrum = torch.fft.fftshift(torch.fft.fft2(self.conv(x)), dim=(-2, -1))
        back = torch.fft.ifft2(torch.fft.ifftshift(0.5 * spectrum, dim=(-2, -1))).real
        return torch.tanh(torch.roll(back, (x.shape[2] // 2, -(x.shape[3] // 2)), (2, 3)))


class ShiftedBatch(ConvBlock):
    """fftshift without axes"""

    def forward(self, x):
        return torch.fft.fftshift(self.conv(x))


class Slopes(nn.Module):
    """randomised leaky ReLU"""

    def __init__(self, training=False):
        super().__init__()
        self.first, self.training_slopes = nn.Linear(16, 16), training

    def forward(self, z):
        return F.rrelu(self.first(z), 0.1, 0.4, training=self.training_slopes)


def random_slopes():
    return Slopes(training=True)


class Gumbel(nn.Module):
    """a soft or a hard choice, drawn"""

    def __init__(self, hard=False):
        super().__init__()
        self.first, self.hard = nn.Linear(16, 16), hard

    def forward(self, z):
        return F.gumbel_softmax(self.first(z), tau=0.7, hard=self.hard)


def hard_gumbel():
    return Gumbel(hard=True)


class AttentionDropout(nn.Module):
    """dropout of attention that is never switched off"""

    def forward(self, z):
        q = z.view(-1, 1, 4, 4)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.1).flatten(1)


class Positive(nn.Module):
    """a sigmoid at the end"""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)

    def forward(self, z):
        return torch.sigmoid(self.first(z)).view(-1, 1, 4, 4)


class Infinite(nn.Module):
    """divides by zero where a unit is off"""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)

    def forward(self, z):
        return 1 / torch.relu(torch.tanh(self.first(z))).view(-1, 1, 4, 4)


class Inverts(nn.Module):
    """has no ONNX form"""

    def forward(self, z):
        return torch.linalg.inv(z.view(-1, 4, 4) + 9 * torch.eye(4))


class HalfSpectrum(nn.Module):
    """a complex operator that has no form in pairs"""

    def forward(self, z):
        return torch.fft.ihfft(z).real


class NamedLikeOperators(nn.Module):
    """arguments called like the operators that it uses"""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)

    def forward(self, linear, view):
        return self.first(linear).view(-1, 16) * 2 + view.view(-1, 16)[:, :1] * linear


class SmallEpsilons(nn.Module):
    """pooling under a mask that may be empty, and a logarithm of what may be zero"""

    def forward(self, z, mask):
        pooled = (z * mask).sum(1, keepdim=True) / (mask.sum(1, keepdim=True) + 1e-8)
        return z * 1.000001 + pooled, torch.log(mask.mean(1) + 1e-10)


class SampledRays(nn.Module):
    """samples from a distribution function (NeRF's sample_pdf)"""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)

    def forward(self, z):
        cdf = torch.cumsum(torch.softmax(self.first(z), 1), 1)
        u = torch.linspace(0.02, 0.98, 7).expand(z.shape[0], 7).contiguous()
        right, left = torch.searchsorted(cdf, u, right=True), torch.searchsorted(torch.arange(4.0), z)
        return cdf.gather(1, right.clamp(max=15)), left.float()


class WritesIntoNoise(nn.Module):
    """changes the noise that it drew"""

    def forward(self, z):
        noise = torch.rand(z.shape[0], 16)
        noise[:, 0] = 0
        return z + noise


class TrainedAtSixteen(ConvBlock):
    """one way at the size it was trained at, the general way elsewhere (SwinIR's attention masks)"""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 3, 16, 16))

    def forward(self, x):
        position = self.position
        if x.shape[-2:] != position.shape[-2:]:
            position = F.interpolate(position, size=x.shape[-2:], mode="bicubic")
        return torch.tanh(self.conv(x + position))


class HiddenDraw(nn.Module):
    """an operator that draws by itself"""

    def forward(self, z):
        return F.fractional_max_pool2d(z.view(-1, 1, 4, 4), 2, output_size=2).flatten(1)


class DoubleWeights(nn.Module):
    """double precision everywhere"""

    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Linear(16, 64), nn.Conv2d(4, 3, 3, padding=1)
        self.double()

    def forward(self, z):
        return torch.tanh(self.conv(self.first(z).view(-1, 4, 4, 4))) * torch.ones(1, dtype=self.conv.weight.dtype)


#: A network that stands in its file, made when that is read.
trained = nn.Sequential(nn.Linear(16, 8), nn.Tanh())
