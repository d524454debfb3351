"""Tiny options of every architecture, so that tests over the registry stay quick."""

from __future__ import annotations

SMALL: dict[str, list[dict]] = {
    "dcgan-mnist": [{"width": 4, "latent": 8}],
    "dcgan": [{"image_size": 32, "channels": 1, "width": 4, "latent": 8, "norm": "none"}],
    "resnet": [
        {"image_size": 32, "channels": 1, "width": 4, "latent": 8, "norm": "layer"},
        {"image_size": 32, "channels": 3, "width": 4, "latent": 8, "classes": 3, "spectral": True},
    ],
    "sagan": [{"image_size": 32, "channels": 1, "width": 8, "latent": 8, "classes": 3}],
    "r3gan": [
        {"image_size": 32, "channels": 1, "width": 8, "group": 8, "latent": 8, "blocks": 1},
        {"image_size": 32, "channels": 1, "width": 8, "group": 8, "latent": 8, "blocks": 1, "classes": 3},
    ],
    "stylegan2": [
        {"image_size": 32, "channels": 1, "width": 1, "max_width": 8, "latent": 8, "mapping_layers": 2},
        {"image_size": 32, "channels": 3, "width": 1, "max_width": 8, "latent": 8, "mapping_layers": 2, "classes": 3,
         "noise": True, "truncation": True},
    ],
}  # fmt: skip

CASES = [(name, number) for name, variants in SMALL.items() for number in range(len(variants))]


def options(name: str, number: int = 0, **more):
    from ganexport.architectures import ARCHITECTURES

    return ARCHITECTURES.load(name).Options(**{**SMALL[name][number], **more})


def inputs_of(spec, n: int, seed: int = 0):
    """Random generator inputs as tensors."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    found = {}
    for tensor in spec.inputs:
        shape = tensor.resolve({"batch": n})
        if tensor.dtype == "int64":
            found[tensor.name] = torch.randint(0, tensor.sampler.classes, shape, generator=generator)
        else:
            found[tensor.name] = torch.randn(shape, generator=generator)
    return found
