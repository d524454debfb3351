"""One cell of the objective x regularizer x architecture matrix, built small, and its gradients."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ganexport.architectures import ARCHITECTURES
from ganexport.objectives import OBJECTIVES
from ganexport.objectives.regularizers import REGULARIZERS
from ganexport.spec import GeneratorSpec
from ganexport.training.step import TrainingStep

sys.path.insert(0, str(Path(__file__).parents[1] / "architectures"))
from small import CASES, inputs_of, options

BATCH = 4
PLACES = (0.1, 0.7, 0.4, 0.9)

#: Name of a combination: regularizers and their options.
REGULARIZED = {
    "none": (),
    "clipping": (("weight-clipping", {"bound": 0.05}),),
    "two-sided": (("gradient-penalty", {}),),
    "one-sided": (("gradient-penalty", {"sides": "one", "target": 0.1}),),
    "dragan": (("dragan", {}),),
    "r1": (("r1", {"interval": 4}),),
    "r2": (("r2", {}),),
    "r1+r2": (("r1", {"weight": 1.0}), ("r2", {"weight": 1.0})),
}
ARCHITECTURE_CASES = [f"{name}/{number}" for name, number in CASES]
OBJECTIVE_NAMES = OBJECTIVES.names()


class Cell(NamedTuple):
    """Networks, inputs and the step of one cell."""

    generator: nn.Module
    discriminator: nn.Module
    spec: GeneratorSpec
    step: TrainingStep
    real: Tensor
    inputs: dict[str, Tensor]
    labels: Tensor | None

    def critic(self, step: int = 0) -> dict[str, Tensor]:
        """Gradients of one discriminator update."""
        self.discriminator.zero_grad()
        places = torch.tensor(PLACES, dtype=self.real.dtype)
        torch.manual_seed(5)
        self.metrics(step, places)
        return gradients(self.discriminator)

    def metrics(self, step: int, places: Tensor | None = None) -> dict[str, Tensor]:
        """Run one discriminator update."""
        return self.step.discriminator(self.real, self.inputs, self.labels, step=step, epsilon=places)

    def generate(self, step: int = 0) -> dict[str, Tensor]:
        """Gradients of one generator update."""
        self.generator.zero_grad()
        self.step.generator(self.real, self.inputs, self.labels, step=step)
        return gradients(self.generator)


def build(
    objective: str,
    regularized: str,
    architecture: str,
    *,
    dtype: torch.dtype = torch.float32,
    more: dict | None = None,
    **settings,
) -> Cell:
    """A cell with the same weights and inputs whatever the dtype and settings are."""
    name, number = architecture.split("/")
    module, chosen = ARCHITECTURES.load(name), options(name, int(number), **(more or {}))
    torch.manual_seed(0)
    generator, discriminator, spec = module.generator(chosen), module.discriminator(chosen), module.spec(chosen)
    for network in (generator, discriminator):
        for parameter in network.parameters():
            if parameter.abs().sum() == 0:  # gates and last layers that start at zero would hide what is behind them
                nn.init.normal_(parameter, std=0.1)
    generator.to(dtype)
    discriminator.to(dtype)
    regularizers = [
        (REGULARIZERS.load(key), REGULARIZERS.load(key).Options(**values)) for key, values in REGULARIZED[regularized]
    ]
    step = TrainingStep(generator, discriminator, OBJECTIVES.load(objective), regularizers, **settings)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs_of(spec, BATCH).items()}
    rng = torch.Generator().manual_seed(3)
    real = torch.rand(BATCH, *spec.outputs[0].shape[1:], generator=rng).mul(2).sub(1).to(dtype)
    return Cell(generator, discriminator, spec, step, real, inputs, inputs.get("labels"))


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def relative(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Relative L2 distance of all gradients taken as one vector."""
    assert found.keys() == wanted.keys()
    apart = sum(float((found[k].double() - wanted[k].double()).square().sum()) for k in wanted)
    size = sum(float(wanted[k].double().square().sum()) for k in wanted)
    return (apart / size) ** 0.5 if size else apart**0.5


def fresh_graphs() -> None:
    """Forget compiled code, so that a test's compilations do not depend on those before it."""
    torch.compiler.reset()
