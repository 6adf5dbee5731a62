"""Convolution with batch norm, and its exact folding into one convolution (Eq. 3)."""

import copy
import logging
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_log = logging.getLogger("uninet")
BatchNorm = nn.modules.batchnorm._BatchNorm
Convolution = nn.Conv2d | nn.ConvTranspose2d
FOLDING_ERROR = {"cpu": 1e-4, "cuda": 1e-2}  # of the largest output; a GPU may convolve in TF32


class SameConv2d(nn.Conv2d):
    """A convolution that keeps the size (divided by the stride); the map may be smaller than the kernel.

    Rows and columns of the kernel that then see nothing but padding are left out: oneDNN leaves their
    gradient unset in bf16 where it should be zero (torch 2.14, 7 x 7 on 2 x 2).
    """

    padding: tuple[int, int]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        top, left = (max(0, p + 1 - n) for p, n in zip(self.padding, x.shape[2:], strict=True))
        if not top and not left:
            return super().forward(x)
        height, width = self.kernel_size
        weight = self.weight[:, :, top : height - top, left : width - left]
        padding = self.padding[0] - top, self.padding[1] - left
        return F.conv2d(x, weight, self.bias, self.stride, padding)


def conv_bn(
    in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, bias: bool = False
) -> nn.Sequential:
    """A convolution that keeps the size (divided by the stride) and its batch norm."""
    conv = SameConv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


def chunk(x: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of a batch (2B, ...). `Tensor.chunk` ties an exported graph to the batch size."""
    middle = x.shape[0] // 2
    return x[:middle], x[middle:]


def init_weights(module: nn.Module) -> None:
    """Kaiming normal (fan-out) for convolutions, 1 and 0 for batch norm; transposed ones keep theirs."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)


@torch.no_grad()
def folded_weights(conv: Convolution, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that equals `norm(conv(x))` in eval mode (Eq. 3).

    omega^R = omega * gamma / sqrt(sigma^2 + eps), b^R = b + (bias - mu) * gamma / sqrt(sigma^2 + eps), with
    the convolution's own bias, zero in the paper. Computed in float64.
    """
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    factor = norm.weight.double() / torch.sqrt(variance.double() + norm.eps)
    shape = (1, -1, 1, 1) if isinstance(conv, nn.ConvTranspose2d) else (-1, 1, 1, 1)
    bias = conv.bias.double() if conv.bias is not None else torch.zeros_like(factor)
    weight = conv.weight.double() * factor.view(shape)
    offset = norm.bias.double() + (bias - mean.double()) * factor
    return weight.to(conv.weight.dtype), offset.to(conv.weight.dtype)


def fold(conv: Convolution, norm: BatchNorm) -> Convolution:
    """The convolution `conv` with `norm` folded in; replaces both."""
    weight, bias = folded_weights(conv, norm)
    conv.weight.data = weight.contiguous(memory_format=torch.channels_last)
    conv.bias = nn.Parameter(bias, requires_grad=False)
    return conv


@torch.no_grad()
def fold_batch_norms(module: nn.Module, *inputs: object) -> None:
    """Fold each batch norm of a module in eval mode into the convolution that it follows, in place.

    Which ones follow which is seen while module(*inputs) runs, not taken from the order of registration. A
    module that gives something else when folded stays as it is, with a warning. timm's combined norm and
    activation keeps its activation.
    """
    names = {child: name for name, child in module.named_modules()}
    if not any(isinstance(child, BatchNorm) for child in names):
        return
    pairs, expected = _followed(module, inputs)
    for conv, norm in pairs:
        _replace(module, names[conv], fold(copy.deepcopy(conv), norm))
        rest = [getattr(norm, x) for x in ("drop", "act") if hasattr(norm, x)]  # of timm's BatchNormAct2d
        _replace(module, names[norm], nn.Sequential(*rest))
    if not _same(module(*copy.deepcopy(inputs)), expected):
        kind = type(module).__name__
        _log.warning("a %s gives something else with its batch norms folded: left as it is", kind)
        for child in (child for pair in pairs for child in pair):
            _replace(module, names[child], child)


def _followed(module: nn.Module, inputs: tuple) -> tuple[list[tuple[Convolution, BatchNorm]], object]:
    """Pairs of a convolution and the batch norm that takes what it gives, each used once; and the output."""
    calls: Counter[nn.Module] = Counter()
    given: dict[int, tuple[Convolution, Tensor]] = {}
    pairs: list[tuple[Convolution, BatchNorm]] = []

    def after(child: nn.Module, args: tuple, output: Tensor) -> None:
        calls[child] += 1
        if isinstance(child, Convolution):
            given[id(output)] = child, output  # which keeps the output, and so its id
        elif isinstance(child, BatchNorm) and child.weight is not None and id(args[0]) in given:
            pairs.append((given.pop(id(args[0]))[0], child))

    kinds = (nn.Conv2d, nn.ConvTranspose2d, BatchNorm)
    hooks = [m.register_forward_hook(after) for m in module.modules() if isinstance(m, kinds)]
    expected = module(*copy.deepcopy(inputs))
    for hook in hooks:
        hook.remove()
    return [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1], expected


def _same(found: object, expected: object) -> bool:
    """Whether outputs, tensors or sequences of them, agree up to rounding."""
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        assert isinstance(found, Sequence) and isinstance(expected, Sequence)
        return all(map(_same, found, expected))
    error = FOLDING_ERROR[expected.device.type] * expected.abs().amax()
    return found.shape == expected.shape and bool((found - expected).abs().amax() <= error)


def _replace(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, child)
