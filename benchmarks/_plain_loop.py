"""The usual training loop, as GAN tutorials and papers' code write it: eager, float32, nothing of ganexport's engine.

The yardstick of ``benchmarks/training.py``. Networks, data and rates are the recipe's; the rest is plain PyTorch: real
and generated images through the discriminator one after the other, the penalty by ``torch.autograd.grad`` with
``create_graph``, the generator's backward through the whole discriminator, torch's default optimizers, an average kept
by a loop over the parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, relu, softplus

from ganexport.data import ImageSet
from ganexport.recipe import Optimizer, Recipe
from ganexport.training.initialization import initialize
from ganexport.training.networks import build


def _optimizer(settings: Optimizer, network: nn.Module) -> torch.optim.Optimizer:
    if settings.name == "rmsprop":
        return torch.optim.RMSprop(network.parameters(), lr=settings.rate, alpha=settings.alpha)
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(network.parameters(), lr=settings.rate, betas=settings.betas)


class PlainLoop:
    """One training.

    Args:
        recipe: Resolved.
        images: Of the model's size.
    """

    def __init__(self, recipe: Recipe, images: ImageSet) -> None:
        self.recipe = recipe
        torch.manual_seed(recipe.training.seed)
        self.generator, self.discriminator, self.spec = build(recipe)
        for network in (self.generator, self.discriminator):
            initialize(network, recipe.training.initialization)
        self.average, _, _ = build(recipe)
        self.average.load_state_dict(self.generator.state_dict())
        self.average.eval()
        self.d_optimizer = _optimizer(recipe.optimizer.discriminator, self.discriminator)
        self.g_optimizer = _optimizer(recipe.optimizer.generator, self.generator)
        pixels = torch.from_numpy(images.array().copy()).permute(0, 3, 1, 2)
        self.pixels = pixels.float().div(127.5).sub(1.0).contiguous()  # [N, C, H, W]
        labels = images.labels if any(tensor.name == "labels" for tensor in self.spec.inputs) else None
        self.labels = torch.from_numpy(labels) if labels is not None else None
        self.order = torch.randperm(len(self.pixels))
        self.position = 0
        self.updates = 0
        self.step = 0

    # ---- data --------------------------------------------------------------------------------

    def _real(self) -> tuple[Tensor, Tensor | None]:
        size = self.recipe.training.batch_size
        if self.position + size > len(self.order):
            self.order, self.position = torch.randperm(len(self.pixels)), 0
        chosen = self.order[self.position : self.position + size]
        self.position += size
        return self.pixels[chosen], self.labels[chosen] if self.labels is not None else None

    def _inputs(self) -> dict[str, Tensor]:
        size = self.recipe.training.batch_size
        found = {}
        for tensor in self.spec.inputs:
            shape = tensor.resolve({"batch": size})
            if tensor.name == "labels":
                found["labels"] = torch.randint(0, int(self.recipe.architecture.options["classes"]), shape)
            else:
                found[tensor.name] = torch.randn(shape)
        return found

    def _score(self, images: Tensor, labels: Tensor | None) -> Tensor:
        logits: Tensor = self.discriminator(images) if labels is None else self.discriminator(images, labels)
        return logits

    # ---- one step ----------------------------------------------------------------------------

    def advance(self) -> tuple[Tensor, Tensor]:
        """``n_critic`` updates of the discriminator and one of the generator; their last losses."""
        schedule, steps = self.recipe.schedule, self.recipe.training.steps
        if schedule.name == "linear":
            begin = int(schedule.start * steps)
            done = max(0.0, (self.step - begin) / max(1, steps - begin))
            factor = schedule.final + (1 - schedule.final) * (1 - done)
            self.d_optimizer.param_groups[0]["lr"] = factor * self.recipe.optimizer.discriminator.rate
            self.g_optimizer.param_groups[0]["lr"] = factor * self.recipe.optimizer.generator.rate
        for _ in range(self.recipe.training.n_critic):
            real, labels = self._real()
            d_loss = self._update_discriminator(real, labels)
        inputs = self._inputs()
        self.g_optimizer.zero_grad()
        fake_logits = self._score(self.generator(**inputs), inputs.get("labels"))
        real_logits = self._score(real, labels) if self.recipe.objective.name == "relativistic" else None
        g_loss = self._generator_loss(fake_logits, real_logits)
        g_loss.backward()
        self.g_optimizer.step()
        if self.recipe.ema.decay:
            decay = min(self.recipe.ema.decay, (1 + self.step) / (self.recipe.ema.warmup + self.step))
            with torch.no_grad():
                for mine, theirs in zip(
                    self.average.state_dict().values(), self.generator.state_dict().values(), strict=True
                ):
                    if mine.is_floating_point():
                        mine.mul_(decay).add_(theirs, alpha=1 - decay)
                    else:
                        mine.copy_(theirs)
        self.step += 1
        return d_loss, g_loss

    def _update_discriminator(self, real: Tensor, labels: Tensor | None) -> Tensor:
        inputs = self._inputs()
        self.d_optimizer.zero_grad()
        fake = self.generator(**inputs).detach()
        fake_labels = inputs.get("labels")
        real_logits = self._score(real, labels)
        fake_logits = self._score(fake, fake_labels)
        loss = self._discriminator_loss(real_logits, fake_logits)
        for component in self.recipe.regularizers:
            options = component.options
            if self.updates % options.get("interval", 1) == 0 and component.name != "weight-clipping":
                loss = loss + self._penalty(component.name, options, real, fake, labels, fake_labels)
        loss.backward()
        self.d_optimizer.step()
        for component in self.recipe.regularizers:
            if component.name == "weight-clipping":
                for parameter in self.discriminator.parameters():
                    parameter.data.clamp_(-component.options["bound"], component.options["bound"])
        self.updates += 1
        return loss

    def _penalty(
        self,
        name: str,
        options: dict[str, Any],
        real: Tensor,
        fake: Tensor,
        labels: Tensor | None,
        fake_labels: Tensor | None,
    ) -> Tensor:
        weight = options["weight"] * options.get("interval", 1)
        if name == "gradient-penalty":
            places = torch.rand(len(real), 1, 1, 1)
            points = (places * real + (1 - places) * fake).requires_grad_()
        else:
            points = {"r1": real, "r2": fake}[name].detach().clone().requires_grad_()
        scores = self._score(points, fake_labels if name == "r2" else labels)
        (slope,) = torch.autograd.grad(scores.sum(), points, create_graph=True)
        squares: Tensor = slope.square().sum((1, 2, 3))  # [N]
        if name == "gradient-penalty":
            distance = (squares + 1e-12).sqrt() - options["target"]
            return torch.mul(distance.square().mean(), weight)
        return torch.mul(squares.mean(), weight / 2)

    def _discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        name = self.recipe.objective.name
        if name == "wasserstein":
            return fake.mean() - real.mean()
        if name == "hinge":
            return relu(1 - real).mean() + relu(1 + fake).mean()
        if name == "least-squares":
            return 0.5 * ((real - 1).square().mean() + fake.square().mean())
        if name == "relativistic":
            return softplus(fake - real).mean()
        return -logsigmoid(real).mean() - logsigmoid(-fake).mean()

    def _generator_loss(self, fake: Tensor, real: Tensor | None) -> Tensor:
        name = self.recipe.objective.name
        if name == "least-squares":
            return 0.5 * (fake - 1).square().mean()
        if real is not None:
            return softplus(real - fake).mean()
        if name == "non-saturating":
            return -logsigmoid(fake).mean()
        if name == "minimax":
            return logsigmoid(-fake).mean()
        return -fake.mean()
