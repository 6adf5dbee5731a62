"""Convolutions prepared for inference on a CPU: weights in its order, sum and ReLU in the same pass.

oneDNN otherwise reorders a convolution's weights in each call, which at batch 1 takes up to an eighth of
the time of an image, and every ReLU and every sum of a residual block reads and writes its feature map
once more (benchmarks/README.md).
"""

from __future__ import annotations

import logging
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from model.bottleneck import MEM, PlainBlock
from model.layers import SameConv2d

_log = logging.getLogger("uninet")
TRACED = (MEM, PlainBlock, nn.Sequential)  # parts of ours; all take one feature map
SUMS = (operator.add, operator.iadd, torch.add)
RELUS = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    F.relu: ("relu", []),
    torch.relu: ("relu", []),
}


class PackedConv2d(nn.Module):
    """A convolution for inference; its weights are reordered at the first call, for an input like that one.

    Later inputs may have another size (the order then fits less well), but not another precision.
    `then`: the operation that follows, after the sum with `other` if there is one.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv: nn.Conv2d | None = conv
        self.geometry = [list(x) for x in (conv.padding, conv.stride, conv.dilation)], conv.groups
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.kernel, self.channels = conv.kernel_size, conv.out_channels
        self.then = ("none", [])

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """(B, C, H, W) to (B, C', H', W'), in autocast's precision where that is on; `other` is added."""
        if self.conv is not None:
            self._pack(x)
        lengths, groups = self.geometry
        x, (name, values) = x.to(self.dtype), self.then
        operation = torch.ops.mkldnn._convolution_pointwise
        if other is None:
            return operation(x, self.weight, self.bias, *lengths, groups, name, values, "")
        if other.shape != self._shape(x):  # the sum is wider than the convolution
            y = operation(x, self.weight, self.bias, *lengths, groups, "none", [], "") + other
            return y if name == "none" else y.clamp(*values) if values else y.relu()
        told = (*lengths, groups, "add", 1.0, None if name == "none" else name, values, "")
        return operation.binary(x, other.to(self.dtype), self.weight, self.bias, *told)

    def _shape(self, x: Tensor) -> tuple[int, ...]:
        (padding, stride, dilation), _ = self.geometry
        sizes = zip(x.shape[2:], self.kernel, padding, stride, dilation, strict=True)
        return x.shape[0], self.channels, *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, p, s, d in sizes)

    def _pack(self, x: Tensor) -> None:
        conv, (lengths, groups) = self.conv, self.geometry
        self.dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        weight = conv.weight.detach().to(self.dtype).to_mkldnn()
        reorder = torch._C._nn.mkldnn_reorder_conv2d_weight
        self.weight = reorder(weight, *lengths, groups, list(x.shape))
        self.bias = None if conv.bias is None else conv.bias.detach().to(self.dtype)
        self.conv = None  # frees the weights as they were


def pack_convolutions(model: nn.Module, *, precision: str) -> nn.Module:
    """Prepare the convolutions of a deployed model on a CPU, in place; any other model is left as it is.

    Each is packed, and in networks that can be traced does the sum and the ReLU that follow. Left as it is,
    too, is a model that is to run in bf16 on a CPU without it: oneDNN has no packed weights for that.

    The result can only predict: it has no weights that could be saved, exported or moved.
    """
    usable = torch.backends.mkldnn.is_available() and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
    if usable and precision == "bf16":
        usable = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if usable and all(p.device.type == "cpu" and not p.requires_grad for p in model.parameters()):
        _replace(model)
        _fuse_networks(model)
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


def _fuse_networks(module: nn.Module) -> None:
    """Give each network among the descendants its fused form; one that cannot be traced stays as it is."""
    for name, child in list(module.named_children()):
        is_backbone = hasattr(
            child, "feature_info"
        )  # timm's, traced as a whole: what is in it is not ours to know
        if not is_backbone and not isinstance(child, TRACED):
            _fuse_networks(child)
            continue
        try:
            setattr(module, name, fused(child))
        except Exception as error:  # any layer may refuse in its own way
            _log.debug("%s is not fused: %s", type(child).__name__, error)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every single layer: those that compute with sizes could not be traced."""
        return isinstance(m, PackedConv2d) or not list(m.children())


def fused(network: nn.Module) -> fx.GraphModule:
    """The same network in eval mode, each ReLU and each sum that follows a packed convolution done by it."""
    graph = _Tracer().trace(network)
    traced = fx.GraphModule(network, graph)
    for node in list(graph.nodes):
        if isinstance(_module(traced, node), nn.Identity):
            _drop(graph, node, node.args[0])
    convolutions = [n for n in graph.nodes if isinstance(_module(traced, n), PackedConv2d)]
    calls = [n.target for n in convolutions]
    ready: set[fx.Node] = set()  # what is computed before the convolution at hand
    for node in list(graph.nodes):
        if node in convolutions and calls.count(node.target) == 1:
            conv = traced.get_submodule(node.target)
            following = _only_user(node)
            if following is not None and following.target in SUMS:
                others = [a for a in following.args if a is not node]
                if len(others) == 1 and others[0] in ready and not following.kwargs:
                    node.args = (*node.args, others[0])
                    _drop(graph, following, node)
                    following = _only_user(node)
            then = None if following is None else RELUS.get(_kind(traced, following))
            if then is not None:
                conv.then = then
                _drop(graph, following, node)
        ready.add(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return traced.get_submodule(node.target) if node.op == "call_module" else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _kind(traced: fx.GraphModule, node: fx.Node) -> object:
    module = _module(traced, node)
    return node.target if module is None else type(module)


def _drop(graph: fx.Graph, node: fx.Node, replacement: fx.Node) -> None:
    node.replace_all_uses_with(replacement)
    graph.erase_node(node)
