"""Under torchrun: every objective trained by all processes, resumed half-way, and by one process alone.

Prints one JSON object: for each case whether the resumed training ended bit for bit like the undisturbed one, and the
relative L2 distance of both networks' weights from those that one process trains.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny_run as tiny
import torch

from ganexport.recipe import Recipe, registries
from ganexport.training.distributed import Group
from ganexport.training.loop import Trainer

HALF, STEPS = 3, 6
OPTIMIZER = {"generator": {"rate": 1e-3, "eps": 1e-4}, "discriminator": {"eps": 1e-4}}
PENALTIES = ("dragan", "r1", "r2", "weight-clipping")
#: Dragan's perturbation takes the spread of a process's own rows and its own random numbers.
COUPLED = {"dragan"}


def cases() -> dict[str, Recipe]:
    """Every objective alone, every regularizer but the gradient penalty (which the other tests train) with one."""
    training = {"steps": STEPS, "batch_size": 16, "checkpoint_every": STEPS}
    common = {"training": training, "optimizer": OPTIMIZER}
    found = {}
    for name in registries()["objective"].names():
        found[name] = tiny.recipe(objective={"name": name}, regularizers=[], **common)
    for name in PENALTIES:
        found[name] = tiny.recipe(regularizers=[{"name": name}], **common)
    return found


def train(recipe: Recipe, group: Group, run: Path | None, steps: int) -> Trainer:
    trainer = Trainer(recipe, tiny.images(), group=group, device=torch.device("cpu"), run=run)
    for _ in range(steps):
        trainer.advance(log=False)
    return trainer


def both(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tiny.weights(trainer).items() if name.startswith(("generator.", "discrim"))}


def distance(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    apart = sum(float((mine[key].double() - theirs[key].double()).square().sum()) for key in theirs)
    return float((apart / sum(float(value.double().square().sum()) for value in theirs.values())) ** 0.5)


def main(folder: Path) -> None:
    group = Group.from_environment()
    torch.set_num_threads(1)
    found = {}
    for name, recipe in cases().items():
        run = folder / name
        if group.leads:
            run.mkdir(parents=True)
        group.barrier()
        whole = train(recipe, group, run, HALF)
        whole.save()
        for _ in range(STEPS - HALF):
            whole.advance(log=False)
        torch.rand(17)  # whatever else draws random numbers in between
        second = Trainer(recipe, tiny.images(), group=group, device=torch.device("cpu"), run=run)
        second.restore(HALF)
        for _ in range(STEPS - HALF):
            second.advance(log=False)
        expected, resumed = tiny.weights(whole), tiny.weights(second)
        # The fused interpolation's own state is drawn from only where one process trains alone on a GPU.
        used = [key for key in expected if not key.startswith("interpolation.")]
        same = all(torch.equal(expected[key], resumed[key]) for key in used)
        agreed = group.gather(same)
        if group.leads:
            alone = train(recipe, Group(), None, STEPS)
            found[name] = {"resumed": all(agreed), "apart": distance(both(whole), both(alone))}
    group.barrier()
    if group.leads:
        sys.stdout.write(json.dumps(found) + "\n")
    group.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
