"""The two halves of a GAN's update: loss and gradients of the discriminator, loss and gradients of the generator.

Each half, the double backward of a gradient penalty included, is one function that ``torch.compile`` captures with
``fullgraph=True``; ``backward()`` follows outside. Optimizers, averaging and logging belong to the loop.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ganexport.errors import RecipeError, UsageError
from ganexport.kernels.gradient_penalty import interpolate, make_rng_state
from ganexport.objectives.regularizers._convolution import teach_compiler
from ganexport.objectives.regularizers._options import scores_and_gradient
from ganexport.training import precision as precisions
from ganexport.training.replay import CudaGraph, Updates
from ganexport.training.spectral import make_capturable

COMPILE_MODES = ("off", "default", "reduce-overhead", "max-autotune", "aot_eager")
_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}

Metrics = dict[str, Tensor]

_COPIES = itertools.count()


class TrainingStep:
    """Loss and gradients of both networks.

    Args:
        generator: ``forward(**inputs)`` gives images [N, C, H, W].
        discriminator: ``forward(images)`` or ``forward(images, labels)`` gives raw logits [N].
        loss: A module of :data:`ganexport.objectives.OBJECTIVES`.
        regularizers: Pairs of a module of :data:`ganexport.objectives.regularizers.REGULARIZERS` and its options.
        precision: "fp32", "tf32", "bf16" or "fp16".
        compile: "off", a mode of ``torch.compile``, or "aot_eager" (captured and differentiated, not lowered).
        cuda_graphs: Capture each kind of update, compiled or not, and replay it; torch.compile makes no graphs of its
            own then.
        loss_scale_d: ``GradScaler`` of the discriminator, for fp16.
        loss_scale_g: ``GradScaler`` of the generator, for fp16.
        seed: Of the interpolation between real and generated images.

    Attributes:
        rng_state: [2] int64, the state of the interpolation; belongs into a checkpoint.

    Raises:
        RecipeError: A combination that cannot be right, with the reason.
        UsageError: A precision, or CUDA graphs, that the device does not have.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        loss: ModuleType,
        regularizers: Sequence[tuple[ModuleType, Any]] = (),
        *,
        precision: str = "fp32",
        compile: str = "off",  # noqa: A002 - the recipe's word
        cuda_graphs: bool = False,
        loss_scale_d: Any = None,
        loss_scale_g: Any = None,
        seed: int = 0,
    ) -> None:
        if compile not in COMPILE_MODES:
            raise RecipeError(f"unknown compile mode {compile!r}; known: {', '.join(COMPILE_MODES)}")
        self.networks = {"generator": generator, "discriminator": discriminator}
        self.loss = loss
        self.penalties = [(module, options) for module, options in regularizers if hasattr(module, "penalty")]
        self.clippings = [(module, options) for module, options in regularizers if hasattr(module, "after_update")]
        self.precision = precision
        self.compile = _WITHOUT_GRAPHS.get(compile, compile) if cuda_graphs else compile
        self.scalers = {"discriminator": loss_scale_d, "generator": loss_scale_g}
        self.device = next(discriminator.parameters()).device
        self.rng_state = make_rng_state(seed, self.device)
        self._compiled: dict[Any, Callable[..., Any]] = {}
        check_device(precision, self.device, cuda_graphs=cuda_graphs)
        self._updates = Updates(lambda: CudaGraph(self.device)) if cuda_graphs else None
        self._parameters = {name: list(network.parameters()) for name, network in self.networks.items()}
        precisions.apply(precision, self.device)
        if self.penalties:
            refuse_batch_norm(discriminator)
        # Statistics over the batch must not mix real with generated images; without them one pass does for both.
        self._separate = any(is_batch_coupled(module) for module in discriminator.modules())
        self._repeatable = is_repeatable(discriminator)
        if self.compile != "off":
            for network in self.networks.values():
                make_capturable(network)

    # ---- discriminator ------------------------------------------------------------------------

    def discriminator(
        self,
        real: Tensor,
        inputs: Mapping[str, Tensor],
        labels: Tensor | None = None,
        *,
        step: int,
        epsilon: Tensor | None = None,
    ) -> Metrics:
        """Add the gradients of the discriminator's loss to its parameters' ``.grad``.

        Args:
            real: Real images [N, C, H, W] in [-1, 1].
            inputs: The generator's inputs by name, z [N, latent] and so on.
            labels: Class labels [N] of the real images, for conditional discriminators.
            step: Number of this discriminator update; penalties with an interval look at it.
            epsilon: [N] places between real (1) and generated (0) images; drawn here when None. Given by the
                loop where several processes share a batch.

        Returns:
            Detached scalars: "loss", "real_score", "fake_score", and one entry a penalty.
        """
        active = tuple(
            index for index, (_, options) in enumerate(self.penalties) if step % options.interval == 0
        )  # which penalties are due

        def update(real: Tensor, inputs: dict[str, Tensor], labels: Tensor | None, epsilon: Tensor | None) -> Metrics:
            return self._discriminator_update(active, real, inputs, labels, epsilon)

        return self._run_update("discriminator", active, update, real, dict(inputs), labels, epsilon)

    def _discriminator_update(
        self,
        active: tuple[int, ...],
        real: Tensor,
        inputs: dict[str, Tensor],
        labels: Tensor | None,
        epsilon: Tensor | None,
    ) -> Metrics:
        self._begin()
        with torch.no_grad():
            fake = precisions.full(self._run("generate", self._generate, inputs))
            fake_labels = inputs.get("labels") if labels is not None else None
            points = {index: self._points(self.penalties[index], real, fake, epsilon) for index in active}
        metrics = self._run(
            ("discriminator", active), self._discriminator_loss, active, real, fake, points, labels, fake_labels
        )
        self._backward("discriminator", metrics["loss"])
        return {name: value.detach().clone() for name, value in metrics.items()}

    def _discriminator_loss(
        self,
        active: tuple[int, ...],
        real: Tensor,
        fake: Tensor,
        points: dict[int, Tensor],
        labels: Tensor | None,
        fake_labels: Tensor | None,
    ) -> Metrics:
        gradients: dict[str, Tensor] = {}
        places = {self.penalties[index][0].POINTS for index in active if self._shares_pass(index)}
        if places:
            real_logits, fake_logits, gradients = self._scores_and_gradients(places, real, fake, labels, fake_labels)
        else:
            real_logits, fake_logits = self._both_scores(real, fake, labels, fake_labels)
        total = self.loss.discriminator_loss(real_logits, fake_logits)
        metrics = {"real_score": real_logits.mean(), "fake_score": fake_logits.mean()}
        for index in active:
            module, options = self.penalties[index]
            if self._shares_pass(index):
                value = module.of_gradient(options, gradients[module.POINTS], options.weight * options.interval)
            else:
                value = self._penalty(index, points[index], fake_labels if module.POINTS == "fake" else labels)
            metrics[_name(module)] = value / options.interval
            total = total + value
        return {"loss": total, **metrics}

    def _both_scores(
        self, real: Tensor, fake: Tensor, labels: Tensor | None, fake_labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits of real and of generated images, [N] and [N], in one pass where the critic allows it."""
        with precisions.autocast(self.precision, self.device.type):
            if self._separate:
                real_logits, fake_logits = self._score(real, labels), self._score(fake, fake_labels)
            else:
                real_logits, fake_logits = self._score(torch.cat([real, fake]), _joined(labels, fake_labels)).split(
                    [real.shape[0], fake.shape[0]]
                )
        return precisions.full(real_logits), precisions.full(fake_logits)

    # ---- penalties at the images that are scored anyway ----------------------------------------

    def _shares_pass(self, index: int) -> bool:
        """Whether a penalty takes its gradient from the pass that scores the images."""
        return self._repeatable and hasattr(self.penalties[index][0], "of_gradient")

    def _scores_and_gradients(
        self, places: set[str], real: Tensor, fake: Tensor, labels: Tensor | None, fake_labels: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Logits as :meth:`_both_scores`, and the critic's gradient [N, C, H, W] at "real" and "fake" as wanted."""
        scale = precisions.inner_scale(self.precision)
        if len(places) == 2 and not self._separate:
            count = [real.shape[0], fake.shape[0]]
            critic = self._critic(_joined(labels, fake_labels))
            logits, gradient = scores_and_gradient(critic, torch.cat([real, fake]), scale)
            at_real, at_fake = gradient.split(count)
            real_logits, fake_logits = logits.split(count)
            return real_logits, fake_logits, {"real": at_real, "fake": at_fake}
        logits_of: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        for place, images, its_labels in (("real", real, labels), ("fake", fake, fake_labels)):
            if place in places:
                found = scores_and_gradient(self._critic(its_labels), images, scale)
                logits_of[place], gradients[place] = found
            else:
                with precisions.autocast(self.precision, self.device.type):
                    logits_of[place] = precisions.full(self._score(images, its_labels))
        return logits_of["real"], logits_of["fake"], gradients

    def _critic(self, labels: Tensor | None) -> Callable[[Tensor], Tensor]:
        """The discriminator as a function of images that can be differentiated twice."""

        def critic(images: Tensor) -> Tensor:
            # Attention's fused kernels have no second derivative; its math form has.
            with precisions.autocast(self.precision, self.device.type), sdpa_kernel(SDPBackend.MATH):
                return self._score(images, labels)

        return critic

    def _penalty(self, index: int, points: Tensor, labels: Tensor | None) -> Tensor:
        module, options = self.penalties[index]
        scale = precisions.inner_scale(self.precision)
        weight = options.weight * options.interval
        value: Tensor = module.penalty(options, self._critic(labels), points, weight, scale)
        return value

    def _points(self, penalty: tuple[ModuleType, Any], real: Tensor, fake: Tensor, epsilon: Tensor | None) -> Tensor:
        module, options = penalty
        where = module.POINTS
        if where == "real":
            return real
        if where == "fake":
            return fake
        other = fake
        if where == "perturbed":
            noise = torch.rand_like(real, dtype=torch.float32).to(real.dtype)  # the same numbers in every precision
            other = real + options.strength * real.std() * noise
        if epsilon is None:
            return interpolate(real, other, self.rng_state)
        weight = epsilon.view(-1, *[1] * (real.ndim - 1))  # [N, 1, 1, 1]
        return other + weight * (real - other)

    def _score(self, images: Tensor, labels: Tensor | None) -> Tensor:
        network = self.networks["discriminator"]
        logits: Tensor = network(images) if labels is None else network(images, labels)
        return logits

    def after_discriminator_update(self, step: int) -> None:
        """What follows the discriminator's optimizer step: weight clipping."""
        for module, options in self.clippings:
            if step % options.interval == 0:
                module.after_update(options, self.networks["discriminator"])

    # ---- generator ----------------------------------------------------------------------------

    def generator(
        self, real: Tensor | None, inputs: Mapping[str, Tensor], labels: Tensor | None = None, *, step: int
    ) -> Metrics:
        """Add the gradients of the generator's loss to its parameters' ``.grad``.

        Args:
            real: Real images [N, C, H, W], needed by relativistic losses only.
            inputs: The generator's inputs by name.
            labels: Class labels [N] of the real images.
            step: Number of this update.

        Returns:
            Detached scalars: "loss", "fake_score".
        """
        if not getattr(self.loss, "NEEDS_REAL", False):
            real = None
        return self._run_update("generator", (), self._generator_update, real, dict(inputs), labels)

    def _generator_update(self, real: Tensor | None, inputs: dict[str, Tensor], labels: Tensor | None) -> Metrics:
        discriminator = self.networks["discriminator"]
        self._begin()
        trained = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
        discriminator.requires_grad_(False)
        try:
            metrics = self._run("generator", self._generator_loss, real, inputs, labels)
            self._backward("generator", metrics["loss"])
        finally:
            for parameter in trained:  # frozen ones stay frozen
                parameter.requires_grad_(True)
        return {name: value.detach().clone() for name, value in metrics.items()}

    def _generator_loss(self, real: Tensor | None, inputs: dict[str, Tensor], labels: Tensor | None) -> Metrics:
        with precisions.autocast(self.precision, self.device.type):
            fake = self.networks["generator"](**inputs)
            fake_logits = self._score(fake, inputs.get("labels") if labels is not None else None)
            real_logits = None if real is None else self._score(real, labels)
        fake_logits = precisions.full(fake_logits)
        loss = self.loss.generator_loss(fake_logits, None if real_logits is None else precisions.full(real_logits))
        return {"loss": loss, "fake_score": fake_logits.mean()}

    def _generate(self, inputs: dict[str, Tensor]) -> Tensor:
        with precisions.autocast(self.precision, self.device.type):
            images: Tensor = self.networks["generator"](**inputs)
        return images

    # ---- both ---------------------------------------------------------------------------------

    def _run_update(
        self, name: str, active: tuple[int, ...], update: Callable[..., Metrics], *arguments: Any
    ) -> Metrics:
        if self._updates is None:
            return update(*arguments)
        return self._updates.run((name, active), self._parameters[name], update, *arguments)

    def _run(self, key: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        if self.compile == "off":
            return function(*arguments)
        if key not in self._compiled:
            self._compiled[key] = compiled(function, self.compile)
        return self._compiled[key](*arguments)

    @property
    def replays(self) -> bool:
        """Whether CUDA graphs are replayed: gradients then lie in memory that the next update writes to."""
        return self.device.type == "cuda" and self.compile in ("reduce-overhead", "max-autotune")

    def _begin(self) -> None:
        """Let CUDA graphs reuse the memory of the last update's results; within an update they stay."""
        if self.replays:
            torch.compiler.cudagraph_mark_step_begin()

    def _backward(self, name: str, loss: Tensor) -> None:
        scaler = self.scalers[name]
        (loss if scaler is None else scaler.scale(loss)).backward()


def check_device(precision: str, device: torch.device, *, cuda_graphs: bool) -> None:
    """Refuse what a device cannot do.

    Raises:
        UsageError: With what it can.
    """
    precisions.check(precision, device)
    if cuda_graphs and device.type != "cuda":
        raise UsageError(f"training.cuda_graphs: needs a GPU, the device is {device}; leave it off")


def compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """``torch.compile`` without graph breaks, for fixed shapes.

    Args:
        function: A method. It is compiled from a copy of its code, because torch counts recompilations a code
            object: without the copy, many steps in one process (a tuner's candidates) would share one limit.
        mode: One of :data:`COMPILE_MODES` but "off".
    """
    original = function.__func__  # type: ignore[attr-defined]
    code = original.__code__.replace(co_name=f"{original.__name__}_{next(_COPIES)}")
    copy = types.FunctionType(
        code, original.__globals__, original.__name__, original.__defaults__, original.__closure__
    )
    method = types.MethodType(copy, function.__self__)  # type: ignore[attr-defined]
    if mode == "aot_eager":
        return torch.compile(method, fullgraph=True, dynamic=False, backend="aot_eager")
    teach_compiler()
    return torch.compile(method, fullgraph=True, dynamic=False, mode=mode)


def is_batch_coupled(module: nn.Module) -> bool:
    """Whether a layer's output for one image depends on the others of its batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or bool(getattr(module, "batch_coupled", False))


def is_repeatable(module: nn.Module) -> bool:
    """Whether a second pass over the same images gives the same scores: nothing random, no state that a pass changes.

    Spectral normalisation's vectors and dropout make the answer no.
    """
    random = (nn.modules.dropout._DropoutNd, nn.RReLU)
    return next(module.buffers(), None) is None and not any(isinstance(part, random) for part in module.modules())


def refuse_batch_norm(discriminator: nn.Module) -> None:
    """Refuse batch normalisation under a gradient regularizer.

    Raises:
        RecipeError: The discriminator holds a BatchNorm layer.
    """
    for name, module in discriminator.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise RecipeError(
                f"the discriminator's layer {name!r} is a batch normalisation, which a gradient penalty cannot go "
                "with: it penalises each image's own gradient, and batch statistics couple the images (Gulrajani et "
                "al. 2017, section 4); choose the architecture's norm = 'none', 'layer' or 'instance'"
            )


def _joined(labels: Tensor | None, others: Tensor | None) -> Tensor | None:
    return None if labels is None or others is None else torch.cat([labels, others])


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]
