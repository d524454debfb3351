"""Long trainings in half precision, penalties included: finite all the way, and on fp32's curve within its noise."""

from __future__ import annotations

import functools
import math
import sys
from pathlib import Path

import pytest
import torch

from ganexport.data import open_images

sys.path.insert(0, str(Path(__file__).parent))
from cells import build

BATCH = 8


def curve(regularized: str, objective: str, precision: str, seed: int, steps: int) -> torch.Tensor:
    """Distance of the mean scores of real and generated digits, D(x) - D(G(z)), at every step [steps]."""
    scalers = {}
    if precision == "fp16":
        scalers = {f"loss_scale_{name}": torch.amp.GradScaler("cpu", init_scale=2.0**10) for name in "dg"}
    cell = build(objective, regularized, "dcgan-mnist/0", precision=precision, seed=seed, **scalers)
    digits = torch.from_numpy(open_images("mnist-10k").array()).squeeze(3)  # [10000, 28, 28]
    torch.manual_seed(seed)
    order = torch.randint(len(digits), (steps, BATCH))
    optimizers = {
        name: torch.optim.Adam(network.parameters(), lr=5e-4, betas=(0.0, 0.9))
        for name, network in (("d", cell.discriminator), ("g", cell.generator))
    }

    def update(name: str) -> None:
        scaler = scalers.get(f"loss_scale_{name}")
        if scaler is None:
            optimizers[name].step()
        else:
            scaler.step(optimizers[name])
            scaler.update()
        optimizers[name].zero_grad()

    found = []
    for step in range(steps):
        real = digits[order[step], None].float() / 127.5 - 1  # [BATCH, 1, 28, 28]
        metrics = cell.step.discriminator(real, {"z": torch.randn(BATCH, 8)}, step=step)
        update("d")
        cell.step.generator(real, {"z": torch.randn(BATCH, 8)}, step=step)
        update("g")
        found.append(float(metrics["real_score"] - metrics["fake_score"]))
        assert math.isfinite(float(metrics["loss"])), step
    return torch.tensor(found)


@functools.cache
def fp32_levels(regularized: str, objective: str, steps: int) -> torch.Tensor:
    """The last third's mean distance in fp32, of three seeds [3]."""
    return torch.tensor([curve(regularized, objective, "fp32", s, steps)[-(steps // 3) :].mean() for s in range(3)])


def check(regularized: str, objective: str, precision: str, steps: int) -> None:
    """The last third's mean distance differs from fp32's by no more than three times what another seed does."""
    last = steps // 3
    levels = fp32_levels(regularized, objective, steps)
    level = curve(regularized, objective, precision, 0, steps)[-last:].mean()
    noise = max(float(levels.std()), 0.02 * float(levels.abs().mean()))
    print(f"{regularized}, {precision}: {float(level):.4f}; fp32 {[round(float(x), 4) for x in levels]}")  # noqa: T201
    assert abs(float(level - levels.mean())) <= 3 * noise, (level, levels)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_three_hundred_steps_of_wgan_gp(precision):
    values = curve("two-sided", "wasserstein", precision, 0, 300)
    assert values[-100:].mean() > 0  # the critic tells real from generated


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("regularized", "objective"), [("two-sided", "wasserstein"), ("r1", "non-saturating")])
def test_three_thousand_steps(regularized, objective, precision):
    check(regularized, objective, precision, 3000)
