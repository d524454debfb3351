"""Weights files: what fits is found, what does not is listed, what could run code never does."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ganexport.errors import CheckpointError
from ganexport.export.weights import load_into, read_weights, weights_digest


def module(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize(
    ("wrap", "key"),
    [
        (lambda s: s, None),
        (lambda s: {f"module.{k}": v for k, v in s.items()}, None),
        (lambda s: {f"_orig_mod.netG.{k}": v for k, v in s.items()}, None),
        (lambda s: {"epoch": 3, "g_ema": s}, None),
        (lambda s: {"models": {"generator": s, "critic": {"0.weight": torch.ones(9)}}}, None),
        (lambda s: {"g": s, "g_ema": s}, "g_ema"),
        (lambda s: {"models": {"a": s, "b": s}}, "models/b"),
        (lambda s: {f"generator.{k}": v for k, v in s.items()} | {"critic.w": torch.ones(1)}, None),
    ],
)  # fmt: skip
def test_the_state_is_found(wrap, key, tmp_path):
    source, target = module(1), module(2)
    torch.save(wrap(source.state_dict()), tmp_path / "w.pt")
    load_into(target, read_weights(tmp_path / "w.pt"), "w.pt", key)
    assert weights_digest(target) == weights_digest(source)


def test_safetensors(tmp_path):
    source, target = module(1), module(2)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_into(target, read_weights(tmp_path / "w.safetensors"), "w")
    assert weights_digest(target) == weights_digest(source)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:40])
    with pytest.raises(CheckpointError, match="truncated"):
        read_weights(tmp_path / "cut.safetensors")


def test_two_states_that_fit_alike_are_not_guessed_between():
    state = module().state_dict()
    with pytest.raises(CheckpointError, match=r"g, g_ema; say which with --weights-key g"):
        load_into(module(), {"g": state, "g_ema": state}, "w.pt")


def test_missing_unexpected_and_misshapen_tensors_are_listed():
    state = dict(module().state_dict())
    state["extra"] = torch.ones(1)
    state["0.weight"] = torch.ones(5, 4)
    del state["1.bias"]
    with pytest.raises(CheckpointError) as caught:
        load_into(module(), state, "w.pt")
    message = str(caught.value)
    assert "1 missing (1.bias)" in message
    assert "1 unexpected (extra)" in message
    assert "0.weight [5, 4] for [3, 4]" in message
    assert "\n" not in message


def test_an_unknown_key_lists_the_known_ones():
    with pytest.raises(CheckpointError, match="no key 'ema' in it; there is: g, d"):
        load_into(module(), {"g": {}, "d": {}}, "w.pt", "ema")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load_into(module(), {"epoch": 3}, "w.pt")


class Evil:
    def __reduce__(self):
        return (open, ("pwned", "w"))


def test_code_in_a_pickle_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "raw.pkl"):
        with pytest.raises(CheckpointError):
            read_weights(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("keep", [0, 10, 200, 1000])
def test_a_truncated_checkpoint_is_one_clear_line(keep, tmp_path):
    torch.save(module().state_dict(), tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:keep])
    with pytest.raises(CheckpointError) as caught:
        read_weights(tmp_path / "w.pt")
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="no such"):
        read_weights(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="a directory"):
        read_weights(tmp_path)
