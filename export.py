"""Export a trained model: checkpoint -> one ONNX file that needs none of this code, checked against PyTorch.

python export.py --checkpoint RUN

Legend: B images, H x W their size, h x w the model's (data.image_size).
"""

import argparse
import json
import logging
import sys
import timeit
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import utils  # noqa: F401  # isort: skip  # before PyTorch
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from datasets.build import DEMO_ROOT, build_test, images_below
from datasets.demo import write_demo
from datasets.images import read_image
from datasets.loader import ImageSet, evenly_spread
from datasets.transforms import Decode, Normalise, grey_tensor
from datasets.video import FrameSet
from model import Detector, load_detector
from model.base import AnomalyModel
from model.detector import Calibration, check_rate
from model.exported import FILE, OUTPUTS, contents, open_session
from predict import about_decisions
from utils.cli import log, new_parser, print_result, run_command, user_path
from utils.errors import DatasetError, ExportError
from utils.files import write_atomically
from utils.runs import git_sha

FORMAT = "1"  # of inputs, outputs and metadata
DECISION = ("p_value", "is_anomalous")  # outputs, too, of a run that held normal images out
IMAGES = 6  # that the outputs are compared on, spread over the set
SIZES = ((0.6, 0.6), (0.2, 0.3))  # and three of them at these shares of width and height
TOLERANCE = 1e-4  # of the range of PyTorch's outputs
REPEATS = 5  # of the timing after the first call; the fastest counts
LARGEST_BATCH, SMALLEST_SIDE, LARGEST_SIDE = 4096, 8, 2**24  # the exporter wants bounds
LARGEST_FILE = 2**31 - 2**24  # bytes of weights: an ONNX file is at most 2 GiB, the graph included


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__.split("\n")[0])
    text = "a run folder or a checkpoint file"
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help=text)
    text = "file (default: model.onnx, beside the checkpoint)"
    parser.add_argument("--output", type=user_path, metavar="FILE", help=text)
    text = "images to compare the outputs on (default: the run's test images, else the demo's)"
    parser.add_argument("--images", type=user_path, metavar="DIR", help=text)
    text = "share of normal images that may be flagged, where the file's user gives none"
    parser.add_argument("--false-alarm-rate", type=float, default=0.01, metavar="R", help=text)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Export, compare with PyTorch on real images, and only then write the file."""
    args = parse_arguments(argv)
    rate = args.false_alarm_rate
    check_rate(rate)
    detector = load_detector(args.checkpoint, device="cpu", precision="fp32")
    output = args.output or detector.path.parent / FILE
    if output.is_dir() or output.suffix == ".pt":
        raise ExportError(f"--output {output} is a folder or a checkpoint; name a file, such as {FILE}")
    check_size(detector.model)
    calibration = detector.calibration
    data = comparison_images(args.images, detector)
    batches = comparison_batches(data)
    log.info("exporting (seconds to some minutes) ...")
    with torch.no_grad():
        deployed = Deployed(
            detector.model.deploy(), data.decode, data.normalise,
            stacked=detector.config.data.stack_frames > 0, calibration=calibration,
        )  # fmt: skip
        exported = to_onnx(deployed, batches[-1][0], describe(detector, rate), rate)
        print_result(compare(exported, detector, batches, rate))
        print_result(timing(exported, deployed, batches[0][0]))
    say = log.info if calibration is None or calibration.smallest_rate() <= rate else log.warning
    say("%s", about_decisions(calibration, rate, finished=detector.state.finished))
    write_atomically(output, lambda file: file.write(exported.content))
    print_result(f"{output} ({len(exported.content) / 2**20:.1f} MB)")


def check_size(model: AnomalyModel) -> None:
    """Stop before the long work if the weights do not fit into one ONNX file."""
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if size > LARGEST_FILE:
        sizes = f"the model holds {size / 2**30:.2f} GiB, an ONNX file at most {LARGEST_FILE / 2**30:.2f}"
        raise ExportError(f"{sizes}; lower model.bank_fraction or model.width, or take another --backbone")


def comparison_images(where: Path | None, detector: Detector) -> ImageSet:
    """The images below `where`, or else the run's test set, or else the demo's."""
    config, normalise = detector.config, detector.normalise
    if where is not None:
        return images_below(where, config, normalise)
    try:
        if len(data := build_test(config, config, normalise)[0]):
            return data
        raise DatasetError("it has no test image")
    except DatasetError as error:
        log.info("comparing on demo images, as the run's own are not there: %s", error)
        return images_below(write_demo(DEMO_ROOT), config, normalise)


def comparison_batches(data: ImageSet) -> list[tuple[np.ndarray, Tensor]]:
    """Some images, spread over the set: each alone at its own size, and three at once at each of SIZES.

    Each batch as the file takes it, (B, H, W, 3) or (B, F, H, W, 3) uint8, and as `predict` does.
    """
    chosen = evenly_spread(range(len(data)), IMAGES)
    images = [[read_image(path) for path in frames_of(data, i)] for i in chosen]
    width, height = images[0][-1].size
    batches = [[as_inputs(data, frames, frames[-1].size)] for frames in images]
    for a, b in SIZES:
        size = max(round(a * width), SMALLEST_SIDE), max(round(b * height), SMALLEST_SIDE)
        batches.append([as_inputs(data, frames, size) for frames in (3 * images)[:3]])
    return [(np.stack([raw for raw, _ in batch]), torch.cat([x for _, x in batch])) for batch in batches]


def frames_of(data: ImageSet, index: int) -> list[Path]:
    """The files that one input of the model is made of, the judged one last."""
    sample = data.samples[index]
    earlier = (data.samples[data.earlier[index]].path,) if isinstance(data, FrameSet) else sample.earlier
    return [*earlier, sample.path]


def as_inputs(
    data: ImageSet, frames: Sequence[Image.Image], size: tuple[int, int]
) -> tuple[np.ndarray, Tensor]:
    """Frames at a size (width, height) as the file takes them, (H, W, 3) or (F, H, W, 3) uint8, and as
    `predict` does: (1, 3, h, w) or (1, F, 3, h, w), decoded as the set does it.
    """
    frames = [frame if frame.size == size else frame.resize(size) for frame in frames]
    raw = np.stack([np.asarray(frame) for frame in frames])
    if data.samples[0].earlier:
        return raw, data.normalise(data.decode.stacked(frames)[None])
    images = data.normalise(np.stack([np.asarray(data.decode.fit(frame)) for frame in frames]))
    return (raw, images[None]) if isinstance(data, FrameSet) else (raw[0], images)


class Deployed(nn.Module):
    """A deployed model from raw images of any size to a decision; what is exported."""

    scale: Tensor
    offset: Tensor
    held_out: Tensor | None

    def __init__(
        self,
        model: AnomalyModel,
        decode: Decode,
        normalise: Normalise,
        *,
        stacked: bool = False,
        calibration: Calibration | None = None,
    ) -> None:
        super().__init__()
        self.model, self.decode, self.stacked = model.eval().requires_grad_(False), decode, stacked
        scale, offset = (torch.from_numpy(factor)[:, None, None] for factor in normalise.factors())
        held_out = torch.tensor(calibration.scores, dtype=torch.float64) if calibration else None
        for name, values in (("scale", scale), ("offset", offset), ("held_out", held_out)):
            self.register_buffer(name, values)

    def forward(self, image: Tensor, rate: Tensor | None = None) -> tuple[Tensor, ...]:
        """RGB (B, H, W, 3) uint8, or frames (B, F, H, W, 3), to score (B,) and anomaly_map (B, h, w).

        Of a run that held normal images out also p_value (B,), and is_anomalous (B,): p_value <= rate.
        """
        values = self.decode.fit_tensor(image)
        values = grey_tensor(values) if self.stacked else values
        found = self.model.predict(values.float() * self.scale + self.offset)
        if self.held_out is None or rate is None:
            return found.score, found.anomaly_map
        above = (self.held_out >= found.score.double()[:, None]).sum(dim=1)
        p_value = (1 + above) / (1 + len(self.held_out))  # as Calibration.p_values
        return found.score, found.anomaly_map, p_value, p_value <= rate


@dataclass
class Exported:
    """The bytes of the file, and what it computes: uint8 images and other inputs to all outputs."""

    content: bytes
    run: Callable[..., Sequence[np.ndarray]]


def to_onnx(model: Deployed, images: np.ndarray, about: dict[str, str], rate: float) -> Exported:
    """Export by torch.export, and open the result in onnxruntime on the CPU.

    images: a sample input of at least two images. `about` becomes the file's metadata_props, `rate` the
    default of the input `rate`.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401 (what torch needs)
    except ImportError as error:
        raise ExportError(f"{error.name} is not installed: pip install -r requirements-export.txt") from error
    for name in ("onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    sides = {
        axis: torch.export.Dim(name, min=SMALLEST_SIDE, max=LARGEST_SIDE)
        for axis, name in ((images.ndim - 3, "height"), (images.ndim - 2, "width"))
    }
    shapes = {0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)} | sides
    decides = model.held_out is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of every size that it takes as fixed, which the model's sizes are
        program = torch.onnx.export(
            model,
            (torch.from_numpy(images), torch.tensor(rate))[: 1 + decides],
            dynamo=True,
            input_names=("image", "rate")[: 1 + decides],
            output_names=OUTPUTS + DECISION * decides,
            dynamic_shapes=(shapes, None)[: 1 + decides],
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    for key, value in about.items():
        proto.metadata_props.add(key=key, value=value)
    if decides:  # an input that has an initializer may be left out
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(rate, np.float32), "rate"))
    content = proto.SerializeToString()
    session = open_session(content)
    return Exported(content, lambda images, **inputs: session.run(None, {"image": images} | inputs))


