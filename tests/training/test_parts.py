"""Averages, schedules, optimizers, initial weights, latents, the divergence guard, the tuner."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_run as tiny
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from ganexport.architectures._common import ConditionalBatchNorm2d, LayerNorm2d
from ganexport.checkpoint import read_checkpoint, steps_of
from ganexport.errors import DivergenceError, RecipeError
from ganexport.recipe import Ema, Guard, Optimizer, Recipe, Schedule, to_toml
from ganexport.seeding import latents
from ganexport.spec import BATCH, Dim, GeneratorSpec, Label, Normal, TensorSpec
from ganexport.training.api import train
from ganexport.training.autotune import Settings, Tuner, tune
from ganexport.training.curves import draw_curves
from ganexport.training.ema import MovingAverage
from ganexport.training.guard import DivergedError, DivergenceGuard
from ganexport.training.initialization import initialize
from ganexport.training.metrics import read_metrics
from ganexport.training.networks import check_parts
from ganexport.training.optimizers import clip_gradients, gradient_norm, make_optimizer, rate_factor
from ganexport.training.progress import Reporter
from ganexport.training.randomness import Latents
from ganexport.training.samples import tile
from ganexport.training.step import TrainingStep

CPU = torch.device("cpu")


def test_average_follows_its_formula() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = MovingAverage(module, Ema(decay=0.9, warmup=4))
    expected = {name: value.clone().double() for name, value in module.state_dict().items()}
    for step in range(30):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        module(torch.randn(8, 2))  # moves the running statistics
        average.update(step)
        decay = min(0.9, (1 + step) / (4 + step))
        for name, value in module.state_dict().items():
            floating = value.is_floating_point()
            expected[name] = decay * expected[name] + (1 - decay) * value.double() if floating else value.double()
    for name, value in average.module.state_dict().items():
        assert torch.allclose(value.double(), expected[name], atol=1e-5), name
    assert not average.module.training
    assert not any(parameter.requires_grad for parameter in average.module.parameters())


def test_schedules() -> None:
    assert [rate_factor(Schedule(), step, 10) for step in (0, 9)] == [1.0, 1.0]
    linear = Schedule(name="linear", start=0.5, final=0.2)
    assert [round(rate_factor(linear, step, 10), 3) for step in (0, 5, 6, 9)] == [1.0, 1.0, 0.84, 0.36]
    cosine = Schedule(name="cosine", warmup=4)
    assert [round(rate_factor(cosine, step, 8), 3) for step in (0, 3, 4, 6)] == [0.2, 0.8, 1.0, 0.5]
    assert rate_factor(cosine, 7, 8) > 0


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        (Optimizer(name="adam", rate=0.01, weight_decay=0.1), torch.optim.Adam),
        (Optimizer(name="adamw", rate=0.01, weight_decay=0.1), torch.optim.AdamW),
        (Optimizer(name="rmsprop", rate=0.01, alpha=0.9, momentum=0.5), torch.optim.RMSprop),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_optimizers_follow_torchs_plain_ones(settings: Optimizer, reference: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    mine = nn.Linear(3, 3)
    theirs = nn.Linear(3, 3)
    theirs.load_state_dict(mine.state_dict())
    options = {"lr": settings.rate, "eps": settings.eps, "weight_decay": settings.weight_decay}
    if settings.name == "rmsprop":
        options |= {"alpha": settings.alpha, "momentum": settings.momentum}
    else:
        options |= {"betas": settings.betas}
    optimizers = make_optimizer(settings, mine.parameters()), reference(theirs.parameters(), foreach=False, **options)
    for _ in range(5):
        x = torch.randn(4, 3)
        for module, optimizer in zip((mine, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    assert torch.allclose(mine.weight, theirs.weight, rtol=1e-5, atol=1e-6)


def test_clipping() -> None:
    layer = nn.Linear(4, 4)
    layer(torch.ones(2, 4)).sum().backward()
    norm = gradient_norm(list(layer.parameters()))
    expected = math.sqrt(sum(p.grad.square().sum().item() for p in layer.parameters()))
    assert norm.item() == pytest.approx(expected, rel=1e-5)
    clip_gradients(list(layer.parameters()), norm, 0.5)
    assert gradient_norm(list(layer.parameters())).item() == pytest.approx(0.5, rel=1e-4)
    clip_gradients(list(layer.parameters()), torch.tensor(0.5), 100.0)  # below the limit: untouched
    assert gradient_norm(list(layer.parameters())).item() == pytest.approx(0.5, rel=1e-4)


def test_normal_initialization() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(32, 64, 4), nn.BatchNorm2d(64), nn.ConvTranspose2d(64, 32, 4))
    initialize(module, "normal")
    for layer in (module[0], module[2]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert layer.bias.abs().max() == 0
    assert module[1].weight.mean().item() == pytest.approx(1.0, abs=0.02)
    before = module[0].weight.clone()
    initialize(module, "default")
    assert torch.equal(module[0].weight, before)


def test_normal_initialization_of_every_kind_of_layer() -> None:
    torch.manual_seed(0)
    conditional, embedding = ConditionalBatchNorm2d(512, 3), nn.Embedding(50, 50)
    norms = [nn.InstanceNorm2d(2048, affine=True), LayerNorm2d(2048), nn.BatchNorm2d(2048)]
    spectral = spectral_norm(nn.Conv2d(32, 64, 4))
    plain = nn.BatchNorm2d(8, affine=False)
    module = nn.Sequential(conditional, embedding, *norms, spectral, plain)
    initialize(module, "normal")
    for scale in (conditional.scale.weight, *(norm.weight for norm in norms)):
        assert scale.mean().item() == pytest.approx(1.0, abs=0.005)
        assert scale.std().item() == pytest.approx(0.02, rel=0.1)
    assert conditional.shift.weight.abs().max() == 0
    assert embedding.weight.std().item() == pytest.approx(1.0, rel=0.1)
    assert spectral.parametrizations.weight.original.std().item() == pytest.approx(0.02, rel=0.05)
    assert spectral.bias.abs().max() == 0
    # The norm that it divides by is that of the new weights.
    assert torch.linalg.matrix_norm(spectral.eval().weight.flatten(1), 2).item() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("name", ["r3gan", "stylegan2"])
def test_architectures_with_their_own_initialization_refuse_another(name: str) -> None:
    with pytest.raises(RecipeError, match=f"training.initialization: {name} has one of its own; leave it at default"):
        tiny.recipe(architecture={"name": name, "latent": 8}, training={"initialization": "normal"}, regularizers=[])


def test_latents_are_indexed_by_global_sample() -> None:
    spec = GeneratorSpec(
        (TensorSpec("z", "float32", (BATCH, 3), Normal()), TensorSpec("labels", "int64", (BATCH,), Label(10))),
        (),
        (Dim(BATCH),),
    )
    whole = Latents(spec, 5, 8, slice(0, 8), CPU)
    parts = [Latents(spec, 5, 8, rows, CPU) for rows in (slice(0, 3), slice(3, 8))]
    for number in range(3):
        drawn = [part.draw(number) for part in parts]
        for name, value in whole.draw(number).items():
            assert torch.equal(torch.cat([part[name] for part in drawn]), value)
    public = latents(spec, seed=5, n=8)
    assert not torch.equal(whole.draw(0)["z"], torch.from_numpy(public["z"]))  # training has latents of its own


def test_the_largest_seed_trains() -> None:
    tiny.trainer(tiny.recipe(training={"seed": 2**63 - 1})).advance(log=False)


def test_accumulated_parts_give_the_whole_batchs_gradients() -> None:
    found = []
    for parts in (1, 4):
        trainer = tiny.trainer(tiny.recipe(training={"accumulation": parts}))
        trainer.advance(log=False)
        found.append([p.grad.clone() for p in (*trainer.networks.d_parameters, *trainer.networks.g_parameters)])
    for whole, accumulated in zip(*found, strict=True):
        assert torch.allclose(whole, accumulated, rtol=1e-3, atol=1e-6)


def test_batches_that_do_not_go_round_the_processes_are_refused() -> None:
    check_parts(tiny.recipe(training={"batch_size": 16}), 3)
    check_parts(tiny.recipe(training={"batch_size": 12, "accumulation": 2}), 3)
    with pytest.raises(RecipeError, match="2 images are too few for 3 processes"):
        check_parts(tiny.recipe(training={"batch_size": 2}), 3)
    with pytest.raises(RecipeError, match=r"16 images .* 2 equal parts .* of 3 processes; take a multiple of 6"):
        check_parts(tiny.recipe(training={"batch_size": 16, "accumulation": 2}), 3)


def test_grid_of_images() -> None:
    import numpy as np

    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 1), np.uint8)
    grid = tile(images)
    assert grid.shape == (4, 9, 1)
    assert grid[0, ::3, 0].tolist() == [0, 1, 2]
    assert grid[2, ::3, 0].tolist() == [3, 4, 0]


# ---- divergence ------------------------------------------------------------------------------

CALM = {"d_loss": 1.0, "g_loss": 1.0, "d_gradient_norm": 1.0, "g_gradient_norm": 1.0, "real_logit": 1.0,
        "fake_logit": -1.0}  # fmt: skip


def watch(lines: list[dict[str, float]], *, log_odds: bool = True, **settings: float) -> str:
    guard = DivergenceGuard(Guard(**settings), log_odds=log_odds)
    try:
        for step, line in enumerate(lines):
            guard.look({"step": step, **CALM, **line})
    except DivergedError as seen:
        return str(seen)
    return pytest.fail("nothing was seen")


def test_guard_sees_each_kind_of_divergence() -> None:
    assert "step 1: g_loss is nan" in watch([{}, {"g_loss": math.nan}])
    assert "step 0: d_gradient_norm is inf" in watch([{"d_gradient_norm": math.inf}])
    explosion = watch([{}, {"d_loss": -2e4}, {}, *[{"d_loss": 2e4}] * 3], patience=3)
    assert "step 5: exploding for 3 logged steps: d_loss = 2e+04" in explosion
    certain = watch([{"real_logit": 20.0, "fake_logit": -20.0}] * 5, collapse=5)
    assert "step 4: the critic collapsed: it tells real from fake with certainty" in certain
    starved = watch([{"g_gradient_norm": 0.0}] * 5, collapse=5, log_odds=False)
    assert "the generator gets no gradient" in starved


def test_guard_lets_ordinary_training_pass() -> None:
    guard = DivergenceGuard(Guard(collapse=5), log_odds=False)
    for step in range(100):
        guard.look({"step": step, **CALM, "real_logit": 20.0, "fake_logit": -20.0, "d_loss": -40.0})
    assert guard.calm


WILD = {"optimizer": {"generator": {"rate": 1e9}, "discriminator": {"rate": 1e9}}, "guard": {"patience": 1}}


def test_divergence_stops_at_the_last_good_checkpoint(tmp_path: Path) -> None:
    good = tiny.trainer(tiny.recipe(), tmp_path)
    for _ in range(3):
        good.advance(log=False)
    good.save()
    wild = tiny.trainer(tiny.recipe(**WILD), tmp_path)
    wild.restore()
    with pytest.raises(DivergenceError, match=r"training diverged: step \d+: .*checkpoint 3 is the last good one"):
        wild.train()
    assert steps_of(tmp_path) == [3]
    kept = read_checkpoint(tmp_path)
    assert all(bool(torch.isfinite(value).all()) for value in kept.tensors["generator"].values())


def test_rollback_goes_on_at_a_lower_rate(tmp_path: Path) -> None:
    # At a rate of 1e9 it explodes; halved five times it still does, and that is said.
    wild = tiny.trainer(tiny.recipe(**WILD), tmp_path, rollback=True)
    with pytest.raises(DivergenceError, match="diverged after 5 rollbacks"):
        wild.train()
    assert wild.rate_scale == 0.5**5


def test_rollback_recovers(tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.recipe(training={"steps": 12, "checkpoint_every": 4}), tmp_path, rollback=True)
    look = trainer.guard.look
    seen = []

    def once(line: dict[str, float]) -> None:
        if line["step"] == 6 and not seen:
            seen.append(line)
            raise DivergedError("step 6: a planted divergence")
        look(line)

    trainer.guard.look = once  # type: ignore[method-assign]
    trainer.train()
    state = read_checkpoint(tmp_path).state
    assert (state.step, state.rollbacks, state.rate_scale) == (12, 1, 0.5)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 4, 6, 8, 10, 12]
    assert "planted" in next(line for line in lines if line.get("event") == "rollback")["why"]
    factors = [line["rate_factor"] for line in lines if "rate_factor" in line]
    assert factors == [1.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    assert draw_curves(tmp_path).is_file()


def test_resume_with_rollback_lowers_the_rate_of_a_run_that_diverged(tmp_path: Path) -> None:
    recipe = tiny.recipe(training={"steps": 8, "checkpoint_every": 4})
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    first = tiny.trainer(recipe, tmp_path)

    def planted(line: dict[str, float]) -> None:
        if line["step"] == 6:
            raise DivergedError("step 6: planted")

    first.guard.look = planted  # type: ignore[method-assign]
    with pytest.raises(DivergenceError, match="checkpoint 4 is the last good one"):
        first.train()
    assert "planted" in (tmp_path / "diverged.txt").read_text()
    assert train(None, out=tmp_path, resume=True, rollback=True).finished
    state = read_checkpoint(tmp_path).state
    assert (state.rate_scale, state.rollbacks) == (0.5, 1)
    assert not (tmp_path / "diverged.txt").exists()
    # The same command again, on a run that did not diverge, changes nothing.
    assert train(None, out=tmp_path, resume=True, rollback=True, sets=("training.steps=10",)).finished
    assert read_checkpoint(tmp_path).state.rate_scale == 0.5


# ---- tuner -----------------------------------------------------------------------------------


def test_tuner_reports_every_candidate_and_never_takes_a_slower_one() -> None:
    recipe = tiny.recipe(training={"steps": 50})  # so few that compiling cannot pay even on a busy machine
    told = []
    reporter = Reporter()
    reporter.remark = told.append  # type: ignore[method-assign]
    threads = torch.get_num_threads()
    chosen, rows = tune(recipe, tiny.images(), CPU, reporter)
    assert torch.get_num_threads() == threads
    assert [row["chosen"] for row in rows].count(True) == 1
    winner = next(row for row in rows if row["chosen"])
    baseline = rows[0]
    plain = {"precision": "fp32", "compile": "off", "cuda_graphs": False, "memory_format": "contiguous", "threads": 1}
    assert baseline["settings"] == plain
    assert winner["total_seconds"] <= baseline["total_seconds"]
    assert {row["settings"]["precision"] for row in rows} == {"fp32", "bf16", "fp16"}
    assert {row["settings"]["memory_format"] for row in rows} == {"contiguous", "channels_last"}
    compiled = [row for row in rows if row["settings"]["compile"] != "off"]
    assert compiled
    assert "would not pay" in compiled[0]["note"]
    timed = [row for row in rows if row["step_ms"] is not None and not row["note"].startswith("given up")]
    assert all(len(row["samples_ns"]) >= 3 for row in timed)
    assert chosen.training.precision == winner["settings"]["precision"]
    assert any(winner["name"] in text for text in told)


def test_the_tuned_choice_belongs_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import msgspec

    import ganexport.training.autotune as module

    def choose(recipe: Recipe, *_: object) -> tuple[Recipe, list[dict[str, object]]]:
        training = msgspec.structs.replace(recipe.training, precision="bf16", memory_format="channels_last")
        return msgspec.structs.replace(recipe, training=training), [{"name": "bf16", "chosen": True}]

    monkeypatch.setattr(module, "tune", choose)  # a choice that differs from the recipe on any machine
    recipe, run = str(tiny.write(tmp_path)), tmp_path / "run"
    sets = ("training.steps=4", "training.checkpoint_every=2")
    first = train(recipe, out=run, sets=sets, tune=True)
    assert first.recipe["training"]["precision"] == "bf16"
    assert (run / "tuning.json").is_file()
    # The command that started the run also goes on with it, and keeps the choice.
    for tuned in (True, False):
        assert train(recipe, out=run, sets=sets, tune=tuned, resume=True).already_finished
    longer = train(recipe, out=run, sets=("training.steps=6",), tune=True, resume=True)
    assert longer.recipe["training"]["precision"] == "bf16"
    assert longer.recipe["training"]["memory_format"] == "channels_last"


def test_tuner_refuses_unsound_and_failing_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = Tuner(tiny.recipe(), tiny.images(), CPU, Reporter())
    tuner.time(Settings("fp32", "off", "contiguous", 1))
    monkeypatch.setattr(Tuner, "_direction", lambda self, trainer: 0.2)
    assert "unsound" in tuner.time(Settings("bf16", "off", "contiguous", 1)).note
    failing = tuner.time(Settings("tf32", "off", "contiguous", 1))
    assert "tf32" in failing.note
    assert failing.step_ms is None
    assert tuner._better(tuner.rows[0], tuner.rows[1]) is tuner.rows[0]


def test_tuner_refuses_float16_whose_gradients_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    original = TrainingStep._backward

    def overflowing(self: TrainingStep, name: str, loss: torch.Tensor) -> None:
        original(self, name, loss)
        for parameter in self.networks[name].parameters():
            if self.precision == "fp16" and parameter.grad is not None:
                parameter.grad.fill_(torch.inf)

    # Three steps are enough, and all that a CPU without a float16 backward can do.
    monkeypatch.setattr("ganexport.training.autotune.MAX_STEPS", 3)
    tuner = Tuner(tiny.recipe(), tiny.images(), CPU, Reporter())
    assert tuner.time(Settings("fp32", "off", "contiguous", 1)).note == ""
    fp16 = Settings("fp16", "off", "contiguous", 1)
    sound = tuner.time(fp16)
    assert sound.note == ""
    assert sound.cosine is not None
    assert sound.cosine > 0.99
    monkeypatch.setattr(TrainingStep, "_backward", overflowing)
    assert "cosine nan" in tuner.time(fp16).note
    monkeypatch.setattr(Tuner, "_direction", lambda self, trainer: 1.0)
    assert "most updates are skipped" in tuner.time(fp16).note


def test_tuner_gives_up_on_a_candidate_that_is_far_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = Tuner(tiny.recipe(), tiny.images(), CPU, Reporter())
    settings = Settings("fp32", "off", "contiguous", 1)
    assert len(tuner.time(settings).samples_ns) > 3
    monkeypatch.setattr(tuner, "_best_seconds", 1e-9)
    behind = tuner.time(settings)
    assert len(behind.samples_ns) == 3
    assert behind.step_ms is not None
    assert not behind.note


def test_tuner_gives_up_at_once_on_a_candidate_whose_steps_take_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    import ganexport.training.autotune as module

    monkeypatch.setattr(module, "LOST_SECONDS", 0.0)
    tuner = Tuner(tiny.recipe(), tiny.images(), CPU, Reporter())
    settings = Settings("fp32", "off", "contiguous", 1)
    first = tuner.time(settings)
    monkeypatch.setattr(tuner, "_best_seconds", 1e-9)
    behind = tuner.time(settings)
    assert len(behind.samples_ns) == 1
    assert "times the best's" in behind.note
    assert tuner._better(first, behind) is first


class Clockwork(Tuner):
    """A tuner whose candidates take given times; something else slows the machine during the first timings."""

    spoilt = 0
    asked = 0

    def _trainer(self, settings: Settings):  # type: ignore[no-untyped-def]
        return SimpleNamespace(networks=SimpleNamespace(finite=lambda: True, scaler_states=dict))

    def _direction(self, trainer: object) -> float:
        return 1.0

    def _steps(self, trainer: object, settings: Settings, count: int) -> list[int]:
        self.asked += 1
        faster = (1.7 if settings.precision == "bf16" else 1.0) * (1.6 if settings.threads == 2 else 1.0)
        return [int(1e8 / faster * (3 if self.asked <= self.spoilt else 1))] * count


@pytest.mark.parametrize("spoilt", [0, 2])
def test_tuner_finds_the_best_threads_again_when_something_else_ran_during_the_first_timing(
    spoilt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ganexport.training.autotune as module

    monkeypatch.setattr(module, "float16_slowdown", lambda: 99.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    tuner = Clockwork(tiny.recipe(training={"steps": 50, "threads": 2}), tiny.images(), CPU, Reporter())
    tuner.spoilt = spoilt  # spoilt: eager fp32 with 2 threads, so that 1 thread seems better
    chosen = tuner.run()
    assert (chosen.settings.precision, chosen.settings.threads) == ("bf16", 2)
    assert sum(row.chosen for row in tuner.rows) == 1


def test_tuner_takes_the_runner_up_when_the_lead_does_not_repeat() -> None:
    tuner = Clockwork(tiny.recipe(training={"steps": 50}), tiny.images(), CPU, Reporter())
    first = tuner.time(Settings("fp32", "off", "contiguous", 1))
    fast = tuner.time(Settings("bf16", "off", "contiguous", 2))
    lucky = tuner.time(Settings("fp32", "off", "channels_last", 2))
    lucky.total_seconds = 0.9 * seconds_of(fast)
    assert tuner._confirm(lucky, first) is fast
    assert "did not repeat" in lucky.note
    assert seconds_of(fast) < seconds_of(first)


def seconds_of(row: object) -> float:
    """The row's seconds, which it has."""
    assert row.total_seconds is not None  # type: ignore[attr-defined]
    return row.total_seconds  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize(("slowdown", "tried"), [(20.0, False), (0.6, True)])
def test_tuner_tries_float16_where_it_is_not_hopeless(
    slowdown: float, tried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ganexport.training.autotune as module

    assert 0.01 < module.float16_slowdown() < 1000
    monkeypatch.setattr(module, "float16_slowdown", lambda: slowdown)
    tuner = Tuner(tiny.recipe(), tiny.images(), CPU, Reporter())
    assert list(tuner._precisions()) == (["bf16", "fp16"] if tried else ["bf16"])
    assert ["20 times float32's" in row.note for row in tuner.rows] == ([] if tried else [True])
