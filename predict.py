"""Score new images: an image or a folder -> scores.csv, heatmaps, maps, masks.

python predict.py --checkpoint RUN IMAGE_OR_FOLDER
python predict.py --checkpoint RUN --watch FOLDER
"""

import argparse
import hashlib
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.build import image_set, new_samples
from datasets.check import filter_unreadable, write_skipped
from datasets.files import find_images, unused_files
from datasets.images import upright_size
from datasets.loader import THREADS, ImageSet
from datasets.samples import Sample, log_unused
from evaluation.figures import overlay, write_map, write_png
from evaluation.results import SCORES, begin, claim, finish, names_of, write_scores
from evaluation.scoring import Scores
from evaluation.watch import Watch, watched
from model import load_detector
from model.detector import Calibration, Detector, check_rate
from model.inference import Predicted
from utils import cli
from utils.config import Config
from utils.errors import ConfigError, DatasetError
from utils.files import printable

SCALE_PIXELS = 1 << 26  # of maps that make the colour scale of a model without calibration
# of --save: folder below --output, suffix
KINDS = {"overlay": ("heatmaps", ".png"), "map": ("maps", ".tiff"), "mask": ("masks", ".png")}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.new_parser(__doc__.split("\n")[0])
    add_flags(parser, "IMAGE_OR_FOLDER", "folders are searched below, too")
    cli.SKIP.add(parser, "skip-unreadable")
    place, text = Path("predictions"), "where results go"
    parser.add_argument("--output", type=cli.user_path, default=place, metavar="DIR", help=text)
    cli.add_overwrite_flag(parser)
    text = "overlay (picture), map (32-bit float TIFF), mask (PNG of 0 and 255), with commas; or none"
    parser.add_argument("--save", default="overlay", metavar="KINDS", help=text)
    text = "score what arrives in the folder, until stopped; the same command goes on with its scores.csv"
    parser.add_argument("--watch", action="store_true", help=text)
    return parser.parse_args(argv)


def add_flags(parser: argparse.ArgumentParser, shown: str, text: str) -> None:
    """What calibrate.py takes, too: images, a model for them, a rate."""
    parser.add_argument("images", type=cli.user_path, metavar=shown, help=text)
    text = "a run folder or a checkpoint file"
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help=text)
    text = "share of normal images that may be flagged"
    parser.add_argument("--false-alarm-rate", type=float, default=0.01, metavar="R", help=text)
    cli.add_device_flags(parser)


def detector_of(args: argparse.Namespace) -> Detector:
    """The model that `add_flags` was given. Raises ConfigError for a wrong rate, or if it takes clips."""
    check_rate(args.false_alarm_rate)
    where = {"device": args.device, "precision": args.precision, "batch_size": args.eval_batch_size}
    detector = load_detector(args.checkpoint, **where)
    if detector.config.data.frame_offset:
        reads = "predict.py reads single images: train with data.frame_offset=0"
        raise ConfigError(f"this model predicts a frame from an earlier one; {reads}")
    return detector


def main(argv: Sequence[str]) -> None:
    """Write scores.csv and the pictures of each image, and print the most anomalous ones."""
    args = parse_arguments(argv)
    detector, rate = detector_of(args), args.false_alarm_rate
    config, calibration = detector.config, detector.calibration
    kinds = [] if args.save == "none" else args.save.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ConfigError(f"--save {args.save}: '{unknown[0]}' is none of {', '.join(KINDS)}, none")
    if "mask" in kinds and calibration is None:
        way_out = "train with data.calibration_fraction above 0, or on more images"
        raise ConfigError(f"--save mask needs a level of held-out images, and there are none: {way_out}")
    if args.watch:
        watch(args, detector, kinds)
        return
    root = (args.images if args.images.is_dir() else args.images.parent).resolve()
    samples = samples_at(root if args.images.is_dir() else root / args.images.name, args.output, config)
    earlier = claim(args.output, overwrite=args.overwrite, images=[s.path for s in samples])
    samples, skipped = filter_unreadable(samples) if args.skip_unreadable else (samples, {})
    if not samples:
        raise DatasetError(f"none of the {len(skipped)} images at {args.images} can be read")
    files = files_of(kinds, [s.path.relative_to(root) for s in samples], args.output)
    data = image_set(config, detector.normalise, samples)
    begin(args.output, earlier)
    found = score_and_write(detector.predictions(data, quiet=args.quiet), data, files, calibration)
    scores = Scores(samples, found, np.empty((0, *data.decode.size), np.float32), None, 0.0)
    p_values = None if calibration is None else calibration.p_values(scores.score)
    write_scores(args.output / "scores.csv", scores, root, p_values=p_values, rate=rate)
    write_skipped(args.output, skipped, root)
    finish(args.output)
    cli.print_result(summary(scores, p_values, rate, root))
    decides = calibration is not None and calibration.smallest_rate() <= rate
    say_why = cli.log.info if decides else cli.log.warning
    say_why("%s", about_decisions(calibration, rate, finished=detector.state.finished))
    cli.log.info("written to %s", args.output)


