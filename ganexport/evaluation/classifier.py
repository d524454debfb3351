"""A small classifier of handwritten digits, whose features stand in for Inception's on MNIST-like data.

Inception features mean little on 28 by 28 grey digits, and their weights cannot be shipped. This network is
trained by :mod:`ganexport.evaluation.train_classifier` on the MNIST training set; its 84 features (named after
LeNet-5's last hidden layer, LeCun et al. 1998) carry the Fréchet distance, and its labels the class shares.
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ganexport.errors import CheckpointError, DataError

FEATURES = 84
CLASSES = 10
SIZE = 28


class DigitClassifier(nn.Module):
    """Three 3x3 convolutions with batch normalisation and pooling, then 84 features and 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *_block(1, 16),  # [N, 16, 14, 14]
            *_block(16, 32),  # [N, 32, 7, 7]
            *_block(32, 64),  # [N, 64, 3, 3]
        )
        self.hidden = nn.Linear(64 * 3 * 3, FEATURES)
        self.output = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Features [N, 84] (after the ReLU) of float images [N, 1, 28, 28] in [-1, 1]."""
        return torch.relu(self.hidden(self.convolutions(images).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10] of float images [N, 1, 28, 28] in [-1, 1]."""
        logits: Tensor = self.output(self.features(images))
        return logits


def _block(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(channels_out), nn.ReLU(), nn.MaxPool2d(2)


def load_classifier() -> DigitClassifier:
    """The trained classifier that ships with ganexport, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: The shipped weights are missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    model = DigitClassifier()
    try:
        weights = load((files("ganexport.evaluation") / "mnist_classifier.safetensors").read_bytes())
        model.load_state_dict({name: value.float() for name, value in weights.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"the classifier's weights cannot be read ({error}): reinstall ganexport") from None
    return model.eval()


def prepare_images(images: NDArray[np.uint8]) -> Tensor:
    """Grey uint8 images [N, H, W, 1] as float [N, 1, 28, 28] in [-1, 1].

    28 by 28 images are taken as they are. 32 by 32 images are cropped to their centre when their border
    is empty (how 32-pixel MNIST models pad), other sizes are resized by area-weighted bilinear interpolation.

    Raises:
        DataError: Not grey images.
    """
    if images.ndim != 4 or images.shape[-1] != 1:
        raise DataError(f"the digit classifier takes grey images [N, H, W, 1], got {list(images.shape)}")
    tensor = torch.from_numpy(np.array(images))  # a copy: callers may hold read-only arrays
    tensor = tensor.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
    if tensor.shape[-2:] == (32, 32):
        return tensor[..., 2:30, 2:30]
    if tensor.shape[-2:] != (SIZE, SIZE):
        tensor = torch.nn.functional.interpolate(
            tensor, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False
        )
    return tensor


@torch.inference_mode()
def classify(
    model: DigitClassifier, images: NDArray[np.uint8], batch_size: int = 500
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features and class probabilities of grey images.

    Args:
        model: From :func:`load_classifier`.
        images: uint8 [N, H, W, 1].
        batch_size: Images at a time; the results do not depend on it beyond rounding.

    Returns:
        Features float32 [N, 84] and probabilities float32 [N, 10].

    Raises:
        DataError: Not grey images.
    """
    features, probabilities = [np.empty((0, FEATURES), np.float32)], [np.empty((0, CLASSES), np.float32)]
    for start in range(0, len(images), batch_size):
        batch = model.features(prepare_images(images[start : start + batch_size]))
        features.append(batch.numpy())
        probabilities.append(model.output(batch).softmax(1).numpy())
    return np.concatenate(features), np.concatenate(probabilities)
