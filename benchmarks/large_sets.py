"""Time and peak memory of `predict.py --save none` and `test.py` on many images of 1024 x 1024.

python benchmarks/large_sets.py --images 20000

Eight JPEG pictures are written under many names, made different by some bytes after their end. The model is
UniNet on timm's smallest EfficientNet with random weights, so that decoding, maps and metrics are most of the
time: add your own backbone's. Memory is looked at twenty times a second: what the process alone holds
(anonymous), and all that is resident, with pages of temporary files that the system may write out.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import build_model  # noqa: E402
from utils.checkpoint import Checkpoint  # noqa: E402
from utils.cli import new_parser, print_result, run_command  # noqa: E402
from utils.layers import load_config  # noqa: E402
from utils.yaml_io import CONFIGS  # noqa: E402

PICTURES, SIDE = 8, 1024


def main(argv: Sequence[str]) -> None:
    """Write the files, run both commands, and say what they took."""
    args = parse_arguments(argv)
    with tempfile.TemporaryDirectory(prefix="uninet-large-", dir=args.folder) as folder:
        root = Path(folder)
        write_dataset(root / "part", args.images)
        write_model(root / "run/last.pt", root / "part", args.backbone, args.image_size)
        run = ["--checkpoint", str(root / "run"), "--device", args.device, "--quiet"]
        predicted = ["--save", "none", "--output", str(root / "predictions")]
        for name, more in (("predict.py", [str(root / "part/test"), *predicted]), ("test.py", [])):
            seconds, busy, own, resident = measured([sys.executable, str(ROOT / name), *run, *more])
            print_result(
                f"{name}: {args.images} images of {SIDE}x{SIDE} at {args.image_size}, {seconds:.1f} s "
                f"({busy:.1f} s of processors), {1000 * seconds / args.images:.1f} ms per image; "
                f"peak {own:.2f} GB of its own, {resident:.2f} GB resident"
            )


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=20000, help="of the set")
    parser.add_argument("--image-size", type=int, default=256, help="side that the model works at")
    parser.add_argument("--backbone", default="test_efficientnet", metavar="NAME", help="of the model")
    parser.add_argument("--device", default="cpu", help="where to compute")
    parser.add_argument("--folder", metavar="DIR", help="where the files are written (default: the system's)")
    return parser.parse_args(argv)


def write_dataset(root: Path, count: int) -> None:
    """`count` test images, every second one with a defect and its mask, and four to train on."""
    rng = np.random.default_rng(0)
    contents = []
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[200:300, 400:520] = 255
    for folder in ("train/good", "test/good", "test/spot", "ground_truth/spot"):
        (root / folder).mkdir(parents=True)
    Image.fromarray(mask).save(root / "mask.png")
    for number in range(PICTURES + 4):
        coarse = rng.integers(40, 200, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
        pixels = np.array(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        pixels[mask > 0] += np.uint8(50 * (number % 2))
        path = root / f"train/good/{number}.jpg"
        Image.fromarray(pixels).save(path, quality=90)
        contents.append(path.read_bytes())
        if number < PICTURES:
            path.unlink()
    for i in range(count):
        kind = ("good", "spot")[i % 2]
        (root / f"test/{kind}/{i:06d}.jpg").write_bytes(contents[i % PICTURES] + b"\0" * (i // PICTURES))
        if kind == "spot":
            os.link(root / "mask.png", root / f"ground_truth/spot/{i:06d}_mask.png")
    (root / "mask.png").unlink()


def write_model(path: Path, root: Path, backbone: str, side: int) -> None:
    """A checkpoint of a model that was not trained."""
    settings = {"run.data_root": str(root), "data.category": "part", "data.image_size": side}
    settings |= {"data.calibration_fraction": 0, "model.backbone": backbone}
    settings |= {"model.weights": "random", "train.precision": "fp32", "model.bank_fraction": 0}
    config = load_config(CONFIGS / "folder.yaml", settings)
    Checkpoint(config, build_model(config).state_dict(), config.train.iterations).save(path)


def measured(command: Sequence[str]) -> tuple[float, float, float, float]:
    """Seconds of a command, those of all processors, and its peak memory in GB: of its own, and resident.

    Raises:
        RuntimeError: if it fails.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start, peaks = time.perf_counter(), {"RssAnon": 0, "VmRSS": 0}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)  # noqa: S603
    while process.poll() is None:
        time.sleep(0.05)
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        for name, _, value in (line.partition(":") for line in lines):
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]))
    if process.returncode:
        raise RuntimeError(f"{command[1]} ended with code {process.returncode}")
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, busy, peaks["RssAnon"] / 2**20, peaks["VmRSS"] / 2**20


if __name__ == "__main__":
    sys.exit(run_command(main))
