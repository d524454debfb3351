"""The training step against losses and penalties written out by hand, and everything it promises or refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ganexport.errors import RecipeError, UsageError
from ganexport.objectives import OBJECTIVES
from ganexport.objectives.regularizers import REGULARIZERS
from ganexport.training.step import TrainingStep, is_repeatable

sys.path.insert(0, str(Path(__file__).parent))
from cells import PLACES, REGULARIZED, build, fresh_graphs, gradients, relative

DOUBLE = torch.float64


def by_hand(cell, regularized: str, objective: str) -> dict[str, torch.Tensor]:
    """The critic's gradients in plain eager autograd, one network call a batch, nothing shared with the library."""
    real, labels, critic = cell.real, cell.labels, cell.discriminator

    def score(images):
        return critic(images) if labels is None else critic(images, labels)

    def slopes(points):
        points = points.detach().requires_grad_()
        (slope,) = torch.autograd.grad(score(points).sum(), points, create_graph=True)
        return (slope.square().sum((1, 2, 3)) + 1e-12).sqrt()  # the root's guard, as documented

    with torch.no_grad():
        fake = cell.generator(**cell.inputs)
    places = torch.tensor(PLACES, dtype=real.dtype).view(-1, 1, 1, 1)
    a, b = score(real), score(fake)
    log = nn.functional.logsigmoid
    total = {
        "wasserstein": lambda: b.mean() - a.mean(),
        "non-saturating": lambda: -log(a).mean() - log(-b).mean(),
        "relativistic": lambda: -log(a - b).mean(),
    }[objective]()
    for name, options in REGULARIZED[regularized]:
        if name == "gradient-penalty":
            excess = slopes(places * real + (1 - places) * fake) - options.get("target", 1.0)
            total = total + 10.0 * (excess.clamp(min=0) if options.get("sides") == "one" else excess).pow(2).mean()
        elif name == "dragan":
            torch.manual_seed(5)
            noise = torch.rand(real.shape).to(real.dtype)
            perturbed = real + 0.5 * real.std() * noise
            total = total + 10.0 * (slopes(places * real + (1 - places) * perturbed) - 1).pow(2).mean()
        elif name in ("r1", "r2"):
            weight = options.get("weight", 10.0) * options.get("interval", 1)
            total = total + weight / 2 * slopes(real if name == "r1" else fake).pow(2).mean()
    critic.zero_grad()
    total.backward()
    found = gradients(critic)
    critic.zero_grad()
    return found


@pytest.mark.parametrize("architecture", ["dcgan-mnist/0", "resnet/0", "resnet/1", "sagan/0", "r3gan/1", "stylegan2/1"])
@pytest.mark.parametrize("regularized", sorted(set(REGULARIZED) - {"clipping"}))
def test_gradients_are_the_formulas(regularized, architecture):
    objective = "relativistic" if regularized == "r1+r2" else "wasserstein"
    cell = build(objective, regularized, architecture, dtype=DOUBLE)
    cell.generator.eval()  # the moving statistics would differ between the two computations
    cell.discriminator.eval()  # and so would spectral normalisation's vectors
    assert relative(cell.critic(), by_hand(cell, regularized, objective)) < 1e-9


def test_bce_is_sigmoid_then_binary_cross_entropy():
    cell = build("non-saturating", "none", "dcgan-mnist/0", dtype=DOUBLE)
    found = cell.critic()
    with torch.no_grad():
        fake = cell.generator(**cell.inputs)
    cell.discriminator.zero_grad()
    entropy = nn.BCELoss()
    real, fake = (torch.sigmoid(cell.discriminator(x)) for x in (cell.real, fake))
    (entropy(real, torch.ones_like(real)) + entropy(fake, torch.zeros_like(fake))).backward()
    assert relative(found, gradients(cell.discriminator)) < 1e-12


