"""One cell of the objective x regularizer x architecture matrix, built small, and its gradients."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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
#: Options of networks with every kind of layer and fewer of each, for what takes long a layer: compiling.
SMALLER: dict[str, dict] = {
    "dcgan": {"image_size": 16},
    "resnet": {"image_size": 16},
    "sagan": {"image_size": 16, "attention": 8},
    "r3gan": {"image_size": 8},
    "stylegan2": {"image_size": 8, "mapping_layers": 1},
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

    def drawn(self, number: int) -> Cell:
        """The same networks with other images and inputs."""
        dtype = self.real.dtype
        inputs = inputs_of(self.spec, BATCH, seed=number)
        inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        rng = torch.Generator().manual_seed(3 + number)
        real = torch.rand(BATCH, *self.spec.outputs[0].shape[1:], generator=rng).mul(2).sub(1).to(dtype)
        return self._replace(real=real, inputs=inputs, labels=inputs.get("labels"))


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
    empty = torch.empty(0, dtype=dtype)
    return Cell(generator, discriminator, spec, step, empty, {}, None).drawn(0)


class NearestKink(TorchDispatchMode):
    """Smallest nonzero input of a ReLU or leaky ReLU seen, over the largest of the same tensor."""

    INPUT: ClassVar = {"relu": 0, "leaky_relu": 0, "threshold_backward": 1, "leaky_relu_backward": 1}

    def __init__(self) -> None:
        super().__init__()
        self.nearest = float("inf")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        place = self.INPUT.get(func.overloadpacket._qualified_op_name.removeprefix("aten::"))
        if place is not None:
            sizes = args[place].detach().abs()
            sizes = sizes[sizes > 0]
            if sizes.numel():
                self.nearest = min(self.nearest, float(sizes.min() / sizes.max()))
        return func(*args, **(kwargs or {}))


def smooth_draw(objective: str, regularized: str, architecture: str, more: dict) -> int:
    """Number of a draw for which no float32 rounding can move an activation over its kink.

    Where an input lies within rounding of zero, the gradients of a piecewise linear network are a matter of chance, in
    eager mode as in any other, and say nothing about who computed them. Decided in float64, without looking at results.
    """
    for number in range(20):
        cell = build(objective, regularized, architecture, dtype=torch.float64, more=more).drawn(number)
        with NearestKink() as kink:
            cell.critic()
            cell.generate()
        if kink.nearest > 2e-6:
            return number
    raise AssertionError("no draw keeps away from the kinks")


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
