"""Convolutions that keep their weights in the order that a CPU computes with, for inference.

oneDNN otherwise reorders a convolution's weights in each call, which at batch 1 takes up to an eighth of
the time of an image (benchmarks/README.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.layers import SameConv2d


class PackedConv2d(nn.Module):
    """A convolution for inference; its weights are reordered at the first call, for an input like that one.

    Later inputs may have another size (the order then fits less well), but not another precision.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv: nn.Conv2d | None = conv
        self.geometry = [list(x) for x in (conv.padding, conv.stride, conv.dilation)], conv.groups
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W'), in the precision of autocast where that is on."""
        if self.conv is not None:
            self._pack(x)
        lengths, groups = self.geometry
        x = x.to(self.dtype)
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *lengths, groups, "none", [], ""
        )

    def _pack(self, x: Tensor) -> None:
        conv, (lengths, groups) = self.conv, self.geometry
        self.dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        weight = conv.weight.detach().to(self.dtype).to_mkldnn()
        reorder = torch._C._nn.mkldnn_reorder_conv2d_weight
        self.weight = reorder(weight, *lengths, groups, list(x.shape))
        self.bias = None if conv.bias is None else conv.bias.detach().to(self.dtype)
        self.conv = None  # frees the weights as they were


def pack_convolutions(model: nn.Module, *, precision: str) -> nn.Module:
    """Replace the convolutions of a deployed model on a CPU, in place; any other model is left as it is.

    So is one that is to run in bf16 on a CPU without it: oneDNN has no packed weights for that.

    The result can only predict: it has no weights that could be saved, exported or moved.
    """
    usable = torch.backends.mkldnn.is_available() and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
    if usable and precision == "bf16":
        usable = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if usable and all(p.device.type == "cpu" and not p.requires_grad for p in model.parameters()):
        _replace(model)
    return model


def _replace(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        # exact types: timm's subclasses pad in their own way
        if (
            type(child) in (nn.Conv2d, SameConv2d)
            and child.padding_mode == "zeros"
            and not isinstance(child.padding, str)
        ):
            setattr(module, name, PackedConv2d(child))
        else:
            _replace(child)
