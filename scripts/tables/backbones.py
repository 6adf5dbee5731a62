"""Which timm backbones work: build each with random weights, and say what it gives or why it does not.

python -m scripts.tables.backbones --table
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import cast

import timm
import torch
from timm.models import FeatureInfo

from model.backbone import build_backbone, fitted_state, out_indices
from utils.cli import new_parser, print_result, run_command

WANTED = (4, 8, 16)
NAMES = (
    "wide_resnet50_2", "resnet18", "resnet50", "resnext50_32x4d", "seresnet50", "res2net50_26w_4s",
    "resnest14d", "regnetx_002", "regnety_032", "densenet121", "dla34", "vgg16_bn", "hrnet_w18_small",
    "tf_efficientnet_lite0", "efficientnet_b0", "tf_efficientnetv2_b0", "mobilenetv2_100",
    "mobilenetv3_large_100", "mobileone_s0", "repvgg_a0", "repvit_m0_9", "ghostnet_100", "fastvit_t8",
    "convnext_tiny", "convnextv2_atto", "edgenext_small", "efficientvit_b0", "mambaout_femto",
    "poolformer_s12", "pvt_v2_b0", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256",
    "maxvit_tiny_tf_224", "coatnet_0_rw_224", "hiera_tiny_224", "davit_tiny", "levit_128s",
    "vit_tiny_patch16_224", "vit_small_patch16_dinov3", "inception_v3", "mixer_s16_224",
)  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Print the table of all backbones, or of those named."""
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="timm names (default: those of the table)")
    parser.add_argument("--table", action="store_true", help="as Markdown, for docs/BACKBONES.md")
    parser.add_argument("--size", type=int, default=256, metavar="N", help="side of the images, pixels")
    args = parser.parse_args(argv)
    if args.table:
        print_result("backbone | channels at strides 4, 8, 16 | both signs | its own weights file")
        print_result("--- | --- | --- | ---")
    for name in args.names or NAMES:
        cells = row(name, args.size)
        print_result(" | ".join(filter(None, cells)) if args.table else "  ".join(cells))


def row(name: str, size: int) -> tuple[str, str, str, str]:
    """Name, strides with channels (or why there are none), signs, and whether its state dict is accepted."""
    try:
        strides = available(name)
        _, info = build_backbone(name, strides, image_size=(size, size), random_weights=True)
    except ValueError as error:
        return f"`{name}`", f"no: {error}", "", ""
    levels = Counter(f"{s}: {c}" for s, c in zip(info.strides, info.channels, strict=True))
    shown = ", ".join(f"{level} (x{n})" if n > 1 else level for level, n in levels.items())
    shown = shown if info.strides != WANTED else ", ".join(map(str, info.channels))
    return f"`{name}`", shown, "yes" if info.signed else "no", own_weights(name, strides)


def available(name: str) -> tuple[int, ...]:
    """Those of the default strides that the backbone has; its own finest ones if that are less than two.

    Where it has one alone, as a ViT, three levels of it.
    """
    try:
        with torch.device("meta"):
            strides = feature_info(name).reduction()
    except Exception:
        return WANTED  # building it will say why not
    both = tuple(s for s in WANTED if s in strides)
    own = tuple(sorted(set(strides)))[:3]
    return both if len(both) > 1 else own if len(own) > 1 else own * 3


def feature_info(name: str) -> FeatureInfo:
    """What timm tells of a backbone's features."""
    net = timm.create_model(name, features_only=True, pretrained=False)
    return cast(FeatureInfo, net.feature_info)  # an attribute of a module has no type


def own_weights(name: str, strides: tuple[int, ...]) -> str:
    """Whether the whole timm model's state dict, and no deeper one, is taken with --weights."""
    with torch.device("meta"):
        state = timm.create_model(name, pretrained=False).state_dict()
    options = {"features_only": True, "out_indices": out_indices(name, strides)}
    try:
        fitted_state(name, state, options, source="it")
    except ValueError as error:
        return f"no: {error}"
    return "read"


if __name__ == "__main__":
    sys.exit(run_command(main))
