"""Operations that a training step launches on a GPU, counted without one: tensors have shapes and no values.

python benchmarks/launches.py

A step that waits for the device, by reading a value, stops here with an error.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from protocol import Spec  # noqa: E402
from shapes import configuration, halve_branches  # noqa: E402
from tables import markdown  # noqa: E402

from losses import similarity  # noqa: E402
from model import build_model  # noqa: E402
from model.base import AnomalyModel  # noqa: E402
from model.step import TrainingStep  # noqa: E402
from utils.cli import new_parser, print_result, run_command  # noqa: E402
from utils.config import Config  # noqa: E402
from utils.layers import load_config  # noqa: E402
from utils.optim import make_optimizer  # noqa: E402
from utils.yaml_io import CONFIGS  # noqa: E402

NOTHING = ("empty", "detach", "lift_fresh", "_unsafe_view", "_reshape_alias")  # to compute, beside views
MODELS = {
    "UniNet, peer's shape": (Spec("train", variant="peer"), {}),
    "ReMIND, lite0": (None, {"model.name": "remind", "model.backbone": "tf_efficientnet_lite0"}),
    "UniNet, paper": (Spec("train", variant="paper"), {}),
    "UniNet, released": (Spec("train", variant="released"), {}),
    "ReContrast": (None, {"model.name": "recontrast"}),
    "UniAS": (None, {"model.name": "unias"}),
}


class Launches(TorchDispatchMode):
    """Counts the operations that compute something, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Pass each operation on."""
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        name = func.overloadpacket.__name__
        if func.namespace != "prim" and not views and not name.startswith(NOTHING):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def without_values(model: AnomalyModel) -> Iterator[None]:
    """Weights and buffers of the model, and all tensors that are made meanwhile, have shapes alone.

    They say that they are on a CPU, as torch's backward pass asks a GPU's driver; what a GPU has otherwise is
    set.
    """
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(similarity, "_onednn_multiplies", lambda: False),
        mock.patch.dict(similarity.BLOCK_ELEMENTS, cpu=similarity.BLOCK_ELEMENTS["cuda"]),
    ):
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = nn.Parameter(_like(p), p.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = _like(buffer)
        yield


def _like(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)


def counted_step(
    config: Config, batch: dict[str, tuple], model: AnomalyModel | None = None, *, steps: int = 2
) -> Counter[str]:
    """Operations of the last of some steps of a model, by name; it is built if it is not given.

    batch: shape and type of what a batch holds. The first step makes the optimiser's state as well.
    """
    model = (model or build_model(config, pretrained=False)).to(memory_format=torch.channels_last).train()
    with without_values(model):
        optimizer, _ = make_optimizer(model.parameter_groups(config.optim), config, fused=True)
        step = TrainingStep(model, optimizer, config)
        step.done, step.good = torch.empty(2, dtype=torch.float64).unbind()  # a constant's value can be read
        for group in optimizer.param_groups:
            group["lr"] = torch.empty(())
        for _ in range(steps):
            inputs = {name: torch.zeros(s, dtype=d) for name, (s, d) in batch.items()}
            with Launches() as launches:
                step(inputs)
    return launches.counts


def batch_of(config: Config) -> dict[str, tuple]:
    """Shapes and types of a batch of normal images, with masks where the model learns from them."""
    size = (config.data.tile, config.data.tile) if config.data.tile else config.data.image_size
    batch = {"image": ((config.train.batch_size, 3, *size), torch.float32)}
    if config.model.name == "remind":
        batch["mask"] = ((config.train.batch_size, 1, *size), torch.uint8)
    return batch


def rows(precision: str) -> Iterator[list[str]]:
    """Name, precision, operations in all, and casts among them."""
    for name, (spec, settings) in MODELS.items():
        if spec is None:
            chosen = {"model.weights": "random", "train.precision": precision, "train.batch_size": 8}
            config = load_config(CONFIGS / "mvtec.yaml", chosen | settings)
        else:
            config = configuration(replace(spec, precision=precision))
        model = build_model(config, pretrained=False)
        if name == "UniNet, peer's shape":
            halve_branches(model)
        counts = counted_step(config, batch_of(config), model)
        yield [name, precision, str(counts.total()), str(counts["_to_copy"])]


def main(argv: Sequence[str]) -> None:
    """Print a table, each row as it comes."""
    new_parser(__doc__.split("\n")[0]).parse_args(argv)
    head = ["model", "precision", "operations", "of these casts"]
    print_result(f"torch {torch.__version__}\n\n{markdown([head])}")
    for precision in ("fp32", "bf16"):
        for row in rows(precision):
            print_result(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    sys.exit(run_command(main))
