"""UniAS: masks, shapes, noise, the product of maps, and that it learns."""

import pytest
import torch
import torch.nn.functional as F

from losses.reconstruction import reconstruction_loss
from model import build_model
from model.unias import MGGCNN, D, G, UniAS, _blur, _with_noise, neighbour_mask, sine_positions


@pytest.fixture
def model(make_config):
    torch.manual_seed(0)
    return build_model(make_config(model__name="unias"))


def test_neighbours_are_forbidden_and_nothing_else():
    mask = neighbour_mask()
    assert mask.shape == (G * G, G * G) and torch.equal(mask, mask.T)
    middle, corner = 7 * G + 7, 0
    allowed = (~mask[middle]).view(G, G)
    assert not allowed[4:11, 4:11].any() and int(allowed.sum()) == G * G - 49
    assert int(mask[corner].sum()) == 16


def test_spatial_branch_does_not_look_at_neighbours(model):
    level = model.levels[0].eval().spatial
    x, other = torch.randn(1, G * G, D), torch.zeros(1, G * G, D)
    mask = neighbour_mask()
    middle = 7 * G + 7
    near = mask[middle].nonzero().flatten()
    changed = other.clone()
    changed[:, near] = torch.randn(1, len(near), D)
    far = other.clone()
    far[:, 0] = 1
    with torch.no_grad():
        cross = [
            level.cross(x, t, t, attn_mask=mask, need_weights=False)[0][0, middle]
            for t in (other, changed, far)
        ]
    torch.testing.assert_close(cross[0], cross[1])
    assert (cross[0] - cross[2]).abs().max() > 1e-6


def test_mgg_cnn(model):
    block = MGGCNN(8, 5)
    assert [len(chain) for chain in block.chains] == [1, 1, 2, 3]
    assert [chain[0].kernel_size[0] for chain in block.chains] == [1, 3, 3, 3]
    x = torch.randn(2, 8, 6, 7)
    assert block(x).shape == (2, 5, 6, 7)
    torch.testing.assert_close(block(x), sum(F.gelu(chain(x)) for chain in block.chains))


def test_positions_differ_and_are_bounded():
    position = sine_positions()[0]
    assert position.shape == (G * G, D) and position.abs().max() <= 1
    assert torch.cdist(position, position).add(torch.eye(G * G) * 9).min() > 0.1


def test_blur_is_a_normalised_gaussian():
    x = torch.zeros(1, 2, 9, 9)
    x[0, 0, 4, 4] = 1
    y = _blur(x, 3, 1.0)
    assert y[0, 1].abs().max() == 0 and y.sum().item() == pytest.approx(1)
    assert (y[0, 0, 4, 5] / y[0, 0, 4, 4]).item() == pytest.approx(float(torch.exp(torch.tensor(-0.5))))


def test_noise_is_as_large_as_stated():
    x = torch.randn(4, 32, 20, 20)
    added = _with_noise(x) - x
    expected = 20 * x.norm(dim=1, keepdim=True) / 32
    assert (added / expected).std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_shapes_at_any_size(model, size):
    images = torch.randn(2, 3, *size)
    target, inputs = model.targets(images)
    restored = model.eval().restore(inputs)
    assert [r.shape for r in restored] == [t.shape for t in target]
    assert [t.shape[2] for t in target] == [112, 56, 28, 14]
    with torch.no_grad():
        found, alone = model.predict(images), model.predict(images[1:])
    assert found.anomaly_map.shape == (2, *size) and found.score.shape == (2,)
    torch.testing.assert_close(found.score[1:], alone.score, rtol=1e-3, atol=1e-5)


def test_map_is_the_product_of_blurred_distances(model, monkeypatch):
    images = torch.randn(1, 3, 64, 64)
    model.eval()
    target, inputs = model.targets(images)
    with torch.no_grad():
        restored = model.restore(inputs)
        found = model.predict(images).anomaly_map
    product = torch.ones(1, 1, 112, 112)
    for (t, r), size in zip(zip(target, restored), (9, 7, 5, 3)):  # finest stage first
        d = F.interpolate((t - r).norm(dim=1, keepdim=True), size=112, mode="bilinear", align_corners=True)
        product = product * _blur(d, size, size / 3)
    expected = F.interpolate(product, size=64, mode="bilinear", align_corners=True)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_loss_by_hand_and_its_sign():
    t, r = [torch.randn(2, 3, 4, 4)], [torch.randn(2, 3, 4, 4)]
    parts = reconstruction_loss(t, r, weight=10)
    expected = ((t[0] - r[0]) ** 2).mean() + (1 - F.cosine_similarity(t[0], r[0], dim=1)).mean()
    torch.testing.assert_close(parts["total"], 10 * expected)
    assert reconstruction_loss(t, t, weight=1)["total"].abs() < 1e-5


def test_a_few_steps_lower_the_loss_and_leave_the_backbone(model):
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameter_groups(_Optim()), weight_decay=0)
    batch = {"image": torch.randn(2, 3, 64, 64)}
    model.train()
    losses = []
    for _ in range(6):
        loss = model.loss(batch, 0.0)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []


class _Optim:
    lr = 1e-4


def test_it_needs_four_levels(make_config):
    with pytest.raises(ValueError, match="needs four strides"):
        build_model(make_config(model__name="unias", model__strides=[4, 8, 16]))


def test_settings(make_config):
    config = make_config(model__name="unias")
    assert config.model.setting == "multi-class" and config.model.strides == (2, 4, 8, 16)
    assert (config.optim.preset, config.train.epochs) == ("one-class", None)
    assert (config.optim.schedule, config.optim.grad_clip, config.train.batch_size) == ("tenth", 0.1, 64)
    assert isinstance(build_model(config), UniAS)
