"""Updates from CUDA graphs, on a graph that stands in for CUDA's: it records nothing until it is replayed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run as tiny
import torch
from torch import Tensor

from ganexport.errors import UsageError
from ganexport.training.api import train
from ganexport.training.loop import Trainer
from ganexport.training.replay import MOST, WARM_UP, Updates

CASES: dict[str, dict[str, Any]] = {
    "gradient penalty": {},
    "accumulated": {"training": {"accumulation": 4}, "optimizer": {"discriminator": {"clip_norm": 0.5}}},
    "lazy": {
        "objective": {"name": "non-saturating"},
        "regularizers": [{"name": "r1", "interval": 3}],
        "training": {"accumulation": 2},
    },
    "relativistic": {"objective": {"name": "relativistic"}, "regularizers": [{"name": "r1"}, {"name": "r2"}]},
    "conditional": {
        "architecture": {"name": "resnet", "latent": 8, "width": 4, "image_size": 28, "channels": 1, "classes": 10},
        "objective": {"name": "hinge"},
        "regularizers": [],
    },
    "batch norm": {
        "architecture": {"name": "dcgan", "latent": 8, "width": 4, "image_size": 28, "channels": 1},
        "objective": {"name": "non-saturating"},
        "regularizers": [],
    },
}


class StandIn:
    """As a CUDA graph: capturing changes nothing, a replay reads and writes the memory of the capture."""

    def __init__(self, trainer: Trainer) -> None:
        networks = trainer.networks
        self.parameters = [*networks.d_parameters, *networks.g_parameters]
        buffers = [*networks.generator.buffers(), *networks.discriminator.buffers(), networks.engine.rng_state]
        self.state = [*buffers, *(parameter.data for parameter in self.parameters)]
        self.warmed = self.replayed = 0

    def warm(self, work: Callable[[], Any]) -> Any:
        self.warmed += 1
        return work()

    def capture(self, work: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        before, random = [tensor.clone() for tensor in self.state], torch.get_rng_state()
        held = self.put_aside()
        self.work, self.results = work, work()
        self.gradients = [parameter.grad for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, held, strict=True):  # of the other network
            parameter.grad = gradient if parameter.grad is None else parameter.grad
        for tensor, value in zip(self.state, before, strict=True):
            tensor.copy_(value)
        torch.set_rng_state(random)
        for tensor in (*self.results.values(), *filter(lambda g: g is not None, self.gradients)):
            tensor.fill_(float("nan"))  # nothing is there before a replay
        return self.results

    def put_aside(self) -> list[Tensor | None]:
        held = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return held

    def replay(self) -> None:
        self.replayed += 1
        held = self.put_aside()
        found = self.work()
        for mine, parameter in zip(self.gradients, self.parameters, strict=True):
            assert (mine is None) == (parameter.grad is None)
            if mine is not None:
                mine.copy_(parameter.grad)
        for name, value in self.results.items():
            value.copy_(found[name])
        for parameter, gradient in zip(self.parameters, held, strict=True):
            parameter.grad = gradient


def lines(trainer: Trainer, steps: int) -> list[dict[str, float]]:
    return [line for _ in range(steps) if (line := trainer.advance(log=True)) is not None]


@pytest.mark.parametrize("case", CASES)
def test_replayed_updates_train_exactly_what_launched_ones_do(case: str) -> None:
    wanted = lines(tiny.trainer(tiny.recipe(**CASES[case])), 9)
    trainer, made = tiny.trainer(tiny.recipe(**CASES[case])), []

    def make() -> StandIn:
        made.append(StandIn(trainer))
        return made[-1]

    trainer.networks.engine._updates = Updates(make)
    assert lines(trainer, 9) == wanted
    assert len(made) == (3 if case == "lazy" else 2)  # critic with and without its penalty, generator
    assert all(graph.warmed == WARM_UP for graph in made)
    assert all(graph.replayed > 1 for graph in made)


def test_other_shapes_get_graphs_of_their_own_up_to_a_limit() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    trainer = tiny.trainer(tiny.recipe())
    made = []

    def make() -> StandIn:
        made.append(StandIn(trainer))
        made[-1].parameters, made[-1].state = [weight], []
        return made[-1]

    def update(x: Tensor) -> dict[str, Tensor]:
        loss = (weight * x).sum()
        loss.backward()
        return {"loss": loss.detach().clone()}

    updates = Updates(make)
    for size in range(1, MOST + 4):
        for call in range(1, 5):
            weight.grad = None
            x = torch.full((size,), float(call))
            assert updates.run("one", [weight], update, x)["loss"] == size * call
            assert weight.grad == size * call
    assert len(made) == MOST


def test_metrics_of_an_update_survive_the_next() -> None:
    trainer = tiny.trainer(tiny.recipe())
    engine = trainer.networks.engine
    engine._updates = Updates(lambda: StandIn(trainer))
    found = []
    for number in range(5):
        real, labels = trainer.networks.batch(number)
        inputs = trainer.networks.latents.draw(number)
        found.append(engine.discriminator(real, inputs, labels, step=number, epsilon=trainer.networks.places(number)))
        trainer.networks.d_optimizer.step()
        trainer.networks.d_optimizer.zero_grad(set_to_none=True)
    assert len({metrics["loss"].item() for metrics in found}) == 5


def test_a_cpu_has_no_cuda_graphs(tmp_path: Path) -> None:
    refusal = r"training.cuda_graphs: needs a GPU, the device is cpu; leave it off"
    with pytest.raises(UsageError, match=refusal):
        tiny.trainer(tiny.recipe(training={"cuda_graphs": True}))
    recipe, run = str(tiny.write(tmp_path)), tmp_path / "run"
    for dry_run in (True, False):
        with pytest.raises(UsageError, match=refusal):
            train(recipe, out=run, sets=["training.cuda_graphs=true"], dry_run=dry_run)
    assert not list(run.glob("*.toml"))  # nothing to be mistaken for a run