def describe(detector: Detector, rate: float) -> dict[str, str]:
    """What a user of the file must know: how to make the input, what comes out, where it is from."""
    config, state, known = detector.config, detector.state, detector.calibration
    data, (height, width) = config.data, config.data.image_size
    frames = 3 if data.stack_frames else 2 if config.model.head == "frame" else 1
    shape = f"(B, {frames}, H, W, 3): earlier frames, and the judged one last"
    about = {
        "format_version": FORMAT,
        "input": f"image: uint8 RGB {shape if frames > 1 else '(B, H, W, 3)'}; any size, upright",
        "output": f"score: float32 (B,); anomaly_map: float32 (B, {height}, {width}); high is anomalous",
        "image_size": json.dumps(data.image_size),
        "center_crop": json.dumps(data.center_crop),
        "resize": f"{data.resize}, antialiased as Pillow's; after the centre crop; both are in the graph",
        "model": config.model.name,
        "backbone": config.model.backbone,
        "score": json.dumps(asdict(config.score)),
        "dataset": data.name,
        "category": data.category,
        "training": f"{state.iteration} of {config.train.iterations} steps",
        "commit": git_sha(),
    } | contents(detector.model, config)
    if step := data.stack_frames:
        about["stacked_frames"] = f"the frames {2 * step} and {step} before the judged one, as RGB, and it"
    if known:
        about["held_out_scores"] = json.dumps(sorted(known.scores))
        about["held_out_precision"] = state.config.run.eval_precision
        about["colour_scale"] = json.dumps([known.low, known.high])
        about["false_alarm_rate"] = repr(rate)
        about["decision"] = (
            "p_value: float32 (B,), (1 + number of held_out_scores >= score) / (1 + number of them); "
            "is_anomalous: bool (B,), p_value <= rate, an input (float32, no axis) that may be left out"
        )
    return about


