"""What is trained and what trains it: both networks, average, optimizers, the step, data and latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ganexport.data import ImageSet
from ganexport.data.feed import Feed
from ganexport.data.fit import fit
from ganexport.errors import DataError, RecipeError
from ganexport.recipe import Recipe, component_options, registries
from ganexport.seeding import philox
from ganexport.spec import GeneratorSpec, Label, OneHot
from ganexport.training.distributed import Group
from ganexport.training.ema import MovingAverage
from ganexport.training.initialization import initialize
from ganexport.training.optimizers import make_optimizer
from ganexport.training.precision import needs_scaler
from ganexport.training.randomness import Latents, seed_everything
from ganexport.training.step import TrainingStep
from ganexport.training.transfer import Transferred, check_freezable, freeze, start_from

#: Second counter word of the interpolation's random places.
_STREAM = 0x65707369  # "epsi"
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Networks:
    """Everything a step works with, freshly made from a recipe's seed.

    Args:
        recipe: Resolved.
        images: Of the model's size.
        group: The processes of the job.
        device: Of this process.

    Attributes:
        generator, discriminator: In training mode, on the device.
        average: The generator's moving average, or None.
        engine: Loss and gradients of both.
        share: This process's part of a batch, 0 to 1.
    """

    def __init__(self, recipe: Recipe, images: ImageSet, group: Group, device: torch.device) -> None:
        training = recipe.training
        self.recipe, self.device, self.seed = recipe, device, training.seed
        check_parts(recipe, group.world)
        seed_everything(training.seed)
        self.generator, self.discriminator, self.spec = build(recipe)
        for network in (self.generator, self.discriminator):
            initialize(network, training.initialization)
            network.to(device=device, memory_format=_FORMATS[training.memory_format]).train()  # type: ignore[call-overload]
        self.conditional = any(isinstance(tensor.sampler, Label | OneHot) for tensor in self.spec.inputs)
        if recipe.transfer.freeze_discriminator:
            shape = [int(size) for size in self.spec.outputs[0].shape[1:]]
            example = torch.zeros(4, *shape, device=device)
            labels = torch.zeros(4, dtype=torch.int64, device=device) if self.conditional else None
            freeze(self.discriminator, recipe.transfer.freeze_discriminator, example, labels)
        group.share_weights([self.generator, self.discriminator])
        self.average = MovingAverage(self.generator, recipe.ema) if recipe.ema.decay > 0 else None
        self.g_parameters = list(self.generator.parameters())
        self.d_parameters = list(self.discriminator.parameters())
        self.g_optimizer = make_optimizer(recipe.optimizer.generator, self.g_parameters)
        self.d_optimizer = make_optimizer(recipe.optimizer.discriminator, self.d_parameters)
        scaled = needs_scaler(training.precision)
        self.g_scaler = torch.amp.GradScaler(device.type) if scaled else None
        self.d_scaler = torch.amp.GradScaler(device.type) if scaled else None
        self.engine = self._engine(group)
        self.feed = Feed(
            images,
            training.batch_size,
            seed=training.seed,
            device=device,
            rank=group.rank,
            world=group.world,
            workers=recipe.data.workers,
        )
        rows = self.feed.rows
        self.share = (rows.stop - rows.start) / training.batch_size
        self.latents = Latents(self.spec, training.seed, training.batch_size, rows, device)
        # The fused kernel draws places itself; where processes share a batch, and on the CPU (so that one
        # process and several agree), they are a function of the global sample instead.
        between = any(module.POINTS in ("between", "perturbed") for module, _ in self.engine.penalties)
        self._places = between and (group.world > 1 or device.type == "cpu")
        seed_everything((training.seed * 1_000_003 + group.rank) % 2**63)

    def _engine(self, group: Group) -> TrainingStep:
        known, recipe = registries(), self.recipe
        regularizers = []
        for component in recipe.regularizers:
            module = known["regularizers"].load(component.name)
            regularizers.append((module, component_options(component, module)))
        return TrainingStep(
            self.generator,
            self.discriminator,
            known["objective"].load(recipe.objective.name),
            regularizers,
            precision=recipe.training.precision,
            compile=recipe.training.compile,
            cuda_graphs=recipe.training.cuda_graphs,
            loss_scale_d=self.d_scaler,
            loss_scale_g=self.g_scaler,
            seed=(self.seed + group.rank * 0x9E3779B1) % 2**63,
        )

    def transfer(self) -> tuple[Transferred, ...]:
        """Take over the weights of ``transfer.init_from``; the average starts from them too.

        Raises:
            CheckpointError, UsageError: As :func:`ganexport.training.transfer.start_from`.
        """
        taken = start_from(self.recipe.transfer.init_from, self.generator, self.discriminator)
        check_freezable(taken, self.recipe.transfer.freeze_discriminator)
        if self.average is not None:
            self.average.module.load_state_dict(self.generator.state_dict())
        return taken

    def batch(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Real images [b, C, H, W] of a batch in the recipe's memory format; labels [b] for conditional models only."""
        images, labels = self.feed.batch(number)
        images = images.contiguous(memory_format=_FORMATS[self.recipe.training.memory_format])
        return images, labels if self.conditional else None

    def places(self, number: int) -> Tensor | None:
        """Places between real and generated images of discriminator update ``number``, [b] in [0, 1), or None."""
        if not self._places:
            return None
        rows, batch = self.feed.rows, self.feed.batch_size
        samples = np.arange(number * batch + rows.start, number * batch + rows.stop, dtype=np.uint64)
        words = philox(np.array([self.seed], np.uint64), _STREAM, samples, 1)[:, 0]
        return torch.from_numpy(((words >> np.uint32(8)) * np.float32(2.0**-24)).astype(np.float32)).to(self.device)

    def evaluated(self) -> nn.Module:
        """A generator in evaluation mode: the average, or the trained one without an average."""
        if self.average is not None:
            return self.average.module
        copy, _, _ = build(self.recipe, generator_only=True)
        copy.to(self.device).load_state_dict(self.generator.state_dict())
        return copy.eval()

    def finite(self) -> bool:
        """Whether no weight is NaN or infinite."""
        norms = torch._foreach_norm([*self.g_parameters, *self.d_parameters])
        return bool(torch.isfinite(torch.stack(norms)).all())

    def scaler_states(self) -> dict[str, Any]:
        """States of the gradient scalers; empty without fp16."""
        scalers = {"generator": self.g_scaler, "discriminator": self.d_scaler}
        return {name: scaler.state_dict() for name, scaler in scalers.items() if scaler is not None}

    def restore_scalers(self, states: dict[str, Any]) -> None:
        """Put back what :meth:`scaler_states` gave."""
        for name, scaler in (("generator", self.g_scaler), ("discriminator", self.d_scaler)):
            if scaler is not None and name in states:
                scaler.load_state_dict(states[name])


