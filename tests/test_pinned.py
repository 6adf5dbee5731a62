"""Known answers of whole networks: weights by a stated rule, one batch, and what comes out, to six digits.

A later change of a network, a loss or a decision cannot go unseen, and other code can be compared.
The rule: tensors of the state in the order of their names, each drawn from one generator of seed 0 as normal
numbers n. Matrices and kernels are n / sqrt(fan-in), running variances 1 + 0.1 |n|, norms' weights 1 + 0.1 n,
all else 0.1 n. Theta and the feature scale are not drawn: they stay 1, as UniNet's authors have them. The
images are normal numbers of seed 1. All is in eval mode: no number depends on a batch.
`python scripts/convert_weights.py RUN --to uninet` writes such a state for the authors' code. v0.1.0 (commit
4a74ab6) gives the same. UniAS's backbone is drawn with the stages that its features do not need.
"""

import math

import pytest
import timm
import torch

from model import build_model


@torch.no_grad()
def fill(model):
    """Weights by the rule."""
    generator = torch.Generator().manual_seed(0)
    norms = {name for name, m in model.named_modules() if "Norm" in type(m).__name__}
    state = model.state_dict()
    if hasattr(model, "backbone"):
        whole = timm.create_model("tf_efficientnet_b4", features_only=True).state_dict()
        state = {f"backbone.{key}": value for key, value in whole.items()} | state
    for name, tensor in sorted(state.items()):
        if not tensor.is_floating_point() or name.startswith(("dfs.theta", "teachers.scale")):
            continue
        n = torch.randn(tensor.shape, generator=generator)
        owner, _, kind = name.rpartition(".")
        if tensor.dim() > 1:
            n = n / math.sqrt(tensor[0].numel())
        elif kind == "running_var":
            n = 1 + 0.1 * n.abs()
        else:
            n = 0.1 * n + (owner in norms and kind == "weight")
        tensor.copy_(n)
    return model.eval()


def answers(config, side):
    """Parts of the loss, and mean of the map and score of each image."""
    model = fill(build_model(config))
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        parts = model.loss({"image": images, "label": torch.zeros(2, dtype=torch.long)}, 0.5)
        found = model.predict(images)
    numbers = {name: value.item() for name, value in parts.items()}
    numbers |= {f"map {i}": m.mean().item() for i, m in enumerate(found.anomaly_map)}
    return numbers | {f"score {i}": s.item() for i, s in enumerate(found.score)}


PINNED = {
    "uninet": {
        "kd": 2.270964, "sc": 24.68192, "m": 5.82844, "total": 14.82269, "map 0": 3.242196, "map 1": 3.235831,
        "score 0": 3.282762, "score 1": 3.274624,
    },
    "recontrast": {
        "source": 1.456997, "target": 1.52838, "total": 2.985377, "map 0": 5.7514, "map 1": 5.759291,
        "score 0": 6.025145, "score 1": 6.045894,
    },
    "unias": {
        "mse": 2.901169, "cosine": 4.375195, "total": 72.76364, "map 0": 1.414968, "map 1": 1.415728,
        "score 0": 2.248898, "score 1": 2.222949,
    },
}  # fmt: skip
SETTINGS = {
    "uninet": {"model__flavor": "released", "model__backbone": "wide_resnet50_2"},
    "recontrast": {"model__setting": "multi-class", "model__backbone": "wide_resnet50_2"},
    "unias": {"model__backbone": "tf_efficientnet_b4", "data__image_size": 224},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PINNED)
def test_known_answers(make_config, monkeypatch, name):
    config = make_config(model__name=name, **SETTINGS[name])
    monkeypatch.setattr("model.peers.unias.NOISE_CHANCE", 0.0)
    found = answers(config, config.data.image_size[0])
    assert found == pytest.approx(PINNED[name], rel=3e-6)  # other processors round otherwise
