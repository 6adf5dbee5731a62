"""Predictions replayed as CUDA graphs are those of the plain model."""

import pytest
import torch

from model import build_model
from model.inference import GraphedPredictor, replayed
from utils.graphs import Replayed

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def test_on_a_cpu_the_model_is_left_as_it_is(make_config):
    model = build_model(make_config(model__width=0.5)).deploy()
    assert replayed(model) is model


def test_recorded_the_second_time(monkeypatch, make_config):
    """What decides is the kind of input; recording is replaced, as it needs a GPU."""
    model = build_model(make_config(model__width=0.5)).deploy()
    recorded = []

    class Graph:
        def replay(self):
            recorded[-1][1] += 1

    def record(self, inputs):
        recorded.append([tuple(inputs["images"].shape), 0])
        return Graph(), {"images": inputs["images"].clone()}, self.function(inputs)

    monkeypatch.setattr(Replayed, "_capture", record)
    predictor = GraphedPredictor(model)
    for size, batch in ((64, 2), (64, 2), (64, 1), (64, 2), (96, 2)):
        images = torch.randn(batch, 3, size, size)
        assert predictor.predict(images).anomaly_map.shape == (batch, size, size)
    assert recorded == [[(2, 3, 64, 64), 2]]


def test_what_cannot_be_recorded_is_computed_as_it_is(monkeypatch, make_config, caplog):
    model = build_model(make_config(model__width=0.5)).deploy()

    def refuse(self, inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Replayed, "_capture", refuse)
    predictor, images = GraphedPredictor(model), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model.predict(images)
        for _ in range(3):
            torch.testing.assert_close(predictor.predict(images).score, expected.score)
    assert caplog.text.count("not permitted") == 1


@NEEDS_CUDA
@pytest.mark.parametrize("name", ["uninet", "remind", "recontrast"])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_same_as_plain(make_config, name, bf16):
    config = make_config(model__name=name, model__width=0.5)
    model = build_model(config).cuda().eval()
    batches = [torch.randn(2, 3, 64, 64, device="cuda") for _ in range(4)]
    batches.append(torch.randn(1, 3, 64, 64, device="cuda"))
    plain, predictor = model.deploy(), replayed(model.deploy())
    assert isinstance(predictor, GraphedPredictor)
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        expected = [plain.predict(x) for x in batches]
        found = [predictor.predict(x) for x in batches]
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b.score, a.score, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(b.anomaly_map, a.anomaly_map, rtol=1e-5, atol=1e-6)


@NEEDS_CUDA
def test_a_step_on_a_gpu_is_that_of_a_cpu(make_config):
    """Losses and gradients in float32, without TF32."""
    config = make_config(model__width=0.5)
    torch.manual_seed(0)
    model = build_model(config).train()
    batch = {"image": torch.randn(2, 3, 64, 64), "label": torch.zeros(2, dtype=torch.long)}
    found = []
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        for device in ("cpu", "cuda"):
            own = build_model(config)
            own.load_state_dict(model.state_dict())
            own.to(device).train()
            parts = own.loss({k: v.to(device) for k, v in batch.items()}, 0.5)
            parts["total"].backward()
            found.append((parts, dict(own.named_parameters())))
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    (cpu, cpu_weights), (gpu, gpu_weights) = found
    for name in ("total", "kd", "sc", "m"):
        assert float(gpu[name]) == pytest.approx(float(cpu[name]), rel=1e-4)
    for name, weight in cpu_weights.items():
        if weight.grad is not None:
            expected, got = weight.grad, gpu_weights[name].grad.cpu()
            assert torch.linalg.norm(got - expected) <= 2e-2 * torch.linalg.norm(expected) + 1e-6, name
