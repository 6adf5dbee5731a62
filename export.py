"""Export a trained model: checkpoint -> one ONNX file that needs none of this code, checked against PyTorch.

python export.py --checkpoint RUN
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from datasets.build import DEMO_ROOT, build_test, images_below
from datasets.demo import write_demo
from datasets.transforms import Normalise
from model import build_model
from model.backbone import input_normalisation
from model.detector import inputs_of
from utils.checkpoint import load_trained, restore_model
from utils.cli import log, new_parser, run_command, say, user_path
from utils.config import Config
from utils.errors import DatasetError, ExportError
from utils.exporting import OUTPUTS, Deployed, Exported, check_size, describe, to_onnx
from utils.files import write_atomically

BATCH_SIZES = (1, 3)  # that the outputs are compared at
IMAGES = 6  # that they are compared on, spread over the set
TOLERANCE = 1e-3  # of the range of PyTorch's outputs
REPEATS = 5  # of the timing; the fastest counts


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN", help="a run folder or a checkpoint file"
    )
    parser.add_argument(
        "--output", type=user_path, metavar="FILE", help="default: model.onnx beside the checkpoint"
    )
    parser.add_argument(
        "--images",
        type=user_path,
        metavar="DIR",
        help="images to compare the outputs on; default: the run's test images, or else the demo's",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Export, compare with PyTorch on real images, and only then write the file."""
    args = parse_arguments(argv)
    path, state = load_trained(args.checkpoint)
    model = build_model(state.config, pretrained=False)
    restore_model(model, state.model, source=path)
    check_size(model)
    normalise = Normalise(*input_normalisation(state.config.model.backbone))
    images, raw = comparison_images(args.images, state.config, normalise)
    deployed = Deployed(model.deploy(), normalise)
    log.info("exporting (seconds to some minutes) ...")
    with torch.no_grad():
        exported = to_onnx(deployed, torch.cat([raw, raw])[:3], describe(state))
        say(compare(exported, model.eval(), images, raw))  # not the deployed one: it may be wrong as well
        say(timing(exported, deployed, raw))
    output = args.output or path.parent / "model.onnx"
    write_atomically(output, lambda file: file.write(exported.content))
    say(f"{output} ({len(exported.content) / 2**20:.1f} MB)")


def comparison_images(where: Path | None, config: Config, normalise: Normalise) -> tuple[Tensor, Tensor]:
    """Some real images, spread over a set: as `predict` takes them, and as uint8 RGB, channels last.

    Those below `where`, or else of the run's test set, or else the demo's.
    """
    if where is not None:
        data = images_below(where, config, normalise)
    else:
        try:
            data, *_ = build_test(config, config, normalise)
        except DatasetError as error:
            log.info("comparing on demo images, as the run's own are not there: %s", error)
            data = images_below(write_demo(DEMO_ROOT), config, normalise)
    spread = np.linspace(0, len(data) - 1, min(IMAGES, len(data))).round().astype(int).tolist()
    images = inputs_of(data.__getitems__(spread))
    data.normalise = torch.from_numpy  # the pixels themselves
    return images, inputs_of(data.__getitems__(spread))


def compare(exported: Exported, model: nn.Module, images: Tensor, raw: Tensor) -> str:
    """The largest differences of both outputs, in shares of the range of PyTorch's, in words.

    Raises:
        ExportError: if one is larger than TOLERANCE, or the shapes differ.
    """
    texts = []
    for size in BATCH_SIZES:
        parts = [model.predict(part) for part in images.split(size)]
        expected = [torch.cat([getattr(p, name) for p in parts]).numpy() for name in OUTPUTS]
        found = zip(*(exported.run(part.numpy()) for part in raw.split(size)), strict=True)
        for name, ours, theirs in zip(OUTPUTS, expected, map(np.concatenate, found), strict=True):
            # scores of few images may lie close together: a hundredth of their size counts as a range
            spread = max(float(np.ptp(ours)), float(np.abs(ours).max()) / 100)
            off = np.abs(ours - theirs).max() / spread if ours.shape == theirs.shape else np.inf
            if not off <= TOLERANCE:
                raise ExportError(
                    f"the exported model's {name} differs from PyTorch's by {off:.2g} of the range in "
                    f"batches of {size} (allowed: {TOLERANCE:g}); nothing was written"
                )
            texts.append(f"{name} {off:.1e} (batch {size})")
    return f"largest difference on {len(raw)} images, of the range: {', '.join(texts)}"


def timing(exported: Exported, model: nn.Module, raw: Tensor) -> str:
    """Milliseconds an image, one at a time, on the CPU: the exported model beside PyTorch."""
    image = raw[:1]

    def fastest(call: Callable[[], object]) -> float:
        seconds = []
        for _ in range(1 + REPEATS):  # the first one warms up
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return 1000 * min(seconds[1:])

    theirs, ours = fastest(lambda: exported.run(image.numpy())), fastest(lambda: model(image))
    return (
        f"ms an image (batch 1, CPU, {torch.get_num_threads()} threads, fastest of {REPEATS}): "
        f"ONNX Runtime {theirs:.1f}, PyTorch {ours:.1f}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
