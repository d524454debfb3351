"""One training in a process of its own, advanced a few steps at a time on request (see ``benchmarks/training.py``).

Reads commands from stdin, one JSON list a line, and answers each with one line on stdout:

- ``["steps", n]``: n steps; nanoseconds of each.
- ``["frechet", n]``: distance of n generated digits from the recipe's images, in the digit classifier's features.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks._plain_loop import PlainLoop
from ganexport.data import open_images
from ganexport.data.images import ImageSet
from ganexport.recipe import Recipe, load_recipe
from ganexport.training.distributed import Group
from ganexport.training.loop import Trainer
from ganexport.training.memory import keep_freed_memory
from ganexport.training.networks import fitted


def _engine(recipe: Recipe, images: ImageSet) -> tuple[Callable[[], Any], Callable[[], torch.nn.Module]]:
    torch.set_num_threads(recipe.training.threads)
    keep_freed_memory()  # as ``ganexport train`` does
    trainer = Trainer(recipe, images, group=Group(), device=torch.device("cpu"))

    def advance() -> Any:
        return trainer.advance(log=(trainer.step + 1) % recipe.logging.every == 0)

    return advance, trainer.networks.evaluated


def _plain(recipe: Recipe, images: ImageSet) -> tuple[Callable[[], Any], Callable[[], torch.nn.Module]]:
    loop = PlainLoop(recipe, images)

    def advance() -> Any:
        losses = loop.advance()
        if loop.step % recipe.logging.every == 0:
            return [float(loss) for loss in losses]
        return None

    return advance, lambda: loop.average if recipe.ema.decay else loop.generator


def _frechet(generator: torch.nn.Module, recipe: Recipe, images: ImageSet, count: int) -> float:
    from ganexport.evaluation.classifier import classify, load_classifier
    from ganexport.frechet import frechet_distance
    from ganexport.seeding import Sampling
    from ganexport.training.networks import build

    _, _, spec = build(recipe, generator_only=True)
    sampling = Sampling(spec)
    parts = []
    with torch.inference_mode():
        for start in range(0, count, 100):
            feeds = sampling.draw(0, start, 100)
            made = generator.eval()(
                **{name: torch.from_numpy(value) for name, value in feeds.items()}
            )  # [100, 1, H, W]
            parts.append(made.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())
    model = load_classifier()
    fake, _ = classify(model, np.concatenate(parts))
    real, _ = classify(model, images.array())
    return float(frechet_distance(real, fake))


def main() -> None:
    """Build what ``["way", recipe, settings]`` on the command line asks for, then answer."""
    way, name, settings = json.loads(sys.argv[1])
    recipe = load_recipe(name, ["training.device=cpu", *(f"training.{key}={value}" for key, value in settings.items())])
    images = fitted(recipe, open_images(recipe.data.source))
    advance, generator = _plain(recipe, images) if way == "plain" else _engine(recipe, images)
    answer: Any = {"threads": torch.get_num_threads()}
    while True:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            return
        command, count = json.loads(line)
        if command == "frechet":
            answer = _frechet(generator(), recipe, images, count)
            continue
        answer = []
        for _ in range(count):
            begin = time.perf_counter_ns()
            advance()
            answer.append(time.perf_counter_ns() - begin)


if __name__ == "__main__":
    main()
