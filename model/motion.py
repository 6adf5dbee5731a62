"""How fast things move in a video: dense optical flow between two grey frames, and a score of its speed.

Farneback, "Two-Frame Motion Estimation Based on Polynomial Expansion" (SCIA 2003), with the numbers and the
border weights of OpenCV's calcOpticalFlowFarneback, in operations that GPUs and ONNX have.

Legend: B pairs of frames, H x W their size, h x w one of the pyramid's. Around each pixel a frame is
b . (x, y) + a . (x^2, y^2, xy) + constant; r = (b, a).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.decision import gaussian_blur, top_mean

REACH, SIGMA = 5, 1.2  # pixels to each side that a polynomial is fitted to, and its Gaussian weight
SCALES = (8, 4, 2, 1)  # of the pyramid, coarse to fine
SMALLEST = 32  # pixels of a reduced frame's shorter side
ROUNDS, WINDOW = 3, 15  # at each scale; side of the box in which the flow is one vector
DAMPING = 1e-3  # added to the determinant: where a frame shows nothing, nothing moves
CELLS = 32  # rows that the flow is averaged on; half as wide as high
PERSON = 2.0  # cells: the Gaussian within which one vector stands for a body, whose limbs move all ways
FASTEST = 0.005  # share of the cells whose mean is the speed
STILL, PRECISE = 0.01, 0.05  # pixels that count as no motion; share of a speed to which it is known
LEAST, MOST = 0.1, 1e3  # of the factor: where nothing moves, defects must show, too


class OpticalFlow(nn.Module):
    """The way of each pixel from one frame to another; nothing is learned or stored."""

    down: Tensor
    across: Tensor

    def __init__(self) -> None:
        super().__init__()
        down, across = expansion_filters()
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("across", across, persistent=False)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Grey frames (B, 1, H, W) in 0..255 to (B, 2, H, W): pixels to the right and down."""
        flow = torch.zeros_like(before[:, :, :1, :1]).repeat(1, 2, 1, 1)
        for scale in (s for s in SCALES if s == 1 or min(before.shape[2:]) >= SMALLEST * s):
            first, second = (self.expansion(reduced(frame, scale)) for frame in (before, after))
            size = first.shape[2:]
            flow = 2 * F.interpolate(flow, size, mode="bilinear", align_corners=False)
            weight = border_weight(size[0], first.device)[:, None] * border_weight(size[1], first.device)
            for _ in range(ROUNDS):
                flow = improved(flow, first, second, weight)
        return flow

    def expansion(self, images: Tensor) -> Tensor:
        """Images (N, 1, h, w) to r, (N, 5, h, w)."""
        padded = F.pad(images, (REACH,) * 4, mode="replicate")
        return F.conv2d(F.conv2d(padded, self.down), self.across)


def expansion_filters() -> tuple[Tensor, Tensor]:
    """Filters (3, 1, K, 1) and (5, 3, 1, K), one after the other: least squares with a Gaussian weight."""
    x = torch.arange(-REACH, REACH + 1, dtype=torch.float64)
    weight = (-0.5 * (x / SIGMA) ** 2).exp()
    moments = torch.stack([weight / weight.sum() * x**power for power in range(5)])
    powers = [(0, 0), (1, 0), (0, 1), (2, 0), (0, 2), (1, 1)]  # of x and y
    mean = moments.sum(dim=1)
    gram = torch.stack([torch.stack([mean[a + c] * mean[b + d] for c, d in powers]) for a, b in powers])
    across = torch.zeros(5, 3, len(x), dtype=torch.float64)
    for solution, (a, b) in zip(gram.inverse()[1:].T, powers, strict=True):
        across[:, b] += solution[:, None] * moments[a]
    return moments[:3, None, :, None].float(), across[:, :, None].float()


