"""Training on a GPU: CUDA graphs change nothing, nothing is compiled twice, the tuner and a whole run work."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from ganexport.checkpoint import read_checkpoint
from ganexport.kernels.gradient_penalty import why_not_cuda
from ganexport.recipe import Recipe
from ganexport.training.api import train
from ganexport.training.autotune import Tuner
from ganexport.training.distributed import Group
from ganexport.training.loop import Trainer
from ganexport.training.progress import Reporter
from ganexport.training.randomness import random_states, restore_random_states

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import tiny_run as tiny

CUDA = torch.device("cuda", 0)
ADAM = {"generator": {"rate": 1e-3}, "discriminator": {"rate": 1e-3}}
CASES = {
    "penalty, accumulated": {
        "training": {"device": "cuda", "n_critic": 2, "accumulation": 2},
        "ema": {"decay": 0.9},
    },
    "lazy R1": {
        "objective": {"name": "non-saturating"},
        "regularizers": [{"name": "r1", "interval": 2}],
        "training": {"device": "cuda", "n_critic": 1},
    },
    "relativistic, R1 and R2": {
        "architecture": {"name": "r3gan", "latent": 8, "width": 8, "image_size": 28, "channels": 1},
        "objective": {"name": "relativistic"},
        "regularizers": [{"name": "r1"}, {"name": "r2"}],
        "training": {"device": "cuda", "n_critic": 1},
    },
}


def recipe(case: str, **training: object) -> Recipe:
    sections = {key: dict(value) if isinstance(value, dict) else value for key, value in CASES[case].items()}
    return tiny.recipe(**sections | {"training": {**CASES[case]["training"], **training}, "optimizer": ADAM})


def trainer(chosen: Recipe) -> Trainer:
    return Trainer(chosen, tiny.images(), group=Group(), device=CUDA)


def losses(chosen: Trainer, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        line = chosen.advance(log=True)
        assert line is not None
        found += [line["d_loss"], line["g_loss"]]
    return found


def test_the_kernel_is_what_training_uses() -> None:
    assert why_not_cuda() == ""


#: Of torch.compile, of whole updates launched by eager code, and of compiled whole updates.
GRAPHS = {
    "reduce-overhead": {"compile": "reduce-overhead"},
    "replayed": {"cuda_graphs": True},
    "compiled, replayed": {"compile": "default", "cuda_graphs": True},
}


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("case", CASES)
def test_graphs_train_what_eager_trains(case: str, graphs: str) -> None:
    wanted = losses(trainer(recipe(case)), 7)
    graphed = trainer(recipe(case, **GRAPHS[graphs]))
    found = losses(graphed, 5)  # a lazy penalty's update is captured at its third turn, in step 5
    torch._dynamo.config.error_on_recompile = True
    try:
        found += losses(graphed, 2)
    finally:
        torch._dynamo.config.error_on_recompile = False
    assert found == pytest.approx(wanted, rel=2e-2, abs=2e-3)  # Adam's first steps amplify rounding
    assert graphed.networks.finite()


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_under_graphs_stays_near_fp32(precision: str, graphs: str) -> None:
    wanted = losses(trainer(recipe("lazy R1")), 10)
    low = trainer(recipe("lazy R1", **GRAPHS[graphs], precision=precision, memory_format="channels_last"))
    found = losses(low, 10)
    assert all(math.isfinite(value) for value in found)
    assert found[:2] == pytest.approx(wanted[:2], rel=2e-2, abs=2e-2)
    assert low.networks.finite()


@pytest.mark.parametrize("graphs", [False, True])
def test_an_update_does_not_wait_for_the_device(graphs: bool) -> None:
    one = trainer(recipe("lazy R1", cuda_graphs=graphs))
    losses(one, 6)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            one.advance(log=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_tuner_finds_settings() -> None:
    tuner = Tuner(recipe("lazy R1", steps=50), tiny.images(), CUDA, Reporter())
    chosen = tuner.run()
    assert chosen.step_ms is not None
    assert {"fp32", "tf32", "bf16"} <= {row.settings.precision for row in tuner.rows if row.step_ms is not None}
    assert any(row.settings.cuda_graphs and row.step_ms is not None for row in tuner.rows)


def test_a_run_is_interrupted_and_goes_on(tmp_path: Path) -> None:
    sets = ["training.device='cuda'", "training.cuda_graphs=true", "training.precision='bf16'"]
    first = train(str(tiny.write(tmp_path)), data="mnist-10k", out=tmp_path / "run", sets=[*sets, "training.steps=20"])
    assert first.finished
    assert (tmp_path / "run" / "samples" / "00000020.png").is_file()
    assert all(math.isfinite(value) for name, value in first.metrics.items() if name.endswith("loss"))
    again = train(resume=True, out=tmp_path / "run", sets=["training.steps=30"])
    assert again.step == 30


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpus_generator_is_kept(tmp_path: Path) -> None:
    train(recipe("lazy R1", device="cuda:1", steps=2), out=tmp_path / "run")
    assert torch.cuda.current_device() == 1
    kept = read_checkpoint(tmp_path / "run").tensors["random"]["0.cuda"]
    assert torch.equal(kept, torch.cuda.get_rng_state(1))
    torch.cuda.set_device(0)
    restore_random_states(random_states(torch.device("cuda", 0)) | {"cuda": kept}, torch.device("cuda", 1))
    assert torch.equal(torch.cuda.get_rng_state(1), kept)
