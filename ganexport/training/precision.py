"""Number formats of training: which there are, where they run, and the autocast context of each."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ganexport.errors import UsageError

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")

#: Multiplies the critic's scores while its input gradient is taken in float16: gradients of an image's
#: pixels are around 1e-3 to 1e-2, float16 loses bits below 6e-5.
FP16_INNER_SCALE = 256.0


def check(precision: str, device: torch.device) -> None:
    """Refuse a precision that is unknown or that the device does not have.

    Raises:
        UsageError: With the reason.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    if precision == "tf32" and device.type != "cuda":
        raise UsageError(f"tf32 is a mode of NVIDIA GPUs, not of {device.type}: use fp32 or bf16")


def autocast(precision: str, device_type: str) -> AbstractContextManager[Any]:
    """The context in which both networks run; weights and losses stay float32."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if precision in dtypes:
        return torch.autocast(device_type, dtypes[precision])
    return nullcontext()


def apply(precision: str, device: torch.device) -> None:
    """Set what is global: TF32 in matrix products and convolutions on CUDA.

    Raises:
        UsageError: As :func:`check`.
    """
    check(precision, device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
        torch.backends.cudnn.allow_tf32 = precision != "fp32"


def inner_scale(precision: str) -> float:
    """Factor on the critic's scores while its input gradient is taken."""
    return FP16_INNER_SCALE if precision == "fp16" else 1.0


def needs_scaler(precision: str) -> bool:
    """Whether the loss must be scaled (``torch.amp.GradScaler``) so that float16 gradients do not vanish."""
    return precision == "fp16"


def full(x: torch.Tensor) -> torch.Tensor:
    """x in float32 where autocast made it float16 or bfloat16; wider types stay as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
