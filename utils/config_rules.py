"""Which settings go together: rules between keys of different sections."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from utils.errors import ConfigError

if TYPE_CHECKING:
    from utils.config import Config

SMALLEST_CROP = 8  # pixels
WITH_DECODER = ("uninet", "remind", "recontrast")  # their student mirrors the backbone's levels
HEAD_LOSSES = {
    "none": ("none",),
    "label": ("bce",),
    "mask": ("bce", "dice", "structure"),
    "frame": ("mse",),
}


def scaled_side(side: int, scale: float) -> int:
    """Pixels of a side at one of `train.scales`, a multiple of 32: every level has whole positions."""
    return side if scale == 1 else max(32, round(side * scale / 32) * 32)


def check_together(config: Config) -> None:
    """Stop at settings that are each allowed, but not together.

    Raises:
        ConfigError: naming them, and what goes with what.
    """
    head, loss = config.model.head, config.loss.supervised
    if loss not in HEAD_LOSSES[head]:
        raise ConfigError(
            f"model.head {head} and loss.supervised {loss} do not go together; "
            f"with that head loss.supervised is one of {', '.join(HEAD_LOSSES[head])}"
        )
    if config.data.frame_offset and head != "frame":
        raise ConfigError("data.frame_offset needs a model that looks at frames: model.head=frame")
    if head == "frame" and config.data.synthetic:
        raise ConfigError(
            "data.synthetic draws defects on single images; a frame head needs data.synthetic=0"
        )
    kinds = set(config.data.synthetic_kinds if config.data.synthetic else ())
    if not config.data.stack_frames and kinds & {"speed", "zoom"}:
        raise ConfigError("synthetic defects of the kinds speed and zoom need data.stack_frames, such as 1")
    if config.data.stack_frames and head == "frame":
        raise ConfigError(
            "data.stack_frames makes one image of three frames; model.head=frame needs data.stack_frames=0"
        )
    if config.data.synthetic and not config.data.synthetic_kinds:
        raise ConfigError("data.synthetic_kinds is empty; data.synthetic needs kinds to draw from")
    if config.model.setting == "supervised" and config.model.name not in ("uninet", "remind"):
        raise ConfigError(
            f"--setting supervised is for uninet and remind; {config.model.name} learns from normal images"
        )
    if head == "frame" and (config.data.augment != "none" or config.train.scales != (1.0,)):
        raise ConfigError("data.augment and train.scales are for single images; video needs none and [1.0]")
    if config.data.augment == "by-category":
        height, width = config.data.image_size
        if height != width and any("rot90" in names for names in config.data.augment_by_category.values()):
            raise ConfigError(
                f"data.augment_by_category turns images (rot90), which needs square ones; data.image_size is "
                f"{[height, width]}: set another, or --set data.augment=none"
            )
    if config.score.blur_size is not None and config.score.blur_size % 2 == 0:
        raise ConfigError(f"score.blur_size {config.score.blur_size} must be odd: a kernel has a middle")
    if not config.train.scales:
        raise ConfigError("train.scales is empty; one size is [1.0]")
    _check_levels(config)
    _check_sizes(config)
    if config.model.student_backbone and config.model.name not in WITH_DECODER:
        raise ConfigError(
            f"model.student_backbone is for {', '.join(WITH_DECODER)}, not for {config.model.name}"
        )


def _check_levels(config: Config) -> None:
    model, strides = config.model, list(config.model.strides)
    least = 2 if model.name == "memory-bank" else 1
    if len(strides) < least:
        raise ConfigError(f"model.strides is {strides}; {model.name} needs {least} at least, such as [8, 16]")
    if model.name in WITH_DECODER and any(b != 2 * a for a, b in pairwise(strides)):
        raise ConfigError(f"model.strides is {strides}; each is twice the one before, such as [4, 8, 16]")
    if any(kernel % 2 == 0 for kernel in model.mem_kernels or ()):
        raise ConfigError(f"model.mem_kernels is {model.mem_kernels}; kernels have odd sides")


def _check_sizes(config: Config) -> None:
    crop = config.data.center_crop
    if crop is not None and crop > 1 and (crop < SMALLEST_CROP or crop % 1):
        raise ConfigError(
            f"data.center_crop is {crop:g}; above 1 it is a side in whole pixels, at least {SMALLEST_CROP}, "
            "and up to 1 a share of each side"
        )
    data, model = config.data, config.model
    seen, sizes = ("image_size", data.image_size) if data.tile is None else ("tile", (data.tile,))
    multiple = 2 * model.strides[-1]
    for scale in (1.0, *config.train.scales) if model.name in WITH_DECODER else ():
        scaled = [scaled_side(n, scale) for n in sizes]
        if any(n % multiple for n in scaled):
            shown = list(sizes) if data.tile is None else data.tile
            found = "" if scale == 1 else f", and train.scales {scale:g} gives {scaled}"
            raise ConfigError(
                f"data.{seen} {shown} must be multiples of {multiple}, twice the coarsest stride{found}"
            )
    if data.tile is None:
        return
    if data.tile > min(data.image_size):
        raise ConfigError(
            f"data.tile {data.tile} is larger than data.image_size {list(data.image_size)}, the size "
            "of whole images: set that to what they are worked on at, such as --set data.image_size=1024"
        )
    if model.head in ("label", "frame"):
        raise ConfigError(f"data.tile does not go with model.head {model.head}, which judges whole images")