def test_a_lazy_penalty_acts_at_its_interval_with_its_weight_multiplied():
    lazy, plain, none = (build("wasserstein", name, "dcgan-mnist/0", dtype=DOUBLE) for name in ("r1", "r2", "none"))
    plain = build("wasserstein", "none", "dcgan-mnist/0", dtype=DOUBLE)
    plain.step.penalties = [(REGULARIZERS.load("r1"), REGULARIZERS.load("r1").Options())]
    without, every = none.critic(), plain.critic()
    for step in range(9):
        found = lazy.critic(step)
        wanted = {k: without[k] + 4 * (every[k] - without[k]) for k in without} if step % 4 == 0 else without
        assert relative(found, wanted) < 1e-12, step
    assert "r1" in lazy.metrics(4)
    assert "r1" not in lazy.metrics(5)
    torch.testing.assert_close(lazy.metrics(4)["r1"], plain.metrics(0)["r1"])  # reported at its own weight


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("regularized", ["two-sided", "one-sided", "r1+r2"])
def test_a_flat_critic_gives_finite_gradients(regularized, precision):
    cell = build("wasserstein", regularized, "dcgan-mnist/0", precision=precision)
    for parameter in cell.discriminator.parameters():
        nn.init.zeros_(parameter)
    found = cell.critic()
    assert all(torch.isfinite(value).all() for value in found.values())


@pytest.mark.parametrize("regularized", ["two-sided", "r1"])
def test_halves_add_up_to_the_whole(regularized):
    cell = build("non-saturating", regularized, "dcgan-mnist/0", dtype=DOUBLE)
    whole = cell.critic()
    cell.discriminator.zero_grad()
    places = torch.tensor(PLACES, dtype=DOUBLE)
    for part in (slice(0, 2), slice(2, 4)):
        inputs = {name: value[part] for name, value in cell.inputs.items()}
        cell.step.discriminator(cell.real[part], inputs, None, step=0, epsilon=places[part])
    halves = {name: value / 2 for name, value in gradients(cell.discriminator).items()}
    assert relative(halves, whole) < 1e-12


def test_each_network_gets_its_own_gradients_only():
    cell = build("relativistic", "r1+r2", "r3gan/0")
    cell.critic()
    assert gradients(cell.generator) == {}
    before = gradients(cell.discriminator)
    cell.generate()
    assert relative(gradients(cell.discriminator), before) == 0
    assert all(parameter.requires_grad for parameter in cell.discriminator.parameters())


def largest(network: nn.Module) -> float:
    return max(float(parameter.detach().abs().max()) for parameter in network.parameters())


def test_weights_are_clipped_after_an_update():
    cell = build("wasserstein", "clipping", "dcgan-mnist/0")
    optimizer = torch.optim.RMSprop(cell.discriminator.parameters(), lr=5e-2)
    for step in range(3):
        cell.critic(step)
        optimizer.step()
        assert largest(cell.discriminator) > 0.05
        cell.step.after_discriminator_update(step)
        assert largest(cell.discriminator) <= 0.05 * (1 + 1e-6)


@pytest.mark.parametrize("regularized", ["two-sided", "one-sided", "dragan", "r1", "r2"])
def test_batch_normalisation_under_a_penalty_is_refused_with_the_reason(regularized):
    with pytest.raises(RecipeError, match=r"batch statistics couple the images \(Gulrajani"):
        build("wasserstein", regularized, "dcgan/0", more={"norm": "batch"})
    build("non-saturating", "none", "dcgan/0", more={"norm": "batch"}).critic()
    build("wasserstein", "clipping", "dcgan/0", more={"norm": "batch"}).critic()


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(RecipeError, match="unknown compile mode 'fast'"):
        build("wasserstein", "none", "dcgan-mnist/0", compile="fast")
    with pytest.raises(UsageError, match="unknown precision 'fp8'"):
        build("wasserstein", "none", "dcgan-mnist/0", precision="fp8")
    with pytest.raises(UsageError, match="tf32 is a mode of NVIDIA GPUs"):
        build("wasserstein", "none", "dcgan-mnist/0", precision="tf32")
    for module in (REGULARIZERS.load(name) for name in ("r1", "r2", "dragan", "gradient-penalty")):
        with pytest.raises(RecipeError):
            module.Options(interval=0)
        with pytest.raises(RecipeError):
            module.Options(weight=-1.0)
    with pytest.raises(RecipeError):
        REGULARIZERS.load("weight-clipping").Options(bound=0.0)


