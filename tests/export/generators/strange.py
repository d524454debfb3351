"""What users bring, a difficulty each, at tiny widths."""

import dataclasses

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, parametrize


class Vocos(nn.Module):
    def __init__(self, n=16, hop=4):
        super().__init__()
        self.n, self.hop = n, hop
        self.embed = nn.Conv1d(20, 32, 7, padding=3)
        self.dw = nn.Conv1d(32, 32, 7, padding=3, groups=32)
        self.norm = nn.LayerNorm(32)
        self.p1 = nn.Linear(32, 64)
        self.p2 = nn.Linear(64, 32)
        self.gamma = nn.Parameter(torch.full((32,), 0.5))
        self.out = nn.Linear(32, n + 2)
        self.register_buffer("window", torch.hann_window(n))

    def forward(self, mel):
        x = self.embed(mel)
        h = self.p2(F.gelu(self.p1(self.norm(self.dw(x).transpose(1, 2)))))
        x = x.transpose(1, 2) + self.gamma * h
        mag, p = self.out(x).transpose(1, 2).chunk(2, 1)
        mag = mag.exp().clip(max=1e2)
        S = mag * (torch.cos(p) + 1j * torch.sin(p))
        pad = (self.n - self.hop) // 2
        ifft = torch.fft.irfft(S, self.n, dim=1, norm="backward") * self.window[None, :, None]
        T = S.shape[-1]
        size = (T - 1) * self.hop + self.n
        y = F.fold(ifft, output_size=(1, size), kernel_size=(1, self.n), stride=(1, self.hop))[:, 0, 0, pad:-pad]
        w2 = self.window.square().expand(1, T, -1).transpose(1, 2)
        env = F.fold(w2, output_size=(1, size), kernel_size=(1, self.n), stride=(1, self.hop)).squeeze()[pad:-pad]
        return y / env


class LSTMVocoder(nn.Module):
    def __init__(self, kind=nn.LSTM, bi=False, layers=2, bf=False):
        super().__init__()
        self.bf = bf
        self.pre = nn.Conv1d(20, 16, 3, padding=1)
        self.rnn = kind(16, 16, layers, bidirectional=bi, batch_first=bf)
        self.post = nn.ConvTranspose1d(32 if bi else 16, 1, 4, 2, 1)

    def forward(self, mel):
        x = self.pre(mel)
        if self.bf:
            y, _ = self.rnn(x.transpose(1, 2))
            y = y.transpose(1, 2)
        else:
            y, _ = self.rnn(x.permute(2, 0, 1))
            y = y.permute(1, 2, 0)
        return torch.tanh(self.post(y))


class LSTMState(LSTMVocoder):
    """initial state from z given, returns last state too"""

    def forward(self, mel):
        x = self.pre(mel).permute(2, 0, 1)
        h0 = torch.zeros(2, x.shape[1], 16)
        c0 = x.mean(0, keepdim=True).repeat(2, 1, 1)
        y, (h, c) = self.rnn(x, (h0, c0))
        return torch.tanh(self.post(y.permute(1, 2, 0))), h, c


