"""Networks of UniNet's authors, ReContrast and anomalib: names and shapes of tensors, and what they compute.

The tables are loops over layers, for any channels `c` of the teacher's three levels, fine to coarse. `half`
is the width of each branch of UniNet's bottleneck: half of the coarsest level's channels, in anomalib a
quarter. What is computed are the parts behind the teachers.
"""

import math

import timm
import torch
import torch.nn.functional as F

WIDE, TINY = (256, 512, 1024), (32, 48, 192)  # of WideResNet50-2 and of timm's test_resnet


# --- names and shapes ---------------------------------------------------------------------------------------


def norm(name, n):
    vectors = {f"{name}.{kind}": (n,) for kind in ("weight", "bias", "running_mean", "running_var")}
    return vectors | {f"{name}.num_batches_tracked": ()}


def step(conv, bn, out, before, kernel, *, bias=False, transposed=False):
    """A convolution and its batch norm."""
    shape = (before, out) if transposed else (out, before)
    own = {f"{conv}.weight": (*shape, kernel, kernel)} | ({f"{conv}.bias": (out,)} if bias else {})
    return own | norm(bn, out)


def residual(p, before, inner, out, *, shortcut=None, doubles=False):
    table = step(f"{p}.conv1", f"{p}.bn1", inner, before, 1)
    table |= step(f"{p}.conv2", f"{p}.bn2", inner, inner, 2 if doubles else 3)
    table |= step(f"{p}.conv3", f"{p}.bn3", out, inner, 1)
    if shortcut:
        kernel = 2 if doubles else 1
        names = f"{p}.{shortcut}.0", f"{p}.{shortcut}.1"
        table |= step(*names, out, before, kernel, transposed=doubles)
    return table


def wide_resnet(p=""):
    """WideResNet50-2 up to its third stage."""
    table, before = step(f"{p}conv1", f"{p}bn1", 64, 3, 7), 64
    for layer, (inner, blocks) in enumerate(((128, 3), (256, 4), (512, 6)), start=1):
        for i in range(blocks):
            first = "downsample" if i == 0 else None
            table |= residual(f"{p}layer{layer}.{i}", before, inner, 2 * inner, shortcut=first)
            before = 2 * inner
    return table


