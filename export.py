"""Export a trained model: checkpoint -> one ONNX file that needs none of this code, checked against PyTorch.

python export.py --checkpoint RUN

Legend: B images, H x W the model's size (data.image_size).
"""

import argparse
import json
import logging
import sys
import timeit
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import utils  # noqa: F401  # isort: skip  # before PyTorch
import numpy as np
import torch
from torch import Tensor, nn

from datasets.build import DEMO_ROOT, build_test, images_below
from datasets.demo import write_demo
from datasets.loader import evenly_spread
from datasets.transforms import Normalise
from model import Detector, load_detector
from model.base import AnomalyModel
from model.inference import inputs_of
from utils.checkpoint import Checkpoint
from utils.cli import log, new_parser, print_result, run_command, user_path
from utils.errors import DatasetError, ExportError
from utils.files import write_atomically
from utils.runs import git_sha

OUTPUTS = ("score", "anomaly_map")
BATCH_SIZES = (1, 3)  # that the outputs are compared at
IMAGES = 6  # that they are compared on, spread over the set
TOLERANCE = 1e-3  # of the range of PyTorch's outputs
REPEATS = 5  # of the timing after the first call; the fastest counts
LARGEST_BATCH = 4096  # the exporter wants a bound
LARGEST_FILE = 2**31 - 2**24  # bytes of weights: an ONNX file is at most 2 GiB, the graph included


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN", help="a run folder or a checkpoint file"
    )
    parser.add_argument(
        "--output", type=user_path, metavar="FILE", help="file (default: model.onnx, beside the checkpoint)"
    )
    parser.add_argument(
        "--images",
        type=user_path,
        metavar="DIR",
        help="images to compare the outputs on (default: the run's test images, else the demo's)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Export, compare with PyTorch on real images, and only then write the file."""
    args = parse_arguments(argv)
    detector = load_detector(args.checkpoint, device="cpu", precision="fp32")
    check_size(detector.model)
    images, raw = comparison_images(args.images, detector)
    deployed = Deployed(detector.model.deploy(), detector.normalise)
    log.info("exporting (seconds to some minutes) ...")
    with torch.no_grad():
        exported = to_onnx(deployed, torch.cat([raw, raw])[:3], describe(detector.state))
        print_result(compare(exported, detector.model, images, raw))
        print_result(timing(exported, deployed, raw))
    output = args.output or detector.path.parent / "model.onnx"
    write_atomically(output, lambda file: file.write(exported.content))
    print_result(f"{output} ({len(exported.content) / 2**20:.1f} MB)")


def check_size(model: AnomalyModel) -> None:
    """Stop before the long work if the weights do not fit into one ONNX file."""
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if size > LARGEST_FILE:
        sizes = f"the model holds {size / 2**30:.2f} GiB, an ONNX file at most {LARGEST_FILE / 2**30:.2f}"
        raise ExportError(f"{sizes}; lower model.bank_fraction or model.width, or take another --backbone")


def comparison_images(where: Path | None, detector: Detector) -> tuple[Tensor, Tensor]:
    """Some real images, spread over a set: as `predict` takes them, and as uint8 RGB, channels last.

    Those below `where`, or else of the run's test set, or else the demo's.
    """
    config, normalise = detector.config, detector.normalise
    if where is not None:
        data = images_below(where, config, normalise)
    else:
        try:
            data, *_ = build_test(config, config, normalise)
        except DatasetError as error:
            log.info("comparing on demo images, as the run's own are not there: %s", error)
            data = images_below(write_demo(DEMO_ROOT), config, normalise)
    images = inputs_of(data.__getitems__(evenly_spread(range(len(data)), IMAGES)))
    scale, offset = (torch.from_numpy(factor) for factor in normalise.factors())
    return images, ((images.movedim(-3, -1) - offset) / scale).round().to(torch.uint8)


class Deployed(nn.Module):
    """A deployed model behind the normalisation of its backbone; what is exported."""

    scale: Tensor
    offset: Tensor

    def __init__(self, model: AnomalyModel, normalise: Normalise) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        scale, offset = normalise.factors()
        self.register_buffer("scale", torch.from_numpy(scale))
        self.register_buffer("offset", torch.from_numpy(offset))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """RGB (B, H, W, 3) uint8, or frames (B, F, H, W, 3), to score (B,) and anomaly_map (B, H, W)."""
        prediction = self.model.predict((image.float() * self.scale + self.offset).movedim(-1, -3))
        return prediction.score, prediction.anomaly_map


@dataclass
class Exported:
    """The bytes of the file, and what it computes: uint8 images to score (B,) and anomaly_map (B, H, W)."""

    content: bytes
    run: Callable[[np.ndarray], Sequence[np.ndarray]]


def to_onnx(model: Deployed, image: Tensor, about: dict[str, str]) -> Exported:
    """Export by torch.export, and open the result in onnxruntime on the CPU.

    image: a sample input of at least two images. `about` becomes the file's metadata_props.
    """
    try:
        import onnx  # noqa: F401 (what torch needs)
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"{error.name} is not installed: pip install -r requirements-export.txt") from error
    for name in ("onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of every size that it takes as fixed, which the images' sizes are
        program = torch.onnx.export(
            model,
            (image,),
            dynamo=True,
            input_names=["image"],
            output_names=OUTPUTS,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)},),
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    for key, value in about.items():
        proto.metadata_props.add(key=key, value=value)
    content = proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as PyTorch, for the timing
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return Exported(content, lambda images: session.run(OUTPUTS, {"image": images}))


