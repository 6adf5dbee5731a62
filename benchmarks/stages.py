"""Seconds and operations of each stage of a step or a prediction, run alone on inputs of the real shape."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from generated import images
from operations import Operations, convolutions, similarity_of_step
from protocol import Reply, Spec, Workload, wait
from shapes import configuration, uninet
from torch import Tensor, nn

from losses.uninet import uninet_loss
from model.decision import distance_map
from model.uninet import UniNet
from utils.device import autocast
from utils.optim import make_optimizer

Stages = dict[str, Callable[[], object]]
Counted = tuple[Workload, dict[str, Operations]]


def train_stages(spec: Spec) -> Counted:
    """Forward and backward of each part of `train`, gradients reaching all that learns and its inputs."""
    net, device = uninet(spec).train(), torch.device(spec.device)
    assert isinstance(net, UniNet)
    batch = images(spec).contiguous(memory_format=torch.channels_last)
    config = configuration(spec)
    optimizer, schedule = make_optimizer(net.parameter_groups(config.optim), config)
    schedule.base_lrs = [0.0] * len(optimizer.param_groups)  # the weights stay as they are, the work too
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with autocast(device, spec.precision), torch.no_grad():
        pairs = net.features(batch)
        both = [torch.cat(x) for x in zip(*reversed(net.teachers(batch)), strict=True)]
        embedding = net.bottleneck(both)
    both, embedding = [_leaf(x) for x in both], _leaf(embedding)
    half = len(pairs) // 2
    learning = [(i, t if n < half else _leaf(t), _leaf(s)) for n, (i, t, s) in enumerate(pairs)]

    def source() -> None:
        with torch.no_grad():
            net.teachers.source(batch)

    def losses() -> None:
        # views, as in a step: the counter's hooks refuse leaves
        pairs = [net.selected(level, t.view_as(t), s.view_as(s)) for level, t, s in learning]
        uninet_loss(pairs, net.loss_config)["total"].backward()

    def optimise() -> None:
        optimizer.step()
        schedule.step()

    def both_ways(forward: Callable[[], Tensor | list[Tensor]]) -> Callable[[], None]:
        def run() -> None:
            with autocast(device, spec.precision):
                outputs = forward()
            outputs = [outputs] if isinstance(outputs, Tensor) else outputs
            torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])

        return run

    stages: Stages = {
        "source teacher": _in_precision(source, spec),
        "target teacher": both_ways(lambda: net.teachers.target(batch)),
        "bottleneck": both_ways(lambda: net.bottleneck(both)),
        "student": both_ways(lambda: net.student(embedding, both)),
        "feature selection, losses": losses,
        "optimiser": optimise,
    }
    operations = {name: convolutions(call) for name, call in stages.items()}
    levels = list(zip(net.info.channels, net.info.strides, strict=True))
    operations["feature selection, losses"] += similarity_of_step(spec.batch, spec.size, levels)
    return _timed(stages, spec.device), operations


def predict_stages(spec: Spec) -> Counted:
    """Each part of `predict` of the deployed model on one batch, as predict.py runs it."""
    net = uninet(spec).deploy()
    assert isinstance(net, UniNet)
    batch = images(spec).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), autocast(torch.device(spec.device), spec.precision):
        pairs = net.features(batch)
        both = [torch.cat(x) for x in zip(*reversed(net.teachers(batch)), strict=True)]
        embedding = net.bottleneck(both)
    calls: Stages = {
        "source teacher": lambda: net.teachers.source(batch),
        "target teacher": lambda: net.teachers.target(batch),
        "bottleneck": lambda: net.bottleneck(both),
        "student": lambda: net.student(embedding, both),
        "maps and decision": lambda: net.decision(
            [distance_map(t, s) for _, t, s in pairs], tuple(batch.shape[2:])
        ),
    }
    stages = {name: torch.inference_mode()(_in_precision(call, spec)) for name, call in calls.items()}
    counted = {name: convolutions(call) for name, call in stages.items()}
    return _timed(stages, spec.device), counted


def _leaf(x: Tensor) -> Tensor:
    return nn.Parameter(x.detach().clone())


def _in_precision(call: Callable[[], object], spec: Spec) -> Callable[[], object]:
    def run() -> object:
        with autocast(torch.device(spec.device), spec.precision):
            return call()

    return run


def _timed(stages: Stages, device: str) -> Workload:
    def run() -> Reply:
        seconds = {}
        for name, call in stages.items():
            start = time.perf_counter()
            call()
            wait(device)
            seconds[name] = time.perf_counter() - start
        return {"stages": seconds}

    return run