class SPADENorm(nn.Module):
    def __init__(self, channels, labels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.sh = nn.Conv2d(labels, 8, 3, padding=1)
        self.g = nn.Conv2d(8, channels, 3, padding=1)
        self.b = nn.Conv2d(8, channels, 3, padding=1)

    def forward(self, x, seg):
        seg = F.interpolate(seg, size=x.size()[2:], mode="nearest")
        a = F.relu(self.sh(seg))
        return self.norm(x) * (1 + self.g(a)) + self.b(a)


class SPADE(nn.Module):
    def __init__(self, labels=5):
        super().__init__()
        self.fc = nn.Conv2d(labels, 16, 3, padding=1)
        self.n1 = SPADENorm(16, labels)
        self.c1 = torch.nn.utils.spectral_norm(nn.Conv2d(16, 8, 3, padding=1))
        self.n2 = SPADENorm(8, labels)
        self.c2 = nn.Conv2d(8, 3, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, seg):
        x = F.interpolate(seg, size=(seg.size(2) // 4, seg.size(3) // 4))
        x = self.fc(x)
        x = self.up(self.c1(F.leaky_relu(self.n1(x, seg), 0.2)))
        x = self.up(x)
        return torch.tanh(self.c2(F.leaky_relu(self.n2(x, seg), 0.2)))


class ResizeUNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.d1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.d2 = nn.Conv2d(8, 16, 3, 2, 1)
        self.u1 = nn.Conv2d(24, 8, 3, padding=1)
        self.u2 = nn.Conv2d(11, 3, 3, padding=1)

    def forward(self, x):
        a = F.relu(self.d1(x))
        b = F.relu(self.d2(a))
        b = F.interpolate(b, size=a.shape[-2:], mode="bilinear", align_corners=False)
        c = F.relu(self.u1(torch.cat([a, b], 1)))
        c = F.interpolate(c, x.shape[2:], mode="bilinear", align_corners=True)
        return torch.tanh(self.u2(torch.cat([x, c], 1)))


class PadUNet(ResizeUNet):
    """pads the upsampled to the skip's size"""

    def forward(self, x):
        a = F.relu(self.d1(x))
        b = F.relu(self.d2(a))
        b = F.interpolate(b, scale_factor=2, mode="nearest")
        dy, dx = a.size(2) - b.size(2), a.size(3) - b.size(3)
        b = F.pad(b, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        c = F.relu(self.u1(torch.cat([a, b], 1)))
        c = F.interpolate(c, scale_factor=2, mode="bicubic")[..., : x.shape[2], : x.shape[3]]
        return torch.tanh(self.u2(torch.cat([x, c], 1)))


class MelGAN(nn.Module):
    def __init__(self):
        super().__init__()
        W = nn.utils.weight_norm
        self.net = nn.Sequential(
            nn.ReflectionPad1d(3),
            W(nn.Conv1d(20, 32, 7)),
            nn.LeakyReLU(0.2),
            W(nn.ConvTranspose1d(32, 16, 16, 8, 4)),
            nn.LeakyReLU(0.2),
            nn.ReflectionPad1d(3),
            W(nn.Conv1d(16, 16, 3, dilation=3)),
            nn.LeakyReLU(0.2),
            nn.ReflectionPad1d(3),
            W(nn.Conv1d(16, 1, 7)),
            nn.Tanh(),
        )

    def forward(self, mel):
        return self.net((mel + 5) / 5)


class RopeGAN(nn.Module):
    """complex rotary"""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8 * 6)
        self.o = nn.Linear(8, 12)

    def forward(self, z):
        x = self.linear(z).view(-1, 6, 8)
        xc = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        f = torch.outer(torch.arange(6).float(), 1.0 / 10 ** (torch.arange(4).float() / 4))
        fc = torch.polar(torch.ones_like(f), f)
        x = torch.view_as_real(xc * fc).flatten(2)
        return torch.tanh(self.o(x))


class Einsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16 * 16)
        self.qkv = nn.Linear(16, 48)
        self.o = nn.Linear(16, 12)

    def forward(self, z):
        x = self.linear(z).view(-1, 16, 16)
        q, k, v = self.qkv(x).view(-1, 16, 3, 4, 4).unbind(2)
        a = torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1)
        x = x + torch.einsum("bhnm,bmhd->bnhd", a, v).reshape(-1, 16, 16)
        y = self.o(x).transpose(1, 2).reshape(-1, 12, 4, 4)
        return torch.tanh(F.pixel_shuffle(y, 2))


class ViTGAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16 * 16)
        self.pos = nn.Parameter(torch.randn(1, 16, 16))
        self.n = nn.LayerNorm(16)
        self.mha = nn.MultiheadAttention(16, 4, batch_first=True, dropout=0.1)
        self.o = nn.Linear(16, 12)

    def forward(self, z):
        x = self.linear(z).view(-1, 16, 16) + self.pos
        h = self.n(x)
        h, w = self.mha(h, h, h)
        x = x + h
        return torch.tanh(F.pixel_shuffle(self.o(x).transpose(1, 2).reshape(-1, 12, 4, 4), 2)), w


class TransGAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16 * 16)
        self.pos = nn.Parameter(torch.randn(1, 16, 16))
        self.e = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu"), 2)
        self.o = nn.Linear(16, 12)

    def forward(self, z):
        return torch.tanh(
            F.pixel_shuffle(
                self.o(self.e(self.linear(z).view(-1, 16, 16) + self.pos)).transpose(1, 2).reshape(-1, 12, 4, 4), 2
            )
        )


