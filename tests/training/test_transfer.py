"""Starting from other weights: what fits is taken and said, what does not starts afresh; FreezeD keeps its layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_run
import torch
from safetensors.torch import save_file

from ganexport.checkpoint import load_run, read_checkpoint
from ganexport.errors import CheckpointError, RecipeError, UsageError
from ganexport.recipe import load_recipe, recipe_names
from ganexport.training.api import train
from ganexport.training.guard import DivergedError
from ganexport.training.networks import build
from ganexport.training.progress import Reporter
from ganexport.training.transfer import read_source, stages, start_from

SHORT = ["training.steps=4", "logging.sample_every=1000"]


class Heard(Reporter):
    def __init__(self) -> None:
        self.remarks: list[str] = []

    def remark(self, text: str) -> None:
        self.remarks.append(text)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    train(str(tiny_run.write(folder)), out=folder / "run", sets=SHORT)
    return folder / "run"


def test_a_run_goes_on_from_another_ones_weights(source: Path, tmp_path: Path) -> None:
    heard = Heard()
    recipe = str(tiny_run.write(tmp_path))
    # So small a rate that four steps move nothing visible: what stands in the run is what it started from.
    still = ["optimizer.generator.rate=1e-12", "optimizer.discriminator.rate=1e-12", "training.seed=5", *SHORT]
    train(recipe, out=tmp_path / "run", sets=still, init_from=source, reporter=heard)
    before, after = load_run(source).module.state_dict(), load_run(tmp_path / "run").module.state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
    assert any("generator: 6 of 6 tensors" in text for text in heard.remarks), heard.remarks
    assert any("discriminator: 6 of 6 tensors" in text for text in heard.remarks)
    # The place of the source on this machine does not travel with what is made from the run.
    assert load_run(tmp_path / "run").recipe["transfer"]["init_from"] == "run"


def test_other_shapes_start_afresh_and_are_named(source: Path) -> None:
    generator, discriminator, _ = build(load_recipe("dcgan-mnist", ["architecture.latent=8", "architecture.width=4"]))
    other, _, _ = build(load_recipe("dcgan-mnist", ["architecture.latent=9", "architecture.width=4"]))
    first = other.project.weight.clone()
    taken = start_from(str(source), other, discriminator)
    assert any(entry.startswith("project.weight ([392, 8] in the source, [392, 9] here)") for entry in taken[0].fresh)
    assert torch.equal(other.project.weight, first)
    assert "up1.weight" in taken[0].loaded
    assert start_from(str(source), generator, discriminator)[0].fresh == ()


def test_new_class_head(tmp_path: Path) -> None:
    sets = ["architecture.width=4", "architecture.latent=8"]
    ten_g, ten_d, _ = build(load_recipe("sagan-mnist", sets))
    five_g, five_d, _ = build(load_recipe("sagan-mnist", [*sets, "architecture.classes=5"]))
    both = {f"generator.{k}": v.contiguous() for k, v in ten_g.state_dict().items()}
    both |= {f"discriminator.{k}": v.contiguous() for k, v in ten_d.state_dict().items()}
    save_file({k: v.clone() for k, v in both.items()}, tmp_path / "ten.safetensors")
    generator, discriminator = start_from(str(tmp_path / "ten.safetensors"), five_g, five_d)
    fresh = [name.split(" ")[0] for name in (*generator.fresh, *discriminator.fresh)]
    assert fresh
    assert all("scale" in name or "shift" in name or "embedding" in name for name in fresh), fresh
    assert torch.equal(five_g.state_dict()["to_image.bias"], ten_g.state_dict()["to_image.bias"])


def test_a_source_that_does_not_fit_is_refused(source: Path, tmp_path: Path) -> None:
    generator, discriminator, _ = build(load_recipe("r3gan-mnist", ["architecture.width=8"]))
    with pytest.raises(CheckpointError, match="nothing in it fits the recipe's generator"):
        start_from(str(source), generator, discriminator)
    with pytest.raises(CheckpointError, match="no such run"):
        read_source(str(tmp_path / "nothing"))
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0")
    with pytest.raises(CheckpointError, match="truncated"):
        read_source(str(tmp_path / "torn.safetensors"))


def test_weights_that_are_not_numbers_are_refused(source: Path, tmp_path: Path) -> None:
    state = dict(read_source(str(source))["generator"])
    state["up1.bias"] = torch.full_like(state["up1.bias"], float("nan"))
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "nan.safetensors")
    generator, discriminator, _ = build(load_recipe("dcgan-mnist", ["architecture.latent=8", "architecture.width=4"]))
    with pytest.raises(CheckpointError, match=r"up1\.bias holds NaN"):
        start_from(str(tmp_path / "nan.safetensors"), generator, discriminator)


def test_frozen_layers_stay_and_the_others_move(source: Path, tmp_path: Path) -> None:
    recipe = str(tiny_run.write(tmp_path))
    train(recipe, out=tmp_path / "run", sets=["training.seed=5", *SHORT], init_from=source, freeze_d=1)
    before = read_checkpoint(source).tensors["discriminator"]
    after = read_checkpoint(tmp_path / "run").tensors["discriminator"]
    assert torch.equal(before["down1.weight"], after["down1.weight"])
    assert torch.equal(before["down1.bias"], after["down1.bias"])
    assert not torch.equal(before["down2.weight"], after["down2.weight"])
    assert not torch.equal(before["score.weight"], after["score.weight"])


def test_a_frozen_run_resumes_to_the_bit(source: Path, tmp_path: Path) -> None:
    recipe = str(tiny_run.write(tmp_path))
    sets = ["training.checkpoint_every=2", *SHORT]
    train(recipe, out=tmp_path / "whole", sets=sets, init_from=source, freeze_d=1)
    halves = tmp_path / "halves"
    train(recipe, out=halves, sets=["training.checkpoint_every=2", "training.steps=2"], init_from=source, freeze_d=1)
    train(recipe, out=halves, sets=sets[:2], init_from=source, freeze_d=1, resume=True)
    whole, resumed = read_checkpoint(tmp_path / "whole"), read_checkpoint(halves)
    assert whole.state.step == resumed.state.step == 4
    for file, tensors in whole.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, resumed.tensors[file][name]), f"{file}: {name}"


def test_a_rollback_before_the_first_checkpoint_goes_back_to_the_transferred_weights(source: Path) -> None:
    recipe = tiny_run.recipe(transfer={"init_from": str(source)}, training={"steps": 2})

    def planted(line: dict[str, float]) -> None:
        raise DivergedError("step 2: planted")

    diverged, lowered = tiny_run.trainer(recipe, rollback=True), tiny_run.trainer(recipe)
    for trainer in (diverged, lowered):
        trainer.networks.transfer()
    diverged.guard.look = planted  # type: ignore[method-assign]
    lowered.rate_scale = 0.5
    for trainer in (diverged, lowered):
        trainer.train()
    assert diverged.rollbacks == 1
    wanted = tiny_run.weights(lowered)
    assert all(torch.equal(value, wanted[name]) for name, value in tiny_run.weights(diverged).items())


def test_a_start_that_fails_leaves_its_folder_free(source: Path, tmp_path: Path) -> None:
    recipe = str(tiny_run.write(tmp_path))
    for dry in (True, False):
        with pytest.raises(CheckpointError, match="no such run"):
            train(recipe, out=tmp_path / "run", init_from="nowhere", sets=SHORT, dry_run=dry)
    train(recipe, out=tmp_path / "run", init_from=source, sets=SHORT)


def test_freezing_is_refused_where_it_makes_no_sense(source: Path, tmp_path: Path) -> None:
    recipe = str(tiny_run.write(tmp_path))
    with pytest.raises(RecipeError, match=r"needs transfer\.init_from"):
        train(recipe, out=tmp_path / "a", freeze_d=1)
    with pytest.raises(RecipeError, match="has 3 stages"):
        train(recipe, out=tmp_path / "b", init_from=source, freeze_d=3)
    save_file(dict(load_run(source).module.state_dict()), tmp_path / "generator.safetensors")
    with pytest.raises(UsageError, match="has no discriminator that fits"):
        train(recipe, out=tmp_path / "c", init_from=tmp_path / "generator.safetensors", freeze_d=1, sets=SHORT)


@pytest.mark.parametrize("name", [name for name in recipe_names() if "mnist" in name])
def test_stages_follow_the_image(name: str) -> None:
    _, discriminator, spec = build(load_recipe(name))
    labels = torch.zeros(4, dtype=torch.int64) if len(spec.inputs) > 1 else None
    found = stages(discriminator, torch.zeros(4, *spec.outputs[0].shape[1:]), labels)
    names = {id(module): key for key, module in discriminator.named_modules()}
    order = [names[id(module)] for module in found]
    assert order[0] in ("down1", "blocks.0", "from_image"), order
    assert order[-1] in ("score", "embedding"), order
    assert sum(p.numel() for stage in found for p in stage.parameters()) == sum(
        p.numel() for p in discriminator.parameters()
    )
