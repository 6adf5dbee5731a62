"""UniAS: attention by plain formulas, masks, shapes, noise, the product of maps, and that it learns."""

import copy
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from datasets.loader import batches_per_epoch
from datasets.transforms import augment_batch, by_category
from model import build_model
from model.backbone import PINNED, BackboneInfo
from model.peers import unias
from model.peers.unias import (
    MGGCNN,
    UniAS,
    _blur,
    _with_noise,
    neighbour_mask,
    reconstruction_loss,
    sine_positions,
)
from utils.config import Config
from utils.errors import ConfigError
from utils.layers import load_config
from utils.yaml_io import build

SMALL = {
    "D": 32,
    "G": 4,
    "FFN": 64,
    "NEIGHBOURS": 3,
}  # for the model of most tests: the same code, seconds less
D, G = SMALL["D"], SMALL["G"]
N = G * G


@pytest.fixture
def model(make_config, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(unias, name, value)
    return build_model(make_config(model__name="unias")).eval()


def attended(block, x, query, key, value, forbidden=None):
    """norm(x + attention) as the formulas say, head by head; tokens (T, width)."""
    mha, heads = block.attention, 4
    width = x.shape[1]
    projections = zip((query, key, value), mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3))
    q, k, v = (t @ w.T + b for t, w, b in projections)
    found = []
    for part in torch.arange(width).chunk(heads):
        similarity = q[:, part] @ k[:, part].T / math.sqrt(width / heads)
        if forbidden is not None:
            similarity[forbidden] = -math.inf
        found.append(similarity.softmax(dim=1) @ v[:, part])
    out = torch.cat(found, dim=1) @ mha.out_proj.weight.T + mha.out_proj.bias
    return F.layer_norm(x + out, (width,), block.norm.weight, block.norm.bias)


def fed_forward(block, x):
    """norm(x + W2 relu(W1 x))."""
    first, _, _, second = block.layers
    hidden = (x @ first.weight.T + first.bias).clamp(min=0)
    out = hidden @ second.weight.T + second.bias
    return F.layer_norm(x + out, x.shape[1:], block.norm.weight, block.norm.bias)


def unlike_start(module):
    """A float64 copy whose biases and norms count, too."""
    module = copy.deepcopy(module).double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return module


@torch.no_grad()
def test_decoder_level_by_plain_formulas(model):
    level = unlike_start(model.levels[1])
    x, source, sine, place = (torch.randn(N, D, dtype=torch.float64) for _ in range(4))
    mask = neighbour_mask()
    spatial = attended(level.spatial_cross, x, x + place, source + sine, source, mask)
    spatial = attended(level.spatial.attention, spatial, spatial + place, spatial + place, spatial, mask)
    spatial = fed_forward(level.spatial.feed_forward, spatial)
    channel = attended(level.channel_cross, x.T, x.T, (source + sine).T, source.T)
    channel = attended(level.channel.attention, channel, channel, channel, channel)
    channel = fed_forward(level.channel.feed_forward, channel)
    expected = level.local((spatial + channel.T).T.reshape(1, D, G, G)).flatten(2)[0].T
    found = level(x[None], source[None], sine[None], place[None], mask)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_level_embedding_joins_the_level_itself(model):
    """And so keys and values of both branches; sine positions and the queries' places are passed apart."""
    seen = []
    for level in model.levels:
        level.register_forward_pre_hook(lambda module, args: seen.append(args))
    maps = [torch.randn(1, D, G << i, G << i) for i in range(4)]
    model.pixel_decoder = nn.Identity()
    model.restore(maps)
    for i, (_, level, sine, place, mask) in enumerate(seen):
        projected = model.to_grid[i](maps[i]).flatten(2).transpose(1, 2)
        torch.testing.assert_close(level - projected, model.level_embedding[i].expand(1, N, D))
        assert torch.equal(sine, model.position) and torch.equal(place, model.query_position)
        assert torch.equal(mask, model.forbidden)