def watch(args: argparse.Namespace, detector: Detector, kinds: Sequence[str]) -> None:
    """Score what arrives in a folder until interrupted, each image once, over restarts, too."""
    config, calibration, rate = detector.config, detector.calibration, args.false_alarm_rate
    if calibration is None:
        ways_out = "take calibrate.py's file, or train with data.calibration_fraction above 0"
        raise ConfigError(f"--watch needs a model with p-values: {ways_out}")
    if config.data.stack_frames:
        raise ConfigError("--watch reads single images: train with data.stack_frames=0")
    root, output = args.images.resolve(), args.output.resolve()
    if not root.is_dir() or root == output:
        raise DatasetError(f"--watch needs a folder of images that is not --output; found {args.images}")
    model = hashlib.sha256(detector.path.read_bytes()).hexdigest()
    about = {"images": str(root), "model": model, "precision": detector.precision, "false-alarm rate": rate}

    def score(paths: list[Path]) -> np.ndarray:
        data = image_set(config, detector.normalise, new_samples(paths, root, config))
        inside = [path.relative_to(root) for path in paths]
        # all keep their ending, in whatever chunk a second one of that name comes
        files = files_of(kinds, [path.with_name(f"{path.name}.x") for path in inside], output)
        return score_and_write(detector.predictions(data, quiet=True), data, files, calibration)

    with watched(output, about, overwrite=args.overwrite):
        log_unused(root, unused_files(root, find_images(root), apart=[output]))
        say_why = cli.log.info if calibration.smallest_rate() <= rate else cli.log.warning
        say_why("%s", about_decisions(calibration, rate, finished=True))
        with suppress(KeyboardInterrupt):
            Watch(root, output, calibration, rate, printable(config.data.category)).run(score)
    cli.log.info("stopped; the same command goes on with %s", output / SCORES)


def files_of(kinds: Sequence[str], inside: Sequence[Path], output: Path) -> dict[str, list[Path]]:
    """The files of each kind for images, given by their paths below the root."""
    where = {kind: (output / KINDS[kind][0], names_of(inside, KINDS[kind][1])) for kind in kinds}
    return {kind: [folder / name for name in names] for kind, (folder, names) in where.items()}


def samples_at(where: Path, output: Path | None, config: Config) -> list[Sample]:
    """The images at or below `where` as samples of unknown label, without what is below `output`."""
    if output and where.is_dir() and where.resolve() == output.resolve():
        raise DatasetError(f"--output {output} is the folder of the images; choose another one")
    found = find_images(where)
    if output and output.resolve().is_relative_to(where.resolve()):
        kept = [p for p in found if not p.parent.resolve().is_relative_to(output.resolve())]
        if len(kept) < len(found):
            cli.log.info("%d images below %s are left alone: predictions", len(found) - len(kept), output)
        found = kept
    if found and where.is_dir():
        log_unused(where, unused_files(where, found, apart=[output] if output else ()))
    return new_samples(found, where, config)