def compare(
    exported: Exported, detector: Detector, batches: Sequence[tuple[np.ndarray, Tensor]], rate: float
) -> str:
    """The largest differences of score and map, in shares of the range of PyTorch's, in words. Raises
    ExportError if one is larger than TOLERANCE, shapes differ, or a decision is not that of the score.
    """
    found = [exported.run(raw) for raw, _ in batches]
    predicted = [detector.model.predict(images) for _, images in batches]
    texts = []
    for i, name in enumerate(OUTPUTS):
        ours = np.concatenate([getattr(p, name).numpy() for p in predicted])
        theirs = np.concatenate([outputs[i] for outputs in found])
        # scores of few images may lie close together: a hundredth of their size counts as a range
        spread = max(float(np.ptp(ours)), float(np.abs(ours).max()) / 100)
        off = np.abs(ours - theirs).max() / spread if ours.shape == theirs.shape else np.inf
        if not off <= TOLERANCE:
            problem = f"the exported model's {name} differs from PyTorch's by {off:.2g} of the range"
            raise ExportError(f"{problem} (allowed: {TOLERANCE:g}); nothing was written")
        texts.append(f"{name} {off:.1e}")
    if detector.calibration:
        other = exported.run(batches[-1][0], rate=np.array(0.5, np.float32))
        check_decisions(found, detector.calibration, rate)
        check_decisions([other], detector.calibration, 0.5)
    sizes = len({raw.shape[-3:] for raw, _ in batches})
    images = sum(len(raw) for raw, _ in batches)
    return f"largest difference on {images} images of {sizes} sizes, of the range: {', '.join(texts)}"


def check_decisions(found: Sequence[Sequence[np.ndarray]], calibration: Calibration, rate: float) -> None:
    """Raise ExportError unless p-values are those of the file's own scores, and flags those of p-values."""
    for score, _, p_value, flag in found:
        right = np.allclose(p_value, calibration.p_values(score.astype(np.float64)), rtol=1e-6)
        if not (right and np.array_equal(flag, p_value <= np.float32(rate))):
            raise ExportError("the exported model does not decide as predict.py does; nothing was written")


def timing(exported: Exported, model: nn.Module, raw: np.ndarray) -> str:
    """Milliseconds for the one image `raw` on the CPU: the exported model beside PyTorch."""
    image = torch.from_numpy(raw)
    calls = (lambda: exported.run(raw)), (lambda: model(image))
    theirs, ours = (1000 * min(timeit.repeat(call, number=1, repeat=1 + REPEATS)[1:]) for call in calls)
    height, width = raw.shape[-3:-1]
    return (
        f"ms for one image of {width} x {height} (CPU, {torch.get_num_threads()} threads, fastest of "
        f"{REPEATS}): ONNX Runtime {theirs:.1f}, PyTorch {ours:.1f}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
