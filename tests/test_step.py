"""A training step: it reads no value from the device, and a replayed one does what a plain one does."""

import copy

import printed_commands
import pytest
import torch
from conftest import ROOT, TINY
from torch import nn

from datasets.transforms import augment_batch
from model import build_model
from model.peers import unias
from model.step import EAGER, TrainingStep
from utils.checkpoint import Checkpoint, load_checkpoint, training_state
from utils.graphs import Replayed
from utils.layers import load_config
from utils.optim import make_optimizer, rate_at

with printed_commands.modules_of(ROOT / "benchmarks"):
    import launches
    import stages
    from protocol import Spec

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
IMAGE, LABEL = ((2, 3, 64, 64), torch.float32), ((2,), torch.int64)
MASK, FRAMES = ((2, 1, 64, 64), torch.uint8), ((2, 2, 3, 64, 64), torch.float32)
SUPERVISED = {"model.setting": "supervised"}
MASK_HEAD = SUPERVISED | {"model.head": "mask", "loss.anomaly_source": "mask"}
POLISHED = {"optim.grad_clip": 1.0, "optim.warmup": 3, "optim.schedule": "cosine"}
MULTI_CLASS = {"model.setting": "multi-class", "optim.preset": "multi-class"}
# settings, what a batch has beside images, and the operations of a step with torch 2.14
CASES = {
    "uninet, paper": ({"loss.temperature": 0.1} | POLISHED, {}, 1409),
    "remind": ({"model.name": "remind"} | POLISHED, {"mask": MASK}, 755),
    "recontrast": ({"model.name": "recontrast"}, {}, 865),
    "unias": ({"model.name": "unias"}, {}, 1945),
    "uninet, labels": (
        SUPERVISED | {"model.flavor": "released", "model.head": "label", "loss.supervised": "bce"},
        {"label": LABEL},
        1635,
    ),
}
SLOW = ("unias", "recontrast", "uninet, labels", "uninet, paper")
MORE = {
    "uninet, released": ({"model.flavor": "released"}, {}),
    "uninet, multi-class": (MULTI_CLASS, {}),
    "uninet, in bf16": ({"train.precision": "bf16"}, {}),
    "uninet, gradients nowhere stopped": ({"loss.stop_grad": "none"}, {"label": LABEL}),
    "uninet, parallel kernels": ({"model.mem_reparam": "parallel"}, {}),
    "uninet, dice": (MASK_HEAD | {"loss.supervised": "dice"}, {"label": LABEL, "mask": MASK}),
    "uninet, polyps": (
        MASK_HEAD | {"loss.supervised": "structure", "model.skip_connections": True},
        {"label": LABEL, "mask": MASK},
    ),
    "uninet, video": ({"model.head": "frame", "loss.supervised": "mse"}, {"frames": FRAMES}),
    "remind, no head": ({"model.name": "remind", "data.synthetic": 0}, {"mask": MASK}),
    "recontrast, multi-class": ({"model.name": "recontrast"} | MULTI_CLASS, {}),
}


@pytest.fixture(autouse=True)
def _small_unias(monkeypatch):
    for name, value in {"D": 32, "G": 4, "FFN": 64, "NEIGHBOURS": 3}.items():
        monkeypatch.setattr(unias, name, value)


def configured(settings, **more):
    chosen = {"model.backbone": TINY, "model.weights": "random", "model.width": 0.25}
    chosen |= {"data.image_size": 64, "train.epochs": None, "train.precision": "fp32"}
    return load_config(ROOT / "configs/mvtec.yaml", chosen | {"train.iterations": 20} | settings | more)


class TestNoValueIsRead:
    @pytest.mark.parametrize(
        "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
    )
    def test_nor_are_there_more_operations(self, name):
        settings, extra, limit = CASES[name]
        found = launches.counted_step(configured(settings), {"image": IMAGE} | extra)
        assert 0.9 * limit < found.total() <= 1.03 * limit, found.most_common(20)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", MORE)
    def test_with_any_setting(self, name):
        settings, extra = MORE[name]
        found = launches.counted_step(configured(settings), {"image": IMAGE} | extra, steps=1)
        assert found.total() > 500

    def test_what_reads_one_is_found(self):
        model = build_model(configured({"model.name": "remind"}), pretrained=False)
        real = model.loss
        model.loss = lambda batch, progress: real(batch, 0.5) if progress > 0 else real(batch, 0.0)
        with pytest.raises(Exception, match="local_scalar_dense"):
            launches.counted_step(configured({"model.name": "remind"}), {"image": IMAGE, "mask": MASK}, model)

    @pytest.mark.parametrize(
        "settings",
        [{"data.augment": "flip"}, {"data.augment": "flip-rotate", "train.scales": [1.0, 1.5]}],
        ids=["flip", "flip-rotate"],
    )
    def test_in_augmentation(self, settings):
        with launches.without_values(nn.Identity()):
            batch = {"image": torch.zeros(IMAGE[0]), "mask": torch.zeros(MASK[0])}
            found = augment_batch(batch, configured(settings), 1)
        assert found["image"].shape[:2] == (2, 3)


