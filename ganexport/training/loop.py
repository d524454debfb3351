"""The training loop: alternating updates, averages, metrics, samples, checkpoints, and how it ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ganexport.artifact import write_atomic
from ganexport.checkpoint import State, Tensors, load_state, read_checkpoint, remove_after, steps_of, write_checkpoint
from ganexport.data import ImageSet
from ganexport.errors import CheckpointError, DivergenceError, InterruptedBySignalError
from ganexport.recipe import Optimizer, Recipe
from ganexport.training.distributed import Group
from ganexport.training.guard import DivergedError, DivergenceGuard
from ganexport.training.metrics import MetricsWriter
from ganexport.training.networks import Networks
from ganexport.training.optimizers import (
    clip_gradients,
    gradient_norm,
    load_optimizer,
    optimizer_tensors,
    rate_factor,
    set_rate,
)
from ganexport.training.progress import Reporter
from ganexport.training.randomness import random_states, restore_random_states
from ganexport.training.samples import SampleGrid, write_png
from ganexport.training.signals import StopRequest

#: What a rollback multiplies both rates by, and how often training may go back.
ROLLBACK_FACTOR = 0.5
MAX_ROLLBACKS = 5
#: Left in the run when it diverged; what ``--resume --rollback`` looks for.
DIVERGED_FILE = "diverged.txt"

Part = Callable[[Tensor, dict[str, Tensor], Tensor | None], dict[str, Tensor]]


class Trainer:
    """One process's part of a training.

    Args:
        recipe: Resolved; device and threads are concrete.
        images: Of the model's size.
        group: The processes of the job.
        device: Of this process.
        run: The run's folder; None writes nothing (timing, tests).
        reporter: Told of what happens.
        rollback: On divergence, go back to the last checkpoint with a lower rate instead of stopping.
    """

    def __init__(
        self,
        recipe: Recipe,
        images: ImageSet,
        *,
        group: Group,
        device: torch.device,
        run: Path | None = None,
        reporter: Reporter | None = None,
        rollback: bool = False,
    ) -> None:
        self.recipe, self.images, self.group, self.device, self.run = recipe, images, group, device, run
        self.reporter = reporter or Reporter()
        self.rollback = rollback
        self.step = 0
        self.rate_scale = 1.0
        self.rollbacks = 0
        self._stop_agreed = False
        self._writer: MetricsWriter | None = None
        self._grid: SampleGrid | None = None
        self._build()

    def _build(self) -> None:
        self.networks = Networks(self.recipe, self.images, self.group, self.device)
        log_odds = self.recipe.objective.name in ("non-saturating", "minimax")
        self.guard = DivergenceGuard(self.recipe.guard, log_odds=log_odds)

    # ---- one step ----------------------------------------------------------------------------

    def advance(self, *, log: bool, stop: bool = False) -> dict[str, float] | None:
        """One generator update after ``n_critic`` discriminator updates.

        Args:
            log: Measure gradient norms and return the step's metrics.
            stop: This process's wish to stop; :attr:`_stop_agreed` says what the group decided.

        Returns:
            Metrics averaged over all processes, or None.
        """
        networks, n_critic = self.networks, self.recipe.training.n_critic
        factor = self.rate_scale * rate_factor(self.recipe.schedule, self.step, self.recipe.training.steps)
        set_rate(networks.d_optimizer, factor * self.recipe.optimizer.discriminator.rate)
        set_rate(networks.g_optimizer, factor * self.recipe.optimizer.generator.rate)
        first = self.step * (n_critic + 1)
        measured: dict[str, Tensor] = {}
        for critic_update in range(n_critic):
            number = self.step * n_critic + critic_update
            real, labels = networks.batch(number)
            inputs = networks.latents.draw(first + critic_update)
            found = self._update_discriminator(real, inputs, labels, number, log and critic_update == n_critic - 1)
            measured = {f"d_{name}": value for name, value in found.items()}
        inputs = networks.latents.draw(first + n_critic)
        found = self._update_generator(real, inputs, labels, log, stop)
        measured |= {f"g_{name}": value for name, value in found.items()}
        if networks.average is not None:
            networks.average.update(self.step)
        self.step += 1
        return self._line(measured, factor) if log else None

    def _update_discriminator(
        self, real: Tensor, inputs: dict[str, Tensor], labels: Tensor | None, number: int, log: bool
    ) -> dict[str, Tensor]:
        networks = self.networks
        places = iter(self._parts(networks.places(number), real.shape[0]))

        def part(real: Tensor, inputs: dict[str, Tensor], labels: Tensor | None) -> dict[str, Tensor]:
            return networks.engine.discriminator(real, inputs, labels, step=number, epsilon=next(places))

        networks.d_optimizer.zero_grad(set_to_none=True)
        measured = self._accumulate(part, networks.d_parameters, real, inputs, labels)
        self.group.average_gradients(networks.d_parameters, networks.share)
        self._apply("discriminator", self.recipe.optimizer.discriminator, measured, log)
        networks.engine.after_discriminator_update(number)
        return measured

    def _update_generator(
        self, real: Tensor, inputs: dict[str, Tensor], labels: Tensor | None, log: bool, stop: bool
    ) -> dict[str, Tensor]:
        networks = self.networks

        def part(real: Tensor, inputs: dict[str, Tensor], labels: Tensor | None) -> dict[str, Tensor]:
            return networks.engine.generator(real, inputs, labels, step=self.step)

        networks.g_optimizer.zero_grad(set_to_none=True)
        measured = self._accumulate(part, networks.g_parameters, real, inputs, labels)
        self._stop_agreed = self.group.average_gradients(networks.g_parameters, networks.share, stop)
        self._apply("generator", self.recipe.optimizer.generator, measured, log)
        return measured

    def _rows(self, count: int) -> list[slice]:
        parts = self.recipe.training.accumulation
        return [slice(count * i // parts, count * (i + 1) // parts) for i in range(parts)]

    def _parts(self, values: Tensor | None, count: int) -> list[Tensor | None]:
        return [values[chosen] if values is not None else None for chosen in self._rows(count)]

    def _accumulate(
        self,
        part: Part,
        parameters: list[nn.Parameter],
        real: Tensor,
        inputs: dict[str, Tensor],
        labels: Tensor | None,
    ) -> dict[str, Tensor]:
        """Run a batch in equal parts; the gradients are then those of the whole batch's mean loss."""
        if self.recipe.training.accumulation == 1:
            return dict(part(real, inputs, labels))
        count = real.shape[0]
        found = []
        for chosen in self._rows(count):
            mine = {name: value[chosen] if value.shape[:1] == (count,) else value for name, value in inputs.items()}
            found.append(part(real[chosen], mine, labels[chosen] if labels is not None else None))
            if len(found) == 1 and self.networks.engine.replays:
                _own_gradients(parameters)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_div_(gradients, float(len(found)))
        return {name: torch.stack([metrics[name] for metrics in found]).mean(0) for name in found[0]}

    def _apply(self, which: str, settings: Optimizer, measured: dict[str, Tensor], log: bool) -> None:
        """Unscale, measure, clip, and let the optimizer take its step."""
        networks = self.networks
        discriminates = which == "discriminator"
        optimizer = networks.d_optimizer if discriminates else networks.g_optimizer
        parameters = networks.d_parameters if discriminates else networks.g_parameters
        scaler = networks.d_scaler if discriminates else networks.g_scaler
        if scaler is not None:
            scaler.unscale_(optimizer)
        if log or settings.clip_norm:
            norm = gradient_norm(parameters)
            measured["gradient_norm"] = norm
            if settings.clip_norm:
                clip_gradients(parameters, norm, settings.clip_norm)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()

    def _line(self, measured: dict[str, Tensor], factor: float) -> dict[str, float]:
        """The step's metrics as numbers (one wait for the device), averaged over all processes."""
        names = list(measured)
        values = torch.stack([measured[name].detach().float().reshape(()) for name in names])
        numbers = self.group.average(values, self.networks.share).tolist()
        line: dict[str, float] = {"step": self.step, **dict(zip(names, numbers, strict=True))}
        return _diagnostics(line, log_odds=self.guard.log_odds) | {"rate_factor": factor}

    # ---- the run -----------------------------------------------------------------------------

    def train(self) -> None:
        """Train to the recipe's last step, writing the run.

        Raises:
            DivergenceError: Diverged; the last checkpoint is good.
            InterruptedBySignalError: SIGTERM or Ctrl-C; a checkpoint was written.
            OutputError: The disk is full; the last checkpoint is good.
        """
        self._open_writer()
        self.reporter.start(self.step, self.recipe.training.steps)
        try:
            with StopRequest() as stop:
                while True:
                    try:
                        self._steps(stop)
                        break
                    except DivergedError as seen:
                        self._diverged(str(seen))
        finally:
            self.reporter.stop()
            if self._writer is not None:
                self._writer.close()

    def _open_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self.run is not None and self.group.leads:
            self._writer = MetricsWriter(self.run, self.step, tensorboard=self.recipe.logging.tensorboard)
        if self.run is not None and self.group.leads and self._grid is None:
            samples = self.recipe.logging.samples
            self._grid = SampleGrid(self.networks.spec, samples, self.recipe.training.seed, self.device)

    def _steps(self, stop: StopRequest) -> None:
        training, logging = self.recipe.training, self.recipe.logging
        clock, counted = time.perf_counter(), self.step
        while self.step < training.steps:
            following = self.step + 1
            last = following == training.steps
            log = last or following % logging.every == 0
            line = self.advance(log=log, stop=stop.signal is not None)
            if line is not None:
                now = time.perf_counter()
                speed = (self.step - counted) * training.batch_size / max(now - clock, 1e-9)
                self._record({**line, "images_per_second": round(speed, 2)})
                clock, counted = now, self.step
            self.reporter.step(self.step)
            if last or self.step % logging.sample_every == 0:
                self._sample()
            if last or self._stop_agreed or self.step % training.checkpoint_every == 0:
                self.save()
            if self._stop_agreed and not last:
                raise InterruptedBySignalError(self._stopped_text(stop), exit_code=stop.exit_code)

    def _stopped_text(self, stop: StopRequest) -> str:
        name = stop.name if stop.signal is not None else "a signal to another process"
        if self.run is None or not steps_of(self.run):
            return f"stopped by {name} at step {self.step}; no checkpoint was kept"
        kept = steps_of(self.run)[-1]
        return f"stopped by {name} at step {self.step}; checkpoint {kept} is kept: go on with --resume --out {self.run}"

    def _record(self, line: dict[str, float]) -> None:
        if self._writer is not None:
            self._writer.write(line)
        self.reporter.metrics(line)
        # Under a gradient scaler an overflowing gradient is normal: its step is skipped and the scale lowered.
        scaled = self.networks.g_scaler is not None
        self.guard.look({name: value for name, value in line.items() if not (scaled and name.endswith("_norm"))})

    def _sample(self) -> None:
        if self._grid is None or self.run is None:
            return
        pixels = self._grid.draw(self.networks.evaluated())
        write_png(self.run / "samples" / f"{self.step:08d}.png", pixels)
        if self._writer is not None:
            self._writer.image("samples", pixels, self.step)

    # ---- checkpoints -------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint, unless something suspicious is going on.

        Raises:
            DivergedError: A weight is NaN or infinite.
            OutputError: The disk is full.
        """
        if not self.networks.finite():
            raise DivergedError(f"step {self.step}: a weight is NaN or infinite")
        if self.run is None or not self.guard.calm:
            return
        states = self.group.gather(random_states(self.device))
        if self.group.leads:
            write_checkpoint(self.run, self._state(), self._tensors(states), self.recipe.training.keep)
        self.group.barrier()

    def _state(self) -> State:
        return State(
            step=self.step,
            threads=torch.get_num_threads(),
            world=self.group.world,
            data=self.images.digest,
            rate_scale=self.rate_scale,
            rollbacks=self.rollbacks,
            finished=self.step >= self.recipe.training.steps,
            torch=torch.__version__.partition("+")[0],
            extra={"guard": self.guard.state(), "scalers": self.networks.scaler_states()},
        )

    def _tensors(self, states: list[dict[str, Tensor]]) -> dict[str, Tensors]:
        networks = self.networks
        tensors = {
            "generator": dict(networks.generator.state_dict()),
            "discriminator": dict(networks.discriminator.state_dict()),
            "generator_optimizer": optimizer_tensors(networks.g_optimizer),
            "discriminator_optimizer": optimizer_tensors(networks.d_optimizer),
            "interpolation": {"rng_state": networks.engine.rng_state},
            "random": {f"{rank}.{name}": value for rank, state in enumerate(states) for name, value in state.items()},
        }
        if networks.average is not None:
            tensors["ema"] = dict(networks.average.module.state_dict())
        return tensors

    def restore(self, step: int | None = None) -> None:
        """Go on from a checkpoint of the run (the newest when ``step`` is None).

        Raises:
            CheckpointError: Damaged, of other data, or of another architecture.
        """
        assert self.run is not None
        path, state, tensors = read_checkpoint(self.run, step)
        if state.data != self.images.digest:
            raise CheckpointError(f"{self.run}: was trained on other images than {self.images.name}; give its --data")
        networks = self.networks
        load_state(networks.generator, tensors["generator"], str(path))
        load_state(networks.discriminator, tensors["discriminator"], str(path))
        load_optimizer(networks.g_optimizer, tensors["generator_optimizer"], str(path))
        load_optimizer(networks.d_optimizer, tensors["discriminator_optimizer"], str(path))
        if networks.average is not None:
            load_state(networks.average.module, tensors["ema"], str(path))
        networks.engine.rng_state.copy_(tensors["interpolation"]["rng_state"])
        self.guard.restore(state.extra.get("guard", {}))
        networks.restore_scalers(state.extra.get("scalers", {}))
        self.step, self.rate_scale, self.rollbacks = state.step, state.rate_scale, state.rollbacks
        mine = {
            name.partition(".")[2]: value
            for name, value in tensors["random"].items()
            if name.partition(".")[0] == str(self.group.rank)
        }
        if mine:
            restore_random_states(mine, self.device)
        if state.world != self.group.world:
            self.reporter.remark(
                f"trained by {state.world} processes until now, by {self.group.world} from here: "
                "the rest is not bit for bit what it would have been"
            )

    # ---- divergence --------------------------------------------------------------------------

    def _diverged(self, seen: str) -> None:
        kept = steps_of(self.run) if self.run is not None else []
        back = f"checkpoint {kept[-1]} is the last good one" if kept else "there was no checkpoint yet"
        if not self.rollback or self.rollbacks >= MAX_ROLLBACKS:
            tried = f" after {self.rollbacks} rollbacks" if self.rollbacks else ""
            advice = (
                "try other rates or a penalty"
                if tried
                else "go on from it at a lower rate with --resume --rollback, or try other rates or a penalty"
            )
            if self.run is not None and self.group.leads:
                write_atomic(self.run / DIVERGED_FILE, f"{seen}\n".encode())
            raise DivergenceError(f"training diverged{tried}: {seen}; {back}: {advice}")
        rollbacks, scale = self.rollbacks + 1, self.rate_scale * ROLLBACK_FACTOR
        self.group.barrier()  # nobody reads the folder before everybody stopped writing to it
        if kept:
            self.restore(kept[-1])
            self.guard = DivergenceGuard(self.recipe.guard, log_odds=self.guard.log_odds)
        else:
            self.step = 0
            self._build()
            if self.recipe.transfer.init_from:
                self.networks.transfer()
        self.lower_rate(scale, rollbacks, f"{seen}; back to step {self.step}")

    def lower_rate(self, scale: float, rollbacks: int, why: str) -> None:
        """Go on at a lower rate from here, and keep that in the checkpoint."""
        self.rate_scale, self.rollbacks = scale, rollbacks
        if self.run is not None and self.group.leads:
            remove_after(self.run, self.step)
        self._open_writer()
        if self._writer is not None:
            self._writer.write({"step": self.step, "event": "rollback", "rate_scale": scale, "why": why})
        if self.step:
            self.save()
        if self.run is not None and self.group.leads:
            (self.run / DIVERGED_FILE).unlink(missing_ok=True)
        self.reporter.remark(f"rollback {rollbacks}: {why}; rates are now {scale:g} times the recipe's")


def _own_gradients(parameters: list[nn.Parameter]) -> None:
    """Move gradients out of the memory that a CUDA graph writes to, so that its next replay does not change them."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()


def _diagnostics(line: Mapping[str, float], *, log_odds: bool) -> dict[str, float]:
    """The metrics under the names people know, in a fixed order."""
    known: dict[str, Any] = {"step": line["step"], "d_loss": line["d_loss"], "g_loss": line["g_loss"]}
    real, fake = line.get("d_real_score"), line.get("d_fake_score")
    if real is not None and fake is not None:
        known |= {"real_logit": real, "fake_logit": fake, "wasserstein_estimate": real - fake}
        if log_odds:
            known |= {"D(x)": _sigmoid(real), "D(G(z))": _sigmoid(fake)}
    rest = {name: value for name, value in line.items() if name not in known and not name.endswith("_score")}
    penalties = [value for name, value in rest.items() if name.startswith("d_") and not name.endswith("_norm")]
    return known | rest | ({"penalty": sum(penalties)} if penalties else {})


def _sigmoid(x: float) -> float:
    if not math.isfinite(x):
        return x
    return 1 / (1 + math.exp(-x)) if x >= 0 else 1 - 1 / (1 + math.exp(x))