class TransDec(nn.Module):
    """causal mask over free tokens"""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(30, 16)
        self.d = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True), 1, enable_nested_tensor=False
        )
        self.o = nn.Linear(16, 30)

    def forward(self, tokens):
        x = self.emb(tokens)
        n = x.shape[1]
        m = nn.Transformer.generate_square_subsequent_mask(n)
        return self.o(self.d(x, mask=m, is_causal=True))


class AdaINGAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Parameter(torch.randn(1, 16, 4, 4))
        self.st = nn.Linear(16, 64)
        self.c1 = nn.Conv2d(16, 16, 3, padding=1)
        self.g = nn.GroupNorm(4, 16)
        self.o = nn.Conv2d(16, 3, 1)

    def forward(self, z):
        x = self.c.repeat(z.shape[0], 1, 1, 1)
        g, b, g2, b2 = self.st(z)[..., None, None].chunk(4, 1)
        m, v = x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True)
        x = g * (x - m) / (v + 1e-8) + b
        x = self.c1(F.interpolate(x, scale_factor=2, mode="bilinear"))
        x = F.instance_norm(x) * g2 + b2
        return torch.tanh(self.o(F.silu(self.g(x))))


class STN(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Linear(3, 6)
        self.c = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, image):
        th = self.loc(F.adaptive_avg_pool2d(image, 1).flatten(1)).view(-1, 2, 3)
        g = F.affine_grid(th, image.size(), align_corners=False)
        return torch.tanh(
            self.c(F.grid_sample(image, g, mode="bilinear", padding_mode="reflection", align_corners=False))
        )


class FlowWarp(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, image):
        B, _, H, W = image.size()
        xx = torch.arange(0, W).view(1, -1).repeat(H, 1).view(1, 1, H, W).repeat(B, 1, 1, 1)
        yy = torch.arange(0, H).view(-1, 1).repeat(1, W).view(1, 1, H, W).repeat(B, 1, 1, 1)
        v = torch.cat((xx, yy), 1).float() + self.f(image)
        v = torch.stack((2.0 * v[:, 0] / max(W - 1, 1) - 1.0, 2.0 * v[:, 1] / max(H - 1, 1) - 1.0), -1)
        return F.grid_sample(image, v, align_corners=True)


class Triplane(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 3 * 4 * 8 * 8)
        self.o = nn.Sequential(nn.Linear(4, 16), nn.Softplus(), nn.Linear(16, 4))
        self.vol = nn.Parameter(torch.randn(1, 2, 4, 4, 4))
        self.o2 = nn.Linear(2, 4)

    def forward(self, z, rays):
        pl = self.linear(z).view(-1, 3, 4, 8, 8)
        t = torch.linspace(0.1, 1, 6)
        pts = rays.unsqueeze(2) * t.view(1, 1, -1, 1)  # B N S 3
        f = 0
        for i, (a, b) in enumerate(((0, 1), (0, 2), (1, 2))):
            f = f + F.grid_sample(pl[:, i], pts[..., [a, b]], align_corners=False)
        r = self.o(f.permute(0, 2, 3, 1))
        v = F.grid_sample(self.vol.expand(z.shape[0], -1, -1, -1, -1), pts.unsqueeze(1), align_corners=True)[
            :, :, 0
        ].permute(0, 2, 3, 1)
        r = r + self.o2(v)
        rgb, sig = r[..., :3].sigmoid(), F.softplus(r[..., 3:])
        alpha = 1 - torch.exp(-sig * 0.1)
        T = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :, :1]), 1 - alpha + 1e-10], 2), 2)[:, :, :-1]
        return (alpha * T * rgb).sum(2)


class VQDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.cb = nn.Embedding(64, 8)
        self.c = nn.Conv2d(8, 16, 3, padding=1)
        self.g = nn.GroupNorm(4, 16, eps=1e-6)
        self.q = nn.Conv2d(16, 16, 1)
        self.k = nn.Conv2d(16, 16, 1)
        self.v = nn.Conv2d(16, 16, 1)
        self.o = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, codes):
        x = self.c(self.cb(codes).permute(0, 3, 1, 2).contiguous())
        h = self.g(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        b, c, hh, ww = q.shape
        w = torch.bmm(q.reshape(b, c, hh * ww).permute(0, 2, 1), k.reshape(b, c, hh * ww)) * (int(c) ** -0.5)
        w = F.softmax(w, dim=2)
        x = x + torch.bmm(v.reshape(b, c, hh * ww), w.permute(0, 2, 1)).reshape(b, c, hh, ww)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = x * torch.sigmoid(x)
        return self.o(x)


class UpdatesEMA(nn.Module):
    """buffer written in forward, not read for output"""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 12)
        self.register_buffer("avg", torch.zeros(12))
        self.register_buffer("n", torch.zeros((), dtype=torch.long))

    def forward(self, z):
        w = self.linear(z)
        self.avg.copy_(w.detach().mean(0).lerp(self.avg, 0.998))
        self.n += 1
        return torch.tanh(w)


class DictIn(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 12)
        self.e = nn.Embedding(10, 12)

    def forward(self, batch):
        return torch.tanh(self.linear(batch["z"]) + self.e(batch["y"]))


class ListIn(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 12)

    def forward(self, styles, scale=1.0):
        return torch.tanh(sum(self.linear(x) for x in styles) * scale)


@dataclasses.dataclass
class Outputs:
    image: torch.Tensor
    w: torch.Tensor


class DataclassOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 12)

    def forward(self, z):
        w = self.linear(z)
        return Outputs(torch.tanh(w), w)


class NestedOut(DataclassOut):
    def forward(self, z):
        w = self.linear(z)
        return {"image": torch.tanh(w), "feats": [w, w * 2], "aux": {"k": w + 1}}


class HalfWeightsCasts(DataclassOut):
    def __init__(self):
        super().__init__()
        self.half()

    def forward(self, z):
        return torch.tanh(self.linear(z.half()).float())


class Ckpt(DataclassOut):
    def forward(self, z):
        return torch.utils.checkpoint.checkpoint(lambda x: torch.tanh(self.linear(x)), z, use_reentrant=False)


class Vmap(nn.Module):
    """hypernetwork with vmap"""

    def __init__(self):
        super().__init__()
        self.h = nn.Linear(16, 2 * 8 + 8 * 3)
        self.register_buffer("xy", torch.randn(10, 2))

    def forward(self, z):
        w = self.h(z)

        def one(w):
            return torch.sin(self.xy @ w[:16].view(2, 8)) @ w[16:].view(8, 3)

        return torch.vmap(one)(w)


class Kitchen(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(3, 8, 3, padding="same", padding_mode="circular")
        self.pr = nn.PReLU(8)
        self.up = nn.ConvTranspose2d(8, 8, 3, 2, 1, output_padding=1)
        self.c2 = nn.Conv2d(4, 3, 3, padding=1, padding_mode="replicate")
        self.lrn = nn.LocalResponseNorm(3)

    def forward(self, image):
        x = self.pr(self.c(image))
        x = self.lrn(self.up(x))
        x = F.glu(x, 1)
        x = torch.roll(x, (1, -1), (2, 3))
        x = x.flip(-1)
        x = F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2)
        x = x / torch.sqrt(x.square().mean(1, keepdim=True) + 1e-8)
        x = F.normalize(x, dim=1)
        x = F.hardswish(x) + F.mish(x) + F.celu(x) + F.softsign(x) + F.gelu(x, approximate="tanh")
        x = F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)
        return torch.tanh(self.c2(x))


class Unfolds(nn.Module):
    """contextual attention-like (unfold/fold)"""

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(3, 4, 3, padding=1)
        self.linear = nn.Linear(36, 36)
        self.o = nn.Conv2d(4, 3, 1)

    def forward(self, image):
        x = self.c(image)
        u = F.unfold(x, 3, padding=1)
        u = self.linear(u.transpose(1, 2)).transpose(1, 2)
        return torch.tanh(self.o(F.fold(u, (16, 16), 3, padding=1)))


