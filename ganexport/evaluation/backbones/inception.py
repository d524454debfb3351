"""Inception-v3 as the Fréchet Inception distance is defined with it (Heusel et al. 2017, arXiv:1706.08500).

The network, its weights' format and its resizing are those of the torch-fidelity library, whose figures agree with
the original TensorFlow implementation's. The weights are never downloaded: they are taken from a file, or from
torch's own cache when another program has put them there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ganexport.errors import CheckpointError, DataError, MissingDependencyError, UsageError
from ganexport.evaluation.backbones import Backbone

FILE = "weights-inception-2015-12-05-6726825d.pth"
FEATURES = 2048


def cached_weights() -> Path | None:
    """The weights in torch's cache of hub files; None when they are not there."""
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    return path if path.is_file() else None


def backbone(weights: Path | None = None, device: str | None = None) -> Backbone:
    """2048 pooled features at 299 by 299, resized as TensorFlow 1 did it.

    Args:
        weights: A file in torch-fidelity's format; None looks into torch's cache.
        device: "cpu", "cuda" or "cuda:1"; None for the CPU.

    Raises:
        MissingDependencyError: torch-fidelity is not installed.
        UsageError: There are no weights.
        CheckpointError: The weights are damaged, not Inception's, or hold more than tensors.
    """
    import torch

    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise MissingDependencyError(
            "--backbone inception needs torch-fidelity: pip install 'ganexport[fid]'"
        ) from None
    path = weights or cached_weights()
    if path is None:
        raise UsageError(
            f"--backbone inception needs its weights, which are never downloaded: get {FILE} from torch-fidelity's "
            "releases and give it with --backbone-weights"
        )
    _refuse_code(path)
    try:
        model = FeatureExtractorInceptionV3("inception", [str(FEATURES)], feature_extractor_weights_path=str(path))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not Inception's weights: {' '.join(str(error).split())[:200]}") from None
    where = torch.device(device or "cpu")
    model = model.to(where).eval()

    def features(images: NDArray[np.uint8]) -> tuple[NDArray[Any], None]:
        if images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise DataError(f"Inception takes images [N, H, W, 1 or 3], got {list(images.shape)}")
        parts = [np.empty((0, FEATURES), np.float32)]
        with torch.inference_mode():
            for begin in range(0, len(images), 50):
                batch = np.broadcast_to(
                    images[begin : begin + 50], (len(images[begin : begin + 50]), *images.shape[1:3], 3)
                )
                tensor = torch.from_numpy(batch.copy()).permute(0, 3, 1, 2).to(where)  # [n, 3, H, W]
                parts.append(model(tensor)[0].float().cpu().numpy())
        return np.concatenate(parts), None

    return Backbone("Inception-v3 (2015-12-05), 2048 features, 299x299 by TensorFlow 1's bilinear resize", features)


def _refuse_code(path: Path) -> None:
    """Read the file as tensors alone first: the library itself would run what a pickle asks for."""
    import pickle

    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such weights file") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{path}: not readable as tensors alone: {line}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a network's weights")