def made(settings, *, fused=None, start=0):
    """A step of a model with its optimiser and schedule, the same each time."""
    torch.manual_seed(0)
    config = configured(settings)
    model = build_model(config, pretrained=False).to(memory_format=torch.channels_last).train()
    optimizer, schedule = make_optimizer(model.parameter_groups(config.optim), config, fused=fused)
    return TrainingStep(model, optimizer, config, start=start), schedule


def batches(count, sizes=(64,)):
    """Different images, by turns of the sizes."""
    generator = torch.Generator().manual_seed(1)
    for i in range(count):
        size = sizes[i % len(sizes)]
        batch = {"image": torch.randn(2, 3, size, size, generator=generator)}
        mask = torch.zeros(2, 1, size, size, dtype=torch.uint8)
        mask[1, :, 20:40, 10:30] = 1
        yield batch | {"label": torch.tensor([0, 1]), "mask": mask}


def taken(step, schedule, data):
    """Loss parts of each step."""
    parts = []
    for batch in data:
        parts.append({name: value.item() for name, value in step(batch).items()})
        schedule.step()
    return parts


def state_of(step):
    moments = [v for state in step.optimizer.state.values() for v in state.values()]
    return [x.clone() for x in (*step.model.state_dict().values(), *moments)]


def same(found, expected):
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["uninet, paper", "remind", "recontrast"])
def test_weights_statistics_and_counters_are_those_of_a_plain_loop(name):
    settings = CASES[name][0]
    step, schedule = made(settings)
    plain, plain_schedule = made(settings)
    config, model, optimizer, parts = plain.config, plain.model, plain.optimizer, []
    for i, batch in enumerate(batches(3)):
        found = model.loss(batch, i / config.train.iterations)
        optimizer.zero_grad()
        found["total"].backward()
        if config.optim.grad_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        plain_schedule.step()
        parts.append({key: value.item() for key, value in found.items()})
    assert taken(step, schedule, batches(3)) == parts
    assert same(state_of(step), state_of(plain)) and all(p.grad is None for p in step.model.parameters())
    counters = [v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")]
    assert max(counters) == 3


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_that_is_no_number_reaches_nothing(fused):
    step, schedule = made({"model.name": "remind"} | POLISHED, fused=fused)
    first, second, third = batches(3)
    taken(step, schedule, [first])
    assert step.first_bad() is None
    weights = [p.detach().clone() for p in step.model.parameters()]
    moments = copy.deepcopy(list(step.optimizer.state.values()))
    step(second | {"image": second["image"] * float("nan")})
    step(third)  # nobody has asked yet
    number, parts = step.first_bad()
    assert number == 1 and parts.keys() == {"kd", "head", "total"} and parts["total"] != parts["total"]
    assert same(list(step.model.parameters()), weights)
    for before, now in zip(moments, step.optimizer.state.values(), strict=True):
        assert same(list(now.values()), list(before.values()))


class Rerun:
    """In place of a CUDA graph: computes again, on its inputs and into its outputs."""

    def __init__(self, function, static):
        self.function, self.static, self.outputs = function, static, None

    def replay(self):
        found = self.function(self.static)
        for name, value in found.items():
            self.outputs[name].copy_(value)


@pytest.fixture
def captured(monkeypatch):
    """The kinds of input that were captured."""
    kinds = []

    def capture(self, inputs):
        kinds.append({name: tuple(x.shape) for name, x in inputs.items()})
        graph = Rerun(self.function, {name: x.clone() for name, x in inputs.items()})
        graph.outputs = {name: torch.zeros(()) for name in ("kd", "head", "total")}
        return graph, graph.static, graph.outputs

    monkeypatch.setattr(Replayed, "_capture", capture)
    return kinds


def test_a_replayed_step_goes_on_where_a_plain_one_is(captured):
    """By turns of two sizes, each captured when it comes for the fourth time."""
    settings = {"model.name": "remind"} | POLISHED
    data = list(batches(2 * EAGER + 4, sizes=(64, 96)))
    step, schedule = made(settings, fused=True)
    expected = taken(step, schedule, data)
    replayed, schedule = made(settings, fused=True)
    replayed.run = Replayed(replayed.run, "the step", eager=EAGER)
    assert taken(replayed, schedule, data) == expected
    assert [kind["image"][-1] for kind in captured] == [64, 96]
    assert same(state_of(replayed), state_of(step))


def test_a_step_that_cannot_be_captured_stays_plain(monkeypatch, caplog):
    settings = {"model.name": "remind"}
    step, schedule = made(settings, fused=True)
    expected = taken(step, schedule, batches(EAGER + 2))
    refused, schedule = made(settings, fused=True)

    def refuse(self, inputs):
        """As a capture that ends in the middle: gradients are left that were never computed."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(refused, "_update", lambda parts: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                self.function(inputs)
        raise RuntimeError("operation not permitted when stream is capturing\nsecond line")

    monkeypatch.setattr(Replayed, "_capture", refuse)
    refused.run = Replayed(refused.run, "the training step", eager=EAGER)
    parts = taken(refused, schedule, batches(EAGER + 2))
    assert parts[:EAGER] == expected[:EAGER] and all(p.grad is None for p in refused.model.parameters())
    (record,) = caplog.records
    assert "the training step is not captured" in record.message and "second line" not in record.message


def test_on_a_cpu_nothing_is_captured():
    step, _ = made({})
    assert not isinstance(step.run, Replayed)


@pytest.mark.parametrize(("first", "second"), [(False, True), (True, False), (True, True)])
def test_a_run_goes_on_on_another_device(tmp_path, first, second):
    """Fused stands for a GPU; rates are numbers in a checkpoint, and the optimiser keeps its own way."""
    settings = {"model.name": "remind"} | POLISHED
    data = list(batches(6))
    whole, schedule = made(settings, fused=first)
    taken(whole, schedule, data[:3])
    state = training_state(whole.optimizer, schedule)
    assert all(isinstance(group["lr"], float) for group in state["optimizer"]["param_groups"])
    assert all(isinstance(rate, float) for rate in state["schedule"]["_last_lr"])
    Checkpoint(whole.config, whole.model.state_dict(), 3, **state).save(tmp_path / "last.pt")
    parts = taken(whole, schedule, data[3:])

    loaded = load_checkpoint(tmp_path / "last.pt")
    again, schedule = made(settings, fused=second, start=3)
    again.model.load_state_dict(loaded.model)
    loaded.resume(again.optimizer, schedule)
    (group,) = again.optimizer.param_groups
    assert (
        bool(group["fused"]) == bool(group["capturable"]) == isinstance(group["lr"], torch.Tensor) == second
    )
    assert float(group["lr"]) == pytest.approx(group["initial_lr"] * rate_at(3, again.config), rel=1e-6)
    found = taken(again, schedule, data[3:])
    for a, b in zip(found, parts, strict=True):
        assert a == (b if first == second else pytest.approx(b, rel=1e-3))


@pytest.fixture
def deterministic():
    """Kernels without chance, as train.py asks for them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@NEEDS_CUDA
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_twenty_steps_of_a_graph_are_those_of_launches(name, bf16, deterministic):
    """Losses and weights; each step sees other images, and the rate changes."""
    settings = (CASES | MORE)[name][0] | {"train.precision": "bf16" if bf16 else "fp32"}
    found = []
    for graph in ("off", "auto"):
        torch.manual_seed(0)
        config = configured(settings, **{"run.graph": graph})
        model = build_model(config, pretrained=False).cuda().to(memory_format=torch.channels_last).train()
        optimizer, schedule = make_optimizer(model.parameter_groups(config.optim), config)
        step = TrainingStep(model, optimizer, config)
        extra = (CASES | MORE)[name][1]
        torch.manual_seed(1)  # of what a loss draws
        data = [
            {k: v.cuda() for k, v in batch.items() if k == "image" or k in extra} for batch in batches(20)
        ]
        if "frames" in extra:
            data = [{"frames": torch.stack([b["image"], b["image"].flip(3)], dim=1)} for b in data]
        parts = taken(step, schedule, data)
        assert isinstance(step.run, Replayed) == (graph == "auto")
        if graph == "auto":
            assert all(step.run._graphs.values()) and step.run._graphs, "a capture failed"
        found.append((parts, [p.detach().clone() for p in model.parameters()]))
    (plain, weights), (replayed, replayed_weights) = found
    for i, (a, b) in enumerate(zip(plain, replayed, strict=True)):
        assert b == pytest.approx(a, rel=1e-6, abs=1e-6), f"step {i}"
    for a, b in zip(weights, replayed_weights, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_the_stages_of_a_step_can_be_measured():
    """Each goes forward and back under the counter of operations, whose hooks refuse leaves."""
    run, operations = stages.train_stages(Spec("train", batch=2, size=64))
    assert operations.keys() == run()["stages"].keys()
    assert operations["student"].convolution > operations["source teacher"].convolution > 0
