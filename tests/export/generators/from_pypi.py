"""Generators of PyPI packages, random weights, small; each factory imports its package when it is called."""

from unittest import mock

import torch
from torch import nn


def biggan() -> nn.Module:
    """pytorch-pretrained-biggan's, five blocks and an attention; forward(z, class_label, truncation)."""
    from pytorch_pretrained_biggan import BigGAN, BigGANConfig

    torch.manual_seed(0)
    layers = [(False, 16, 16), (True, 16, 8), (True, 8, 4), (True, 4, 2), (True, 2, 1)]  # it starts at 16 x the width
    config = BigGANConfig(
        64, z_dim=24, class_embed_dim=24, channel_width=16, num_classes=10, layers=layers, attention_layer_position=3
    )
    module = BigGAN(config)
    nn.init.ones_(module.generator.bn.weight)  # the package leaves them as memory was found
    nn.init.zeros_(module.generator.bn.bias)
    for name, buffer in module.named_buffers():  # statistics for each of 51 truncations, which training would fill
        if name.endswith("running_means"):
            buffer.normal_(0.0, 0.1)
        elif name.endswith("running_vars"):
            buffer.uniform_(0.5, 2.0)
    with torch.no_grad():
        for _ in range(20):  # power iterations: spectral norms are drawn at random, too, until training finds them
            module(torch.zeros(1, 24), torch.eye(10)[:1], 1.0)
    return module.eval()


def lightweight_gan() -> nn.Module:
    """lightweight-gan's at 128 pixels, skip-layer excitation and linear attention included."""
    with mock.patch.object(torch.cuda, "is_available", return_value=True):  # importing it asserts a GPU
        from lightweight_gan.lightweight_gan import Generator

    torch.manual_seed(0)
    return Generator(image_size=128, latent_dim=32, fmap_max=32, attn_res_layers=[16])


def lightweight_gan_frequencies() -> nn.Module:
    """The same with channel attention over frequencies."""
    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        from lightweight_gan.lightweight_gan import Generator

    torch.manual_seed(0)
    return Generator(image_size=128, latent_dim=32, fmap_max=32, freq_chan_attn=True)


def torchgan_dcgan() -> nn.Module:
    """torchgan's DCGAN."""
    from torchgan.models import DCGANGenerator

    torch.manual_seed(0)
    return DCGANGenerator(encoding_dims=32, out_size=32, step_channels=8)


def torchgan_conditional() -> nn.Module:
    """torchgan's conditional GAN; forward(z, y) with y of type long."""
    from torchgan.models import ConditionalGANGenerator

    torch.manual_seed(0)
    return ConditionalGANGenerator(num_classes=10, encoding_dims=32, out_size=32, step_channels=8)


def torchgan_autoencoding() -> nn.Module:
    """torchgan's fully connected-convolutional one."""
    from torchgan.models import AutoEncodingGenerator

    torch.manual_seed(0)
    return AutoEncodingGenerator(encoding_dims=32, out_size=32, step_channels=8)