def check_parts(recipe: Recipe, world: int) -> None:
    """Refuse a batch that leaves a process without images, or accumulated parts of different sizes.

    Raises:
        RecipeError: With the sizes that do.
    """
    batch, parts = recipe.training.batch_size, recipe.training.accumulation
    if batch < world:
        raise RecipeError(f"training.batch_size: {batch} images are too few for {world} processes")
    if parts > 1 and batch % (world * parts):
        raise RecipeError(
            f"training.batch_size: {batch} images do not divide into {parts} equal parts (training.accumulation) "
            f"in each of {world} processes; take a multiple of {world * parts}"
        )


def build(recipe: Recipe, *, generator_only: bool = False) -> tuple[nn.Module, nn.Module, GeneratorSpec]:
    """Generator, discriminator and spec of a recipe, weights from torch's global generator.

    Args:
        recipe: Resolved.
        generator_only: Leave the discriminator out (an empty module stands there) and torch's global
            generator as it was.
    """
    module = registries()["architecture"].load(recipe.architecture.name)
    options = component_options(recipe.architecture, module)
    if generator_only:
        with torch.random.fork_rng(devices=[]):
            return module.generator(options), nn.Module(), module.spec(options)
    return module.generator(options), module.discriminator(options), module.spec(options)


def model_size(recipe: Recipe) -> tuple[int, int, int]:
    """(H, W, C) of the images that a recipe's model takes and makes.

    Raises:
        RecipeError: Its architecture has no image output of fixed size.
    """
    output = _spec(recipe).image_output
    if output is None or output.layout != "NCHW" or not all(isinstance(size, int) for size in output.shape[1:]):
        raise RecipeError(f"architecture {recipe.architecture.name}: has no image output of fixed size to train on")
    channels, height, width = (int(size) for size in output.shape[1:])
    return height, width, channels


def fitted(recipe: Recipe, images: ImageSet) -> ImageSet:
    """The images as the recipe's model takes them.

    Raises:
        DataError: Another size or number of channels and no way named to mend it, or labels missing.
    """
    size = model_size(recipe)
    inputs = _spec(recipe).inputs
    classes = [tensor.sampler.classes for tensor in inputs if isinstance(tensor.sampler, Label | OneHot)]
    if classes and images.labels is None:
        raise DataError(f"{images.name}: has no labels, which the class-conditional {recipe.architecture.name} needs")
    if classes and images.labels is not None and int(images.labels.max()) >= classes[0]:
        found = int(images.labels.max()) + 1
        raise DataError(
            f"{images.name}: has {found} classes, the model {classes[0]}: --set architecture.classes={found}"
        )
    return fit(images, size, recipe.data.fit)


def _spec(recipe: Recipe) -> GeneratorSpec:
    module = registries()["architecture"].load(recipe.architecture.name)
    spec: GeneratorSpec = module.spec(component_options(recipe.architecture, module))
    return spec