def tiny_resnet(p=""):
    """Of timm, for tests."""
    net = timm.create_model("test_resnet", features_only=True, out_indices=(1, 2, 3), pretrained=False)
    return {p + name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def fusion(p, c):
    table = step(f"{p}conv1", f"{p}bn1", c[1], c[0], 3) | step(f"{p}conv2", f"{p}bn2", c[2], c[1], 3)
    table |= step(f"{p}conv3", f"{p}bn3", c[2], c[1], 3)
    return table | step(f"{p}conv4", f"{p}bn4", 2 * c[2], 4 * c[2], 1)


def mem_bottleneck(p, c, half):
    table, before, out = fusion(p, c), 3 * c[2], 2 * c[2]
    for i in range(3):
        b = f"{p}bn_layer.0.{i}."
        for name, bns, bias in (("conv3x3", ("bn2", "bn5"), False), ("conv7x7", ("bn4", "bn6"), True)):
            table |= step(b + name, b + bns[0], half, before // 2, 3, bias=bias)
            table |= step(f"{b}{name}_", b + bns[1], half, half, 3, bias=bias)
        table |= step(f"{b}conv3", f"{b}bn3", out, 2 * half, 1) | norm(f"{b}bn7", 2 * half)
        if i == 0:
            table |= step(f"{b}downsample.0", f"{b}downsample.1", out, before, 1)
        before = out
    return table


def plain_bottleneck(p, c):
    table, before = fusion(p, c), 3 * c[2]
    for i in range(3):
        first = "downsample" if i == 0 else None
        table |= residual(f"{p}bn_layer.{i}", before, c[2], 2 * c[2], shortcut=first)
        before = 2 * c[2]
    return table


def decoder(p, c):
    table, before = {}, 2 * c[2]
    for layer, (out, blocks) in enumerate(((c[2], 3), (c[1], 4), (c[0], 6)), start=1):
        for i in range(blocks):
            first = {"shortcut": "upsample", "doubles": True} if i == 0 else {}
            table |= residual(f"{p}layer{layer}.{i}", before, out // 2, out, **first)
            before = out
    return table


def authors(c=TINY, teacher=tiny_resnet, *, polyp=False):
    st = decoder("st.", c) | {"st.fc.weight": (1, c[0]), "st.fc.bias": (1,)}
    st |= {"st.conv1x1_1.weight": (1, c[0], 1, 1)} if polyp else {}
    return teacher("tt.") | mem_bottleneck("bn.", c, c[2] // 2) | st


def recontrast(c=TINY, teacher=tiny_resnet):
    table = teacher("encoder.") | teacher("encoder_freeze.") | plain_bottleneck("bottleneck.", c)
    table |= decoder("decoder.", c)
    for n, width in enumerate(c, start=1):
        for i in (0, 1):
            name = f"decoder.out{n}.{i}"
            table |= {f"{name}.weight": (width, width, 1, 1), f"{name}.bias": (width,)}
    return table


def anomalib(c=TINY, teacher=tiny_resnet):
    table = teacher("model.teachers.source_teacher.") | teacher("model.teachers.target_teacher.")
    table |= mem_bottleneck("model.bottleneck.", c, c[2] // 4) | decoder("model.student.", c)
    table |= {f"model.dfs.theta{n}": (1, width, 1, 1) for n, width in enumerate(c, start=1)}
    table |= {"model.fc.weight": (1, c[0]), "model.fc.bias": (1,)}
    return table | {"post_processor._image_threshold": (), "post_processor.image_min": ()}


TABLES = {"uninet": authors, "recontrast": recontrast, "anomalib": anomalib}


def values(table, seed=0):
    """Random tensors of these shapes, such that nothing grows through the layers."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, shape in table.items():
        n = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            n = torch.tensor(7)
        elif name.endswith("running_var"):
            n = 1 + n.abs()
        elif n.dim() == 4 and "theta" not in name:
            n = n / math.sqrt(n[0].numel())
        found[name] = n
    return found


def write(path, tensors, name="uninet"):
    """A file as the program saves it."""
    tree = dict(tensors)
    if name == "uninet":
        tree = {"tt": {}, "bn": {}, "st": {}, "dfs": {}}
        for key, tensor in tensors.items():
            part, _, rest = key.partition(".")
            tree[part][rest] = tensor
    if name == "anomalib":
        tensors["post_processor.image_min"] = torch.tensor(math.nan)  # until a validation
        tree = {"epoch": 3, "pytorch-lightning_version": "2.6", "state_dict": tensors, "hyper_parameters": {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tree, path)
    return path


# --- what the networks compute ------------------------------------------------------------------------------


def bn(s, name, x):
    kinds = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(s[f"{name}.{kind}"] for kind in kinds))


def conv_bn(s, p, conv, norm_name, x, stride=1):
    weight = s[f"{p}{conv}.weight"]
    y = F.conv2d(x, weight, s.get(f"{p}{conv}.bias"), stride=stride, padding=weight.shape[-1] // 2)
    return bn(s, f"{p}{norm_name}", y)


def fused(s, p, features):
    a = F.relu(conv_bn(s, p, "conv1", "bn1", features[0], 2))
    a = F.relu(conv_bn(s, p, "conv2", "bn2", a, 2))
    return torch.cat([a, F.relu(conv_bn(s, p, "conv3", "bn3", features[1], 2)), features[2]], dim=1)


def their_mem(s, p, features):
    x = fused(s, p, features)
    for i in range(3):
        b, stride = f"{p}bn_layer.{i}.", 2 if i == 0 else 1
        left, right = x.chunk(2, dim=1)
        left = F.relu(conv_bn(s, b, "conv3x3", "bn2", left, stride))
        right = F.relu(conv_bn(s, b, "conv7x7", "bn4", right, stride))
        both = [conv_bn(s, b, "conv3x3_", "bn5", left), conv_bn(s, b, "conv7x7_", "bn6", right)]
        shortcut = conv_bn(s, b, "downsample.0", "downsample.1", x, 2) if i == 0 else x
        x = F.relu(conv_bn(s, b, "conv3", "bn3", torch.cat(both, dim=1)) + shortcut)
    return x


def their_plain(s, p, features):
    x = fused(s, p, features)
    for i in range(3):
        b = f"{p}bn_layer.{i}."
        y = F.relu(conv_bn(s, b, "conv1", "bn1", x))
        y = F.relu(conv_bn(s, b, "conv2", "bn2", y, 2 if i == 0 else 1))
        shortcut = conv_bn(s, b, "downsample.0", "downsample.1", x, 2) if i == 0 else x
        x = F.relu(conv_bn(s, b, "conv3", "bn3", y) + shortcut)
    return x


def their_decoder(s, p, x):
    """Fine to coarse."""
    outputs = []
    for layer, blocks in enumerate((3, 4, 6), start=1):
        for i in range(blocks):
            b, shortcut = f"{p}layer{layer}.{i}.", x
            y = F.relu(conv_bn(s, b, "conv1", "bn1", x))
            if i == 0:
                y = bn(s, f"{b}bn2", F.conv_transpose2d(y, s[f"{b}conv2.weight"], stride=2))
                doubled = F.conv_transpose2d(x, s[f"{b}upsample.0.weight"], stride=2)
                shortcut = bn(s, f"{b}upsample.1", doubled)
            else:
                y = conv_bn(s, b, "conv2", "bn2", y)
            x = F.relu(conv_bn(s, b, "conv3", "bn3", F.relu(y)) + shortcut)
        outputs.append(x)
    return outputs[::-1]


def their_outputs(s, features):
    """ReContrast: each half of the batch through output convolutions of its own."""
    found = their_decoder(s, "decoder.", their_plain(s, "bottleneck.", features))
    outputs = []
    for n, x in enumerate(found, start=1):
        halves = enumerate(x.chunk(2))
        names = f"decoder.out{n}"
        outputs.append(
            torch.cat([F.conv2d(h, s[f"{names}.{i}.weight"], s[f"{names}.{i}.bias"]) for i, h in halves])
        )
    return outputs


RESTORE = {
    "uninet": lambda s, x: their_decoder(s, "st.", their_mem(s, "bn.", x)),
    "recontrast": their_outputs,
    "anomalib": lambda s, x: their_decoder(s, "model.student.", their_mem(s, "model.bottleneck.", x)),
}
