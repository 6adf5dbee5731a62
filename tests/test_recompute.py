"""Recomputed activations: the same training, with less kept for the backward pass."""

import copy

import pytest
import torch
from fixtures import labelled_batch

import train as train_command
from model import build_model
from model.recompute import recompute_activations
from utils.cli import run_command

SETTINGS = {
    "paper": {"model__flavor": "paper", "loss__temperature": 0.1},
    "tuned": {"model__flavor": "tuned"},
    "parallel kernels": {"model__flavor": "paper", "model__mem_reparam": "parallel"},
    "recontrast": {"model__name": "recontrast"},
}


def trained(model, steps=2):
    """Losses of some steps, and the model after them."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(steps):
        loss = model.loss(labelled_batch(), 0.5)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def kept_bytes(model):
    """What the forward pass keeps, the inputs of the blocks aside."""
    kept = {}

    def pack(x):
        kept[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.train().loss(labelled_batch(), 0.5)
    return sum(kept.values())


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_losses_weights_and_statistics_are_the_same(make_config, settings):
    plain = build_model(make_config(**settings), pretrained=False)
    again = copy.deepcopy(plain)
    assert recompute_activations(again) > 10
    losses, state = trained(plain)
    found, found_state = trained(again)
    assert found == losses
    assert set(found_state) == set(state)
    for name, value in state.items():
        assert torch.equal(found_state[name], value), name


def test_less_is_kept(make_config):
    plain = build_model(make_config(), pretrained=False)
    again = copy.deepcopy(plain)
    recompute_activations(again)
    assert kept_bytes(again) < 0.5 * kept_bytes(plain)


def test_the_command_trains_the_same(mvtec_like, tmp_path):
    """Through train.py, with synthetic defects, clipping and a checkpoint."""
    states = []
    for name in ("false", "true"):
        words = ["--data-root", str(mvtec_like), "--category", "part", "--iterations", "2", "--quiet"]
        words += ["--backbone", "tf_efficientnet_lite0", "--flavor", "tuned", "--device", "cpu"]
        words += ["--output", str(tmp_path / name), "--name", "run", "--eval", "none"]
        for setting in (
            "model.random_weights=true",
            "data.image_size=64",
            "train.precision=fp32",
            f"train.recompute={name}",
        ):
            words += ["--set", setting]
        assert run_command(train_command.main, words) == 0
        (path,) = (tmp_path / name).rglob("last.pt")
        states.append(torch.load(path, weights_only=True)["model"])
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name