def describe(state: Checkpoint) -> dict[str, str]:
    """What a user of the file must know: how to make the input, what comes out, where it is from."""
    data, frames = state.config.data, state.config.model.head == "frame"
    height, width = data.image_size
    shape = f"(B, 2, {height}, {width}, 3): an earlier frame, and the one that is judged"
    about = {
        "input": f"image: uint8 RGB {shape if frames else f'(B, {height}, {width}, 3)'}; any B",
        "image_size": json.dumps(data.image_size),
        "center_crop": json.dumps(data.center_crop),
        "resize": f"{data.resize}, antialiased (Pillow), after the centre crop, which is a side in pixels, "
        "or up to 1 a share of each side",
        "normalisation": "inside the graph",
        "output": f"score: float32 (B,); anomaly_map: float32 (B, {height}, {width}); high is anomalous",
        "config": json.dumps(state.config.to_dict()),
        "training": f"{state.iteration} of {state.config.train.iterations} steps",
        "code": git_sha(),
    }
    if step := data.stack_frames:
        about["stacked_frames"] = f"grey: the pictures {2 * step} and {step} before, and the one judged"
    if state.calibration:
        about["calibration"] = json.dumps(state.calibration)
        about["p_value"] = "(1 + number of calibration.scores >= score) / (1 + number of calibration.scores)"
    return about


def compare(exported: Exported, model: AnomalyModel, images: Tensor, raw: Tensor) -> str:
    """The largest differences of both outputs, in shares of the range of PyTorch's, in words. Raises
    ExportError if one is larger than TOLERANCE, or the shapes differ.
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
                problem = f"the exported model's {name} differs from PyTorch's by {off:.2g} of the range"
                raise ExportError(f"{problem} (batch {size}, allowed: {TOLERANCE:g}); nothing was written")
            texts.append(f"{name} {off:.1e} (batch {size})")
    return f"largest difference on {len(raw)} images, of the range: {', '.join(texts)}"


def timing(exported: Exported, model: nn.Module, raw: Tensor) -> str:
    """Milliseconds per image, one at a time, on the CPU: the exported model beside PyTorch."""
    calls = (lambda: exported.run(raw[:1].numpy())), (lambda: model(raw[:1]))
    theirs, ours = (1000 * min(timeit.repeat(call, number=1, repeat=1 + REPEATS)[1:]) for call in calls)
    return (
        f"ms per image (batch 1, CPU, {torch.get_num_threads()} threads, fastest of {REPEATS}): "
        f"ONNX Runtime {theirs:.1f}, PyTorch {ours:.1f}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
