"""Eager backward gives the gradients of a plain call, with less in memory."""

import copy
import weakref

import pytest
import torch
from fixtures import labelled_batch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from losses import uninet as total
from losses.eager_backward import eager_backward
from model import build_model


def gradients(model):
    model.train().loss(labelled_batch(), 0.5)["total"].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "settings",
    [
        {"model__flavor": "paper", "loss__temperature": 0.1},
        {"model__flavor": "released"},
        {"loss__stop_grad": "none", "loss__anomaly_source": "mask"},
    ],
    ids=["paper", "released", "mask"],
)
def test_every_gradient_of_a_step_is_that_of_a_plain_call(make_config, monkeypatch, settings):
    eager = build_model(make_config(**settings), pretrained=False)
    plain = copy.deepcopy(eager)
    found = gradients(eager)
    monkeypatch.setattr(total, "eager_backward", lambda function, *inputs: function(*inputs))
    expected = gradients(plain)
    assert found.keys() == expected.keys() and len(found) > 20
    if eager.config.dfs != "none":
        assert any("theta" in name for name in found) == eager.dfs.theta[0].requires_grad
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_operations_of_a_step_can_be_counted(make_config):
    """Counters put hooks on what modules are given, and torch refuses some of them inside a backward pass."""
    model = build_model(make_config(model__flavor="paper"), pretrained=False)
    with FlopCounterMode(display=False) as counter:
        gradients(model)
    assert counter.get_total_flops() > 1e8


class TestEagerBackward:
    def test_known_answer_and_outer_factor(self):
        x, factor = torch.tensor([1.0, 2.0], requires_grad=True), nn.Parameter(torch.tensor(3.0))
        y = 2 * x  # no leaf
        value = eager_backward(lambda a, _: (factor * a.square()).sum(), y, factor)
        (5 * value).backward()
        assert value.item() == 60 and x.grad.tolist() == [120, 240] and factor.grad.item() == 100

    def test_nothing_else_is_kept(self):
        kept = []

        def function(a):
            middle = a.exp()
            kept.append(weakref.ref(middle))
            return middle.square().sum()  # needs `middle` for its gradient

        x = torch.ones(3, requires_grad=True)
        plain = function(2 * x)
        assert kept[0]() is not None and plain.requires_grad
        eager = eager_backward(function, 2 * x)
        assert kept[1]() is None and eager.requires_grad

    def test_what_needs_no_gradient_gets_none(self):
        x, y = torch.ones(2, requires_grad=True), torch.ones(2)
        eager_backward(lambda a, b: (a * b).sum(), x, y).backward()
        assert x.grad.tolist() == [1, 1] and y.grad is None
        unused = eager_backward(lambda a, b: b.sum(), x, y)
        x.grad = None
        unused.backward()
        assert x.grad is None
        with torch.no_grad():
            assert not eager_backward(lambda a: a.sum(), x).requires_grad
