"""The student: a decoder that mirrors the backbone and restores each level's features (Sec. 3, Fig. 1 d).

Legend: B images, C_i channels of level i (fine to coarse), w width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from model.backbone import BackboneInfo, backbone_channels
from model.bottleneck import Bottleneck
from model.layers import chunk, conv_bn, init_weights
from utils.config import ModelConfig

# model.student_activation
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": partial(nn.ReLU, inplace=True), "gelu": nn.GELU}


class DecoderBlock(nn.Module):
    """Residual bottleneck block (1x1, 3x3, 1x1) with inner width half the output, as in WideResNet50-2.

    upsample: the size is doubled by a 2 x 2 stride-2 transposed convolution in both paths.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, upsample: bool, activation: str = "relu"
    ) -> None:
        super().__init__()
        inner = out_channels // 2
        middle = _double(inner, inner) if upsample else conv_bn(inner, inner, 3)
        same: Callable[..., nn.Module] = nn.Identity if in_channels == out_channels else conv_bn
        self.shortcut = _double(in_channels, out_channels) if upsample else same(in_channels, out_channels, 1)
        act = ACTIVATIONS[activation]
        self.body = nn.Sequential(
            conv_bn(in_channels, inner, 1), act(), middle, act(), conv_bn(inner, out_channels, 1)
        )
        self.activation = act()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H, W), or twice the size."""
        return self.activation(self.body(x) + self.shortcut(x))


def _double(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class Student(nn.Module):
    """Decode the embedding into one feature map per level, returned fine to coarse like the teachers'.

    Stages of 3, 4 and 6 blocks from the coarsest level on (WideResNet50-2's first three stages, mirrored).
    The first block of a stage doubles the size, unless the level before has the same stride (`info`).
    width, own: a stage has `width` times the channels of the teacher's level, or of `own` (fine to coarse).
    Where the teacher's features have both signs, and where widths differ, a 1 x 1 convolution leads to the
    teacher's channels; elsewhere a stage ends in ReLU, as a ResNet teacher's level does.
    skips: the teacher's features are added between a stage and the next (the released code, for polyps).
    outputs: 2 gives each half of the batch a 1 x 1 convolution of its own, as in ReContrast.
    """

    def __init__(
        self,
        info: BackboneInfo,
        in_channels: int,
        *,
        width: float = 1,
        own: tuple[int, ...] | None = None,
        skips: bool = False,
        outputs: int = 1,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        blocks = (3, 4) + (6,) * (len(info.channels) - 2)
        larger = [*(a < b for a, b in pairwise(info.strides)), True]  # than the one before, fine to coarse
        self.stages, self.skips = nn.ModuleList(), nn.ModuleList()
        self.heads, self.second_heads = nn.ModuleList(), nn.ModuleList()
        levels = zip(info.channels, own or info.channels, larger, strict=True)
        for (c, o, upsample), count in zip(reversed([*levels]), blocks, strict=False):
            inner = round(o * width)
            block = partial(DecoderBlock, activation=activation)
            stage = [block(in_channels, inner, upsample=upsample)]
            stage += [block(inner, inner, upsample=False) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(*stage))
            needed = info.signed or inner != c or outputs == 2
            self.heads.append(nn.Conv2d(inner, c, 1) if needed else nn.Identity())
            if outputs == 2:
                self.second_heads.append(nn.Conv2d(inner, c, 1))
            if skips and len(self.stages) < len(info.channels):
                self.skips.append(nn.Conv2d(c, inner, 1) if inner != c else nn.Identity())
            in_channels = inner
        init_weights(self)

    def forward(self, embedding: Tensor, teacher: Sequence[Tensor]) -> list[Tensor]:
        """(B, C, H, W) to one (B, C_i, H_i, W_i) per level, fine to coarse.

        teacher: the features, fine to coarse, that the embedding was made of; only `skips` use them.
        """
        outputs, x = [], embedding
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if self.second_heads:
                first, second = chunk(x)
                outputs.append(torch.cat([self.heads[i](first), self.second_heads[i](second)]))
            else:
                outputs.append(self.heads[i](x))
            if i < len(self.skips):
                x = x + self.skips[i](teacher[-1 - i])
        return outputs[::-1]


def build_bottleneck_and_student(
    info: BackboneInfo, config: ModelConfig, *, outputs: int = 1
) -> tuple[Bottleneck, Student]:
    """Both for the teacher's levels (`info`); `outputs` per level as in `Student`."""
    own = config.student_backbone and backbone_channels(config.student_backbone, config.strides)
    bottleneck = Bottleneck(info, width=config.width, kernels=config.mem_kernels, reparam=config.mem_reparam)
    student = Student(
        info, bottleneck.out_channels, width=config.width, own=own or None,
        skips=config.skip_connections, outputs=outputs, activation=config.student_activation,
    )  # fmt: skip
    return bottleneck, student
