"""UniAS (WACV 2025): reconstruct a frozen backbone's features coarse to fine, one model for all categories.

A pixel decoder makes four maps of equal width; learned queries, gated by the image, pass four decoder levels
that attend to them in space and over channels; each level restores one stage of the backbone. What is
restored badly is anomalous: the map is the product of the four blurred cosine distances.

Legend: B images, C_l channels of stage l (fine to coarse), D = 256 width, G = 14 side of the query grid,
N = G^2 tokens. Stages are resized to G, 2 G, 4 G, 8 G, what they are anyway at 224 pixels and stride 16.
"""

import math
from functools import reduce
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.supervised import upsample
from model.backbone import BackboneInfo
from model.base import AnomalyModel, Batch
from model.decision import Prediction, distance_map
from utils.config import Config

D, G, HEADS, FFN, DROPOUT = 256, 14, 4, 2048, 0.1
Mask = Tensor | None
NEIGHBOURS = 7  # side of the neighbourhood that a position must not look at
NOISE, NOISE_CHANCE = 20.0, 0.5
LOSS_WEIGHT = 10.0  # as the public code has it for MVTec AD (1 for VisA: AdamW sees no constant factor)


class MGGCNN(nn.Module):
    """Multi-granularity gated CNN: GELU of chains of 1x1; 3x3; two 3x3; three 3x3 convolutions, added."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()

        def chain(count: int) -> nn.Sequential:
            if count == 0:
                return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1))
            widths = [in_channels] + [out_channels] * count
            return nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)))

        self.chains = nn.ModuleList(chain(count) for count in range(4))
        _xavier_uniform(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', h, w)."""
        return reduce(torch.add, (F.gelu(chain(x)) for chain in self.chains))


class ResidualAttention(nn.Module):
    """Attention added to x, then normalised."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, HEADS, DROPOUT, batch_first=True)
        self.drop, self.norm = nn.Dropout(DROPOUT), nn.LayerNorm(width)

    def forward(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Mask = None) -> Tensor:
        """Tokens x, query, key, value (B, T, width); mask (T, T), True where forbidden."""
        attended, _ = self.attention(query, key, value, attn_mask=mask, need_weights=False)
        return self.norm(x + self.drop(attended))


class FeedForward(nn.Module):
    """Two linear layers added to x, then normalised."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = nn.Sequential(nn.Linear(width, FFN), nn.ReLU(), nn.Dropout(DROPOUT))
        self.layers = hidden.append(nn.Linear(FFN, width))
        self.drop, self.norm = nn.Dropout(DROPOUT), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., width)."""
        return self.norm(x + self.drop(self.layers(x)))


class TransformerLayer(nn.Module):
    """Self attention, then feed-forward. The positions join query and key, never the value."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = ResidualAttention(width), FeedForward(width)

    def forward(self, x: Tensor, position: Tensor | None = None, mask: Mask = None) -> Tensor:
        """Tokens x (B, T, width), position (1, T, width), mask (T, T)."""
        placed = x if position is None else x + position
        return self.feed_forward(self.attention(x, placed, placed, x, mask))