def score_and_write(
    predicted: Iterable[Predicted],
    data: ImageSet,
    files: dict[str, list[Path]],
    calibration: Calibration | None,
) -> np.ndarray:
    """Write the files of each kind batch by batch, in threads, and keep the scores (N,) alone.

    Without calibration the colour scale is made from the first SCALE_PIXELS pixels, whose images wait.
    """
    scale = (calibration.low, calibration.high) if calibration else None
    level = calibration.pixel_level if calibration else np.inf
    scores = [np.empty(0)]
    jobs: list[Future[None]] = []
    waiting: list[tuple[int, np.ndarray, np.ndarray]] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for part in predicted:
            scores.append(part.score)
            images = data.normalise.pixels(part.images) if "overlay" in files else part.maps
            waiting += zip(part.indices, images, part.maps, strict=True)
            if scale is None and "overlay" in files:
                done = part.indices[-1] + 1
                if done < len(data) and done * part.maps[0].size < SCALE_PIXELS:
                    continue
                maps = np.stack([anomaly_map for *_, anomaly_map in waiting])
                scale = float(np.median(maps)), float(np.quantile(maps, 0.999))
            for job in jobs:  # of the batch before; an error in one stops the command
                job.result()
            write = Writer(data, files, scale or (0, 1), level)
            jobs = [pool.submit(write, *item) for item in waiting]
            waiting = []
        for job in jobs:
            job.result()
    return np.concatenate(scores)


@dataclass(frozen=True)
class Writer:
    """Writes what `files` lists for an image: overlays on one colour scale, masks of pixels above `level`."""

    data: ImageSet
    files: dict[str, list[Path]]
    scale: tuple[float, float]
    level: float

    def __call__(self, index: int, image: np.ndarray, anomaly_map: np.ndarray) -> None:
        """image: (H, W, 3) uint8, anomaly_map: (H, W), both of the working size; of that place in `data`."""
        paths = {kind: names[index] for kind, names in self.files.items()}
        if "overlay" in paths:
            write_png(paths["overlay"], overlay(image, anomaly_map, self.scale))
        if not {"map", "mask"} & paths.keys():
            return
        whole = self.data.decode.to_image(anomaly_map, *upright_size(self.data.samples[index].path))
        if "map" in paths:
            write_map(paths["map"], whole)
        if "mask" in paths:
            write_png(paths["mask"], 255 * (whole > self.level).astype(np.uint8))


def about_decisions(calibration: Calibration | None, rate: float, *, finished: bool) -> str:
    """What a flag means here, in one sentence. finished: calibration is done at the end of the training."""
    if calibration is None:
        none = "held no image out (data.calibration_fraction is 0, or its images are too few)"
        lacks = none if finished else "has not finished its training"
        return f"the model {lacks}: no p-values, no fixed colour scale"
    held_out, smallest = len(calibration.scores), calibration.smallest_rate()
    if smallest > rate:
        return (
            f"{held_out} held-out normals guarantee a false-alarm rate of {smallest:.3g} at best, so none is "
            f"flagged at {rate:.3g}; hold out more, or choose a higher --false-alarm-rate"
        )
    return (
        f"of normal images like the {held_out} held-out ones (same part, camera and light) at most a share "
        f"of {rate:g} is flagged, on average over such held-out sets; of other images nothing is guaranteed"
    )


def summary(scores: Scores, p_values: np.ndarray | None, rate: float, root: Path) -> str:
    """The ten most anomalous images, and how many were flagged."""
    lines = []
    for i in np.argsort(-scores.score)[:10]:
        p = "" if p_values is None else f"  p = {p_values[i]:.3f}" + "  ANOMALOUS" * bool(p_values[i] <= rate)
        lines.append(f"{scores.score[i]:10.4g}{p}  {printable(scores.samples[i].path.relative_to(root))}")
    last = f"{len(scores.score)} images, most anomalous first"
    if p_values is not None:
        last += f"; {int((p_values <= rate).sum())} flagged at false-alarm rate {rate:g}"
    return "\n".join([*lines, last])


if __name__ == "__main__":
    sys.exit(cli.run_command(main))