@torch.no_grad()
def test_positions_join_each_layer_of_the_pixel_encoder(model):
    decoder = unlike_start(model.pixel_decoder)
    position = decoder.position[0]
    coarsest = torch.randn(1, decoder.enter.in_channels, G, G, dtype=torch.float64)
    x = decoder.enter(coarsest).flatten(2)[0].T
    for layer in decoder.encoder:
        x = attended(layer.attention, x, x + position, x + position, x)
        x = fed_forward(layer.feed_forward, x)
    expected = decoder.leave(x.T.reshape(1, D, G, G)).clamp(min=0)
    finer = [torch.zeros(1, block[0].in_channels, G, G).double() for block in reversed(decoder.laterals)]
    torch.testing.assert_close(decoder([*finer, coarsest])[0], expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_queries_of_both_sets_lie_side_by_side(model):
    maker, seen = model.query_maker, []
    maker.local.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    coarsest = torch.randn(2, D, G, G)
    maker(coarsest)
    x = maker.conv(coarsest)
    channel = (maker.mlp(x.mean((2, 3))) + maker.mlp(x.amax((2, 3)))).sigmoid()
    place = maker.place(torch.stack([x.mean(1), x.amax(1)], dim=1)).sigmoid()
    for b, c, which, row, column in ((0, 0, 0, 0, 0), (1, 17, 1, 3, 2), (0, 31, 0, 1, 3)):
        query = maker.queries[which * N + row * G + column, c]
        expected = query * (channel[b, c] + place[b, 0, row, column])
        torch.testing.assert_close(seen[0][b, 2 * c + which, row, column], expected)


class TestAsPublished:
    """Facts of the authors' modules, built with the published settings."""

    @pytest.fixture(scope="class")
    def published(self):
        info = BackboneInfo(
            "", (24, 32, 56, 160), (2, 4, 8, 16), (0,) * 3, (1,) * 3, signed=True, image_size=(64, 64)
        )
        torch.manual_seed(0)
        return UniAS(nn.Identity(), info, load_config("configs/mvtec.yaml", {"model.name": "unias"}))

    def test_number_of_parameters(self, published):
        assert sum(p.numel() for p in published.parameters()) == 53_847_523
        assert len(list(published.parameters())) == 324

    @torch.no_grad()
    def test_sizes(self, published):
        inputs = [torch.randn(1, 2 * c, s, s) for c, s in ((24, 112), (32, 56), (56, 28), (160, 14))]
        restored = published.eval().restore(inputs)
        assert [r.shape[1:] for r in restored] == [(x.shape[1] // 2, *x.shape[2:]) for x in inputs]

    def test_one_norm_for_all_heads(self, published):
        norms = [name for name, m in published.named_modules() if isinstance(m, nn.LayerNorm)]
        assert [name for name in norms if "levels" not in name and "encoder" not in name] == ["norm"]

    def test_no_bias_before_group_norm(self, published):
        decoder = published.pixel_decoder
        blocks = [*decoder.laterals, *decoder.outputs]
        assert len(blocks) == 6 and all(block[0].bias is None for block in blocks)
        assert all(block[1].num_groups == 32 for block in blocks) and decoder.leave.bias is None

    def test_initialisation(self, published):
        """Bounds of uniform numbers: Xavier's, 1 / fan-in for the projections, PyTorch's for the heads."""
        projections = ("pixel_decoder.enter", "pixel_decoder.leave", "laterals", "outputs")
        projections += tuple(f"to_grid.{i}.1" for i in range(4))
        for name, p in published.named_parameters():
            if p.dim() < 2 or name in ("level_embedding", "query_position", "query_maker.queries"):
                continue
            receptive = p[0, 0].numel() if p.dim() > 2 else 1
            fan_in, fan_out = p.shape[1] * receptive, p.shape[0] * receptive
            bound = math.sqrt(6 / (fan_in + fan_out))
            if any(part in name for part in projections):
                bound = math.sqrt(3 / fan_in)
            elif name.startswith("heads") or name == "query_maker.conv.weight":
                bound = 1 / math.sqrt(fan_in)
            if p.numel() > 1000:
                assert p.abs().max().item() == pytest.approx(bound, rel=0.02), name
                assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
            assert p.abs().max() <= bound
        for i, (resize, project) in enumerate(published.to_grid):
            assert not project.bias.any() and (i == 0 or not resize.bias.any())
        for p in (published.level_embedding, published.query_position, published.query_maker.queries):
            assert p.std().item() == pytest.approx(1, rel=0.05)

    def test_backbone(self):
        assert timm.get_pretrained_cfg(PINNED["tf_efficientnet_b4"]).tag == "aa_in1k"
        net = timm.create_model("tf_efficientnet_b4", features_only=True, out_indices=(0, 1, 2, 3))
        assert net.feature_info.channels() == [24, 32, 56, 160]
        assert net.feature_info.reduction() == [2, 4, 8, 16] and net.bn1.eps == 1e-3


def test_neighbours_are_forbidden_and_nothing_else():
    mask = neighbour_mask()
    assert mask.shape == (196, 196) and torch.equal(mask, mask.T)
    middle, corner = 7 * 14 + 7, 0
    allowed = (~mask[middle]).view(14, 14)
    assert not allowed[4:11, 4:11].any() and int(allowed.sum()) == 196 - 49
    assert int(mask[corner].sum()) == 16


def test_mgg_cnn():
    block = MGGCNN(8, 5)
    assert [len(chain) for chain in block.chains] == [1, 1, 2, 3]
    assert [chain[0].kernel_size[0] for chain in block.chains] == [1, 3, 3, 3]
    x = torch.randn(2, 8, 6, 7)
    assert block(x).shape == (2, 5, 6, 7)
    torch.testing.assert_close(block(x), sum(F.gelu(chain(x)) for chain in block.chains))


def test_positions_differ_and_are_bounded():
    position = sine_positions()[0]
    assert position.shape == (196, 256) and position.abs().max() <= 1
    row, column = position[5 * 14 + 2, :128], position[5 * 14 + 2, 128:]
    for half, place in ((row, 6), (column, 3)):  # places count from 1
        for i in (0, 7, 63):
            angle = place / 14 * 2 * math.pi / 10000 ** (i / 64)
            expected = [math.sin(angle), math.cos(angle)]
            assert half[2 * i : 2 * i + 2].tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.cdist(position, position).add(torch.eye(196) * 9).min() > 0.1


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


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_shapes_at_any_size(model, size):
    images = torch.randn(2, 3, *size)
    target, inputs = model.targets(images)
    restored = model.restore(inputs)
    assert [r.shape for r in restored] == [t.shape for t in target]
    assert [t.shape[2] for t in target] == [8 * G, 4 * G, 2 * G, G]
    found, alone = model.predict(images), model.predict(images[1:])
    assert found.anomaly_map.shape == (2, *size) and found.score.shape == (2,)
    torch.testing.assert_close(found.score[1:], alone.score, rtol=1e-3, atol=1e-5)


def test_map_is_the_product_of_blurred_distances(model, monkeypatch):
    images = torch.randn(1, 3, 64, 64)
    target, _ = model.targets(images)
    restored = [torch.randn_like(t) for t in target]
    monkeypatch.setattr(model, "restore", lambda inputs: restored)
    found = model.predict(images)
    product = torch.ones(1, 1, 32, 32)
    for t, r, size in zip(target, restored, (9, 7, 5, 3)):  # finest stage first
        cosine = (t * r).sum(1, keepdim=True) / (t.norm(dim=1, keepdim=True) * r.norm(dim=1, keepdim=True))
        d = F.interpolate(1 - cosine, size=32, mode="bilinear", align_corners=False)
        product = product * _blur(d, size, size / 3)
    expected = F.interpolate(product, scale_factor=2, mode="bilinear", align_corners=True)[:, 0]
    torch.testing.assert_close(found.anomaly_map, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.score, expected.amax((1, 2)), rtol=1e-4, atol=1e-5)


def test_loss_by_hand_and_its_sign():
    t, r = [torch.randn(2, 3, 4, 4)], [torch.randn(2, 3, 4, 4)]
    parts = reconstruction_loss(t, r)
    expected = ((t[0] - r[0]) ** 2).mean() + (1 - F.cosine_similarity(t[0], r[0], dim=1)).mean()
    torch.testing.assert_close(parts["total"], 10 * expected)
    assert reconstruction_loss(t, t)["total"].abs() < 1e-5


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
    assert config.train.last_batch == "keep" and config.data.augment == "by-category"
    published = load_config("configs/mvtec.yaml", {"model.name": "unias"})
    assert published.model.backbone == "tf_efficientnet_b4" and published.data.image_size == (224, 224)
    assert published.train.epochs * batches_per_epoch(3629, 64, published.train.last_batch) == 57_000


class TestAugmentation:
    def test_each_category_as_listed(self, make_config):
        """In a batch of two categories the listed one is changed, mask alike; the other one is not."""
        listed = make_config(model__name="unias").data.augment_by_category
        assert listed["screw"] == ("hflip", "vflip", "rot90") and "hazelnut" not in listed
        config = make_config(model__name="unias", data__augment_by_category={"pill": ["hflip", "vflip"]})
        batch = {"image": torch.rand(64, 3, 4, 4), "mask": torch.randint(0, 2, (64, 1, 4, 4))}
        names = ["pill", "hazelnut"] * 32
        found = augment_batch(batch, config, 3, names)
        same = [(found["image"][i] == batch["image"][i]).all().item() for i in range(64)]
        assert all(same[1::2]) and 5 < sum(same[::2]) < 27
        again = augment_batch(batch, config, 3, names)
        assert torch.equal(found["image"], again["image"]) and torch.equal(found["mask"], again["mask"])
        assert not torch.equal(augment_batch(batch, config, 4, names)["image"], found["image"])
        for i in range(0, 64, 2):
            changes = [lambda t: t, lambda t: t.flip(-1), lambda t: t.flip(-2), lambda t: t.flip(-1, -2)]
            (change,) = [c for c in changes if torch.equal(c(batch["image"][i]), found["image"][i])]
            assert torch.equal(change(batch["mask"][i]), found["mask"][i])

    @pytest.mark.parametrize(("names", "shares"), [
        ((), {"0123": 1}), (("hflip",), {"0123": 0.7, "1032": 0.3}), (("vflip",), {"0123": 0.7, "2301": 0.3}),
        (("hflip", "vflip"), {"0123": 0.49, "1032": 0.21, "2301": 0.21, "3210": 0.09}),
        (("rot90",), {"0123": 0.25, "1302": 0.25, "3210": 0.25, "2031": 0.25}),
    ])  # fmt: skip
    def test_how_often(self, names, shares):
        """A 2 x 2 picture 01/23 after each change, and its share of 4000 draws."""
        image = torch.arange(4.0).view(1, 1, 2, 2).expand(4000, -1, -1, -1)
        found = by_category({"image": image}, [names] * 4000, np.random.default_rng(0))["image"]
        seen = ["".join(str(int(v)) for v in x.flatten()) for x in found]
        assert set(seen) == set(shares)
        for picture, share in shares.items():
            assert seen.count(picture) / 4000 == pytest.approx(share, abs=0.025)

    def test_wrong_settings(self, make_config):
        with pytest.raises(ConfigError, match=r"needs square ones.*\[96, 64\].*augment=none"):
            make_config(model__name="unias", data__image_size=[96, 64])
        make_config(model__name="unias", data__image_size=[96, 64], data__augment="none")
        with pytest.raises(ConfigError, match=r"augment_by_category.pill is 'turn'; choose one of hflip"):
            make_config(model__name="unias", data__augment_by_category={"pill": ["turn"]})
        tree = make_config(model__name="unias").to_dict()
        assert build(Config, tree).to_dict() == tree
        tree["data"]["augment_by_category"] = ["pill"]
        with pytest.raises(ConfigError, match="names and their values"):
            build(Config, tree)
