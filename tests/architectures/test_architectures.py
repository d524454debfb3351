"""Every architecture: shapes, ranges, gradients, export with a symbolic batch; and the survey's exact networks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ganexport.architectures import ARCHITECTURES
from ganexport.architectures._common import MinibatchStddev
from ganexport.errors import RecipeError

sys.path.insert(0, str(Path(__file__).parent))
from small import CASES, SMALL, inputs_of, options


def test_every_architecture_is_tested():
    assert set(SMALL) == set(ARCHITECTURES.names())


@pytest.mark.parametrize(("name", "number"), CASES)
def test_shapes_ranges_and_gradients(name, number):
    module, chosen = ARCHITECTURES.load(name), options(name, number)
    torch.manual_seed(0)
    generator, discriminator, spec = module.generator(chosen), module.discriminator(chosen), module.spec(chosen)
    for network in (generator, discriminator):
        for parameter in network.parameters():
            if parameter.abs().sum() == 0:  # layers and gates that start at zero hold gradients back
                torch.nn.init.normal_(parameter, std=0.1)
    inputs = inputs_of(spec, 4)
    images = generator(**inputs)
    assert images.shape == spec.outputs[0].resolve({"batch": 4})
    assert images.abs().max() <= 1
    assert images.std() > 1e-4
    labels = inputs.get("labels")
    logits = discriminator(images) if labels is None else discriminator(images, labels)
    assert logits.shape == (4,)
    logits.sum().backward()
    for network in (generator, discriminator):
        assert [key for key, p in network.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []


@pytest.mark.parametrize(("name", "number"), CASES)
def test_images_depend_on_their_own_inputs_alone_in_evaluation(name, number):
    module, chosen = ARCHITECTURES.load(name), options(name, number)
    torch.manual_seed(0)
    generator, spec = module.generator(chosen).eval(), module.spec(chosen)
    inputs = inputs_of(spec, 5)
    with torch.inference_mode():
        whole = generator(**inputs)
        part = generator(**{key: value[3:4] for key, value in inputs.items()})
    torch.testing.assert_close(whole[3:4], part, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_symbolic_batch_survives_capture(name, number):
    module, chosen = ARCHITECTURES.load(name), options(name, number)
    torch.manual_seed(0)
    generator, spec = module.generator(chosen).eval(), module.spec(chosen)
    batch = torch.export.Dim("batch", min=1, max=64)
    example = inputs_of(spec, 3)
    program = torch.export.export(
        generator, (), example, dynamic_shapes={key: {0: batch} for key in example}, strict=False
    )
    with torch.inference_mode():
        for n in (1, 7):
            inputs = inputs_of(spec, n, seed=n)
            torch.testing.assert_close(program.module()(**inputs), generator(**inputs), atol=1e-5, rtol=1e-4)


def test_the_surveys_networks():
    module = ARCHITECTURES.load("dcgan-mnist")
    chosen = module.Options()
    generator, discriminator = module.generator(chosen), module.discriminator(chosen)
    shapes = [tuple(p.shape) for p in generator.parameters()]
    assert shapes == [(6272, 100), (6272,), (128, 64, 4, 4), (64,), (64, 1, 4, 4), (1,)]
    assert sum(p.numel() for p in generator.parameters()) == 633_472 + 131_136 + 1_025
    mirrored = [tuple(p.shape) for p in discriminator.parameters()]
    assert mirrored == [(64, 1, 4, 4), (64,), (128, 64, 4, 4), (128,), (1, 6272), (1,)]
    convolutions = [generator.up1, generator.up2, discriminator.down1, discriminator.down2]
    assert all((c.kernel_size, c.stride, c.padding) == ((4, 4), (2, 2), (1, 1)) for c in convolutions)
    assert generator.project.in_features == 100


@pytest.mark.parametrize("size", [14, 28, 32, 64, 128])
@pytest.mark.parametrize("name", ["dcgan", "resnet", "sagan", "r3gan", "stylegan2"])
def test_all_sizes_of_the_papers_and_of_mnist(name, size):
    more = {"attention": {14: 0, 28: 14}.get(size, 16)} if name == "sagan" else {}
    module, chosen = ARCHITECTURES.load(name), options(name, 0, image_size=size, **more)
    generator, discriminator = module.generator(chosen), module.discriminator(chosen)
    inputs = inputs_of(module.spec(chosen), 2)
    images = generator(**inputs)
    assert images.shape[-2:] == (size, size)
    labels = inputs.get("labels")
    assert (discriminator(images) if labels is None else discriminator(images, labels)).shape == (2,)


def test_seven_times_a_power_of_two_starts_and_ends_at_seven():
    shapes = {}
    for name in ("dcgan", "resnet", "r3gan"):
        module, chosen = ARCHITECTURES.load(name), options(name, 0, image_size=28)
        networks = {"generator": module.generator(chosen), "discriminator": module.discriminator(chosen)}
        shapes[name] = {
            f"{n}.{key}": tuple(p.shape) for n, net in networks.items() for key, p in net.named_parameters()
        }
        assert ARCHITECTURES.load(name).spec(chosen).outputs[0].shape[-2:] == (28, 28)
    assert shapes["dcgan"]["generator.layers.0.weight"][2:] == (7, 7)
    assert shapes["dcgan"]["discriminator.score.weight"][2:] == (7, 7)
    assert shapes["r3gan"]["generator.basis"][1:] == (7, 7)
    assert shapes["r3gan"]["discriminator.basis.weight"][2:] == (7, 7)
    assert shapes["resnet"]["generator.project.weight"][0] % 49 == 0
    # Two halvings to 7x7, and one block that keeps the size.
    assert {key.split(".")[2] for key in shapes["resnet"] if key.startswith("discriminator.blocks")} == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("dcgan", {"image_size": 30}),
        ("resnet", {"image_size": 7}),
        ("r3gan", {"image_size": 0}),
        ("sagan", {"image_size": 28, "attention": 16}),
        ("dcgan", {"channels": 2}),
        ("resnet", {"classes": 1}),
        ("resnet", {"attention": 5}),
        ("r3gan", {"group": 7}),
        ("stylegan2", {"max_width": 0}),
        ("dcgan-mnist", {"width": 0}),
    ],
)
def test_options_that_cannot_be_are_refused(name, wrong):
    with pytest.raises(RecipeError):
        options(name, 0, **wrong)


def test_labels_are_asked_for_and_refused_by_name():
    module = ARCHITECTURES.load("resnet")
    conditional, plain = options("resnet", 1), options("resnet", 0)
    with pytest.raises(ValueError, match="labels missing"):
        module.generator(conditional)(torch.randn(2, 8))
    with pytest.raises(ValueError, match="labels given"):
        module.generator(plain)(torch.randn(2, 8), torch.zeros(2, dtype=torch.long))


def test_labels_change_the_picture():
    for name, number in (("resnet", 1), ("sagan", 0), ("r3gan", 1), ("stylegan2", 1)):
        module, chosen = ARCHITECTURES.load(name), options(name, number)
        torch.manual_seed(0)
        generator = module.generator(chosen)
        torch.manual_seed(1)
        for parameter in generator.parameters():  # the conditional scales start equal: move them
            parameter.data += 0.3 * torch.randn_like(parameter)
        z = torch.randn(1, 8).expand(2, 8)
        with torch.inference_mode():
            extra = inputs_of(module.spec(chosen), 1)
            same = {key: value.expand(2, *value.shape[1:]) for key, value in extra.items()}
            images = generator.eval()(**{**same, "z": z, "labels": torch.tensor([0, 1])})
        assert (images[0] - images[1]).abs().max() > 1e-3, name


@pytest.mark.parametrize("scale", [0.0, 1.0, 400.0])
def test_the_minibatch_deviation_of_half_precision_is_that_of_float32(scale):
    deviation, x = MinibatchStddev(), (torch.randn(8, 5, 4, 4) * scale).half().requires_grad_()
    exact = x.detach().float().requires_grad_()
    found, wanted = deviation(x), deviation(exact)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), wanted, rtol=1e-3, atol=1e-6)
    found[:, -1].float().sum().backward()
    wanted[:, -1].sum().backward()
    torch.testing.assert_close(x.grad.float(), exact.grad, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("spectral", [True, False])
def test_a_spectrally_normalised_critic_sums_over_positions_and_others_average(spectral):
    critic = ARCHITECTURES.load("resnet").discriminator(options("resnet", 0, spectral=spectral)).eval()
    seen = {}
    critic.blocks[-1].register_forward_hook(lambda _, __, output: seen.update(map=output))
    critic.score.register_forward_pre_hook(lambda _, inputs: seen.update(features=inputs[0]))
    size, channels = critic.options.image_size, critic.options.channels
    critic(torch.randn(2, channels, size, size))
    positive = seen["map"].clamp(min=0)
    torch.testing.assert_close(seen["features"], positive.sum([2, 3]) if spectral else positive.mean([2, 3]))
