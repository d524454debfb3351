"""What of the source the mapping network needs: the mean latent of a module with its spec's inputs."""

from __future__ import annotations

import torch

from ganexport.errors import UsageError
from ganexport.export.prepare._copying import copied
from ganexport.export.prepare.mapping import (
    MEAN_BATCH,
    MEAN_DRAWS,
    MEAN_SEED,
    Truncated,
    UpToMapping,
    replace,
    submodule,
)
from ganexport.export.source import TorchSource
from ganexport.export.wrapped import Invocation, Wrapped, run_module, tensors_of
from ganexport.seeding import latents


def latent_moments(source: TorchSource, path: str, draws: int = MEAN_DRAWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of w, [1, …] each, over draws of the source's inputs.

    Raises:
        UsageError: No such sub-module, or it does not return one tensor with a batch.
        ExportError: ``forward`` never calls it.
    """
    submodule(source.module, path)
    spec = source.spec
    dim = spec.batch
    size = 1 if dim is None else max(dim.min, MEAN_BATCH // dim.step * dim.step or dim.step)
    size = size if dim is None else min(size, dim.max)
    function = _upto(source, path)
    total, squares, count = None, None, 0
    for start in range(0, draws, size):
        w = run_module(function, tensors_of(spec, latents(spec, MEAN_SEED, start, size)))[0].double()
        if w.ndim < 2 or w.shape[0] != size:
            raise UsageError(f"--mapping {path}: gives {list(w.shape)} for a batch of {size}, not one latent a sample")
        total = w.sum(0, keepdim=True) if total is None else total + w.sum(0, keepdim=True)
        squares = (w * w).sum(0, keepdim=True) if squares is None else squares + (w * w).sum(0, keepdim=True)
        count += size
    assert total is not None
    assert squares is not None
    mean = total / count
    deviation = (squares / count - mean * mean).clamp_min(0.0).sqrt()
    return mean.float(), deviation.float()


def _upto(source: TorchSource, path: str) -> Wrapped:
    names = [tensor.name for tensor in source.spec.inputs]
    return Wrapped(UpToMapping(source.module, path, Invocation(source.module, names)), names, source.call).eval()


def truncate_mapping(source: TorchSource, path: str, psi: float) -> TorchSource:
    """The source with w truncated right behind its mapping network, the mean latent baked in."""
    mean, _ = latent_moments(source, path)
    module = copied(source.module)
    replace(module, path, Truncated(submodule(module, path), mean, psi).eval())
    return TorchSource(module, source.spec, source.provenance, source.call)