@pytest.mark.parametrize("regularized", ["none", "two-sided", "r1+r2"])
def test_fp16_with_a_scaler_has_fp32s_gradients(regularized):
    wanted = build("non-saturating", regularized, "dcgan-mnist/0").critic()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    cell = build("non-saturating", regularized, "dcgan-mnist/0", precision="fp16", loss_scale_d=scaler)
    cell.critic()
    scaler.unscale_(torch.optim.SGD(cell.discriminator.parameters(), lr=0.1))
    assert relative(gradients(cell.discriminator), wanted) < 0.02


def test_a_nan_reaches_the_loss():
    cell = build("wasserstein", "two-sided", "dcgan-mnist/0")
    cell.real[1, 0, 3, 3] = torch.nan
    assert cell.metrics(0)["loss"].isnan()


def test_lazy_steps_never_recompile():
    fresh_graphs()
    cell = build("non-saturating", "r1", "dcgan-mnist/0", compile="aot_eager")
    for step in (0, 1):
        cell.critic(step)
        cell.generate(step)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(2, 10):
            cell.critic(step)
            cell.generate(step)


def test_many_steps_in_one_process_do_not_share_a_recompilation_limit():
    fresh_graphs()
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(4):
            build("wasserstein", "none", "dcgan-mnist/0", compile="aot_eager").critic()


def test_minibatch_statistics_never_mix_real_and_generated_images():
    cell = build("wasserstein", "none", "stylegan2/0")
    seen = []
    cell.discriminator.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    cell.critic()
    assert seen == [4, 4]


@pytest.mark.parametrize(
    ("regularized", "architecture", "expected"),
    [
        ("none", "dcgan-mnist/0", [8]),
        ("r1+r2", "dcgan-mnist/0", [8]),
        ("r1", "dcgan-mnist/0", [4, 4]),  # real with its gradient, generated without
        ("r2", "dcgan-mnist/0", [4, 4]),
        ("r1+r2", "sagan/0", [8, 4, 4]),  # every pass changes spectral normalisation's vectors: none is left out
        ("two-sided", "dcgan-mnist/0", [8, 4]),
    ],
)
def test_images_that_are_scored_anyway_are_not_scored_again_for_their_penalty(regularized, architecture, expected):
    cell = build("non-saturating", regularized, architecture)
    seen = []
    cell.discriminator.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    cell.critic()
    assert seen == expected


def test_dropout_forbids_sharing_a_pass():
    assert is_repeatable(nn.Sequential(nn.Linear(2, 2), nn.LeakyReLU()))
    assert not is_repeatable(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    assert not is_repeatable(nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)))


def test_a_step_of_any_modules():
    """Networks from elsewhere: nothing of ours is needed but the call."""

    class Flat(nn.Module):
        def __init__(self, *layers):
            super().__init__()
            self.layers = nn.Sequential(*layers)

        def forward(self, z):
            return self.layers(z)

    class Critic(Flat):
        def forward(self, images):
            return self.layers(images.flatten(1)).squeeze(1)

    generator = Flat(nn.Linear(3, 16), nn.Tanh(), nn.Unflatten(1, (1, 4, 4)))
    penalty = REGULARIZERS.load("gradient-penalty")
    step = TrainingStep(generator, Critic(nn.Linear(16, 1)), OBJECTIVES.load("hinge"), [(penalty, penalty.Options())])
    metrics = step.discriminator(torch.rand(5, 1, 4, 4), {"z": torch.randn(5, 3)}, step=0)
    assert set(metrics) == {"loss", "real_score", "fake_score", "gradient_penalty"}
    assert not any(value.requires_grad for value in metrics.values())