def reduced(images: Tensor, scale: int) -> Tensor:
    """(N, 1, H, W) smoothed, and at 1 / `scale` of the size."""
    sigma = (scale - 1) / 2 or 0.85  # this one is the kernel 1/4, 1/2, 1/4
    radius, (height, width) = max(1, round(1.25 * (scale - 1))), images.shape[2:]
    x = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = (-0.5 * (x / sigma) ** 2).softmax(dim=0)
    smooth = F.pad(images, (radius,) * 4, mode="reflect")
    smooth = F.conv2d(F.conv2d(smooth, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    size = (round(height / scale), round(width / scale))
    return F.interpolate(smooth, size, mode="bilinear", align_corners=False)


def border_weight(length: int, device: torch.device) -> Tensor:
    """(length,) weights of the pixels along a side: near the border a window is cut off."""
    place = torch.arange(length, device=device)
    nearest = torch.minimum(place, length - 1 - place)
    return torch.where(nearest < 2, 0.14, torch.where(nearest < 5, 0.4472, 1.0))


def improved(flow: Tensor, first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """One round: a flow (B, 2, h, w) to that by which both frames' polynomials (B, 5, h, w) agree best."""
    height, width = flow.shape[2:]
    x = torch.arange(width, device=flow.device) + flow[:, 0]
    y = torch.arange(height, device=flow.device)[:, None] + flow[:, 1]
    inside = ((x >= 0) & (x < width - 1) & (y >= 0) & (y < height - 1))[:, None]
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=3)
    moved = F.grid_sample(second, grid, align_corners=True)
    moved = torch.where(inside, moved, torch.cat([torch.zeros_like(flow), first[:, 2:]], dim=1))
    xx, yy, xy = ((first + moved) / 2 * weight)[:, 2:].unbind(1)
    xy = xy / 2
    right, down = ((first - moved) / 2 * weight)[:, :2].unbind(1)
    right, down = right + xx * flow[:, 0] + xy * flow[:, 1], down + xy * flow[:, 0] + yy * flow[:, 1]
    square = [xx * xx + xy * xy, (xx + yy) * xy, yy * yy + xy * xy]
    sums = torch.stack([*square, xx * right + xy * down, xy * right + yy * down], dim=1)
    box = torch.full((5, 1, WINDOW, 1), 1 / WINDOW, device=flow.device)  # avg_pool2d is ten times slower
    sums = F.pad(sums, (WINDOW // 2,) * 4, mode="replicate")
    a, b, c, u, v = F.conv2d(F.conv2d(sums, box, groups=5), box.mT, groups=5).unbind(1)
    return torch.stack([c * u - b * v, a * v - b * u], dim=1) / (a * c - b * b + DAMPING)[:, None]


class SpeedHead(nn.Module):
    """A factor of the model's own score: a power of the speed of what moves fastest, over its usual one.

    The frames are those that `data.stack_frames` puts into one image. By the power the logarithms of both
    spread alike on normals: of the scores as they are, the few high ones would set it (docs/LOG.md).
    """

    mean: Tensor
    std: Tensor
    centre: Tensor
    power: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """mean, std: by which images were normalised, per channel."""
        super().__init__()
        self.flow = OpticalFlow()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.register_buffer("centre", torch.zeros(()))
        self.register_buffer("power", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to factors (B,): 1 at the usual speed, and at all before `fit`."""
        return ((self.speed(images).log() - self.centre) * self.power).exp().clamp(LEAST, MOST)

    def speed(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to (B,), pixels from the frame in green to that in blue."""
        with torch.autocast(images.device.type, enabled=False):
            frames = 255 * (images.float() * self.std + self.mean)
            flow = self.flow(frames[:, 1:2], frames[:, 2:])
            cells = (CELLS, round(2 * CELLS * images.shape[3] / images.shape[2]))
            flow = F.interpolate(flow, cells, mode="bilinear", align_corners=False)
            speed = torch.stack([gaussian_blur(part, PERSON) for part in flow.unbind(1)]).norm(dim=0)
            return top_mean(speed, torch.full_like(speed[:, 0, 0], FASTEST), limit=FASTEST).clamp(min=STILL)

    def fit(self, own: Tensor, speed: Tensor) -> None:
        """Set the power from the model's own scores of normal images and their speeds, (N,) each."""
        own, speed = own.clamp(min=1e-6).log(), speed.log()
        spread, own_spread = speed.std(correction=0), own.std(correction=0)
        self.centre.copy_(speed.mean())
        self.power.copy_(torch.where(spread > 1e-3, own_spread / spread.clamp(min=PRECISE), 0))