class DecoderLevel(nn.Module):
    """Attention between positions (not to neighbours) plus attention between channels, then MGG-CNN.

    Each branch attends to the level first, then to itself. The queries' positions serve the spatial branch
    alone; the channel branch sees positions only in the level's keys.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spatial_cross, self.channel_cross = ResidualAttention(D), ResidualAttention(G * G)
        self.spatial, self.channel = TransformerLayer(D), TransformerLayer(G * G)
        self.local = MGGCNN(D, D)

    def forward(self, x: Tensor, level: Tensor, key_position: Tensor, position: Tensor, mask: Mask) -> Tensor:
        """Tokens x and level (B, N, D), positions (1, N, D), mask (N, N), True where forbidden; (B, N, D)."""
        key = level + key_position
        spatial = self.spatial(self.spatial_cross(x, x + position, key, level, mask), position, mask)
        x, key, level = (t.transpose(1, 2) for t in (x, key, level))
        channel = self.channel(self.channel_cross(x, x, key, level))
        return _tokens(self.local(_grid(spatial + channel.transpose(1, 2))))


class PixelDecoder(nn.Module):
    """A feature pyramid, a transformer on its coarsest stage: stages to maps (B, D, h, w), coarse to fine."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        *finer, coarsest = (2 * c for c in channels)  # blurred feature and what the blur took away
        self.enter = nn.Conv2d(coarsest, D, 1)
        self.encoder = nn.ModuleList(TransformerLayer(D) for _ in range(3))
        self.leave = nn.Conv2d(D, D, 3, padding=1, bias=False)
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, D, 1, bias=False), nn.GroupNorm(32, D)) for c in reversed(finer)
        )
        self.outputs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(D, D, 3, padding=1, bias=False), nn.GroupNorm(32, D), nn.ReLU())
            for _ in finer
        )
        _xavier_uniform(self.encoder)
        for conv in (self.enter, self.leave, *(block[0] for block in (*self.laterals, *self.outputs))):
            _scaled_uniform(conv)
        self.register_buffer("position", sine_positions(), persistent=False)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Stages (B, 2 C_l, h_l, w_l), fine to coarse."""
        tokens = _tokens(self.enter(inputs[-1]))
        for layer in self.encoder:
            tokens = layer(tokens, self.position)
        maps = [F.relu(self.leave(_grid(tokens)))]
        for x, lateral, output in zip(reversed(inputs[:-1]), self.laterals, self.outputs, strict=True):
            maps.append(output(lateral(x) + upsample(maps[-1], x.shape[2:])))
        return maps


class QueryMaker(nn.Module):
    """Learned queries, two sets of N, weighted by channel and by place as the image says."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2 * G * G, D))
        self.conv = nn.Conv2d(D, D, 3, padding=1)
        self.mlp = nn.Sequential(
            nn.Linear(D, D // 2), nn.ReLU(), nn.Linear(D // 2, D // 2), nn.ReLU(), nn.Linear(D // 2, D)
        )
        self.place = nn.Conv2d(2, 1, 7, padding=3)
        self.local = MGGCNN(2 * D, D)
        _xavier_uniform(self.mlp, self.place)

    def forward(self, coarsest: Tensor) -> Tensor:
        """(B, D, G, G) to tokens (B, N, D)."""
        x = self.conv(coarsest)
        channel = (self.mlp(x.mean(dim=(2, 3))) + self.mlp(x.amax(dim=(2, 3)))).sigmoid()  # (B, D)
        summary = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
        place = self.place(summary).sigmoid().flatten(1).repeat(1, 2)  # (B, 2 N)
        gated = self.queries * (channel[:, None] + place[:, :, None])  # (B, 2 N, D)
        # both sets of a channel side by side
        return _tokens(self.local(gated.transpose(1, 2).reshape(-1, 2 * D, G, G)))


class UniAS(AnomalyModel):
    """The whole model; the backbone is frozen."""

    def __init__(self, backbone: nn.Module, info: BackboneInfo, config: Config) -> None:
        super().__init__()
        if len(info.channels) != 4:
            raise ValueError(f"UniAS needs four strides such as 2, 4, 8, 16; model.strides is {info.strides}")
        self.configure(info, config)
        self.backbone = backbone.eval().requires_grad_(False)
        self.pixel_decoder, self.query_maker = PixelDecoder(info.channels), QueryMaker()
        widths = ((D, 1), (D, 2), (384, 4), (512, 8))
        self.to_grid = nn.ModuleList(
            nn.Sequential(nn.Conv2d(D, w, s, stride=s) if s > 1 else nn.Identity(), nn.Conv2d(w, D, 1))
            for w, s in widths
        )
        self.level_embedding = nn.Parameter(torch.randn(4, D))
        self.query_position = nn.Parameter(torch.randn(1, G * G, D))
        self.levels = nn.ModuleList(DecoderLevel() for _ in range(4))
        for level in self.levels:
            _xavier_uniform(level)
        for resize, project in (block.children() for block in self.to_grid):
            _scaled_uniform(project)
            if isinstance(resize, nn.Conv2d) and resize.bias is not None:
                _xavier_uniform(resize)
                nn.init.zeros_(resize.bias)
        self.norm = nn.LayerNorm(D)  # one for all heads
        self.heads = nn.ModuleList(
            nn.Sequential(*(nn.Conv2d(D, c, 3, padding=1) for c in (D, D, channels)))
            for channels in reversed(info.channels)
        )
        self.register_buffer("position", sine_positions(), persistent=False)
        self.register_buffer("forbidden", neighbour_mask(), persistent=False)

    def targets(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Blurred stages, which are restored, and the inputs (B, 2 C_l, h_l, w_l), fine to coarse."""
        with torch.no_grad():
            stages = [_resize(f.float(), G << (3 - i)) for i, f in enumerate(self.backbone(images))]
            blurred = [_blur(f, 3, 1.0) for f in stages]
            inputs = [torch.cat([g, f - g], dim=1) for f, g in zip(stages, blurred, strict=True)]
        return blurred, inputs

    def restore(self, inputs: list[Tensor]) -> list[Tensor]:
        """Inputs of `targets` to restored stages, fine to coarse."""
        maps = self.pixel_decoder(inputs)
        x, restored = self.query_maker(maps[0]), []
        for i, level_map in enumerate(maps):
            level = _tokens(self.to_grid[i](level_map)) + self.level_embedding[i]
            x = self.levels[i](x, level, self.position, self.query_position, self.forbidden)
            grid = upsample(_grid(self.norm(x)), [G << i, G << i], align_corners=True)
            restored.append(self.heads[i](grid))
        return restored[::-1]

    def loss(self, batch: Batch, progress: float | Tensor) -> dict[str, Tensor]:
        """`reconstruction_loss` of the four stages of image (B, 3, H, W), noise on some of the inputs."""
        targets, inputs = self.targets(batch["image"])
        # drawn on the device, which alone knows the outcome; so the noise is made in any case
        chosen = [torch.rand((), device=x.device) < NOISE_CHANCE for x in inputs]
        noisy = [torch.where(c, _with_noise(x), x) for c, x in zip(chosen, inputs, strict=True)]
        restored = self.restore(noisy)
        with torch.autocast(batch["image"].device.type, enabled=False):
            return reconstruction_loss(targets, restored)

    def predict(self, images: Tensor) -> Prediction:
        """Images (B, 3, H, W) to maps (B, H, W), each the product of four blurred ones, and scores (B,)."""
        target, inputs = self.targets(images)
        distances = []
        for i, (g, r) in enumerate(zip(target, self.restore(inputs), strict=True)):
            distance = distance_map(g, r)[:, None]
            distance = F.interpolate(distance, size=(8 * G, 8 * G), mode="bilinear", align_corners=False)
            size = 9 - 2 * i  # the finest stage is restored last and blurred most
            distances.append(_blur(distance, size, size / 3)[:, 0])
        return self.decision([reduce(torch.mul, distances)], (images.shape[2], images.shape[3]))


def reconstruction_loss(targets: list[Tensor], restored: list[Tensor]) -> dict[str, Tensor]:
    """Squared error plus cosine distance, summed over stages, times 10; each stage (B, C_l, h_l, w_l).

    The public code minimises the mean cosine itself, which pushes the wrong way; here it is 1 - cosine.
    """
    pairs = [(t.float(), r.float()) for t, r in zip(targets, restored, strict=True)]
    mse = torch.stack([F.mse_loss(r, t) for t, r in pairs]).sum()
    cosine = torch.stack([1 - F.cosine_similarity(r, t, dim=1).mean() for t, r in pairs]).sum()
    return {"mse": mse, "cosine": cosine, "total": LOSS_WEIGHT * (mse + cosine)}


def sine_positions() -> Tensor:
    """Sine positions of the grid, normalised to 2 pi: (1, N, D), half of the channels for each axis."""
    step = (torch.arange(G, dtype=torch.float32) + 1) / G * 2 * math.pi
    angle = step[:, None] / 10000 ** (2 * (torch.arange(D // 2) // 2) / (D // 2))
    axis = torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)  # (G, D / 2)
    y, x = axis[:, None].expand(-1, G, -1), axis[None].expand(G, -1, -1)
    return torch.cat([y, x], dim=2).view(1, G * G, D)


def neighbour_mask() -> Tensor:
    """(N, N), True where the second position lies in the 7 x 7 neighbourhood of the first: forbidden."""
    place = torch.stack(torch.meshgrid(torch.arange(G), torch.arange(G), indexing="ij")).flatten(1)
    return (place[:, :, None] - place[:, None]).abs().amax(dim=0) <= NEIGHBOURS // 2


def _xavier_uniform(*modules: nn.Module) -> None:
    """Xavier's uniform numbers for all matrices and kernels; biases and norms keep theirs."""
    for weight in (p for module in modules for p in module.parameters() if p.dim() > 1):
        nn.init.xavier_uniform_(weight)


def _scaled_uniform(conv: nn.Module) -> None:
    """Uniform numbers of variance 1 / fan-in, bias 0."""
    assert isinstance(conv, nn.Conv2d)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def _with_noise(x: Tensor) -> Tensor:
    """Normal noise, at each position as large as 20 times the feature's norm over its channels' number."""
    return x + torch.randn_like(x) * (NOISE * x.norm(dim=1, keepdim=True) / x.shape[1])


def _tokens(grid: Tensor) -> Tensor:
    return grid.flatten(2).transpose(1, 2)


def _grid(tokens: Tensor) -> Tensor:
    return tokens.transpose(1, 2).reshape(-1, tokens.shape[2], G, G)


def _resize(x: Tensor, side: int) -> Tensor:
    if tuple(x.shape[2:]) == (side, side):
        return x
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False, antialias=True)


def _blur(x: Tensor, size: int, sigma: float) -> Tensor:
    """Gaussian of `size` x `size` with mirrored borders, each channel for itself."""
    at = torch.arange(size, dtype=x.dtype, device=x.device) - size // 2
    line = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = (line[:, None] * line / line.sum() ** 2).expand(x.shape[1], 1, -1, -1)
    with torch.autocast(x.device.type, enabled=False):  # bf16 would round away what the blur takes off
        return F.conv2d(F.pad(x, [size // 2] * 4, mode="reflect"), kernel, groups=x.shape[1])