class Unpool(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(3, 4, 3, padding=1)
        self.o = nn.Conv2d(4, 3, 1)

    def forward(self, image):
        x, i = F.max_pool2d(self.c(image), 2, return_indices=True)
        return torch.tanh(self.o(F.max_unpool2d(x, i, 2)))


class Video(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 64)
        self.a = nn.ConvTranspose3d(8, 4, 4, 2, 1)
        self.b = nn.BatchNorm3d(4)
        self.o = nn.Conv3d(4, 3, 3, padding=1)

    def forward(self, z):
        return torch.tanh(
            self.o(
                F.interpolate(
                    F.relu(self.b(self.a(self.linear(z).view(-1, 8, 2, 2, 2)))), scale_factor=2, mode="trilinear"
                )
            )
        )


class Scale(nn.Module):
    def forward(self, w):
        return w * 0.3


class Parametrized(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 12)
        parametrize.register_parametrization(self.linear, "weight", Scale())
        parametrizations.spectral_norm(self.linear)
        self.o = parametrizations.orthogonal(nn.Linear(12, 12))

    def forward(self, z):
        return torch.tanh(self.o(self.linear(z)))


class TopK(DataclassOut):
    def forward(self, z):
        v, i = self.linear(z).topk(4)
        o = F.one_hot(i, 12).float().sum(1)
        return (
            torch.tanh(self.linear(z) * o)
            + torch.zeros(z.shape[0], 12).scatter_(1, i, v)
            + torch.cumsum(self.linear(z), 1).sort(1).values
        )


class GRUCellLoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.LSTMCell(16, 16)
        self.o = nn.Linear(16, 5)

    def forward(self, z):
        h, c = z, torch.zeros_like(z)
        o = []
        for _ in range(6):
            h, c = self.c(z, (h, c))
            o.append(self.o(h))
        return torch.stack(o, 1)


class Sub(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 12)

    def forward(self, x):
        return torch.relu(self.linear(x))


class ScriptedSub(nn.Module):
    def __init__(self):
        super().__init__()
        self.s = torch.jit.script(Sub())
        self.o = nn.Linear(12, 12)

    def forward(self, z):
        return torch.tanh(self.o(self.s(z)))


class TracedSub(nn.Module):
    def __init__(self):
        super().__init__()
        self.s = torch.jit.trace(Sub(), torch.randn(2, 16))
        self.o = nn.Linear(12, 12)

    def forward(self, z):
        return torch.tanh(self.o(self.s(z)))


@torch.jit.script
def scripted_activation(x, b: torch.Tensor):
    return torch.relu(x + b) * 1.414


class ScriptFn(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 12)
        self.b = nn.Parameter(torch.randn(12))

    def forward(self, z):
        return torch.tanh(scripted_activation(self.linear(z), self.b))


class CompiledSub(nn.Module):
    def __init__(self):
        super().__init__()
        self.s = torch.compile(Sub())
        self.o = nn.Linear(12, 12)

    def forward(self, z):
        return torch.tanh(self.o(self.s(z)))


class CompiledFn(DataclassOut):
    def forward(self, z):
        return compiled_tanh(self.linear(z))


@torch.compile
def compiled_tanh(x):
    return torch.tanh(x) * 0.5


class WindowAttn(nn.Module):
    """Swin: window partition with free H, W multiple of 4, shift mask."""

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(3, 8, 3, padding=1)
        self.qkv = nn.Linear(8, 24)
        self.o = nn.Conv2d(8, 3, 1)

    def forward(self, image):
        x = self.c(image).permute(0, 2, 3, 1)
        B, H, W, C = x.shape
        x = torch.roll(x, (-2, -2), (1, 2))
        w = x.view(B, H // 4, 4, W // 4, 4, C).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 16, C)
        mask = torch.zeros((1, H, W, 1))
        cnt = 0
        for h in (slice(0, -4), slice(-4, -2), slice(-2, None)):
            for ww in (slice(0, -4), slice(-4, -2), slice(-2, None)):
                mask[:, h, ww, :] = cnt
                cnt += 1
        mw = mask.view(1, H // 4, 4, W // 4, 4, 1).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16)
        am = mw.unsqueeze(1) - mw.unsqueeze(2)
        am = am.masked_fill(am != 0, -100.0).masked_fill(am == 0, 0.0)
        q, k, v = self.qkv(w).reshape(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
        a = (q * 0.5) @ k.transpose(-2, -1)
        nW = mw.shape[0]
        a = a.view(w.shape[0] // nW, nW, 2, 16, 16) + am.unsqueeze(1).unsqueeze(0)
        a = a.view(-1, 2, 16, 16).softmax(-1)
        y = (a @ v).transpose(1, 2).reshape(-1, 16, C)
        y = y.view(-1, H // 4, W // 4, 4, 4, C).permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, C)
        y = torch.roll(y, (2, 2), (1, 2)).permute(0, 3, 1, 2)
        return torch.tanh(self.o(y))


class TVDeepLab(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = torchvision.models.resnet18(weights=None).layer1
        self.c = nn.Conv2d(3, 64, 3, 2, 1)
        self.sw = torchvision.ops.SqueezeExcitation(64, 8)
        self.o = nn.Conv2d(64, 3, 1)

    def forward(self, image):
        return {
            "out": torch.tanh(
                F.interpolate(
                    self.o(self.sw(self.b(self.c(image)))), size=image.shape[-2:], mode="bilinear", align_corners=False
                )
            )
        }


class FilteredLrelu(nn.Module):
    """StyleGAN3 alias-free: upsample by zero insertion, FIR, lrelu, FIR down."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("f", torch.hann_window(9)[1:].outer(torch.hann_window(9)[1:]))
        self.freq = nn.Parameter(torch.randn(8, 2))
        self.ph = nn.Parameter(torch.randn(8))
        self.w = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.aff = nn.Linear(16, 8)
        self.o = nn.Conv2d(8, 3, 1)
        self.register_buffer("tr", torch.eye(3))

    def forward(self, z):
        w = self.linear(z)
        t = F.normalize(w[:, :4], dim=1)
        tr = self.tr.unsqueeze(0).repeat(z.shape[0], 1, 1)
        tr[:, 0, 0] = t[:, 0]
        tr[:, 0, 1] = -t[:, 1]
        tr[:, 1, 0] = t[:, 1]
        tr[:, 1, 1] = t[:, 0]
        tr[:, 0, 2] = t[:, 2]
        g = F.affine_grid(tr[:, :2], [z.shape[0], 1, 8, 8], align_corners=False)
        fr = self.freq.unsqueeze(0) @ tr[:, :2, :2]
        x = torch.sin((g.unsqueeze(3) @ fr.permute(0, 2, 1).unsqueeze(1).unsqueeze(2)).squeeze(3) + self.ph).permute(
            0, 3, 1, 2
        )
        st = self.aff(w)
        wt = self.w.unsqueeze(0) * st[:, None, :, None, None]
        wt = wt * (wt.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        B = z.shape[0]
        x = F.conv2d(x.reshape(1, -1, *x.shape[2:]), wt.reshape(-1, 8, 3, 3), padding=2, groups=B).reshape(B, 8, 10, 10)
        b, c, h, ww = x.shape
        x = F.pad(x.reshape(b, c, h, 1, ww, 1), [0, 1, 0, 0, 0, 1]).reshape(b, c, h * 2, ww * 2)
        x = F.pad(x, [3, 4, 3, 4])
        f = self.f.flip([0, 1])[None, None].repeat(c, 1, 1, 1)
        x = F.leaky_relu(F.conv2d(x, f, groups=c), 0.2) * 1.414
        x = F.conv2d(F.pad(x, [3, 4, 3, 4]), f / 4, groups=c)[:, :, ::2, ::2]
        return torch.tanh(self.o(x))


class Window(nn.Module):
    """pads to whole windows of 8, works within each, and crops (restoration and super-resolution networks)"""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.l = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1), nn.Linear(64, 64)

    def forward(self, x):
        h, w = x.shape[2:]
        p = self.a(F.pad(x, (0, (8 - w % 8) % 8, 0, (8 - h % 8) % 8), mode="reflect"))
        B, C, H, W = p.shape
        q = p.view(B, C, H // 8, 8, W // 8, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, C, 64)
        q = self.l(q).view(B, H // 8, W // 8, C, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)
        return torch.tanh(self.b(F.interpolate(q, scale_factor=2, mode="bilinear")))[:, :, : 2 * h, : 2 * w]


class Crop(nn.Module):
    """half the size and back, cropped to what came in"""

    def forward(self, x):
        half = x[..., ::2, ::2]
        return F.interpolate(half, scale_factor=2)[..., : x.shape[2], : x.shape[3]] + x


class CropAndBranch(Crop):
    """the same, and a branch that one graph cannot hold"""

    def forward(self, x):
        y = super().forward(x)
        return 2 * y if x.shape[2] > 20 else y
